"""What every program needs whatever it computes: config, start-up, mesh, records, checkpoints, progress."""
