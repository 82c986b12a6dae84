# Two commands for a newcomer: `make quickstart` and `make test`. Both set up .venv first, once.
# What guards main is .ci/run: check, test and test-rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done

KILLS ?= 100
CASES ?= 10000

.PHONY: quickstart test test-rest test-all bench gpu kill fuzz engines check format setup clean

# On the GPUs that PyTorch finds, else on the CPU; DEVICE=cpu: on the CPU anyway.
DEVICE ?= auto
quickstart: $(SETUP)
	$(BIN)/sbn quickstart device=$(DEVICE)

# Two suites: what a newcomer runs, and the rest (exhaustive cases, campaigns, Slurm). CONTRIBUTING.md says how long.
# Two workers, each with one thread, share two cores; after FAILURES failures enough is known.
WORKERS ?= 2
FAILURES ?= 20
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxfail=$(FAILURES) --durations=15 \
	-o console_output_style=count
QUICK := not slow and not slow_on_cpu and not slurm

test: $(SETUP)
	$(PYTEST) -m "$(QUICK)"

test-rest: $(SETUP)
	$(PYTEST) -m "not ($(QUICK))"

test-all: test
	$(MAKE) test-rest

# Speed, as ratios to peers in one run: docs/benchmarks.md. Under five minutes on two slow cores.
bench: $(SETUP)
	$(BIN)/python kernels/bench/run.py --device cpu

# Everything that wants a GPU, with PYTHON's own PyTorch, Triton and pytest and nothing else: correctness, machine code,
# speed. Each part runs whatever became of the one before; benchmarks get what is left of GPU_SECONDS.
GPU_SECONDS ?= 520
GPU_ARCHITECTURES ?= 90
gpu:
	@start=$$(date +%s); status=0; \
	PYTHONPATH=kernels $(PYTHON) -m pytest tests/kernels -q -p no:cacheprovider -m "not slow and not multi_gpu" || status=1; \
	PYTHONPATH=kernels $(PYTHON) -m sbn_kernels.inspection --architectures $(GPU_ARCHITECTURES) || status=1; \
	$(PYTHON) kernels/bench/run.py --device cuda --budget $$(($(GPU_SECONDS) - $$(date +%s) + start)) || status=1; \
	exit $$status

# Training runs killed again and again (docs/durability.md): about four minutes on two slow cores.
kill: $(SETUP)
	$(BIN)/python tests/durability/kill.py --kills $(KILLS)

# Bad input of every kind to every command (docs/durability.md): about a quarter of an hour on one slow core.
fuzz: $(SETUP)
	$(BIN)/python tests/durability/fuzz.py --cases $(CASES)

# The same bits on the oldest and the newest release of every engine. Makes environments; needs Python >= 3.12 and
# a package index, downloads gigabytes of PyTorch. ENGINES="NAME ...": tests/engines/releases.py.
engines: $(SETUP)
	$(BIN)/python tests/engines/compare.py $(ENGINES)

check: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(SETUP)

# torch goes first and alone, so that its pinned version decides which build is taken. On a terminal pip shows how far
# it is; in a log it would be hundreds of lines.
QUIET := $(shell test -t 2 || echo --quiet)
$(SETUP): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "megatron_sbn needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): PyTorch first (0.2 to 2.8 GB), then the rest; two to four minutes"
	$(BIN)/python -m pip install $(QUIET) -c constraints.txt torch
	$(BIN)/python -m pip install $(QUIET) -c constraints.txt -e '.[dev]'
	touch $(SETUP)

clean:
	rm -rf $(VENV) .venv-engines .mypy_cache .ruff_cache .pytest_cache *.egg-info
