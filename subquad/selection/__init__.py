"""Which key/value groups or layers of a teacher a student should keep whole."""
