"""The paper: the token tree, losses, advantages, pits and pairs, one function for each equation."""
