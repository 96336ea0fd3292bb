"""The attention of a teacher: tracing one forward pass, finding projections, reading scores and activations."""
