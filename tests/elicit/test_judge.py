"""A judge of pairs of answers: a real server on loopback, both orders, kill -9, real weights."""

import asyncio
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.elicit.servers import BEHAVIORS, Asked, Send, Server, completion, response, serving
from tests.ual.runs import ENVIRONMENT, ROOT
from ual.config.judge import JudgeConfig
from ual.errors import FailedRequestsError, UserError
from ual.evaluate.preferences import Preferences, records
from ual.pipelines.judge import annotations, judge, verdict
from ual.pipelines.outputs import Pair, pairs, read_outputs

JUDGE, OUTPUTS = "ual/pipelines/judge.py", "ual/pipelines/outputs.py"


def shown(asked: Asked) -> tuple[str, str]:
    """The two answers, in the order of the prompt."""
    prompt = asked.body["messages"][-1]["content"]
    first, second = (re.search(rf"<answer_{x}>\n(.*?)\n</answer_{x}>", prompt, re.DOTALL) for x in "AB")
    assert first
    assert second
    return first[1], second[1]


def longest(asked: Asked) -> str:
    first, second = map(len, shown(asked))
    return "A" if first > second else "B" if second > first else "C"


async def longer(asked: Asked, send: Send) -> None:
    await send(response(completion(f"**{longest(asked)}**")))


async def position(asked: Asked, send: Send) -> None:
    await send(response(completion("A")))


async def weighted(asked: Asked, send: Send) -> None:
    """Prefers the longer answer with 0.6, and a tie with 0.2; a twentieth of the mass is elsewhere."""
    best = longest(asked)
    mass = {best: 0.57, "B" if best == "A" else "A": 0.19, " C": 0.19, "The": 0.05}
    top = [{"token": text, "logprob": math.log(p)} for text, p in mass.items()]
    token = {"token": best, "logprob": math.log(0.57), "top_logprobs": top}
    message = {"role": "assistant", "content": best}
    choice = {"message": message, "finish_reason": "stop", "logprobs": {"content": [token]}}
    await send(response(completion() | {"choices": [choice]}))


async def beside(asked: Asked, send: Send) -> None:
    """Replies with a sentence; the second and third likeliest first tokens are letters."""
    best = longest(asked)
    other = "B" if best == "A" else "A"
    mass = {"The": 0.6} | ({best: 0.3, other: 0.1} if best != "C" else {"C": 0.4})
    top = [{"token": text, "logprob": math.log(p)} for text, p in mass.items()]
    tokens = [
        {"token": "The", "logprob": math.log(0.6), "top_logprobs": top},
        {"token": " first", "logprob": 0.0, "top_logprobs": [{"token": " first", "logprob": 0.0}]},
    ]
    choice = {"message": {"role": "assistant", "content": "The first"}, "finish_reason": "stop"}
    await send(response(completion() | {"choices": [choice | {"logprobs": {"content": tokens}}]}))


async def fails(asked: Asked, send: Send) -> None:
    """Refuses every fifth request, and answers the next one with a sentence."""
    if asked.number % 5 == 0:
        await send(response({"error": {"message": "no"}}, "400 Bad Request"))
    elif asked.number % 5 == 1 and asked.number > 1:
        await send(response(completion("A longer answer is not always better")))
    else:
        await longer(asked, send)


async def stalls(asked: Asked, send: Send) -> None:
    """Answers seven requests, then no more."""
    if asked.number > 7:
        await asyncio.sleep(30)
    await longer(asked, send)


async def chatty(asked: Asked, send: Send) -> None:
    await send(response(completion("Both have merits. It depends on the reader.")))


