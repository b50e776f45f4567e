"""Compile every kernel for a list of GPUs and report registers, spills and instructions.

    python -m ual_kernels.aot [sm_80 sm_90 sm_100 gfx942] [--only '*/forward/*/bf16/*'] [--json]

The report has one line per specialization and target. The exit status is 1 if registers spill. The command
needs no GPU and no CUDA toolkit; it uses the assemblers and disassemblers in the Triton wheel. It does not
measure time. The number of registers of a kernel depends on the Triton release.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
VOCABULARIES = (1_000, 32_000, 128_256, 151_936, 262_144)
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Specialization:
    """One kernel as the JIT compiles it for one kind of call."""

    name: str  # source/kernel/flags/dtype/V
    kernel: Any
    arguments: Mapping[str, Any]  # strings are types, "*bf16:16" is divisible by 16; others are constants
    options: Mapping[str, Any]
    targets: str = ""  # prefix of the names of its targets


@dataclass(frozen=True)
class Report:
    """Resources and instructions of the machine code of one specialization on one GPU."""

    name: str
    target: str
    warps: int
    registers: int  # per thread; on AMD vector registers
    spill_bytes: int  # per thread: stack and local memory; on AMD scratch, and 4 per spilled scalar register
    shared_bytes: int  # per block
    loads: dict[str, int]  # instructions that read global memory, by bits per thread; "tma" loads a tile
    stores: dict[str, int]
    tensor_core: dict[str, int]  # HMMA, HGMMA (wgmma), UTCHMMA (tcgen05), MFMA
    serialized: int  # products for which the next product of a loop waits; wgmma only
    conversions: int  # F2F: between floating-point types, in the pipe of the exponentials; NVIDIA only
    exponentials: int  # MUFU; NVIDIA only
    exchanges: int  # between threads, inside loops that store to global memory; NVIDIA only


def cross_entropy() -> Iterator[Specialization]:
    """Yield every launch config and divisibility of V, with each set of flags."""
    import triton.language as tl

    from ual_kernels._triton import cross_entropy as source

    understood: dict[Any, tuple[str, ...]] = {
        source._forward_kernel: ("weighted", "statistics", "inplace", "capped", "sparse"),
        source._backward_kernel: ("weighted", "capped", "sparse"),
        source._scale_tokens_kernel: (),
    }
    for dtype, itemsize in ITEMSIZES.items():
        sizes: dict[tuple[Any, bool], int] = {}
        for vocab in VOCABULARIES:
            sizes.setdefault((source.launch_config(vocab, itemsize), vocab % 16 == 0), vocab)
        for (_, aligned), vocab in sizes.items():
            for kernel, every in understood.items():
                name = kernel.__name__.strip("_").removesuffix("_kernel")
                kinds = {"all": every, **{f: (f,) for f in every}, "plain": ()}
                if "sparse" in every:
                    kinds["dense"] = ("dense", *every[:-1])
                for label, flags in kinds.items():
                    if label == "all" and not every:
                        continue
                    heavy = bool({"weighted", "statistics"} & set(flags))
                    config = source.launch_config(
                        vocab, itemsize, heavy=heavy, dense="dense" in flags, capped="capped" in flags
                    )
                    pointer, size = f"*{dtype}:16", "i32:16" if aligned else "i32"
                    known = {
                        **dict.fromkeys(("logits_ptr", "dlogits_ptr", "buffer_ptr"), pointer),
                        **dict.fromkeys(("stride_n", "V"), size),
                        "target_ptr": "*i64:16",
                        "token_scale_ptr": "*fp32:16" if "inplace" in flags else None,
                        "class_weight_ptr": "*fp32:16" if "weighted" in flags else None,
                        "classes_ptr": "*i64:16" if "sparse" in flags else None,
                        "probability_ptr": "*fp32:16" if {"sparse", "dense"} & set(flags) else None,
                        "ACC": tl.float32,
                        "FIXED_REFERENCE": itemsize == 2 and "dense" not in flags,
                        "BLOCK_C": 32 if "sparse" in flags else 0,
                        "DENSE": "dense" in flags,
                        "PROBABILITY_GRAD": bool({"sparse", "dense"} & set(flags)),
                        "WEIGHTED": "weighted" in flags,
                        "STATISTICS": "statistics" in flags,
                        "INPLACE": "inplace" in flags,
                        "SOFTCAP": 30.0 if "capped" in flags else 0.0,
                        "LOGIT_SCALE": 0.5 if "capped" in flags else 1.0,
                        "Z_LOSS": 1e-4 if "capped" in flags else 0.0,
                        "BLOCK_V": config.block_v,
                        "FOLD": config.fold,
                    }
                    yield Specialization(
                        f"cross_entropy/{name}/{label}/{dtype}/{vocab}",
                        kernel,
                        {
                            n: known.get(n, "*fp32:16" if n.endswith("_ptr") else "i32")
                            for n in kernel.arg_names
                        },
                        {"num_warps": config.num_warps, "enable_fp_fusion": True},
                    )


def linear_cross_entropy() -> Iterator[Specialization]:
    """Yield each launch config of the GEMM that computes x, and the other kernels of the linear loss."""
    yield from _gemms()
    yield from _beside_gemms()


def _known(kernel: Any, dtype: str, **given: Any) -> dict[str, Any]:
    """Return the arguments of a kernel of the linear loss in a typical call, updated by `given`."""
    usual = {
        **dict.fromkeys(("e_ptr", "head_ptr", "x_ptr", "matrix_ptr", "hidden_ptr"), f"*{dtype}:16"),
        **dict.fromkeys(("target_ptr", "selected_ptr", "index_ptr", "order_ptr", "sorted_ptr"), "*i64:16"),
        **dict.fromkeys(("label_ptr",), "*i32:16"),
        **dict.fromkeys(("V", "D", "stride_x", "stride_l", "first_column"), "i32:16"),
        **dict.fromkeys(("u_desc", "b_desc", "u_ptr", "b_ptr", "weight_ptr", "complete_ptr"), None),
        **dict.fromkeys(("BIASED", "RANKED", "WEIGHTED", "STATISTICS", "INTERPRETED", "CAPPED"), False),
        **dict.fromkeys(("COUNTED", "REWEIGHTED", "FIRST", "SPARSE"), False),
        **dict.fromkeys(("classes_ptr", "probability_ptr", "sums_ptr", "factor_ptr"), None),
        "BLOCK_C": 0,
        "WRITE": True, "SOFTCAP": 0.0, "LOGIT_SCALE": 1.0, "SCALE": 1.4426950408889634, "Z_LOSS": 0.0,
        "HEADROOM": 0.0, "BLOCK_R": 16, "PROCESSORS": 132,
        **given,
    }  # fmt: skip
    if usual["RANKED"]:
        usual |= {n: v for n, v in (("u_ptr", "*fp32:16"), ("b_ptr", "*fp32:16")) if usual[n] is None}
    return {n: usual.get(n, "*fp32:16" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}


def _gemms() -> Iterator[Specialization]:
    from ual_kernels._triton import linear_cross_entropy as source

    kinds: dict[str, dict[str, Any]] = {
        "frozen": {},
        "statistics": {"STATISTICS": True},
        "loss": {"WRITE": False},
        "biased": {"BIASED": True, "STATISTICS": True, "SCALE": 0.5},
        "lora": {"RANKED": True, "R": "i32:16"},
        "lora-statistics": {"RANKED": True, "R": "i32:16", "STATISTICS": True},
    }
    shapes: dict[str, dict[str, Any]] = {
        "128256": {"EVEN_D": True},
        "50257": {"EVEN_D": False, "V": "i32"},
    }
    ways = (("sm_80", "pointer"), ("sm_90", "pointer"), ("sm_90", "tma"), ("sm_100", "pointer"),
            ("sm_100", "tma"), ("hip", "pointer"))  # fmt: skip
    for (architecture, variant), (label, flags), (vocab, shape) in product(
        ways, kinds.items(), shapes.items()
    ):
        config = source.Platform(architecture, 132).launch_config(variant, "STATISTICS" in flags)
        a, b = (f"tensordesc<bf16[{size}, {config.block_k}]>" for size in (config.block_m, config.block_n))
        given = {
            "e_desc": a,
            "head_desc": b,
            "x_desc": f"tensordesc<bf16[{config.block_m}, {config.block_n // 2}]>",
            "FLATTEN": config.flatten and "RANKED" not in flags,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP": config.group,
            **flags,
            **shape,
        }
        if "RANKED" in flags:
            given |= {"u_desc": a, "b_desc": b, "u_ptr": "*bf16:16", "b_ptr": "*bf16:16"}
        kernel = source._tma_kernel if variant == "tma" else source._pointer_kernel
        yield Specialization(
            f"linear_cross_entropy/{variant}/{label}/bf16/{vocab}",
            kernel,
            _known(kernel, "bf16", **given),
            {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
            "gfx" if architecture == "hip" else architecture,
        )


def _beside_gemms() -> Iterator[Specialization]:
    from ual_kernels._triton import linear_cross_entropy as source

    every = {"BIASED": True, "WEIGHTED": True, "STATISTICS": True, "Z_LOSS": 1e-4}
    capped = {**every, "SOFTCAP": 30.0, "CAPPED": True, "WRITE": False}
    given = {"GIVEN": True, "BLOCK_V": 4_096, "BLOCK_D": 1}
    again = {"GIVEN": False, "BLOCK_V": 64, "BLOCK_D": 128, "logits_ptr": None}
    lora = {"RANKED": True, "R": "i32:16"}
    prepare = {"BIASED": True, "COUNTED": True, "complete_ptr": "*i1", "BLOCK_D": 1_024, **lora}
    exponentials = {"STATISTICS": True, "BIASED": True, "BLOCK_V": 4_096}
    far = {"STATISTICS": True, "BIASED": True, "BLOCK_M": 128, "BLOCK_V": 64, "BLOCK_D": 128}
    finish = {**every, "SOFTCAP": 30.0, "REWEIGHTED": True, "weight_ptr": "*fp32:16", "BLOCK": 128}
    listed = {"classes_ptr": "*i64:16", "probability_ptr": "*fp32:16", "BLOCK_C": 32}
    factors, sums = {**listed, "factor_ptr": "*fp32:16"}, {"sums_ptr": "*fp32:16"}
    classes = {**listed, **lora, **sums, "BIASED": True, "WEIGHTED": True, "EVERY": True,
               "GIVEN": False, "BLOCK_D": 1_024}  # fmt: skip
    of_classes = {**factors, "WEIGHTED": True, "REWEIGHTED": True, "weight_ptr": "*fp32:16",
                  "PROBABILITY_GRAD": True, "SOFTCAP": 30.0}  # fmt: skip
    selected = {"source_ptr": "*bf16:16", "out_ptr": "*bf16:16", "selected_ptr": "*i1", "stride_n": "i32:16",
                "MASKED": True, "BLOCK_D": 1_024}  # fmt: skip
    scaled = {"matrix_ptr": "*fp32:16", "factor_ptr": "*fp32", "out_ptr": "*bf16:16"}
    halves, wide = ("bf16", "fp16"), ("bf16", "fp16", "fp32")
    beside: list[tuple[str, Any, tuple[str, ...], dict[str, Any], int]] = [
        ("prepare/all", source._prepare_kernel, wide, prepare, 4),
        ("join/all", source._join_kernel, ("bf16",), {"STATISTICS": True, "BLOCK_M": 32, "BLOCK_T": 32}, 4),
        ("exponentials/plain", source._exponentials_kernel, ("bf16",), {"BLOCK_V": 4_096}, 8),
        ("exponentials/all", source._exponentials_kernel, ("bf16",), exponentials, 8),
        ("own_maximum/plain", source._own_maximum_kernel, wide, given, 8),
        ("own_maximum/all", source._own_maximum_kernel, wide, {**given, **every}, 8),
        ("own_maximum/capped", source._own_maximum_kernel, ("bf16", "fp32"), {**given, **capped}, 8),
        ("own_maximum/again", source._own_maximum_kernel, ("bf16",), {**again, **lora, **every}, 8),
        ("far/all", source._far_tokens_kernel, ("bf16",), far, 8),
        ("far/sparse", source._far_tokens_kernel, ("bf16",), {**far, **listed}, 8),
        ("classes/all", source._classes_kernel, wide, classes, 4),
        ("classes/given", source._classes_kernel, ("bf16",), {**classes, "GIVEN": True}, 4),
        ("clear/plain", source._clear_kernel, wide, listed, 4),
        ("class_factors/all", source._class_factors_kernel, ("bf16",), of_classes, 4),
        ("finish/sparse", source._finish_kernel, ("bf16",), {**finish, **sums, "SPARSE": True}, 4),
        ("gradient/sparse", source._input_gradient_kernel, wide, {**factors, "SPARSE": True,
                                                                   "BLOCK_D": 1_024}, 4),
        ("softcap/all", source._softcap_gradient_kernel, ("bf16", "fp32"), {**capped, "BLOCK_V": 4_096}, 8),
        ("finish/all", source._finish_kernel, ("bf16",), finish, 4),
        ("gradient/plain", source._input_gradient_kernel, wide, {"BLOCK_D": 1_024}, 4),
        ("gradient/lora", source._input_gradient_kernel, wide, {"RANKED": True, "BLOCK_D": 1_024}, 4),
        ("targets/plain", source._add_targets_kernel, ("bf16",),
         {"factor_ptr": "*fp32:16", "BLOCK_T": 8, "BLOCK_D": 1_024}, 4),
        ("select/masked", source._select_kernel, ("bf16",), selected, 4),
        ("scale/plain", source._scale_kernel, ("bf16",), {**scaled, "BLOCK_D": 4_096}, 8),
        ("column_sum/weighted", source._column_sum_kernel, halves, {"WEIGHTED": True, "BLOCK_V": 32,
                                                                    "BLOCK_D": 128}, 4),
    ]  # fmt: skip
    for name, kernel, dtypes, flags, warps in beside:
        for dtype in dtypes:
            yield Specialization(
                f"linear_cross_entropy/{name}/{dtype}/128256",
                kernel,
                _known(kernel, dtype, **{"dinput_ptr": f"*{dtype}:16", **flags}),
                {"num_warps": warps, "enable_fp_fusion": True},
            )


# generators of specializations, one per file of kernels
SOURCES: tuple[Callable[[], Iterator[Specialization]], ...] = (cross_entropy, linear_cross_entropy)


def compile_for(target: str, given: Specialization) -> Report:
    """Compile for a target by name; errors of Triton are not caught."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    nvidia = target.startswith("sm_")
    lanes = 64 if target.startswith("gfx9") else 32
    gpu = GPUTarget("cuda", int(target[3:]), lanes) if nvidia else GPUTarget("hip", target, lanes)
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(given.arguments.items()):
        if isinstance(value, str):
            signature[name], _, divisor = value.partition(":")
            if divisor:
                attributes[i,] = [["tt.divisibility", int(divisor)]]
        else:
            signature[name] = "constexpr"
            constants[i,] = value
    source = ASTSource(given.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=gpu, options=dict(given.options))
    found = _read_cubin(compiled.asm["cubin"]) if nvidia else _read_amdgcn(compiled.asm["amdgcn"])
    metadata = compiled.metadata
    return Report(given.name, target, warps=metadata.num_warps, shared_bytes=metadata.shared, **found)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "--dump-sass", file.name]
        dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", dump, re.M)

    def width(operation: str) -> str:
        bits = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", operation)
        return "tma" if operation.startswith("U") else bits[1] if bits else "32"

    # P is a product, a digit is a wait that allows as many unfinished products
    order = "".join(
        line[-1] if line.startswith("W") else "P"
        for line in re.findall(r"\bHGMMA\b|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d", dump)
    )
    return {
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "loads": _count(operations, r"LDG|UTMALDG|UBLKCP", width),
        "stores": _count(operations, r"STG|UTMASTG", width),
        "tensor_core": _count(operations, r"\w+MMA\b", lambda operation: operation.partition(".")[0]),
        "serialized": order.count("P0P"),
        "conversions": sum(o.startswith("F2F.") for o in operations),
        "exponentials": sum(o.startswith("MUFU") for o in operations),
        "exchanges": _exchanges_where_stored(dump),
    }


