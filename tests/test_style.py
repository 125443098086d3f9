"""The linters that keep the sources readable."""

import os
import re

import pytest
from helpers import ROOT, run, tool

SAM = "requirements-rie.txt", ".ci/requirements.txt"
FOLDERS = "*.sh", "extensions/*", ".ci/*", "scripts/*", "*/*.sh"
SCRIPTS = [path for pattern in FOLDERS for path in sorted(ROOT.glob(pattern)) if path.suffix in ("", ".sh")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["shellcheck", "--external-sources", *SCRIPTS],
        ["shfmt", "--diff", "--indent", "4", *SCRIPTS],
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
    assert all(os.access(script, os.X_OK) for script in SCRIPTS if script.name != "venv.sh")


def test_no_file_has_windows_line_endings():
    tracked = run(tool("git"), "ls-files", cwd=ROOT).stdout.splitlines() or pytest.skip("this is no git checkout")
    assert not [name for name in tracked if (ROOT / name).is_file() and b"\r\n" in (ROOT / name).read_bytes()]


def test_each_pin_has_its_hashes():
    patterns = "requirements*.in", "*/requirements*.in", ".ci/requirements.in"
    lock_files = [source.with_suffix(".txt") for pattern in patterns for source in ROOT.glob(pattern)]
    assert len(lock_files) == 7
    for lock_file in lock_files:
        pins = re.sub(r"^ *#.*\n|\\\n", "", lock_file.read_text(), flags=re.MULTILINE).splitlines()
        assert pins
        assert all(re.fullmatch(r"\S[^=]*==\S+( ;.*?)?( +--hash=sha256:[0-9a-f]{64})+", pin) for pin in pins)


def test_the_sam_cli_and_the_emulator_are_of_one_release():
    releases = {re.search(r"^aws-sam-cli==(\S+)", (ROOT / file).read_text(), re.MULTILINE).group(1) for file in SAM}
    assert len(releases) == 1
