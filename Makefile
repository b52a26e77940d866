# make demo   train, distil, sample and measure on built-in data; ends with a report
# make test   lint and test
# make test-newest  test on the newest Python and JAX
# make studies  the studies of configs/studies, hours; a second call goes on

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS ?= runs/demo
SEED ?= 0
MAIN := $(BIN)/python -m sdiff_jax.main

.PHONY: install demo studies test test-fast test-slow test-newest lint clean
install: $(VENV)/installed

# Without a pip of its own: Debian's Python cannot put one there.
$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-compile --editable '.[test]'
	touch $@

demo: install
	$(MAIN) --config=configs/digits_diffusion.py --workdir=$(RUNS)/teacher \
	  --config.seed=$(SEED)
	$(MAIN) --config=configs/digits_scd.py --workdir=$(RUNS)/scd \
	  --config.seed=$(SEED) --config.teacher.workdir=$(RUNS)/teacher
	$(MAIN) --config=configs/digits_sct.py --workdir=$(RUNS)/sct \
	  --config.seed=$(SEED) --config.init_from=$(RUNS)/teacher
	$(MAIN) --workdir=$(RUNS)/teacher --job=evaluate
	$(MAIN) --workdir=$(RUNS)/scd --job=evaluate
	$(MAIN) --workdir=$(RUNS)/sct --job=evaluate
	$(MAIN) --workdir=$(RUNS) --job=report
	@echo "to see it: $(MAIN) --workdir=$(RUNS) --job=serve, then http://127.0.0.1:8000/"

studies: install
	for file in configs/studies/*.py; do \
	  $(MAIN) --config=$$file --workdir=runs/studies || exit; done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

# Both at once: the type checker has one process, and the tests do not keep two cores busy.
test: install
	$(MAKE) --jobs=2 lint test-fast

test-fast: install
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal --durations=25 \
	  -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

test-newest:
	tests/newest.sh

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
