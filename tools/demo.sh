#!/usr/bin/env bash
# The whole job in miniature on a CPU, from a machine that has Python 3.11 to a report, in minutes after installation:
#   bash tools/demo.sh [--quick] [--seeds 0,1] [--out runs/demo]
#   bash tools/demo.sh --real VIDEO.mp4 [--ask "red square"]
# Started again, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/venv.sh
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 # the demo's processes share the cores
export PYTHONPATH=$PWD/tools:$PWD/examples${PYTHONPATH:+:$PYTHONPATH}
exec .venv/bin/python -m demo "$@"
