import gzip
import json
import math
import resource
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ual.data import load
from ual.data.questions import read
from ual.errors import UserError
from ual.methods import reliability
from ual.methods.answers import normalize
from ual.pipelines.weak_labels import Group, process, write

Writer = Callable[..., Path]


@pytest.fixture
def jsonl(tmp_path: Path) -> Writer:
    def written(*records: Any, name: str = "answers.jsonl") -> Path:
        lines = "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
        path = tmp_path / name
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
        return path

    return written


def asked(id: Any, *answers: Any, **fields: Any) -> dict[str, Any]:
    return {"id": id, "question": f"what is {id}?", "answers": list(answers), **fields}


def by_question(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["id"].partition("#")[0]].append(row)
    return groups


class TestNormalize:
    @pytest.mark.parametrize(
        ("same", "text"),
        [
            ([18, 18.0, "18", " 18.0 ", "18.", "+18", "$18", "18.00", "1.8e1", "018"], "18"),
            ([1800, "1,800", "$1,800.00", 1.8e3], "1800"),
            ([0, -0.0, "-0", ".0", "0.000"], "0"),
            ([-2.5, "-2.50", "-$2.5"], "-2.5"),
            ([4.0, 3.9999999999999996, "3.9999999999999996"], "4"),
            ([1 / 3, "0.333333333333"], "0.333333333333"),
            ([5037997078728.0], "5037997078728"),
            ([10**40, f"{10**40}"], "1" + "0" * 40),
            (["New York", " new  york. ", "NEW YORK"], "new york"),
            ([True, "true", "True"], "true"),
            (["18 dollars"], "18 dollars"),
            (["1,80"], "1,80"),
            (["e5"], "e5"),
            (["$"], "$"),
        ],
    )
    def test_equal_answers_are_equal_strings(self, same: list[Any], text: str) -> None:
        assert {normalize(value) for value in same} == {text}

    @pytest.mark.parametrize("nothing", [None, "", "  ", ".", math.nan, math.inf])
    def test_nothing_to_compare(self, nothing: Any) -> None:
        assert normalize(nothing) is None

    @given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text())
    @example(5e-324)
    @example("1e-999")
    def test_is_idempotent(self, value: Any) -> None:
        once = normalize(value)
        assert normalize(once) == once

    @given(st.integers(), st.integers())
    def test_different_integers_stay_different(self, a: int, b: int) -> None:
        assert (normalize(a) == normalize(b)) == (a == b)

    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_keeps_a_number_to_twelve_digits_in_any_spelling(self, x: float) -> None:
        written = normalize(x)
        assert written == normalize(str(x))
        assert written is not None
        assert float(written) == pytest.approx(x, rel=5e-12, abs=0)


