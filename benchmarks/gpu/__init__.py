"""Checks and measurements on a GPU, in two runs of less than six minutes each: `python -m benchmarks.gpu`."""
