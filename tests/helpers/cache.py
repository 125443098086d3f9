"""What the tests download and install once, for all their processes and runs: .venv/cache."""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from machine import ROOT, run
from sample import NAME

CACHE = ROOT / ".venv" / "cache"
EXTENSION_PINS = ROOT / NAME / "requirements.txt"
PINS = [ROOT / "requirements.txt", EXTENSION_PINS, ROOT / "scripts" / "requirements-rie.txt"]
PIP = "python3", "-m", "pip", "--quiet", "--disable-pip-version-check"


@contextlib.contextmanager
def locked(name="lock"):
    """Lets one process of the tests at a time do what is in the with block."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / name, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_once(kind, make, *files):
    """The folder of that kind, which make(folder) makes once for each content of the files."""
    key = f"{platform.machine()} {sys.version}".encode()
    for file in files:
        key += file.read_bytes()
    path = CACHE / f"{kind}-{hashlib.sha256(key).hexdigest()[:16]}"
    with locked():
        if not path.exists():
            for outdated in CACHE.glob(f"{kind}-*"):
                shutil.rmtree(outdated)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                new = Path(folder) / kind
                make(new)
                new.rename(path)
    return path


@functools.cache
def pip_settings():
    """The variables with which pip takes the wheels that the tests have downloaded once."""

    def download(folder):
        pins = [f"--requirement={file}" for file in PINS]
        downloaded = run(*PIP, "download", "--no-deps", "--require-hashes", "--dest", folder, *pins)
        assert downloaded.returncode == 0, downloaded.stderr

    wheels = made_once("wheels", download, *PINS)
    # A URL, because pip would take a path with a space for two paths.
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri()}


def extension_packages():
    """The folder with the extension's dependencies."""
    settings = pip_settings()

    def install(folder):
        options = "--no-deps", "--require-hashes", "--target", folder
        command = *PIP, "install", *options, "--requirement", EXTENSION_PINS
        installed = run(*command, env=os.environ | settings)
        assert installed.returncode == 0, installed.stderr

    return made_once("extension", install, EXTENSION_PINS)


def share_installed(sample):
    """Moves what runs of that copy of the sample have installed into the cache.

    Then links everything of that kind from the cache into the copy, so that runs find it.
    """
    shared = made_once("installed", Path.mkdir, *PINS, ROOT / "scripts" / "run_without_docker.py")
    runs = sample / ".run"
    runs.mkdir(exist_ok=True)
    with locked():
        for installed in runs.glob(f"*-{16 * '[0-9a-f]'}"):
            if not installed.is_symlink() and not (shared / installed.name).exists():
                shutil.move(installed, shared)
        for installed in shared.iterdir():
            if not (runs / installed.name).exists():
                (runs / installed.name).symlink_to(installed)
