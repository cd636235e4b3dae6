"""The decoding engine, policies, and remote servers behind the engine's interface."""
