"""Configurations: unknown keys refused with the nearest name, overrides, a dump that reads back."""

from pathlib import Path

import pytest

from ual.config import run as configuration
from ual.config.base import dump, load_as
from ual.config.elicit import ElicitConfig, LocalConfig
from ual.errors import UserError

MINIMAL = "model: some/model\ndata: rows.jsonl\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "first.yaml"
    path.write_text(MINIMAL)
    return path


def test_short_forms_and_defaults(file: Path) -> None:
    run = configuration.load(file)
    assert run.model.path == "some/model"
    assert run.data.train == "rows.jsonl"
    assert run.output_dir == "runs/first"
    assert run.label == "first"
    assert run.loss.kind == "ual"
    assert (run.smoothing.scale, run.smoothing.map, run.smoothing.min, run.smoothing.max) == (
        "rank",
        "linear",
        0.0,
        0.2,
    )


def test_a_dump_reads_back_equal(file: Path, tmp_path: Path) -> None:
    run = configuration.load(
        file, ["loss=uniform", "training={max_steps: 3, learning_rate: 1.0e-3}", "lora=null"]
    )
    again = tmp_path / "resolved.yaml"
    again.write_text(dump(run))
    assert configuration.load(again) == run


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("data.max_length=64", "data", "max_length", 64),
        ("model.dtype=bfloat16", "model", "dtype", "bfloat16"),
        ("loss=sft", "loss", "kind", "sft"),
        ("loss.average=samples", "loss", "average", "samples"),
        ("lora.target_modules=[q_proj, v_proj]", "lora", "target_modules", ["q_proj", "v_proj"]),
    ],
)
def test_overrides(file: Path, override: str, section: str, name: str, value: object) -> None:
    assert getattr(getattr(configuration.load(file, [override]), section), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "smothing: {}", 'unknown key "smothing"; did you mean "smoothing"?'),
        (MINIMAL + "lora: {rank: 4}", 'unknown key "lora.rank"'),
        (
            MINIMAL + "smoothing: {max: 1.5}",
            "smoothing.max: Input should be less than or equal to 1, got 1.5",
        ),
        (MINIMAL + "smoothing: {min: 0.3, max: 0.1}", "min must not exceed max"),
        ("model: m", '"data" is required'),
        ("model: m\ndata: {eval: x}", '"data.train" is required'),
        ("- a list", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_refusals_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        configuration.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.kills("ual/config/base.py", "inner = raw[name] = {short[name]: inner}", "inner = raw[name] = {}")
def test_an_override_keeps_what_a_short_form_says(tmp_path: Path) -> None:
    file = tmp_path / "elicit.yaml"
    file.write_text("data: rows.jsonl\nnli: some/classifier\nbackend: {kind: local, model: some/model}\n")
    words = ["data.split=test", "nli.dtype=float32", "backend.model.dtype=float32"]
    found = load_as(ElicitConfig, file, words)
    assert (found.data.path, found.data.split) == ("rows.jsonl", "test")
    assert found.nli is not None
    assert (found.nli.path, found.nli.dtype) == ("some/classifier", "float32")
    assert isinstance(found.backend, LocalConfig)
    assert (found.backend.model.path, found.backend.model.dtype) == ("some/model", "float32")


@pytest.mark.kills("ual/config/base.py", "if not isinstance(inner, dict):", "if False:")
def test_an_override_never_replaces_a_value_that_has_no_keys(file: Path) -> None:
    file.write_text(MINIMAL + "name: first\n")
    with pytest.raises(UserError, match="name is 'first', which has no keys"):
        configuration.load(file, ["name.x=3"])


def test_an_error_names_keys_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "elicit.yaml"
    file.write_text("data: rows.jsonl\nbackend: {kind: local, modle: some/model}\n")
    with pytest.raises(UserError, match=r'unknown key "backend.modle"; did you mean "model"\?'):
        load_as(ElicitConfig, file)


@pytest.mark.kills("ual/config/run.py", "if self.eval is not None and self.eval_fraction:", "if False:")
def test_samples_are_held_out_in_one_way(file: Path) -> None:
    with pytest.raises(UserError, match="eval and eval_fraction both name held-out samples: remove one"):
        configuration.load(file, ["data.eval=held_out.jsonl", "data.eval_fraction=0.1"])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot read the configuration: No such file"):
        configuration.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["loss", "=3", "loss=[", "data.trian=x"])
def test_bad_overrides(file: Path, override: str) -> None:
    with pytest.raises(UserError):
        configuration.load(file, [override])
