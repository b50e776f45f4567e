"""Vocab-parallel shards in processes over gloo: loss and gradients equal those of the complete head.

Four processes are started once and compute every case for every split of the vocabulary, in one group of four
or in two independent groups of two. The tests read their results from files.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from tests.kernels.cases import (
    ADAPTER_SCALE,
    OPTIONS,
    adapted,
    as_float64,
    assert_as_accurate_as_eager,
    assert_at_the_floor,
    cross_entropy,
    frozen,
    frozen_with_adapter,
    linear_case,
    linear_cross_entropy,
    logits_case,
    measure,
    merged_definition,
    of_several,
    options,
    with_adapter,
    with_probabilities,
)
from ual_kernels import LinearCrossEntropyOptions, TokenStatistics, UnsupportedError
from ual_kernels._torch import linear_cross_entropy as tiled

pytestmark = pytest.mark.slow

Leaves = dict[str, Tensor]
Results = Callable[[str, str], Leaves]

VOCAB, TOKENS = 101, 20
RANKS = 4
SPLITS = {
    "halves": (50, 51),
    "a-row-last": (100, 1),
    "uneven": (7, 31, 40, 23),
    "a-row-at-each-end": (1, 50, 49, 1),
}
MEMBERS = {"halves": [0, 1], "a-row-last": [2, 3], "uneven": [0, 1, 2, 3], "a-row-at-each-end": [0, 1, 2, 3]}
EDGES = ("a-row-last", "a-row-at-each-end")
SHARDED = ("linear_weight", "linear_bias", "lora_b", "columns", "target_columns")
SECONDS = 240


# ---- computed in every process ----


def smoothing_fn(statistics: TokenStatistics) -> Tensor:
    return 0.6 * statistics.entropy / (1 + statistics.entropy) + 0.1 * statistics.top1_prob


def weight_fn(statistics: TokenStatistics) -> Tensor:
    return statistics.log_prob.exp() + 0.2 * statistics.margin.tanh() + 0.1 * statistics.correct


@dataclass(frozen=True)
class Case:
    flags: str = "mean"
    head: Callable[[Leaves], Leaves] = with_adapter
    how: dict[str, Any] = field(default_factory=dict)  # keywords of the sharded loss only
    token_fns: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    spoil: Callable[[Leaves, Tensor], None] = lambda leaves, target: None
    tile_shape: Callable[..., tiled.TileShape] | None = None
    padding: int = 0  # NaN rows of the head after each shard
    count: int = 0  # classes per token; 0 is a class index


def invalid(leaves: Leaves, target: Tensor) -> None:
    target[3], target[5] = VOCAB, -1


def out_of_range(leaves: Leaves, target: Tensor) -> None:
    leaves["label_smoothing"].data[3], leaves["sample_weight"].data[5] = 1.5, -1.0


def invalid_entries(leaves: Leaves, target: Tensor) -> None:
    """A class out of range, a negative probability and a wrong sum, in entries of different shards."""
    target[3, 2] = VOCAB
    leaves["probabilities"].data[5, :2] += torch.tensor([1.5, -1.5])
    leaves["probabilities"].data[7, 1] += 0.002


def all_ignored(leaves: Leaves, target: Tensor) -> None:
    target.fill_(-100)


def nan_in_ignored_tokens(leaves: Leaves, target: Tensor) -> None:
    for name in ("input", "label_smoothing", "sample_weight"):
        leaves[name].data[1] = torch.nan


def masked(leaves: Leaves, target: Tensor) -> None:
    """Mask all classes except 40 and 60; some shards have only logits of -inf."""
    leaves["label_smoothing"].data.zero_()
    leaves["label_smoothing"].requires_grad_(False)  # its gradient is infinite, as the mean logit is
    leaves["linear_bias"].data[[i for i in range(VOCAB) if i not in (40, 60)]] = -torch.inf
    target[target != -100] = 40
    target[7] = 60


def far(leaves: Leaves, target: Tensor) -> None:
    """Logits that increase by 300 over the vocabulary, so that the maxima of shards are far apart."""
    leaves["linear_bias"].data += torch.linspace(-150, 150, VOCAB, dtype=torch.float64)


def by_budget(vocab: int, *_: Any) -> tiled.TileShape:
    """Fewer tokens for a larger head, like `tile_shape`."""
    return tiled.TileShape(max(1, 160 // vocab), 16)


CASES: dict[str, Case] = {
    **{flags: Case(flags) for flags in OPTIONS},
    **{f"{flags}-frozen": Case(flags, frozen) for flags in ("mean", "softcap", "all")},
    **{f"{flags}-lora": Case(flags, frozen_with_adapter) for flags in ("mean", "softcap", "all")},
    "chunks": Case("all", how={"chunk_tokens": 6}),
    "tokens-known": Case("mean", how={"max_loss_tokens": 19, "chunk_tokens": 7}),
    "tokens-more": Case("all", how={"max_loss_tokens": TOKENS}),
    "tokens-too-few": Case("none", frozen, how={"max_loss_tokens": 12}),
    "not-compact": Case("classes", how={"compact": False}, spoil=nan_in_ignored_tokens),
    "tiles-by-budget": Case("mean", tile_shape=by_budget),
    "tiles-by-budget-softcap": Case("all", tile_shape=by_budget),
    "far": Case("none", spoil=far),
    "far-softcap": Case("softcap", spoil=far),
    "masked": Case("mean", spoil=masked),
    "padded": Case("classes", padding=3),
    "invalid": Case("none", frozen, spoil=invalid),
    "out-of-range": Case("none", frozen, spoil=out_of_range),
    "all-ignored": Case("mean", spoil=all_ignored),
    "all-ignored-classes": Case("classes", spoil=all_ignored),
    "smoothing-fn": Case("mean", token_fns={"label_smoothing": smoothing_fn}),
    "weight-fn": Case("classes", token_fns={"sample_weight": weight_fn}),
    "both-fns": Case("all", token_fns={"label_smoothing": smoothing_fn, "sample_weight": weight_fn}),
    "both-fns-frozen": Case(
        "mean", frozen, token_fns={"label_smoothing": smoothing_fn, "sample_weight": weight_fn}
    ),
    **{f"{flags}-float32": Case(flags, dtype=torch.float32) for flags in ("mean", "all")},
    **{f"{flags}-bfloat16": Case(flags, dtype=torch.bfloat16) for flags in ("mean", "all")},
    **{f"{flags}-several": Case(flags, count=5) for flags in OPTIONS},
    "one-class": Case("all", count=1),
    "frozen-several": Case("classes", frozen, count=20),
    "lora-several": Case("all", frozen_with_adapter, count=3),
    "chunks-several": Case("mean", count=4, how={"chunk_tokens": 6}),
    "not-compact-several": Case("classes", count=4, how={"compact": False}, spoil=nan_in_ignored_tokens),
    "both-fns-several": Case(
        "all", count=4, token_fns={"label_smoothing": smoothing_fn, "sample_weight": weight_fn}
    ),
    "float32-several": Case("all", count=5, dtype=torch.float32),
    "bfloat16-several": Case("all", count=5, dtype=torch.bfloat16),
    "invalid-several": Case("none", frozen, count=4, spoil=invalid_entries),
}
INVALID = ("invalid", "out-of-range", "tokens-too-few", "invalid-several")
OF_EDGES = (
    "mean", "none", "all", "all-frozen", "softcap-lora", "classes", "others", "far", "masked",
    "both-fns", "tiles-by-budget", "all-ignored", *INVALID, "all-float32", "all-bfloat16",
    "all-several", "classes-several", "one-class", "frozen-several", "bfloat16-several",
)  # fmt: skip


def cases_of(split: str) -> list[str]:
    return [name for name in CASES if name in OF_EDGES or split not in EDGES]


def build(name: str, split: tuple[int, ...]) -> tuple[Leaves, Tensor, dict[str, Any]]:
    """Return the unsharded problem: targets at both ends of every shard; the second token is ignored."""
    case = CASES[name]
    torch.manual_seed(0)
    leaves, target = linear_case(TOKENS, VOCAB, 16, case.dtype, torch.device("cpu"))
    leaves = case.head(leaves)
    stops = list(accumulate(split))
    ends = sorted({0, *(stop - 1 for stop in stops), *stops[:-1]})
    target[2 : 2 + len(ends)] = torch.tensor(ends)
    if case.count:
        leaves, target = with_probabilities(leaves, target, case.count, VOCAB)
    case.spoil(leaves, target)
    for name in case.token_fns:
        del leaves[name]
    return leaves, target, options(case.flags, VOCAB, torch.device("cpu")) | case.token_fns


def loss_of(name: str) -> Callable[..., Any]:
    """Return the linear loss of a case, with the leaves as arguments."""

    def loss(**given: Any) -> Any:
        return adapted(linear_cross_entropy, **given)

    return of_several(loss) if CASES[name].count else loss


def shard_slice(split: tuple[int, ...], rank: int) -> slice:
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def shard(name: str, split: tuple[int, ...], group: dist.ProcessGroup, **how: Any) -> dict[str, Tensor]:
    """Return loss, gradients and statistics of one rank."""
    case, mine = CASES[name], shard_slice(split, dist.get_rank(group))
    leaves, target, flags = build(name, split)

    def cut(full: Tensor) -> Tensor:
        return torch.cat([full.detach()[mine], full.new_full((case.padding, *full.shape[1:]), torch.nan)])

    leaves = {
        key: cut(leaf).requires_grad_(leaf.requires_grad) if key in SHARDED else leaf
        for key, leaf in leaves.items()
    }
    if "weight" in flags:
        flags["weight"] = flags["weight"][mine]
    if case.padding:
        flags["vocab_size"] = mine.stop - mine.start
    flags |= case.how | {"process_group": group, "classes": VOCAB} | how
    usual = tiled.tile_shape
    tiled.tile_shape = case.tile_shape or usual
    try:
        measured = measure(loss_of(name), leaves, target, **flags)
        with torch.no_grad():
            statistics = loss_of(name)(**leaves, target=target, **flags, return_statistics=True)[1]
    finally:
        tiled.tile_shape = usual
    for key in SHARDED:
        if case.padding and key in measured:
            measured[key], padding = measured[key].split([mine.stop - mine.start, case.padding])
            assert not padding.any(), f"{key}: nonzero gradient in the padding"
    return measured | {f"statistics.{key}": value for key, value in statistics._asdict().items()}


def own_reduction(split: tuple[int, ...], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Return the gradients with reduce_input_grad=False, after an explicit all-reduce."""
    found = shard("all-lora", split, group, reduce_input_grad=False)
    summed = found["input"].clone()
    dist.all_reduce(summed, group=group)
    return {"summed": summed, "lora_a": found["lora_a"], "label_smoothing": found["label_smoothing"]}


