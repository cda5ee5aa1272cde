# Everything a person does with this repository, one word each. `make` alone lists them.

PYTHON ?= python3
BUNDLE ?= $(or $(FACETEER_BUNDLE),deploy/bundles/postcards)
ADDRESS ?= 127.0.0.1:50050
# A machine without a GPU can take PyTorch's smaller CPU build: set this to the address of PyTorch's CPU wheel index
# (pytorch.org, "Get started", compute platform CPU). torch and torchvision then both come from there.
TORCH_INDEX ?=
PYTEST_ARGS ?=
MUTATION_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
MEMBERS := clients/python[cli] services/runtime[heic] services/encoder[onnx] services/sae services/generator services/library \
	services/studio services/gateway services/trainer[ray,onnx] services/postcards
# Constraints by environment variable: unlike -c it also replaces one that pip's own configuration may hold.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo up down test lint unit integration mutation protos client format clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed ## set up .venv with every member and its tools

$(VENV)/installed: constraints.txt pyproject.toml tests/originals.txt $(wildcard clients/*/pyproject.toml services/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Faceteer needs Python 3.11 or newer; set PYTHON=python3.11 or the like")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	@if [ -n "$(TORCH_INDEX)" ]; then $(BIN)/python -m pip install -q --index-url "$(TORCH_INDEX)" torch torchvision; fi
	@$(BIN)/python -m pip install -q --group dev $(foreach member,$(MEMBERS),-e '$(member)')
	@PIP_CONSTRAINT= $(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/originals -r tests/originals.txt
	@touch $@

demo: setup ## open a picture, print its features, edit it twice, show before and after
	@$(BIN)/python deploy/demo.py --bundle $(BUNDLE)

up: setup ## start a server and leave it running; other bundles and ports: BUNDLE=DIR ADDRESS=127.0.0.1:PORT
	@$(BIN)/python deploy/local_server.py up --address $(ADDRESS) --bundle $(BUNDLE)

down: ## stop the server that `make up` started, at ADDRESS if given
	@$(BIN)/python deploy/local_server.py down --address $(ADDRESS)

test: setup lint ## lint, then every test (a real Redis included)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup ## ruff, mypy, import-linter, buf, generated code, compose file, Dockerfile
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q . || { echo "run make format"; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python protos/generate.py --check
	@$(BIN)/python clients/python/unasync.py --check
	@$(BIN)/buf lint
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml deploy/compose.gpu.yml
	@$(BIN)/hadolint deploy/Dockerfile

unit: setup ## only the quick tests of single members
	@$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

integration: setup ## only the tests through real servers and processes
	@$(BIN)/python -m pytest tests/contract tests/integration tests/e2e $(PYTEST_ARGS)

mutation: $(VENV)/mutation/installed ## how many random faults in the domain modules the unit tests notice
	@PYTHONPATH=$(CURDIR)/$(VENV)/mutation $(BIN)/python tests/mutation.py $(MUTATION_ARGS)

$(VENV)/mutation/installed: pyproject.toml constraints.txt | setup
	@$(BIN)/python -m pip install -q --upgrade --target $(VENV)/mutation --group mutation
	@touch $@

protos: setup ## regenerate the contract's code into the SDK
	@$(BIN)/python protos/generate.py

client: setup ## regenerate the blocking client from the asyncio one
	@$(BIN)/python clients/python/unasync.py

format: setup ## format all code
	@$(BIN)/ruff format -q .
	@$(BIN)/ruff check -q --fix .

clean: ## remove what was built, but not .venv
	rm -rf build out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
