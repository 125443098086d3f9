#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own; arguments go to pytest. It needs bash and Python with pip, and
# skips, saying so, what needs more. With CI set nothing is skipped for want of a tool: it fails instead.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/venv.sh

venv tests/requirements.txt .venv/tests
# Last on PATH, so that the sample under test still finds the python3 that its users have.
PATH=$PATH:$PWD/.venv/tests/bin PYTHONDONTWRITEBYTECODE=1 exec .venv/tests/bin/python3 -m pytest "$@"
