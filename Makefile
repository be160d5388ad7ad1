# Shortcuts for the newcomer: every target does what it needs first and is quick when nothing
# changed. The work is in CMakePresets.json and scripts/, which can be used without make.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON_ENV := .venv/setup-complete
BINARY := build/release/gateloop
SANITIZERS := asan asan-torch ubsan tsan

.PHONY: help
help:  ## Show this list
	@echo "GateLoop in C++. Start with 'make train' or 'make test'."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Variables:"
	@echo "  DATA='PATH …' train on these files and folders (compressed too) instead of the corpus in data/"
	@echo "  MINUTES=N     how long to train (default: what the preset says)"
	@echo "  PROCESSES=N   train in N processes that share each step (default: 1)"
	@echo "  PRESET=NAME   quick (default), hybrid or enwik8"
	@echo "  OUT=DIR       where the model goes (default: runs/PRESET)"
	@echo "  RUNS='DIR …'  'make report' and 'make watch' show these runs, or the runs in these folders (default: runs)"
	@echo "  ARGS='...'    more flags for 'gateloop train', report, watch or the benchmark (ARGS=--help lists them)"
	@echo "  BASE=REVISION 'make bench' compares with this git revision"
	@echo "  JOBS=N        compile N files at once (default: all cores; a file takes up to 2 GB)"

# ---- Set-up and build -------------------------------------------------------------------------

.PHONY: setup
setup:  ## Install system packages and the Python environment .venv
	@scripts/setup

# setup leaves its marker alone when nothing changed, and then nothing is configured again.
.PHONY: force
$(PYTHON_ENV): force
	@scripts/setup

build/%/configured: CMakePresets.json $(PYTHON_ENV)
	cmake --preset $*
	@touch $@

.PHONY: build
build: build/release/configured  ## Build the program and its libraries: build/release/gateloop
	cmake --build --preset release --target gateloop $(if $(JOBS),--parallel $(JOBS))

.PHONY: build-all
build-all: build/release/configured  ## Build tests, examples and benchmarks too
	cmake --build --preset release $(if $(JOBS),--parallel $(JOBS))

# ---- Tests ------------------------------------------------------------------------------------

.PHONY: test
test: test-cpp test-asan test-python  ## Run the tests, kernels and runtime under AddressSanitizer too

.PHONY: test-cpp
test-cpp: build-all  ## C++ tests only
	ctest --preset release

# Processes of tests side by side: a thread of torch's that waits by spinning takes a core from another.
PYTEST := OMP_WAIT_POLICY=passive .venv/bin/python -m pytest --numprocesses auto --dist loadfile \
  --no-loadscope-reorder

.PHONY: test-python
test-python: build-all  ## Python tests only
	$(PYTEST)

# Where no test asks for the bits or the memory of kernels.
ON_DEFINITIONS := bad_input bidirectional checkpoint decoder decoding diagnostics fusion gate_loop \
  heinsen known_users layers modules operator_arguments ops ops_errors ragged_modules ragged_ops \
  rms_norm torch_tools trajectory transforms vmap_gradients wrapped_modules

.PHONY: test-definitions
test-definitions: build-all  ## Operators and modules by their definitions, which serve other devices than the CPU
	GATELOOP_DEFINITIONS=1 $(PYTEST) $(ON_DEFINITIONS:%=tests/python/test_%.py)

.PHONY: test-sanitizers
test-sanitizers: $(SANITIZERS:%=test-%) test-cuda-bodies  ## Kernel tests under each sanitizer; test-asan-torch: all C++ tests

# The sanitizers of older compilers cannot place their shadow memory where the kernel randomises
# addresses widely; without randomisation they always can.
FIXED_ADDRESSES := $(shell setarch -R true 2>/dev/null && echo setarch -R)

.PHONY: $(SANITIZERS:%=test-%)
$(SANITIZERS:%=test-%): test-%: build/%/configured
	$(FIXED_ADDRESSES) cmake --build --preset $* $(if $(JOBS),--parallel $(JOBS))
	$(FIXED_ADDRESSES) ctest --preset $*

# In the builds of two sanitizers, but only here: each takes minutes to compile.
CUDA_BODIES := $(addprefix recurrence_cuda_,scan_test rms_norm_test ragged_test)

.PHONY: test-cuda-bodies
test-cuda-bodies: build/asan/configured build/ubsan/configured  ## The CUDA kernels on the CPU under two sanitizers
	for sanitizer in asan ubsan; do \
	  $(FIXED_ADDRESSES) cmake --build --preset $$sanitizer --target $(CUDA_BODIES) $(if $(JOBS),--parallel $(JOBS)); \
	  for test in $(CUDA_BODIES); do \
	    UBSAN_OPTIONS=print_stacktrace=1 $(FIXED_ADDRESSES) build/$$sanitizer/$$test; \
	  done; \
	done

.PHONY: test-long
test-long: setup-long test test-definitions test-sanitizers test-architectures fuzz  ## The long tests, the other sanitizers, every GPU's kernels, minutes of fuzzing, before a release
	ctest --preset long
	$(PYTEST) -m long

