"""Compare `fuse` with every model of transformers and every method of PEFT, and write docs/architectures.md.

python -m tests.architectures              everything; exits with 1 if a result is wrong or crashes
python -m tests.architectures llama LORA   these names and methods only: printed, nothing is written
"""

import argparse
import faulthandler
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator

from tests.architectures import page

SECONDS = 120
"""Most for one name, or for one method in all its places."""
MEMORY = 6 << 30
"""Most bytes of one process."""
TOGETHER = 80
"""Names in one process, which keeps the modules that it has imported."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.names)
        return 0
    started = time.monotonic()
    results = page.Results()
    for kind, name, found in run(jobs(arguments.names)):
        results.add(kind, name, found)
        for key, outcome, reason in found:
            if arguments.names or outcome in (page.WRONG, page.CRASHES):
                print(kind, name, key, outcome, reason, sep=" | ", flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{time.monotonic() - started:.0f} s, at most {peak} MiB in one process")
    if not arguments.names:
        page.write(results)
    return int(bool(results.failures()))


def jobs(names: list[str]) -> list[str]:
    return [f"{kind}:{name}" for kind, name in page.everything() if not names or name in names]


def run(waiting: list[str]) -> Iterator[tuple[str, str, list[list[str]]]]:
    """Yield (kind, name, results). A name whose process ends early, or takes too long, has crashed."""
    while waiting:
        group = waiting[:TOGETHER]
        command = [sys.executable, "-m", "tests.architectures", "--worker", *group]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            output, errors = process.communicate()
        done = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
        yield from done
        waiting = waiting[len(done) :]
        if len(done) < len(group):
            kind, name = waiting.pop(0).split(":")
            last = (errors.strip().splitlines() or [""])[-1]
            yield kind, name, [["", page.CRASHES, f"its process ended, or took {SECONDS} s: {last}"]]


def work(names: list[str]) -> None:
    """Print one line of JSON for each name."""
    from tests.architectures import adapters, cases, compare

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")  # other libraries warn of unusual configurations
    for job in names:
        kind, name = job.split(":")
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        if kind == page.ADAPTER:
            found = [(f"{c.place}, {c.order}", *adapters.check(c)) for c in adapters.all_cases([name])]
        else:
            class_name = (cases.CAUSAL_LM if kind == page.CAUSAL_LM else cases.IMAGE_TEXT)[name]
            found = [(class_name, *compare.check(name, class_name))]
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps([kind, name, found]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
