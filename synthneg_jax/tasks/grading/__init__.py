"""The grader behind `tasks.answers`: the answer grammar, exact comparison, and worker processes."""
