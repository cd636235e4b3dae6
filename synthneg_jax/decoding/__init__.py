"""The decoding engine (sampling, rollouts, evaluation), policies, and remote servers behind the
same interface.
"""
