#!/usr/bin/env bash
# Runs the whole pipeline on a tiny model, on a CPU, and writes a report. The machine needs only Python 3.11; after the
# installation it takes some minutes.
#   bash tools/demo.sh [--quick] [--seeds 0,1] [--family qwen3_vl] [--out runs/demo]
#   bash tools/demo.sh --real VIDEO.mp4 [--ask "red square"]
# Run the same command again to continue an interrupted demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/venv.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 # the demo's processes share the cores
export PYTHONPATH=$PWD/tools:$PWD/examples${PYTHONPATH:+:$PYTHONPATH}
exec .venv/bin/python -m demo "$@"
