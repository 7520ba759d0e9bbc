#!/usr/bin/env bash
# Run the tests and benchmarks that need a GPU, in one call of less than 9 minutes: what must be right first, then times.
#
#     bash tools/gpu_check.sh [SECTION...]      # default: all sections, in this order, until the time is used up
#
#     kernels        tests of the Triton kernels
#     model          tests of the model and the in-process engine against transformers, of the reference in host memory,
#                    and of GPU memory that SGLang's servers read; if TransformerEngine is installed, also of its layers
#                    and of FP8
#     update         a GRPO update with the shapes of Qwen2.5-VL-3B
#     switches       GRPO steps of the demo's model with the settings that no other section uses
#     benchmark      the kernels compared with alternative implementations
#     update_te      the same update with TransformerEngine's layers, then with FP8
#     update_plain   the same update compared with plain transformers code, including the gradients
#
# Nothing is installed. The sections kernels and benchmark need a python3 with torch, triton and pytest. The other ones
# also need megatron-core, transformers, pydantic, av and their dependencies; this package itself need not be installed.
# A section is skipped, with a message that names the package, if one of these packages is missing.
#
# Environment: PYTHON is the interpreter (default: python3), TOTAL_S the time limit in seconds (default: 525).
# Results are written to the folder OUT (default: a new temporary folder): gpu_check.json (machine, versions, the outcome
# of every section), log.txt, and one JSON file per measurement. They are written after each section, so an
# interrupted call keeps the results of the finished sections. A section that reaches its time limit is interrupted as by
# Ctrl-C, so that pytest still reports the failures that it has seen.
# Exit code: 0 (success), 1 (a section failed), 2 (no GPU, or bad usage).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

SECTIONS=(kernels model update switches benchmark update_te update_plain)
declare -A LIMIT_S=([kernels]=200 [model]=120 [update]=150 [switches]=120 [benchmark]=120 [update_te]=150
    [update_plain]=300)
TOTAL_S=${TOTAL_S:-525}
MIN_SECTION_S=20 # a section is not started if less time than this is left

for name in "$@"; do
    if [[ -z ${LIMIT_S[$name]:-} ]]; then
        [[ $name == --help ]] && sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0
        echo "gpu_check: unknown section '$name'; the sections are: ${SECTIONS[*]}" >&2
        exit 2
    fi
