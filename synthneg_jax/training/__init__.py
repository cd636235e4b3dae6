"""Batches of token trees, the train step, and the train loop."""
