"""Figure 8: per-step DPO on star graphs, where SFT memorises."""
