"""Capable models that write problems and solutions: HTTP client, reply cache, prompts."""
