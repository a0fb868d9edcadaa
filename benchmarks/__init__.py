"""What each layer can do, measured beside what else does the same: ``python -m benchmarks``."""
