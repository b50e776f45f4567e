"""A server of another project: `transformers serve` with SmolLM2, on loopback."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ual.runs import ENVIRONMENT, ual, write_rows

ROWS = [
    {"id": "a", "prompt": "What is the capital of France?", "completion": "Paris."},
    {"id": "b", "prompt": "What is the capital of France?", "completion": "Rome."},
]


@pytest.fixture(scope="module")
def address(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, str(smollm2), "--device", "cpu"],
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        assert process.poll() is None, log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_elicit_from_a_real_server(address: str, smollm2: Path, tmp_path: Path) -> None:
    config = {
        "data": str(write_rows(tmp_path / "rows.jsonl", ROWS)),
        "backend": {
            "kind": "endpoint",
            "model": str(smollm2),
            "base_url": address,
            "omit": ["logprobs", "top_logprobs", "response_format"],  # this server refuses them
            "concurrency": 2,
            "timeout": 120,
        },
        "estimators": [
            {"name": "self_consistency", "samples": 3, "answer": "text", "max_tokens": 8},
            {"name": "verbalised", "max_tokens": 4},
        ],
        "max_failed": 1,  # a model of 260 thousand parameters ends no answer within 8 tokens
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    done = ual("elicit", path, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["requests"] == {
        "cached": 0, "answered": 5, "failed": 0, "in_a_row": 0, "errors": {}, "sent": 5,
    }  # fmt: skip
    assert summary["prompt_tokens"] > 100
    records = [json.loads(line) for line in (tmp_path / "run" / "elicited.jsonl").read_text().splitlines()]
    same_prompt = [record["estimates"]["self_consistency"] for record in records]
    assert same_prompt[0] == same_prompt[1]  # one prompt, asked three times in all
    assert all(record["estimates"]["verbalised"]["reply"] for record in records)
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["uncertainty"] == same_prompt[0]["value"]
