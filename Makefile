# make demo | make test | make test-slow | make mlflow | make lint
PYTHON ?= python3.11
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: demo test test-slow lint mlflow clean

demo: .venv/.demo
	$(BIN)/python -m cluster.demo

test: lint
	$(BIN)/python -m pytest

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow --timeout 1800

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mlflow: .venv/.demo
	$(BIN)/mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

clean:
	rm -rf .venv demo

.venv/.demo: requirements.txt requirements-local.txt constraints.txt cluster/install.sh
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	sh cluster/install.sh $(CURDIR)/$(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements-local.txt -c constraints.txt
	touch $@

.venv/.dev: .venv/.demo requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@
