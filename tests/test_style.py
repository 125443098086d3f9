"""The linters that keep the sources readable."""

import os
import re

import pytest
from conftest import ROOT, run, tool

SHELL = ["python-example-extension.sh", "lambda-entrypoint.sh", "extensions/python-example-extension", "tests/run.sh"]
SHELL += [f".ci/{script.name}" for script in sorted((ROOT / ".ci").iterdir())]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["shellcheck", *SHELL],
        ["shfmt", "--diff", "--indent", "4", *SHELL],
        # The versions of distribution packages are the base image's business, and stages that are left behind may
        # keep package lists.
        ["hadolint", "--ignore", "DL3008", "--ignore", "DL3009", "Dockerfile"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_linters_find_nothing(command):
    linted = run(tool(command[0]), *command[1:], cwd=ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_every_script_is_executable():
    assert all(os.access(ROOT / script, os.X_OK) for script in SHELL)


def test_no_file_has_windows_line_endings():
    tracked = run("git", "ls-files", cwd=ROOT).stdout.splitlines() or pytest.skip("this is no git checkout")
    assert not [name for name in tracked if (ROOT / name).is_file() and b"\r\n" in (ROOT / name).read_bytes()]


def test_each_pinned_dependency_has_its_hashes():
    for file in ROOT.glob("**/requirements*.txt"):
        if file.parent.name not in ("tests",) and ".venv" not in file.parts and ".host" not in file.parts:
            pins = re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE)).splitlines()
            assert pins
            assert all(re.fullmatch(r"\S+==\S+( +--hash=sha256:[0-9a-f]{64})+", pin) for pin in pins)
