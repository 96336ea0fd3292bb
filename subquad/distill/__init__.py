"""Teaching a student in three stages: losses, stages, the trainer of one stage, the pipeline of all."""
