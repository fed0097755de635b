# The project's commands; `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.setup
FLOOR := .venv-floor/.setup

# The generators of the stubs; docs/decisions/0001-stubs.md gives the reasons. The stamp's name has their versions.
STUBS := grpcio-tools==1.71.2 mypy-protobuf==3.6.0 protobuf==5.29.6
PROTO := .venv-proto/.setup-$(subst $() ,-,$(subst ==,-,$(STUBS)))

# The folders that `make check` covers, if they exist.
SOURCES := $(wildcard client server proto/generate.py tests examples benchmarks)

# `buf breaking` compares with the last release, or before the first one with the last commit.
BUF_AGAINST ?= $(shell git describe --tags --abbrev=0 --match 'v[0-9]*' 2>/dev/null || git rev-parse --verify --quiet HEAD 2>/dev/null)

.PHONY: help setup demo test test-deep test-floor simulate chaos check stubs buf proto languages bench bench-peers clean

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20
	@echo "TORCH_INDEX_URL=URL takes torch from another index, for instance its CPU builds; PYTHON=... another Python."

setup: $(SETUP) ## make only the environment .venv

demo: $(SETUP) ## train digits with a server and two workers
	@exec $(BIN)/deltaserve train digits --workers 2 --policy sync

# Tests spend much of their time waiting or in child processes: hence one process more than a small machine has cores.
# `worksteal` gives each process a contiguous part of the tests, so that most fixtures of a module are created once.
PYTEST_JOBS = --numprocesses $(or $(JOBS),$(if $(PYTEST_ARGS),0,3)) --dist worksteal --durations 15 --durations-min 1

test: $(SETUP) ## run the fast tier, JOBS=3 at a time; or some, one at a time, as PYTEST_ARGS="-k name" says
	@$(BIN)/pytest $(PYTEST_JOBS) $(PYTEST_ARGS)

test-deep: $(SETUP) ## run the deep tier: chaos, storms, kill matrices, long simulations; a failed test runs again, alone
	@$(BIN)/python -m tests.support.deep $(PYTEST_JOBS) $(PYTEST_ARGS)

test-floor: $(FLOOR) $(SETUP) ## run the client at the oldest versions it supports
	@cd .venv-floor && bin/python -I -W error -c 'import deltaserve; print("import deltaserve:", *deltaserve.__all__)'
	@$(BIN)/python tests/floor/run.py .venv-floor/bin/python
	@status=0; .venv-floor/bin/deltaserve || status=$$?; test "$$status" = 2

chaos: $(SETUP) ## kill, stop and cut until TRIALS=1000 faults have fired; SEED=1, CHAOS_ARGS for more
	@$(BIN)/python tests/chaos/chaos.py --trials $(or $(TRIALS),1000) --seed $(or $(SEED),1) $(CHAOS_ARGS)

simulate: $(SETUP) ## run EVENTS=1000000 random events through the state machine; SEED=0
	@$(BIN)/python tests/simulation/run.py --events $(or $(EVENTS),1000000) --seed $(or $(SEED),0)

check: $(SETUP) stubs buf ## format, lint, types, stubs, and buf where it is installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)

stubs: $(PROTO)
	PATH="$(CURDIR)/.venv-proto/bin:$$PATH" .venv-proto/bin/python proto/generate.py --check

buf:
	@if ! command -v buf >/dev/null; then echo "buf is not installed: proto/ is not linted"; \
	else \
	  echo "buf lint proto"; buf lint proto; \
	  if git cat-file -e '$(BUF_AGAINST):proto/buf.yaml' 2>/dev/null; then \
	    echo "buf breaking proto --against $(BUF_AGAINST)"; \
	    buf breaking proto --against '.git#ref=$(BUF_AGAINST),subdir=proto'; \
	  fi; \
	fi

proto: $(PROTO) ## make the stubs from proto/
	PATH="$(CURDIR)/.venv-proto/bin:$$PATH" .venv-proto/bin/python proto/generate.py

languages: ## generate and compile the stubs of C++, Java and Go, with Debian's packages
	@proto/compile_stubs.sh

bench: $(SETUP) ## run the benchmarks; BENCH_ARGS="--quick --json FILE" goes to them
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-peers: $(SETUP) ## set up the peers in .venv-peers, then run them and deltaserve by turns
	@$(MAKE) --no-print-directory --keep-going $(PEERS:%=.venv-peers/%/.setup) || echo "Peers that are not installed are left out."
	@$(BIN)/python -m benchmarks --only peers $(BENCH_ARGS)

clean: ## remove the environments and all other generated files
	rm -rf .venv .venv-proto .venv-floor .venv-peers .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find client server proto tests examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# --- the environments ---------------------------------------------------------------------------

# $(call environment,FOLDER): creates an empty environment, or prints one line that says what is missing.
define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "deltaserve needs Python 3.11 or newer as $(PYTHON), or say which: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) lacks its venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(1)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(1)
endef

# $(call install,FOLDER,ARGUMENTS): runs pip and prints only large downloads and errors; FOLDER/setup.log has the rest.
define install
	@set -o pipefail; $(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off --log $(1)/setup.log $(2) 2>&1 \
	  | sed -unE -e 's/%2B/+/' \
	    -e 's/^ *(Downloading|Using cached) (.*\/)?([^-]+-[^-]+)-[^ ]* (\(([0-9]{2,}\.[0-9]|[0-9]{3,}) MB\))$$/  \3 \4/p' \
	    -e 's/^Installing collected packages:.*/  unpacking, which can take a minute/p' -e '/^ERROR/p' \
	  || { echo "The installation failed; $(1)/setup.log has the details." >&2; exit 1; }
endef

$(SETUP): pyproject.toml constraints.txt
	@echo "Setting up .venv"
	$(call environment,.venv)
ifdef TORCH_INDEX_URL
	$(call install,.venv,--no-deps --index-url '$(TORCH_INDEX_URL)' "$$(grep '^torch==' constraints.txt)")
endif
	$(call install,.venv,--constraint constraints.txt --editable '.[dev]')
	@touch $@

$(PROTO):
	@echo "Setting up .venv-proto"
	$(call environment,.venv-proto)
	$(call install,.venv-proto,$(STUBS) 'setuptools<81')
	@touch $@

$(FLOOR): pyproject.toml constraints-floor.txt
	@echo "Setting up .venv-floor"
	$(call environment,.venv-floor)
	$(call install,.venv-floor,--constraint constraints-floor.txt --editable .)
	@touch $@

# The peers that benchmarks compare with, each in its own environment. benchmarks/peers/ uses the same names.
PEERS := torch_rpc tensorflow_ps ray_actor grpc_naive
PINNED = $(shell grep -E '^($(1))==' constraints.txt)
torch_rpc := $(call PINNED,torch|numpy)
tensorflow_ps := tensorflow-cpu==2.21.0 tf-keras==2.21.0
ray_actor := ray==2.60.0 $(call PINNED,torch|numpy)
grpc_naive := grpcio==1.85.1 grpcio-tools==1.85.1 $(call PINNED,torch|numpy)

.venv-peers/%/.setup: constraints.txt
	@echo "Setting up .venv-peers/$*"
	$(call environment,.venv-peers/$*)
ifdef TORCH_INDEX_URL
	$(call install,.venv-peers/$*,--no-deps --index-url '$(TORCH_INDEX_URL)' "$$(grep '^torch==' constraints.txt)")
endif
	$(call install,.venv-peers/$*,$($*))
	@touch $@
