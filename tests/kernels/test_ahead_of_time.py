"""Machine code of a selection of kernels; the command `ual_kernels.aot` reports all launch configs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest

from ual_kernels import aot

NVIDIA = ("sm_80", "sm_90", "sm_100")
SELECTED = (
    "*/forward/all/*/32000",  # the most registers, in every dtype
    "*/forward/weighted/bf16/1000",  # not a multiple of 16: no vector loads, other register counts
    "*/forward/all/fp32/1000",
    "*/plain/bf16/32000",  # a typical call
    "*/forward/inplace/bf16/32000",
    "linear*/pointer/*/128256",
    "linear*/tma/*/128256",
    "linear*/tma/frozen/*/50257",
    "linear*/own_maximum/all/*",
    "linear*/own_maximum/again/*",
    "linear*/exponentials/all/*",
    "linear*/far/*",
)
# the folder of another Triton release, whose machine code differs; CI installs it
OTHER = os.environ.get("UAL_OTHER_TRITON", "")


def compiling(*arguments: str, release: str = "") -> subprocess.CompletedProcess[str]:
    """Run a new process, because the interpreter has replaced the compiler's library in this process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    if release:
        environment["PYTHONPATH"] = release
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


def only(patterns: Iterable[str]) -> list[str]:
    return [f"--only={pattern}" for pattern in patterns]


@cache
def reports() -> list[dict[str, Any]]:
    done = compiling("-m", "ual_kernels.aot", *NVIDIA, "--json", *only(SELECTED))
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.slow
def test_nothing_spills(dtype: str, target: str) -> None:
    found = [r for r in reports() if r["target"] == target and f"/{dtype}/" in r["name"]]
    assert any("/forward/all/" in r["name"] for r in found)
    assert [r for r in found if r["spill_bytes"]] == []


SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # available bytes per block
EXPONENTIALS = 2 * 132 + 16  # 128 per thread in each of the two epilogues of a flattened loop, and a few more


def assert_a_gemm_is_fast(report: dict[str, Any]) -> None:
    """Check properties of a GEMM's machine code that determine its speed."""
    instructions = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    assert report["spill_bytes"] == 0, report
    assert report["tensor_core"].keys() == {instructions[report["target"]]}, report
    assert report["shared_bytes"] <= SHARED[report["target"]], report
    assert report["serialized"] == 0, report  # a wait after each product costs a factor of two to three
    assert report["conversions"] == 0, report
    assert report["exponentials"] <= EXPONENTIALS, report
    writes = "/loss/" not in report["name"]
    if "/tma/" in report["name"]:
        assert report["loads"]["tma"] >= 2, report
        if "biased" not in report["name"]:  # the bias is loaded in vectors
            assert "128" not in report["loads"], report  # operands are loaded only by descriptors
        assert report["stores"].get("tma", 0) >= writes, report
    elif writes:
        assert "128" in report["stores"], report  # x is stored in complete vectors
        assert "16" not in report["stores"], report


@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "        # two halves, so that both epilogues use the same registers; the split moves no data\n",
    "        if tl.max((y >= column).to(tl.int32), axis=0) > 0:\n"
    "            here = y[:, None] == column + tl.arange(0, BLOCK_N)[None, :]\n"
    "            acc = tl.where(here, float('-inf'), acc)\n",
)
@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    "    stored, as_stored = _round_to_bfloat16(x)\n    return",
    "    stored = x.to(tl.bfloat16)\n    as_stored = stored.to(tl.float32)\n    return",
)
@pytest.mark.kills(
    "ual_kernels/_triton/linear_cross_entropy.py",
    '("sm_90", "tma"): GemmLaunchConfig(128, 256, 64, 32, 8, 4, flatten=True',
    '("sm_90", "tma"): GemmLaunchConfig(128, 256, 64, 32, 4, 4, flatten=True',
)
@pytest.mark.parametrize("label", ["frozen", "statistics", "loss", "biased", "lora", "lora-statistics"])
@pytest.mark.parametrize("variant", ["tma", "pointer"])
def test_the_machine_code_of_a_gemm(variant: str, label: str) -> None:
    found = [r for r in reports() if f"/{variant}/{label}/" in r["name"]]
    assert {r["target"] for r in found} == ({"sm_90", "sm_100"} if variant == "tma" else {*NVIDIA})
    for report in found:
        assert_a_gemm_is_fast(report)


