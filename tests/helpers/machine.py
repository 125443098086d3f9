"""This machine: its commands and tools, its ports, and its processes."""

import contextlib
import functools
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"
TOOLS = ROOT / ".venv" / "tools" / "bin"
# The number of this worker of pytest-xdist.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# The AWS CLI and the SDKs require these even for localhost.
AWS_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "any",
    "AWS_SECRET_ACCESS_KEY": "any",
    "AWS_DEFAULT_REGION": "eu-central-1",
}
# The Daemon's path, out of the way of all tests but the Daemon's. The processes of pytest-xdist
# inherit the environment.
if "LAMBDA_RUNTIME_API_DAEMON" in os.environ:
    os.environ["DAEMON_OF_TESTS"] = os.environ.pop("LAMBDA_RUNTIME_API_DAEMON")
DAEMON = os.environ.get("DAEMON_OF_TESTS", "")


def skip_except_on_ci(reason):
    """Skips the test because this machine lacks something; on CI, fails it."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, but CI must have it")
    pytest.skip(reason)


def tool(name):
    """The path of a command that not every machine has."""
    found = shutil.which(name, path=f"{TOOLS}:{os.environ['PATH']}")
    if not found:
        skip_except_on_ci(f"no {name} on this machine")
    return found


def real_daemon():
    """The path of the Lambda Runtime API Daemon, which has no package.

    Skips the test if no path is given.
    """
    if not DAEMON:
        pytest.skip("no Daemon: LAMBDA_RUNTIME_API_DAEMON=its path ./tests/run.sh --all -k daemon")
    return os.path.abspath(DAEMON)


@functools.cache
def need_namespaces():
    """Skips the test where namespaces are refused; on CI, fails it.

    Without them two runs would get in each other's way in /opt.
    """
    unshare = "unshare --mount --pid --fork"
    if run("sh", "-c", f"{unshare} true || {unshare} --map-root-user true").returncode != 0:
        skip_except_on_ci("this machine, or this container, refuses namespaces")


def run(*command, timeout=400, **options):
    """Runs a command to its end and returns its CompletedProcess, with the output as text.

    After the timeout, in seconds, it is killed, and the test fails with its output.
    """
    words = [str(word) for word in command]
    options |= {"capture_output": True, "text": True}
    try:
        return subprocess.run(words, check=False, timeout=timeout, **options)
    except subprocess.TimeoutExpired as error:
        said = [text.decode(errors="replace") for text in (error.stdout, error.stderr) if text]
        pytest.fail("\n".join([str(error), *said]))


# What a test has started ends with the tests, even if these are killed: it then gets a SIGTERM.
END_WITH_TESTS = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


class LoggedProcess(subprocess.Popen):
    """A process whose output and error output can be read while it runs."""

    def __init__(self, command, **options):
        # Two files, because Docker would mix the lines in one.
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        out, err = self._files
        words = [*END_WITH_TESTS, *map(str, command)]
        super().__init__(words, stdout=out, stderr=err, **options)

    def __exit__(self, *error):
        self.kill()  # or the next line would wait for it, for example after a failed test
        super().__exit__(*error)

    @property
    def out(self):
        """What it has written to standard output so far."""
        return Path(self._files[0].name).read_text()

    @property
    def err(self):
        """What it has written to standard error so far."""
        return Path(self._files[1].name).read_text()

    @property
    def output(self):
        """Both, standard output first."""
        return self.out + self.err


def path_with(folder, programs):
    """A PATH whose first folder has these commands, {name: program for sh}."""
    for name, program in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def path_without(folder, name):
    """A PATH without a command. That folder gets links to all other commands."""
    for place in os.environ["PATH"].split(":"):
        for command in Path(place).glob("*"):
            if command.name != name and not os.path.lexists(folder / command.name):
                (folder / command.name).symlink_to(command)
    return str(folder)


def wait_until(condition, seconds=180):
    """Waits until condition() is true, and returns what it returned.

    The limit is for a fault, and not for a busy machine.
    """
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)
    return result


def fastest(measure, limit):
    """Calls measure() until it returns fewer seconds than the limit, but at most five times.

    Returns the fewest. A busy machine may need more than one try, because it can only prolong what
    is measured.
    """
    measured = []
    while len(measured) < 5 and (not measured or min(measured) >= limit):
        measured.append(measure())
    return min(measured)


def free_port():
    """A free port, which no outgoing connection and no other worker takes before it is used."""
    while True:
        # Below the ephemeral ones, and those that runs without Docker choose by chance.
        port = 10 * random.randrange(1_000, 2_000) + WORKER
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def post(url, payload=b"{}", timeout=30, **headers):
    """Posts the payload (bytes) and returns the body of the answer (bytes), whatever its status."""
    try:
        request = urllib.request.Request(url, payload, headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        return error.read()


def processes_of(sample):
    """The processes that run in, from, or for that copy of the sample: {ID: command line}."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = process.joinpath("cmdline").read_text().replace("\0", " ").strip()
            folder = os.readlink(process / "cwd")
            environ = process.joinpath("environ").read_text()
            if str(sample) in command + folder + environ:
                found[int(process.name)] = command
    return found
