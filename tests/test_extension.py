"""The extension as a process, with an Extensions API that the test controls."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import NAME, ROOT, run, wait_until
from extensions_api_server import IDENTIFIER, SHUTDOWN, ExtensionsApiServer, answer, invoke


@pytest.fixture(scope="session")
def extension(folder):
    """The extension with its dependencies, in a folder of its name."""
    target = folder / NAME
    requirements = ROOT / NAME / "requirements.txt"
    installed = run("python3", "-m", "pip", "install", "--quiet", "--target", target, "-r", requirements)
    assert installed.returncode == 0, installed.stderr
    for source in (ROOT / NAME).glob("*.py"):
        (target / source.name).write_bytes(source.read_bytes())
    return target / "extension.py"


class Started:
    """A started extension: its process, and its output and error output so far."""

    def __init__(self, process, stdout, stderr):
        self.process, self._stdout, self._stderr = process, Path(stdout.name), Path(stderr.name)

    @property
    def stdout(self):
        return self._stdout.read_text()

    @property
    def stderr(self):
        return self._stderr.read_text()


@contextmanager
def started(extension, api, **environment):
    """Starts the extension as its launcher does, against that API (a server, or an address as str)."""
    address = api if isinstance(api, str) else api.address
    environment = {"PATH": os.environ["PATH"], "AWS_LAMBDA_RUNTIME_API": address} | environment
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        command = [sys.executable, "-E", "-s", extension]
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, cwd="/")
        try:
            yield Started(process, stdout, stderr)
        finally:
            process.kill()
            process.wait()


def end_of(extension, api, **environment):
    """Runs the extension to its end and returns exit status, output and error output."""
    with started(extension, api, **environment) as it:
        return it.process.wait(20), it.stdout, it.stderr


def test_registers_for_invoke_and_shutdown_under_the_name_of_its_folder(extension):
    with ExtensionsApiServer([SHUTDOWN]) as api:
        end_of(extension, api)
        (request,) = api.asked("register")
    assert (request.method, request.path) == ("POST", "/2020-01-01/extension/register")
    assert request.headers["lambda-extension-name"] == NAME
    assert request.headers["content-type"] == "application/json"
    assert request.json == {"events": ["INVOKE", "SHUTDOWN"]}


def test_asks_for_events_with_the_identifier_it_was_given(extension):
    with ExtensionsApiServer([SHUTDOWN]) as api:
        _, stdout, _ = end_of(extension, api)
        (request,) = api.asked("event/next")
    assert (request.method, request.path) == ("GET", "/2020-01-01/extension/event/next")
    assert request.headers["lambda-extension-identifier"] == IDENTIFIER
    assert f"[{NAME}] Registered with ID: {IDENTIFIER}\n" in stdout


def test_logs_each_invoke_event_in_one_line(extension):
    with ExtensionsApiServer([invoke("one"), invoke("two"), SHUTDOWN]) as api:
        _, stdout, _ = end_of(extension, api)
    events = re.findall(rf"^\[{NAME}\] Received event: (.*)$", stdout, re.MULTILINE)
    assert [json.loads(event).get("requestId") for event in events] == ["one", "two", None]


def test_logs_an_event_before_it_asks_for_the_next_one(extension):
    with ExtensionsApiServer([invoke("one"), lambda connection: None]) as api, started(extension, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 2)
        assert '"requestId": "one"' in it.stdout


def test_logs_the_shutdown_event_with_its_reason_and_exits_0(extension):
    with ExtensionsApiServer([SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api)
        assert len(api.asked("event/next")) == 1
    assert status == 0
    assert '"shutdownReason": "spindown"' in stdout
    assert stderr == ""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_waits_ends_it_at_once_with_0(extension, signum):
    with ExtensionsApiServer() as api, started(extension, api) as it:
        wait_until(lambda: api.asked("event/next"))
        it.process.send_signal(signum)
        assert it.process.wait(2) == 0
        assert it.stderr == ""


def test_uses_at_most_two_connections_for_a_thousand_events(extension):
    with ExtensionsApiServer([*(invoke(str(number)) for number in range(1000)), SHUTDOWN]) as api:
        status, stdout, _ = end_of(extension, api)
        assert api.connections <= 2
    assert status == 0
    assert stdout.count("Received event") == 1001


def test_an_event_type_from_the_future_is_logged_and_passed_over(extension):
    with ExtensionsApiServer([answer(body={"eventType": "HIBERNATE"}), invoke("after"), SHUTDOWN]) as api:
        status, stdout, _ = end_of(extension, api)
    assert status == 0
    assert f'[{NAME}] Passed over an unknown event: {{"eventType": "HIBERNATE"}}\n' in stdout
    assert '"requestId": "after"' in stdout
