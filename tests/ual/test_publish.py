"""Publishing, by the hub's real client to an HTTP server that speaks as the hub does."""

import base64
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.faults.test_bad_input import ROWS
from tests.ual.runs import ENVIRONMENT, ROOT, configure, free_port
from ual.cli.main import app

PROGRAM = """
import sys
from pathlib import Path
from ual.errors import UserError
from ual.report.publish import publish
for _ in range(2):
    try:
        print(publish(Path(sys.argv[1]), "me/name", private=True))
    except UserError as error:
        print("UserError", error)
"""


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, wants every file inline, and keeps what is committed."""

    created: list[Any]
    files: dict[str, bytes]
    refuse: bool

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.partition("?")[0]
        if self.headers["Authorization"] != "Bearer planted" or self.server.refuse:  # type: ignore[attr-defined]
            return self._answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))  # type: ignore[attr-defined]
            return self._answer({"url": f"http://{self.headers['Host']}/me/name", "id": "me/name"})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            inline = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._answer({"files": inline})
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content  # type: ignore[attr-defined]
            self.server.refuse = True  # type: ignore[attr-defined]
            url = f"http://{self.headers['Host']}/me/name/commit/1"
            return self._answer({"commitUrl": url, "commitOid": "1", "success": True})
        return self._answer({"errors": [], "warnings": []})  # the card's YAML is valid

    def do_GET(self) -> None:
        self._answer({"id": "me/name", "sha": "0", "siblings": []})

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files, server.refuse = [], {}, False  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


def of_hub(address: str, home: Path) -> dict[str, str]:
    """The environment of a process that speaks to the server: the client reads it when it is imported."""
    return ENVIRONMENT | {
        "HF_ENDPOINT": f"http://{address}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "planted",
        "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }  # fmt: skip


def ual(address: str, folder: Path, *words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "ual", *map(str, words)], env=of_hub(address, folder / "home"),
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
    )  # fmt: skip


def published(folder: Path, hub: Any, home: Path) -> str:
    """Publish twice; once the server has a commit, it refuses."""
    environment = of_hub(f"127.0.0.1:{hub.server_address[1]}", home)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)],
        env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "planted" not in done.stdout
    return done.stdout


def test_the_folder_arrives_whole_or_the_user_is_told(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    content = {
        "README.md": b"---\ntags: [ual]\n---\n# card\n",
        "adapter_model.safetensors": bytes(range(256)),
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    published_at, *refused = published(folder, hub, tmp_path / "home").splitlines()
    assert published_at.endswith("/me/name")
    assert hub.files == content
    assert hub.created[0]["name"] == "name"
    created = hub.created[0]  # the word depends on the client's version
    assert created.get("private") is True or created.get("visibility") == "private"
    said = "\n".join(refused)
    assert said.startswith(f"UserError {folder}: the upload of me/name to the hub failed: ")
    assert f"ual publish {folder.parent}" in said


@pytest.mark.kills("ual/pipelines/train.py", "        return error\n", "        raise\n")
@pytest.mark.kills("ual/cli/train.py", "            raise result.unpublished", "            pass")
@pytest.mark.kills(
    "ual/report/publish.py", "except Exception as error:", "except (OSError, ValueError) as error:"
)
@pytest.mark.slow
def test_a_run_whose_upload_failed_is_complete_and_is_published_later(
    hub: Any, tmp_path: Path, tiny: Path
) -> None:
    """First nothing answers at the hub's address, then the hub refuses, then it accepts."""
    training = {"max_steps": 1, "push_to_hub": True, "hub_model_id": "me/name"}
    config = configure(tmp_path, tiny, ROWS, uncertainty="column", training=training)
    run = tmp_path / "run"
    failed = ual(f"127.0.0.1:{free_port()}", tmp_path, "train", config)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "upload of me/name to the hub failed" in failed.stderr
    assert f"ual publish {run}" in " ".join(failed.stderr.split())
    assert "report" in failed.stdout
    assert (run / "report.html").is_file()
    assert json.loads((run / "metrics.json").read_text())["status"] == "completed"

    address = f"127.0.0.1:{hub.server_address[1]}"
    hub.refuse = True
    refused = ual(address, tmp_path, "publish", run)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    hub.refuse = False
    done = ual(address, tmp_path, "publish", run, "--hub-model-id", "me/other", "--private")
    assert done.returncode == 0, done.stderr
    assert "published" in done.stdout
    assert hub.created[0]["name"] == "other"
    assert {"README.md", "adapter_model.safetensors", "chat_template.jinja"} <= set(hub.files)


@pytest.mark.kills("ual/pipelines/publish.py", 'if found.status != "completed" or', "if")
def test_a_run_that_is_not_finished_is_not_published(tmp_path: Path, tiny: Path) -> None:
    config = configure(tmp_path, tiny, ROWS, uncertainty="column")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "README.md").touch()
    shutil.copy(config, tmp_path / "run" / "config.yaml")
    (tmp_path / "run" / "metrics.json").write_text('{"status": "interrupted", "steps": 3}')
    result = CliRunner().invoke(app, ["publish", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "not finished (status: interrupted)" in " ".join(result.output.split())
    assert "config.yaml --resume" in " ".join(result.output.split())
