"""From responses to verdicts: reading the response, the answer grammar, equality, and the worker
pool.
"""
