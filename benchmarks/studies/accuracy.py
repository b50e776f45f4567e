"""Errors of a loss and its gradients against float64, on hidden states of a real model.

    python -m benchmarks.studies.accuracy --export states.pt.gz         # where the model is
    pytest benchmarks/suites/bench_accuracy.py --states states.pt.gz    # where a GPU is

Hidden states, head and targets come from SmolLM2-135M-Instruct on answers of GSM8K, in bfloat16 (V = 49152,
D = 576; weights dequantized from 4 bits by `ual.pipelines.quickstart.model`). Every provider gets the same
bfloat16 inputs, so the errors are those of the loss, not of the model. Smoothing per token is uniform in
[0, 0.2]. A provider without it gets 0.1 for all tokens, or 0. Gradients are those of the mean.

The error of a gradient in bfloat16 is at least its rounding error. The first row of the table is the exact
gradient, rounded once. The error that a provider adds is visible only before rounding. For
reduction="none", the operator of this project keeps the gradient in float32, because autograd multiplies it
by the upstream gradient before rounding. `measure` reads that float32 tensor from the operator's outputs
and changes no computation.
"""

import argparse
import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import benchmarks.interpreted  # noqa: F401  before anything that imports Triton

# isort: split
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import machine
from benchmarks.problems import Case, Exact, exact
from benchmarks.providers import Loss, Provider
from ual_kernels._operands import LinearOutputs

TARGETS = {"loss": 1e-5, "hidden": 2.2e-3, "unrounded": 1.5e-3}
TOKENS = 128
_TOKENS_OF_AN_ANSWER = 32


class NothingToMeasureError(Exception):
    """The model or the text is missing."""


@dataclass(frozen=True, eq=False)
class States:
    hidden: Tensor  # [N, D] bfloat16
    head: Tensor  # [V, D] bfloat16
    target: Tensor  # [N]
    source: str

    def to(self, device: torch.device) -> "States":
        return States(self.hidden.to(device), self.head.to(device), self.target.to(device), self.source)


def real_states(tokens: int) -> States:
    """Return hidden states before the head, and their next tokens, on the answers of GSM8K.

    Raises:
        NothingToMeasureError: the model's package or the text is missing; says how to get it.
    """
    text = machine.ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not text.is_file():
        raise NothingToMeasureError(
            f"GSM8K is missing: {text} does not exist; give hidden states with --states"
        )
    folder = model_folder()

    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    hidden, target = [], []
    left = tokens
    with text.open(encoding="utf-8") as lines, torch.no_grad():
        for line in lines:
            if not left:
                break
            row = json.loads(line)
            question = [{"role": "user", "content": row["question"]}]
            prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
            answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*prompt, *answer]])
            states = model.get_decoder()(input_ids=ids).last_hidden_state[0]
            first, count = len(prompt) - 1, min(left, len(answer), _TOKENS_OF_AN_ANSWER)
            hidden.append(states[first : first + count])
            target.append(ids[0, first + 1 : first + 1 + count])
            left -= count
    head = model.get_output_embeddings().weight.detach()
    return States(torch.cat(hidden), head, torch.cat(target), f"{folder.name} on GSM8K (test)")


def model_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in transformers' format, converted on the first call.

    Raises:
        NothingToMeasureError: its package is missing or damaged.
    """
    from ual.errors import UserError
    from ual.files import cache_folder
    from ual.pipelines.quickstart.model import prepare

    try:
        return prepare(cache_folder(os.environ))
    except UserError as error:
        raise NothingToMeasureError(
            f"the model is missing: {error}; or give hidden states with --states"
        ) from error


def random_states(tokens: int) -> States:
    """Return small random states, for smoke runs."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(tokens, 64, generator=g), torch.randn(320, 64, generator=g) * 3 / 8
    target = torch.randint(320, (tokens,), generator=g)
    return States(hidden.bfloat16(), head.bfloat16(), target, "random numbers, V 320, D 64: no model")


