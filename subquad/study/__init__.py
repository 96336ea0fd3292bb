"""Several students side by side: the grid and its table."""
