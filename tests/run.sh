#!/usr/bin/env bash
# Runs the tests in a virtual environment of their own; this needs bash, and Python with pip:
#   ./tests/run.sh [--all] [pytest options]
# --all adds the slow tests, which take long or need heavy tools. A test whose tools are missing is
# skipped, with the reason; with CI set it fails, unless it needs the Lambda Runtime API Daemon,
# which has no package.
set -euo pipefail
cd "$(dirname "$0")/.."

# Makes, once for each change of lock file $1, the virtual environment in folder $2.
venv() {
    local made_for
    made_for="$PWD $(cksum <"$1")" # its scripts contain its path
    [ "$(cat "$2/made-for" 2>/dev/null)" != "$made_for" ] || ! "$2/bin/python3" -c '' || return 0
    echo "Installing the $(grep -c == "$1") packages of $1 into $2, once"
    rm -rf "$2"
    python3 -m venv --without-pip "$2"
    # Run by the environment's Python, the pip of this machine installs there, beside what it sees
    # of this machine. So Debian's python3-venv is not needed.
    pip=$(python3 -c 'import pip; print(*pip.__path__)')
    PIP_USER=0 "$2/bin/python3" "$pip" install --quiet --disable-pip-version-check --no-compile \
        --ignore-installed --no-deps --require-hashes --requirement "$1"
    echo "$made_for" >"$2/made-for"
}

mkdir -p .venv
exec 9>.venv/lock
python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' # waits until another run has installed
venv tests/requirements.txt .venv/tests
selected="not slow"
if [ "${1:-}" = --all ]; then
    shift
    selected=""
    venv tests/requirements-all.txt .venv/tools
fi
exec 9>&-
# Python itself, not a shim of pyenv, which breaks when several pips end at once.
python=$(python3 -c 'import os, sys; print(os.path.dirname(os.path.realpath(sys.executable)))')
PATH=$python:$PATH exec .venv/tests/bin/python3 -m pytest -m "$selected" "$@"
