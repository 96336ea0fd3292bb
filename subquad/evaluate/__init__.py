"""Measuring: what a student kept, and what it costs to run."""
