"""Grading: reads a response, parses its answer and compares it with the gold answer.

Start at answers.py, the interface; verdicts.py has the order of the steps.
"""
