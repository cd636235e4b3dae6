"""Studies made of many runs, each with its plots: the scaling study, the star graph and the credit
toy.
"""
