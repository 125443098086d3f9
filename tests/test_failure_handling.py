"""What the extension does when something goes wrong: each row of docs/failure-handling.md is a test here."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from extensions_api_server import (
    IDENTIFIER,
    REGISTERED,
    REPORTED,
    SHUTDOWN,
    ExtensionsApiServer,
    answer,
    error,
    invoke,
    reset,
)
from helpers import NAME, ROOT, free_port, run, wait_until
from started_extension import PYTHON, end_of, replace_process, started

HANG = []  # never answers
# Runs the extension, and from its first event to its third, at every line that Python executes,
# sends SIGTERM to a fork.
AT_ANY_MOMENT = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import extension

endings, events = {}, []

def ending(pid):
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return f"exit status {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "still there after a second"

def trace(frame, what, argument):
    place = f"{frame.f_code.co_filename}:{frame.f_lineno} {what}"
    if place not in endings:
        pid = os.fork()
        if pid == 0:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        endings[place] = ending(pid)
        if endings[place] != "exit status 0":
            finish()
    return trace

def finish():
    print(json.dumps(endings))
    os._exit(0)

def process(event):
    events.append(event)
    if len(events) == 1:
        sys.settrace(trace)
        caller = sys._getframe(1)
        caller.f_trace = trace
    elif len(events) == 3:
        finish()

extension.process = process
extension.main()
"""


def succeeds(extension, **environment):
    """Asserts that the extension processes an event and exits with 0; returns its API."""
    with ExtensionsApiServer([invoke("one"), SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api, **environment)
    assert (status, stderr) == (0, "")
    assert '"requestId": "one"' in stdout
    return api


def fails(extension, api, *words, **environment):
    """Asserts that the extension exits with 1 and one line on standard error, with these words in it."""
    status, _, stderr = end_of(extension, api, **environment)
    assert status == 1
    assert re.fullmatch(rf"\[{NAME}\] .*\n", stderr), stderr
    assert all(word in stderr for word in words), stderr
    return stderr


@pytest.fixture
def changed(extension, tmp_path):
    """Makes an extension with another body of process(event)."""

    def change(body):
        source = "def process(event):\n" + "".join(f"    {line}\n" for line in body.splitlines())
        return replace_process(extension, source, tmp_path)

    return change


# --- The environment ---


def test_aws_lambda_runtime_api_missing(extension):
    fails(extension, None, "] AWS_LAMBDA_RUNTIME_API is not set")


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1:port", "http://127.0.0.1:9001", "host with space:9001", "no..host:9001", ":"]
)
def test_aws_lambda_runtime_api_wrong(extension, address):
    fails(extension, address, "extension/register")


def test_http_proxy_and_friends_set(extension):
    proxy = f"http://127.0.0.1:{free_port()}"
    names = "http_proxy", "https_proxy", "all_proxy"
    succeeds(extension, **dict.fromkeys([*names, *map(str.upper, names)], proxy))


def test_a_netrc_for_the_address_of_the_api(extension, tmp_path):
    (tmp_path / ".netrc").write_text("default login user password secret\nmachine 127.0.0.1 login u password p\n")
    api = succeeds(extension, HOME=str(tmp_path), NETRC=str(tmp_path / ".netrc"))
    assert not any("authorization" in request.headers for request in api.requests)


