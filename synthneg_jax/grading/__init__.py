"""Grading: reads a response, parses its answer and compares it with the gold answer."""
