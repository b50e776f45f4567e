"""The estimators that `ual elicit` knows: every `Estimator` in a module of this package that has a name."""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from ual.config.base import explain, nearest
from ual.errors import UserError
from ual.uncertainty import estimators
from ual.uncertainty.protocol import Estimator


def discover() -> dict[str, type[Estimator]]:
    """Return the estimators by name; a base class, whose `name` is not a Literal, is none."""
    found: dict[str, type[Estimator]] = {}
    for module in pkgutil.iter_modules(estimators.__path__, f"{estimators.__name__}."):
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and issubclass(kind, Estimator):
                annotation = kind.model_fields["name"].annotation
                if get_origin(annotation) is Literal:
                    name = get_args(annotation)[0]
                    assert found.setdefault(name, kind) is kind, f"two estimators have the name {name!r}"
    return found


ESTIMATORS = discover()


def build(specs: Sequence[str | dict[str, Any]]) -> list[Estimator]:
    """Build the estimators that a configuration names, each a name or ``{name: ..., option: value}``.

    Raises:
        UserError: a name or an option is unknown, a value does not fit, or a label is used twice.
    """
    built: list[Estimator] = []
    for position, spec in enumerate(specs):
        place = f"configuration, estimators.{position}"
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.get("name")
        if name not in ESTIMATORS:
            raise UserError(f"unknown estimator {name!r}; {nearest(str(name), [*ESTIMATORS])}", place=place)
        try:
            estimator = ESTIMATORS[name].model_validate(options)
        except ValidationError as error:
            problems = "\n  ".join(explain(e, ESTIMATORS[name]) for e in error.errors())
            raise UserError(problems, place=f"{place} ({name})") from error
        if any(estimator.label == other.label for other in built):
            raise UserError(
                f"two estimators are called {estimator.label!r}",
                place="configuration, estimators",
                remedy='give one of them a "label" of its own',
            )
        built.append(estimator)
    return built
