# Two words do everything: `make demo` runs the whole pipeline on a CPU, `make test` checks it.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
JOBS ?= 2
AUDIT_URL ?= https://api.osv.dev/v1/query

.PHONY: demo smoke test chaos long lint audit bench experiments install clean

# Two stages at once, where they do not wait for each other: two measures of so small a model fill two cores better than one does.
demo: install
	LONGLORA_JOBS=2 LONGLORA_GPU_SLOTS=2 $(BIN)/longlora run
	$(BIN)/longlora promote

# The whole pipeline once more, as small as it gets: that it runs, not that the model is good.
smoke: install
	LONGLORA_JOBS=2 LONGLORA_GPU_SLOTS=2 $(BIN)/longlora run --set fit.steps=2 --set blocks.recall.count=8 --set perplexity.samples=2 --set passkey.samples=1

# JOBS at a time, a file of tests by one process; a thread each, for more would fight over the cores.
test: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

# Thirty kills at seeded points of a run, each followed by the same command and compared with a run nobody harmed.
chaos: install
	CHAOS_POINTS=30 $(BIN)/pytest tests/test_chaos.py -s

# What takes minutes each: schedules as they come, servers on PostgreSQL, kills of the real pipeline.
long: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long -s

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Known holes in the pinned packages. Where the database cannot be asked, a line says that nothing was audited.
audit: install
	$(BIN)/python .ci/audit.py constraints.txt $(AUDIT_URL)

# Ratios, into docs/bench.json and docs/bench.png: what the JSON holds is not measured again (`rm docs/bench.json`, or name parts).
bench: install
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.traffic

# What brings retrieval, and the paper's tables at a small size: two hours of one core; resumable.
experiments: install
	cd experiments && PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 dvc repro

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	git update-index --skip-worktree dvc.lock
	touch $@

clean:
	rm -rf .venv
