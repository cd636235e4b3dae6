"""Everything drawn, from records alone: the report, the trace viewer and the figures."""
