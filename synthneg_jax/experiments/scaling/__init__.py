"""The scaling study: cells over data size, method and seed, and the paper's figures drawn from
them.
"""
