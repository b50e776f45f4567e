"""The floors hold, imports stay cold, and the public face is what it was."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def in_a_fresh_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# triton is not installed, as far as this process can tell; `asked` lists what was wanted of it
NO_TRITON = """
import sys
asked = []
class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            asked.append(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoTriton())
"""


def test_the_kernels_import_without_triton_or_training() -> None:
    in_a_fresh_process(
        NO_TRITON
        + """
import ual_kernels
assert not asked, asked
assert {"ual", "transformers", "peft", "deepspeed"}.isdisjoint(sys.modules)
try:
    import ual_kernels._triton.cross_entropy
except ModuleNotFoundError:
    sys.exit()
sys.exit("the hook lets triton through")
"""
    )


def test_the_losses_run_on_a_cpu_without_triton() -> None:
    in_a_fresh_process(
        NO_TRITON
        + """
import torch, ual_kernels
hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(7, 8)
target = torch.tensor([0, 1, -100, 6, 3])
for backend in ("auto", "torch", "reference"):
    ual_kernels.cross_entropy(hidden @ head.T, target, label_smoothing=0.1, backend=backend).backward()
    ual_kernels.linear_cross_entropy(hidden, head, target, label_smoothing=0.1, backend=backend).backward()
"""
    )


def test_a_missing_triton_is_named_and_nothing_runs_in_its_place() -> None:
    in_a_fresh_process(
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        + NO_TRITON
        + """
import torch, ual_kernels
try:
    ual_kernels.cross_entropy(torch.randn(5, 8), torch.arange(5), backend="triton")
except ual_kernels.UnsupportedError as error:
    assert "pip install triton" in str(error), error
    sys.exit()
sys.exit("not refused")
"""
    )


PURE = [
    "ual",
    "ual.config.run",
    "ual.records",
    "ual.errors",
    "ual.files",
    "ual.methods.smoothing",
    "ual.methods.reliability",
    "ual.data",
    "ual.config.elicit",
    "ual.pipelines.elicit",
    "ual.pipelines.judge",
    "ual.uncertainty.backends.endpoint",
]


@pytest.mark.parametrize("module", PURE)
def test_imports_without_torch(module: str) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    heavy = {"torch", "transformers", "peft", "deepspeed", "triton", "matplotlib", "datasets"}
    assert heavy.isdisjoint(in_a_fresh_process(program).split())


def test_the_public_face() -> None:
    """A name more or less is a new version and a line in the changelog."""
    import ual_kernels

    assert ual_kernels.__all__ == [
        "IGNORE_INDEX",
        "Backend",
        "CrossEntropyOptions",
        "LinearCrossEntropyOptions",
        "SparseTarget",
        "TokenStatistics",
        "UnsupportedError",
        "cross_entropy",
        "cross_entropy_with_statistics",
        "linear_cross_entropy",
        "linear_cross_entropy_with_statistics",
    ]
    assert all(hasattr(ual_kernels, name) for name in ual_kernels.__all__)
    assert ual_kernels.TokenStatistics._fields == (
        "lse", "log_prob", "entropy", "top1_prob", "margin", "mean_logit", "correct", "predicted",
        "dropped_mass",
    )  # fmt: skip


def test_the_floors() -> None:
    """Who may import whom, as pyproject.toml draws it."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_is_drawn_in_its_package() -> None:
    """DESIGN.md's drawing of the floors names every module, in its package."""
    drawing = (ROOT / "DESIGN.md").read_text(encoding="utf-8").split("```")[1]
    lines = drawing.split("------")[0].splitlines()
    package, drawn = "", dict[str, set[str]]()
    for line in lines:
        if found := re.match(r"\d+ +(\w+)(/?) ", line):
            package = found[1]
        inner = re.match(r" {17}(estimators|backends|quickstart)/ ", line)
        names = re.findall(r"(?<![\w>-])[a-z_0-9]+(?![\w/-])", line[17:])
        drawn.setdefault(package, set()).update(names if not inner else [*names, inner[1]])
    for module in (ROOT / "ual").rglob("*.py"):
        relative = module.relative_to(ROOT / "ual")
        if relative.name.startswith("__"):
            continue
        place = relative.parts[0].removesuffix(".py")
        assert place in drawn, f"{place} is not drawn"
        assert len(relative.parts) == 1 or relative.stem in drawn[place], f"{relative} is not drawn"


@pytest.mark.parametrize("package", ["ual", "ual_kernels"])
def test_types_are_shipped(package: str) -> None:
    assert (Path(importlib.import_module(package).__file__ or "").parent / "py.typed").is_file()
