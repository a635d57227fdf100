"""Where calculations run; an executor knows nothing of calculators."""
