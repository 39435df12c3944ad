#!/usr/bin/env bash
# On a machine with a GPU, nvcc and torch: builds for that GPU, tests, looks with compute-sanitizer and measures.
# Leaves logs and figures in $OUT; fails if a step does. Some of the steps alone: benchmarks/gpu.sh build tests
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
ALL="build tests cases-1 cases-2 memcheck racecheck initcheck bench-1M bench-25.6M bench-100M"
CHOSEN=" ${*:-$ALL} "
mkdir -p "$OUT"
failed=0

for name in $CHOSEN; do
  [[ " $ALL " == *" $name "* ]] || { echo "no step is $name: $ALL"; exit 2; }
done

step() {
  local name=$1
  shift
  [[ $CHOSEN == *" $name "* ]] || return 0
  "$@" >"$OUT/$name.log" 2>&1 && { echo "$name: $(tail -n 1 "$OUT/$name.log")"; return 0; }
  failed=1
  echo "$name failed:"
  tail -n 20 "$OUT/$name.log"
  return 1
}

nvidia-smi >"$OUT/device.log" 2>&1
FEDCODEC_CUDA=ON step build python3 -m pip install --no-build-isolation --no-deps \
  -C cmake.define.FEDCODEC_CUDA_ARCHITECTURES=native . || exit 1
step tests python3 -m pytest -q -m gpu tests
# Each time 5,000 others.
for turn in 1 2; do
  HYPOTHESIS_PROFILE=explore step "cases-$turn" \
    python3 -m pytest -q -m gpu tests/test_cuda.py -k any_payload
done
for tool in memcheck racecheck initcheck; do
  options=(--tool "$tool" --error-exitcode 1)
  # Ours check what calls return, and torch makes some that fail on purpose.
  [[ $tool == memcheck ]] && options+=(--report-api-errors no)
  step "$tool" compute-sanitizer "${options[@]}" \
    python3 -m pytest -q -m gpu tests/test_cuda.py -k "large or feedback_is"
done
for size in 1M 25.6M 100M; do
  step "bench-$size" fedcodec bench --device cuda --sizes "$size" --distribution student-t \
    --output "$OUT/$size"
done
exit "$failed"
