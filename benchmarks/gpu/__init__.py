"""Checks and measurements on a GPU, in runs of less than six minutes each: `python -m benchmarks.gpu`."""
