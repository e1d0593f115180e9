#!/usr/bin/env bash
# Set up whatever is missing and pass the tests: style, types, then pytest in two processes.
# Arguments go to pytest: -n 8 for more processes, -n 0 for none beside.
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
"$PYTHON" -m pytest -n 2 --dist worksteal -m "not gpu and not slow" "$@"
