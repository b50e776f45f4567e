"""Accuracy, time and memory of the losses and of other implementations; see docs/benchmarks.md."""

import os

# threads that wait by spinning starve each other on a busy machine; libgomp reads this when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
