"""Students: reading a teacher's attention, replacing it, cache, configuration, saving and loading."""
