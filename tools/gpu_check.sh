#!/usr/bin/env bash
# Everything that a GPU can say about the kernels, in one call of under 8 minutes: proof, then measurement.
# Needs a python3 with torch, triton and pytest; nothing is installed. Results go to $OUT (default: a new temporary folder).
set -u
cd "$(dirname "$0")/.."
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONPATH=.:kernels PYTHONDONTWRITEBYTECODE=1
python=${PYTHON:-python3}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.cuda.get_device_name(), torch.__version__)' || exit 2
workers=(); "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
timeout 220 "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/kernels 2>&1 | tee "$out/tests.log" | tail -n 25
tests=${PIPESTATUS[0]}
timeout 240 "$python" tools/benchmark_kernels.py --json "$out/benchmark.json" 2>&1 | tee "$out/benchmark.log"
benchmark=${PIPESTATUS[0]}
echo "tests: exit $tests, benchmark: exit $benchmark, results in $out/"
exit $((tests || benchmark))
