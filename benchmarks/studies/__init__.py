"""One-off measurements: `python -m benchmarks.studies.NAME`."""