BEHAVIORS |= {f.__name__: f for f in (longer, position, weighted, beside, fails, stalls, chatty)}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture
def answers(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve instructions. The model's answers are longer for eight, as long for one, shorter for three."""
    return tuple(
        outputs(tmp_path / f"{name}.json", name, lengths)
        for name, lengths in (("ours", [9] * 8 + [5, 1, 1, 1]), ("theirs", [5] * 12))
    )  # type: ignore[return-value]


def outputs(path: Path, generator: str, lengths: list[int]) -> Path:
    made = [
        {"dataset": "d", "instruction": f"Do {i}.", "output": generator[0] * n, "generator": generator}
        for i, n in enumerate(lengths)
    ]
    path.write_text(json.dumps(made))
    return path


def config(url: str, **more: Any) -> JudgeConfig:
    backend = {"model": "m", "base_url": url, "timeout": 60, **more.pop("backend", {})}
    return JudgeConfig.model_validate({"backend": {"kind": "endpoint", **backend}, **more})


def compare(answers: tuple[Path, Path], how: JudgeConfig, **more: Any) -> dict[str, Any]:
    return judge(*answers, how, answers[0].parent / "judged", environment={}, **more)


def written(answers: tuple[Path, Path], name: str) -> Any:
    text = (answers[0].parent / "judged" / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


# ---- judges ----


@pytest.mark.kills(JUDGE, 'record.value if order == "first" else 1 - record.value', "record.value")
@pytest.mark.kills(
    JUDGE, '("second", (pair.reference, pair.model)),', '("second", (pair.model, pair.reference)),'
)
def test_a_judge_of_lengths(answers: tuple[Path, Path], server: Server) -> None:
    found = compare(answers, config(server.url("longer")))
    assert (found["wins"], found["ties"], found["losses"], found["missing"]) == (8, 1, 3, 0)
    assert found["win_rate"]["value"] == pytest.approx(8.5 / 12)
    assert found["first_wins"]["value"] == 0.5
    assert (found["consistent"], found["longer_wins"]["value"]) == (1.0, 1.0)
    assert found["model_longer"] == {"instructions": 8, "win_rate": {"value": 1.0, "low": 1.0, "high": 1.0}}
    assert (found["model_length"], found["reference_length"]) == (pytest.approx(80 / 12), 5.0)
    assert found["read"] == {"text": 24}
    assert found == written(answers, "summary.json")
    orders = [shown(asked)[0][0] for asked in server.asked]
    assert sorted(orders) == ["o"] * 12 + ["t"] * 12


@pytest.mark.kills(
    JUDGE, '"preference": None if math.isnan(share) else 1 + share,', '"preference": 1 + share,'
)
def test_annotations_are_alpaca_eval_s(answers: tuple[Path, Path], server: Server) -> None:
    compare(answers, config(server.url("longer")))
    found = written(answers, "annotations.json")
    assert found[0] == {
        "instruction": "Do 0.", "output_1": "ttttt", "generator_1": "theirs", "dataset": "d",
        "output_2": "ooooooooo", "generator_2": "ours", "annotator": "ual_pairwise_v1/m", "preference": 2.0,
    }  # fmt: skip
    assert [one["preference"] for one in found] == [2] * 8 + [1.5, 1, 1, 1]
    pair = Pair("Do.", None, "ours", "theirs")
    [undecided] = annotations([pair], Preferences.of([math.nan], [1], [4], [6]), "ours", "theirs", "m")
    assert undecided["preference"] is None
    [record] = records(found).values()
    assert (record.wins, record.ties, record.losses) == (8, 1, 3)


def test_a_judge_of_positions(answers: tuple[Path, Path], server: Server) -> None:
    """Its preference for a place does not become a preference for a model."""
    found = compare(answers, config(server.url("position")))
    assert (found["win_rate"]["value"], found["ties"]) == (0.5, 12)
    assert (found["first_wins"]["value"], found["consistent"]) == (1.0, 0.0)


@pytest.mark.kills(JUDGE, "        if by_token is not None:", "        if False:")
@pytest.mark.kills(JUDGE, "sum(_SHARES[letter] * p for", "sum(p for")
def test_probabilities_of_the_first_token(answers: tuple[Path, Path], server: Server) -> None:
    found = compare(answers, config(server.url("weighted")))
    assert found["read"] == {"probability": 24}
    first = written(answers, "judgments.jsonl")[0]
    assert first["first_better"] == pytest.approx(0.6 + 0.2 / 2)
    assert (first["verdict"], first["mass"], first["model_shown"]) == ("A", pytest.approx(0.95), "first")
    assert found["win_rate"]["value"] == pytest.approx((8 * 0.7 + 0.5 + 3 * 0.3) / 12)
    assert server.asked[0].body["top_logprobs"] == 5


@pytest.mark.kills(JUDGE, "if not tokens or not (whatever or", "if not tokens or not (False or")
def test_first_tokens_of_other_replies(answers: tuple[Path, Path], server: Server) -> None:
    """ "The" is the likeliest first token, and the letters have the rest; other servers give no tokens."""
    found = compare(answers, config(server.url("beside"), read="first_token"))
    assert found["read"] == {"probability": 24}
    assert found["win_rate"]["value"] == pytest.approx((8 * 0.75 + 0.5 + 3 * 0.25) / 12)
    assert written(answers, "judgments.jsonl")[0]["verdict"] is None
    with pytest.raises(FailedRequestsError, match="first 20 replies has a verdict: no log-probabilities"):
        compare(answers, config(server.url("longer"), read="first_token"))


def test_texts_only(answers: tuple[Path, Path], server: Server) -> None:
    for how in ({"top_logprobs": 0}, {"backend": {"omit": ["logprobs", "top_logprobs"]}}):
        server.asked.clear()
        found = compare(answers, config(server.url("longer"), **how))
        assert all("top_logprobs" not in asked.body for asked in server.asked)
        assert found["read"] == {"text": 24}


# ---- what fails ----


@pytest.mark.kills(
    JUDGE, '            self.missing[str(record.evidence.get("unparsed"))] += 1', "            pass"
)
def test_replies_without_a_verdict_are_counted(answers: tuple[Path, Path], server: Server) -> None:
    """Four requests are refused, four replies are sentences; the second run sends only the refused ones."""
    how = config(server.url("fails"), max_failed=0.5, backend={"concurrency": 1})
    found = compare(answers, how)
    assert found["missing_because"] == {"request failed": 4, "no verdict, or several": 4}
    assert found["missing"] == 8
    assert found["decided"] < 12
    nulls = [one["preference"] for one in written(answers, "annotations.json")].count(None)
    assert nulls == 12 - found["decided"]
    assert found["lowest"] < found["win_rate"]["value"] < found["highest"]
    sentences = [one for one in written(answers, "judgments.jsonl") if "not always" in one.get("reply", "")]
    assert [one["first_better"] for one in sentences] == [None] * 4
    server.asked.clear()
    assert compare(answers, config(server.url("fails"), backend={"concurrency": 1}, max_failed=0.5))
    assert len(server.asked) == 4


@pytest.mark.kills(JUDGE, "    if failed > max_failed * total:", "    if False:")
def test_too_many_failures_are_an_error_after_the_files_are_written(
    answers: tuple[Path, Path], server: Server
) -> None:
    with pytest.raises(
        FailedRequestsError, match=r"4 of 24 verdicts are missing because requests failed; max"
    ):
        compare(answers, config(server.url("fails"), backend={"concurrency": 1}))
    assert len(written(answers, "annotations.json")) == 12


def test_a_judge_that_gives_no_verdict_stops_early(answers: tuple[Path, Path], server: Server) -> None:
    with pytest.raises(FailedRequestsError, match="none of the first 20 replies has a verdict: no verdict"):
        compare(answers, config(server.url("chatty"), backend={"concurrency": 1}))
    assert len(server.asked) <= 24
    small = answers[0].parent / "small"
    small.mkdir()
    few = tuple(outputs(small / path.name, path.stem, [3, 4]) for path in answers)
    with pytest.raises(FailedRequestsError, match="no instruction has a verdict in both orders"):
        judge(*few, config(server.url("chatty")), small / "judged", environment={})


def test_the_budget(answers: tuple[Path, Path], server: Server) -> None:
    with pytest.raises(UserError, match=r"the budget is reached after \d+ of 24 comparisons: 5 requests"):
        compare(answers, config(server.url("longer"), budget={"requests": 5}))
    assert len(server.asked) == 5
    found = compare(answers, config(server.url("longer"), budget={"requests": 24}))
    assert len(server.asked) == 24
    assert found["requests"]["cached"] == 5


# ---- resuming ----

_PROGRAM = """
import sys
from pathlib import Path
from ual.config.judge import JudgeConfig
from ual.pipelines.judge import judge
config = JudgeConfig.model_validate_json(sys.argv[4])
judge(Path(sys.argv[1]), Path(sys.argv[2]), config, Path(sys.argv[3]), environment={})
"""


def test_a_killed_run_pays_no_reply_again(answers: tuple[Path, Path], server: Server) -> None:
    how = config(server.url("stalls"), backend={"concurrency": 1})
    folder = answers[0].parent / "judged"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *map(str, answers), str(folder), how.model_dump_json()],
        env=ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(server.asked) < 8 and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match=f"process {process.pid} on host"):
        compare(answers, how)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert {path.name for path in folder.iterdir()}.isdisjoint({"annotations.json", "summary.json"})
    before = len(server.asked)
    assert before == 8  # seven answered, one in flight
    with pytest.raises(FailedRequestsError, match="17 of 24 verdicts are missing"):
        compare(answers, how, replay=True)
    assert len(server.asked) == before
    # the same identity, and a server that answers: its counter begins anew
    BEHAVIORS["stalls"] = longer
    try:
        notices: list[str] = []
        found = compare(answers, how, notice=notices.append)
    finally:
        BEHAVIORS["stalls"] = stalls
    assert len(server.asked) == before + 17
    assert (found["requests"]["cached"], found["wins"]) == (7, 8)


