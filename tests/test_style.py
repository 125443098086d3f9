"""The linters that keep the sources readable."""

import pytest
from machine import ROOT, run, tool

FOLDERS = "*.sh", "extensions/*", ".ci/*", "scripts/*", "tests/*.sh", "tests/*/*.sh"
SCRIPTS = [path for pattern in FOLDERS for path in sorted(ROOT.glob(pattern))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["shellcheck", *SCRIPTS],
        ["shfmt", "--diff", "--indent", "4", *SCRIPTS],
        # The versions of distribution packages are the base image's business, and stages that are left behind may
        # keep package lists.
        ["hadolint", "--ignore", "DL3008", "--ignore", "DL3009", "Dockerfile"],
        ["cfn-lint", "template.yaml"],
        ["kubernetes-validate", "--strict", "examples/kubernetes.yaml"],
    ],
)
def test_linters_find_nothing(command):
    linted = run(tool(command[0]), *command[1:], cwd=ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr
