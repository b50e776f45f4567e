"""How right, how fast and how large the losses are, beside others; docs/benchmarks.md says how."""

import os

# threads that wait by spinning starve each other on a busy machine; libgomp reads this when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
