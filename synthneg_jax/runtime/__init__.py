"""Shared by all programs: config schema, start-up, device mesh, checkpoints, progress."""