LOGITS = (
    *OPTIONS, "in-place", "far", "masked", "all-ignored-classes", "both-fns", "all-several", "mean-several",
    "classes-several", "one-class", "both-fns-several", "in-place-several",
    "dense",
)  # fmt: skip


def logits_problem(name: str, split: tuple[int, ...]) -> tuple[Leaves, Tensor, dict[str, Any]]:
    """Return the problem with given logits."""
    leaves, target, flags = build(name.replace("in-place", "mean").replace("dense", "classes"), split)
    wide = {key: leaf.detach() for key, leaf in leaves.items()}
    head = wide["linear_weight"] + ADAPTER_SCALE * wide["lora_b"] @ wide["lora_a"]
    logits = torch.nn.functional.linear(wide["input"], head, wide["linear_bias"])
    wanted = ("label_smoothing", "sample_weight", "probabilities")
    numbers = {key: leaves[key] for key in wanted if key in leaves}
    if name == "dense":
        numbers["probabilities"] = torch.rand_like(logits).softmax(1).requires_grad_()
    return {"input": logits.requires_grad_(), **numbers}, target, flags


def logits_shard(name: str, split: tuple[int, ...], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return loss, gradients and statistics of one rank's columns, or of all columns without a group."""
    leaves, target, flags = logits_problem(name, split)
    flags = {key: value for key, value in flags.items() if key != "smoothing_over"}
    if group is None:
        flags["backend"] = "reference"
    else:
        mine = shard_slice(split, dist.get_rank(group))
        columns = ("input", "probabilities") if name == "dense" else ("input",)
        leaves |= {key: leaves[key].detach()[:, mine].clone().requires_grad_() for key in columns}
        flags |= {"process_group": group, "inplace_backward": name.startswith("in-place")}
        if "weight" in flags:
            flags["weight"] = flags["weight"][mine]

    def loss(input: Tensor, **rest: Any) -> Any:
        if name == "dense":
            rest["target"] = rest.pop("probabilities")
        several = "probabilities" in rest
        return (of_several(cross_entropy) if several else cross_entropy)(input=input * 1.0, **rest)

    measured = measure(loss, leaves, target, **flags)
    flags.pop("inplace_backward", None)
    with torch.no_grad():
        found = loss(**leaves, target=target, **flags, return_statistics=True)[1]
    measured["columns"] = measured.pop("input").T.contiguous()
    if name == "dense":
        measured["target_columns"] = measured.pop("probabilities").T.contiguous()
    return measured | {f"statistics.{key}": value for key, value in found._asdict().items()}


# Mistakes of rank 1 alone, and the errors that every rank raises. Without agreement the others would wait.

MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "empty": (
        lambda given: {"linear_weight": given["linear_weight"][:0]},
        "rank 1 of process_group: linear_weight must be [V, D] with V >= 1, got [0, 16]",
    ),
    "dtype": (
        lambda given: {"linear_weight": given["linear_weight"].float()},
        "rank 1 of process_group: linear_weight must be torch.float64 like input, got torch.float32; ",
    ),
    "features": (
        lambda given: {"linear_weight": given["linear_weight"][:, 1:]},
        "rank 1 of process_group: input must be [..., 15] to match linear_weight, got [20, 16]",
    ),
    "bias": (
        lambda given: {"linear_bias": torch.zeros(3, dtype=torch.float64)},
        "rank 1 of process_group: linear_bias must be [",
    ),
    "weights": (
        lambda given: {"sample_weight": given["sample_weight"][1:]},
        "rank 1 of process_group: sample_weight must have leading dimensions of input without its last one, ",
    ),
    "num-items": (
        lambda given: {"num_items": torch.ones(2)},
        "rank 1 of process_group: num_items must have one element, got shape [2]",
    ),
    "no-tensor": (
        lambda given: {"target": None},
        "rank 1 of process_group: target must be a tensor or a SparseTarget, got NoneType",
    ),
    "tokens": (
        lambda given: {
            key: given[key][1:] for key in ("input", "target", "label_smoothing", "sample_weight")
        },
        "the shape of target must be the same on all ranks of process_group, got [20] on rank 0, [19] on",
    ),
    "smoothing": (
        lambda given: {"label_smoothing": 1.5},
        "label_smoothing must be the same on all ranks of process_group, got a tensor with "
        "requires_grad=True on rank 0, 1.5 on rank 1",
    ),
    "frozen": (
        lambda given: {"input": given["input"].detach()},
        "requires_grad of input, linear_weight, linear_bias, A and B must be the same on all ranks of "
        "process_group, got [True, True, True, False, False] on rank 0, [False, True, True, False, False] on",
    ),
    "chunks": (
        lambda given: {"chunk_tokens": 3},
        "chunk_tokens must be the same on all ranks of process_group, got None on rank 0, 3 on rank 1",
    ),
}
MESSAGES = {name: message for name, (_, message) in MISTAKES.items()} | {
    "columns": "rank 1 of process_group: input must be [..., V] with V >= 1, got [20, 0]",
    "of-all": "rank 0 of process_group: logit_scale must be finite, got inf",
}


