"""A sequence classifier that says whether one text entails another."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ual.config.run import ModelConfig
from ual.errors import UserError

LABELS = ("entailment", "neutral", "contradiction")


class Entailment:
    """A cross-encoder for natural-language inference, by its labels' names.

    Raises:
        UserError: it cannot be loaded, or its labels are not the three of NLI.
    """

    def __init__(self, config: ModelConfig, *, device: torch.device) -> None:
        place = f"configuration, nli: {config.path}"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(config.path, revision=config.revision)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                config.path, revision=config.revision, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot load the classifier: {str(error).splitlines()[0]}", place=place
            ) from error
        names = {i: str(name).lower() for i, name in self._model.config.id2label.items()}
        if sorted(names.values()) != sorted(LABELS):
            raise UserError(
                f"the classifier's labels must be {', '.join(LABELS)}, got {', '.join(names.values())}",
                place=place,
                remedy="set id2label in its config.json",
            )
        self._names = [names[i] for i in range(len(LABELS))]
        self._model.to(device).eval()

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, float]]:
        """Return the probabilities of the three labels for each (premise, hypothesis)."""
        batch = self._tokenizer(
            [premise for premise, _ in pairs],
            [hypothesis for _, hypothesis in pairs],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self._model.device)
        rows = self._model(**batch).logits.float().softmax(-1).tolist()
        return [dict(zip(self._names, row, strict=True)) for row in rows]