@pytest.mark.parametrize("locale", ["C", "POSIX", "no_such.locale"])
def test_a_locale_that_is_not_utf_8(extension, locale):
    with ExtensionsApiServer([invoke("Füße, 足, 🦶"), SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api, LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (status, stderr) == (0, "")
    assert "Füße, 足, 🦶" in [json.loads(event).get("requestId") for event in re.findall("event: (.*)", stdout)]


def test_python_variables_of_the_function(extension, tmp_path):
    for module in "json.py", "requests.py", "sitecustomize.py":
        (tmp_path / module).write_text("raise SystemExit('this module is for the function')")
    succeeds(extension, PYTHONWARNINGS="error", PYTHONPATH=str(tmp_path), PYTHONDEVMODE="1", PYTHONHOME="/nowhere")


def test_a_read_only_file_system(extension):
    read_only = "mount --bind / / && mount -o remount,bind,ro / && chroot / touch /tmp/x 2>/dev/null || exec chroot / "
    prefix = ["unshare", "--mount", "sh", "-c", read_only + '"$@"', "sh"]
    if run(*prefix[:-3], "-c", "mount --bind / /").returncode != 0:
        pytest.skip("only root may make the file system read-only; in the image it always is")
    with ExtensionsApiServer([invoke("one"), SHUTDOWN]) as api:
        assert end_of(extension, api, prefix)[0] == 0
        assert len(api.asked("event/next")) == 2


def test_standard_output_closed_from_the_start(extension):
    with ExtensionsApiServer([invoke("one"), SHUTDOWN]) as api:
        assert end_of(extension, api, ["sh", "-c", 'exec "$@" >&-', "sh"]) == (0, "", "")
        assert len(api.asked("event/next")) == 2


def test_standard_output_closed_by_its_reader(extension):
    with ExtensionsApiServer([invoke("one"), invoke("two"), SHUTDOWN]) as api:
        reader, writer = os.pipe()
        environment = {"PATH": os.environ["PATH"], "AWS_LAMBDA_RUNTIME_API": api.address}
        process = subprocess.Popen([*PYTHON, extension], stdout=writer, stderr=subprocess.PIPE, env=environment)
        os.close(writer)
        os.close(reader)
        assert process.communicate(timeout=20)[1] == b""
        assert process.returncode == 0
        assert len(api.asked("event/next")) == 3


# --- Registration ---


@pytest.mark.parametrize("status", [400, 403, 500])
def test_registration_refused(extension, status):
    with ExtensionsApiServer(register=[error(status, "Extension.SomeReason", "not today")]) as api:
        fails(
            extension,
            api,
            "] POST http://",
            f"/2020-01-01/extension/register: {status} Extension.SomeReason not today\n",
        )
        assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"<html>\nbusy\xff" + b"." * 1000, "<html> busy\ufffd" + "." * 188),
        (b"", ""),
        (b"[]", "[]"),
        (b'{"errorType": "Some"}', '{"errorType": "Some"}'),
    ],
    ids=["not JSON", "empty", "a list", "no errorMessage"],
)
def test_registration_refused_without_an_explanation(extension, body, shown):
    with ExtensionsApiServer(register=[answer(503, body)]) as api:
        fails(extension, api, f"/2020-01-01/extension/register: 503 {shown}".rstrip() + "\n")


def test_a_registration_response_without_an_identifier(extension):
    with ExtensionsApiServer(register=[answer()]) as api:
        fails(extension, api, "] POST http://", "/register: no Lambda-Extension-Identifier in the response\n")
        assert len(api.requests) == 1


def test_a_registration_response_that_is_not_http(extension):
    with ExtensionsApiServer(register=[b"220 mail.example.com ESMTP\r\n"]) as api:
        fails(extension, api, "/2020-01-01/extension/register", "220 mail.example.com ESMTP")


@pytest.mark.parametrize("status", [300, 307])
def test_registration_redirected(extension, status):
    with ExtensionsApiServer(register=[answer(status, Location="http://127.0.0.1:1/")]) as api:
        fails(extension, api, f"/2020-01-01/extension/register: {status}")
        assert len(api.requests) == 1


def test_connection_refused(extension):
    port = free_port()
    fails(extension, f"127.0.0.1:{port}", f"] POST http://127.0.0.1:{port}/", "/register: ConnectionRefusedError: ")


@pytest.mark.parametrize("ending", [reset, None], ids=["reset", "closed"])
def test_connection_reset_during_registration(extension, ending):
    with ExtensionsApiServer(register=[ending]) as api:
        fails(extension, api, "/2020-01-01/extension/register")
        assert len(api.requests) == 1


# --- Events ---


