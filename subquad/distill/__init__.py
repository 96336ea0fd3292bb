"""Distillation of a student in three stages.

`pipeline.distill` runs a recipe. `matrix_mixing`, `hidden_alignment` and `end_to_end` define what each stage trains and
its loss; `trainer` trains a stage.
"""
