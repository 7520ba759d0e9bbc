#!/usr/bin/env bash
# Creates or updates .venv. Python 3.11 or newer must be installed; nothing else is needed. Does nothing if .venv is up
# to date.
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
        "install Python 3.11, or set PYTHON=/path/to/python3.11" >&2
    return 1
}

# Digest of everything that the installation depends on, including the directory that the editable install points to.
fingerprint() {
    { pwd; .venv/bin/python --version; cat setup.py megatron_vcr1/__init__.py tools/constraints.txt tools/venv.sh; } |
        sha256sum | cut -d ' ' -f 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

stamp=.venv/installed.sha256
if [ "$(cat $stamp 2>/dev/null)" != "$(fingerprint)" ]; then
    echo "installing megatron_vcr1[dev] into .venv (takes some minutes the first time)"
    pip=(.venv/bin/python -m pip -qq --disable-pip-version-check)
    "${pip[@]}" install --constraint tools/constraints.txt --editable '.[dev]'
    # A CUDA build of torch installs the matching triton. A CPU build does not, but the tests run our kernels in
    # triton's interpreter.
    .venv/bin/python -c 'import triton' 2>/dev/null || "${pip[@]}" install triton==3.6.0
    # The tests compare with transformers' image and video processors, which need torchvision. torchvision is built for
    # CUDA, and next to a CPU build of torch it breaks the import of every transformers model. So it is installed into a
    # directory of its own, which only those tests use.
    "${pip[@]}" install --no-deps --upgrade --target .venv/torchvision torchvision==0.28.0
    fingerprint >$stamp
fi