def reports(api, phase="exit"):
    """The one report of an error that the API got, as its headers and its body."""
    (request,) = api.asked(f"{phase}/error")
    assert request.method == "POST"
    assert request.headers["lambda-extension-identifier"] == IDENTIFIER
    assert request.headers["lambda-extension-function-error-type"] == request.json["errorType"]
    assert re.fullmatch(r"Extension\.\w+", request.json["errorType"])
    return request.json


@pytest.mark.parametrize("status", [400, 403, 404, 500, 503])
def test_an_event_refused(extension, status):
    with ExtensionsApiServer([error(status, "Extension.SomeReason", "not today")]) as api:
        line = fails(extension, api, "/extension/event/next", f" {status} ", "Extension.SomeReason", "not today")
        assert len(api.asked("event/next")) == 1
        assert reports(api)["errorMessage"] in line
        assert reports(api)["stackTrace"] == []


def test_an_event_redirected(extension):
    with ExtensionsApiServer() as other, ExtensionsApiServer() as api:
        api.answers["event/next"] = [answer(302, Location=f"http://{other.address}/2020-01-01/extension/event/next")]
        fails(extension, api, "/extension/event/next", ": 302")
        reports(api)
        assert (len(api.asked("event/next")), other.connections) == (1, 0)


@pytest.mark.parametrize("body", [b"", b"soon", b"{", b"\xff\xfe\xfd", b"<html>"])
def test_an_event_that_is_not_json(extension, body):
    with ExtensionsApiServer([answer(body=body)]) as api:
        fails(extension, api, "/extension/event/next", "not an event", repr(body))
        reports(api)


@pytest.mark.parametrize("body", [None, 5, "INVOKE", [], [{"eventType": "INVOKE"}], {}, {"eventType": None}])
def test_json_that_is_not_an_event(extension, body):
    with ExtensionsApiServer([answer(body=body)]) as api:
        fails(extension, api, "/extension/event/next: not an event: ", json.dumps(body))
        reports(api)


