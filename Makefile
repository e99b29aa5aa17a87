# Two commands do all the set-up on a fresh machine: make serve, make test.

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip -qq --disable-pip-version-check --no-input
PORT ?= 5000
MODEL_DIR ?= checkpoints/nano
EXTRAS ?=
ARGS ?=
WORKERS ?=
export PYTHON

# One stamp per set of extras, so that asking for another one installs it.
empty :=
ready = $(VENV)/.ready$(subst $(empty) ,,$(addprefix -,$(sort $(1))))
READY := $(call ready,$(EXTRAS))
# With the compiler for GPUs that are not there, which exists for Linux only.
AOT := $(if $(filter Linux,$(shell uname -s)),aot)
READY_AOT := $(call ready,$(EXTRAS) $(AOT))
# With the clients that ask the server in its tests besides, and what describes the deployment.
READY_TEST := $(call ready,$(EXTRAS) $(AOT) clients modal)

.DEFAULT_GOAL := help
.PHONY: help env serve plan test check format lock tree docs nano clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(READY) ## make the environment in .venv from the lock; EXTRAS="cuda12 modal" adds to it

serve: $(READY) ## serve the bundled model on port 5000; MODEL_DIR=, PORT= and ARGS="--flag …" change it
	$(RUN) -m serving serve --model-dir $(MODEL_DIR) --port $(PORT) $(ARGS)

plan: $(READY_AOT) ## the full model on eight B200, with no GPU; ARGS="--target h200x8" asks for another
	$(RUN) -m glm_jax.aot plan $(ARGS)

test: $(READY_TEST) ## run the tests, on the CPU; ARGS="-k name" narrows them, WORKERS=2 runs two files at a time
	$(RUN) -m pytest $(if $(WORKERS),-n $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

check: $(READY_TEST) ## lint, formatting, types, import order, file lengths
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(RUN) -m pyright
	$(VENV)/bin/lint-imports --no-cache
	@echo 'file lengths: 400 lines at most, kernels 500, tests 600'
	@find glm_jax checkpoints serving tests -name '*.py' -exec wc -l {} + | awk ' \
	  $$2 == "total" { next } \
	  { limit = $$2 ~ /^tests\// ? 600 : $$2 ~ /^glm_jax\/pallas\// ? 500 : 400 } \
	  $$1 > limit { printf "%s has %d lines, more than %d\n", $$2, $$1, limit; failed = 1 } \
	  END { exit failed }'

format: $(READY) ## sort imports and format the code
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

lock: $(READY) ## bring constraints.txt up to pyproject.toml; ARGS=--upgrade takes the newest of everything
	@command -v uv >/dev/null || $(PIP) install uv
	PATH="$(VENV)/bin:$$PATH" $(RUN) .ci/lock.py uv $(ARGS)

tree: $(READY) ## write the tree of the README from the modules' first lines
	$(RUN) tests/test_readme.py

docs: $(call ready,$(EXTRAS) docs) ## the API's reference, from the docstrings, into build/docs
	$(RUN) -m pdoc --output-directory build/docs glm_jax checkpoints serving

nano: $(READY) ## train the bundled model: about an hour on two idle cores; a killed run goes on
	$(RUN) -m checkpoints.nano_training.tokenizer
	$(RUN) -m checkpoints.nano_training.train $(ARGS)

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info .jax_cache .pytest_cache .ruff_cache
	find glm_jax checkpoints serving tests .ci -name __pycache__ -type d -exec rm -rf {} +

# Hashes are demanded of every package, so the project itself is installed in a step of its own.
# Bytecode is left to the first import: most of what is installed is never imported.
$(READY_AOT): override EXTRAS += $(AOT)
$(call ready,$(EXTRAS) docs): override EXTRAS += docs
$(READY_TEST): override EXTRAS += $(AOT) clients modal
$(sort $(READY) $(READY_AOT) $(READY_TEST) $(call ready,$(EXTRAS) docs)): constraints.txt pyproject.toml
	@if [ ! -x $(RUN) ]; then \
	  python=$$(.ci/find-python) || exit 1; \
	  echo "making the environment in $(VENV) with $$python"; \
	  "$$python" -m venv $(VENV); \
	fi
	@echo 'installing the packages of constraints.txt (a minute or two, once)'
	@sed $(foreach scope,test $(EXTRAS),-e "s/extra == '$(scope)'/extra == ''/") constraints.txt \
	  > $(VENV)/requirements.txt
	@$(PIP) install --no-compile --require-hashes -r $(VENV)/requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
