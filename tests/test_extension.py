"""The extension as a process, with an Extensions API that the test controls."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from extensions_api_server import IDENTIFIER, SHUTDOWN, ExtensionsApiServer, invoke
from helpers import NAME, RECEIVED, run, wait_until
from started_extension import end_of, replace_process, started


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
    events = re.findall(rf"^\[{NAME}\] {RECEIVED}: (.*)$", stdout, re.MULTILINE)
    assert [json.loads(event).get("requestId") for event in events] == ["one", "two", None]


def test_logs_an_event_before_it_asks_for_the_next_one(extension):
    with ExtensionsApiServer([invoke("one"), lambda connection: None]) as api, started(extension, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 2)
        assert '"requestId": "one"' in it.stdout


def test_logs_any_text_from_process(extension, tmp_path):
    logging = replace_process(extension, r"def process(event):" "\n" r"    log('half a character: \ud83e')", tmp_path)
    with ExtensionsApiServer([SHUTDOWN]) as api:
        status, stdout, stderr = end_of(logging, api)
    assert (status, stderr) == (0, "")
    assert f"[{NAME}] half a character: \\ud83e\n" in stdout


def test_prints_without_delay(extension, tmp_path):
    printing = replace_process(extension, "def process(event):\n    print('printed')", tmp_path)
    with ExtensionsApiServer([invoke(), lambda connection: None]) as api, started(printing, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 2)
        assert "printed\n" in it.stdout


def test_sees_no_packages_but_its_own(extension, tmp_path):
    looking = replace_process(extension, "def process(event):\n    log(json.dumps(sys.path))", tmp_path)
    with ExtensionsApiServer([SHUTDOWN]) as api:
        _, stdout, _ = end_of(looking, api)
    own, *others = json.loads(stdout.splitlines()[-1].removeprefix(f"[{NAME}] "))
    assert own == str(looking.parent)
    assert not [path for path in others if "packages" in path]


def test_logs_the_shutdown_event_with_its_reason_and_exits_0(extension):
    with ExtensionsApiServer([SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api)
        assert len(api.asked("event/next")) == 1
    assert status == 0
    assert '"shutdownReason": "spindown"' in stdout
    assert stderr == ""


def test_shows_an_error_before_it_obeys_a_signal(extension):
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import extension
log = extension.log
extension.log = lambda *message: (os.kill(os.getpid(), signal.SIGTERM), log(*message))
extension.main()
"""
    ran = run(sys.executable, "-c", script, extension.parent, env={})  # no Extensions API
    assert (ran.returncode, ran.stderr.count("AWS_LAMBDA_RUNTIME_API is not set")) == (1, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are read from /proc")
def test_waits_for_an_event_without_a_time_limit_and_with_one_connection(extension):
    with ExtensionsApiServer() as api, started(extension, api) as it:
        wait_until(lambda: api.asked("event/next"))
        process = Path(f"/proc/{it.process.pid}")
        sockets = [link.name for link in process.glob("fd/*") if os.readlink(link).startswith("socket:")]
        (flags,) = [
            re.search(r"^flags:\s+(\d+)", (process / "fdinfo" / name).read_text(), re.MULTILINE) for name in sockets
        ]
    assert int(flags.group(1), 8) & os.O_NONBLOCK == 0  # Python makes a socket with a timeout non-blocking


def test_builds_its_request_for_events_once(extension):
    script = """
import sys
sys.path.insert(0, sys.argv[1])
import requests
from extensions_api import ExtensionsApi
built = []
prepare = requests.PreparedRequest.prepare
requests.PreparedRequest.prepare = lambda self, **parts: (built.append(parts), prepare(self, **parts))
api = ExtensionsApi("name")
api.register()
for _, event in zip(range(100), api.events()):
    pass
print(len(built))
"""
    with ExtensionsApiServer([invoke("one")]) as api:
        environment = {"AWS_LAMBDA_RUNTIME_API": api.address}
        ran = run(sys.executable, "-E", "-s", "-S", "-c", script, extension.parent, env=environment)
    assert ran.stdout == "1\n", ran.stderr


def test_uses_at_most_two_connections_for_a_thousand_events(extension):
    with ExtensionsApiServer([*(invoke(str(number)) for number in range(1000)), SHUTDOWN]) as api:
        status, stdout, _ = end_of(extension, api)
        assert api.connections <= 2
    assert status == 0
    assert stdout.count(RECEIVED) == 1001