class TestRead:
    def test_every_form_of_an_answer(self, jsonl: Writer) -> None:
        path = jsonl(
            asked(
                "q",
                "The 18",
                18.0,
                None,
                {"value": 18, "answer": "so it is 18"},
                {"answer": "18", "text": "9 + 9 = 18"},
                {"text": "Paris."},
                {"value": None, "text": "hm"},
                {"value": "18", "text": " ", "source": "gpt"},
                source="gsm8k",
            )
        )
        [question] = read(path)
        answers = [candidate.answer for candidate in question.candidates]
        assert [a.value for a in answers] == ["the 18", "18", None, "18", "18", "paris", None, "18"]
        assert [a.text for a in answers] == [
            "The 18", "18", "", "so it is 18", "9 + 9 = 18", "Paris.", "hm", "18",
        ]  # fmt: skip
        assert [a.source for a in answers] == ["gsm8k"] * 7 + ["gpt"]
        assert {a.question_id for a in answers} == {"q"}
        assert {c.correct for c in question.candidates} == {None}

    def test_correct_is_given_or_comes_from_gold(self, jsonl: Writer) -> None:
        answers = [{"value": 1}, {"value": 2}, {"value": None}, {"value": 1, "correct": False}]
        [question] = read(jsonl(asked("q", *answers, gold="1.0")))
        assert [c.correct for c in question.candidates] == [True, False, False, False]

    def test_answers_group_by_id_never_by_position(self, jsonl: Writer) -> None:
        lines = [
            {"question_id": "b", "prompt": "b, first wording", "value": 1, "gold": 1},
            {"question_id": "a", "prompt": "a?", "answer": "x", "subject": "letters"},
            {"question_id": "b", "prompt": "b, second wording", "value": 2, "gold": 1},
            {"question_id": "a", "prompt": "a?", "answer": "y"},
        ]
        questions = read(jsonl(*lines))
        assert [(q.id, q.values, q.subject) for q in questions] == [
            ("b", ["1", "2"], ""),
            ("a", ["x", "y"], "letters"),
        ]
        assert [c.prompt[0].content for c in questions[0].candidates] == [
            "b, first wording",
            "b, second wording",
        ]
        assert [c.correct for c in questions[0].candidates] == [True, False]
        shuffled = {q.id: sorted(map(str, q.values)) for q in read(jsonl(*reversed(lines)))}
        assert shuffled == {q.id: sorted(map(str, q.values)) for q in questions}

    def test_both_forms_gzip_and_blank_lines_agree(self, jsonl: Writer) -> None:
        nested = read(jsonl(asked("7", 1, 2), "\n", asked("8", 3, 3)))
        flat = read(
            jsonl(
                *({"question_id": 7, "question": "what is 7?", "answer": v} for v in (1, 2)),
                *({"question_id": 8, "question": "what is 8?", "answer": 3} for _ in range(2)),
                name="flat.jsonl.gz",
            )
        )
        assert [(q.id, q.candidates) for q in nested] == [(q.id, q.candidates) for q in flat]

    def test_a_question_without_an_id_is_named_by_its_line(self, jsonl: Writer) -> None:
        path = jsonl("\n", {"prompt": "x", "samples": [1, 2]}, {"prompt": "x", "samples": [1, 2]})
        assert [q.id for q in read(path)] == ["line-2", "line-3"]

    @pytest.mark.parametrize(
        ("record", "field", "words"),
        [
            ("{]\n", "", "not valid JSON"),
            ("[" * 100_000 + "\n", "", "not valid JSON"),
            ("[1, 2]\n", "", "expected an object"),
            ({"question": "x"}, "", "got the fields question"),
            ({"id": "q", "answers": [1, 2]}, "messages", "expected a string or a list of messages, got null"),
            (asked("q", 1, 2, question=" "), "question", "the prompt is empty"),
            ({"messages": [], "answers": [1, 2]}, "messages", "got []"),
            (
                {"messages": [{"role": "user"}], "answers": [1, 2]},
                "messages[0].content",
                "expected a string, got null",
            ),
            (
                {"messages": [{"role": "assistant", "content": "x"}], "answers": [1, 2]},
                "messages",
                "end before the assistant's answer",
            ),
            (
                {"prompt": [{"role": "robot", "content": "x"}], "answers": [1, 2]},
                "prompt[0].role",
                "'user'",
            ),
            (asked("", 1, 2), "id", 'non-empty string or an integer, got ""'),
            (asked(True, 1, 2), "id", "got true"),
            (asked("q", 1, 2, gold=[1]), "gold", "expected a string, a number or null, got [1]"),
            (asked("q", 1, 2, answers="18"), "answers", 'a list, got "18"'),
            (asked("q", 1, [2]), "answers[1].value", "got [2]"),
            (asked("q", 1, {"source": "x"}), "answers[1]", 'one of "value"'),
            (asked("q", 1, {"value": 2, "correct": "yes"}), "answers[1].correct", 'a boolean, got "yes"'),
            (asked("q", 1, {"value": 2, "text": "x", "source": 3}), "answers[1].source", "got 3"),
            (asked("q", 1, {"text": ["long"] * 99}), "answers[1].text", "..."),
            ({"question_id": "q", "prompt": "x", "answer": {"a": 1}}, "answer", 'got {"a": 1}'),
            ({"question_id": "q", "prompt": "x"}, "", 'expected one of "value"'),
        ],
    )
    def test_bad_records_are_placed(self, jsonl: Writer, record: Any, field: str, words: str) -> None:
        path = jsonl(asked("fine", 1, 2), record)
        with pytest.raises(UserError) as caught:
            read(path)
        assert caught.value.place == f"{path}, line 2" + (f', field "{field}"' if field else "")
        assert words in caught.value.problem

    def test_too_few_answers(self, jsonl: Writer) -> None:
        with pytest.raises(UserError, match="line 2: expected at least two answers to question 'q', got 1"):
            read(jsonl(asked("p", 1, 2), asked("q", 1)))
        with pytest.raises(UserError, match="line 1: expected at least two answers to question 'q', got 0"):
            read(jsonl(asked("q")))

    @pytest.mark.parametrize(
        "again",
        [asked("q", 1, 2), {"question_id": "q", "prompt": "x", "value": 1}],
        ids=["question", "answer"],
    )
    def test_an_id_of_two_questions_is_refused(self, jsonl: Writer, again: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=r"line 2: 'q' is already the id of .*line 1"):
            read(jsonl(asked("q", 1, 2), again))

    def test_unreadable_files(self, jsonl: Writer, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot read the file: No such file"):
            read(tmp_path / "absent.jsonl")
        with pytest.raises(UserError, match="no questions"):
            read(jsonl("\n"))
        plain = tmp_path / "plain.jsonl.gz"
        plain.write_text("{}\n")
        with pytest.raises(UserError, match="cannot read the file: Not a gzipped file"):
            read(plain)
        whole = jsonl(*(asked(f"q{i}", i, 2) for i in range(99)), name="whole.jsonl.gz").read_bytes()
        cut = tmp_path / "cut.jsonl.gz"
        cut.write_bytes(whole[:-20])
        with pytest.raises(UserError, match="cannot read the file: Compressed file ended"):
            read(cut)


# Entropies .0, .500, .950, 1.609; the second answer of "d" is a tie with the first.
QUESTIONS = [
    asked("a", 1, 1, 1, 1, 1, gold=1, subject="easy"),
    asked("b", 2, 2, 2, 2, 3, gold=2, subject="easy"),
    asked("c", 4, 5, 4, 4, 6, gold=5, subject="hard"),
    asked("d", 7, 8, 9, 10, 11, gold=8, subject="hard"),
]


class TestProcess:
    def test_majority_gives_every_question_one_row(self, jsonl: Writer) -> None:
        rows, summary = process(jsonl(*QUESTIONS), method="majority")
        assert [(r["id"], r["completion"], r["sample_weight"]) for r in rows] == [
            ("a", "1", 1.0),
            ("b", "2", 1.0),
            ("c", "4", 1.0),
            ("d", "7", 1.0),
        ]
        assert [r["prompt"] for r in rows] == [f"what is {id}?" for id in "abcd"]
        assert [round(r["uncertainty"], 3) for r in rows] == [0, 0.5, 0.95, 1.609]
        assert summary.sample_accuracy == 0.5
        assert summary.dropped == Group(0, None, None, None, None, None)

    def test_filter_keeps_the_certain_half(self, jsonl: Writer) -> None:
        rows, summary = process(jsonl(*QUESTIONS), method="filter")
        assert [(r["id"], r["completion"], r["sample_weight"]) for r in rows] == [
            ("a", "1", 1.0),
            ("b", "2", 1.0),
        ]
        assert (summary.questions, summary.answers, summary.answers_per_question) == (4, 20, (5, 5))
        assert (summary.unparsed, summary.unlabeled, summary.uncertain, summary.samples) == (0, 0, 2, 2)
        assert summary.sample_accuracy == summary.kept.label_accuracy == 1
        assert summary.dropped.label_accuracy == 0
        assert summary.kept.answer_accuracy == pytest.approx(0.9)
        assert summary.dropped.answer_accuracy == pytest.approx(0.2)
        assert summary.kept.prompt_length == len("what is a?")
        assert summary.dropped.response_length == pytest.approx((5 * 1 + 3 * 1 + 2 * 2) / 10)
        assert summary.kept.entropy == pytest.approx(0.500 / 2, abs=0.0005)
        assert summary.subjects == {"easy": (2, 0), "hard": (0, 2)}
        assert [(round(x.low, 3), x.high == x.low, x.kept, x.group.questions) for x in summary.levels] == [
            (0, True, 1, 1),
            (0.5, True, 1, 1),
            (0.95, True, 0, 1),
            (1.609, True, 0, 1),
        ]
        assert [x.group.label_accuracy for x in summary.levels] == [1, 1, 0, 0]

    def test_reweight_gives_each_distinct_answer_its_weight(self, jsonl: Writer) -> None:
        rows, summary = process(jsonl(*QUESTIONS), method="reweight")
        assert [r["id"] for r in rows] == [
            "a",
            "b#1",
            "b#2",
            "c#1",
            "c#2",
            "c#3",
            *(f"d#{k}" for k in range(1, 6)),
        ]
        assert [r["completion"] for r in rows] == ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11"]
        weights = [1, 0.953, 0.047, 0.787, 0.107, 0.107, *[0.2] * 5]
        assert [r["sample_weight"] for r in rows] == pytest.approx(weights, abs=0.0005)
        assert summary.sample_accuracy == pytest.approx((1 + 0.953 + 0.107 + 0.2) / 4, abs=0.0005)
        assert len({r["uncertainty"] for r in by_question(rows)["d"]}) == 1

    def test_rule_value_and_temperature_arrive(self, jsonl: Writer) -> None:
        path = jsonl(*QUESTIONS)
        assert [r["id"] for r in process(path, rule="quantile", value=0.99)[0]] == ["a", "b", "c"]
        assert [r["id"] for r in process(path, rule="absolute", value=0.4)[0]] == ["a"]
        rows, _ = process(path, method="reweight", temperature=1.0)
        assert by_question(rows)["b"][0]["sample_weight"] == pytest.approx(1 / (1 + math.exp(-0.6)))

    def test_the_text_of_the_first_such_answer_is_the_completion(self, jsonl: Writer) -> None:
        sampled = [
            {"value": 1, "text": "wrong", "source": "s0"},
            {"value": 2, "text": "first", "source": "s1"},
            {"value": 2.0, "text": "second", "source": "s2"},
        ]
        [row], _ = process(jsonl(asked("q", *sampled)), method="majority")
        assert (row["completion"], row["source"]) == ("first", "s1")

    def test_a_rewording_is_answered_in_its_own_words(self, jsonl: Writer) -> None:
        flat = [{"question_id": "q", "prompt": f"wording {v}", "value": v} for v in (1, 2, 2)]
        rows, _ = process(jsonl(*flat), method="reweight")
        assert [(r["prompt"], r["completion"]) for r in rows] == [("wording 1", "1"), ("wording 2", "2")]

    def test_unparsed_answers_are_a_class_that_is_never_trained_on(self, jsonl: Writer) -> None:
        path = jsonl(
            asked("q", 1, 1, 1, None, 2), asked("most", None, None, None, 1, 1), asked("all", None, None)
        )
        rows, summary = process(path, method="reweight")
        assert [(r["id"], r["completion"]) for r in rows] == [("q#1", "1"), ("q#2", "2")]
        assert [r["sample_weight"] for r in rows] == pytest.approx([0.787 / 0.894, 0.107 / 0.894], abs=0.001)
        assert rows[0]["uncertainty"] == pytest.approx(0.950, abs=0.0005)
        assert (summary.unparsed, summary.unlabeled, summary.uncertain) == (6, 2, 0)
        assert process(path, method="majority")[1].unlabeled == 2

    def test_drop_question_drops_it_before_the_median_is_taken(self, jsonl: Writer) -> None:
        path = jsonl(*QUESTIONS, asked("e", 1, 1, 1, 1, None), asked("f", 1, 1, 1, 1, None))
        rows, summary = process(path, unparsed="drop_question")
        assert [r["id"] for r in rows] == ["a", "b"]
        assert (summary.unlabeled, summary.uncertain) == (2, 2)
        assert len(process(path, unparsed="class")[0]) == 4

    def test_the_authors_arms_have_a_row_per_answer(self, jsonl: Writer) -> None:
        path = jsonl(asked("q", 1, 1, 1, None, 2))
        for method in ("filter", "majority"):
            rows, _ = process(path, method=method, every_answer=True)
            assert [(r["id"], r["completion"], r["sample_weight"]) for r in rows] == [
                ("q#1", "1", 1.0),
                ("q#2", "1", 1.0),
                ("q#3", "1", 1.0),
                ("q#4", "2", 1.0),
            ]
        rows, _ = process(path, method="reweight", every_answer=True)
        assert [r["sample_weight"] for r in rows] == pytest.approx([0.787, 0.787, 0.787, 0.107], abs=0.0005)

    def test_nothing_left_is_an_error(self, jsonl: Writer) -> None:
        with pytest.raises(
            UserError, match="no question is left: of 1, 0 have no usable majority and 1 are above"
        ):
            process(jsonl(asked("q", 1, 2)), rule="absolute", value=0.1)
        with pytest.raises(UserError, match="of 1, 1 have no usable majority and 0 are above"):
            process(jsonl(asked("q", None, None)), method="majority")

    def test_an_unknown_method_is_refused(self, jsonl: Writer) -> None:
        with pytest.raises(UserError, match='did you mean "reweight"'):
            process(jsonl(asked("q", 1, 2)), method="weight")  # type: ignore[arg-type]

    @given(
        st.lists(
            st.lists(st.sampled_from([1, 2, "x", None]), min_size=2, max_size=6), min_size=1, max_size=8
        ).filter(lambda questions: any(reliability.majority(list(map(normalize, q))) for q in questions))
    )
    def test_every_arm_counts_a_question_once(
        self, tmp_path_factory: pytest.TempPathFactory, answers: list[list[Any]]
    ) -> None:
        path = tmp_path_factory.mktemp("arms") / "answers.jsonl"
        path.write_text("".join(json.dumps(asked(f"q{i}", *a)) + "\n" for i, a in enumerate(answers)))
        arms = {m: by_question(process(path, method=m)[0]) for m in ("majority", "filter", "reweight")}
        for arm in arms.values():
            for rows in arm.values():
                assert sum(row["sample_weight"] for row in rows) == pytest.approx(1)
        assert arms["majority"].keys() == arms["reweight"].keys() >= arms["filter"].keys()


class TestWrite:
    def test_what_is_written_trains(self, jsonl: Writer, tmp_path: Path) -> None:
        chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1?"}]
        lone = [{"role": "user", "content": "2 + 2 = …?"}]
        path = jsonl(
            {"id": "chat", "messages": chat, "answers": [2, 2, 3]},
            {"id": "lone", "messages": lone, "answers": [4, 4, 4], "source": "sums"},
        )
        rows, _ = process(path, method="reweight")
        write(rows, tmp_path / "out.jsonl")
        samples = load(str(tmp_path / "out.jsonl"))
        assert [s.id for s in samples] == ["chat#1", "chat#2", "lone"]
        assert [s.response for s in samples] == ["2", "3", "4"]
        assert [(m.role, m.content) for m in samples[0].prompt] == [tuple(m.values()) for m in chat]
        assert [m.content for m in samples[2].prompt] == ["2 + 2 = …?"]
        assert [s.sample_weight for s in samples] == [r["sample_weight"] for r in rows]
        assert [s.uncertainty for s in samples] == [r["uncertainty"] for r in rows]
        assert [s.source for s in samples] == ["", "", "sums"]
        assert "…" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")

    def test_a_lone_surrogate_survives(self, tmp_path: Path) -> None:
        write([{"prompt": "\ud800 …"}], tmp_path / "out.jsonl")
        assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == {"prompt": "\ud800 …"}

    def test_who_reads_the_old_file_reads_it_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "out.jsonl"
        write([{"id": "old"}], path)
        with path.open() as reader:
            write([{"id": "new"}], path)
            assert reader.read() == '{"id": "old"}\n'
        assert path.read_text() == '{"id": "new"}\n'

    def test_a_missing_folder_is_made(self, tmp_path: Path) -> None:
        write([{"id": "q"}], tmp_path / "absent" / "out.jsonl")
        assert (tmp_path / "absent" / "out.jsonl").read_text() == '{"id": "q"}\n'

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(UserError, match=r"file: cannot write the samples"):
            write([{"id": "q"}], tmp_path / "file" / "out.jsonl")

    def test_a_full_disk_leaves_the_old_file_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "out.jsonl"
        write([{"id": "old"}], path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(UserError, match="cannot write the samples"):
                write(({"id": "x" * 100} for _ in range(1000)), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_text() == '{"id": "old"}\n'
        assert list(tmp_path.iterdir()) == [path]

    def test_an_interruption_leaves_the_old_file_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "out.jsonl"
        write([{"id": "old"}], path)

        def interrupted() -> Any:
            yield {"id": "new"}
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write(interrupted(), path)
        assert path.read_text() == '{"id": "old"}\n'
        assert list(tmp_path.iterdir()) == [path]


PUBLISHED_LEVELS = [0, 0.500, 0.673, 0.950, 1.055, 1.332, 1.609]


@pytest.fixture(scope="session")
def gsm8k_answers(shared: Path) -> Path:
    return shared / "data" / "gsm8k_answers" / "gsm8k_test_samples.jsonl.gz"


def five_sources(answers: Path, which: slice, folder: Path) -> Path:
    """Write the questions with the answers of five sources only, chosen by their rank in accuracy."""
    with gzip.open(answers, "rt", encoding="utf-8") as file:
        questions = [json.loads(line) for line in file]
    right: dict[str, list[bool]] = defaultdict(list)
    for question in questions:
        for sample in question["samples"]:
            right[sample["source"]].append(sample["correct"])
    ranked = sorted(right, key=lambda source: sum(right[source]) / len(right[source]))[which]
    assert len(ranked) == 5
    path = folder / "five.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for question in questions:
            first = {sample["source"]: sample for sample in reversed(question["samples"])}
            chosen = [first[source] for source in ranked if source in first]
            if len(chosen) == 5:
                file.write(json.dumps(question | {"samples": chosen}) + "\n")
    return path


class TestGsm8k:
    """The published curve: accuracy falls with the entropy of the answers (arXiv 2406.19032)."""

    def test_values_agree_with_the_data_sets_own_verdicts(self, gsm8k_answers: Path) -> None:
        with gzip.open(gsm8k_answers, "rt", encoding="utf-8") as file:
            golds = [normalize(json.loads(line)["gold"]) for line in file]
        questions = read(gsm8k_answers)
        assert len(questions) == len(golds) == 1319
        candidates = [(c, gold) for q, gold in zip(questions, golds, strict=True) for c in q.candidates]
        assert len(candidates) == 23781
        assert all(c.correct == (c.answer.value == gold) for c, gold in candidates)

    def test_accuracy_falls_over_the_seven_levels_of_five_weak_answers(
        self, gsm8k_answers: Path, tmp_path: Path
    ) -> None:
        _, summary = process(five_sources(gsm8k_answers, slice(5), tmp_path), method="majority")
        assert [level.low for level in summary.levels] == pytest.approx(PUBLISHED_LEVELS, abs=0.0005)
        assert all(level.low == level.high for level in summary.levels)
        curve = [level.group.answer_accuracy or 0.0 for level in summary.levels]
        assert all(high > low for high, low in pairwise(curve)), curve

    @pytest.mark.parametrize("weaker", [4, 9])
    def test_with_stronger_sources_no_rise_exceeds_the_sampling_error(
        self, gsm8k_answers: Path, weaker: int, tmp_path: Path
    ) -> None:
        # 3-2 and 3-1-1 can both have at most three right answers of five, so their order is not certain
        five = five_sources(gsm8k_answers, slice(weaker, weaker + 5), tmp_path)
        _, summary = process(five, method="majority")
        curve = [(level.group.answer_accuracy or 0.0, level.group.questions) for level in summary.levels]
        assert len(curve) == 7
        for (p, n), (q, m) in pairwise(curve):
            assert q < p + 2 * math.sqrt(p * (1 - p) / n + q * (1 - q) / m), curve
        assert curve[0][0] > curve[3][0] > curve[6][0]

    def test_accuracy_falls_over_the_levels_of_all_answers(self, gsm8k_answers: Path) -> None:
        _, summary = process(gsm8k_answers, method="majority")
        assert len(summary.levels) == 10
        assert min(level.group.questions for level in summary.levels) >= 50
        assert sum(level.group.questions for level in summary.levels) == 1319
        curve = [level.group.answer_accuracy or 0.0 for level in summary.levels]
        assert all(high > low for high, low in pairwise(curve)), curve

    @pytest.mark.parametrize("unparsed", ["class", "drop_question"])
    def test_the_filter_raises_the_accuracy_of_the_labels(self, gsm8k_answers: Path, unparsed: Any) -> None:
        _, everything = process(gsm8k_answers, method="majority", unparsed=unparsed)
        rows, summary = process(gsm8k_answers, method="filter", unparsed=unparsed)
        kept, dropped = summary.kept, summary.dropped
        assert everything.sample_accuracy is not None
        assert kept.label_accuracy is not None
        assert dropped.label_accuracy is not None
        assert kept.label_accuracy > everything.sample_accuracy > dropped.label_accuracy
        assert summary.sample_accuracy == pytest.approx(kept.label_accuracy)
        assert len(rows) >= (1319 - summary.unlabeled) / 2
        assert summary.unlabeled == (0 if unparsed == "class" else 188)

    def test_a_stricter_threshold_keeps_fewer_and_better_labels(self, gsm8k_answers: Path) -> None:
        kept = [process(gsm8k_answers, rule="quantile", value=q)[1].kept for q in (0.25, 0.5, 1.0)]
        assert all(a.questions < b.questions for a, b in pairwise(kept))
        assert all((a.label_accuracy or 0) > (b.label_accuracy or 1) for a, b in pairwise(kept))

    def test_what_the_filter_drops_is_harder_and_longer(self, gsm8k_answers: Path) -> None:
        _, summary = process(gsm8k_answers)
        kept, dropped = summary.kept, summary.dropped
        assert (kept.answer_accuracy or 0) > (dropped.answer_accuracy or 1)
        assert (kept.prompt_length or 0) < (dropped.prompt_length or 0)
        assert (kept.response_length or 0) < (dropped.response_length or 0)

    def test_reweighting_keeps_the_scale_of_the_loss(self, gsm8k_answers: Path) -> None:
        rows, summary = process(gsm8k_answers, method="reweight")
        per_question = Counter[str]()
        for id, group in by_question(rows).items():
            per_question[id] = sum(row["sample_weight"] for row in group)
        assert len(per_question) == summary.questions == 1319
        assert list(per_question.values()) == pytest.approx([1.0] * 1319)
