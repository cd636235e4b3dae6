"""Compiles a config's programs for absent TPUs: memory, FLOPs, traffic and cost."""
