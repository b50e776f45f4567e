"""The error of every provider's loss and gradients on a real model's hidden states, against float64.

    python -m benchmarks.accuracy                     # SmolLM2-135M on GSM8K, 128 tokens, every provider
    python -m benchmarks.accuracy --tokens 64 --providers 'ours*' naive
    python -m benchmarks.accuracy --export states.pt.gz       # here, where the model is
    python -m benchmarks.accuracy --states states.pt.gz       # there, where a GPU is and the model is not

Hidden states, head and targets are those of SmolLM2-135M-Instruct (V = 49152, D = 576; weights dequantised
from 4 bits by `ual.quickstart.model`) reading worked answers of GSM8K, in bfloat16. Every provider gets these
same bfloat16 numbers, so that what is measured is the loss and not the model. Smoothing is uniform in
[0, 0.2], a value of its own for each row, for those who can; else 0.1 for all rows, or 0. Gradients are of
the mean.

Without a GPU Triton's kernels run in its interpreter, repaired by `benchmarks.interpreted`: their numbers are
a GPU's up to the order of sums. The exit status is 1 where ours misses one of TARGETS, 3 where nothing could
be measured.

A gradient in bfloat16 cannot be better than its own rounding: the first row of the table is the exact
gradient, rounded once. What a provider adds to that shows only before the rounding. Ours can be asked: for
reduction="none" the operator keeps the gradient in float32, because arbitrary upstream gradients are still to
be multiplied, and autograd rounds the product. That float32 tensor is read from the operator's output on its
way out; nothing is computed differently for it.
"""

import argparse
import gzip
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.interpreted import INTERPRETED  # before anything that imports Triton

# isort: split
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import machine
from benchmarks.problems import Case, Exact, exact
from benchmarks.providers import PROVIDERS, Loss, MissingError, Provider, Solves, chosen

TARGETS = {"loss": 1e-5, "hidden": 2.2e-3, "unrounded": 1.5e-3}
SKIPPED = 3
_ROWS_OF_AN_ANSWER = 32


class NothingToMeasureError(Exception):
    """The model or the text is not here."""


@dataclass(frozen=True)
class States:
    hidden: Tensor  # [N, D] bfloat16
    head: Tensor  # [V, D] bfloat16
    target: Tensor  # [N]
    source: str

    def to(self, device: torch.device) -> "States":
        return States(self.hidden.to(device), self.head.to(device), self.target.to(device), self.source)


def real_states(tokens: int) -> States:
    """Hidden states before the head, and the tokens that follow, of the answers that a fine-tuning sees.

    Raises:
        NothingToMeasureError: the model's package or the text is missing; says which, and how to get it.
    """
    text = machine.ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not text.is_file():
        raise NothingToMeasureError(
            f"GSM8K is not here: {text} does not exist; give hidden states with --states"
        )
    from ual.errors import UserError
    from ual.quickstart.model import NAME, prepare

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ual"
    try:
        folder = prepare(cache)
    except UserError as error:
        raise NothingToMeasureError(
            f"the model is not here: {error}; or give hidden states with --states"
        ) from error

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
            first, count = len(prompt) - 1, min(left, len(answer), _ROWS_OF_AN_ANSWER)
            hidden.append(states[first : first + count])
            target.append(ids[0, first + 1 : first + 1 + count])
            left -= count
    head = model.get_output_embeddings().weight.detach()
    return States(torch.cat(hidden), head, torch.cat(target), f"{NAME} on GSM8K (test)")


