"""The extension as a process, with its dependencies but without Lambda."""

import os
import re
import shutil
import sys

from machine import ROOT, LoggedProcess
from sample import NAME

LAUNCHER = (ROOT / "extensions" / NAME).read_text()
# The Python that runs the tests, with the launcher's options.
PYTHON = [sys.executable, *re.findall("(?m)^exec python3 (.*) ", LAUNCHER)[0].split()]


class ExtensionProcess(LoggedProcess):
    """A started extension."""

    @property
    def received(self):
        """The types of the events that process() got."""
        return re.findall(rf'(?m)^\[{NAME}\] [^{{]*{{"eventType": "(\w+)"', self.out)


def started(extension, api, prefix=(), **environment):
    """Starts the extension in / as its launcher does, with these variables and a PATH.

    The API is a FakeLambda, an address, or None. The words of the prefix precede the command.
    """
    environment = {"PATH": os.environ["PATH"]} | environment
    if api:
        environment["AWS_LAMBDA_RUNTIME_API"] = getattr(api, "address", api)
    return ExtensionProcess([*prefix, *PYTHON, extension], env=environment, cwd="/")


def run_to_end(extension, api, prefix=(), **environment):
    """Runs the extension until it ends; returns its status, its output, and its error output."""
    with started(extension, api, prefix, **environment) as process:
        status = process.wait(60)
        return status, process.out, process.err


def variant(extension, folder, files):
    """The main.py of a copy below that folder, with these files, {name: text}, over its own."""
    copy = folder / NAME
    copy.mkdir(parents=True)
    for source in extension.parent.iterdir():
        if source.is_file():
            shutil.copy(source, copy)
        elif source.name != "__pycache__":
            (copy / source.name).symlink_to(source)  # a package
    for name, text in files.items():
        (copy / name).write_text(text)
    return copy / "main.py"
