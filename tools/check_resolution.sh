#!/usr/bin/env bash
# Checks that pip can install the package into one environment with Python 3.12 or 3.13, with each of the extras of a
# cluster and with all of them, and prints the versions that it would choose. Needs the network; installs nothing but
# .venv-newest (tools/venv.sh), because TransformerEngine's source package needs torch to name its requirements.
#   bash tools/check_resolution.sh [EXTRAS...]      # default: '' gpu rollout gpu,rollout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/venv.sh --newest
if (($# == 0)); then
    set -- '' gpu rollout gpu,rollout
fi
report=$(mktemp)
trap 'rm -f "$report"' EXIT
for extras in "$@"; do
    echo "megatron_vcr1[$extras]:"
    .venv-newest/bin/python -m pip -qq --disable-pip-version-check install --dry-run --ignore-installed \
        --no-build-isolation --report "$report" ".${extras:+[$extras]}"
    .venv-newest/bin/python - "$report" <<'PYTHON'
import json, sys

SHOWN = ("torch", "triton", "megatron-core", "transformers", "transformer_engine", "nvidia-dali-cuda130", "sglang", "numpy")
with open(sys.argv[1]) as file:
    packages = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in json.load(file)["install"]}
print(f"  {len(packages)} packages:", ", ".join(f"{name} {packages[name]}" for name in SHOWN if name in packages))
PYTHON
done
