#!/usr/bin/env bash
# Measures the extension against alternatives; see --help. It needs Linux and root, and Docker for the image's figures.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/venv.sh

venv benchmark/requirements.txt .venv/benchmark
exec .venv/benchmark/bin/python3 benchmark/benchmark.py "$@"
