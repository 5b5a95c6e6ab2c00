# Everything a newcomer needs: `make demo` trains the example, `make test` runs the tests; both set up .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUTPUT ?= output
CXX_FILES := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu')

.PHONY: setup demo test bench lint format wheel clean help

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED)  ## Make .venv with torch and every extra, and build the extension in place

# torch first: the extension is compiled against it (--no-build-isolation), and must see it while it is built.
$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fused_sce needs Python 3.10 or newer, got " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja torch torchvision
	touch $@

$(INSTALLED): $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	$(BIN)/pip install --quiet --no-build-isolation -e '.[examples,bench,test,dev]'
	$(BIN)/python -m fused_sce
	touch $@

demo: setup  ## Train a ResNet-18 on digit canvases with the fused loss (minutes), results in output/demo
	$(BIN)/python examples/train_multilabel_resnet.py --output $(OUTPUT)/demo

test: setup  ## Run all tests
	$(BIN)/python -m pytest

bench: setup  ## Compare the losses' speed, results in output/benchmarks
	$(BIN)/python benchmarks/compare_losses.py --output $(OUTPUT)/benchmarks

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: setup  ## Build wheel and sdist into dist/
	$(BIN)/python -m build --no-isolation

clean:  ## Remove everything that was built, .venv included
	rm -rf $(VENV) build dist *.egg-info $(OUTPUT) fused_sce/*.so fused_sce/_built_for.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
