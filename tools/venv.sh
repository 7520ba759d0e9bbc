#!/usr/bin/env bash
# Brings .venv up to date: Python 3.11 or newer is all that must be there before. Changes nothing when nothing changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "tools/venv.sh: ${PYTHON:-python3} is missing or older than Python 3.11;" \
        "install Python 3.11, or name one: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

# What the installation depends on, the tree's own place included: an editable install points at it.
fingerprint() {
    { pwd; .venv/bin/python --version; cat setup.py megatron_vcr1/__init__.py tools/constraints.txt tools/venv.sh; } | sha256sum | cut -d ' ' -f 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

stamp=.venv/installed.sha256
if [ "$(cat $stamp 2>/dev/null)" != "$(fingerprint)" ]; then
    echo "installing megatron_vcr1[dev] into .venv (some minutes on a new machine)"
    pip=(.venv/bin/python -m pip -qq --disable-pip-version-check)
    "${pip[@]}" install --constraint tools/constraints.txt --editable '.[dev]'
    # A CUDA build of torch brings the triton that it was built for. A CPU build brings none, and the tests run our
    # kernels in triton's interpreter.
    .venv/bin/python -c 'import triton' 2>/dev/null || "${pip[@]}" install triton==3.6.0
    # transformers' own image and video processors, which the tests compare ours with, need torchvision. Its builds are
    # for CUDA, and beside a CPU build of torch it breaks every import of a transformers model: so it lies apart, for
    # the tests that ask for it.
    "${pip[@]}" install --no-deps --upgrade --target .venv/torchvision torchvision==0.28.0
    fingerprint >$stamp
fi
