#!/usr/bin/env bash
# On a machine with a GPU, nvcc and torch: builds for that GPU, tests, looks with compute-sanitizer and measures.
# Leaves logs and figures in $OUT; fails if a step does.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
failed=0

step() {
  local name=$1
  shift
  "$@" >"$OUT/$name.log" 2>&1 || { failed=1; echo "$name failed:"; tail -n 20 "$OUT/$name.log"; }
  echo "$name: $(tail -n 1 "$OUT/$name.log")"
}

nvidia-smi >"$OUT/device.log" 2>&1
FEDCODEC_CUDA=ON step build python3 -m pip install --no-build-isolation --no-deps \
  -C cmake.define.FEDCODEC_CUDA_ARCHITECTURES=native .
step tests python3 -m pytest -q -m gpu tests
# Each time 5,000 others.
for turn in 1 2; do
  HYPOTHESIS_PROFILE=explore step "cases-$turn" python3 -m pytest -q -m gpu tests/test_cuda.py -k any_payload
done
for tool in memcheck racecheck initcheck; do
  step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
    python3 -m pytest -q -m gpu tests/test_cuda.py -k "large or feedback_is"
done
step bench fedcodec bench --device cuda --sizes 1M,25.6M,100M --distribution student-t --output "$OUT"
exit "$failed"