def mistakes(split: tuple[int, ...], group: dist.ProcessGroup) -> dict[str, str]:
    """Return the error that this rank raises for every mistake of rank 1."""
    mine, first = shard_slice(split, dist.get_rank(group)), dist.get_rank(group) != 1
    leaves, target = linear_case(TOKENS, VOCAB, 16, torch.float64, torch.device("cpu"))
    given = {key: leaf[mine] if key in SHARDED else leaf for key, leaf in leaves.items()}
    given |= {"target": target, "process_group": group}

    def message(loss: Callable[..., Tensor], **given: Any) -> str:
        try:
            loss(**given)
        except ValueError as error:
            return str(error)
        return "no error"

    found = {
        name: message(linear_cross_entropy, **given | ({} if first else mistake(given)))
        for name, (mistake, _) in MISTAKES.items()
    }
    columns = torch.zeros(TOKENS, 5 if first else 0, dtype=torch.float64)
    return found | {
        "columns": message(cross_entropy, input=columns, target=target, process_group=group),
        "of-all": message(linear_cross_entropy, **given, logit_scale=torch.inf),
    }


def second_derivative(split: tuple[int, ...], group: dist.ProcessGroup) -> str:
    """Return the error of the second derivative of given logits."""
    mine = shard_slice(split, dist.get_rank(group))
    leaves, target = logits_case(TOKENS, VOCAB, torch.float64, torch.device("cpu"))
    logits = leaves["input"].detach()[:, mine].requires_grad_()
    loss = cross_entropy(logits, target, process_group=group)
    (gradient,) = torch.autograd.grad(loss**2, logits, create_graph=True)
    try:
        torch.autograd.grad(gradient.square().sum(), logits)
    except UnsupportedError as error:
        return str(error)
    return "no error"


