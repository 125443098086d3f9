"""What a run without Docker installs: once, for all processes and runs of the tests."""

import contextlib
import fcntl
import functools
from pathlib import Path

from machine import ROOT, run


@contextlib.contextmanager
def locked(name):
    """Lets one process of the tests at a time do what is in the with block."""
    folder = ROOT / ".venv"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def installation():
    """The folder that scripts/run_without_docker.py has installed, or now installs, into .run."""
    code = "import run_without_docker as it; it.RUNS.mkdir(exist_ok=True); print(it.install())"
    with locked("installation"):
        installed = run("python3", "-E", "-B", "-c", code, cwd=ROOT / "scripts")
    assert installed.returncode == 0, installed.stderr
    return Path(installed.stdout.splitlines()[-1])


def link_installation(sample):
    """Lets runs of that copy of the sample find what has been installed."""
    (sample / ".run").mkdir(exist_ok=True)
    (sample / ".run" / installation().name).symlink_to(installation())
