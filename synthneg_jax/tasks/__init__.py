"""Problems by task: generated ones and those read from files."""
