"""Distillation of a student in three stages.

`pipeline.distill` runs a recipe. `stage1_matrix_mixing`, `stage2_hidden_alignment` and `stage3_end_to_end` define what
each stage trains and its loss; `trainer` trains a stage.
"""
