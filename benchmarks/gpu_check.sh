#!/bin/bash
# Builds the CUDA kernels, tests and measures them on a machine with a GPU and without a network.
#   GPU_OUT=/tmp/report GPU_ARCHS=90 benchmarks/gpu_check.sh [build test nvrtc sanitize bench attention tables end]
# Takes at most GPU_SECONDS (540): a step gets what is left, and is noted as left out when that is too little. An H200
# has taken 430 s for all but sanitize; in halves the limits of all steps fit: `build test nvrtc sanitize bench`, then
# `build attention tables end` with the same GPU_OUT. `peers` is a step for itself: others' kernels, with
# PEERS="--flash-llm LIBRARY --spinfer LIBRARY" where these have been built.
# Needs nvcc, cmake, ninja, python3 with torch, transformers, pybind11, pytest and hypothesis, and GPU_COMMIT, the
# commit of the sources, where these come without .git. Each step has its own time limit and log. A failed step does
# not stop the next, but nothing runs on kernels that could not be built. The report is whole after each.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
out=${GPU_OUT:?set GPU_OUT to the folder that takes logs and reports}
archs=${GPU_ARCHS:-90}
known="build test nvrtc sanitize bench attention tables peers end"
steps=${*:-build test nvrtc sanitize bench attention tables end}
seconds=${GPU_SECONDS:-540}
least=20  # no step is worth starting for less
for name in $steps; do
  case " $known " in
    *" $name "*) ;;
    *) echo "unknown step '$name': choose from $known" >&2; exit 2 ;;
  esac
done
GPU_COMMIT=$(python3 -c "import sys; sys.path.insert(0, 'benchmarks'); import gpu_report; print(gpu_report.commit() or '')")
if [ -z "$GPU_COMMIT" ]; then
  echo "set GPU_COMMIT to the commit of these sources: there is no .git to ask" >&2
  exit 2
fi
mkdir -p "$out" || exit 2
export GPU_COMMIT PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYSPARSE_EXPERIMENTAL=1
export PYSPARSE_REQUIRE_GPU=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=""
unbuilt=""

note() {  # note NAME EXIT_CODE SECONDS
  python3 benchmarks/gpu_report.py "$out" "$@" || failed="$failed report-of-$1"
}

left_out() {  # left_out NAME EXIT_CODE WHY
  echo "== $1: left out: $3"
  echo "left out: $3" >"$out/$1.log"
  failed="$failed $1"
  note "$1" "$2" 0
}

step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS left=$((seconds - SECONDS))
  shift 2
  case " $steps " in *" ${name%%-*} "*) ;; *) return ;; esac
  if [ -n "$unbuilt" ]; then left_out "$name" 125 "the build failed"; return; fi
  if [ "$left" -lt $least ]; then left_out "$name" 124 "$left of $seconds s are left"; return; fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  tail -n "${TAIL:-25}" "$out/$name.log" | cut -c1-400
  echo "== $name: rc $rc, $((SECONDS - start)) s"
  if [ $rc -ne 0 ]; then
    failed="$failed $name"
    [ "$name" != build ] || unbuilt=1
  fi
  note "$name" $rc $((SECONDS - start))
}

build() {
  nvidia-smi -L &&
    cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DPYSPARSE_CUDA=ON "-DPYSPARSE_CUDA_ARCHS=$archs" \
      "-DPython_EXECUTABLE=$(command -v python3)" "-Dpybind11_DIR=$(python3 -m pybind11 --cmakedir)" &&
    cmake --build build/gpu && cmake --install build/gpu --prefix . &&
    python3 -c "import sys; from pysparse import backend; print(backend.cuda().ARCHITECTURES); sys.exit(backend.cuda_missing_reason() or 0)"
}
export -f build
export archs

# What the steps took on an H200: build 62 s, test 51, nvrtc 39, bench 54, attention 51, tables 45, end 125 before it
# had two more engines, which need some 40.
TAIL=6 step build 100 bash -c build
# Six processes share the GPU where pytest-xdist is there: most of the time goes to CPU references.
workers=$(python3 -c "import xdist; print('-n 6')" 2>/dev/null)
# shellcheck disable=SC2086  # several words
step test 140 python3 -W default -m pytest -q --maxfail=12 --tb=short -rfE -p no:cacheprovider -W default $workers \
  -m gpu python_tests/test_cuda.py python_tests/test_attention_gpu.py python_tests/test_tables_gpu.py \
  python_tests/test_shapley_heads_torch.py python_tests/test_interop.py \
  python_tests/test_cuda_engines.py python_tests/test_static_decode.py python_tests/test_stacked.py
# For the GPU that is here, as if the build had no code for it.
step nvrtc 70 env PYSPARSE_CUDA_NVRTC=1 "PYSPARSE_CACHE_DIR=$out/cache" python3 -W default -m pytest -q --tb=short -rfEs \
  -p no:cacheprovider -W default -m gpu python_tests/test_cuda_nvrtc_gpu.py
# Without compute-sanitizer these two fail, and the report says so.
step sanitize-memory 60 compute-sanitizer --tool memcheck --error-exitcode 9 python3 -W ignore python_tests/cuda_sample.py
step sanitize-races 60 compute-sanitizer --tool racecheck --error-exitcode 9 python3 -W ignore python_tests/cuda_sample.py
TAIL=60 step bench 100 python3 -W default benchmarks/bench_cuda.py --out "$out/cuda.json" --seconds 60
TAIL=40 step attention 90 python3 -W default benchmarks/bench_cuda_attention.py --out "$out/cuda_attention.json"
TAIL=60 step tables 90 python3 -W default benchmarks/bench_cuda_tables.py --out "$out/cuda_tables.json"
# shellcheck disable=SC2086  # several words
TAIL=40 step peers 240 python3 -W default benchmarks/bench_cuda_peers.py --out "$out/cuda_peers.json" ${PEERS:-}
TAIL=40 step end 250 python3 -W default benchmarks/bench_cuda_end_to_end.py --out "$out/cuda_end_to_end.json"
echo "failed:${failed:- none}"
[ -z "$failed" ]
