"""The decoding engine: every sampled or greedy token of this project comes from here."""