def process(rank: int, folder: Path) -> None:
    """Run one rank. It ends with os._exit, because gloo may abort at a normal exit."""
    code = 1
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=SECONDS / 2),
        )
        groups = {split: dist.new_group(members) for split, members in MEMBERS.items()}
        results = {
            split: {name: shard(name, sizes, groups[split]) for name in cases_of(split)}
            | {f"logits-{name}": logits_shard(name, sizes, groups[split]) for name in LOGITS}
            | {"own-reduction": own_reduction(sizes, groups[split])}
            | {"mistakes": mistakes(sizes, groups[split])}
            | {"second-derivative": second_derivative(sizes, groups[split])}
            for split, sizes in SPLITS.items()
            if rank in MEMBERS[split]
        }
        torch.save(results, folder / f"{rank}.pt")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- tests ----


def run(folder: Path) -> list[dict[str, dict[str, Any]]]:
    """Start the ranks, wait for them and kill them at the end; return the results of each rank."""
    program = (
        "import sys; from pathlib import Path; from tests.kernels.test_parallel import process; "
        "process(int(sys.argv[1]), Path(sys.argv[2]))"
    )
    root = Path(__file__).resolve().parents[2]
    # with more threads than cores, threads would wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    started: list[subprocess.Popen[str]] = []
    logs = [folder / f"{rank}.log" for rank in range(RANKS)]
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as stream:
                command = [sys.executable, "-c", program, str(rank), str(folder)]
                started.append(
                    subprocess.Popen(
                        command, cwd=root, env=environment, stdout=stream, stderr=stream, text=True
                    )
                )
        deadline = time.monotonic() + SECONDS
        codes = []
        for process in started:
            codes.append(process.wait(timeout=max(0.1, deadline - time.monotonic())))
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * RANKS, "\n".join([str(codes), *(log.read_text() for log in logs)])
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results(ranks: list[dict[str, dict[str, Any]]]) -> Results:
    """Return a function that returns the joined results of all ranks for a split and a case."""

    def of(split: str, name: str) -> dict[str, Tensor]:
        return joined([ranks[rank][split][name] for rank in MEMBERS[split]])

    return of


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the sharded results; check that all other results have the same bits on every rank."""
    first = parts[0]
    for part in parts[1:]:
        assert part.keys() == first.keys()
        for name in first.keys() - set(SHARDED):
            torch.testing.assert_close(part[name], first[name], rtol=0, atol=0, equal_nan=True)
    return {
        name: torch.cat([part[name] for part in parts]) if name in SHARDED else value
        for name, value in first.items()
    }


def unsharded(name: str, split: tuple[int, ...]) -> dict[str, Tensor]:
    leaves, target, flags = build(name, split)
    flags["backend"] = "reference"
    measured = measure(loss_of(name), leaves, target, **flags)
    statistics = loss_of(name)(**leaves, target=target, **flags, return_statistics=True)[1]
    return measured | {f"statistics.{key}": value for key, value in statistics._asdict().items()}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        ours = actual[name]
        assert ours.shape == truth.shape, name
        finite = truth.isfinite()
        torch.testing.assert_close(
            ours[~finite], truth[~finite], equal_nan=True, msg=f"{name}: {ours} {truth}"
        )
        if finite.any():
            largest = truth[finite].double().abs().max()
            error = (ours[finite].double() - truth[finite].double()).abs().max()
            assert error <= 1e-12 * largest, f"{name}: error {error:.3e}, largest value {largest:.3e}"


splits = pytest.mark.parametrize("split", SPLITS)


@pytest.mark.kills(
    "ual_kernels/_vocab_parallel.py", "(column + self.start).to(largest.dtype)", "column.to(largest.dtype)"
)
@pytest.mark.kills(
    "ual_kernels/_vocab_parallel.py", "self.start = sum(counts[: dist.get_rank(group)])", "self.start = 0"
)
@pytest.mark.kills("ual_kernels/_vocab_parallel.py", "op=dist.ReduceOp.MAX, group", "group")
@pytest.mark.kills(
    "ual_kernels/_vocab_parallel.py", "every[:, :2].flatten(0, 1).topk(2, dim=0).values[1]", "second"
)
@pytest.mark.parametrize(
    ("split", "name"),
    [
        (split, name)
        for split in SPLITS
        for name in cases_of(split)
        if CASES[name].dtype == torch.float64 and name not in INVALID
    ],
)
def test_shards_match_the_complete_head(split: str, name: str, results: Results) -> None:
    """Loss, all gradients and all statistics; results that are not sharded are equal on every rank."""
    sizes = SPLITS[split]
    actual = results(split, name)
    assert_equal(actual, unsharded(name, sizes))


@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py", "z_listed = shards.sum(torch.where(", "z_listed = (torch.where("
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py",
    "torch.where(place.held, of_target, 0.0)",
    "of_target.expand_as(place.column)",
)
@pytest.mark.kills(
    "ual_kernels/_torch/cross_entropy.py", "(scale * s / shards.vocab)", "(scale * s / p.shape[1])"
)
@pytest.mark.parametrize("name", LOGITS)
@splits
def test_shards_of_given_logits_match_all_columns(split: str, name: str, results: Results) -> None:
    """Loss, gradients of each rank's columns and statistics."""
    assert_equal(results(split, f"logits-{name}"), logits_shard(name, SPLITS[split], None))


