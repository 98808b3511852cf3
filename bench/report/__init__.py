"""The results of a comparison, as JSON, as a table in a terminal, and as an HTML page."""
