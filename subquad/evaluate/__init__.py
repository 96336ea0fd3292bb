"""Evaluation: what a student keeps of its teacher, and what it costs to run."""
