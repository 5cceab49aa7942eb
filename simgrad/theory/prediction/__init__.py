"""One step, and whole runs, to first order and beyond."""
