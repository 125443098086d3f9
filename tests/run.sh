#!/usr/bin/env bash
# Runs the tests in their own virtual environment; arguments go to pytest. It needs bash and Python with pip; tests whose
# tools are missing are skipped, with the reason. With CI set they fail instead, all but those of the Daemon, which has
# no package.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/venv.sh

venv tests/requirements.txt .venv/tests
# Last on PATH, so that the sample under test still finds the python3 that its users have.
PATH=$PATH:$PWD/.venv/tests/bin PYTHONDONTWRITEBYTECODE=1 exec .venv/tests/bin/python3 -m pytest "$@"
