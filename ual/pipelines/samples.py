"""What a run does before it needs weights: check the model, render samples, find known uncertainties."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ual.config.run import RunConfig, named
from ual.data import Renderer, TokenizedSample, tokenize, training_set
from ual.data.training_set import Read
from ual.errors import UserError
from ual.models import check_head, fuse
from ual.models.load import check_quantization, load_config, load_tokenizer, stop_ids
from ual.models.memory import empty_model
from ual.records import Elicited, Sample
from ual.train import feasible
from ual.uncertainty.estimators import column

log = logging.getLogger(__name__)

UNDECIDED = "options without a decision token (data.invalid: drop)"


@dataclass(frozen=True, slots=True)
class Rendered:
    """Samples with their tokens, and the tokenizer and renderer of the run.

    `train` and `held_out` are the samples that have tokens; overlong ones were dropped. For a stream, `train`
    is empty. Equal ids among the two are different samples.
    """

    config: RunConfig
    tokenizer: Any
    renderer: Renderer
    read: Read
    tokens: Mapping[str, TokenizedSample]
    held_out_tokens: Mapping[str, TokenizedSample]

    @property
    def train(self) -> list[Sample]:
        return [s for s in self.read.train if s.id in self.tokens]

    @property
    def held_out(self) -> list[Sample]:
        return [s for s in self.read.held_out if s.id in self.held_out_tokens]

    def features(self) -> list[dict[str, Any]]:
        """Return the training samples to measure: without smoothing, each of weight 1."""
        return [training_set.features(tokens) for tokens in self.tokens.values()]

    def held_out_features(self) -> list[dict[str, Any]]:
        """Return the held-out samples to measure, in the order of `held_out`."""
        return [training_set.features(tokens) for tokens in self.held_out_tokens.values()]


def renderer(config: RunConfig, *, trust_remote_code: bool = False) -> tuple[Any, Renderer]:
    """Return the tokenizer and the renderer of a run; the tokenizer is saved with the renderer's template."""
    tokenizer = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
    of_model = load_config(config.model, trust_remote_code=trust_remote_code)
    made_by = training_set.renderer(config, tokenizer, of_model, stop_ids(config.model, of_model))
    tokenizer.chat_template = made_by.template.text
    return tokenizer, made_by


def render(
    config: RunConfig,
    read: Read,
    *,
    trust_remote_code: bool = False,
    cache: Path | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Rendered:
    """Tokenize all samples, or take their tokens from the cache.

    Raises:
        UserError: a sample cannot be rendered, or the samples' weights do not suit the loss.
    """
    if not config.data.streaming:  # of a stream, only the first samples may be known
        deque(training_set.weighed(read.train, config), maxlen=0)
    tokenizer, made_by = renderer(config, trust_remote_code=trust_remote_code)
    folder = None if cache is None else cache / "tokenized"
    tokens, held_out_tokens = (
        tokenize(samples, made_by, folder, advance) if samples else {}
        for samples in (read.train, read.held_out)
    )
    log.info("samples: %s", dict(made_by.counts))
    return Rendered(config, tokenizer, made_by, read, tokens, held_out_tokens)


def not_trained(rendered: Rendered, kept: set[str]) -> dict[str, int]:
    """Count the training samples that are not trained, by the reason.

    Args:
        rendered: all samples of the run.
        kept: ids of the samples that have a smoothing.
    """
    config, limit = rendered.config, rendered.renderer.max_length
    lost = f"no loss token among the first {limit}"
    if config.decided_by is not None:
        lost = f"the loss tokens or the decision token are beyond the first {limit}"
    overlong = f"{lost} (data.overlong: truncate)"
    if config.data.overlong == "drop":
        overlong = f"longer than {limit} tokens (data.overlong: drop)"
    dropped = Counter(rendered.read.dropped)
    if undecided := rendered.renderer.counts["undecided"]:
        dropped.update({UNDECIDED: undecided, overlong: -undecided})
    for sample in rendered.read.train:
        if sample.id not in rendered.tokens:
            dropped[overlong] += 1
        elif sample.id not in kept:
            dropped["no uncertainty (uncertainty.missing: drop)"] += 1
        elif sample.sample_weight == 0:
            dropped["sample_weight 0: read, never trained"] += 1
    return {reason: count for reason, count in dropped.items() if count}


def check_left(config: RunConfig, left: Sequence[Sample]) -> None:
    """Refuse to train if every sample was dropped; the samples of a stream are not known yet.

    Raises:
        UserError: no sample with a weight above 0 is left.
    """
    if not config.data.streaming and not any(sample.sample_weight for sample in left):
        raise UserError(
            "no training sample is left",
            place=named(config.data.train),
            remedy="`ual preview` counts the reasons; data.max_length and uncertainty.missing decide",
        )


def check_model(config: RunConfig, *, trust_remote_code: bool = False) -> Any:
    """Return the model with its adapter, without weights.

    Raises:
        UserError: there is no such model, the adapter does not fit it, its loss cannot be fused, or its
            quantization cannot run on this machine.
    """
    if config.model.quantization:
        check_quantization(config.model.quantization)
    empty = fuse(empty_model(config.model, config.lora, trust_remote_code=trust_remote_code), verify=False)
    check_head(empty)
    return empty


def check_training(config: RunConfig, arguments: Any, model: Any) -> None:
    """Refuse arguments with which training could not begin, or would fail later.

    Args:
        config, arguments: of the run.
        model: as `check_model` returns it.

    Raises:
        UserError: see `ual.train.feasible.check`.
    """
    held_out = config.data.eval is not None or config.data.eval_fraction > 0
    data = config.data
    feasible.check(arguments, model, held_out=held_out, packing=data.packing, streaming=data.streaming)


def check_rendered(rendered: Rendered, arguments: Any, model: Any) -> None:
    """Refuse samples that the model or the arguments do not fit.

    Raises:
        UserError: a token has no embedding, or all held-out samples were dropped and some must be evaluated.
    """
    if rendered.config.data.eval is not None or rendered.config.data.eval_fraction:
        feasible.check_evaluation(arguments, bool(rendered.held_out))
    size, tokenizer = model.get_input_embeddings().num_embeddings, rendered.tokenizer
    used = {"the padding token": tokenizer.pad_token_id}
    if rendered.config.data.streaming:  # its samples are not known yet
        used["the tokenizer"] = max(tokenizer.get_vocab().values())
    for tokens in (*rendered.tokens.values(), *rendered.held_out_tokens.values()):
        largest = int(tokens.input_ids.max())
        if largest >= size:
            used[f"sample {tokens.id!r}"] = largest
            break
    for what, token in used.items():
        if token >= size:
            raise UserError(
                f"{what} has token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), and the embedding "
                f"of the model has {size} tokens",
                place="configuration, model.tokenizer",
                remedy="use the model's own tokenizer, or add the tokens to the model with "
                "resize_token_embeddings and save it",
            )


def own_uncertainties(config: RunConfig, samples: Sequence[Sample]) -> list[Elicited] | None:
    """Return what is known of the samples' uncertainty without asking a model; None if one must be asked.

    Raises:
        UserError: the configuration names the samples' own uncertainty, and no sample has one.
    """
    if not config.loss.about.needs_uncertainty or all(s.label_smoothing is not None for s in samples):
        return []
    if config.uncertainty.estimator == "column":
        return column.own_uncertainties(samples)
    return None
