#!/usr/bin/env bash
# Speed and memory on this machine: with a GPU at true sizes, without one at reduced size. No Ray, no network.
#
#   bash bench/speed/gpu.sh                   # what is measured already is left as it is; run it again to go on
#   bash bench/speed/gpu.sh "throughput sdxl" # this step alone; several may be given
#
# Results go to bench/results/speed, one file a step; `python -m bench.pages` puts them into docs/benchmarks.md.
# A step begins no row after LIMIT_S seconds (on a GPU 240, so that it ends within about five minutes; else 1200).
#
# Packages that the machine lacks are taken from wheels/, if there is such a folder. Beside torch, transformers, peft,
# accelerate, pyarrow and what they need, these are, with the machine's --python-version and --platform:
#   pip download --no-deps --only-binary=:all: --dest wheels \
#       diffusers pydantic pydantic-core annotated-types typing-inspection plotly
# (pydantic-core in the version that pydantic asks for).
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error PYTHONUNBUFFERED=1
if [ -d wheels ]; then
    "$python" -m pip install --quiet --no-index --no-deps wheels/*.whl || exit
fi
if "$python" -c "import torch; exit(not torch.cuda.is_available())"; then
    steps=(
        "tests" "demo digits" "speedups digits" "update_parts sd14" "throughput sd14" "throughput digits"
        "overlap digits"
        "overlap sd14" "update_parts sdxl" "throughput sdxl" "overlap sdxl"
    )
else
    echo "no GPU here: reduced sizes, on the CPU"
    LIMIT_S=${LIMIT_S:-1200}
    steps=(
        "throughput digits" "overlap digits" "demo digits" "speedups digits"
        "update_parts tiny_sd" "update_parts tiny_sdxl"
        "throughput tiny_sd" "throughput tiny_sdxl"
    )
fi
[ $# -gt 0 ] && steps=("$@")
failed=0
for step in "${steps[@]}"; do
    read -r bench size <<<"$step"
    echo "== $step"
    if [ "$bench" = tests ]; then
        "$python" -m pytest -m gpu tests/gpu -p no:cacheprovider || failed=1
    else
        "$python" -m "bench.speed.$bench" --size "$size" --limit-s "${LIMIT_S:-240}" || failed=1
    fi
done
exit $failed
