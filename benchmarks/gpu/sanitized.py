"""Run every path of every Triton kernel once, on small ragged shapes, under compute-sanitizer.

    python -m benchmarks.gpu.sanitized
    compute-sanitizer --tool racecheck --error-exitcode 9 python -m benchmarks.gpu.sanitized
    python -m benchmarks.gpu.sanitized --names       # the kernels, one per line, for --kernel-name
    python -m benchmarks.gpu.sanitized --planted     # reads past an allocation: memcheck must report it

The exit status is 1 if a result is not finite, or if a kernel of this project was never launched.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

from benchmarks.interpreted import INTERPRETED, repair  # before anything that imports Triton

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.launches import kernels, watching
from tests.kernels.cases import cross_entropy, linear_cross_entropy
from ual_kernels._triton import cross_entropy as of_logits
from ual_kernels._triton import linear_cross_entropy as of_states

MODULES = (of_logits, of_states)
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# on a GPU, more tokens than one tile; ragged in tokens and columns
TOKENS, VOCAB, FEATURES = (4, 35, 32) if INTERPRETED else (131, 579, 80)


@triton.jit
def _planted(source_ptr, out_ptr):
    tl.store(out_ptr, tl.load(source_ptr + 4_096))


def drawn(dtype: torch.dtype, features: int = FEATURES) -> dict[str, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    target[1] = -100
    return {
        "hidden": torch.randn(TOKENS, features, device=DEVICE).to(dtype),
        "head": (torch.randn(VOCAB, features, device=DEVICE) * 3 / features**0.5).to(dtype),
        "logits": (3 * torch.randn(TOKENS, VOCAB, device=DEVICE)).to(dtype),
        "bias": torch.randn(VOCAB, device=DEVICE).to(dtype),
        "classes": torch.linspace(0.0, 2.0, VOCAB, device=DEVICE),
        "a": torch.randn(4, features, device=DEVICE).to(dtype),
        "b": torch.randn(VOCAB, 4, device=DEVICE).to(dtype),
        "target": target,
        "smoothing": torch.rand(TOKENS, device=DEVICE) * 0.2,
        "weight": torch.rand(TOKENS, device=DEVICE) + 0.5,
    }


Path = Callable[[], list[Tensor]]


def logits_paths() -> Iterator[tuple[str, Path]]:
    every = {"softcap": 20.0, "logit_scale": 0.5, "z_loss": 1e-3, "return_statistics": True}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        t = drawn(dtype)
        for name, flags in {
            "plain": {},
            "all": {**every, "weight": t["classes"]},
            "in place": {"inplace_backward": True},
            "in place, all": {**every, "weight": t["classes"], "inplace_backward": True},
        }.items():
            if dtype == torch.float16 and "in place" in name:
                continue  # not supported: unscaled gradients exceed the range of float16

            def path(t: dict[str, Tensor] = t, flags: dict[str, Any] = flags) -> list[Tensor]:
                leaf = t["logits"].clone().requires_grad_()
                loss = cross_entropy(
                    leaf * 1, t["target"], label_smoothing=t["smoothing"], sample_weight=t["weight"],
                    backend="triton", **flags,
                )  # fmt: skip
                loss = loss[0] if isinstance(loss, tuple) else loss
                # an upstream gradient other than 1, so that gradients in place are scaled
                return [loss, *torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.5))]

            yield f"logits/{dtype}/{name}", path


def linear_paths() -> Iterator[tuple[str, Path]]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    t = drawn(bf16)
    bias = {"linear_bias": t["bias"]}
    far = t["bias"].clone()
    far[
        t["target"][0]
    ] = -300.0  # below the range of the constant reference point: the token is computed again
    everything = {
        **bias, "weight": t["classes"], "logit_scale": 0.5, "z_loss": 1e-3, "return_statistics": True,
    }  # fmt: skip
    plans: dict[str, dict[str, Any]] = {
        "frozen": {},
        "evaluation": {"learn": ()},
        "trainable": {"learn": ("hidden", "head")},
        "none": {"reduction": "none"},
        "none, trainable": {"reduction": "none", "learn": ("hidden", "head")},
        "all": everything,
        "all, capped": {**everything, "softcap": 20.0},
        "capped, trainable": {"softcap": 20.0, "learn": ("hidden", "head")},
        "far": {"linear_bias": far, "return_statistics": True},
        "chunks": {"chunk_tokens": TOKENS // 2},
        "smoothing_fn": {"label_smoothing": lambda statistics: 0.1 * statistics.log_prob.exp(), **bias},
        "lora": {"lora": True, "learn": ("hidden", "a", "b")},
        "lora, capped": {"lora": True, "learn": ("hidden", "a", "b"), "softcap": 20.0},
        "trained bias": {"bias": True, "learn": ("hidden", "head", "bias")},
        "count known": {"max_loss_tokens": TOKENS - 1},
        "not compacted": {"compact": False},
        "padded": {"vocab_size": VOCAB - 5},
        "fast": {"precision": "fast"},
    }
    for variant in ("tma", "pointer", "cublas", "exact"):
        for name, flags in plans.items():
            yield f"linear/{variant}/{name}", _linear(variant, t, flags)
        # features that fill complete tiles, and features that the fused GEMM does not support
        yield f"linear/{variant}/even", _linear(variant, drawn(bf16, 128), {})
        yield f"linear/{variant}/odd", _linear(variant, drawn(bf16, 27), {})
    for dtype in (fp16, fp32):
        for name in ("frozen", "trainable", "all, capped"):
            flags = plans[name] | (
                {"linear_bias": t["bias"].to(dtype)} if "linear_bias" in plans[name] else {}
            )
            yield f"linear/{dtype}/{name}", _linear("exact", drawn(dtype), flags)


def _linear(variant: str, t: dict[str, Tensor], flags: dict[str, Any]) -> Path:
    def path() -> list[Tensor]:
        of_states.VARIANT = variant
        chosen = {"label_smoothing": t["smoothing"], "sample_weight": t["weight"], **flags}
        learn = chosen.pop("learn", ("hidden",))
        leaves = {
            name: t[name].clone().requires_grad_(name in learn)
            for name in ("hidden", "head", "bias", "a", "b")
        }
        if chosen.pop("lora", False):
            chosen["linear_lora"] = (leaves["a"], leaves["b"], 0.5)
        if chosen.pop("bias", False):
            chosen["linear_bias"] = leaves["bias"]
        target = t["target"].clamp(max=chosen.get("vocab_size", VOCAB) - 1)
        with nullcontext() if learn else torch.no_grad():
            loss = linear_cross_entropy(leaves["hidden"], leaves["head"], target, backend="triton", **chosen)
        loss = loss[0] if isinstance(loss, tuple) else loss
        if not learn:
            return [loss]
        return [loss, *torch.autograd.grad(loss, [leaves[n] for n in learn], torch.full_like(loss, 0.5))]

    return path


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.sanitized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--names", action="store_true")
    parser.add_argument("--planted", action="store_true")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PATH", help="run this path alone; repeatable"
    )
    given = parser.parse_args(arguments)
    if given.names:
        print(*(name for module in MODULES for name in kernels(module)), sep="\n")
        return 0
    if given.planted:
        if INTERPRETED:
            parser.error("--planted needs a GPU: the interpreter would read foreign memory, or crash")
        _planted[(1,)](torch.zeros(8, device=DEVICE), torch.zeros(8, device=DEVICE))
        torch.cuda.synchronize()
        return 0
    repair()
    launched: Counter[str] = Counter()
    bad, ran = [], 0
    with ExitStack() as stack:
        for module in MODULES:
            for name in kernels(module):

                def count(_: Any, name: str = name) -> Any:
                    launched[name] += 1
                    return nullcontext()

                stack.enter_context(watching(module, name, count))
        for paths in (logits_paths, linear_paths):
            for name, path in paths():
                if given.only and not any(name == only for only in given.only):
                    continue
                ran += 1
                if not all(torch.isfinite(value).all() for value in path()):
                    bad.append(name)
    if given.only and ran != len(given.only):
        parser.error(f"--only: {len(given.only) - ran} of {given.only} are unknown paths")
    silent = [] if given.only else [n for module in MODULES for n in kernels(module) if not launched[n]]
    print(f"{ran} paths; launches: {', '.join(f'{n} {c}' for n, c in sorted(launched.items()))}")
    for name in bad:
        print(f"NOT FINITE: {name}")
    for name in silent:
        print(f"NEVER LAUNCHED: {name}")
    return int(bool(bad or silent))


if __name__ == "__main__":
    sys.exit(main())
