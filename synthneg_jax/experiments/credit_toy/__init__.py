"""Step-level credit against response-level credit on an MDP where every value is known."""
