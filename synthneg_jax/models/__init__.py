"""The Flax decoder, its adapters, and import from and export to Hugging Face folders."""
