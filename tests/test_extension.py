"""The extension as a process, with an Extensions API that the test controls."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from extensions_api_server import IDENTIFIER, SHUTDOWN, ExtensionsApiServer, invoke
from helpers import NAME, wait_until
from started_extension import end_of, started


def test_registers_for_invoke_and_shutdown_under_the_name_of_its_folder(extension):
    with ExtensionsApiServer([SHUTDOWN]) as api:
        end_of(extension, api)
        (request,) = api.asked("register")
    assert (request.method, request.path) == ("POST", "/2020-01-01/extension/register")
    assert request.headers["lambda-extension-name"] == NAME
    assert request.headers["content-type"] == "application/json"
    assert request.json == {"events": ["INVOKE", "SHUTDOWN"]}


def test_asks_for_each_event_with_the_identifier_it_was_given(extension):
    with ExtensionsApiServer([invoke(), invoke(), SHUTDOWN]) as api:
        _, stdout, _ = end_of(extension, api)
        requests = api.asked("event/next")
    assert [request.method for request in requests] == ["GET"] * 3
    assert [request.headers["lambda-extension-identifier"] for request in requests] == [IDENTIFIER] * 3
    assert f"[{NAME}] Registered with ID: {IDENTIFIER}\n" in stdout


def test_initializes_once_between_registration_and_the_first_event(obedient):
    with ExtensionsApiServer([invoke(), SHUTDOWN]) as api:
        _, stdout, _ = end_of(obedient, api, AT_INIT="log('Initialized')")
    assert re.findall("Registered|Initialized|INVOKE|SHUTDOWN", stdout) == [
        "Registered", "Initialized", "INVOKE", "SHUTDOWN"
    ]  # fmt: skip


def test_asks_for_no_event_before_init_has_returned(obedient):
    with ExtensionsApiServer([SHUTDOWN]) as api, started(obedient, api, AT_INIT="log('Begun'); time.sleep(60)") as it:
        wait_until(lambda: "Begun" in it.stdout)
        assert not api.asked("event/next")


def test_logs_each_event_in_one_line_before_it_asks_for_the_next_one(extension):
    with ExtensionsApiServer([invoke("one"), invoke("two"), lambda _: None]) as api, started(extension, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 3)
        events = re.findall(rf"^\[{NAME}\] Received event: (.*)$", it.stdout, re.MULTILINE)
    assert [json.loads(event)["requestId"] for event in events] == ["one", "two"]


def test_ends_with_the_shutdown_event_and_asks_for_no_other(extension):
    with ExtensionsApiServer([SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api)
        assert len(api.asked("event/next")) == 1
    assert (status, stderr) == (0, "")
    assert '"shutdownReason": "spindown"' in stdout


def test_prints_without_delay_and_any_text(obedient):
    events = invoke(do=r"print('printed'); log('half a character: \ud83e')"), lambda _: None
    with ExtensionsApiServer(events) as api, started(obedient, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 2)
        assert "printed\n" in it.stdout
        assert f"[{NAME}] half a character: \\ud83e\n" in it.stdout


def test_sees_no_packages_but_its_own(obedient):
    with ExtensionsApiServer([invoke(do="import sys; log(json.dumps(sys.path))"), SHUTDOWN]) as api:
        _, stdout, _ = end_of(obedient, api)
    own, *others = json.loads(re.search(r"\[\"/.*", stdout).group())
    assert own == str(obedient.parent)
    assert not [path for path in others if "packages" in path]


@pytest.mark.parametrize("count", [1, 2], ids=["first", "further"])
@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are read from /proc")
def test_waits_for_an_event_without_a_time_limit(extension, count):
    with ExtensionsApiServer([*[invoke()] * (count - 1), lambda _: None]) as api, started(extension, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == count)
        process = Path(f"/proc/{it.process.pid}")
        sockets = [link.name for link in process.glob("fd/*") if os.readlink(link).startswith("socket:")]
        flags = [re.search(r"flags:\s+(\d+)", (process / "fdinfo" / name).read_text()) for name in sockets]
    assert len(flags) == count
    # Python makes a socket with a timeout non-blocking.
    assert all(int(flag.group(1), 8) & os.O_NONBLOCK == 0 for flag in flags)


def test_the_first_event_needs_no_requests_and_all_others_share_one_session(obedient):
    events = [invoke(do="import sys; log(f'requests: {\"requests\" in sys.modules}')")] * 1000
    with ExtensionsApiServer([*events, SHUTDOWN]) as api:
        status, stdout, _ = end_of(obedient, api)
        assert api.connections == 2
    assert status == 0
    assert re.findall("requests: (True|False)", stdout) == ["False"] + ["True"] * 999