def measure(provider: Provider, loss: Loss, case: Case, truth: Exact) -> dict[str, Any]:
    """Return the errors of one provider; None for what it does not support."""
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    mean = loss(case._replace(hidden=hidden, head=head))
    dhidden, dhead = torch.autograd.grad(mean, (hidden, head))
    found: dict[str, Any] = {
        "loss": None,
        "mean_loss": abs(mean.double() - truth.loss).item(),
        "mean_dtype": str(mean.dtype).removeprefix("torch."),
        "hidden": _relative(dhidden, truth.gradients["dE"]),
        "hidden_p99": _per_token(dhidden, truth.gradients["dE"]).quantile(0.99).item(),
        "unrounded": None,
        "head": _relative(dhead, truth.gradients["dC"]),
    }
    del head, dhead
    by_token = case._replace(reduction="none")
    if provider.per_token:
        with torch.no_grad():
            found["loss"] = (loss(by_token).double() - truth.token_losses).abs().mean().item()
    if provider.ours:
        with _Outputs("ual_kernels::linear_cross_entropy") as outputs:
            loss(by_token._replace(hidden=hidden))
        kept = LinearOutputs(*outputs.last).dinput
        if kept.dtype == torch.float32:
            found["unrounded"] = _relative(kept / len(kept), truth.gradients["dE"])
    return found


class _Outputs(TorchDispatchMode):
    """Keeps what an operator returned last."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator, self.last = operator, ()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        if function.name().startswith(self.operator):
            self.last = out
        return out


def _relative(actual: Tensor, truth: Tensor) -> float:
    return ((actual.double() - truth).norm() / truth.norm()).item()


def _per_token(actual: Tensor, truth: Tensor) -> Tensor:
    return (actual.double() - truth).norm(dim=1) / truth.norm(dim=1)


def problem(states: States) -> Case:
    """Return the states as a case with smoothing per token, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = states.to(device)
    smoothing = torch.rand(len(states.target), generator=torch.Generator().manual_seed(1)) * 0.2
    return Case(states.hidden, states.head, states.target, smoothing.to(device))


def floor(case: Case) -> dict[str, Any]:
    """Return the errors of the exact gradient, rounded to bfloat16 once."""
    truth = exact(case)
    rounded = truth.gradients["dE"].bfloat16()
    return {
        "loss": 0.0,
        "mean_loss": 0.0,
        "mean_dtype": "float64",
        "hidden": _relative(rounded, truth.gradients["dE"]),
        "hidden_p99": _per_token(rounded, truth.gradients["dE"]).quantile(0.99).item(),
        "unrounded": 0.0,
        "head": _relative(truth.gradients["dC"].bfloat16(), truth.gradients["dC"]),
    }


def missed(found: dict[str, Any]) -> list[str]:
    """Return the targets that errors exceed; they hold for ours at precision "high"."""
    return [
        f"{name} is {found[name]}; at most {target} is allowed"
        for name, target in TARGETS.items()
        if not (found[name] is not None and found[name] <= target)  # also for NaN
    ]


def stored(path: Path, tokens: int) -> States:
    """Return the states that `--export` wrote."""
    with gzip.open(path) as file:
        found = States(**torch.load(file, weights_only=True))
    return States(found.hidden[:tokens], found.head, found.target[:tokens], found.source)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--export", type=Path, metavar="F", required=True, help="the file to write")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"number of tokens (default: {TOKENS})")
    given = parser.parse_args()
    try:
        states = real_states(given.tokens)
    except NothingToMeasureError as error:
        parser.exit(1, f"{error}\n")
    with gzip.open(given.export, "wb") as file:
        torch.save(vars(states), file)
    size = given.export.stat().st_size / 2**20
    print(f"wrote {given.export}: {len(states.target)} tokens, {size:.0f} MiB")


if __name__ == "__main__":
    main()
