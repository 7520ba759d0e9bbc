#!/usr/bin/env bash
# What a GPU can say that a CPU cannot, in one call of under 9 minutes: proof first, then measurement.
#
#     bash tools/gpu_check.sh [SECTION...]      # default: all, in this order, as long as there is time
#
#     kernels        tests of the Triton kernels
#     model          the model and the local engine against transformers; TransformerEngine's layers and FP8 where it is
#     benchmark      the kernels against their peers
#     update         a GRPO update of Qwen2.5-VL-3B's shape
#     update_te      the same by TransformerEngine's layers, then with FP8
#     update_plain   the same against the plain transformers computation, gradients compared
#
# Nothing is installed. kernels and benchmark need a python3 with torch, triton and pytest; the others also
# megatron-core, transformers, pydantic, av and what these need, without this package being installed. What is missing
# is said, and its section left out.
#
# Results go to $OUT (default: a new temporary folder): gpu_check.json (machine, versions, every section's end), log.txt,
# and a JSON file a measurement. They are written as they come, so that a call that is cut off leaves what it had.
# Exit code: 0, 1 (a section failed), 2 (no GPU, or bad usage).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

SECTIONS=(kernels model benchmark update update_te update_plain)
declare -A LIMIT_S=([kernels]=200 [model]=120 [benchmark]=120 [update]=150 [update_te]=150 [update_plain]=300)
TOTAL_S=${TOTAL_S:-525}
SHORTEST_S=20 # a section is not begun with less left

for name in "$@"; do
    if [[ -z ${LIMIT_S[$name]:-} ]]; then
        [[ $name == --help ]] && sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" && exit 0
        echo "gpu_check: no section '$name'; there are: ${SECTIONS[*]}" >&2
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

# gpu_check.json from the machine and the sections that have ended: "NAME SECONDS CODE SUMMARY" a line.
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

# end NAME SECONDS CODE SUMMARY: exit code "-" for what was not run
end() {
    echo "$1 $2 $3 $4" >>"$sections"
    echo "== $1: exit $3, $2 s: $4"
    write_record
}

left() { echo $((TOTAL_S - SECONDS)); }

# measure NAME COMMAND...: within the section's limit and the time that is left
measure() {
    local name=$1 limit=${LIMIT_S[$section]} start=$SECONDS code
    shift
    (($(left) < limit)) && limit=$(left)
    if ((limit < SHORTEST_S)); then
        end "$name" 0 - "no time left"
        return
    fi
    echo "== $name (at most $limit s): $*" | tee -a "$out/log.txt"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/log.txt" | tee "$out/.last" | tail -n 40
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed=1
    end "$name" $((SECONDS - start)) "$code" "$(sed '/^[[:space:]]*$/d;s/^[[:space:]]*//;s/[[:space:]]*$//' "$out/.last" | tail -n 1)"
}

# can NAME MODULE...: or say what is missing
can() {
    local name=$1 missing
    shift
    missing=$("$python" -c "$(printf 'import %s\n' "$@")" 2>&1 >/dev/null) && return
    end "$name" 0 - "left out: ${missing##*$'\n'}"
    return 1
}

run_kernels() { can kernels pytest && measure kernels "${pytest[@]}" "${workers[@]}" tests/kernels; }
run_model() {
    can model pytest megatron_vcr1.model.qwen_vl megatron_vcr1.rollout.local.engine || return
    measure model "${pytest[@]}" -rA tests/model/test_on_gpu.py tests/model/test_transformer_engine.py
}
run_benchmark() { measure benchmark "$python" tools/benchmark_kernels.py --json "$out/kernels.json"; }

UPDATE=(tools/benchmark_throughput.py train --model qwen2.5-vl-3b --rounds 2 --prompt-tokens 4096 --response-tokens 256
    --recompute full)
run_update() {
    can update throughput.train throughput.update_ours || return
    measure update "$python" "${UPDATE[@]}" --sides ours --layer-spec local --json "$out/update.json"
}
run_update_te() {
    can update_te throughput.train transformer_engine.pytorch || return
    local te=("${UPDATE[@]}" --sides ours --layer-spec transformer_engine)
    measure update_te "$python" "${te[@]}" --json "$out/update_te.json"
    measure update_fp8 "$python" "${te[@]}" --fp8 tensorwise --json "$out/update_fp8.json"
}
run_update_plain() {
    can update_plain throughput.train throughput.update_plain || return
    measure update_plain "$python" "${UPDATE[@]}" --sides ours plain --json "$out/update_plain.json"
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name(), torch.__version__)' || exit 2
pytest=("$python" -m pytest -q -p no:cacheprovider)
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
failed=0
write_record || exit 1
for section in "${SECTIONS[@]}"; do
    if (($(left) < SHORTEST_S)); then
        end "$section" 0 - "no time left"
    else
        case $section in
        kernels) run_kernels ;;
        model) run_model ;;
        benchmark) run_benchmark ;;
        update) run_update ;;
        update_te) run_update_te ;;
        update_plain) run_update_plain ;;
        esac
    fi
done
rm -f "$sections" "$out/.last"
echo "results in $out/:" "$out"/*
exit $failed
