"""Drawing: the report and the figures."""
