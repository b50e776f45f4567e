"""Packing: samples in one sequence have the loss and gradients that they have alone, with every attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ual.data import Collator, PackedCollator, pack
from ual.errors import UserError
from ual.models import fuse
from ual.models.packing_check import check_isolation, is_padding_free

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LENGTHS = (5, 9, 1, 7, 2, 4)


def model_of(family: str, attention: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SMALL, attn_implementation=attention, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for i, n in enumerate(LENGTHS):
        ids = torch.randint(3, 61, (n,), generator=generator).tolist()
        # the first token has a label too: it is never predicted, neither alone nor beside another sample
        labels = [token if j % 3 != 1 else -100 for j, token in enumerate(ids)]
        made.append(
            {"input_ids": ids, "labels": labels, "label_smoothing": 0.3 * i / 6, "sample_weight": 0.5 + i / 4}
        )
    return made


def packed(features: list[dict[str, Any]], capacity: int = 12) -> list[dict[str, Any]]:
    packs = pack([len(row["input_ids"]) for row in features], capacity)
    return [{"rows": [features[i] for i in indices]} for indices in packs]


lengths = st.lists(st.integers(1, 50), max_size=40)


@given(lengths, st.integers(50, 120))
def test_laws_of_packing(sizes: list[int], capacity: int) -> None:
    packs = pack(sizes, capacity)
    assert sorted(i for indices in packs for i in indices) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in indices) for indices in packs]
    assert all(0 < n <= capacity for n in filled)
    assert packs == sorted(sorted(indices) for indices in packs)
    # any two sequences that would fit into one were put into one
    assert sum(sorted(filled)[:2]) > capacity or len(filled) < 2
    assert pack(sizes, capacity) == packs


@pytest.mark.kills("ual/data/pack.py", "at = bisect_left(rooms, lengths[i])", "at = len(rooms)")
@pytest.mark.kills("ual/data/pack.py", "key=lambda i: (-lengths[i], i)", "key=lambda i: i")
def test_packing_prefers_the_fullest_sequence_that_has_room() -> None:
    assert pack([6, 5, 3, 4, 2], 10) == [[0, 3], [1, 2, 4]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match=r"in \[1, 10\], got 2 to 11"):
        pack([2, 11], 10)


@pytest.mark.parametrize("average", ["weights", "samples"])
@pytest.mark.parametrize("padding_free", [False, True])
def test_a_packed_batch_holds_the_same_rows(average: Any, padding_free: bool) -> None:
    features = [row | {"groups": [i % 2, 2 + i]} for i, row in enumerate(rows())]
    packs = packed(features)
    collate = PackedCollator(0, pad_to_multiple_of=8, average=average, padding_free=padding_free)
    batch = collate(packs)
    order = [row for p in packs for row in p["rows"]]
    alone = [Collator(0, 1, average)([row]) for row in order]
    total = sum(LENGTHS)
    assert batch["input_ids"].shape == ((1, total) if padding_free else (len(packs), 16))
    assert batch["max_loss_tokens"] == sum(one["max_loss_tokens"] for one in alone)
    starts = (batch["position_ids"] == 0).flatten().nonzero().flatten().tolist()
    found = []
    for start in starts:
        if (
            padding_free or batch["input_ids"].flatten()[start] != 0
        ):  # 0 pads, and is no token of these samples
            found.append(start)
    assert len(found) == len(order)
    for start, row, one in zip(found, order, alone, strict=True):
        n = len(row["input_ids"])
        here = slice(start, start + n)
        assert batch["input_ids"].flatten()[here].tolist() == row["input_ids"]
        assert batch["position_ids"].flatten()[here].tolist() == list(range(n))
        assert batch["labels"].flatten()[here].tolist() == [-100, *row["labels"][1:]]
        for name in ("label_smoothing", "sample_weight"):
            assert batch[name].flatten()[here].tolist() == [one[name].item()] * n
        assert batch["groups"].flatten(0, 1)[here].tolist() == [row["groups"]] * n
    assert (batch["labels"] != -100).sum() == batch["max_loss_tokens"]
    assert "attention_mask" not in batch
    single = collate(features[:2])  # what is measured is not packed
    assert torch.equal(single["input_ids"], Collator(0, 8)(features[:2])["input_ids"])


def loss_and_gradients(model: torch.nn.Module, batches: list[dict[str, Any]]) -> tuple[Tensor, list[Tensor]]:
    """One mean over the tokens of all batches, as a trainer that accumulates takes it."""
    losses = []
    for batch in batches:
        losses.append(model(**batch, num_items_in_batch=10).loss)
    loss = torch.stack(losses).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss.detach(), list(torch.autograd.grad(loss, trained))


def error(found: tuple[Tensor, list[Tensor]], truth: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Of the loss, and of the whole gradient's norm, relative to the truth."""
    off = torch.cat([(g.double() - t).flatten() for g, t in zip(found[1], truth[1], strict=True)])
    norm = torch.cat([t.flatten() for t in truth[1]]).norm()
    return abs(found[0].double() - truth[0]).item() / truth[0].item(), (off.norm() / norm).item()


FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
}


@pytest.mark.kills("ual/data/collate.py", "            of_sample[0] = IGNORE_INDEX\n", "            pass\n")
@pytest.mark.kills(
    "ual/data/collate.py", "torch.arange(n) for n in (*lengths, padding)", "torch.arange(length)"
)
@pytest.mark.kills(
    "ual/data/collate.py",
    "torch.cat([smoothing, torch.zeros(1)]).repeat_interleave(spread)",
    "smoothing.mean().expand(length)",
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_unpacked(family: str, attention: str) -> None:
    """Losses and gradients of LoRA and of all weights, with the smoothing and weight of every sample.

    In float64, where roundings cannot hide anything; in float32 the packed loss is as near to that as the
    unpacked one is: both are sums of the same terms in another order, so within four times, plus one rounding
    of each result.
    """
    features = rows()
    results = {}
    for dtype in (torch.float64, torch.float32):
        model = fuse(model_of(family, attention, **FAMILIES[family]).to(dtype)).train()
        if attention == "sdpa":
            model = get_peft_model(
                model,
                LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", lora_dropout=0.0),
                autocast_adapter_dtype=False,
            )
        one_by_one = loss_and_gradients(model, [Collator(0, 1)([row]) for row in features])
        together = loss_and_gradients(model, [PackedCollator(0, 8)(packed(features))])
        results[dtype] = one_by_one, together
    truth, packed_truth = results[torch.float64]
    # some thousand terms; and transformers' eager attention takes its softmax in float32 with any input
    digits = 2**10 * torch.finfo(torch.float64).eps
    if attention == "eager":
        digits += 4 * torch.finfo(torch.float32).eps
    assert max(error(packed_truth, truth)) <= digits
    unpacked, together = (error(found, truth) for found in results[torch.float32])
    for ours, theirs in zip(together, unpacked, strict=True):
        assert ours <= 4 * theirs + torch.finfo(torch.float32).eps


@pytest.mark.kills("ual/models/fuse.py", 'kwargs.setdefault("use_cache", False)', "pass")
def test_a_cache_left_on_does_not_mix_rows() -> None:
    """transformers does not see that a sequence is packed where it makes a key-value cache."""
    features = packed(rows())
    losses = []
    for use_cache in (True, False):
        model = fuse(model_of("llama", "sdpa")).train()
        model.config.use_cache = use_cache
        losses.append(model(**PackedCollator(0)(features)).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_isolates_is_taken(attention: str, dtype: torch.dtype) -> None:
    for family, options in FAMILIES.items():
        model = model_of(family, attention, **options).to(dtype).train()
        check_isolation(model)
        assert model.training
        assert not is_padding_free(model)


def leaking(model: PreTrainedModel) -> None:
    """Attention over all earlier tokens, of any sample."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).contiguous(), None

    from transformers import AttentionInterface

    AttentionInterface.register("leaks", attend)
    model.config._attn_implementation = "leaks"


def absolute(model: PreTrainedModel) -> None:
    """Positions counted through the sequence, whatever `position_ids` say."""
    body = model.base_model
    forward = body.forward

    def counted(*args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
        hidden = forward(*args, position_ids=position_ids, **kwargs)
        n = position_ids.shape[-1]
        hidden.last_hidden_state = hidden.last_hidden_state + 0.01 * torch.arange(n)[:, None]
        return hidden

    body.forward = counted


@pytest.mark.kills(
    "ual/models/packing_check.py", "(beside - beside_other, 8 * eps", "(alone - alone, 8 * eps"
)
@pytest.mark.kills("ual/models/packing_check.py", "(beside - alone, eps**0.5", "(alone - alone, eps**0.5")
@pytest.mark.parametrize(
    ("breaks", "message"),
    [(leaking, "'leaks' mixes packed samples"), (absolute, "differently from the sample alone")],
)
def test_a_model_that_mixes_rows_is_refused(breaks: Callable[[PreTrainedModel], None], message: str) -> None:
    model = model_of("llama", "sdpa")
    breaks(model)
    with pytest.raises(UserError, match=f"LlamaForCausalLM .*{message}") as refused:
        check_isolation(model)
    assert "data.packing" in refused.value.remedy


def test_a_state_that_flows_from_row_to_row_is_refused() -> None:
    config = AutoConfig.for_model(
        "mamba", vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=1, intermediate_size=32
    )
    with pytest.raises(UserError, match=r"MambaForCausalLM .*mixes packed samples"):
        check_isolation(AutoModelForCausalLM.from_config(config))


def test_flash_attention_is_padding_free() -> None:
    model = model_of("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    assert is_padding_free(model)
