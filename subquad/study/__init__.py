"""Studies: runs a grid of recipes, aggregates seeds and writes the results."""
