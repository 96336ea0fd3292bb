"""Students: replacing a teacher's attention, calibration, cache, configuration, saving and loading."""
