"""Samples and configurations for the figures of docs/elicitation.md, from real data sets.

    python -m benchmarks.studies.elicitation rows ../shared/data FOLDER --model MODEL [--rows 500]
    python -m benchmarks.studies.elicitation answer ../shared/data FOLDER
    python -m benchmarks.studies.elicitation collect FOLDER

`rows` writes samples and configurations for TruthfulQA, ChaosNLI and GSM8K. `answer` reads the batch files
that `ual elicit gsm8k.yaml --export-batch batch` wrote, and writes FOLDER/answers.jsonl with the recorded
answers. `collect` writes the figures of the three reports to benchmarks/results/.
"""

import argparse
import gzip
import json
import random
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine
from ual.methods import reliability
from ual.methods.answers import normalize

_CHAOSNLI = 300  # items; each costs five generated answers
_ANSWERS = 18  # recorded for all but 18 of 1,319 questions


def truthfulqa(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield a random sample of the answers, with their human verdicts."""
    lines = (data / "truthfulqa" / "finetune_truth.jsonl").read_text().splitlines()
    given = [i for i, line in enumerate(lines) if "\\nA: \\nTrue:" not in line]  # some answers are empty
    for i in sorted(random.Random(0).sample(given, count)):
        row = json.loads(lines[i])
        question, _, rest = row["prompt"].removeprefix("Q: ").partition("\nA: ")
        yield {
            "id": str(i),
            "prompt": question,
            "completion": rest.removesuffix("\nTrue:"),
            "correct": row["completion"].strip() == "yes",
        }


def chaosnli(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yield SNLI items, the human majority as the response and the human entropy, in nats, as uncertainty."""
    names = {"e": "Entailment", "n": "Neutral", "c": "Contradiction"}
    lines = (data / "chaosnli" / "chaosNLI_snli.jsonl").read_text().splitlines()
    for i in sorted(random.Random(0).sample(range(len(lines)), min(count, len(lines)))):
        row = json.loads(lines[i])
        example = row["example"]
        question = (
            f"Premise: {example['premise']}\nHypothesis: {example['hypothesis']}\n"
            "Does the premise entail the hypothesis, contradict it, or neither? Answer with one word: "
            "Entailment, Neutral or Contradiction."
        )
        yield {
            "id": row["uid"],
            "prompt": question,
            "completion": names[row["majority_label"]],
            "uncertainty": reliability.entropy(
                [label for label, n in row["label_counter"].items() for _ in range(n)]
            ),
        }


def recorded(data: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(data / "gsm8k_answers" / "gsm8k_test_samples.jsonl.gz", "rt") as file:
        yield from map(json.loads, file)


def gsm8k(data: Path) -> Iterator[dict[str, Any]]:
    """Yield the questions that have 18 recorded answers, with their majority, and whether it is correct."""
    for i, row in enumerate(recorded(data)):
        values = [normalize(sample["answer"]) for sample in row["samples"][:_ANSWERS]]
        if len(values) < _ANSWERS:
            continue
        label = reliability.majority(values)
        if label is not None:
            correct = label == normalize(row["gold"])
            yield {"id": str(i), "prompt": row["question"], "completion": label, "correct": correct}


def write_rows(data: Path, folder: Path, model: str, count: int) -> None:
    local = {"kind": "local", "model": {"path": model, "dtype": "bfloat16"}, "batch_size": 16}
    judge = {"name": "judge", "structured": False, "read": "first_token", "max_tokens": 1}
    white_box = [
        {"name": "white_box", "measure": m, "label": m}
        for m in ("nll", "mean_entropy", "max_entropy", "mean_margin")
    ]
    consistent = {"name": "self_consistency", "samples": _ANSWERS, "answer": "last_number", "max_tokens": 256}
    runs: dict[str, tuple[Iterator[dict[str, Any]], dict[str, Any]]] = {
        "truthfulqa": (
            truthfulqa(data, count),
            {"backend": local, "estimators": [*white_box, "p_true", judge]},
        ),
        "chaosnli": (
            chaosnli(data, min(count, _CHAOSNLI)),
            {
                "backend": local,
                "estimators": [
                    "column",
                    white_box[1],
                    {"name": "self_consistency", "samples": 5, "answer": "text", "max_tokens": 4},
                    judge,
                ],
            },
        ),
        "gsm8k": (
            gsm8k(data),
            {"backend": {"kind": "endpoint", "model": "recorded"}, "estimators": [consistent]},
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (rows, config) in runs.items():
        path = folder / f"{name}-rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        label = {"label": "correct"} if name != "chaosnli" else {}
        config |= {"data": {"path": str(path), **label}, "output_dir": str(folder / name)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def answer(data: Path, folder: Path) -> None:
    """Answer each exported request with the recorded answer whose index is its seed."""
    answers = {row["question"]: [sample["answer"] for sample in row["samples"]] for row in recorded(data)}
    with (folder / "answers.jsonl").open("w") as out:
        for path in sorted((folder / "batch").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                request = json.loads(line)
                body = request["body"]
                value = normalize(answers[body["messages"][0]["content"]][body["seed"]])
                message = {"role": "assistant", "content": "" if value is None else f"#### {value}"}
                reply = {"choices": [{"message": message, "finish_reason": "stop"}]}
                response = {"status_code": 200, "body": reply}
                out.write(json.dumps({"custom_id": request["custom_id"], "response": response}) + "\n")


def collect(folder: Path) -> dict[str, Any]:
    """Return the figures of the three reports, and the judge's median probability of the scale."""
    studies = {}
    for name in ("gsm8k", "truthfulqa", "chaosnli"):
        studies[name] = report = json.loads((folder / name / "report.json").read_text())
        for estimator in report["estimators"].values():
            estimator.get("calibration", {}).pop("bins", None)
    records = map(json.loads, (folder / "truthfulqa" / "elicited.jsonl").open())
    masses = [mass for r in records if (mass := r["estimates"]["judge"].get("mass")) is not None]
    studies["truthfulqa"]["judge_scale_mass"] = statistics.median(masses)
    return {"machine": machine.describe(), "studies": studies}


def gsm8k_table(found: dict[str, Any]) -> str:
    """Ranking of wrong majority answers by the entropy of 18 models' answers."""
    of = found["studies"]["gsm8k"]["estimators"]["self_consistency"]["ranking"]
    chance = of["errors"] / of["n"]
    header = ("AUROC", f"AUPRC (chance {chance:.3f})", "prediction rejection")
    return machine.table(header, [tuple(_interval(of[key]) for key in ("auroc", "auprc", "prr"))])


def truthfulqa_table(found: dict[str, Any]) -> str:
    """Ranking of false answers by each estimator."""
    estimators = found["studies"]["truthfulqa"]["estimators"]
    first = estimators["nll"]["ranking"]
    header = ("", "AUROC", f"AUPRC (chance {first['errors'] / first['n']:.3f})", "prediction rejection")
    rows = [
        (text, *(_interval(estimators[name]["ranking"][key]) for key in ("auroc", "auprc", "prr")))
        for name, text in (
            ("nll", "`white_box` NLL (log perplexity)"),
            ("mean_entropy", "`white_box` mean entropy"),
            ("max_entropy", "`white_box` maximum entropy"),
            ("mean_margin", "`white_box` minus mean margin"),
            ("p_true", "`p_true`"),
            ("judge", "`judge`, first token"),
        )
    ]
    return machine.table(header, rows)


def chaosnli_table(found: dict[str, Any]) -> str:
    """Spearman correlations with the entropy of 100 human labels."""
    study = found["studies"]["chaosnli"]
    with_humans = {pair["b"]: pair for pair in study["spearman"] if pair["a"] == "column"}
    rows = [
        (text, _interval(with_humans[name]["rho"]), f"{with_humans[name]['n']}")
        for name, text in (
            ("mean_entropy", "mean token entropy of the majority label"),
            ("judge", "`judge`"),
            ("self_consistency", "`self_consistency`, 5 answers of at most 4 tokens"),
        )
    ]
    return machine.table(("", "Spearman", "items"), rows)


def _interval(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.studies.elicitation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("rows", "answer", "collect"):
        command = commands.add_parser(what)
        if what != "collect":
            command.add_argument("data", type=Path)
        command.add_argument("folder", type=Path)
        if what == "rows":
            command.add_argument("--model", required=True)
            command.add_argument("--rows", type=int, default=500)
    given = parser.parse_args()
    if given.what == "rows":
        write_rows(given.data, given.folder, given.model, given.rows)
    elif given.what == "answer":
        answer(given.data, given.folder)
    else:
        found = collect(given.folder)
        tables = (gsm8k_table(found), truthfulqa_table(found), chaosnli_table(found))
        text = "\n\n".join((f"# Elicited uncertainties\n\n{machine.headline(found['machine'])}", *tables))
        machine.save(found, text, "elicitation")


if __name__ == "__main__":
    main()
