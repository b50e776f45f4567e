"""Stop a real run of two processes again and again, and see that it ends where the uninterrupted one does.

    python -m tests.faults.kills FOLDER --kills 20 --seed 1

One process of two gets SIGKILL at a random moment, in turn while it trains and while a checkpoint is being
written; then the run is started again with `--resume auto`. The log is printed to stdout.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from tests.ual.runs import ENVIRONMENT, ROOT, configure, free_port, gsm8k
from ual.train import checkpoint

SECONDS = 180
"""Within which every launch must have ended, however it ends."""
BIN = Path(sys.executable).parent


def launcher(name: str) -> list[str]:
    """The words before the configuration's name that start two processes."""
    port = str(free_port())
    return {
        "torchrun": [f"{BIN}/torchrun", "--nproc_per_node", "2", "--master_port", port, "-m", "ual", "train"],
        "deepspeed": [
            f"{BIN}/deepspeed", "--num_gpus", "2", "--master_port", port, "--module", "ual", "train",
        ],
        "accelerate": [
            f"{BIN}/accelerate", "launch", "--use_deepspeed", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port,
            "-m", "ual", "train",
        ],
        "ual": [sys.executable, "-m", "ual", "train"],
    }[name]  # fmt: skip


@dataclass
class Launch:
    """A started run and what it printed."""

    config: Path
    how: str
    words: Sequence[str] = ()
    process: "subprocess.Popen[bytes]" = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.config.with_name(f"{time.monotonic_ns()}.out")
        environment = ENVIRONMENT | {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [*launcher(self.how), str(self.config), *self.words],
                env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        self._deadline = time.monotonic() + SECONDS

    def until(self, happened: Callable[[], bool], pause: float = 0.02) -> bool:
        """Wait for it, with a look every `pause` seconds; False if the run ended before."""
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < self._deadline, self.printed()
            time.sleep(pause)
        return True

    def ranks(self) -> list[psutil.Process]:
        """The training processes, in the order of their ranks."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                rank = child.environ().get("RANK")
                if rank is not None and "ual" in child.cmdline():
                    found[int(rank)] = child
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return [found[rank] for rank in sorted(found)]

    def end(self) -> int:
        """Wait for the launcher and return its exit code."""
        try:
            return self.process.wait(max(1.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise

    def printed(self) -> str:
        return self.output.read_text(errors="replace")


def history_rows(config: Path) -> int:
    path = config.parent / "run" / "history.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def being_saved(config: Path) -> bool:
    return (config.parent / "run" / "checkpoints" / ".partial").exists()


def last_step(config: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    newest = checkpoint.newest_complete(config.parent / "run" / "checkpoints")
    return newest.step if newest else 0


def kill(config: Path, how: str, *, rank: int, moment: str, delay: float, after: int = 1) -> tuple[bool, int]:
    """Start or resume, kill one process `delay` seconds into a step or a save, `after` steps from here.

    Returns whether it was killed, and the launcher's exit code.
    """
    launch = Launch(config, how, ["--resume", "auto"])
    known = config.parent / "run" / "train.log"
    starts = known.read_text().count("starting from") if known.exists() else 0
    begun = launch.until(lambda: known.exists() and known.read_text().count("starting from") > starts)
    victim = launch.ranks()[rank] if begun else None
    wanted = history_rows(config) + after
    begun = begun and launch.until(lambda: history_rows(config) >= wanted, pause=0.005)
    if moment == "save":
        begun = begun and launch.until(lambda: being_saved(config), pause=0.001)
    if begun:
        time.sleep(delay)
    try:
        if begun and victim is not None:
            victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        begun = False
    return begun, launch.end()


def same_adapter(a: Path, b: Path) -> bool:
    first, second = (load_file(f.parent / "run" / "adapter" / "adapter_model.safetensors") for f in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def prepare(folder: Path, shared: Path, **training: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"max_steps": 40, "save_steps": 5, "per_device_train_batch_size": 2, "save_total_limit": 3}
    # short ones, none of which is dropped: they fill whole steps, so any number of processes takes the same
    rows = sorted(gsm8k(shared, 200), key=lambda row: len(row["question"]))[:44]
    return configure(
        folder, shared / "models" / "stories260K", rows, deepspeed="zero2", training=values | training
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    shared = ROOT.parent / "shared"
    steps = {"max_steps": 40 * options.kills, "save_steps": 10}
    whole, killed = (prepare(options.folder / name, shared, **steps) for name in ("whole", "killed"))
    assert Launch(whole, "torchrun").end() == 0
    print(f"uninterrupted: {steps['max_steps']} steps, seed {options.seed}", flush=True)
    done = 0
    while done < options.kills:
        rank, moment = draw.randrange(2), ("step", "save")[done % 2]
        delay = draw.uniform(0, 0.05 if moment == "step" else 0.03)
        after = draw.randint(1, 40)
        how = ("torchrun", "deepspeed")[draw.randrange(2)]
        hit, code = kill(killed, how, rank=rank, moment=moment, delay=delay, after=after)
        left = "a half checkpoint aside" if being_saved(killed) else "nothing aside"
        done += hit
        print(
            f"kill {done}: rank {rank}, {1e3 * delay:.0f} ms into a {moment}, {how} exit {code}; logged "
            f"{history_rows(killed)} steps, newest complete checkpoint {last_step(killed)}, {left}"
            if hit
            else f"ended before the kill, exit {code}",
            flush=True,
        )
        if not hit and code == 0:
            break
    finished = Launch(killed, "torchrun", ["--resume", "auto"])
    code = finished.end()
    same = code == 0 and same_adapter(whole, killed)
    metrics = json.loads((killed.parent / "run" / "metrics.json").read_text()) if code == 0 else {}
    print(f"{done} kills, then exit {code} at step {metrics.get('steps')}; final weights the same: {same}")
    if code:
        print(finished.printed()[-3000:])
    return 0 if same and done == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
