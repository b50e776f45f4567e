"""Publishing, by the hub's real client to an HTTP server that speaks as the hub does."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.ual.runs import ENVIRONMENT, ROOT

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


def published(folder: Path, hub: Any, home: Path) -> str:
    """In a process of its own, for the hub's client reads its address when it is imported.

    It publishes twice; once it has a commit, the server refuses.
    """
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = ENVIRONMENT | {
        "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "planted", "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
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
    assert said.startswith("UserError configuration, training.push_to_hub: the hub refused the upload")
    assert f"hf upload me/name {folder}" in said
