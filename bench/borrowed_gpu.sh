#!/usr/bin/env bash
# Everything that a GPU lent for ten minutes should show, in the order of its worth, in one command:
#
#     OUT=folder [PYTHON=python3] bench/borrowed_gpu.sh [--dry-run]
#
# both backends right on every case; the headline cases; the GPU tests; the other cases; compute-sanitizer. What is done is
# in $OUT at once, eight files at most, so that a run cut short has lost no more than its last case. Libraries of ours that
# are there and load are used as they are; else they are built for the card at hand. With --dry-run it walks the same path
# on a CPU, where no figure means anything.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:?must name the folder for the results}") PYTHON=${PYTHON:-python3} SECONDS=0
LIMIT=${LIMIT:-575}
DRY=("$@")
BENCH=("$PYTHON" -m bench gpu "${DRY[@]}" --no-tests)
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -d)} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(mktemp -d)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

left() { echo $((LIMIT - SECONDS)); }
at_most() { echo $(($1 < $(left) ? $1 : $(left))); }

facts() {
  "$PYTHON" - "${DRY[@]}" <<'END'
import sys, torch, triton
import mixupe_kernels as mk
from mixupe_kernels.ops.backends import missing_backends
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
print(torch.__version__, triton.__version__, name, mk.available_backends(), missing_backends(), flush=True)
sys.exit(not sys.argv[1:] and not {"cuda", "triton"} <= set(mk.available_backends()))
END
}

build() {
  local folder capability
  folder=$(mktemp -d)
  capability=$("$PYTHON" -c "import torch; print(*torch.cuda.get_device_capability(), sep='')")
  rm -f mixupe_kernels/*.so
  timeout 60 cmake -S . -B "$folder" -G Ninja "-DMIXUPE_CUDA_ARCHITECTURES=$capability" "-DPython_EXECUTABLE=$(command -v "$PYTHON")" &&
    timeout 150 cmake --build "$folder"
}

walk() {
  facts || { build && facts; } || echo "not every backend is here"

  echo "== once"
  timeout "$(at_most 75)" "${BENCH[@]}" --once | grep -v deviation

  echo "== headline cases"
  timeout "$(at_most 200)" "${BENCH[@]}" --quick --seconds "$(at_most 170)" --out "$OUT/quick"
  rm -f "$OUT"/quick/*.png

  echo "== GPU tests"
  timeout "$(at_most 140)" "$PYTHON" -m pytest -m gpu tests/ops tests/test_gpu.py -q -n "$(($(nproc) * 3 / 4 + 1))" --tb=short \
    -p no:cacheprovider > "$OUT/tests.txt" 2>&1
  tail -15 "$OUT/tests.txt" | cut -c1-300

  echo "== other cases"
  if [ "$(left)" -gt 60 ]; then
    timeout "$(left)" "${BENCH[@]}" --rest --seconds "$(($(left) - 30))" --out "$OUT/rest"
    rm -f "$OUT"/rest/*.png "$OUT"/rest/results.json
  fi

  echo "== compute-sanitizer"
  for tool in racecheck memcheck initcheck; do
    [ "$(left)" -gt 60 ] && command -v compute-sanitizer > /dev/null || break
    timeout "$(left)" compute-sanitizer --tool $tool "${BENCH[@]}" --once >> "$OUT/sanitizers.txt" 2>&1
    grep SUMMARY "$OUT/sanitizers.txt" | tail -1
  done
  echo "== done after $SECONDS s"
}

mkdir -p "$OUT"
walk 2>&1 | tee "$OUT/log.txt"
