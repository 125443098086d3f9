#!/usr/bin/env python3
# SPDX-License-Identifier: MIT-0
"""Installs the wheels that a lock file pins, and nothing else.

    scripts/pip_install.py LOCK_FILE [--for PYTHON] [option of pip install]...

The wheels are for this Python, or with --for, for that one, which need not have pip. The Dockerfile
gives pip the options that matter, in its environment.

A pip setting of the user's counts only if it says where packages come from, or how to reach them.
Any other setting could change what is installed, or break it.
"""

import ast
import importlib.util
import os
import subprocess
import sys

OPTIONS = [
    "--no-cache-dir",
    "--disable-pip-version-check",
    "--no-deps",
    "--require-hashes",
    "--only-binary=:all:",
]
SETTINGS_THAT_COUNT = {
    "cert",
    "client-cert",
    "default-timeout",
    "extra-index-url",
    "find-links",
    "index-url",
    "keyring-provider",
    "no-index",
    "proxy",
    "retries",
    "timeout",
    "trusted-host",
}


def settings(pip: list[str]) -> dict[str, str]:
    """Returns the user's settings that count, as variables of pip.

    They come from pip's configuration files and its variables (`pip config list`). Exits if pip
    cannot read them; pip has then said why.
    """
    command = [*pip, "--no-cache-dir", "config", "list"]
    listed = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if listed.returncode != 0:
        sys.exit(listed.returncode)
    found = {}
    # A line is, for example: global.index-url='https://…'. What takes precedence comes last: first
    # all commands' settings, then those of the command install, then the variables (":env:").
    lines = listed.stdout.splitlines()
    for section in "global.", "install.", ":env:.":
        for line in lines:
            if not line.startswith(section):
                continue
            name, _, value = line.removeprefix(section).partition("=")
            if name in SETTINGS_THAT_COUNT:
                found["PIP_" + name.replace("-", "_").upper()] = ast.literal_eval(value)
    return found


def main() -> None:
    """Runs pip in place of this program."""
    lock_file, *options = sys.argv[1:]
    python = sys.executable
    if options[:1] == ["--for"]:
        python = options[1]
        del options[:2]
    pip = importlib.util.find_spec("pip")
    if not pip or not pip.submodule_search_locations:
        sys.exit("this Python has no pip; try: apt-get install python3-pip")
    (folder,) = pip.submodule_search_locations
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= settings([sys.executable, "-E", folder])
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_ROOT_USER_ACTION": "ignore"}
    command = [python, "-E", folder, "install", *OPTIONS, "-r", lock_file, *options]
    os.execve(python, command, environment)


main()
