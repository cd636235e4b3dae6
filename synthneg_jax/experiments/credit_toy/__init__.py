"""Credit by step and credit by response compared on an MDP with exact values."""
