#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own; arguments go to pytest. It needs bash and Python with pip, and
# skips, saying so, what needs more. With CI set nothing is skipped for want of a tool: it fails instead.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
if ! cmp -s tests/requirements.txt "$venv/requirements.txt"; then
    echo "Installing the test tools into $venv (once, about half a minute)"
    rm -rf "$venv"
    # Debian and Ubuntu keep venv's own pip in a package apart; pip can serve an environment from outside.
    python3 -m venv --without-pip "$venv"
    python3 -m pip --python "$venv/bin/python3" install --quiet --disable-pip-version-check -r tests/requirements.txt
    cp tests/requirements.txt "$venv"
fi

# Last on PATH, so that the sample under test still finds the python3 that its users have.
PATH=$PATH:$PWD/$venv/bin PYTHONDONTWRITEBYTECODE=1 exec "$venv/bin/python3" -m pytest "$@"
