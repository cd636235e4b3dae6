"""Batches of token trees, the train step, and the one train loop."""
