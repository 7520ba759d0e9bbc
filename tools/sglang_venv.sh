#!/usr/bin/env bash
# Creates sglang/ in a virtual environment of tools/venv.sh. In it the tests run a real SGLang server on the CPU. The
# first time takes one or two minutes and 620 MB of disk space.
#   bash tools/sglang_venv.sh [--newest]
#
# SGLang's own requirements are several gigabytes of CUDA packages. sglang_requirements.txt lists only the packages that
# its Qwen-VL path imports on a CPU, and they are installed without dependencies. torch, transformers and the others come
# from the outer environment. sglang_cpu/ replaces two packages that are compiled for CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

outer=.venv constraints=tools/constraints.txt
if [ "${1:-}" = --newest ]; then
    outer=.venv-newest constraints=tools/constraints_newest.txt
fi
venv=$outer/sglang
# The hash of everything that determines the environment. An environment contains its own path, so it cannot be moved.
fingerprint() {
    {
        pwd
        $outer/bin/python --version
        cat tools/sglang_venv.sh tools/sglang_requirements.txt
        grep torchvision $constraints
        find tools/sglang_cpu -name '*.py' -exec cat {} +
    } | sha256sum | cut -d ' ' -f 1
}

if [ "$(cat $venv/installed.sha256 2>/dev/null)" = "$(fingerprint)" ]; then
    exit 0
fi
echo "installing SGLang into $venv"
$outer/bin/python -m venv --clear $venv
site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Append the packages of the outer environment to sys.path, so that trainer and server use the same torch and
# transformers.
$outer/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/tests_environment.pth"
pip=($venv/bin/python -m pip -qq --disable-pip-version-check install --no-deps)
"${pip[@]}" --requirement tools/sglang_requirements.txt
"${pip[@]}" --constraint $constraints torchvision
cp -r tools/sglang_cpu/. "$site"
fingerprint >$venv/installed.sha256