@pytest.mark.skipif(not OTHER, reason="needs UAL_OTHER_TRITON, the folder of another Triton release")
@pytest.mark.slow
def test_the_machine_code_of_another_release() -> None:
    patterns = only(["linear*/tma/*/128256", "*/forward/inplace/bf16/32000"])
    done = compiling("-m", "ual_kernels.aot", "sm_90", "--json", *patterns, release=OTHER)
    assert done.returncode == 0, done.stderr
    version = compiling("-c", "import triton; print(triton.__version__)", release=OTHER).stdout.strip()
    import triton

    assert version != triton.__version__
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 7
    for report in found:
        if "/tma/" in report["name"]:
            assert_a_gemm_is_fast(report)
        else:
            assert (report["spill_bytes"], report["exchanges"]) == (0, 0), report


@pytest.mark.kills(
    "ual_kernels/_triton/cross_entropy.py",
    "            dx = _dlogits(x, k, log_sum, coefficient, q, scale, ACC, SOFTCAP, LOGIT_SCALE)\n"
    "            tl.store(out_ptr + start",
    "            dx = _dlogits(x, k, log_sum, coefficient, q, scale, ACC, SOFTCAP, LOGIT_SCALE)\n"
    "            tl.debug_barrier()\n            tl.store(out_ptr + start",
)
def test_each_thread_stores_only_what_it_has_loaded() -> None:
    """Loops that overwrite logits with the gradient do not exchange data between threads."""
    found = [r for r in reports() if "/forward/inplace/bf16/32000" in r["name"]]
    assert {r["target"] for r in found} == {*NVIDIA}
    for report in found:
        assert report["exchanges"] == 0, report


def test_whole_blocks_move_in_128_bits() -> None:
    found = [r for r in reports() if r["target"] == "sm_90" and r["name"].endswith("bf16/32000")]
    kernels = {r["name"].split("/")[1] for r in found}
    assert kernels == {"forward", "backward", "scale_tokens"}
    for report in found:
        # 16 columns per thread are 32 bytes
        assert report["loads"]["128"] >= 2, report
        if report["stores"].keys() != {"32"}:  # forward without INPLACE stores only four numbers per token
            assert report["stores"]["128"] >= 2, report
        # scalars: labels and other per-token inputs
        assert sum(n for bits, n in report["loads"].items() if bits != "128") <= 8, report


def test_a_spill_is_reported_and_fails_the_command() -> None:
    starved = """
import sys
from dataclasses import replace
from ual_kernels import aot

def starved():
    for s in everything():
        yield replace(s, options={**s.options, "maxnreg": 24})

everything, *_ = aot.SOURCES
aot.SOURCES = (starved,)
sys.exit(aot.main(["sm_90", "--json", "--only", "*/forward/all/bf16/32000"]))
"""
    done = compiling("-c", starved)
    assert done.returncode == 1
    assert "1 of 1 kernels spill registers" in done.stderr
    (report,) = map(json.loads, done.stdout.splitlines())
    assert report["registers"] == 24
    assert report["spill_bytes"] > 0


def test_the_table_of_an_amd_card() -> None:
    done = compiling("-m", "ual_kernels.aot", "gfx942", *only(["*/backward/plain/bf16/32000"]))
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    cells = dict(zip(header.split()[:6], row.split()[:6], strict=True))
    assert cells["target"] == "gfx942"
    assert cells["spill"] == "0"
    assert 0 < int(cells["regs"]) <= 128
    # loads and stores of blocks are 16 bytes wide; the access of 2 bytes is the target's
    assert "  128:4 16:1  " in row
    assert "  128:6 16:1  " in row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "TRITON_INTERPRET is set"),
        (["sm90"], "TARGET must be a name like sm_80, sm_90, sm_100, gfx942, got 'sm90'"),
    ],
)
def test_refuses(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        aot.main(arguments)
    assert said in capsys.readouterr().err


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    done = compiling("-m", "ual_kernels.aot", *only(["forward"]))
    assert done.returncode == 2
    said = "no kernel name matches --only forward; example of a name: cross_entropy/forward/all/bf16/1000"
    assert said in done.stderr
