"""Requests answered by models of transformers in this process."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ual.config.elicit import LocalConfig
from ual.config.run import ModelConfig
from ual.data import Collator, Renderer
from ual.errors import UserError
from ual.models import Entailment, Prompt, fuse, generate, load_model, load_tokenizer, score
from ual.records import Message, Sample
from ual.uncertainty import protocol
from ual.uncertainty.backends.batching import BatchingBackend
from ual.uncertainty.budget import Meter
from ual.uncertainty.estimators.white_box import summary
from ual.uncertainty.protocol import Reply, Request, RequestError, Token

_WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def identity(config: LocalConfig) -> dict[str, Any]:
    """Return what determines a local model's replies: its files' content, precision and seed."""
    return {
        "local": _fingerprint(config.model),
        "dtype": config.model.dtype,
        "seed": config.seed,
        "max_length": config.max_length,
        "chat_template": config.chat_template,
    }


def backend(config: LocalConfig, meter: Meter, *, trust_remote_code: bool = False) -> BatchingBackend:
    """Load the model that a configuration names.

    Raises:
        UserError: it cannot be loaded, or not be fused with the loss that scores.
    """
    model = _LocalModel(config, trust_remote_code=trust_remote_code)
    return BatchingBackend(
        identity(config), frozenset({"generate", "score"}), model.answer, config.batch_size, meter
    )


def entailment(config: ModelConfig, meter: Meter, *, batch_size: int = 16) -> BatchingBackend:
    """Load the classifier of a configuration's `nli`."""
    classify = Entailment(config, device=_device(None))

    def answer(requests: Sequence[Request]) -> list[Reply | RequestError]:
        pairs = [(r.messages[0].content, r.messages[1].content) for r in requests]
        return [Reply("", scores=scores) for scores in classify(pairs)]

    return BatchingBackend(nli_identity(config), frozenset({"entail"}), answer, batch_size, meter)


def nli_identity(config: ModelConfig) -> dict[str, Any]:
    """Return what determines a classifier's verdicts."""
    return {"nli": _fingerprint(config)}


def token_counter(config: LocalConfig) -> "_TokenCounter":
    """Return what counts the tokens of requests as the model would see them."""
    return _TokenCounter(config)


class _TokenCounter:
    def __init__(self, config: LocalConfig) -> None:
        self._tokenizer: Any = load_tokenizer(config.model)
        self._renderer = Renderer(self._tokenizer, chat_template=config.chat_template)

    def __call__(self, request: Request) -> int:
        return len(_prompt_ids(self._renderer, self._tokenizer, request.messages))


class _LocalModel:
    def __init__(self, config: LocalConfig, *, trust_remote_code: bool) -> None:
        self._config = config
        self._tokenizer: Any = load_tokenizer(config.model, trust_remote_code=trust_remote_code)
        model: Any = load_model(config.model, trust_remote_code=trust_remote_code)
        model.to(_device(config.device))
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        length = min(config.max_length, context or config.max_length)
        self._renderer = Renderer(
            self._tokenizer,
            chat_template=config.chat_template,
            max_length=length,
            context_length=context,
            overlong="drop",
        )
        self._model: Any = fuse(model)
        self._collate = Collator(self._tokenizer.pad_token_id, average="weights")

    def answer(self, requests: Sequence[Request]) -> list[Reply | RequestError]:
        """Answer a batch of one kind."""
        try:
            if requests[0].task == "score":
                return self._score(requests)
            return self._generate(requests)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a batch of {len(requests)} does not fit into the device's memory",
                place="configuration, backend.batch_size",
                remedy="lower it; the same command goes on with the answers that are in the cache",
            ) from error

    def _generate(self, requests: Sequence[Request]) -> list[Reply | RequestError]:
        replies: list[Reply | RequestError] = [RequestError("") for _ in requests]
        room = self._renderer.max_length - requests[0].max_tokens
        prompts: list[Prompt] = []
        places: list[int] = []
        for i, request in enumerate(requests):
            ids = _prompt_ids(self._renderer, self._tokenizer, request.messages)
            if len(ids) > room:
                replies[i] = RequestError(
                    f"the prompt has {len(ids)} tokens, {max(room, 0)} have room before the reply"
                )
                continue
            seed = int.from_bytes(protocol.key({"seed": self._config.seed}, request)[:7])
            prompts.append(Prompt(ids, request.temperature, seed))
            places.append(i)
        if not prompts:
            return replies
        first = requests[0]
        made = generate(
            self._model, self._tokenizer, prompts, max_tokens=first.max_tokens, top=first.top_logprobs
        )
        for i, prompt, generated in zip(places, prompts, made, strict=True):
            replies[i] = Reply(
                generated.text,
                "stop" if generated.finished else "length",
                tuple(Token(t.text, t.log_prob, t.alternatives) for t in generated.tokens),
                len(prompt.input_ids),
                generated.length,
            )
        return replies

    def _score(self, requests: Sequence[Request]) -> list[Reply | RequestError]:
        rows: list[dict[str, Any]] = []
        replies: list[Reply | RequestError] = []
        for i, request in enumerate(requests):
            tokenized = self._renderer.render(Sample(str(i), request.messages))
            limit = self._renderer.max_length
            replies.append(RequestError(f"longer than {limit} tokens") if tokenized is None else Reply(""))
            if tokenized is not None:
                row = {"id": str(i), "input_ids": tokenized.input_ids, "labels": tokenized.labels}
                rows.append(row | {"label_smoothing": 0.0, "sample_weight": 1.0})
        sizes = {row["id"]: len(row["input_ids"]) for row in rows}
        for scores in score(self._model, rows, self._collate, batch_size=max(1, len(rows))):
            values = summary(scores) if len(scores.log_prob) else None
            replies[int(scores.sample_id)] = Reply("", scores=values, prompt_tokens=sizes[scores.sample_id])
        return replies


def _prompt_ids(renderer: Renderer, tokenizer: Any, messages: tuple[Message, ...]) -> list[int]:
    text = renderer.render_prompt(Sample("", (*messages, Message("assistant", ""))))
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}", place="configuration, backend.device") from error


def _fingerprint(config: ModelConfig) -> Mapping[str, Any]:
    """Return a folder's content by its hash, a hub model by its name and revision."""
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        return {"name": config.path, "revision": config.revision}
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return {"name": folder.name, "sha256": digest.hexdigest()}