@pytest.mark.kills(
    "ual_kernels/_vocab_parallel.py",
    "return self.sum(tensor) if self._reduce_input_grad else tensor",
    "return self.sum(tensor)",
)
@splits
def test_summands_of_the_input_gradient_add_up(split: str, results: Results) -> None:
    """With reduce_input_grad=False callers all-reduce the gradient themselves, as Megatron-LM does."""
    own = results(split, "own-reduction")
    exact = unsharded("all-lora", SPLITS[split])
    assert_equal({"input": own["summed"]}, {"input": exact["input"]})
    for name in ("lora_a", "label_smoothing"):
        assert_equal({name: own[name]}, {name: exact[name]})


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (split, name)
        for split in SPLITS
        for name in cases_of(split)
        if CASES[name].dtype in (torch.float32, torch.bfloat16)
    ],
)
def test_shards_are_as_accurate(split: str, name: str, results: Results) -> None:
    sizes = SPLITS[split]
    leaves, target, chosen = build(name, sizes)
    actual = results(split, name)
    loss = of_several(merged_definition) if CASES[name].count else merged_definition
    exact = measure(loss, as_float64(leaves), target, **chosen)
    if CASES[name].dtype == torch.bfloat16:
        assert_at_the_floor(actual, exact)
    else:
        eager = measure(loss, leaves, target, **chosen, dtype=torch.float32)
        assert_as_accurate_as_eager(actual, eager, exact)


