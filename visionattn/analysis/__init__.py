"""Looking into models and operators: benchmarks."""
