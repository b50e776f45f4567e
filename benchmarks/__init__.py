"""How right and how fast the losses are, beside others: `accuracy`, `timing`, `gradient_filter`, `gpu.sh`."""

import os

# threads that wait by spinning starve each other on a busy machine; libgomp reads this when torch is imported
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
