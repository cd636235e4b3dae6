"""Compiles a config's programs for TPUs that are not there: memory, FLOPs, traffic and cost."""
