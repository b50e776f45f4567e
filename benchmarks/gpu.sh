#!/usr/bin/env bash
# What has to be seen on a GPU once, in parts of less than nine minutes each.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: benchmarks/gpu.sh OUT_DIR [--part N] [--dry-run] [--quick]

  --part N    only part N; all of them otherwise, one after the other
                1  the test suite of the kernels, compiled
                2  compute-sanitizer (memcheck, racecheck, initcheck), and the tests that need a GPU
                3  time and memory, beside others
                4  launch plans of the fused GEMM, beside cuBLAS
                5  error against float64 on a real model's hidden states
  --dry-run   on any machine: tiny shapes in Triton's interpreter; says line by line what is replaced
  --quick     with --dry-run: one setting and few providers in parts 3 and 5

environment:
  PYTHON   the interpreter (default: .venv/bin/python where there is one, else python3)
  WHEELS   a folder of wheels of missing peers, installed beside and not into the environment; no network
  STATES   hidden states for part 5, made by `python -m benchmarks.accuracy --export FILE` where the model is
  PROBLEM  problems of part 3 (default: all), SETTING its settings (default: most, the telling ones first)
  COMMIT   what is measured, where the tree came without its history
  PYTEST_ADDOPTS   further options of parts 1 and 2, as pytest reads them: "-k triton"

examples:
  benchmarks/gpu.sh out --part 2
  WHEELS=.whl STATES=states.pt.gz COMMIT=$(git rev-parse --short=12 HEAD) benchmarks/gpu.sh "$OUT"
  benchmarks/gpu.sh /tmp/dry --dry-run

OUT_DIR gets at most eight files: summary.md, part1.log, part1.xml, part2.log, part2.xml, part3.json, part4.json,
part5.json. The exit status is 1 if a part failed, 2 for wrong arguments.
TEXT
}

refuse() {
    printf 'gpu.sh: %s\n' "$1" >&2
    exit 2
}

out='' part='' dry='' quick=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --part) part=${2:-}; shift 2 || refuse '--part: wanted 1 to 5, got nothing' ;;
        --dry-run) dry=1; shift ;;
        --quick) quick=1; shift ;;
        -*) refuse "unknown option $1; see --help" ;;
        *) [ -z "$out" ] || refuse "one OUT_DIR wanted, got $out and $1"; out=$1; shift ;;
    esac
done
[ -n "$out" ] || refuse 'OUT_DIR is missing; see --help'
case $part in '' | [1-5]) ;; *) refuse "--part: wanted 1 to 5, got $part" ;; esac
[ -z "$quick" ] || [ -n "$dry" ] || refuse '--quick goes with --dry-run'

mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -z "${WHEELS:-}" ] || WHEELS=$(cd "$WHEELS" && pwd)
[ -z "${STATES:-}" ] || STATES=$(cd "$(dirname "$STATES")" && pwd)/$(basename "$STATES")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
summary=$out/summary.md
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$scratch/site" "$WHEELS"/*.whl
    export PYTHONPATH=$scratch/site${PYTHONPATH:+:$PYTHONPATH}
fi
if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES='' TRITON_INTERPRET=1
else
    unset TRITON_INTERPRET
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        refuse 'no CUDA device; wanted one, or --dry-run'
fi

# a GPU machine may lack the plugins that the project's own options name
# nor are its versions those whose warnings are errors here
plain=(-o addopts=--strict-markers -o filterwarnings=default -o minversion=0 -p no:cacheprovider)

say() { printf '%s\n' "$*" | tee -a "$summary"; }
replaced() { [ -z "$dry" ] || say "dry run: $*"; }
# until the part's time is up; SIGINT, so that what was measured by then is still written
limited() {
    local left=$((520 - (SECONDS - started)))
    timeout --signal=INT --kill-after=20 "$((left > 1 ? left : 1))" "$@"
}
run() { limited "$python" -W ignore -m "$@" 2>&1 | tee -a "$summary"; }

tests() { # LOG XML ARGUMENT...
    local log=$1 xml=$2
    shift 2
    limited "$python" -m pytest "${plain[@]}" -p no:benchmark -q --junitxml="$xml" "$@" 2>&1 | tee -a "$log"
}

part_1() {
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && [ -z "$dry" ] && workers=(-n 8)
    if [ -n "$dry" ]; then
        replaced 'part 1: the compiled kernels are the interpreted ones, and a few of their tests stand for all'
        tests "$out/part1.log" "$out/part1.xml" tests/kernels/test_linear_triton.py -k same_bits
    else
        tests "$out/part1.log" "$out/part1.xml" tests/kernels --ignore tests/kernels/test_gpu.py "${workers[@]}"
    fi
}

