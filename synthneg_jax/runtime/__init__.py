"""What every program needs whatever it computes: config schema, start-up, mesh, checkpoints,
progress.
"""
