"""The Flax decoder and the way of weights between it and Hugging Face folders."""
