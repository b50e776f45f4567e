"""Which stages there are, how long each may take, and the two runs that they make up."""

from dataclasses import dataclass

LIMIT = 340.0  # seconds of a run
ZOO_FILE = "unsloth_zoo/fused_losses/fused_linear.py"
ZOO_INSTALL = "make one with pip install --no-deps --target DIR unsloth_zoo==2026.10.9"


@dataclass(frozen=True)
class Stage:
    """One process."""

    seconds: float  # at most
    question: str


STAGES = {
    "canary": Stage(45, "does each kernel run, and is it correct on a tiny input, in a process of its own"),
    "ceilings": Stage(30, "what the bare copies and products take that bound everything else"),
    "tests": Stage(70, "do the tests of the kernels pass, compiled"),
    "sweep": Stage(70, "which launch shape is best: x's GEMM, and given logits"),
    "steps": Stage(55, "whole steps relative to the bare GEMMs, and where one spends its time"),
    "ncu": Stage(35, "what limits the GEMM and the kernel of given logits"),
    "sanitizer": Stage(30, "races in shared memory, accesses out of bounds"),
    "ours": Stage(60, "whole steps of every setting and shape, and their peak memory"),
    "peers": Stage(55, "the same for other implementations, each on the question that it answers"),
    "unsloth": Stage(20, "unsloth-zoo's fused head, from the folder that --unsloth-zoo names"),
    "training": Stage(25, "a LoRA step of a model of 1B parameters, beside the model's own loss"),
    "accuracy": Stage(15, "the error on real hidden states"),
    "scaling": Stage(20, "time and memory for few and many tokens"),
}
RUNS = {
    "prove": ("canary", "ceilings", "tests", "sweep", "steps", "ncu", "sanitizer"),
    "record": ("canary", "ceilings", "ours", "tests", "peers", "unsloth", "training", "accuracy", "scaling"),
}
