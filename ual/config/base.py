"""YAML to validated records: an unknown key is refused with the nearest valid name."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ual.errors import UserError
from ual.files import shown

_SHORT = {"model": "path", "data": "train", "loss": "kind", "uncertainty": "estimator"}
"""Sections that a string may stand for, and the key that it is the value of."""


def _expanded(value: str) -> str:
    try:
        return str(Path(value).expanduser()) if value.startswith("~") else value
    except RuntimeError as error:
        raise ValueError(f"there is no such user: {Path(value).parts[0]}") from error


UserPath = Annotated[str, AfterValidator(_expanded)]
"""A path, or where it may be one a name; a leading ``~`` is the home folder."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A section of a configuration: immutable, and without room for keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class CommandConfig(Section):
    """The whole configuration of a command that works in a folder."""

    command: ClassVar[str]
    example: ClassVar[str]
    short: ClassVar[Mapping[str, str]] = _SHORT
    """Sections that a string may stand for, as `_SHORT`."""
    output_dir: UserPath


C = TypeVar("C", bound=CommandConfig)


def from_name(key: str) -> BeforeValidator:
    """Let `model: path` stand for `model: {path: path}`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str | list) else value)


def load_as(schema: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Load the configuration of any command; see `ual.config.run.load`."""
    path = Path(path).expanduser()
    try:
        raw = _unshared(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read the configuration: {error.strerror}", place=shown(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not valid YAML: {error}", place=str(path)) from error
    if not isinstance(raw, dict):
        raise UserError(
            "the configuration must be a mapping of sections",
            place=str(path),
            remedy=f"start from:  {schema.example}",
        )
    for override in overrides:
        _apply(raw, override, schema.short)
    raw.setdefault("output_dir", str(Path("runs") / path.stem))
    return parse_as(schema, raw, place=str(path))


def _unshared(value: Any) -> Any:
    """Return a copy in which what a YAML alias repeats is repeated, so that an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def parse_as(schema: type[C], raw: Mapping[str, Any], *, place: str) -> C:
    """Validate a mapping as the configuration of any command; see `ual.config.run.load` for the errors."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            "\n  ".join(explain(e, schema) for e in error.errors()),
            place=place,
            remedy=f"`ual {schema.command} --help` shows an example; "
            f"`{schema.__module__}` describes every key",
        ) from error


def dump(config: BaseModel) -> str:
    """Return the resolved configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def nearest(name: str, valid: Sequence[str]) -> str:
    """Return ``did you mean "x"?`` for the valid name closest to `name`, or the valid names."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"valid: {', '.join(sorted(valid))}"


def explain(error: Any, schema: type[BaseModel]) -> str:
    """Return one of pydantic's errors in the words of a configuration; unknown keys get the nearest name."""
    location = [str(part) for part in error["loc"]]
    where = ".".join(_as_written(schema, location))
    if error["type"] == "extra_forbidden":
        return f'unknown key "{where}"; {nearest(location[-1], _valid_keys(schema, location[:-1]))}'
    if error["type"] == "missing":
        return f'"{where}" is required'
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}, got {error['input']!r}" if where else message


def _valid_keys(schema: type[BaseModel], location: Sequence[str]) -> list[str]:
    section: Any = schema
    for name in location:
        if name not in section.model_fields:  # the tag of a union: `section` has been chosen by it
            continue
        annotation = section.model_fields[name].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        sections = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        tagged = [s for s in sections if "kind" in s.model_fields and _tag(s) in location]
        section = (tagged or sections)[0]
    return list(section.model_fields)


def _as_written(schema: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Return a place without the `kind` by which pydantic has chosen a section."""
    field = schema.model_fields.get(location[0]) if location else None
    return [*location[:1], *location[2:]] if field and field.discriminator else [*location]


def _tag(section: type[BaseModel]) -> str:
    return str(getattr(section.model_fields["kind"].annotation, "__args__", ("",))[0])


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid over it, section by section; short forms are understood on both sides.

    >>> merged({"loss": {"average": "tokens"}, "lora": {"r": 8}}, {"loss": "dft", "lora": None})
    {'loss': {'average': 'tokens', 'kind': 'dft'}, 'lora': None}
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if key in _SHORT and (isinstance(old, dict) or isinstance(value, dict)):
            old, value = ({_SHORT[key]: v} if isinstance(v, str | list) else v for v in (old, value))
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _apply(raw: dict[str, Any], override: str, short: Mapping[str, str]) -> None:
    key, equals, value = override.partition("=")
    if not (key and equals):
        raise UserError(f"an override must read section.key=value, got {override!r}")
    *sections, last = key.split(".")
    for name in sections:
        inner = raw.setdefault(name, {})
        if name in short and isinstance(inner, str | list):  # the short form, model: path
            inner = raw[name] = {short[name]: inner}
        if inner is None:
            inner = raw[name] = {}
        if not isinstance(inner, dict):
            raise UserError(
                f"override {key!r}: {name} is {inner!r}, which has no keys",
                remedy=f"override all of it: {name}=VALUE",
            )
        raw = inner
    try:
        raw[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {key!r} is not valid YAML: {value!r}") from error