@splits
@pytest.mark.parametrize("name", ["invalid", "out-of-range", "invalid-several"])
def test_out_of_range_makes_one_token_nan_on_every_rank(name: str, split: str, results: Results) -> None:
    sizes = SPLITS[split]
    actual = results(split, name)
    expected = unsharded(name, sizes)
    affected = torch.zeros(TOKENS, dtype=torch.bool)
    affected[[3, 5, 7] if "several" in name else [3, 5]] = True
    assert torch.equal(actual["loss"].isnan(), affected)
    assert actual["input"][affected].isnan().all()
    for key in ("loss", "input", "label_smoothing", "sample_weight"):
        rest = {key: actual[key][~affected]}, {key: expected[key][~affected]}
        assert_equal(*rest)


@splits
def test_an_upper_bound_that_is_too_small_gives_nan_on_every_rank(split: str, results: Results) -> None:
    actual = results(split, "tokens-too-few")
    selected = build("tokens-too-few", SPLITS[split])[1] != -100
    assert torch.equal(actual["loss"].isnan(), selected)
    assert actual["input"][selected].isnan().all()


# ---- errors that every rank raises ----


@pytest.mark.kills(
    "ual_kernels/_vocab_parallel.py", "_ERROR in counts or len(set(checksums)) > 1", "_ERROR in counts"
)
@pytest.mark.kills(
    "ual_kernels/_vocab_parallel.py", "_ERROR in counts or len(set(checksums)) > 1", "len(set(checksums)) > 1"
)
@pytest.mark.parametrize("name", MESSAGES)
@splits
def test_a_mistake_of_one_rank_is_an_error_of_every_rank(
    split: str, name: str, ranks: list[dict[str, dict[str, Any]]]
) -> None:
    messages = [ranks[rank][split]["mistakes"][name] for rank in MEMBERS[split]]
    assert messages[0].startswith(MESSAGES[name])
    assert set(messages) == {messages[0]}


