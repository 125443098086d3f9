"""What the tests install once, for all their processes and runs, below .venv."""

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from machine import ROOT, run

CACHE = ROOT / ".venv" / "cache"
NAME = next(ROOT.glob("*/extension.py")).parent.name
LOCK_FILES = [
    ROOT / "requirements.txt",
    ROOT / NAME / "requirements.txt",
    ROOT / "scripts" / "requirements-rie.txt",
]


def key(*files):
    """A name for what is made from these files by this Python."""
    contents = f"{platform.machine()} {sys.version}".encode()
    for file in files:
        contents += file.read_bytes()
    return hashlib.sha256(contents).hexdigest()[:16]


def made_once(name, make):
    """The path of that name in the cache, which make(path) makes if it is not there yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / name).exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                new = Path(folder) / name
                make(new)
                new.rename(CACHE / name)
    return CACHE / name


def wheels():
    """The folder with all wheels that the sample installs."""

    def download(folder):
        requirements = [word for file in LOCK_FILES for word in ("--requirement", file)]
        options = "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:"
        pip = "python3", "-m", "pip", "download", "--disable-pip-version-check"
        downloaded = run(*pip, *options, "--dest", folder, *requirements)
        assert downloaded.returncode == 0, downloaded.stderr

    return made_once(f"wheels-{key(*LOCK_FILES)}", download)


def pip_settings():
    """The variables with which pip takes those wheels, and asks no index."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels().as_uri()}


def extension_packages():
    """A folder with the extension's dependencies."""
    lock_file = LOCK_FILES[1]

    def install(folder):
        options = "--quiet", "--target", folder
        installer = ROOT / "scripts" / "pip_install.py"
        installed = run(installer, lock_file, *options, env=os.environ | pip_settings())
        assert installed.returncode == 0, installed.stderr

    wheels()  # before the lock is taken again
    return made_once(f"extension-{key(lock_file)}", install)


def keep_installed(sample):
    """Keeps in the cache what the first run of that copy has installed, and links to it."""
    (installed,) = sample.glob(f".run/{NAME}-*")
    made_once(f"installed-{installed.name}", lambda folder: shutil.move(installed, folder))
    if not installed.is_symlink():
        shutil.rmtree(installed, ignore_errors=True)
        installed.symlink_to(CACHE / f"installed-{installed.name}")


def link_installed(sample):
    """Lets that copy find what the first run of any copy has installed."""
    for installed in CACHE.glob("installed-*"):
        link = sample / ".run" / installed.name.removeprefix("installed-")
        link.parent.mkdir(mode=0o700, exist_ok=True)
        link.symlink_to(installed)
