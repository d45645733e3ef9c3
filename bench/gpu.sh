#!/usr/bin/env bash
# On a machine with a GPU: the tests marked gpu, then the benchmarks. No Ray, no network.
#
#   bash bench/gpu.sh [folder for the results]
#
# Packages that the machine lacks are taken from wheels/, if there is such a folder
# (`pip download --no-deps --dest wheels diffusers pydantic ...` fills it).
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD
mkdir -p "$results"
if [ -d wheels ]; then
    "$python" -m pip install --quiet --no-index --no-deps wheels/*.whl
fi
"$python" -m pytest -m gpu
"$python" bench/sd_step.py --out "$results/sd_step.json"
