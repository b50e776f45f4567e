"""A leading `~` is the home folder in configurations and arguments; errors show what a path stands for."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ual.cli.main import app
from ual.config.base import load_as
from ual.config.elicit import ElicitConfig
from ual.config.run import load, parse
from ual.errors import UserError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def values(section: Any) -> list[str]:
    if isinstance(section, dict):
        return [text for value in section.values() for text in values(value)]
    return [section] if isinstance(section, str) else []


@pytest.mark.kills("ual/config/base.py", "return str(Path(value).expanduser()) if", "return value if")
def test_the_home_folder_in_every_path_of_a_configuration(home: Path) -> None:
    raw = {
        "output_dir": "~/runs/x",
        "model": {"path": "~/model", "tokenizer": "~/tokenizer"},
        "data": {"train": "~/a.jsonl", "eval": "~/b.jsonl", "chat_template": "~/t.jinja"},
        "deepspeed": "~/ds.json",
        "training": {"fsdp_config": "~/fsdp.json"},
    }
    found = [text for text in values(parse(raw).model_dump()) if text.startswith(str(home))]
    names = ("model", "tokenizer", "a.jsonl", "b.jsonl", "t.jinja", "ds.json", "fsdp.json", "runs/x")
    assert sorted(found) == sorted(str(home / name) for name in names)
    assert parse(raw | {"model": "owner/~name"}).model.path == "owner/~name"
    with pytest.raises(UserError, match="no such user: ~no-such-user"):
        parse(raw | {"output_dir": "~no-such-user/x"})

    asked = {
        "data": "~/a.jsonl", "output_dir": "~/e", "cache": "~/c", "nli": "~/nli",
        "backend": {"kind": "endpoint", "model": "m", "api_key_file": "~/key"},
    }  # fmt: skip
    path = home / "e.yaml"
    path.write_text(yaml.safe_dump(asked))
    elicit = load_as(ElicitConfig, "~/e.yaml")
    found = [text for text in values(elicit.model_dump()) if text.startswith(str(home))]
    assert sorted(found) == [str(home / name) for name in ("a.jsonl", "c", "e", "key", "nli")]


@pytest.mark.kills("ual/cli/console.py", "    cls=_Commands,\n", "")
def test_the_home_folder_in_arguments(home: Path) -> None:
    """A shell does not resolve it after an equals sign, and launchers start no shell."""
    (home / "answers.jsonl").write_text('{"question": "q", "answers": ["a", "a", "b"]}\n')
    words = ["reliability", "~/answers.jsonl", "--output=~/out.jsonl", "--method", "majority"]
    result = CliRunner().invoke(app, words)
    assert f"{home}/" in result.output.replace("\n", "")
    assert not Path("~").exists()
    config = home / "c.yaml"
    config.write_text("model: x\ndata: none.jsonl\n")
    assert load(config, ["output_dir=~/runs/y"]).output_dir == str(home / "runs" / "y")
    result = CliRunner().invoke(app, ["merge", "~/no-run", "-o", "~/m"])
    assert str(home / "no-run") in result.output.replace("\n", "")


@pytest.mark.kills("ual/files.py", 'else f"{path} ({absolute})"', 'else f"{path}"')
def test_errors_show_what_a_relative_path_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word, missing in (("train", "none.yaml"), ("report", "none")):
        said = CliRunner().invoke(app, [word, missing]).output.replace("\n", "")
        assert f"{missing} ({tmp_path / missing})" in said
    Path("c.yaml").write_text("model: ./no-model\ndata: none.jsonl\n")
    said = CliRunner().invoke(app, ["preview", "c.yaml"]).output.replace("\n", "")
    assert f"none.jsonl ({tmp_path / 'none.jsonl'})" in said
    said = CliRunner().invoke(app, ["train", "c.yaml"]).output.replace("\n", "")
    assert f"no-model ({tmp_path / 'no-model'})" in said
