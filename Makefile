# Every target does its own set-up in .venv from a fresh clone; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Warnings are errors here and in CI, not for a user who builds with a newer compiler.
STRICT := -C build-dir=build/dev -C cmake.define.PYSPARSE_WERROR=ON

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench lint format wheel try-wheel sanitize sanitize-thread cuda-check gpu-report clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or later is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/user: $(BIN)/python $(SOURCES)
	$(PIP) -e '.[plot]'
	@touch $@

$(VENV)/dev: $(BIN)/python $(SOURCES)
	$(PIP) -e '.[dev]' $(STRICT)
	@touch $@ $(VENV)/user

demo: $(VENV)/user ## prune, save, load, score and time: writes demo_output/
	$(BIN)/pysparse demo --output demo_output

test: $(VENV)/dev ## the tests that take a few minutes
	$(BIN)/python -m pytest

test-slow: $(VENV)/dev ## all tests
	$(BIN)/python -m pytest --slow

bench: $(VENV)/dev ## the figures of README and benchmarks/README.md, into benchmarks/results/
	$(BIN)/python benchmarks/run_all.py

lint: $(VENV)/dev ## ruff, mypy, clang-format, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/codespell

format: $(VENV)/dev ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# CUDA=ON compiles the CUDA kernels, too: for six GPUs, or for those of CUDA_ARCHS=80,90 alone.
CUDA ?= OFF
CUDA_ARCHS ?=
wheel: $(BIN)/python ## build a wheel and try it in a clean environment; CUDA=ON: with the CUDA kernels
	$(PIP) build
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist -C cmake.define.PYSPARSE_CUDA=$(CUDA) \
		$(if $(CUDA_ARCHS),-C cmake.define.PYSPARSE_CUDA_ARCHS=$(CUDA_ARCHS))
	$(MAKE) try-wheel

TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
try-wheel: ## install the wheel of dist/ beside TORCH=2.11.0 (the pinned one) in a clean environment, and try it
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt >dist/constraints.txt
	$(VENV)-wheel/bin/pip install -q --disable-pip-version-check -c dist/constraints.txt dist/*.whl
	-cd dist && ../$(VENV)-wheel/bin/pysparse doctor  # which also finds fault with the machine: its load, after a build
	cd dist && ../$(VENV)-wheel/bin/python -c "from pysparse import backend; backend.core()"
	if $(PYTHON) -m zipfile -l dist/*.whl | grep /_cuda[.]; then cd dist && ../$(VENV)-wheel/bin/python -c \
		"from pysparse import backend; print('CUDA kernels for', backend.cuda().ARCHITECTURES)"; fi
	cd dist && ../$(VENV)-wheel/bin/pysparse demo --no-speed --windows 2 --output demo_output

# cmake, nvdisasm, NVRTC: what these tests would be skipped without. From a list: `-e .` would compile everything again.
$(VENV)/cuda-check: $(VENV)/dev
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb')) \
		['project']['optional-dependencies']['cuda-check'], sep='\n')" >$@.txt
	$(PIP) -r $@.txt
	@touch $@

cuda-check: $(VENV)/cuda-check ## with nvcc: warnings, registers and machine code, also NVRTC's; link, install and load a build
	command -v nvcc
	cd python_tests && ../$(BIN)/python -c "import test_cuda_code as c, test_cuda_nvrtc as n; \
		assert c.disassembler() and not n.missing(), n.missing() or 'no nvdisasm'"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --slow $(addprefix python_tests/test_cuda_,code.py build.py nvrtc.py)

# A second environment over the first one's packages, so that the instrumented module shadows the plain one.
# $(1): suffix of the environment, $(2): value of PYSPARSE_SANITIZE
define INSTRUMENT
	rm -rf $(VENV)-$(1)
	$(PYTHON) -m venv --without-pip $(VENV)-$(1)
	realpath $(VENV)/lib/python3*/site-packages > $$(echo $(VENV)-$(1)/lib/python3*/site-packages)/dev.pth
	$(BIN)/pip --python $(VENV)-$(1) install -q --disable-pip-version-check --no-deps . \
		-C build-dir=build/$(1) -C cmake.define.PYSPARSE_SANITIZE=$(2)
endef

sanitize: $(VENV)/dev ## kernel and format tests under the address and undefined-behaviour sanitizers
	$(call INSTRUMENT,sanitize,address)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
		$(VENV)-sanitize/bin/python -P -m pytest -s -q -p no:cacheprovider \
		$(addprefix python_tests/test_,$(addsuffix .py,kernels formats int8 nm pairs fused_ops fused_int8 \
		properties attention_kernels norm row_attention rotary embedding lowrank ridge select shapley shapley_entries \
		shapley_rows sparsegpt sparsegpt_int8))

define UNDER_TSAN
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" PYSPARSE_NUM_THREADS=3 \
		TSAN_OPTIONS="suppressions=$(CURDIR)/python_tests/thread_sanitizer.supp die_after_fork=0 exitcode=66" \
		$(VENV)-sanitize-thread/bin/python -P -m pytest -s -q -p no:cacheprovider
endef

# Ours run on three threads whatever torch has: PYSPARSE_NUM_THREADS is above its number. The sanitizer itself ends a
# forked child that starts threads ("dup thread with used id"), so the tests of fork are left to `make test`.
sanitize-thread: $(VENV)/dev ## every kernel on several threads under the thread sanitizer
	$(call INSTRUMENT,sanitize-thread,thread)
	$(call UNDER_TSAN) --slow python_tests/test_threads.py -k "not fork and not grandchildren"
	$(call UNDER_TSAN) $(addprefix python_tests/test_,$(addsuffix .py,attention_kernels embedding fused_ops fused_int8 \
		norm row_attention rotary lowrank ridge select shapley_entries shapley_rows sparsegpt sparsegpt_factor sparsegpt_int8)) -k thread

gpu-report: ## on a machine with a GPU and nvcc: build, test, measure (STEPS=...); writes gpu_report/gpu_report.json
	GPU_OUT=gpu_report benchmarks/gpu_check.sh $(STEPS)

clean: ## remove everything that was built
	rm -rf $(VENV) $(VENV)-wheel $(VENV)-sanitize $(VENV)-sanitize-thread build dist demo_output
