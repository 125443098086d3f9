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
PIP_INSTALL = ROOT / "scripts" / "pip_install.py"


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
        options = "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"
        pip = "python3", "-m", "pip", "download", *options, "--only-binary", ":all:"
        downloaded = run(*pip, "--dest", folder, *pins)
        assert downloaded.returncode == 0, downloaded.stderr

    wheels = made_once("wheels", download, *PINS)
    # A URL, because pip would take a path with a space for two paths.
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri()}


def extension_packages():
    """The folder with the extension's dependencies."""
    settings = pip_settings()

    def install(folder):
        command = PIP_INSTALL, EXTENSION_PINS, "--quiet", "--target", folder
        installed = run(*command, env=os.environ | settings)
        assert installed.returncode == 0, installed.stderr

    return made_once("extension", install, EXTENSION_PINS)


def share_installed(sample):
    """Moves what runs of that copy of the sample have installed into the cache.

    Then links everything of that kind from the cache into the copy, so that runs find it.
    """
    deciding = *PINS, PIP_INSTALL, ROOT / "scripts" / "run_without_docker.py"
    shared = made_once("installed", Path.mkdir, *deciding)
    runs = sample / ".run"
    runs.mkdir(exist_ok=True)
    with locked():
        for installed in runs.glob("*-*"):
            if not installed.is_symlink() and not (shared / installed.name).exists():
                new = CACHE / "new"
                shutil.rmtree(new, ignore_errors=True)  # of tests that were killed
                shutil.move(installed, new)
                emulator = next(shared.glob("*/aws-lambda-rie"), None)
                if emulator:
                    # By far the largest file, and the same in every installation.
                    (new / emulator.name).unlink()
                    (new / emulator.name).hardlink_to(emulator)
                new.rename(shared / installed.name)
        for installed in shared.iterdir():
            if not (runs / installed.name).exists():
                (runs / installed.name).symlink_to(installed)
