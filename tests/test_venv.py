"""The virtual environments of the tests, made by tests/venv.sh."""

import re
import shutil
import subprocess

import pytest
from helpers import ROOT, run

pytestmark = pytest.mark.slow
VENV = "bash", "-c", ". tests/venv.sh; venv requirements.txt .venv/environment"


@pytest.fixture
def checkout(tmp_path):
    """A folder with tests/venv.sh and one pinned package."""
    folder = tmp_path / "a folder's name"
    (folder / "tests").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "venv.sh", folder / "tests")
    lock_file = (ROOT / "tests" / "requirements.txt").read_text()
    (folder / "requirements.txt").write_text(re.search(r"^pytest==(?:.*\\\n)+.*\n", lock_file, re.MULTILINE).group())
    return folder


def test_two_first_runs_at_once_make_it_once(checkout):
    both = [subprocess.Popen(VENV, cwd=checkout, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert "".join(outputs).count("Installing the 1 packages") == 1
    assert (checkout / ".venv" / "environment" / "bin" / "pytest").exists()


def test_a_moved_checkout_makes_it_again(checkout):
    assert "Installing" in run(*VENV, cwd=checkout).stdout
    assert run(*VENV, cwd=checkout).stdout == ""
    moved = checkout.rename(checkout.parent / "moved")
    assert "Installing" in run(*VENV, cwd=moved).stdout
