"""A sequence classifier for natural-language inference (NLI): whether one text entails another."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ual.config.run import ModelConfig
from ual.errors import UserError
from ual.models.load import first_line

LABELS = ("entailment", "neutral", "contradiction")


class Entailment:
    """An NLI cross-encoder; the names of its labels say which probability is which.

    Raises:
        UserError: the classifier cannot be loaded, or its labels are not `LABELS`.
    """

    def __init__(self, config: ModelConfig, *, device: torch.device) -> None:
        place = f"configuration, nli: {config.path}"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(config.path, revision=config.revision)
            self._model = AutoModelForSequenceClassification.from_pretrained(
                config.path, revision=config.revision, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the classifier: {first_line(error)}", place=place) from error
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
        """Return {label: probability} for each (premise, hypothesis)."""
        premises, hypotheses = map(list, zip(*pairs, strict=True))
        batch = self._tokenizer(premises, hypotheses, padding=True, truncation=True, return_tensors="pt").to(
            self._model.device
        )
        probabilities = self._model(**batch).logits.float().softmax(-1).tolist()
        return [dict(zip(self._names, values, strict=True)) for values in probabilities]
