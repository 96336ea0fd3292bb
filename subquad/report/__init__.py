"""The page of a study: figures, tables and text from its results."""
