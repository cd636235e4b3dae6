"""The report, the trace viewer and the figures, drawn from records alone."""
