"""Problems of each task, generated or read from files."""
