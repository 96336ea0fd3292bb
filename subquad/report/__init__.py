"""The report of a study: one HTML page with figures, tables and text, made from result files."""
