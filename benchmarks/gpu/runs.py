"""The stages, their time limits, and the runs that they form."""

from dataclasses import dataclass

LIMIT = 340.0  # seconds per run
ZOO_FILE = "unsloth_zoo/fused_losses/fused_linear.py"
ZOO_INSTALL = "make one with pip install --no-deps --target DIR unsloth_zoo==2026.10.9"


@dataclass(frozen=True)
class Stage:
    """A stage, which runs in a process of its own."""

    seconds: float  # time limit
    question: str


STAGES = {
    "canary": Stage(44, "does each kernel run, and is it correct on a tiny input"),
    "ceilings": Stage(10, "how long do the bare copies and matrix products take"),
    "tests": Stage(75, "do the kernels' tests pass, compiled"),
    "sweep": Stage(40, "which launch config of the GEMM that makes x is fastest"),
    "logits": Stage(18, "which launch config of the kernel of given logits is fastest"),
    "steps": Stage(55, "complete steps relative to the bare products, and profiles of three steps"),
    "ncu": Stage(45, "what limits the GEMM and the kernel of given logits"),
    "sanitizer": Stage(52, "races in shared memory, accesses out of bounds"),
    "ours": Stage(48, "time and peak memory of complete steps, for every setting and shape"),
    "peers": Stage(138, "the same for other implementations, each on the problem that it solves"),
    "unsloth": Stage(24, "unsloth-zoo's fused head, from the folder that --unsloth-zoo names"),
    "training": Stage(35, "a LoRA step of a model of 1B parameters, with its own loss and fused"),
    "accuracy": Stage(22, "errors on real hidden states"),
    "scaling": Stage(24, "time and memory for few and many tokens"),
    "backends": Stage(55, "Triton relative to PyTorch outside Triton's main path"),
    "soft": Stage(15, "targets of 20 classes relative to class indices"),
}
RUNS = {
    "prove": ("canary", "ceilings", "tests", "sweep", "logits", "steps", "ncu", "sanitizer"),
    "record": ("canary", "ceilings", "ours", "peers", "training", "accuracy", "scaling", "soft"),
    "extras": ("unsloth", "backends"),
}  # fmt: skip
