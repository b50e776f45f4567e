"""The study of docs/weak-to-strong.md: SciQ, with SmolLM2-135M-Instruct and a weak model cut from it.

    python -m benchmarks.studies.weak_to_strong prepare ../shared/data FOLDER
    ual w2s FOLDER/sciq.yaml
    python -m benchmarks.studies.weak_to_strong collect FOLDER

`prepare` writes the weak model, the task and the configuration. `collect` writes the figures of the report
and its plot of accuracies to benchmarks/results/; they have no text of the data.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine
from ual.files import cache_folder
from ual.pipelines.quickstart.model import prepare as smollm2
from ual.pipelines.weak_to_strong.figures import PUBLISHED
from ual.report.plots import write_png
from ual.report.weak_to_strong import accuracy_figure

WEAK_LAYERS = (*range(9), 27, 28, 29)
"""Of 30. The first twelve alone have a loss of 40 nats per token; with the last three, 14 before training."""

# letters are beyond models of this size, so the answer is the option's text
TASK = {
    "kind": "choice",
    "question": "question",
    "options": ["correct_answer", "distractor1", "distractor2", "distractor3"],
    "shuffle": True,
    "gold": "correct_answer",
    "prompt": "{{ question }}\n\n{% for o in options %}- {{ o.text }}\n{% endfor %}",
    "reply": "{{ option }}",
}


def configuration(data: Path, folder: Path, strong: Path) -> dict[str, Any]:
    reading = {"chat_template": "plain", "max_length": 192}
    training = {"per_device_train_batch_size": 8, "warmup_steps": 10, "report_to": "none"}
    return {
        "task": str(folder / "task.yaml"),
        "data": {
            "train": str(data / "sciq" / "train.jsonl.gz"),
            "test": [str(data / "sciq" / f"{name}.jsonl.gz") for name in ("valid", "test")],
        },
        "split": {"limit": 2000, "test_limit": 1000},
        "weak": {
            "model": {"path": str(folder / "weak"), "dtype": "float32"},
            "data": reading,
            "lora": None,
            "training": training | {"max_steps": 200, "learning_rate": 3e-4},
        },
        "strong": {
            "model": {"path": str(strong), "dtype": "float32"},
            "data": reading,
            # the last ten layers: backward ends above the others, which saves two fifths of a step
            "lora": {"target_modules": r".*layers\.2\d\.(self_attn|mlp)\..*_proj"},
            "training": training | {"max_steps": 125, "learning_rate": 5e-4},
        },
        "ask": {"by": "order", "times": 5},
        "arms": ["naive", "filter", "reweight", "random", "soft_labels", "ceiling"],
        "seeds": [1, 2, 3],
        "output_dir": str(folder / "study"),
    }


def cut(strong: Path, folder: Path) -> None:
    """Write a model of some of the layers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(strong, dtype=torch.float32)
    layers = [model.model.layers[i] for i in WEAK_LAYERS]
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in WEAK_LAYERS]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(strong).save_pretrained(folder)


def prepare(data: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    strong = smollm2(cache_folder(os.environ))
    cut(strong, folder / "weak")
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK, sort_keys=False))
    config = configuration(data.resolve(), folder.resolve(), strong)
    (folder / "sciq.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def collect(folder: Path) -> dict[str, Any]:
    """Return the figures of the report, without paths of the machine.

    Raises:
        ValueError: the study is unfinished.
    """
    found = json.loads((folder / "study" / "report.json").read_text())
    if found["status"] != "completed":
        raise ValueError(f"the study in {folder} is {found['status']}: run `ual w2s` to its end first")
    about = machine.describe()
    commit = found["environment"]["commit"] or about["commit"]
    about |= {"commit": commit[:12], "load_before": None}  # of the last run
    config = configuration(Path("../shared/data"), Path("FOLDER"), Path("SmolLM2-135M-Instruct"))
    kept = {
        name: value for name, value in found.items() if name not in ("config", "environment", "published")
    }
    seconds = found["environment"]["seconds"]
    return {"machine": about, "config": config, "training_seconds": seconds, "study": kept}


def arms_table(found: dict[str, Any]) -> str:
    """Accuracy of every arm, minus that of the first arm and that of its control, and PGR."""
    study = found["study"]
    first = study["arms"][0]
    [weak, *_] = study["supervisors"]
    rows = [("weak supervisor", _share(weak["accuracy"]), "", "", "", _seeds(weak))]
    for arm in study["arms"]:
        difference = "" if arm is first else _share(arm["difference"], "+.1f")
        control = f"`{arm['control']}`: {_share(arm['over_control'], '+.1f')}" if arm["control"] else ""
        pgr = "" if arm["pgr"] is None else _interval(arm["pgr"], ".2f")
        rows.append((f"`{arm['name']}`", _share(arm["accuracy"]), difference, control, pgr, _seeds(arm)))
    header = ("", "accuracy, %", f"minus `{first['name']}`", "minus its control", "PGR", "by seed, %")
    return machine.table(header, rows)


def levels_table(found: dict[str, Any]) -> str:
    """Accuracy of the weak majority by the entropy of five answers, beside the published curves."""
    published = {name: dict(PUBLISHED[name]) for name in ("HellaSwag", "MMLU")}
    header = ("entropy, nats", "questions", "majority right", *(f"published, {name}" for name in published))
    rows = []
    for level in found["study"]["levels"]:
        beside = (curve.get(round(level["low"], 2)) for curve in published.values())
        rows.append(
            (
                f"{level['low']:.3f}",
                f"{level['questions']:.1f}",
                f"{level['label_accuracy']:.3f}",
                *("" if value is None else f"{value:.2f}" for value in beside),
            )
        )
    return machine.table(header, rows)


def labels_table(found: dict[str, Any]) -> str:
    """Accuracy of the weak labels before and after filter and weights, and what the filter drops."""
    study = found["study"]
    labels = study["supervisors"][0]["labels"]
    selected, dropped = study["filter"]["selected"], study["filter"]["dropped"]
    rows = [
        ("first answer", f"{labels['first']:.3f}"),
        ("majority", f"{labels['majority']:.3f}"),
        ("majority, selected questions", f"{selected['label_accuracy']:.3f}"),
        ("majority, dropped questions", f"{dropped['label_accuracy']:.3f}"),
        ("distinct answers by weight", f"{labels['weighted']:.3f}"),
    ]
    return machine.table(("labels of the unsupervised questions", "right"), rows)


def _interval(of: dict[str, float], form: str, scale: float = 1.0) -> str:
    value, low, high = (f"{of[key] * scale:{form}}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _share(of: dict[str, float], form: str = ".1f") -> str:
    return _interval(of, form, 100)


def _seeds(of: dict[str, Any]) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in of["by_seed"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.weak_to_strong", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="write the weak model, the task and the configuration")
    preparing.add_argument("data", type=Path)
    preparing.add_argument("folder", type=Path)
    collecting = commands.add_parser("collect", help="write the figures to benchmarks/results/")
    collecting.add_argument("folder", type=Path)
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.data, given.folder)
    else:
        found = collect(given.folder)
        tables = (arms_table(found), labels_table(found), levels_table(found))
        machine.save(found, "\n\n".join((machine.headline(found["machine"]), *tables)), "weak_to_strong")
        picture = machine.stem(found["machine"], "weak_to_strong").with_suffix(".png")
        write_png(accuracy_figure(found["study"]), picture)
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