part_2() {
    local log=$out/part2.log name kernels=() tool
    # compiles everything once, without a checker's slowness
    limited "$python" -W ignore -m benchmarks.sanitized 2>&1 | tee -a "$log"
    if [ -n "$dry" ]; then
        replaced 'part 2: compute-sanitizer is the plain run above; nothing checks memory, races or initialisation'
        replaced 'part 2: the tests that need a GPU are collected and skipped'
    else
        for name in $("$python" -m benchmarks.sanitized --names); do
            kernels+=(--kernel-name "kne=$name")
        done
        PATH=$PATH:/usr/local/cuda/bin
        if ! command -v compute-sanitizer >/dev/null; then
            say 'part 2: compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin; it is part of CUDA'
            return 1
        fi
        export PYTORCH_NO_CUDA_MEMORY_CACHING=1
        if limited compute-sanitizer --tool memcheck --error-exitcode 9 \
            "$python" -m benchmarks.sanitized --planted >>"$log" 2>&1; then
            say 'part 2: memcheck did not see a planted error, so its silence means nothing'
            return 1
        fi
        for tool in memcheck racecheck initcheck; do
            say "part 2: $tool"
            limited compute-sanitizer --tool "$tool" --error-exitcode 9 "${kernels[@]}" \
                "$python" -W ignore -m benchmarks.sanitized 2>&1 | tee -a "$log"
        done
        unset PYTORCH_NO_CUDA_MEMORY_CACHING
    fi
    tests "$log" "$out/part2.xml" tests/kernels/test_gpu.py -rs
}

# SUITES into $out/partN.json, and its tables into the summary
suites() { # N ARGUMENT...
    local json=$out/part$1.json log=$scratch/part$1.log status=0
    shift
    limited "$python" -W ignore -m pytest "${plain[@]}" -q --results "$json" "$@" >"$log" 2>&1 || status=$?
    [ "$status" -eq 0 ] || tail -n 40 "$log" | tee -a "$summary"
    if [ -s "$json" ]; then
        cp "$json" "$scratch/report.json"
        "$python" -m benchmarks report "$scratch/report.json" >/dev/null
        tee -a "$summary" <"$scratch/report.md"
    fi
    return "$status"
}

part_3() {
    local arguments=(--short --budget 400) name
    if [ -n "$dry" ]; then
        replaced 'part 3: CUDA events are the wall clock, no peak of an allocator is measured, shapes are tiny'
        arguments=(--smoke -k 'not near_the_bare')
        [ -z "$quick" ] || arguments+=(--setting frozen --provider ours --provider naive)
    else
        for name in ${PROBLEM:-}; do arguments+=(--problem "$name"); done
        for name in ${SETTING:-frozen none+weights trainable half-ignored no-smoothing lora}; do
            arguments+=(--setting "$name")
        done
    fi
    suites 3 benchmarks/bench_cross_entropy.py benchmarks/bench_linear_cross_entropy.py "${arguments[@]}"
}

part_4() {
    local arguments=()
    if [ -n "$dry" ]; then
        replaced 'part 4: CUDA events are the wall clock, cuBLAS is a product on the CPU, plans are few and small'
        arguments=(--rounds 1)
    fi
    run benchmarks.plans "${arguments[@]}" --json "$out/part4.json" --markdown "$scratch/part4.md"
}

part_5() {
    local arguments=()
    if [ -n "$dry" ]; then
        replaced 'part 5: the hidden states of a real model are random numbers, few and small'
        arguments=(--smoke)
        [ -z "$quick" ] || arguments+=(--provider ours --provider naive)
    elif [ -n "${STATES:-}" ]; then
        arguments=(--states "$STATES")
    fi
    suites 5 benchmarks/bench_accuracy.py "${arguments[@]}"
}

[ -n "$part" ] || : >"$summary"
failed=0
for number in ${part:-1 2 3 4 5}; do
    say "# part $number, $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    started=$SECONDS
    # a shell of its own, and untested: in a condition it would run on after an error
    set +e
    (set -e; "part_$number")
    status=$?
    set -e
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict='FAILED: it ran past its limit' failed=1 ;;
        *) verdict="FAILED with status $status" failed=1 ;;
    esac
    say "part $number $verdict, $((SECONDS - started)) s"
done
find "$out" -type f -size +15M | while read -r file; do
    tail -c 15000000 "$file" >"$scratch/tail"
    mv "$scratch/tail" "$file"
    say "$(basename "$file") was cut to its last 15 MB"
done
exit "$failed"
