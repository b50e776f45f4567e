"""Which stages there are, how long each may take, and the two runs that they make up."""

from dataclasses import dataclass

LIMIT = 340.0  # seconds of a run


@dataclass(frozen=True)
class Stage:
    """One process."""

    seconds: float  # at most
    question: str


STAGES = {
    "canary": Stage(60, "does each kernel run, and is it right, tiny, in a process of its own"),
    "ceilings": Stage(35, "what the bare copies and products take that bound everything else"),
    "tests": Stage(90, "do the tests of the kernels pass, compiled"),
    "sweep": Stage(75, "which launch shape is best: x's GEMM, and given logits"),
    "steps": Stage(60, "whole steps over the bare products, and where one spends its time"),
    "ncu": Stage(35, "what limits the GEMM and the kernel of given logits"),
    "sanitizer": Stage(40, "are there races or accesses out of bounds"),
    "ours": Stage(60, "whole steps of every setting and shape, and their peak memory"),
    "peers": Stage(90, "the same for others, where they answer the same question or a simpler one"),
    "training": Stage(30, "a LoRA step of a model of 1B parameters, beside the model's own loss"),
    "accuracy": Stage(30, "the error on real hidden states"),
    "scaling": Stage(30, "time and memory for few and many tokens"),
}
RUNS = {
    "prove": ("canary", "ceilings", "tests", "sweep", "steps", "ncu", "sanitizer"),
    "record": (
        "canary",
        "ceilings",
        "tests",
        "ours",
        "peers",
        "training",
        "accuracy",
        "scaling",
        "sanitizer",
    ),
}
