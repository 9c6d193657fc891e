#!/bin/bash
# Builds the CUDA kernels, tests and measures them on a machine with a GPU and without a network.
#   GPU_OUT=/tmp/report GPU_ARCHS=90 benchmarks/gpu_check.sh [build test bench attention tables end sanitize]
# Where time is short, in halves: `build test bench`, then `build attention tables end` with the same GPU_OUT.
# Needs nvcc, cmake, ninja, python3 with torch, transformers, pybind11, pytest and hypothesis. Each step has its own
# time limit and log, and a failed step does not stop the next.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
out=${GPU_OUT:?set GPU_OUT to the folder that takes logs and reports}
archs=${GPU_ARCHS:-90}
steps=${*:-build test bench attention tables end sanitize}
mkdir -p "$out"
export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYSPARSE_CUDA_UNVALIDATED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
failed=""

step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  case " $steps " in *" ${name%%-*} "*) ;; *) return ;; esac
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  tail -n "${TAIL:-25}" "$out/$name.log" | cut -c1-400
  echo "== $name: rc $rc, $((SECONDS - start)) s"
  [ $rc -eq 0 ] || failed="$failed $name"
  python3 benchmarks/gpu_report.py "$out" "$name" $rc $((SECONDS - start))
}

build() {
  nvidia-smi -L
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DPYSPARSE_CUDA=ON "-DPYSPARSE_CUDA_ARCHS=$archs" \
    "-DPython_EXECUTABLE=$(command -v python3)" "-Dpybind11_DIR=$(python3 -m pybind11 --cmakedir)" &&
    cmake --build build/gpu && cmake --install build/gpu --prefix . &&
    python3 -c "from pysparse import backend; print(backend.cuda_missing_reason() or 'CUDA kernels ready', backend.cuda().ARCHITECTURES)"
}
export -f build
export archs

TAIL=6 step build 150 bash -c build
step test 150 python3 -W default -m pytest -q --maxfail=12 --tb=short -rf -p no:cacheprovider -W default \
  -m gpu python_tests/test_cuda.py python_tests/test_attention_gpu.py python_tests/test_tables_gpu.py \
  python_tests/test_shapley_heads_torch.py python_tests/test_interop.py \
  python_tests/test_cuda_engines.py python_tests/test_static_decode.py
TAIL=60 step bench 230 python3 -W default benchmarks/bench_cuda.py --out "$out/cuda.json" --seconds 150
TAIL=40 step attention 120 python3 -W default benchmarks/bench_cuda_attention.py --out "$out/cuda_attention.json"
TAIL=60 step tables 100 python3 -W default benchmarks/bench_cuda_tables.py --out "$out/cuda_tables.json"
TAIL=40 step end 280 python3 -W default benchmarks/bench_cuda_end_to_end.py --out "$out/cuda_end_to_end.json"
if command -v compute-sanitizer >/dev/null; then
  step sanitize-memory 60 compute-sanitizer --tool memcheck --error-exitcode 9 python3 -W ignore python_tests/cuda_sample.py
  step sanitize-races 60 compute-sanitizer --tool racecheck --error-exitcode 9 python3 -W ignore python_tests/cuda_sample.py
fi
echo "failed:${failed:- none}"
[ -z "$failed" ]
