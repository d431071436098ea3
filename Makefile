# make demo   set everything up, then train on handwritten digits: the results are in runs/demo
# make test   set everything up, then run every test
# make gpu    build for the GPU that is here, test and measure, with the installed packages: results in runs/gpu
# make soak   break things on purpose, at most 20 minutes on two cores; make coverage: the lines that the tests run
# make docs   build the documents' site into build/site, with every link between its pages checked
# make evidence  measure what docs/evidence.md and docs/comparison.md show (long, 10 GiB); make readme writes it
# The first two need nothing but Python 3.10 to 3.13 (PYTHON=python3.x names one) and a C++ compiler.

PYTHON ?= python3
BIN := .venv/bin
# Not compiled to bytecode: most of 17,000 modules are never imported.
PIP_INSTALL := $(BIN)/pip --disable-pip-version-check install --no-compile --constraint constraints.txt
# But written once they are: in a process that may not, importing torch takes two seconds more, every time.
unexport PYTHONDONTWRITEBYTECODE
NATIVE_SOURCES := $(shell find csrc -type f)

.PHONY: venv demo test lint docs bench soak coverage evidence gpu readme clean

venv: .venv/installed

demo: venv
	$(BIN)/densenet-efficient fit --config demo --output runs/demo

# Tests that need a process of their own run beside the others, and are reported after them. More processes than cores:
# a thread that waits by spinning would take another's time.
test: export OMP_WAIT_POLICY = passive
test: venv
	@mkdir -p build
	@$(BIN)/pytest -m own_process >build/own_process.log 2>&1 & own=$$!; \
	$(BIN)/pytest -m "not own_process" --numprocesses auto --dist worksteal; others=$$?; \
	wait $$own; own=$$?; cat build/own_process.log; exit $$((own || others))

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE_SOURCES)

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: venv
	$(BIN)/python -m benchmarks.run

# At most 20 minutes on two cores, the compilation with sanitizers included.
soak: venv
	$(BIN)/python -m benchmarks.soak

# Of Python by the whole suite, of csrc by the tests of the kernels in an extension that counts its lines.
coverage: venv
	$(BIN)/python -m benchmarks.coverage

evidence: venv
	$(BIN)/python -m benchmarks.evidence

# With what is installed: a machine with a GPU need not reach a package registry.
gpu: GPU_PYTHON := $(or $(wildcard $(BIN)/python),$(PYTHON))
gpu:
	@$(GPU_PYTHON) -c 'import torch' 2>/dev/null || { echo 'make gpu: $(GPU_PYTHON) has no torch; name one that has with PYTHON=' >&2; exit 1; }
	@$(GPU_PYTHON) -m benchmarks.gpu --output runs/gpu

readme: venv
	$(BIN)/python -m benchmarks.report
	$(BIN)/python docs/scripts/figures.py

clean:
	rm -rf build dist *.egg-info densenet_efficient/*.so .venv/installed

# The native build is compiled against the installed torch, so torch and the build tools come first.
.venv/build-tools: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) setuptools ninja numpy torch
	touch $@

.venv/installed: .venv/build-tools pyproject.toml setup.py $(NATIVE_SOURCES)
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@
