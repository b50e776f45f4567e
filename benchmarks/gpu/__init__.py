"""What has to be seen on a GPU, in two runs of less than six minutes: `python -m benchmarks.gpu`."""
