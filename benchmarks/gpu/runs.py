"""The stages, their time limits, and the two runs that they form."""

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
    "canary": Stage(75, "does each kernel run, and is it correct on a tiny input"),
    "ceilings": Stage(30, "how long do the bare copies and matrix products take"),
    "tests": Stage(110, "do the kernels' tests pass, compiled"),
    "sweep": Stage(60, "which launch config of the GEMM that makes x is fastest"),
    "logits": Stage(30, "which launch config of the kernel of given logits is fastest"),
    "steps": Stage(75, "complete steps relative to the bare products, and profiles of three steps"),
    "ncu": Stage(80, "what limits the GEMM and the kernel of given logits"),
    "sanitizer": Stage(120, "races in shared memory, accesses out of bounds"),
    "ours": Stage(70, "time and peak memory of complete steps, for every setting and shape"),
    "peers": Stage(90, "the same for other implementations, each on the problem that it solves"),
    "unsloth": Stage(30, "unsloth-zoo's fused head, from the folder that --unsloth-zoo names"),
    "training": Stage(40, "a LoRA step of a model of 1B parameters, with its own loss and fused"),
    "accuracy": Stage(30, "errors on real hidden states"),
    "scaling": Stage(30, "time and memory for few and many tokens"),
    "soft": Stage(25, "targets of 20 classes relative to class indices; the target is 1.03"),
}
RUNS = {
    "prove": ("canary", "ceilings", "tests", "sweep", "logits", "steps", "ncu", "sanitizer"),
    "record": ("canary", "ceilings", "ours", "logits", "peers", "training", "accuracy", "scaling", "soft",
               "unsloth", "tests"),
}  # fmt: skip
