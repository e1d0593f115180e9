#!/usr/bin/env bash
# Set up whatever is missing and pass the tests: style, types, then pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source example/environment.sh requirements.txt requirements-dev.txt
if [ ! -d .venv/parity/rwkv ]; then
  # the reference runner, kept apart because its package has the name of our folder
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps \
    --target .venv/parity rwkv==0.8.32
fi
"$PYTHON" -m ruff format --check .
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -m "not gpu and not slow" "$@"
