"""Samples and configurations for the figures of docs/elicitation.md, from real data sets.

    python -m benchmarks.studies.elicitation rows ../shared/data FOLDER --model MODEL [--rows 1000]
    python -m benchmarks.studies.elicitation answer ../shared/data FOLDER

`rows` writes samples and configurations for TruthfulQA, ChaosNLI and GSM8K. `answer` reads the batch files
that `ual elicit gsm8k.yaml --export-batch batch` wrote, and writes FOLDER/answers.jsonl with the recorded
answers.
"""

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ual.methods import reliability
from ual.methods.answers import normalize

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
            chaosnli(data, count),
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rows", "answer"])
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="")
    parser.add_argument("--rows", type=int, default=1000)
    given = parser.parse_args()
    if given.what == "rows":
        write_rows(given.data, given.folder, given.model, given.rows)
    else:
        answer(given.data, given.folder)
