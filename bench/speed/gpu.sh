#!/usr/bin/env bash
# Speed and memory on this machine: with a GPU at true sizes, without one at reduced size. No Ray, no network.
#
#   bash bench/speed/gpu.sh                   # what is measured already is left as it is; run it again to go on
#   bash bench/speed/gpu.sh "throughput sdxl" # this step alone; several may be given
#
# Results go to bench/results/speed, one file a step; `python -m bench.pages` puts them into docs/benchmarks.md.
# On a GPU all steps together begin no row after TOTAL_S seconds (540: within ten minutes), one step none after LIMIT_S
# (60); without one after 1200 each.
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
    TOTAL_S=${TOTAL_S:-540} LIMIT_S=${LIMIT_S:-60}
    steps=(  # what matters most first
        "steps sd14" "steps flux" "steps sd35_medium" "steps sdxl" "update_parts sd14" "tests" "rollouts sd14"
        "overlap sd14" "throughput sd14" "update_parts sdxl" "overlap sdxl" "demo digits" "speedups digits"
        "throughput digits" "overlap digits" "throughput sdxl"
    )
else
    echo "no GPU here: reduced sizes, on the CPU"
    TOTAL_S=${TOTAL_S:-100000} LIMIT_S=${LIMIT_S:-1200}
    steps=(
        "throughput digits" "overlap digits" "demo digits" "speedups digits" "steps tiny_sd3" "rollouts tiny_sd"
        "update_parts tiny_sd" "update_parts tiny_sdxl"
        "throughput tiny_sd" "throughput tiny_sdxl"
    )
fi
[ $# -gt 0 ] && steps=("$@")
failed=0
for step in "${steps[@]}"; do
    read -r bench size <<<"$step"
    left=$((TOTAL_S - SECONDS < LIMIT_S ? TOTAL_S - SECONDS : LIMIT_S))
    if [ $left -le 0 ]; then
        echo "== $step: left for another run"
        continue
    fi
    echo "== $step"
    if [ "$bench" = tests ]; then
        "$python" -m pytest -m gpu tests/gpu -p no:cacheprovider || failed=1
    else
        "$python" -m "bench.speed.$bench" --size "$size" --limit-s "$left" || failed=1
    fi
done
exit $failed