@splits
def test_shards_of_given_logits_have_no_second_derivatives(
    split: str, ranks: list[dict[str, dict[str, Any]]]
) -> None:
    for rank in MEMBERS[split]:
        assert "second derivatives" in ranks[rank][split]["second-derivative"]


# ---- errors, raised before any communication ----


def test_shards_of_meta_tensors_are_refused() -> None:
    logits, target = torch.zeros(4, 3, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    with pytest.raises(UnsupportedError, match="process_group does not support meta tensors"):
        cross_entropy(logits, target, process_group=object())


@pytest.mark.parametrize(
    "how", [{"backend": "reference"}, {"backend": "triton"}, {"gradient_filter": 1e-3}], ids=str
)
def test_options_without_shards_are_refused(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ual_kernels._arguments._INTERPRETING", True)
    arguments = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(
        UnsupportedError, match=r'process_group needs backend="torch" and gradient_filter=0\.0'
    ):
        linear_cross_entropy(*arguments, process_group=object(), **how)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_given_logits_have_shards_in_the_torch_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ual_kernels._arguments._INTERPRETING", True)
    with pytest.raises(UnsupportedError, match='process_group needs backend="torch"'):
        cross_entropy(
            torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), process_group=object(), backend=backend
        )


def test_reduce_input_grad_needs_a_process_group() -> None:
    with pytest.raises(ValueError, match="reduce_input_grad=False needs a process_group"):
        LinearCrossEntropyOptions(reduce_input_grad=False)


def test_shards_are_refused_under_a_compiler() -> None:
    head, target, group = torch.zeros(5, 3), torch.zeros(4, dtype=torch.long), object()

    def step(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, head, target, process_group=group)

    with pytest.raises(Exception, match="functions of the statistics and process_group are not supported"):
        torch.compile(step, fullgraph=True, backend="eager")(torch.zeros(4, 3))
