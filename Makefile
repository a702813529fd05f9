# Every target sets itself up first: Python >= 3.11 and make are enough. A C++ compiler makes 4-bit work faster.
#
#   make demo     train a small model to write SQL, and see what it gained (minutes)
#   make test     all tests                make check    ruff and mypy
#   make bench    the quick benchmarks     make docs     write the generated pages, build the site
#   make demo-data    write the demo's questions and database again, after a change in demo/
#
#   PYTHON=/path/to/python3.12    which Python, if not the first one found
#   TORCH_INDEX=URL               a further index, for a CPU build of torch where pip's own has none (README)
#   WORKERS=2                     test processes            ARGS='-k lora'    more options for pytest

PYTHON ?=
TORCH_INDEX ?=
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
    $(TORCH_INDEX:%=--extra-index-url %)

.PHONY: setup demo test check bench docs demo-data clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11 python; do \
	    "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    if [ "$$python" = python ] || [ -n "$(PYTHON)" ]; then \
	        echo "make: found no Python >= 3.11 that can make environments$(PYTHON:%= under the name %)."; \
	        echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or say where: PYTHON=PATH"; \
	        exit 1; \
	    fi; \
	done; \
	echo "setting up $(VENV) with $$($$python --version) (once; minutes)"; \
	"$$python" -m venv $(VENV)
	$(INSTALL) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/veneer demo --folder runs/demo-$$(date +%Y%m%d-%H%M%S)

# One thread a process: the models are tiny, and threads of several processes would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/hooks.py
	$(BIN)/python benchmarks/kernels.py --quick
	$(BIN)/python benchmarks/openmp_spin.py --rounds 5

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

demo-data: $(STAMP)
	$(BIN)/python -m demo

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
