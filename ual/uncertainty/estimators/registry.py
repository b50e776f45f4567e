"""The estimators that `ual elicit` knows: a new one is a file of its own and a line here."""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from ual.config.base import explain, nearest
from ual.errors import UserError
from ual.uncertainty.estimators.column import Column
from ual.uncertainty.estimators.judge import Judge
from ual.uncertainty.estimators.p_true import PTrue
from ual.uncertainty.estimators.paraphrase import Rewording
from ual.uncertainty.estimators.self_consistency import SelfConsistency
from ual.uncertainty.estimators.semantic_entropy import SemanticEntropy
from ual.uncertainty.estimators.verbalised import Verbalised
from ual.uncertainty.estimators.white_box import WhiteBox
from ual.uncertainty.protocol import AskingEstimator

ESTIMATORS: dict[str, type[AskingEstimator]] = {
    "judge": Judge,
    "verbalised": Verbalised,
    "self_consistency": SelfConsistency,
    "semantic_entropy": SemanticEntropy,
    "rewording": Rewording,
    "white_box": WhiteBox,
    "p_true": PTrue,
    "column": Column,
}


def build(specs: Sequence[str | dict[str, Any]]) -> list[AskingEstimator]:
    """Build the estimators that a configuration names, each a name or ``{name: ..., option: value}``.

    Raises:
        UserError: a name or an option is unknown, a value does not fit, or a label is used twice.
    """
    built = []
    for position, spec in enumerate(specs):
        place = f"configuration, estimators.{position}"
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.get("name")
        if name not in ESTIMATORS:
            raise UserError(
                f"unknown estimator {name!r}; {nearest(str(name), list(ESTIMATORS))}", place=place
            )
        kind = ESTIMATORS[name]
        try:
            built.append(kind.model_validate(options))
        except ValidationError as error:
            problems = "\n  ".join(explain(e, kind) for e in error.errors())
            raise UserError(problems, place=f"{place} ({name})") from error
    labels = [estimator.label for estimator in built]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(
            f"two estimators are called {twice[0]!r}",
            place="configuration, estimators",
            remedy='give one of them a "label" of its own',
        )
    return built
