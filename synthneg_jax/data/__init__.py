"""Problem files, datasets and records; prompts, steps and token text."""