def test_progress_and_limit(answers: tuple[Path, Path], server: Server) -> None:
    seen: list[tuple[int, int]] = []
    found = compare(
        answers, config(server.url("longer")), limit=3, progress=lambda *now: seen.append(now[:2])
    )
    assert seen == [(i, 6) for i in range(1, 7)]
    assert (found["limit"], found["instructions"], len(server.asked)) == (3, 3, 6)


# ---- files of answers ----


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r[:-1], "ours.json: there is no answer to 1 instructions: 'Do 11.'"),
        (lambda r: [*r, r[0] | {"instruction": "More?"}], "theirs.json: there is no answer to .*'More\\?'"),
        (lambda r: [*r, r[4]], "1 instructions: 'Do 4.' more than once\nkeep one answer to each"),
        (lambda r: [r[0] | {"generator": "x"}, *r[1:]], "several generators: ours, x"),
        (lambda r: [{"instruction": "Do"}, *r[1:]], "object 1: expected an object with a text `output`, got"),
        (lambda r: ["text"], "object 1: expected an object with a text `instruction`"),
        (lambda r: [], "expected a JSON list of one object or more, got list"),
        (lambda r: {"a": 1}, "expected a JSON list of one object or more, got dict"),
    ],
)
def test_files_that_do_not_match(answers: tuple[Path, Path], change: Any, said: str) -> None:
    answers[0].write_text(json.dumps(change(json.loads(answers[0].read_text()))))
    with pytest.raises(UserError, match=said):
        pairs(*answers)


