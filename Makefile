.PHONY: check gpu format

check:  ## style, types and tests, as in CI
	bash tests/run.sh

gpu:  ## the tests that need a GPU
	.venv/bin/python -m pytest -m gpu

format:
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