done
(($#)) && SECTIONS=("$@")

out=${OUT:-$(mktemp -d)}
mkdir -p "$out" || exit 2
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
sections=$out/.sections
: >"$sections"
: >"$out/log.txt"

# write_record: write gpu_check.json from the machine's properties and the finished sections. The file $sections has one
# line per section: "NAME SECONDS EXIT_CODE SUMMARY". The JSON file is replaced atomically.
write_record() {
    "$python" - "$sections" "$out/gpu_check.json" <<'PYTHON'
import datetime, importlib.metadata, json, os, platform, sys

import torch

def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

names = ("torch", "triton", "transformers", "megatron-core", "transformer-engine", "flash-attn")
rows = [line.rstrip("\n").split(" ", 3) for line in open(sys.argv[1], encoding="utf-8")]
record = {
    "date": datetime.date.today().isoformat(),
    "gpu": torch.cuda.get_device_name(),
    "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1),
    "capability": ".".join(map(str, torch.cuda.get_device_capability())),
    "cuda": torch.version.cuda,
    "python": platform.python_version(),
    "versions": {name: found for name in names if (found := version(name))},
    "sections": [
        {"name": name, "seconds": int(seconds), "exit": None if code == "-" else int(code), "summary": summary}
        for name, seconds, code, summary in rows
    ],
}
with open(sys.argv[2] + ".part", "w", encoding="utf-8") as file:
    json.dump(record, file, indent=1)
os.replace(sys.argv[2] + ".part", sys.argv[2])
PYTHON
}

# finish NAME SECONDS EXIT_CODE SUMMARY: record a section. The exit code is "-" for a section that did not run.
finish() {
    echo "$1 $2 $3 $4" >>"$sections"
    echo "== $1: exit $3, $2 s: $4"
    write_record
}

# seconds_left: print the time that is left of TOTAL_S.
seconds_left() { echo $((TOTAL_S - SECONDS)); }

# run_limited NAME COMMAND...: run a command within the section's time limit and the time that is left, and record it.
run_limited() {
    local name=$1 limit=${LIMIT_S[$section]} start=$SECONDS code
    shift
    (($(seconds_left) < limit)) && limit=$(seconds_left)
    if ((limit < MIN_SECTION_S)); then
        finish "$name" 0 - "no time left"
        return
    fi
    echo "== $name (at most $limit s): $*" | tee -a "$out/log.txt"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/log.txt" | tee "$out/.last" | tail -n 40
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed=1
    finish "$name" $((SECONDS - start)) "$code" "$(sed '/^[[:space:]]*$/d;s/^[[:space:]]*//;s/[[:space:]]*$//' "$out/.last" | tail -n 1)"
}

# has NAME PACKAGE...: check that other projects' packages can be imported. If not, record the section as skipped and
# return 1. Modules of this repository are not listed: if one is missing, the section must fail.
has() {
    local name=$1 missing
    shift
    missing=$("$python" -c "$(printf 'import %s\n' "$@")" 2>&1 >/dev/null) && return
    finish "$name" 0 - "skipped: ${missing##*$'\n'}"
    return 1
}

TRAINING_PACKAGES=(megatron.core transformers pydantic av)

run_kernels() {
    has kernels pytest || return
    # Left out: the PyTorch paths on the CPU, the compilation for other GPUs, and the installation.
    run_limited kernels "${pytest[@]}" "${workers[@]}" -k "not pytorch" --ignore=tests/kernels/test_hopper.py \
        --ignore=tests/kernels/test_package.py tests/kernels
}
run_model() {
    has model pytest "${TRAINING_PACKAGES[@]}" || return
    # The tests of sharded buffers need four ranks.
    run_limited model "${pytest[@]}" -rA -k "not sharded" tests/model/test_on_gpu.py \
        tests/model/test_transformer_engine.py tests/model/cpu/test_weight_gradients.py \
        tests/training/test_reference.py tests/rollout/sglang/channels/test_flat_bucket.py
}

UPDATE=(tools/benchmark_throughput.py train --model qwen2.5-vl-3b --rounds 2 --prompt-tokens 4096 --response-tokens 256
    --recompute full)
run_update() {
    has update "${TRAINING_PACKAGES[@]}" || return
    run_limited update "$python" "${UPDATE[@]}" --sides ours --layer-spec local --json "$out/update.json"
}
run_switches() {
    has switches "${TRAINING_PACKAGES[@]}" || return
    run_limited switches "$python" tools/benchmark_throughput.py step --steps 2 --json "$out/switches.json" \
        --set train.deterministic=true recompute.granularity=full recompute.offload=true \
        optimizer.overlap_grad_reduce=true optimizer.grad_dtype=bfloat16 optimizer.state=host optimizer.first_moment_dtype=bfloat16 \
        optimizer.second_moment_dtype=bfloat16 optimizer.beta2=0.95 grpo.num_minibatches=2
}
run_benchmark() { run_limited benchmark "$python" tools/benchmark_kernels.py --json "$out/kernels.json"; }
run_update_te() {
    has update_te "${TRAINING_PACKAGES[@]}" transformer_engine.pytorch || return
    local te=("${UPDATE[@]}" --sides ours --layer-spec transformer_engine)
    run_limited update_te "$python" "${te[@]}" --json "$out/update_te.json"
    run_limited update_fp8 "$python" "${te[@]}" --fp8 tensorwise --json "$out/update_fp8.json"
}
run_update_plain() {
    has update_plain "${TRAINING_PACKAGES[@]}" || return
    run_limited update_plain "$python" "${UPDATE[@]}" --sides ours plain --json "$out/update_plain.json"
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name(), torch.__version__)' || exit 2
pytest=("$python" -m pytest -q -p no:cacheprovider)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist loadgroup)
failed=0
write_record || exit 1
for section in "${SECTIONS[@]}"; do
    if (($(seconds_left) < MIN_SECTION_S)); then
        finish "$section" 0 - "no time left"
    else
        "run_$section"
    fi
done
rm -f "$sections" "$out/.last"
echo "results in $out/:" "$out"/*
exit $failed
