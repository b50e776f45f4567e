"""Hidden states of given tokens under a fused model: what the lm_head receives, without logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ual.models import head as heads


@torch.no_grad()
def states(
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[str, int]],
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    batch_size: int = 8,
    advance: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Return the hidden states from which the model predicts the tokens at `places`, [places, D].

    A state is the input of the lm_head, after the final normalization. The state that predicts the token at
    position t is at t - 1. Only these states are kept, and samples without a place are not computed.
    Batches are those of like length, longest first, so they do not depend on the model.

    Args:
        model: fused by `ual.models.fuse`, on any device and in any dtype; its mode is restored.
        features: tokenized samples with `id`, `input_ids` and `labels`; ids are distinct.
        places: (id of a sample, position of a token in it), positions at least 1.
        collate: makes a batch of tensors from features, padded on the right.
        batch_size: samples per forward pass.
        advance: called with the number of samples done.

    Raises:
        ValueError: a place is not in its sample, or no sample has this id.
    """
    wanted: dict[str, list[tuple[int, int]]] = {}
    for index, (name, position) in enumerate(places):
        wanted.setdefault(name, []).append((index, position))
    present = [feature for feature in features if feature["id"] in wanted]
    length = {feature["id"]: len(feature["input_ids"]) for feature in present}
    for name, position in places:
        if not 1 <= position < length.get(name, 0):
            raise ValueError(f"sample {name!r} has no token at position {position} that is predicted")
    ordered = sorted(present, key=lambda feature: -len(feature["input_ids"]))
    of: Any = model  # a PeftModel passes on what it lacks
    device, head = next(model.parameters()).device, of.get_output_embeddings()
    heads.prepare(head)
    found: NDArray[np.float32] | None = None
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(ordered), batch_size):
            samples = ordered[start : start + batch_size]
            batch = collate(samples)
            with heads.capturing(head) as captured:
                model(**{name: batch[name].to(device) for name in ("input_ids", "attention_mask")})
            for states_of, sample in zip(captured.hidden, samples, strict=True):
                indices, positions = map(list, zip(*wanted[sample["id"]], strict=True))
                kept = states_of[torch.tensor(positions, device=states_of.device) - 1].float().cpu().numpy()
                if found is None:
                    found = np.empty((len(places), kept.shape[1]), dtype=np.float32)
                found[indices] = kept
            advance(len(samples))
    finally:
        model.train(was_training)
    return np.empty((0, 0), dtype=np.float32) if found is None else found
