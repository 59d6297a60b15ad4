# `make train` and `make test` need Python 3.10 to 3.13 with venv; the first
# use of each installs what it needs into .venv.

PYTHON ?= python3
# What `make train` hands to dtrain.main, as in FLAGS=--num_steps=100.
FLAGS ?= --conditional

VENV := .venv
RUN := $(VENV)/bin/python
# Behind a proxy the system knows whom to trust, and uv by itself does not.
UV := $(VENV)/bin/uv --quiet --no-config --system-certs
SOURCES := dtrain launch tests

# Notices about this machine's CPU and the absence of a GPU are no errors.
export TF_CPP_MIN_LOG_LEVEL ?= 2

# tests/conftest.py distributes the tests. Three for two cores, as a quarter of
# the time goes by in waiting for processes.
PYTEST := $(RUN) -m pytest -n 3 --no-loadscope-reorder

.PHONY: help train test coverage clients chaos lint format lock clean

help: ## Lists the targets.
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

train: $(VENV)/runtime.stamp ## Trains on the embedded digits, or goes on where it stopped.
	@$(RUN) -m dtrain.main --strategy=mirrored $(FLAGS)

test: $(VENV)/tests.stamp ## Runs every test.
	$(PYTEST)

coverage: $(VENV)/tests.stamp ## Runs every test, and counts the lines of dtrain that they reach.
	$(PYTEST) --cov=dtrain

clients: $(VENV)/clients/vertex.stamp $(VENV)/clients/skypilot.stamp ## Installs the optional libraries that more tests use, 0.5 GB.

chaos: $(VENV)/clients/mlflow.stamp ## The long form of all that kills, damages and cuts off.
	DTRAIN_NUM_KILLS=40 DTRAIN_NUM_DAMAGES=1000 DTRAIN_NUM_SIGNALS=50 \
	    DTRAIN_NUM_FUZZ=10000 DTRAIN_NUM_RACES=200 DTRAIN_CHAOS_MINUTES=30 \
	    DTRAIN_ALL_PROGRAMS=1 DTRAIN_FORK_SERVER=off $(PYTEST) \
	    tests/chaos_test.py tests/signals_test.py tests/supervisor_test.py \
	    tests/resume_test.py tests/kill_points_test.py tests/damage_test.py \
	    tests/disk_test.py tests/remote_run_test.py tests/callbacks_test.py \
	    tests/hostile_files_test.py tests/hostile_checkpoints_test.py \
	    tests/hostile_pictures_test.py tests/claim_test.py \
	    tests/programs_test.py tests/gallery_test.py tests/retention_test.py \
	    tests/tracking_test.py tests/augmentation_test.py \
	    tests/presets_test.py

lint: $(VENV)/tests.stamp ## Checks format, style, types, layers and spelling.
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/basedpyright
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/codespell

format: $(VENV)/tests.stamp ## Formats the code and rewrites the BUILD files.
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)
	$(RUN) -m tests.build_files --write

COMPILE := $(UV) pip compile --universal --python-version 3.10 \
    --generate-hashes --no-emit-index-url --no-emit-find-links

lock: $(VENV)/tests.stamp ## Writes the locks from the requirements.
	$(COMPILE) requirements.txt -o requirements.lock
	$(COMPILE) -c requirements.lock tests/requirements.txt \
	    -o tests/requirements.lock
	$(COMPILE) -c requirements.lock tests/vertex_requirements.txt \
	    -o tests/vertex_requirements.lock
	$(COMPILE) tests/skypilot_requirements.txt \
	    -o tests/skypilot_requirements.lock
	$(COMPILE) tests/mlflow_requirements.txt -o tests/mlflow_requirements.lock

clean: ## Removes what make and the tools wrote; runs stay.
	rm -rf $(VENV) .coverage .coverage.* .hypothesis .pytest_cache \
	    .ruff_cache .import_linter_cache
	find $(SOURCES) -name __pycache__ -prune -exec rm -rf {} +

# The tests' lock holds the runtime's too, so it serves both stamps.
$(VENV)/tests.stamp: tests/requirements.lock
	$(call install,tests/requirements.lock)
	@touch $(VENV)/runtime.stamp $@

$(VENV)/runtime.stamp: requirements.lock
	$(call install,requirements.lock)
	@touch $@

# Each in an environment of its own: they contradict TensorFlow's versions.
$(VENV)/clients/%.stamp: tests/%_requirements.lock $(VENV)/tests.stamp
	$(UV) venv --clear --python $(RUN) $(VENV)/clients/$*
	$(UV) pip sync --require-hashes \
	    --python $(VENV)/clients/$*/bin/python $<
	@touch $@

# --no-deps: the lock is complete, and pip 23 takes a package with an extra for
# one that is not in it.
define install
	@$(PYTHON) -c 'import ensurepip, sys, venv; \
	    sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	    2> /dev/null || { \
	    echo "error: PYTHON ($(PYTHON)) must be Python 3.10 to 3.13 with" \
	        "venv; install python3-venv or try make PYTHON=python3.12" >&2; \
	    exit 78; \
	}
	@echo "Installing $(1) into $(VENV): about 2 GB, once."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install -qq --disable-pip-version-check \
	    --no-deps --require-hashes -r $(1)
endef
