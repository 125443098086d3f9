"""The extension as a process, with its dependencies but without Lambda."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers import NAME, ROOT

LAUNCHER = (ROOT / "extensions" / NAME).read_text()
PYTHON = [sys.executable, *re.search(r"^exec python3 (.*) ", LAUNCHER, re.MULTILINE).group(1).split()]


class StartedExtension:
    """A started extension: its process, and its output and error output so far."""

    def __init__(self, process, stdout, stderr):
        self.process, self._stdout, self._stderr = process, Path(stdout.name), Path(stderr.name)

    @property
    def stdout(self):
        return self._stdout.read_text()

    @property
    def stderr(self):
        return self._stderr.read_text()

    @property
    def peak_memory(self):
        """The most memory that it had so far, in KB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))

    @property
    def received(self):
        """The types of the events that process() got."""
        return re.findall(r'Received event: {"eventType": "(\w+)"', self.stdout)


@contextlib.contextmanager
def started(extension, api, prefix=(), **environment):
    """Starts the extension as its launcher does, against that API (a server, an address as str, or None)."""
    environment = {"PATH": os.environ["PATH"]} | environment
    if api:
        environment["AWS_LAMBDA_RUNTIME_API"] = getattr(api, "address", api)
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        process = subprocess.Popen(
            [*prefix, *PYTHON, extension], stdout=stdout, stderr=stderr, env=environment, cwd="/"
        )
        try:
            yield StartedExtension(process, stdout, stderr)
        finally:
            process.kill()
            process.wait()


def end_of(extension, api, prefix=(), **environment):
    """Runs the extension to its end and returns exit status, output and error output."""
    with started(extension, api, prefix, **environment) as it:
        return it.process.wait(60), it.stdout, it.stderr
