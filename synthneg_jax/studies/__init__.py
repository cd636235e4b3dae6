"""Grids of runs, and the figures' data."""
