"""The method: the token tree, losses, advantages, pits and pairs, one function per equation."""