def _exchanges_where_stored(dump: str) -> int:
    """Count shared-memory instructions and barriers inside loops that store to global memory.

    If there are none, each thread stores only to addresses that it has loaded, and storing in place is safe.
    """
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", dump, re.M)
    found = 0
    for address, text in lines:
        branch = re.search(r"\bBRA(?:\.\w+)*\s+(?:\w+,\s*)?(?:`\(\S+\)\s*)?(0x[0-9a-f]+)", text)
        if branch is None or int(branch[1], 16) >= int(address, 16):
            continue
        inside = [t for a, t in lines if int(branch[1], 16) <= int(a, 16) <= int(address, 16)]
        if any(re.search(r"\bSTG\b", t) for t in inside):
            found += sum(bool(re.search(r"\b(LDS|STS|BAR|SHFL)\b", t)) for t in inside)
    return found


def _read_amdgcn(assembly: str) -> dict[str, Any]:
    usage = {key: int(value) for key, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", assembly, re.M)}
    operations = re.findall(r"^\t([a-z]\w+)", assembly, re.M)

    def width(operation: str) -> str:
        if bits := re.search(r"_[bui](\d+)$", operation):  # gfx11 and later
            return bits[1]
        words = re.search(r"dword(?:x(\d))?", operation)
        return str(32 * int(words[1] or 1)) if words else "16" if "short" in operation else "8"

    return {
        "registers": usage["vgpr_count"],
        "spill_bytes": usage["private_segment_fixed_size"] + 4 * usage["sgpr_spill_count"],
        "loads": _count(operations, r"(global|buffer|flat)_load", width),
        "stores": _count(operations, r"(global|buffer|flat)_store", width),
        "tensor_core": _count(operations, r"v_s?w?mf?ma", lambda operation: operation.split("_")[1].upper()),
        "serialized": 0,
        "conversions": 0,
        "exponentials": 0,
        "exchanges": 0,
    }


def _count(operations: list[str], wanted: str, kind: Callable[[str], str]) -> dict[str, int]:
    return dict(sorted(Counter(kind(o) for o in operations if re.match(wanted, o)).items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a kernel spills registers."""
    parser = argparse.ArgumentParser(
        "python -m ual_kernels.aot", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="shell pattern of kernel names; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    given = parser.parse_args(arguments)
    targets = given.targets or TARGETS
    for target in targets:
        if not re.fullmatch(r"sm_\d+|gfx\w+", target):
            parser.error(f"TARGET must be a name like {', '.join(TARGETS)}, got {target!r}")

    from triton import knobs

    if knobs.runtime.interpret:
        parser.error(
            "TRITON_INTERPRET is set, but interpreted kernels cannot be compiled; unset it and run again"
        )
    every = [specialization for source in SOURCES for specialization in source()]
    chosen = [s for s in every if any(fnmatchcase(s.name, pattern) for pattern in given.only or "*")]
    if not chosen:
        parser.error(
            f"no kernel name matches --only {' '.join(given.only)}; example of a name: {every[0].name}"
        )

    names = max(len(s.name) for s in chosen)
    columns = f"{{:{names}}}  {{:6}}  {{:>5}}  {{:>4}}  {{:>5}}  {{:>6}}  {{:30}}  {{:22}}  {{:11}}  "
    columns += "{:>6}  {:>3}  {:>4}  {:>4}"
    header = ("name", "target", "warps", "regs", "spill", "shared", "loads", "stores", "tensor core",
              "serial", "F2F", "MUFU", "exch")  # fmt: skip
    if not given.json:
        print(columns.format(*header))  # noqa: T201
    spilled = compiled = 0
    for target in targets:
        for specialization in (s for s in chosen if target.startswith(s.targets)):
            compiled += 1
            report = asdict(compile_for(target, specialization))
            spilled += report["spill_bytes"] > 0
            cells = (re.sub(r"[{},']", "", str(value)).replace(": ", ":") for value in report.values())
            line = json.dumps(report) if given.json else columns.format(*cells).rstrip()
            print(line, flush=True)  # noqa: T201
    if spilled:
        sys.stderr.write(f"{spilled} of {compiled} kernels spill registers\n")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
