#!/usr/bin/env bash
# Lint, types and tests, on a machine that has Python 3.11 and nothing else. Arguments go to pytest:
#   bash tools/test.sh [--with-dali] [-k NAME] [-n WORKERS] [tests/...]
# --with-dali also tests decoding with NVIDIA DALI, on the CPU; it downloads 300 MB the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

with_dali=
if [ "${1:-}" = --with-dali ]; then
    with_dali=1
    shift
fi

bash tools/venv.sh
if [ $with_dali ]; then
    # 2.1.0 is the last release that decodes H.264 and HEVC without a GPU. It lies apart, without the GPU libraries that
    # its metadata asks for and with only the packages that it imports.
    dali=.venv/dali-2.1.0
    if [ ! -f $dali/complete ]; then
        echo "installing NVIDIA DALI into $dali"
        .venv/bin/python -m pip -qq --disable-pip-version-check install --no-deps --upgrade --target $dali \
            nvidia-dali-cuda120==2.1.0 astunparse gast makefun nvtx optree six wheel
        touch $dali/complete
    fi
    export PYTHONPATH=$PWD/$dali${PYTHONPATH:+:$PYTHONPATH}
fi
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist loadgroup "$@"
