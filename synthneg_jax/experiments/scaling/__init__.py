"""The scaling study: cells by data size, method and seed, and the paper's figures."""