def test_unreadable_files_and_limits(answers: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the answers: .*No such file"):
        read_outputs(tmp_path / "none.json")
    with pytest.raises(UserError, match="limit must be at least 1, got 0"):
        pairs(*answers, limit=0)
    names, found = pairs(answers[0], answers[1], limit=2)
    assert (names, [one.instruction for one in found]) == (("ours", "theirs"), ["Do 0.", "Do 1."])


def test_the_published_answers(shared: Path) -> None:
    path = shared / "data" / "alpaca_eval" / "text_davinci_003.json"
    names, found = pairs(path, path)
    assert names == ("text_davinci_003",) * 2
    assert len(found) == 805
    assert {one.dataset for one in found} == {"helpful_base", "koala", "oasst", "selfinstruct", "vicuna"}


def test_a_local_judge(stories: Path, answers: tuple[Path, Path]) -> None:
    """A model that cannot judge: nothing is made up from its replies."""
    how = JudgeConfig.model_validate(
        {
            "backend": {"kind": "local", "model": {"path": str(stories)}, "chat_template": "plain"},
            "max_tokens": 4,
        }
    )
    with pytest.raises(FailedRequestsError, match="has a verdict"):
        compare(answers, how)


@pytest.mark.slow
def test_a_local_judge_of_real_weights(smollm2: Path, answers: tuple[Path, Path]) -> None:
    """It replies with a sentence, and its first token tells what it would choose among the letters."""
    backend = {"kind": "local", "model": {"path": str(smollm2), "dtype": "float32"}, "batch_size": 2}
    how = JudgeConfig.model_validate(
        {"backend": backend, "read": "first_token", "top_logprobs": 20, "max_tokens": 1}
    )
    found = compare(answers, how, limit=1)
    assert found["read"] == {"probability": 2}
    assert found["annotator"] == f"ual_pairwise_v1/{smollm2.name}"
    assert all(0 < one["mass"] <= 1 for one in written(answers, "judgments.jsonl"))


@pytest.mark.parametrize(
    "wrong", [{"top_logprobs": 0}, {"backend": {"omit": ["logprobs"]}}], ids=["none", "omitted"]
)
def test_first_tokens_need_log_probabilities(
    answers: tuple[Path, Path], server: Server, wrong: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="read: first_token needs log-probabilities"):
        compare(answers, config(server.url("weighted"), read="first_token", **wrong))
    assert server.asked == []


# ---- verdicts ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"), (" b.", "B"), ("C", "C"), ("(B)", "B"), ("**A**", "A"), ("`B`", "B"), ("[[C]]", "C"),
        ("Answer: A", "A"), ("Answer B", "B"), ("answer A is better.", "A"), ("B is the better answer", "B"),
        ("The better answer is B.", "B"), ("My final verdict is: [[A]]", "A"), ("Final answer: **C**", "C"),
        ("A\n\nAnswer B has mistakes.", "A"), ("B is wrong about the year.\n\nFinal verdict: A", "A"),
        ("It's a tie.", "C"), ("Tie", "C"), ("Both answers are equally good", "C"), ("equally good", "C"),
        ("\uff21", "A"), ("A longer answer is not better", None), ("A or B", None), ("", None),
        ("A\nB", None), ("[[A]] or [[B]]", None), ("Answer A is not better", None), ("D", None),
        ("The answer is a matter of taste", None), ("a matter of taste", None), ("Neither", None),
        ("I cannot say. Both are fine.", None), ("A is better, but B is shorter", None), ("AB", None),
    ],
)  # fmt: skip
def test_a_verdict(text: str, expected: str | None) -> None:
    assert verdict(text) == expected


@pytest.mark.kills(JUDGE, "    if truncated:\n", "    if False:\n")
def test_a_reply_that_was_cut_off() -> None:
    assert verdict("A", truncated=True) is None  # perhaps "A better answer is B"
    assert verdict("A\nBecause", truncated=True) == "A"
