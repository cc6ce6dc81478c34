#!/usr/bin/env bash
# What one GPU can show, in one report (benchmarks/results/gpu.md) and under eight minutes. Needs a Python with torch,
# nothing to be installed or fetched, and no compiler. --cpu tries the script out without a GPU; --help lists the rest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for python in "${PYTHON:-}" .venv/bin/python python3; do
    if [ -n "$python" ] && "$python" -c 'import torch' 2>/dev/null; then
        PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m benchmarks.gpu "$@"
    fi
done
echo "no Python with torch found: set PYTHON to one" >&2
exit 1