@pytest.mark.parametrize("raw", [b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_an_event_that_is_not_http(extension, raw):
    def send(connection):
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_RDWR)

    with ExtensionsApiServer([send]) as api:
        fails(extension, api, "/extension/event/next")
        reports(api)


def test_an_unknown_event_type(extension):
    with ExtensionsApiServer([answer(body={"eventType": "HIBERNATE"}), invoke("after"), SHUTDOWN]) as api:
        status, stdout, _ = end_of(extension, api)
    assert status == 0
    assert f'[{NAME}] Ignored an unknown event: {{"eventType": "HIBERNATE"}}\n' in stdout
    assert '"requestId": "after"' in stdout


def test_connection_closed_between_events(extension):
    def and_close(content):
        def send(connection):
            # The end of the connection arrives together with the event, not a moment after it.
            connection.sendall(content, getattr(socket, "MSG_MORE", 0))
            connection.shutdown(socket.SHUT_RDWR)

        return send

    events = [and_close(invoke(str(number))) for number in range(20)]
    with ExtensionsApiServer([*events, SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api)
        assert len(api.asked("event/next")) == 21
    assert (status, stderr) == (0, "")
    assert re.findall(r'"requestId": "(\d+)"', stdout) == [str(number) for number in range(20)]


@pytest.mark.parametrize("ending", [reset, None], ids=["reset", "closed"])
def test_connection_reset_while_waiting(extension, ending):
    with ExtensionsApiServer([invoke("one"), ending]) as api:
        fails(extension, api, "/extension/event/next: ('Connection aborted.', ")
        reports(api)
        assert len(api.asked("event/next")) == 2


def test_an_event_of_a_megabyte_with_non_ascii_text(extension):
    text = "Füße, 足, 🦶 " * 80_000
    event = json.dumps({"eventType": "INVOKE", "requestId": text}, ensure_ascii=False).encode()
    assert len(event) > 1_000_000
    with ExtensionsApiServer([answer(body=event), SHUTDOWN]) as api:
        status, stdout, stderr = end_of(extension, api)
    assert (status, stderr) == (0, "")
    assert json.loads(re.search("event: (.*)", stdout).group(1)) == json.loads(event)


# --- Reports of errors ---


def test_an_error_before_the_first_event(extension, tmp_path):
    bare = tmp_path / NAME
    bare.mkdir()
    for source in (ROOT / NAME).glob("*.py"):
        shutil.copy(source, bare)  # but not requests
    with ExtensionsApiServer() as api:
        status, _, stderr = end_of(bare / "extension.py", api)
        assert reports(api, "init")["errorType"] == "Extension.ModuleNotFoundError"
    assert status == 1
    assert stderr.endswith("ModuleNotFoundError: No module named 'requests'\n")


@pytest.mark.parametrize(
    "report",
    [error(500, "Any"), reset, None, b"no HTTP\r\n", HANG],
    ids=["refused", "reset", "closed", "not HTTP", "no answer"],
)
def test_an_error_report_that_fails(extension, report):
    with ExtensionsApiServer([error(403, "Extension.SomeReason", "not today")], report=report) as api:
        if report is HANG:
            api.answers["error"] = HANG
        start = time.monotonic()
        fails(extension, api, "] GET http://", "/extension/event/next: 403 Extension.SomeReason not today\n")
        assert time.monotonic() - start < 10  # twice the time limit
        assert len(api.asked("exit/error")) == 1


def test_a_bug_in_process(changed):
    buggy = changed("secret = event['no such key']")
    with ExtensionsApiServer([invoke("one"), SHUTDOWN], report=REPORTED) as api:
        status, _, stderr = end_of(buggy, api)
        report = reports(api)
        assert len(api.asked("event/next")) == 1
    assert status == 1
    assert (report["errorType"], report["errorMessage"]) == ("Extension.KeyError", "'no such key'")
    assert any("in process" in line and "event['no such key']" in line for line in report["stackTrace"])
    assert stderr.count("Traceback (most recent call last)") == 1
    assert stderr.endswith("KeyError: 'no such key'\n")


def test_control_characters_in_an_explanation(extension):
    with ExtensionsApiServer([error(403, "Extension.Some\0Reason", "red \x1b[31m, \a, and\nleft \u202e")]) as api:
        line = fails(extension, api, r"Extension.Some\x00Reason red \x1b[31m, \x07, and left \u202e")
        assert reports(api)["errorMessage"] in line
    assert line.rstrip("\n").isprintable()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_a_report_hangs(extension, signum):
    with ExtensionsApiServer([error(403, "Extension.SomeReason", "not today")]) as api, started(extension, api) as it:
        api.answers["error"] = HANG
        wait_until(lambda: api.asked("exit/error"))
        it.process.send_signal(signum)
        assert it.process.wait(4) == (1 if signum != signal.SIGKILL else -signal.SIGKILL)
        assert it.stderr.count("not today") == it.stderr.count("\n") == 1


# --- Lambda Managed Instances ---


def test_managed_instances_named_by_the_environment(extension):
    with ExtensionsApiServer([SHUTDOWN]) as api:
        status, *_ = end_of(extension, api, AWS_LAMBDA_INITIALIZATION_TYPE="lambda-managed-instances")
        assert [request.json for request in api.asked("register")] == [{"events": ["SHUTDOWN"]}]
    assert status == 0


def test_managed_instances_that_refuse_shutdown(extension):
    refused = error(403, "Extension.InvalidEventType", "SHUTDOWN is not supported")
    with ExtensionsApiServer(register=[refused]) as api:
        fails(extension, api, "SHUTDOWN is", AWS_LAMBDA_INITIALIZATION_TYPE="lambda-managed-instances")
        assert len(api.asked("register")) == 1


def test_an_api_that_refuses_invoke(extension):
    refused = error(403, "Extension.InvalidEventType", "INVOKE is not supported")
    with ExtensionsApiServer([SHUTDOWN], register=[refused, REGISTERED]) as api:
        status, *_ = end_of(extension, api)
        events = [request.json["events"] for request in api.asked("register")]
    assert events == [["INVOKE", "SHUTDOWN"], ["SHUTDOWN"]]
    assert status == 0


def test_an_api_that_refuses_shutdown_too(extension):
    refused = error(403, "Extension.InvalidEventType", "nothing is supported")
    with ExtensionsApiServer(register=[refused]) as api:
        fails(extension, api, "Extension.InvalidEventType")
        assert len(api.asked("register")) == 2


# --- Signals and long runs ---


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_waiting(extension, signum):
    with ExtensionsApiServer(HANG) as api, started(extension, api) as it:
        wait_until(lambda: api.asked("event/next"))
        it.process.send_signal(signum)
        assert it.process.wait(1) == 0  # not only when the time for a shutdown is over
        assert it.stderr == ""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_process_runs(changed, signum):
    slow = changed("import time\nlog('begun')\ntime.sleep(1)\nlog('finished')")
    with ExtensionsApiServer([invoke("one"), invoke("two")]) as api, started(slow, api) as it:
        wait_until(lambda: "begun" in it.stdout)
        it.process.send_signal(signum)
        assert it.process.wait(20) == 0
        assert it.stdout.count("finished") == 1
        assert it.stderr == ""
        assert len(api.asked("event/next")) == 1


def test_a_signal_when_process_takes_longer_than_a_shutdown(changed):
    slow = changed("import time\nlog('begun')\ntime.sleep(60)\nlog('finished')")
    with ExtensionsApiServer([invoke("one")]) as api, started(slow, api) as it:
        wait_until(lambda: "begun" in it.stdout)
        it.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert it.process.wait(20) == 0
        seconds = float(re.search(r"^SHUTDOWN_SECONDS = (\S+)", slow.read_text(), re.MULTILINE).group(1))
        assert seconds <= 2 - 0.3  # Lambda's limit, less what it reserves for the runtime
        assert time.monotonic() - start >= seconds
        assert "finished" not in it.stdout


def test_a_signal_at_any_moment(extension):
    with ExtensionsApiServer([invoke("event")]) as api:
        environment = {"AWS_LAMBDA_RUNTIME_API": api.address}
        ran = run(*PYTHON, "-c", AT_ANY_MOMENT, extension.parent, env=environment)
        assert ran.returncode == 0, ran.stderr
        endings = json.loads(ran.stdout.splitlines()[-1])
        asked = len(api.asked("event/next"))
    assert {place: ending for place, ending in endings.items() if ending != "exit status 0"} == {}
    assert len(endings) > 100
    assert asked == 3


def test_a_signal_while_a_non_daemon_thread_runs(changed):
    threads = changed("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nlog('begun')")
    with ExtensionsApiServer([invoke("one"), *HANG, lambda _: None]) as api, started(threads, api) as it:
        wait_until(lambda: len(api.asked("event/next")) == 2)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory and descriptors are read from /proc")
def test_a_hundred_thousand_events(extension):
    def rss(process):
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text()).group(1))

    measured = []

    def measure(connection):
        measured.append((rss(it.process), len(os.listdir(f"/proc/{it.process.pid}/fd"))))
        connection.sendall(invoke("measured"))

    events = [invoke("event")] * 100_000
    events[1_000] = events[-1] = measure
    with ExtensionsApiServer([*events, SHUTDOWN]) as api, started(extension, api) as it:
        assert it.process.wait(600) == 0
        assert api.connections <= 2
        assert it.stdout.count("\n") == 100_002
    (early_rss, early_descriptors), (late_rss, late_descriptors) = measured
    assert late_rss - early_rss <= 1024
    assert late_descriptors == early_descriptors


@pytest.mark.slow
def test_minutes_without_an_answer(extension):
    with ExtensionsApiServer(HANG) as api, started(extension, api) as it:
        time.sleep(121)
        assert it.process.poll() is None
        assert len(api.asked("event/next")) == 1
        assert it.stderr == ""
