"""What the assemblers say of the kernels we ship; the command `ual_kernels.aot` says it of every plan."""

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
    "*/forward/weighted/bf16/1000",  # nothing divides by 16: no vector loads, other register counts
    "*/forward/all/fp32/1000",
    "*/plain/bf16/32000",  # the usual call
    "linear*/fused/*",
    "linear*/own_maximum/all/*",
    "linear*/own_maximum/again/*",
)


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh process, since the interpreter has replaced the compiler's own library here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
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
def test_nothing_spills(dtype: str, target: str) -> None:
    found = [r for r in reports() if r["target"] == target and f"/{dtype}/" in r["name"]]
    assert any("/forward/all/" in r["name"] for r in found)
    assert [r for r in found if r["spill_bytes"]] == []


def test_every_plan_of_the_gemm_fits_and_multiplies_on_tensor_cores() -> None:
    instructions = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    shared = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes a block may have
    found = [r for r in reports() if "/fused/" in r["name"]]
    assert len(found) == 8 * len(NVIDIA)
    for report in found:
        assert report["spill_bytes"] == 0, report
        assert report["tensor_core"].keys() == {instructions[report["target"]]}, report
        assert report["shared_bytes"] <= shared[report["target"]], report
        if report["name"].endswith("/frozen/bf16/128256"):
            assert report["stores"]["128"] == 16, report  # x leaves in whole vectors


def test_whole_blocks_move_in_128_bits() -> None:
    found = [r for r in reports() if r["target"] == "sm_90" and r["name"].endswith("bf16/32000")]
    kernels = {r["name"].split("/")[1] for r in found}
    assert kernels == {"forward", "backward", "scale_tokens"}
    for report in found:
        # 4096 columns over 256 threads: 32 bytes a thread, once each way
        assert report["loads"]["128"] >= 2, report
        if report["stores"].keys() != {"32"}:  # a forward that keeps its logits stores four numbers a row
            assert report["stores"]["128"] == 2, report
        # scalars only: labels, and what is known of a row
        assert sum(n for bits, n in report["loads"].items() if bits != "128") <= 8, report


def test_a_spill_is_seen_and_fails_the_command() -> None:
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
    assert "1 of 1 spill" in done.stderr
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
    assert "128:1" in row


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "TRITON_INTERPRET is set"),
        (["sm90"], "TARGET: wanted a name like sm_80, sm_90, sm_100, gfx942, got 'sm90'"),
    ],
)
def test_refuses(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        aot.main(arguments)
    assert said in capsys.readouterr().err


def test_refuses_a_pattern_that_matches_nothing() -> None:
    done = compiling("-m", "ual_kernels.aot", *only(["forward"]))
    assert done.returncode == 2
    assert (
        "--only: no name matches forward; names look like cross_entropy/forward/all/bf16/1000" in done.stderr
    )
