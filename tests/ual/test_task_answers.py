"""Answers to posed questions: probabilities against plain transformers in float64, and resuming."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ual.data import Renderer
from ual.data.tasks import Wording
from ual.evaluate import tasks
from ual.evaluate.tasks import Answered, Posed, choose, work_out
from ual.models import fuse

LETTERS = {"A": "red", "B": "green", "C": "blue"}
TEXTS = {"red one": "red", "red": "also red", "blue": "blue"}  # no token at which all differ


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    """In float64, so that padding and batches change nothing that a test could see."""
    return fuse(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64))


@pytest.fixture
def renderer(tiny: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(tiny), chat_template="plain", undecided="drop")


def posed(count: int, replies: dict[str, str] = LETTERS) -> list[Posed]:
    return [Posed(f"q{i}", Wording("Which? " + "x" * (7 * i % 20), replies)) for i in range(count)]


@torch.no_grad()
def plainly(tiny: Path, renderer: Renderer, question: Posed, replies: dict[str, str]) -> dict[str, float]:
    """Return the probability of each reply: of its first own token, or of all from there to the end."""
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    rendered = [renderer.render(question.sample(reply)) for reply in replies]
    ids = [torch.from_numpy(sample.input_ids).long() for sample in rendered if sample is not None]
    places = range(min(map(len, ids)))
    start = next(i for i in places if len({int(of[i]) for of in ids}) > 1)
    found = {}
    for reply, of in zip(replies, ids, strict=True):
        log_probs = plain(input_ids=of[None]).logits[0].log_softmax(-1)
        end = start + 1 if replies is LETTERS else len(of)
        found[reply] = math.exp(sum(float(log_probs[i - 1, of[i]]) for i in range(start, end)))
    return found


@pytest.mark.kills(
    "ual/evaluate/tasks.py", "last = [len(ids) - 1 for ids, *_ in batch]", "last = [longest - 1] * len(batch)"
)
@pytest.mark.kills("ual/evaluate/tasks.py", "float(scored.log_prob.sum())", "float(scored.log_prob.mean())")
@pytest.mark.parametrize("replies", [LETTERS, TEXTS], ids=["decided", "spelled"])
def test_probabilities_are_those_of_the_model(
    model: Any, renderer: Renderer, tiny: Path, replies: dict[str, str]
) -> None:
    questions = posed(5, replies)
    found = {a.key: a for batch in choose(model, renderer, questions, batch_size=3) for a in batch}
    for question in questions:
        p = plainly(tiny, renderer, question, replies)
        total = sum(p.values())
        answered = found[question.key]
        expected = {replies[reply]: value / total for reply, value in p.items()}
        assert answered.probabilities == pytest.approx(expected, rel=1e-9)
        if replies is LETTERS:  # the sums have what all replies share, before their first own token
            assert answered.mass == pytest.approx(total, rel=1e-9)
        assert answered.value == max(expected, key=expected.__getitem__)
        assert replies[answered.text] == answered.value


def test_a_model_that_computes_all_logits(
    model: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [*choose(model, renderer, posed(4))]
    monkeypatch.setattr(tasks, "_keeps_positions", lambda _: False)
    [[*answers]], [[*again]] = first, [*choose(model, renderer, posed(4))]
    for one, other in zip(answers, again, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-12)


def test_options_with_equal_texts_share_an_answer(model: Any, renderer: Renderer) -> None:
    twice = {"A": "red", "B": "green", "C": "red"}
    [[apart]], [[shared]] = (
        [*choose(model, renderer, [Posed("q", Wording("Which?", replies))])] for replies in (LETTERS, twice)
    )
    p = apart.probabilities
    assert shared.probabilities == pytest.approx({"red": p["red"] + p["blue"], "green": p["green"]})


@pytest.mark.kills(
    "ual/evaluate/tasks.py",
    "if any(question.key not in known for *_, question in batch):",
    "if True:",
)
@pytest.mark.parametrize("replies", [LETTERS, TEXTS], ids=["decided", "spelled"])
def test_known_batches_are_skipped_and_others_keep_their_bits(
    model: Any, renderer: Renderer, replies: dict[str, str]
) -> None:
    questions, steps = posed(10, replies), []
    every = [*choose(model, renderer, questions, batch_size=4)]
    assert [len(batch) for batch in every] == [4, 4, 2]
    known = {a.key for a in every[0]} | {every[1][0].key}
    rest = [*choose(model, renderer, questions, batch_size=4, known=known, advance=steps.append)]
    assert rest == every[1:]
    assert steps == [4, 4, 2]


def test_the_mode_of_the_model_is_restored(model: Any, renderer: Renderer) -> None:
    model.train()
    next(answers := choose(model, renderer, posed(2)))
    answers.close()
    assert model.training
    model.eval()


@pytest.mark.kills("ual/evaluate/tasks.py", "*(draws[i] if draws", "*(draws[0] if draws")
def test_worked_answers(model: Any, renderer: Renderer) -> None:
    questions = [Posed(f"q{i}", Wording("What is " + "1 + " * i + "1?", {})) for i in range(3)]

    def answers(**options: Any) -> dict[str, Answered]:
        made = work_out(
            model, renderer, questions, read=lambda text: text[:2], max_tokens=6, batch_size=2, **options
        )
        return {a.key: a for batch in made for a in batch}

    greedy = answers()
    assert [*greedy] == ["q0", "q1", "q2"]
    assert all(a.value == a.text[:2] and not a.probabilities for a in greedy.values())
    drawn, again, other = (answers(draws=[(1.0, s), (0.0, s), (1.0, s + 2)]) for s in (0, 0, 7))
    assert {k: a.text for k, a in drawn.items()} == {k: a.text for k, a in again.items()}
    assert {k: a.text for k, a in drawn.items()} != {k: a.text for k, a in other.items()}
    assert drawn["q1"].text == greedy["q1"].text, "at temperature 0"
    assert drawn["q2"].text != greedy["q2"].text
    rest = answers(known={"q0", "q1"})
    assert {k: a.text for k, a in rest.items()} == {"q2": greedy["q2"].text}