# For one architecture alone in the other builds: each takes minutes.
.PHONY: test-architectures
test-architectures: $(PYTHON_ENV)  ## The CUDA kernels for every architecture of the packages, where there is nvcc
	@if command -v nvcc > /dev/null; then \
	  cmake --preset architectures && cmake --build --preset architectures && ctest --preset architectures; \
	else echo "test-architectures: left out, no nvcc on PATH"; fi

.PHONY: setup-fuzz setup-long
setup-fuzz setup-long: setup-%:
	@scripts/setup --$*

# As in the preset of tests: libtorch is not instrumented.
DRAW := $(FIXED_ADDRESSES) env ASAN_OPTIONS=detect_leaks=0:detect_container_overflow=0

.PHONY: fuzz
fuzz: setup-fuzz build-all build/asan-torch/configured build/fuzz/configured  ## Broken files and random problems under a sanitizer, for minutes
	$(FIXED_ADDRESSES) cmake --build --preset fuzz $(if $(JOBS),--parallel $(JOBS))
	$(FIXED_ADDRESSES) scripts/fuzz
	$(FIXED_ADDRESSES) cmake --build --preset asan-torch \
	  --target recurrence_differential_test recurrence_ragged_test recurrence_inference_test \
	  recurrence_training_test $(if $(JOBS),--parallel $(JOBS))
	$(DRAW) GATELOOP_DIFFERENTIAL_CASES=10000 build/asan-torch/recurrence_differential_test
	$(DRAW) GATELOOP_DIFFERENTIAL_CASES=1000 build/asan-torch/recurrence_ragged_test --gtest_filter='*RandomCuts*'
	for name in inference training; do \
	  $(DRAW) GATELOOP_DIFFERENTIAL_CASES=1000 build/asan-torch/recurrence_$${name}_test --gtest_filter='*Drawn*' || exit; \
	done
	GATELOOP_CASES=10000 $(PYTEST) tests/python/test_gate_loop_cases.py

# ---- Use --------------------------------------------------------------------------------------

.PHONY: corpus
corpus:  ## Get the training text into data/ (enwik8, or a small sample of Wikipedia)
	@scripts/get_corpus.py

# One word for the shell, quotes included.
quoted = '$(subst ','\'',$(1))'

.PHONY: train
train: build $(if $(DATA),,corpus)  ## Train a model, then sample from it
	@scripts/train.py $(if $(PRESET),--preset=$(call quoted,$(PRESET))) \
	  $(if $(OUT),--out=$(call quoted,$(OUT))) $(if $(DATA),--data=$(call quoted,$(DATA))) \
	  $(if $(MINUTES),--minutes=$(call quoted,$(MINUTES))) \
	  $(if $(PROCESSES),--processes=$(call quoted,$(PROCESSES))) $(ARGS)

GATELOOP_CPP := GATELOOP_OPS_LIBRARY=build/release/lib/libgateloop_ops.so PYTHONPATH=python \
  .venv/bin/python -m gateloop_cpp

# The folders are words of their own.
.PHONY: report
report: build  ## Compare the runs in runs/ on one HTML page: runs/report.html
	@$(GATELOOP_CPP).report $(or $(RUNS),runs) --out runs $(ARGS)

.PHONY: watch
watch: build  ## Draw the losses of the runs in runs/ in the terminal, while they go on
	@$(GATELOOP_CPP).watch $(or $(RUNS),runs) $(ARGS)

.PHONY: bench
bench: build-all  ## Ours, the peers and the machine's floors side by side; BASE=REVISION: ours against it
	.venv/bin/python -m benchmarks.run $(if $(BASE),--base=$(call quoted,$(BASE))) $(ARGS)

# Other threads than one a run, or other work beside it, make seconds that say nothing.
EXPERIMENTS = GATELOOP_OPS_LIBRARY=build/release/lib/libgateloop_ops.so PYTHONPATH=python:. \
  .venv/bin/python -m experiments $(if $(DATA),--data=$(call quoted,$(DATA))) $(ARGS)

.PHONY: experiments experiments-long
experiments: build  ## Run the experiments' short form, and write docs/experiments.md; a stopped one goes on
	@$(EXPERIMENTS)

experiments-long: build  ## The same with ten times the steps: days
	@$(EXPERIMENTS) --long

.PHONY: gpu-check
gpu-check:  ## On a machine with an NVIDIA GPU: its tests, sanitizers and benchmark (PYTHON=... with torch)
	$(or $(PYTHON),python3) scripts/gpu_check.py $(ARGS)

# ---- Care -------------------------------------------------------------------------------------

.PHONY: format
format: $(PYTHON_ENV)  ## Lay out all C++ and Python
	@scripts/format

.PHONY: lint
lint: build/dev/configured  ## Check layout, C++ (clang-tidy) and Python (ruff, mypy)
	@scripts/lint

.PHONY: clean
clean:  ## Remove build/ (.venv, data and runs stay)
	rm -rf build
