"""Distillation of a student in three stages.

`pipeline.distill` runs a recipe. `layerwise` and `end_to_end` define what each stage trains and its loss; `trainer`
trains a stage.
"""
