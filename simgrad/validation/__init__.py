"""Theory held against measurement, and benchmarks."""
