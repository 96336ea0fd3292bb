"""Tiny models, recipes and reference implementations that the tests share."""
