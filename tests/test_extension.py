"""The extension as a process, with an Extensions API that the test controls."""

import json
import re

from extension_process import end_of, started
from extensions_api_server import IDENTIFIER, SHUTDOWN, ExtensionsApiServer, hangs, invoke
from machine import wait_until
from sample import NAME


def test_registers_under_the_name_of_its_folder_and_asks_for_each_event_with_the_identifier_it_was_given(extension):
    with ExtensionsApiServer([invoke(), invoke(), SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api)
    assert (status, stderr) == (0, "")
    assert f"[{NAME}] Registered with ID: {IDENTIFIER}\n" in stdout
    registration, *requests = api.requests
    assert (registration.method, registration.path) == ("POST", "/2020-01-01/extension/register")
    assert registration.headers["Lambda-Extension-Name"] == NAME
    assert registration.headers["Content-Type"] == "application/json"
    assert registration.json == {"events": ["INVOKE", "SHUTDOWN"]}
    asked = [(request.method, request.path, request.headers["Lambda-Extension-Identifier"]) for request in requests]
    assert asked == [("GET", "/2020-01-01/extension/event/next", IDENTIFIER)] * 3


def test_asks_for_the_first_event_when_init_has_returned(obedient):
    printed = []
    asked = lambda connection: (printed.append(it.out), connection.sendall(SHUTDOWN))  # noqa: E731
    with ExtensionsApiServer([asked]) as api, started(obedient, api, AT_INIT="log('Initialized')") as it:
        assert it.wait(20) == 0
    assert re.findall("Registered|Initialized|SHUTDOWN", *printed) == ["Registered", "Initialized"]


def test_logs_each_event_in_one_line_before_it_asks_for_the_next_one(extension):
    with ExtensionsApiServer([invoke("one"), invoke("two"), hangs]) as api, started(extension, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 3)
        events = re.findall(rf"(?m)^\[{NAME}\] Received event: (.*)$", it.out)
    assert [json.loads(event)["requestId"] for event in events] == ["one", "two"]


def test_prints_without_delay_and_any_text(obedient):
    events = invoke(do=r"print('printed'); log('half a character: \ud83e')"), hangs
    with ExtensionsApiServer(events) as api, started(obedient, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 2)
        assert "printed\n" in it.out
        assert f"[{NAME}] half a character: \\ud83e\n" in it.out


def test_sees_no_packages_but_its_own(obedient):
    with ExtensionsApiServer([invoke(do="log(json.dumps(sys.path))"), SHUTDOWN]) as api:
        _, stdout, _ = end_of(obedient, api)
    own, *others = json.loads(re.search(r"\[\"/.*", stdout).group())
    assert own == str(obedient.parent)
    assert not [path for path in others if "packages" in path]


def test_waits_for_an_event_without_a_time_limit(obedient):
    do = "import gc, socket; log([each.gettimeout() for each in gc.get_objects() if isinstance(each, socket.socket)])"
    with ExtensionsApiServer([invoke(do=do), invoke(do=do), SHUTDOWN]) as api:
        _, stdout, _ = end_of(obedient, api)
    assert re.findall(r"\] (\[.*\])\n", stdout) == ["[None]", "[None, None]"]


def test_the_first_event_needs_no_requests_and_all_others_share_one_session(obedient):
    events = [invoke(do="log(f'requests: {\"requests\" in sys.modules}')")] * 1000
    with ExtensionsApiServer([*events, SHUTDOWN]) as api:
        _, stdout, _ = end_of(obedient, api)
        assert api.connections == 2
    assert re.findall("requests: (True|False)", stdout) == ["False"] + ["True"] * 999
