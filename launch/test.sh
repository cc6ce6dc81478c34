#!/usr/bin/env bash
# Lint, format, types, and all tests that a CPU can run; one of them builds the documentation. Needs Python >= 3.11
# and git only; can be run again. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_venv "$REPOSITORY/launch/requirements.txt" "$REPOSITORY/launch/requirements-dev.txt"
cd "$REPOSITORY"
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
