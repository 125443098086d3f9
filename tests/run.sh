#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own; it needs bash and Python with pip.
#   ./tests/run.sh [--all] [pytest options]
# --all adds the tests that take long or need heavy tools. A test whose tools are missing is skipped, with the reason; with
# CI set it fails, unless it needs the Lambda Runtime API Daemon, which has no package, or podman 5.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/venv.sh

venv tests/requirements.txt .venv/tests
case " $* " in *" --all "*) venv tests/requirements-all.txt .venv/tools ;; esac
# Last on PATH, so that the sample under test still finds the python3 that its users have.
export HYPOTHESIS_STORAGE_DIRECTORY=.venv/hypothesis PYTHONDONTWRITEBYTECODE=1
PATH=$PATH:$PWD/.venv/tests/bin exec .venv/tests/bin/python3 -m pytest "$@"
