# Everything a newcomer needs: `make demo` trains the example, `make test` runs the tests; both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUTPUT ?= output
OUT ?= $(OUTPUT)/gpu
# What is installed as torch; another version for its tests: make test TORCH='torch==2.11.0 torchvision'
TORCH ?= torch torchvision
# The extras of .venv. Building a wheel takes `dev` alone.
DEVELOP ?= examples,ecosystem,bench,test,dev,docs
# The toolkit of `make nvcc`, for setup.py and the tests.
NVCC := $(abspath $(firstword $(wildcard $(BIN)/../lib/python3*/site-packages/nvidia/cu*/bin/nvcc)))
ifneq ($(NVCC),)
export CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(NVCC))
endif
CXX_FILES := $(shell find csrc tests/cpp tests/ptx benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup nvcc demo demo-emoji test fuzz sweep sweep-aarch64 sweep-heads kernel sleef sanitize gpu-code bench gpu-check lint \
  format docs wheel try-wheel check-tag clean help

help:  ## List the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(INSTALLED)  ## Make .venv with torch and every extra, and build the core in place

# torch first: the core is compiled with its headers (--no-build-isolation).
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fused_sce needs Python 3.10 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja $(TORCH)
	touch $@

$(INSTALLED): $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/pip install --quiet --no-build-isolation -e '.[$(DEVELOP)]'
	$(BIN)/python -m fused_sce
	touch $@

# As wheels. torch depends on the cuda-toolkit of its own CUDA version, which pip keeps.
nvcc: $(VENV)/.torch  ## Install the nvcc that goes with torch's CUDA into .venv, for machines without a CUDA toolkit
	$(BIN)/pip install --quiet 'cuda-toolkit[nvcc,cccl]'

demo: setup  ## Train a ResNet-18 on digit canvases with the fused loss (minutes), results in output/demo
	$(BIN)/python examples/train_multilabel_resnet.py --output $(OUTPUT)/demo

EMOJI := $(OUTPUT)/emoji-pictures
demo-emoji: setup  ## Train on one artist's emoji and test on another's, 621 tags (needs npm; minutes), results in output/emoji
	$(BIN)/python examples/emoji_pictures.py $(EMOJI)
	$(BIN)/python examples/train_multilabel_resnet.py --images $(EMOJI) --labels $(EMOJI)/google.csv --label-column tags \
	  --group-column group --test-labels $(EMOJI)/twitter.csv --image-size 64 --epochs 8 --output $(OUTPUT)/emoji

# Whole files go to each process, so that what a module builds is built once. A process that crashes fails the test it was at.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0
test: setup  ## Run all tests, in two processes
	$(BIN)/python -m pytest $(PARALLEL)

CASES ?= 100000
SEED ?= 0
fuzz: setup  ## Run CASES=100000 random cases of everything at once, from number SEED=0 on, against an oracle (minutes)
	$(BIN)/python tests/fuzz.py --cases $(CASES) --seed $(SEED) --processes 2

# The kernels' flags, as in setup.py.
KERNEL_FLAGS := -std=c++17 -fno-math-errno -fno-trapping-math -ffp-contract=off -Wall -Wextra
KERNELS := $(filter-out csrc/cpu/op.cpp,$(wildcard csrc/cpu/*.cpp))  # op.cpp needs torch
build/sweep: tests/cpp/sweep.cpp $(wildcard csrc/*.h csrc/formulas/* csrc/cpu/*)
	mkdir -p build
	$(CXX) -O3 $(KERNEL_FLAGS) tests/cpp/sweep.cpp $(KERNELS) -o $@ -lpthread

sweep: build/sweep  ## Check every float32, bfloat16 and float16 logit against float64 (minutes)
	build/sweep 1

# Each of the 65,536 patterns of the 16-bit types and every STEP-th of float32. Needs Debian's or Ubuntu's g++-aarch64-linux-gnu
# and qemu-user-static.
AARCH64 ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64-static
STEP ?= 1009
build/sweep-aarch64: tests/cpp/sweep.cpp $(wildcard csrc/*.h csrc/formulas/* csrc/cpu/*)
	mkdir -p build
	$(AARCH64) -static -O3 $(KERNEL_FLAGS) tests/cpp/sweep.cpp $(KERNELS) -o $@ -lpthread

sweep-aarch64: build/sweep-aarch64  ## Check the NEON kernels under emulation: every STEP=1009-th float32 logit, all 16-bit ones (minutes)
	$(QEMU) $< $(STEP)

sweep-heads: setup  ## Replace the head of every family of timm, torchvision and Hugging Face models (minutes)
	$(BIN)/python tools/sweep_heads.py --table docs/heads_table.md

build/kernel: benchmarks/kernel.cpp $(wildcard csrc/*.h csrc/formulas/* csrc/cpu/*)
	mkdir -p build
	$(CXX) -O3 -g $(KERNEL_FLAGS) benchmarks/kernel.cpp $(KERNELS) -o $@

kernel: build/kernel  ## Time the CPU kernels alone, without torch, for every instruction set
	build/kernel

build/sleef: benchmarks/sleef.cpp $(wildcard csrc/*.h csrc/formulas/* csrc/cpu/*)
	mkdir -p build
	$(CXX) -O3 $(KERNEL_FLAGS) -Wno-psabi benchmarks/sleef.cpp $(KERNELS) -o $@ -lsleef

sleef: build/sleef  ## Time the CPU kernels against the same loop on SLEEF (x86-64, needs libsleef-dev)
	build/sleef

# cuda_threads runs the CPU kernels on every type, stride and odd length, from arrays that end where their memory ends. It
# compares with what a GPU does, so with fused multiply-add throughout.
SANITIZE := $(CXX) -O1 -g -fno-sanitize-recover=all $(KERNEL_FLAGS)
FMA := $(if $(filter x86_64,$(shell uname -m)),-mfma)
# The last two lines: the whole core, called from many Python threads. The thread sanitizer wants its runtime loaded
# first, and addresses that it knows (Linux may place memory where it keeps its shadow).
FIXED_ADDRESSES := setarch $(shell uname -m) --addr-no-randomize
sanitize: setup  ## Run the kernels under the address, undefined-behaviour and thread sanitizers
	mkdir -p build/sanitize
	$(SANITIZE) -fsanitize=address,undefined $(FMA) tests/cpp/cuda_threads.cpp $(KERNELS) -o build/sanitize/cuda_threads
	build/sanitize/cuda_threads
	$(SANITIZE) -fsanitize=address,undefined tests/cpp/sweep.cpp $(KERNELS) -o build/sanitize/sweep -lpthread
	build/sanitize/sweep 10007
	$(SANITIZE) -fsanitize=thread tests/cpp/sweep.cpp $(KERNELS) -o build/sanitize/sweep_threads -lpthread
	build/sanitize/sweep_threads 100003
	CFLAGS='-fsanitize=thread -g -Wno-tsan' LDFLAGS=-fsanitize=thread FUSED_SCE_CUDA=0 $(BIN)/python setup.py --quiet build \
	  --build-lib build/sanitize/extension --build-temp build/sanitize/objects
	PYTHONPATH=build/sanitize/extension LD_PRELOAD="$$($(CXX) -print-file-name=libtsan.so)" $(FIXED_ADDRESSES) \
	  $(BIN)/python tests/concurrent_calls.py

gpu-code: setup  ## Run the compiled CUDA kernels in an interpreter, and with defects (needs nvcc, no GPU; minutes)
	$(BIN)/python tests/ptx/run.py

bench: setup  ## Compare the losses' speed and check the promised ratios, results in output/benchmarks
	$(BIN)/python benchmarks/compare_losses.py --output $(OUTPUT)/benchmarks
	$(BIN)/python benchmarks/cpu_speed.py --output $(OUTPUT)/benchmarks

# With the torch that is there, .venv's if there is one: nothing is installed.
gpu-check:  ## Prove the CUDA kernels on the GPU of this machine (nine minutes), report in OUT=output/gpu
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/gpu_check.py $(OUT)

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: setup  ## Build the documentation into output/docs, strictly
	$(BIN)/mkdocs build --strict
	$(BIN)/python tools/check_docs.py

# One file for every torch from 2.11 on and every Python from 3.10 on. auditwheel finds the manylinux tag; torch's libraries
# stay where they are.
wheel: setup  ## Build wheel and sdist into dist/, and run a few lines on the wheel
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(BIN)/pip install --quiet --no-deps --target build/wheel/installed dist/*.whl
	cd build && PYTHONPATH=wheel/installed ../$(BIN)/python ../tests/smoke.py
	ls -l dist

# In a folder without the package's sources: what is imported is the wheel.
TRY := build/try-wheel
EXTRAS ?= test,examples,bench
try-wheel:  ## Run all tests on the wheel in dist/, with PYTHON and TORCH of your choice
	rm -rf $(TRY)
	$(PYTHON) -m venv $(TRY)
	$(TRY)/bin/pip install --quiet $(TORCH)
	$(TRY)/bin/pip install --quiet "$$(ls $(CURDIR)/dist/*.whl)[$(EXTRAS)]"
	mkdir $(TRY)/source
	cp -r setup.py pyproject.toml Makefile README.md csrc docs tests tools benchmarks examples $(TRY)/source
	cd $(TRY)/source && ../bin/python -m fused_sce && ../bin/python tests/smoke.py && ../bin/python -m pytest $(PARALLEL) $(PYTEST)

VERSION := $(shell sed -n 's/^__version__ = "\([^"]*\)".*/\1/p' fused_sce/__init__.py)
check-tag:  ## Check that TAG=v1.2.3 is the version, and that the changelog has it with a date
	@test "$(TAG)" = "v$(VERSION)" || { echo "the tag is '$(TAG)', but fused_sce/__init__.py has $(VERSION)" >&2; exit 1; }
	@grep -qE '^## \[$(VERSION)\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$' CHANGELOG.md \
	  || { echo "CHANGELOG.md has no line '## [$(VERSION)] - YYYY-MM-DD'" >&2; exit 1; }

clean:  ## Remove everything that was built, .venv included
	rm -rf $(VENV) build dist *.egg-info $(OUTPUT) fused_sce/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
