"""Figure 8: what SFT memorises on star graphs, and what per-step DPO makes of it."""
