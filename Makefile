# Needs Python >= 3.10, a C++ compiler and a package index; everything else goes into .venv, once.
#
#   make demo     train a robust teacher and its students on real data; table and picture in demo/
#   make test     the test suite, under eight minutes on two cores; PYTEST="-x -k softmax_kl" goes to pytest
#   make test-capabilities   the suite on each instruction set that this processor has, one after the other;
#                 CAPABILITIES="default avx2" chooses
#   make bench    the benchmarks, ten minutes on two cores, into runs/benchmarks; make bench PART=kernels (or
#                 sweep, accuracy, attack, training); make figures draws docs/figures and fills the tables
#   make lint     ruff, mypy, the contracts of imports (pyproject.toml), clang-format
#   make wheel    source distribution and wheel in dist/, and a check of the wheel in an environment of its own
#   make compat   the same wheel on other versions of torch: make compat TORCHES="2.10.0 2.13.0"
#   make gpu      on a machine with a GPU: build, GPU tests and GPU benchmarks, in under nine minutes and without
#                 network; PART=kernels runs one part, LIST=1 names them. Uses python3 where that has torch.
#   make build    compile the kernels in place (incremental)
#   make clean    remove what was built; make distclean removes .venv too
#
# TORCH: what to give pip for torch and torchvision, where the pinned CUDA builds are not wanted, e.g.
#   make test TORCH="--find-links /wheels torch==2.14.1+cpu torchvision==0.29.1+cpu"
# PYTHON, VENV: the interpreter to start from, and the folder of the environment.
# AFM_BUILD_CUDA: CUDA kernels take minutes to compile, so make builds them where there is a GPU to run them;
#   AFM_BUILD_CUDA=1 builds them anyway, with nvcc (see setup.py).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= -r requirements.txt
TORCHES ?= 2.10.0 2.13.0
PYTEST ?= -q
# Processes of one thread each, as many as there are cores up to this.
WORKERS ?= 4

ifeq ($(origin AFM_BUILD_CUDA),undefined)
ifeq ($(wildcard /dev/nvidiactl),)
export AFM_BUILD_CUDA := 0
endif
endif

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help venv build demo test test-capabilities bench bench-smoke figures lint wheel check-wheel compat clean distclean gpu

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

# Two stamps, so that a change of the project's dependencies does not download torch again.
$(VENV)/.torch: requirements.txt
	@echo "== $(VENV): torch (once; several minutes and gigabytes for the CUDA builds)"
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip "setuptools>=77" wheel ninja
	$(PIP) install $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py
	@echo "== $(VENV): this project, editable, with the extras train and dev"
	AFM_BUILD_CPU=0 AFM_BUILD_CUDA=0 $(PIP) install --no-build-isolation --editable ".[train,dev]"
	@touch $@

venv: $(VENV)/.installed

# ninja compiles what changed, and needs a few seconds to see that nothing did.
$(VENV)/.built$(AFM_BUILD_CUDA): $(VENV)/.installed $(CXX_SOURCES)
	@echo "== kernels"
	AFM_BUILD_CPU=1 $(BIN)/python setup.py build_ext --inplace
	@touch $@

build: $(VENV)/.built$(AFM_BUILD_CUDA)

demo: build
	$(BIN)/python -m advfunmatch demo --out demo

# A process that has nothing left to do takes from the others; ten tests that took longest are named.
IN_PROCESSES := -n auto --maxprocesses $(WORKERS) --dist worksteal --durations 10

test: build
	$(BIN)/python -m pytest $(IN_PROCESSES) $(PYTEST)

CAPABILITIES ?= default avx2 avx512
test-capabilities: build
	$(BIN)/python tests/capabilities.py $(CAPABILITIES) -- $(IN_PROCESSES) $(PYTEST)

PART ?= all
bench: build
	$(BIN)/python -m benchmarks --part $(PART)

# Two minutes: every kind of benchmark at small sizes. Fails on wrong answers, never on how long they took.
bench-smoke: build
	$(BIN)/python -m benchmarks --smoke --out runs/smoke

figures: venv
	$(BIN)/python -m benchmarks.report

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@echo "clang-format --dry-run --Werror csrc"
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

wheel: venv
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(MAKE) --no-print-directory check-wheel

# The wheel in an environment of its own that borrows torch and numpy, imported from another folder.
check-wheel:
	rm -rf build/wheel-check
	$(BIN)/python -m venv build/wheel-check
	build/wheel-check/bin/python -m pip --disable-pip-version-check install --quiet --no-index --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/wheel-check/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	cd build/wheel-check && bin/python $(CURDIR)/tests/check_wheel.py

compat: wheel
	PYTHON=$(BIN)/python bash tests/compat.sh $(TORCHES)

# In the environment that is there: nothing is downloaded. LIST=1 needs no torch.
GPU_PYTHON ?= $(shell python3 -c 'import torch' 2>/dev/null && echo python3 || { test -x $(BIN)/python && echo $(BIN)/python || echo python3; })

gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu $(if $(LIST),--list) $(if $(PART),--part $(PART))

clean:
	rm -rf build dist *.egg-info python/*.egg-info afm_kernels/_c*.so $(VENV)/.built*

distclean: clean
	rm -rf $(VENV)
