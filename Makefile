# The two commands: `make demo` and `make test`. Everything installs itself into .venv.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed
# Processes of the tests; 0 runs them in one.
WORKERS ?= 2
# Where it is set, every process of a test would compile its modules again.
unexport PYTHONDONTWRITEBYTECODE

# Of `make gpu`: cuda, or cpu.
DEVICE ?= cuda

.PHONY: demo test check gpu campaign release docs install lint types imports fast prose clean

demo: install  ## a study of the published recipe and its cure, answered in a report: five to eight minutes on two cores
	$(BIN)/twinrl ablate run demo

test: install  ## everything that protects users: six to ten minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS)

check: install lint imports prose  ## the developer's quick loop: under two minutes on two cores
	$(MAKE) --output-sync=target --jobs 2 types fast

gpu: install  ## what a GPU does, of any size, in one file for a report: build/gpu/report.md; DEVICE=cpu tries it in small
	$(BIN)/python benchmarks/gpu.py --device $(DEVICE)

campaign: install  ## what takes long, unattended; goes on where it was stopped; table in docs/campaign.md
	$(BIN)/python -m tests.campaign

release: install  ## the fixture of this version, from which every later one must go on; docs/architecture.md
	$(BIN)/python -m tests.versions

docs: $(VENV)/.docs-installed  ## the site, to build/site; look at it with python -m http.server -d build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

install: $(STAMP)

# hpsv2 without its dependencies, for a parity test alone: it pins versions that nothing else can live with.
# torch first: an unpinned one would take several GB of CUDA packages on machines without a GPU.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps -c constraints.txt hpsv2 clint args
	touch $(STAMP)

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

imports:
	$(BIN)/lint-imports

fast:
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not browser and not campaign" -x

# Tells, and does not stop: pages that miss the bar are told with their longest sentences.
prose:
	-$(BIN)/python -m tests.prose

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
