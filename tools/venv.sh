#!/usr/bin/env bash
# Creates or updates a virtual environment; does nothing if it is up to date. Only Python must be installed.
#   bash tools/venv.sh            .venv: Python 3.11 if it exists, else 3.12 or 3.13; tools/constraints.txt
#   bash tools/venv.sh --newest   .venv-newest: Python 3.12, else 3.13; tools/constraints_newest.txt. The first time it
#                                 downloads 3 GB, since the index has only CUDA builds of torch for these versions.
# PYTHON=/path/to/python names another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv constraints=tools/constraints.txt versions=(3.11 3.12 3.13)
if [ "${1:-}" = --newest ]; then
    venv=.venv-newest constraints=tools/constraints_newest.txt versions=(3.12 3.13)
fi

# Digest of everything that the installation depends on, including the directory that the editable install points to.
fingerprint() {
    { pwd; $venv/bin/python --version; cat setup.py megatron_vcr1/__init__.py $constraints tools/venv.sh; } |
        sha256sum | cut -d ' ' -f 1
}

if ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(bash tools/find_python.sh "${versions[@]}")
    echo "creating $venv with $("$python" --version)"
    "$python" -m venv --clear $venv
fi

stamp=$venv/installed.sha256
if [ "$(cat $stamp 2>/dev/null)" != "$(fingerprint)" ]; then
    echo "installing megatron_vcr1[dev] into $venv (takes some minutes the first time)"
    pip=($venv/bin/python -m pip -qq --disable-pip-version-check install --constraint $constraints)
    "${pip[@]}" --editable '.[dev]'
    # A CUDA build of torch installs the matching triton. A CPU build does not, but the tests run our kernels in
    # triton's interpreter.
    "${pip[@]}" triton
    # The tests compare with transformers' image and video processors, which need torchvision. torchvision is built for
    # CUDA, and next to a CPU build of torch it breaks the import of every transformers model. So it is installed into a
    # directory of its own, which only those tests use.
    "${pip[@]}" --no-deps --upgrade --target $venv/torchvision torchvision
    fingerprint >$stamp
fi
