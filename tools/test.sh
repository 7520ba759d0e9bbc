#!/usr/bin/env bash
# Runs the linter, the type checker and the tests. The machine needs only Python 3.11. Arguments are passed to pytest:
#   bash tools/test.sh [--newest] [--with-dali] [--with-sglang] [-k NAME] [-n WORKERS] [tests/...]
# --newest runs only the tests, with Python 3.12 or 3.13 and the newest tested versions of the libraries
#     (tools/constraints_newest.txt) in .venv-newest; it downloads 3 GB the first time.
# --with-dali also tests decoding with NVIDIA DALI on the CPU; it downloads 300 MB the first time.
# --with-sglang also tests rollouts with a real SGLang server on the CPU; it downloads 200 MB the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

newest='' with_dali='' with_sglang=''
while true; do
    case ${1:-} in
        --newest) newest=--newest ;;
        --with-dali) with_dali=1 ;;
        --with-sglang) with_sglang=1 ;;
        *) break ;;
    esac
    shift
done
venv=.venv${newest:+-newest}

bash tools/venv.sh $newest
mypy=''
if [ ! $newest ]; then
    .venv/bin/ruff check
    .venv/bin/ruff format --check
    .venv/bin/mypy & # while the next steps wait for downloads
    mypy=$!
fi
if [ $with_dali ]; then
    # 2.1.0 is the last release that decodes H.264 and HEVC without a GPU. It is installed into a directory of its own,
    # with the packages that it imports and without the GPU libraries that it declares as dependencies.
    dali=$venv/dali-2.1.0
    if [ ! -f $dali/complete ]; then
        echo "installing NVIDIA DALI into $dali"
        $venv/bin/python -m pip -qq --disable-pip-version-check install --no-deps --upgrade --target $dali \
            nvidia-dali-cuda120==2.1.0 astunparse gast makefun nvtx optree six wheel
        touch $dali/complete
    fi
    export PYTHONPATH=$PWD/$dali${PYTHONPATH:+:$PYTHONPATH}
fi
if [ $with_sglang ]; then
    bash tools/sglang_venv.sh $newest
    export VCR1_SGLANG_PYTHON=$PWD/$venv/sglang/bin/python
fi
if [ $mypy ]; then
    wait $mypy
fi
# Three workers even on two cores: tests wait for servers, jobs and time-outs.
exec $venv/bin/python -m pytest -n 3 --dist loadgroup "$@"
