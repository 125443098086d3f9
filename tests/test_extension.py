"""The extension as a process, with an Extensions API that the test controls."""

import importlib
import json
import os
import re
import socket

from extension_process import run_to_end, started, variant
from fake_lambda import (
    IDENTIFIER,
    REGISTERED,
    SHUTDOWN,
    FakeLambda,
    hangs,
    invoke_event,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine import wait_until
from pages import PAGES, code_blocks
from sample import NAME

# To try more: FUZZ_CASES=5000 ./tests/run.sh -k whatever_lambda_answers
CASES = int(os.environ.get("FUZZ_CASES", "150"))
KNOWN_PARTS = [
    b"HTTP/1.1 302 Found",
    b"HTTP/1.1 204 None",
    b"HTTP/1.1 100 Continue",
    b"HTTP/1.1 99999 Many",
    b"HTTP/9 200",
    b"Location: http://[",
    b"Location: http://a..b/",
    b"Location: \xff\xfe",
    b"Content-Length: 1" + b"0" * 30,
    b"Content-Length: -5",
    b"Content-Length: five",
    b"Transfer-Encoding: chunked",
    b"-5\r\nabc\r\n",
    b"zz\r\n",
    b"",
    b"Content-Encoding: gzip",
    b"Content-Type: text/html; charset=no-such",
    b"Set-Cookie: \x00=\x01; expires=never",
    b"X: " + b"y" * 70_000,
    b"Lambda-Extension-Identifier: \x1b[31m",
    b"Lambda-Extension-Identifier: one\r\n two",
    b"Lambda-Extension-Identifier: \xa0",
    b"Connection: close",
    b'{"eventType": ["\x1b"]}',
    b'{"errorType":' * 2_000,
    b'{"errorType": "\xe2\x80\xae", "errorMessage": 1e999}',
    b'"\\ud800"',
    b"[" * 2_000,
    b"9" * 5_000,
]
PARTS = st.sampled_from(KNOWN_PARTS) | st.binary(max_size=50)
START = st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 403 Forbidden"])


@st.composite
def responses(draw):
    """A response of known and random parts; most begin as HTTP does."""
    return b"\r\n".join([draw(START | PARTS), *draw(st.lists(PARTS, max_size=8))])


def test_the_readmes_first_block_of_code_is_a_whole_extension(extension, tmp_path):
    code = re.search(r"(?s)```python\n(.*?)```", PAGES["README.md"]).group(1)
    readme = variant(extension, tmp_path, {"extension.py": code})
    with FakeLambda([invoke_event(), SHUTDOWN]) as api, started(readme, api) as it:
        assert it.wait(60) == 0
        assert it.err == ""
        assert it.received == ["INVOKE", "SHUTDOWN"]


def test_the_readmes_way_to_catch_a_bug_keeps_the_invocation_from_failing(extension, tmp_path):
    """In this test, the bug is that nothing defines your_code."""
    _, block = code_blocks("README.md", "Make it your own", "python")
    code = f"from lifecycle import log, run\n\ndef process(event):\n{block}\nrun(process)\n"
    caught = variant(extension, tmp_path, {"extension.py": code})
    with FakeLambda([invoke_event(), SHUTDOWN]) as api:
        status, stdout, _ = run_to_end(caught, api)
    assert status == 0
    assert stdout.count("] Not processed: NameError(") == 2


def test_registers_under_the_name_of_its_folder_and_asks_for_each_event_with_its_identifier(
    extension,
):
    with FakeLambda([invoke_event(), invoke_event(), SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(extension, api)
    assert (status, stderr) == (0, "")
    assert f"[{NAME}] Registered with ID: {IDENTIFIER}\n" in stdout
    registration, *requests = api.requests
    assert (registration.method, registration.path) == ("POST", "/2020-01-01/extension/register")
    assert registration.headers["Lambda-Extension-Name"] == NAME
    assert registration.headers["Content-Type"] == "application/json"
    assert registration.json == {"events": ["INVOKE", "SHUTDOWN"]}
    asked = [
        (request.method, request.path, request.headers["Lambda-Extension-Identifier"])
        for request in requests
    ]
    assert asked == [("GET", "/2020-01-01/extension/event/next", IDENTIFIER)] * 3


def test_asks_for_the_first_event_only_after_init_has_returned(obedient):
    """Lambda sends no invocation before all extensions have asked."""
    logged = []

    def first_event(connection):
        logged.extend(re.findall("Registered|Initialized|SHUTDOWN", it.out))
        connection.sendall(SHUTDOWN)

    with (
        FakeLambda([first_event]) as api,
        started(obedient, api, AT_INIT="log('Initialized')") as it,
    ):
        assert it.wait(60) == 0
    assert logged == ["Registered", "Initialized"]


def test_output_appears_at_once_and_may_be_any_text(obedient):
    events = invoke_event(do=r"print('printed'); log('half a character: \ud83e')"), hangs
    with FakeLambda(events) as api, started(obedient, api) as it:
        wait_until(lambda: len(api.requests_for("event/next")) == 2)
        assert "printed\n" in it.out
        assert f"[{NAME}] half a character: \\ud83e\n" in it.out


def test_sees_no_packages_but_its_own(obedient):
    """Packages of this machine could hide that a pin is missing."""
    with FakeLambda([invoke_event(do="log(json.dumps(sys.path))"), SHUTDOWN]) as api:
        _, stdout, _ = run_to_end(obedient, api)
    own, *others = json.loads(re.search(r"\[\"/.*", stdout).group())
    assert own == str(obedient.parent)
    assert not [path for path in others if "packages" in path]


def test_waits_for_an_event_without_a_time_limit(obedient):
    """Lambda may freeze it for hours. Here each socket logs its time limit."""
    log_limits = "socket.socket.settimeout = lambda self, limit: log(f'time limit: {limit}')"
    with FakeLambda([invoke_event(), SHUTDOWN]) as api:
        _, stdout, _ = run_to_end(obedient, api, AT_INIT=f"import socket; {log_limits}")
    assert {*re.findall("time limit: (.*)", stdout)} == {"None"}


def test_one_client_registers_and_one_session_asks_for_all_events(obedient):
    """So there are two connections; only the second one is the requests library's."""
    with FakeLambda([*[invoke_event()] * 1000, SHUTDOWN]) as api:
        status, _, stderr = run_to_end(obedient, api)
        assert (status, stderr) == (0, "")
        assert api.connections == 2
    registration, *requests = api.requests
    assert "User-Agent" not in registration.headers
    for request in requests:
        assert request.headers["User-Agent"].startswith("python-requests/")


def test_an_error_is_reported_even_after_your_code_has_closed_every_descriptor(obedient):
    """The watchdog's pipe is then closed, too."""
    with FakeLambda([invoke_event(do="os.closerange(3, 1000); {}['no such key']")]) as api:
        status, _, _ = run_to_end(obedient, api)
        (report,) = api.requests_for("exit/error")
    assert status == 1
    assert report.json["errorType"] == "Extension.KeyError"


MODULES = "log('Modules: ' + json.dumps(sorted(sys.modules)))"


def modules(stdout):
    """The modules that had been imported at each moment when MODULES was executed, as sets."""
    return [{*json.loads(text)} for text in re.findall(r"\] Modules: (.*)", stdout)]


def test_everything_is_imported_before_init_and_nothing_during_an_invocation(obedient):
    """An import during an invocation would make its caller wait."""
    events = [invoke_event(do=MODULES), invoke_event(do=MODULES), SHUTDOWN]
    with FakeLambda(events) as api:
        _, stdout, _ = run_to_end(obedient, api, AT_INIT=MODULES)
    in_init, in_first, in_second = modules(stdout)
    assert "requests" in in_init
    assert in_first == in_second


# Before the command of an extension: lets Python list each import when it ends.
LIST_IMPORTS = "bash", "-c", 'exec "$1" -X importtime "${@:2}"', "bash"


def imports(stderr):
    """The modules in a list of imports, in their order."""
    return re.findall(r"(?m)^import time: .*\| +(\S+)$", stderr)


def test_signals_are_caught_before_anything_slow_is_imported(extension):
    """Until then a signal kills it."""
    with FakeLambda([SHUTDOWN]) as api:
        _, _, stderr = run_to_end(extension, api, LIST_IMPORTS)
    order = imports(stderr)
    for slow in "re", "json", "contextlib", "http.client", "requests":
        assert order.index("signals") < order.index(slow)


def test_it_registers_before_it_imports_the_requests_library(extension):
    """Lambda starts the function's runtime only when the extension has registered."""
    until_then = []

    def register(connection):
        until_then.extend(imports(it.err))
        connection.sendall(REGISTERED)

    with (
        FakeLambda([SHUTDOWN], register=[register]) as api,
        started(extension, api, LIST_IMPORTS) as it,
    ):
        assert it.wait(60) == 0
        assert "http.client" in until_then
        assert "requests" not in until_then
        assert "requests" in imports(it.err)


def test_whatever_lambda_answers_the_client_raises_at_most_an_error_of_one_line(
    extension, monkeypatch
):
    """Hypothesis puts the answers together, from parts over which HTTP clients stumble."""
    monkeypatch.syspath_prepend(extension.parent)
    client = importlib.import_module("extensions_api")

    def assert_one_line_if_it_fails(call):
        try:
            call()
        except client.ExtensionsApiError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 10 * client.TEXT_LENGTH

    @settings(
        max_examples=CASES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(responses())
    def ask(response):
        def respond(connection):
            connection.sendall(response)
            connection.shutdown(socket.SHUT_RDWR)

        server.answers = {"": [respond]}
        assert_one_line_if_it_fails(client.ExtensionsApi("name").register)
        server.answers = {"/register": [REGISTERED], "": [respond]}
        api = client.ExtensionsApi("name")
        api.register()
        api.open_session()
        assert_one_line_if_it_fails(api.next_event)
        api.report("Error", "text", [])

    with FakeLambda() as server:
        monkeypatch.setenv("AWS_LAMBDA_RUNTIME_API", server.address)
        ask()
