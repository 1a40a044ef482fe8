# make run     set up, then the main job: four environments, one asynchronous run, followed live
# make test    set up, then unit, integration and end-to-end tests
# make lint    set up, then ruff and mypy
# make docs    set up, then the documentation as a website in build/docs; a broken link is an error
# make setup   .venv with everything in it; quick when it is there already (KIND=gpu for NVIDIA machines, PYTHON=... to choose)
# make clean   remove .venv and caches; runs/ stays

CONFIG ?= configs/quickstart.yaml
ARGS ?=
KIND ?= cpu
BIN := .venv/bin

.PHONY: run setup test lint docs clean

run: setup
	@$(BIN)/polyrl submit $(CONFIG) --follow $(ARGS)

setup:
	@infra/bootstrap.sh $(KIND)

# The end-to-end test runs alone: beside other work, Ray heads on two cores miss their deadlines.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 tests/unit tests/integration $(ARGS)
	$(BIN)/python -m pytest --durations=5 tests/e2e $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # not --quiet: warnings that are not shown are not counted either

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
