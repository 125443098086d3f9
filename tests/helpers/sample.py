"""Copies of the sample: as a new user has it, or changed by a test."""

import shutil
from pathlib import Path

from machine import PROGRAMS, ROOT, run

NAME = next(ROOT.glob("*/extension.py")).parent.name
HELLO = {"statusCode": 200, "body": '"Hello from Lambda!"'}  # what the function answers
RECEIVED = "Received event"  # what process(event) logs


def copy_sample(folder, sample=ROOT):
    """Copies the sample as git would check it out, with its uncommitted changes.

    What runs have installed is there in a copy of a copy.
    """
    ignore = shutil.ignore_patterns(".git", ".venv", ".run", "__pycache__", "*.pyc")
    copy = Path(shutil.copytree(sample, folder, ignore=ignore))
    if sample != ROOT:
        (copy / ".run").mkdir()
        for installed in sample.glob(f".run/{NAME}-*"):
            (copy / ".run" / installed.name).symlink_to(installed)
    return copy


def replace(file, before, after):
    """Replaces a text, which must be there, everywhere in a file of a copy."""
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def rename(sample, name):
    """Renames a copy as the README says."""
    renamed = run(sample / "scripts" / "rename", name)
    assert (renamed.returncode, renamed.stderr) == (0, "")
    for installed in sample.glob(f".run/{NAME}-*"):
        installed.rename(sample / ".run" / installed.name.replace(NAME, name))


def make_scripted(sample):
    """Gives a copy an extension that executes what its variables AT_… say; returns the copy."""
    shutil.copy(PROGRAMS / "scripted_extension.py", sample / NAME / "extension.py")
    return sample


def make_evaluating(sample):
    """Gives a copy a function that evaluates what its event says under "do"; returns the copy."""
    shutil.copy(PROGRAMS / "evaluating_function.py", sample / "lambda_function.py")
    return sample
