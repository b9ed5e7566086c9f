# Everything runs from .venv, made on first use and renewed when pyproject.toml or constraints.txt changes.
#
#   PYTHON=python3.12       the interpreter .venv is made with (3.11 or newer)
#   PIP_ARGS="..."          passed to pip, as in PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   SYSTEM_TORCH=1          take torch from PYTHON's own packages; `make clean` before changing it
#   ARGS="..."              passed to what the target runs: make study ARGS="--seeds 1", make test ARGS="-k page"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PIP = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS)

# One thread per test process (two processes); no test may reach the network.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv study test test-long lint build audit results located clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*##' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@sed -n '2,6s/^# \{0,1\}//p' $(MAKEFILE_LIST)

study: $(CORE)  ## run the default study, on the embedded models
	$(BIN)/attribution study $(ARGS)

test: $(DEV)  ## run all tests but the long ones
	$(PYTEST) $(ARGS)

test-long: $(DEV)  ## run the long tests (hours): rebuilt worlds, kills, calibration, full fuzz
	$(PYTEST) -m long $(ARGS)

lint: $(DEV)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

build: $(DEV)  ## write the source distribution and the wheel to dist/, the same bytes each time
	$(BIN)/python -m build --no-isolation

audit: $(VENV)/.installed-audit  ## known vulnerabilities of the pinned versions (asks pypi.org; unanswered is failed)
	$(VENV)/audit/bin/python -m pip_audit --strict --no-deps --disable-pip -r constraints.txt $(ARGS)

results: $(CORE)  ## run the reference studies and write results/; finished runs are kept
	$(BIN)/python -m experiments.worlds
	$(BIN)/python -m experiments.boost
	$(BIN)/python -m experiments.recipes_compared
	$(BIN)/python -m experiments.sampling_or_update --out results/sampling
	$(BIN)/python -m experiments.recruited --out results/recruited
	$(BIN)/python -m experiments.pool
	$(BIN)/python -m experiments.knob --out results/knob
	$(BIN)/python -m experiments.dormant --out results/dormant
	$(BIN)/python -m experiments.two_notions --out results/notions
	$(BIN)/python -m experiments.precision --out results/precision
	$(BIN)/python -m experiments.scores --out results/accuracy
	$(BIN)/python -m experiments.calibration
	$(BIN)/python -m experiments.ledger
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.pages
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.speed
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.memory
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.accuracy

located: $(CORE)  ## build 18 more bases and run the crossover on them (hours); what is finished is kept
	$(BIN)/python -m experiments.boost_located --out results/located
	$(BIN)/python -m experiments.calibration
	$(BIN)/python -m experiments.ledger

venv: $(DEV)  ## make .venv with the development tools

clean:  ## remove .venv, builds and caches; runs/ and results/ stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(CORE): pyproject.toml constraints.txt
	$(call install,.)

$(DEV): pyproject.toml constraints.txt
	$(call install,.[dev])
	@touch $(CORE) $@

# In an environment of its own: what pip-audit needs is no business of the tests.
$(VENV)/.installed-audit: constraints.txt
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt pip-audit
	@touch $@

# torch goes first and under its pin, so that the resolver never fetches another build of it. With SYSTEM_TORCH it is
# the one torch there is, of whatever version in the range, and has no pin.
define install
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
	$(if $(SYSTEM_TORCH),@$(BIN)/python -c $(HAS_TORCH))
	@grep -v $(if $(SYSTEM_TORCH),'^torch==','^$$') constraints.txt > $(VENV)/constraints.txt
	$(PIP) -c $(VENV)/constraints.txt "torch>=2.8,<3"
	$(PIP) -c $(VENV)/constraints.txt -e "$(1)"
	@touch $@
endef

HAS_TORCH := "import sys, importlib.metadata as m; \
have = [d.version for d in m.distributions(name='torch')] + ['none']; \
sys.exit(0 if have[0] != 'none' and (2, 8) <= tuple(map(int, have[0].split('.')[:2])) < (3, 0) else \
'SYSTEM_TORCH=1 needs torch>=2.8,<3 among the packages of $(PYTHON) outside any venv; found ' + have[0] + '; install one there or leave SYSTEM_TORCH out')"
