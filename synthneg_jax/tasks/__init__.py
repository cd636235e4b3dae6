"""Problems, prompts, step boundaries, answers and grading."""
