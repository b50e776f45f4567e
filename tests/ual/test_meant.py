"""What is trained is what the data mean: uncertainties that say nothing, and samples on both sides."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.ual.runs import ROOT, configure, write_rows
from ual.cli.main import app
from ual.config.objectives import LOSS_KINDS
from ual.config.run import load as load_config
from ual.config.run import parse
from ual.data import load, training_set
from ual.data.overlap import Overlap
from ual.errors import UserError
from ual.pipelines.preview import preview
from ual.report import write as write_report

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i} + {i}?", "completion": f"It is {2 * i}.", "uncertainty": i / 24}
    for i in range(24)
]
STREAM = ["data.streaming=true", "training.max_steps=1"]


def configured(folder: Path, model: Path, rows: list[dict[str, Any]], **sections: Any) -> Path:
    training = {"max_steps": 1, "save_strategy": "no"}
    return configure(folder, model, rows, uncertainty="column", training=training, **sections)


def invoke(*words: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(word) for word in words])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def page(run: Path) -> str:
    source = re.sub(r"<style.*?</style>", "", (run / "report.html").read_text(), flags=re.DOTALL)
    head, _, _ = source.partition("Resolved configuration")
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", head)).split())


def with_null(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    return [row | {"uncertainty": None} if i < count else row for i, row in enumerate(rows)]


class TestMissing:
    @pytest.mark.kills("ual/data/training_set.py", "missing > _MANY_MISSING * count", "missing > 0.9 * count")
    @pytest.mark.kills(
        "ual/report/findings.py", "return [*_notes(runs), *_too_small(runs)", "return [*_too_small(runs)"
    )
    @pytest.mark.slow
    def test_many_are_a_warning_wherever_one_looks(self, tmp_path: Path, tiny: Path) -> None:
        config = configured(tmp_path, tiny, with_null(ROWS, 21))
        told = "21 of 24 samples have no uncertainty: each has the median of the others"
        assert f"warning: {told}" in invoke("train", config)
        assert told in page(tmp_path / "run")
        for words in (["preview", config], ["train", config, "--dry-run", f"output_dir={tmp_path / 'x'}"]):
            assert told in invoke(*words)
        dropping = ["uncertainty.missing=drop", f"output_dir={tmp_path / 'drop'}"]
        assert "21 of 24 samples have no uncertainty: they are not trained" in invoke(
            "train", config, *dropping
        )
        assert "no uncertainty (uncertainty.missing: drop) 21" in page(tmp_path / "drop")
        streaming = [*STREAM, f"output_dir={tmp_path / 'stream'}"]
        assert f"warning: {told}" in invoke("train", config, *streaming)
        assert told in page(tmp_path / "stream")

    @pytest.mark.slow
    def test_few_are_none(self, tmp_path: Path, tiny: Path) -> None:
        config = configured(tmp_path, tiny, with_null(ROWS, 2))
        assert "have no uncertainty" not in invoke("train", config)
        assert "have no uncertainty" not in page(tmp_path / "run")
        path = tmp_path / "run" / "metrics.json"
        metrics = json.loads(path.read_text())
        assert metrics["notes"] == []
        for key in ("smoothing_range", "own_smoothing", "notes", "not_trained", "truncated"):
            del metrics[key]  # as in a run of an earlier version
        path.write_text(json.dumps(metrics))
        write_report([tmp_path / "run"])
        assert "each sample has its own label smoothing. Uncertainty from a col" in page(tmp_path / "run")

    @pytest.mark.kills(
        "ual/data/training_set.py",
        "ranked = asked | ~np.isnan(values)",
        "ranked = asked | True",
    )
    def test_a_sample_with_a_smoothing_of_its_own_misses_nothing(self, tmp_path: Path, tiny: Path) -> None:
        own = [
            {k: v for k, v in row.items() if k != "uncertainty"} | {"label_smoothing": 0.3} for row in ROWS
        ]
        config = configured(tmp_path, tiny, [*own[:12], *ROWS[12:]], data={"overlong": "drop"})
        read = training_set.read(load_config(config, ["uncertainty.missing=refuse"]))
        elicited = training_set.Elicited
        values = [elicited(s.id, "column", s.uncertainty) for s in read.train]
        scores = training_set.score(read.train, values, load_config(config, ["uncertainty.missing=refuse"]))
        assert (scores.missing, scores.notes) == (0, ())
        assert [s.label_smoothing for s in scores.samples[:12]] == [0.3] * 12
        assert scores.samples[12].label_smoothing == 0.0
        assert scores.samples[23].label_smoothing == pytest.approx(0.2)


class TestAssignment:
    """Controls: the same smoothings for other samples, and smoothings that nothing decides."""

    @staticmethod
    def scored(tmp_path: Path, tiny: Path, *overrides: str) -> dict[str, training_set.Scored]:
        some = [{k: v for k, v in row.items() if k != "uncertainty" or i} for i, row in enumerate(ROWS)]
        config = load_config(configured(tmp_path, tiny, some), [*overrides, "uncertainty.missing=drop"])
        read = training_set.read(config)
        values = [training_set.Elicited(s.id, "column", s.uncertainty) for s in read.train]
        return {scored.sample.id: scored for scored in training_set.score(read.train, values, config).samples}

    @pytest.mark.kills("ual/data/training_set.py", "smoothing.shuffled(values[known], seed)", "values[known]")
    @pytest.mark.kills(
        "ual/data/training_set.py",
        "known = ~np.isnan(values)\n    assigned",
        "known = values == values\n    known[:] = True\n    assigned",
    )
    def test_shuffled_smoothings_are_those_of_other_samples(self, tmp_path: Path, tiny: Path) -> None:
        own = self.scored(tmp_path, tiny)
        shuffled = self.scored(tmp_path, tiny, "uncertainty.assignment=shuffled")
        assert shuffled.keys() == own.keys()  # the sample without an uncertainty is dropped in both
        assert len(own) == len(ROWS) - 1
        smoothings = [[s.label_smoothing for s in of.values()] for of in (own, shuffled)]
        assert sorted(smoothings[0]) == sorted(smoothings[1])
        assert sum(a == b for a, b in zip(*smoothings, strict=True)) < len(ROWS) / 3
        for id, scored in shuffled.items():  # reports group samples by their own uncertainty
            assert scored.uncertainty == own[id].uncertainty
        again = self.scored(tmp_path, tiny, "uncertainty.assignment=shuffled")
        assert [s.label_smoothing for s in again.values()] == smoothings[1]
        other = self.scored(tmp_path, tiny, "uncertainty.assignment=shuffled", "training.seed=7")
        assert [s.label_smoothing for s in other.values()] != smoothings[1]

    @pytest.mark.kills("ual/data/training_set.py", 'if how == "shuffled" else', "if True else")
    def test_random_smoothings_depend_on_the_seed_alone(self, tmp_path: Path, tiny: Path) -> None:
        random = self.scored(
            tmp_path, tiny, "uncertainty.assignment=random", "smoothing.scale=absolute", "training.seed=3"
        )
        drawn = np.random.default_rng(3).random(len(ROWS) - 1)
        assert [s.scaled_uncertainty for s in random.values()] == pytest.approx(drawn)


class TestCogCalib:
    """The configuration of docs/training.md smooths what the base model knows, and nothing else."""

    @pytest.mark.kills("ual/config/run.py", "{'inverted ' * self.invert}", "")
    @pytest.mark.kills(
        "ual/methods/smoothing.py", "(maximum, minimum) if invert", "(minimum, maximum) if invert"
    )
    def test_the_known_half_is_smoothed(self, tmp_path: Path, stories: Path) -> None:
        text = (ROOT / "docs" / "training.md").read_text()
        blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        (shown,) = (yaml.safe_load(block) for block in blocks if "cogcalib" in block)
        texts = ["Once upon a time, there was a little girl named Lily.", "One day, she went to the park."]
        strange = ["Xq zv kkr wpl mmt.", "Bnq jhx vv rrz."]  # unlikely letters
        rows = [
            {"id": f"{name} {i}", "prompt": f"Story {i}", "completion": text}
            for name, some in (("known", texts * 6), ("new", strange * 6))
            for i, text in enumerate(some)
        ]
        config = configure(
            tmp_path, stories, rows, uncertainty=shown["uncertainty"], smoothing=shown["smoothing"],
            training={"max_steps": 1, "save_strategy": "no"},
        )  # fmt: skip
        assert "nothing was trained or written" in invoke("train", config, "--dry-run")
        invoke("train", config)
        folder = tmp_path / "run"
        found = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert len(found) == 24
        for row in found:
            assert row["label_smoothing"] == (0.1 if row["id"].startswith("known") else 0.0), row
        assert "NLL, rank scale, inverted step map to [0, 0.1]" in page(folder)


class TestEqual:
    @pytest.mark.kills(
        "ual/methods/smoothing.py", "return known.size > 1 and bool(", "return False and bool("
    )
    @pytest.mark.kills("ual/methods/smoothing.py", "_NOISE = 1e-6", "_NOISE = 0.0")
    @pytest.mark.parametrize(
        ("uncertainty", "scale"),
        [
            ([0.3] * 24, "rank"),
            ([0.0] * 24, "min_max"),
            ([0.3, 0.1 + 0.2] * 12, "rank"),
            ([0.3] * 24, "absolute"),
            ([None] * 21 + [0.3] * 3, "rank"),
        ],
        ids=["equal", "zero", "noise", "absolute", "equal beside missing"],
    )
    def test_equal_uncertainties_are_refused(
        self, tmp_path: Path, tiny: Path, uncertainty: list[float | None], scale: str
    ) -> None:
        rows = [row | {"uncertainty": u} for row, u in zip(ROWS, uncertainty, strict=True)]
        config = configured(tmp_path, tiny, rows, smoothing={"scale": scale})
        said = invoke("train", config, code=2)
        assert f"all 24 uncertainties{' (21 of them missing)' * (None in uncertainty)} are" in said
        assert "set loss: uniform" in said
        assert preview(load_config(config, ["loss=uniform"])).trained == 24

    def test_they_are_refused_in_every_look_and_in_a_stream(self, tmp_path: Path, tiny: Path) -> None:
        config = configured(tmp_path, tiny, [row | {"uncertainty": 0.3} for row in ROWS])
        for words in (["preview", config], ["train", config, "--dry-run"], ["train", config, *STREAM]):
            assert "all 24 uncertainties are 0.3, so there is nothing to rank" in invoke(*words, code=2)

    def test_one_sample_may_be_trained_alone(self, tmp_path: Path, tiny: Path) -> None:
        config = configured(tmp_path, tiny, ROWS[:1])
        assert [shown.smoothing for shown in preview(load_config(config)).shown] == [0.1]

    def test_equal_values_at_the_beginning_of_a_stream_may_differ_later(
        self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ual.pipelines.preview.STREAMED", 3)
        rows = [row | {"uncertainty": 1 if i < 4 else i} for i, row in enumerate(ROWS)]
        config = configured(tmp_path, tiny, rows, data={"streaming": True, "overlong": "drop"})
        assert preview(load_config(config)).count == 3

    @pytest.mark.parametrize(
        ("extra", "overrides", "subtitle"),
        [
            ({}, ["smoothing.map=constant"], "same label smoothing for every sample, 0.1 (smoothing.map"),
            ({}, ["smoothing.min=0.2"], "same label smoothing for every sample, 0.2 (smoothing.map"),
            (
                {},
                ["smoothing.scale=absolute", "smoothing.map=step", "smoothing.threshold=1"],
                "same label smoothing for every sample, 0 (smoothing.map: step)",
            ),
            (
                {"label_smoothing": 0.05},
                [],
                "same label smoothing for every sample, 0.05 (the samples' own label_smoothing)",
            ),
        ],
        ids=["map", "range", "threshold", "own"],
    )
    @pytest.mark.slow
    def test_a_constant_that_was_asked_for_is_said(
        self, tmp_path: Path, tiny: Path, extra: dict[str, Any], overrides: list[str], subtitle: str
    ) -> None:
        config = configured(tmp_path, tiny, [row | extra for row in ROWS])
        assert "Every sample has the same label smoothing" in invoke("train", config, *overrides)
        shown = page(tmp_path / "run")
        assert subtitle in shown
        assert "its own label smoothing" not in shown
        assert "Uncertainty from" not in shown

    def test_smoothings_of_the_samples_own_are_not_said_to_be_derived(
        self, tmp_path: Path, tiny: Path
    ) -> None:
        own = [row | {"label_smoothing": i / 100} for i, row in enumerate(ROWS)]
        invoke("train", configured(tmp_path, tiny, own))
        run = tmp_path / "run"
        assert "Fine-tuning with the samples' own label_smoothing" in page(run)
        assert "from its uncertainty" not in (run / "adapter/README.md").read_text()
        metrics = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps(metrics | {"own_smoothing": 3}))
        write_report([run])
        assert "3 samples have a label_smoothing of their own" in page(run)
        assert "Uncertainty from a column of the data" in page(run)


@pytest.mark.kills("ual/report/page.py", 'if run.smoothing == "none":', "if False:")
@pytest.mark.parametrize("kind", ["uniform", "dft"])
def test_a_page_claims_only_what_its_loss_does(tmp_path: Path, tiny: Path, kind: str) -> None:
    invoke("train", configured(tmp_path, tiny, ROWS, loss=kind))
    run = tmp_path / "run"
    card = (run / "adapter/README.md").read_text()
    assert ("label-smoothing" in card) == ("Mean smoothing" in page(run)) == (kind == "uniform")
    assert ("without label smoothing" in card) == (kind != "uniform")
    for other in {"uniform"} if kind == "uniform" else LOSS_KINDS.keys() - {"uniform", "ual"}:
        for name in ("metrics.json", "config.yaml"):
            text = (run / name).read_text()
            text = re.sub(r'("loss_kind": "|loss:\n  kind: )\w+', rf"\g<1>{other}", text)
            (run / name).write_text(text)
        write_report([run])
        shown = page(run) + card
        assert LOSS_KINDS[other].sentence in shown
        for claim in ("own label smoothing", "Uncertainty-aware", "from its uncertainty", "No sample has an"):
            assert claim not in shown
        assert "No run here sets smoothing by uncertainty" in shown


class TestWeights:
    @pytest.mark.kills("ual/data/training_set.py", "if count and not highest:", "if False:")
    def test_weights_that_are_all_0_are_refused(self, tmp_path: Path, tiny: Path) -> None:
        config = configured(tmp_path, tiny, [row | {"sample_weight": 0} for row in ROWS])
        for words in (["preview", config], ["train", config, "--dry-run"], ["train", config, *STREAM]):
            assert 'all 24 samples have "sample_weight" 0' in invoke(*words, code=2)

    @pytest.mark.kills(
        "ual/pipelines/samples.py", "any(sample.sample_weight for sample in left)", "any(left)"
    )
    def test_the_only_weight_above_0_may_be_dropped(self, tmp_path: Path, tiny: Path) -> None:
        rows = [row | {"sample_weight": 0} for row in ROWS]
        config = configured(tmp_path, tiny, [{**ROWS[0], "prompt": "long " * 99}, *rows[1:]])
        for flags in (["--dry-run"], []):
            said = invoke("train", config, "data.overlong=drop", *flags, code=2)
            assert "no training sample is left" in said

    def test_equal_weights_do_not_weigh(self, tmp_path: Path, tiny: Path) -> None:
        config = configured(tmp_path, tiny, [row | {"sample_weight": 0.5} for row in ROWS], loss="weighted")
        assert 'needs weights that differ, and every "sample_weight" is 0.5' in invoke(
            "train", config, code=2
        )

    def test_a_stream_is_checked_before_training(self, tmp_path: Path, tiny: Path) -> None:
        config = configured(tmp_path, tiny, [*ROWS, ROWS[0] | {"sample_weight": 2}])
        assert 'line 25 loss dft computes weights, but this sample has "sample_weight" 2' in invoke(
            "train", config, "loss=dft", *STREAM, code=2
        )
        assert not (tmp_path / "run" / "adapter").exists()


def chat(*said: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]}


def called(id: str) -> dict[str, Any]:
    call = {"id": id, "function": {"name": "now", "arguments": "{}"}}
    return {
        "messages": [
            {"role": "user", "content": "When?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": id},
            {"role": "assistant", "content": "At 3."},
        ]
    }


class TestBothSides:
    @pytest.mark.kills("ual/data/overlap.py", '" ".join(message.content.split())', "message.content")
    @pytest.mark.kills("ual/data/overlap.py", 'unicodedata.normalize("NFC", ', "(")
    @pytest.mark.kills("ual/data/overlap.py", 'if key != "id"}', "}")
    @pytest.mark.kills("ual/data/overlap.py", "if found := self._conversations.get(", "if found := {}.get(")
    @pytest.mark.parametrize(
        ("trained", "held_out"),
        [
            (ROWS[3], ROWS[3] | {"id": "another"}),
            (ROWS[3] | {"id": "one"}, {"instruction": ROWS[3]["prompt"], "output": ROWS[3]["completion"]}),
            (ROWS[3], {"prompt": " What is\n3 +  3? ", "completion": "It is 6.\n"}),
            (chat("What?", "It is 6.", "And?", "So."), {"prompt": "What?", "completion": "It is 6."}),
            ({"prompt": "Caf\u00e9?", "completion": "Yes."}, {"prompt": "Cafe\u0301?", "completion": "Yes."}),
            (called("a"), called("b")),
        ],
        ids=[
            "other id",
            "other form",
            "other white space",
            "a beginning",
            "other characters",
            "ids of calls",
        ],
    )
    def test_a_conversation_on_both_sides_is_refused(
        self, tmp_path: Path, tiny: Path, trained: dict[str, Any], held_out: dict[str, Any]
    ) -> None:
        held = write_rows(tmp_path / "held.jsonl", [held_out])
        rows = [trained | {"uncertainty": i} if i == 0 else trained | chat(str(i), "x") for i in range(2)]
        rows = [rows[0], {**chat("other", "x"), "uncertainty": 1}] if "messages" in trained else [trained]
        template = {"chat_template": "chatml"} if trained == called("a") else {}
        config = configured(tmp_path, tiny, rows, data={"eval": str(held)} | template)
        said = invoke("train", config, "loss=sft", code=2)
        assert "1 held-out conversations are also trained" in said
        assert "held.jsonl, line 1" in said
        assert "rows.jsonl, line 1" in said
        streaming = invoke("train", config, "loss=sft", *STREAM, f"output_dir={tmp_path / 'stream'}", code=2)
        assert "1 held-out conversations are also trained" in streaming
        assert "1 held-out conversations are also trained" in invoke(
            "preview", config, "loss=sft", *STREAM, code=2
        )

    @pytest.mark.kills("ual/pipelines/samples.py", "s.id in self.held_out_tokens", "s.id not in self.tokens")
    def test_different_conversations_may_have_equal_ids(self, tmp_path: Path, tiny: Path) -> None:
        named = [row | {"id": i} for i, row in enumerate(ROWS)]
        held_out = [
            chat(f"Who is number {i}?", f"Number {i} it is, my friend.") | {"id": i} for i in range(4)
        ]
        held = write_rows(tmp_path / "held.jsonl", held_out)
        config = configured(tmp_path, tiny, named, data={"eval": str(held)})
        invoke("train", config)
        run = tmp_path / "run"
        lines = {name: (run / name).read_text().splitlines() for name in ("samples.jsonl", "held_out.jsonl")}
        trained, measured = ([json.loads(line) for line in found] for found in lines.values())
        assert [row["id"] for row in trained] == [str(i) for i in range(24)]
        assert [row["id"] for row in measured] == ["0", "1", "2", "3"]
        assert trained[1]["response"] == "It is 2."
        # bytes are tokens: a space, the response and EOS
        assert measured[1]["tokens"] == len(" Number 1 it is, my friend.") + 1
        assert trained[1]["response_tokens"] == len(" It is 2.") + 1

    def test_a_prompt_on_both_sides_is_a_warning(self, tmp_path: Path, tiny: Path) -> None:
        """Data sets with one prompt for many samples are trained, and the page names the doubt."""
        held_out = [ROWS[i] | {"completion": "Who knows."} for i in range(3)]
        held = write_rows(tmp_path / "held.jsonl", [*held_out, chat("New?", "Yes.")["messages"] and {
            "prompt": "New?", "completion": "Yes."
        }])  # fmt: skip
        config = configured(tmp_path, tiny, ROWS, data={"eval": str(held)})
        told = "3 of 4 held-out samples have the prompt of a training sample, with another response"
        assert f"warning: {told}" in invoke("train", config)
        assert told in page(tmp_path / "run")
        assert told in invoke("preview", config)
        found = Overlap(load(str(held)))
        assert [s for s in load(str(tmp_path / "rows.jsonl")) if found.add(s) is not s] == []
        assert told in found.check(load_config(config).data)[0]

    def test_turns_and_tools_are_part_of_a_conversation(self, tmp_path: Path) -> None:
        tools = {"tools": [{"name": "add"}]}
        rows = [chat("a b", "c"), chat("a", "b c"), chat("x", "y") | tools, chat("m", "n", "o", "p")]
        other = [chat("a", "bc"), chat("x", "y"), chat("o", "p"), chat("m", "n", "o")]
        trained = load(str(write_rows(tmp_path / "a.jsonl", rows)))
        held_out = load(str(write_rows(tmp_path / "b.jsonl", other[:3])))
        overlap = Overlap(held_out)
        for sample in trained:
            overlap.add(sample)
        assert not overlap.conversations

    @pytest.mark.slow
    def test_real_data(self, shared: Path) -> None:
        config = {"model": "m", "output_dir": "o", "loss": "sft"}
        folder = shared / "data" / "gsm8k"
        data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "test.jsonl")}
        assert training_set.read(parse(config | {"data": data})).notes == ()
        with pytest.raises(UserError, match="held-out conversations are also trained"):
            training_set.read(parse(config | {"data": data | {"eval": data["train"]}}))