def random_states(tokens: int) -> States:
    """Small and meaningless: for trying the program."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(tokens, 64, generator=g), torch.randn(320, 64, generator=g) * 3 / 8
    target = torch.randint(320, (tokens,), generator=g)
    return States(hidden.bfloat16(), head.bfloat16(), target, "random numbers, V 320, D 64: no model")


def measure(provider: Provider, loss: Loss, case: Case, truth: Exact) -> dict[str, Any]:
    """Errors of one provider, as numbers; None for what it cannot do."""
    hidden, head = case.hidden.clone().requires_grad_(), case.head.clone().requires_grad_()
    mean = loss(case._replace(hidden=hidden, head=head))
    dhidden, dhead = torch.autograd.grad(mean, (hidden, head))
    found: dict[str, Any] = {
        "loss": None,
        "mean_loss": abs(mean.double() - truth.loss).item(),
        "mean_dtype": str(mean.dtype).removeprefix("torch."),
        "hidden": _relative(dhidden, truth.hidden),
        "hidden_p99": _per_row(dhidden, truth.hidden).quantile(0.99).item(),
        "unrounded": None,
        "head": _relative(dhead, truth.head),
    }
    del head, dhead
    by_row = case._replace(reduction="none")
    if provider.rows:
        with torch.no_grad():
            found["loss"] = (loss(by_row).double() - truth.rows).abs().mean().item()
    if provider.ours:
        with _Outputs("ual_kernels::linear_cross_entropy") as seen:
            loss(by_row._replace(hidden=hidden))
        kept = seen.last[3]  # dinput
        if kept.dtype == torch.float32:
            found["unrounded"] = _relative(kept / len(kept), truth.hidden)
    return found


class _Outputs(TorchDispatchMode):
    """Remember what an operator returned last."""

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


def _per_row(actual: Tensor, truth: Tensor) -> Tensor:
    return (actual.double() - truth).norm(dim=1) / truth.norm(dim=1)


def run(states: States, providers: list[Provider]) -> list[dict[str, Any]]:
    """A record for each provider, with `skipped` or `raised` where there are no errors to report."""
    per_row = torch.rand(len(states.target), generator=torch.Generator().manual_seed(1)) * 0.2
    whole = Case(states.hidden, states.head, states.target, per_row.to(states.target.device))
    truths: dict[Solves, Exact] = {}
    records = [_floor(whole)]
    for provider in providers:
        record: dict[str, Any] = {"provider": provider.name, "solves": provider.solves.value}
        record |= {"package": provider.package, "how": provider.how, "ours": provider.ours}
        start = time.perf_counter()
        try:
            loss, case = provider.load(), provider.ask(whole)
            if provider.solves not in truths:  # one at a time: a head's gradient in float64 is large
                truths = {provider.solves: exact(case)}
            record |= measure(provider, loss, case, truths[provider.solves])
        except MissingError as error:
            record["skipped"] = str(error)
        except Exception as error:  # a peer's failure is a finding, and no reason to stop
            record["raised"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            traceback.print_exc()
        told = record.get("skipped") or record.get("raised") or "done"
        sys.stderr.write(f"{provider.name}: {told} ({time.perf_counter() - start:.0f} s)\n")
        records.append(record)
    return records


def _floor(case: Case) -> dict[str, Any]:
    """The exact gradient, rounded to bfloat16 once."""
    truth = exact(case)
    rounded = truth.hidden.bfloat16()
    return {
        "provider": "exact, rounded once",
        "solves": Solves.PER_ROW.value,
        "how": "",
        "ours": "",
        "loss": 0.0,
        "mean_loss": 0.0,
        "mean_dtype": "float64",
        "hidden": _relative(rounded, truth.hidden),
        "hidden_p99": _per_row(rounded, truth.hidden).quantile(0.99).item(),
        "unrounded": 0.0,
        "head": _relative(truth.head.bfloat16(), truth.head),
    }


def missed(records: list[dict[str, Any]]) -> list[str]:
    """Where ours at precision "high" is over a target, or did not answer."""
    out = []
    for record in records:
        if record.get("ours") != "high" or "skipped" in record:
            continue
        if "raised" in record:
            out.append(f"{record['provider']} raised {record['raised']}")
            continue
        for name, target in TARGETS.items():
            if not (record[name] is not None and record[name] <= target):  # NaN misses
                out.append(f"{record['provider']}: {name} {record[name]}, wanted at most {target}")
    return out


def report(found: dict[str, Any]) -> str:
    """The table, in Markdown."""
    header = (
        "provider", "solves", "loss", "its mean", "dE", "dE, p99 row", "dE before rounding", "dC", "",
    )  # fmt: skip
    lines = []
    for r in found["records"]:
        first = (r["provider"], r["solves"])
        if told := r.get("skipped") or r.get("raised"):
            lines.append((*first, *("-",) * 6, ("skipped: " if "skipped" in r else "raised ") + told))
            continue
        names = ("loss", "mean_loss", "hidden", "hidden_p99", "unrounded", "head")
        note = ", ".join(
            filter(None, (r["how"], "mean in bfloat16" if r["mean_dtype"] == "bfloat16" else ""))
        )
        lines.append((*first, *(_number(r[name]) for name in names), note))
    text = [
        f"# Error against float64: {found['source']}",
        f"{found['tokens']} tokens, V {found['vocab']}, D {found['features']}, bfloat16 inputs. Loss: mean "
        "absolute error of the rows, and error of their mean as returned. dE, dC: relative error in the "
        "Frobenius norm, as returned; before rounding where float32 can be had. Who knows no smoothing per "
        "row solves the easier problem that is named.",
        machine.table(header, lines),
        *(f"MISSED: {line}" for line in found["missed"]),
        machine.headline(found["machine"]),
    ]
    return "\n\n".join(text)


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns 1 where ours misses a target, 3 where there was nothing to measure."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=128, help="rows to measure on (default: 128)")
    parser.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument("--states", type=Path, metavar="F", help="hidden states that --export wrote")
    parser.add_argument("--export", type=Path, metavar="F", help="write hidden states for --states, and stop")
    parser.add_argument("--random", action="store_true", help="random numbers instead of a model, to try it")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/<machine>/...")
    parser.add_argument("--markdown", type=Path, metavar="F", help="likewise")
    given = parser.parse_args(arguments)
    if given.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {given.tokens}")
    try:
        providers = chosen(PROVIDERS, given.providers)
    except ValueError as error:
        parser.error(str(error))
    try:
        if given.random:
            states = random_states(given.tokens)
        elif given.states:
            with gzip.open(given.states) as file:
                states = States(**torch.load(file, weights_only=True))
            states = States(
                states.hidden[: given.tokens], states.head, states.target[: given.tokens], states.source
            )
        else:
            states = real_states(given.tokens)
    except NothingToMeasureError as error:
        print(f"SKIPPED, nothing was measured: {error}")
        return SKIPPED
    if given.export:
        with gzip.open(given.export, "wb") as file:
            torch.save(vars(states), file)
        print(
            f"wrote {given.export}: {len(states.target)} tokens, "
            f"{given.export.stat().st_size / 2**20:.0f} MiB"
        )
        return 0
    found: dict[str, Any] = {"machine": machine.describe(), "interpreted": INTERPRETED}
    states = states.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found |= {"source": states.source, "tokens": len(states.target)}
    found |= {"vocab": states.head.shape[0], "features": states.head.shape[1], "targets": TARGETS}
    found["records"] = run(states, providers)
    found["missed"] = missed(found["records"])
    text = report(found)
    print(text)
    machine.save(found, text, "accuracy", given.json, given.markdown)
    return int(bool(found["missed"]))


if __name__ == "__main__":
    sys.exit(main())
