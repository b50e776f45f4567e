"""Two machines, as far as the network can tell: torchrun's rendezvous across two network namespaces."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ual.runs import ENVIRONMENT, ROOT, configure, gsm8k, history
from ual.config.run import load
from ual.pipelines.train import run
from ual.train import checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

SECONDS = 120
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two namespaces that only a cable connects."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("making network namespaces needs root and iproute2")
    names = [f"ual{os.getpid()}{side}" for side in "ab"]
    ends = [f"v{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
        for words in (
            ["ip", "link", "add", ends[0], "netns", names[0], "type", "veth",
             "peer", ends[1], "netns", names[1]],
            *(
                ["ip", "-n", name, *rest]
                for name, end, address in zip(names, ends, ADDRESSES, strict=True)
                for rest in (
                    ["addr", "add", f"{address}/24", "dev", end],
                    ["link", "set", end, "up"],
                    ["link", "set", "lo", "up"],
                )
            ),
        ):  # fmt: skip
            subprocess.run(words, check=True, capture_output=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_torchrun_meets_across_machines(machines: list[str], shared: Path, tmp_path: Path) -> None:
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 3}
    rows = gsm8k(shared, 20)
    config = configure(
        tmp_path, shared / "models" / "stories260K", rows, deepspeed="zero1", training=training
    )
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, str(Path(sys.executable).with_name("torchrun")), "--nnodes", "2",
             "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "ual",
             # names say nothing here, so who hosts the meeting, and where each one is, must be said
             "--rdzv_conf", f"is_host={int(side == 'a')}", "--local_addr", address,
             "--rdzv_endpoint", f"{ADDRESSES[0]}:29500", "-m", "ual", "train", str(config)],
            env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"v{os.getpid()}{side}", "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for name, side, address in zip(machines, "ab", ADDRESSES, strict=True)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("report   " in text for text in said) == 1, "one process of all prints"
    newest = checkpoint.newest_complete(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.world_size == 2

    values = yaml.safe_load(config.read_text()) | {"deepspeed": None, "output_dir": str(tmp_path / "alone")}
    values["training"]["per_device_train_batch_size"] = 4
    config.write_text(yaml.safe_dump(values))
    run(load(config))
    losses, alone = ([row["loss"] for row in history(tmp_path / name)] for name in ("run", "alone"))
    assert losses == pytest.approx(alone, rel=1e-4)
