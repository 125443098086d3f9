"""What the extension does when something goes wrong: docs/failure-handling.md."""

import json
import re
import signal
import socket
import time

import pytest
from extension_process import run_to_end, started
from fake_lambda import (
    IDENTIFIER,
    REGISTERED,
    SHUTDOWN,
    FakeLambda,
    answer,
    hangs,
    invoke_event,
    resets,
)
from machine import fastest, free_port, wait_until
from sample import NAME

NOT_TODAY = answer(403, {"errorType": "Extension.SomeReason", "errorMessage": "not today"})
REGISTER = "/2020-01-01/extension/register"
NEXT = "/2020-01-01/extension/event/next"


def assert_fails_with_one_line(extension, api, *words, **environment):
    """Asserts that the extension exits with 1, without SHUTDOWN, and prints one line.

    That line has these words in it.
    """
    status, stdout, stderr = run_to_end(extension, api, **environment)
    assert status == 1
    assert "SHUTDOWN" not in stdout
    assert re.fullmatch(rf"\[{NAME}\] .*\n", stderr), stderr
    assert all(word in stderr for word in words), stderr


def only_report(api, phase="exit"):
    """Asserts that the API got one report of an error, with the right headers; returns its JSON."""
    (request,) = [request for request in api.requests if request.path.endswith("/error")]
    assert (request.method, request.path) == ("POST", f"/2020-01-01/extension/{phase}/error")
    assert request.headers["Lambda-Extension-Identifier"] == IDENTIFIER
    assert request.headers["Lambda-Extension-Function-Error-Type"] == request.json["errorType"]
    return request.json


def ends_after(content):
    """An answer that ends the connection: the end arrives together with it, not a moment later."""

    def send(connection):
        connection.sendall(content, getattr(socket, "MSG_MORE", 0))
        connection.shutdown(socket.SHUT_RDWR)

    return send


# At the start, when …


def test_aws_lambda_runtime_api_is_not_set(extension):
    assert_fails_with_one_line(extension, None, "] AWS_LAMBDA_RUNTIME_API is not set;")


def test_nothing_listens_at_the_api_address(extension):
    request = f"] POST http://127.0.0.1:1{REGISTER}: ConnectionRefusedError: "
    assert_fails_with_one_line(extension, "127.0.0.1:1", request)


@pytest.mark.parametrize(
    ("response", "words"),
    [
        pytest.param(NOT_TODAY, ["status 403", "Extension.SomeReason", "not today"], id="refused"),
        pytest.param(answer(307, Location="http://127.0.0.1:1/"), ["status 307"], id="redirected"),
        pytest.param(answer(), ["no Lambda-Extension-Identifier"], id="without an identifier"),
        pytest.param(None, [": RemoteDisconnected: "], id="cut off"),
        pytest.param(hangs, [": TimeoutError: "], id="not answered"),
    ],
)
def test_a_registration_that_fails(extension, response, words):
    with FakeLambda(register=[response]) as api:
        assert_fails_with_one_line(extension, api, f"{REGISTER}: ", *words)
        assert len(api.requests) == 1  # it neither tries again nor reports


def test_an_import_that_fails_is_reported(scripted):
    with FakeLambda() as api:
        status, _, stderr = run_to_end(scripted, api, AT_IMPORT="import no_such_module")
        report = only_report(api, "init")
    assert status == 1
    assert stderr.startswith(f"[{NAME}] Traceback (most recent call last):\n")
    assert stderr.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")
    assert report["errorType"] == "Extension.ModuleNotFoundError"


def test_an_error_in_init_is_reported(scripted):
    with FakeLambda() as api:
        status, _, stderr = run_to_end(scripted, api, AT_INIT="1 / 0")
        report = only_report(api, "init")
        assert not api.requests_for("event/next")
    assert status == 1
    assert report["errorType"] == "Extension.ZeroDivisionError"
    assert "\nZeroDivisionError: division by zero\n" in stderr


def test_sys_exit_shows_its_reason_alone(scripted):
    with FakeLambda() as api:
        exits = "sys.exit('COLOR is not set')"
        assert_fails_with_one_line(scripted, api, "] COLOR is not set\n", AT_INIT=exits)
        report = only_report(api, "init")
    assert report["errorMessage"] == "COLOR is not set"
    assert report["stackTrace"] == []


# With the Extensions API, when …


@pytest.mark.parametrize(
    ("response", "words"),
    [
        pytest.param(NOT_TODAY, ["status 403", "Extension.SomeReason", "not today"], id="refused"),
        pytest.param(answer(302, Location="http://127.0.0.1:1/"), ["status 302"], id="redirected"),
        pytest.param(answer(body=b"two\nlines"), [": JSONDecodeError: "], id="no JSON"),
        pytest.param(answer(500, b"two\nlines"), [r"'two\nlines'"], id="an error of two lines"),
        pytest.param(answer(body={}), [": KeyError: 'eventType'"], id="no event"),
        pytest.param(resets, [": ConnectionError: "], id="reset"),
        pytest.param(
            ends_after(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
            [": ChunkedEncodingError: "],
            id="cut off",
        ),
    ],
)
def test_an_event_that_fails_to_arrive(extension, response, words):
    with FakeLambda([response]) as api:
        assert_fails_with_one_line(extension, api, f"] GET http://{api.address}{NEXT}: ", *words)
        assert len(api.requests_for("event/next")) == 1
        report = only_report(api)
    assert all(word in f": {report['errorMessage']}" for word in words)
    assert report["errorType"] == "Extension.ExtensionsApiError"
    assert report["stackTrace"] == []


def test_connections_that_close_between_events_lose_nothing(extension):
    events = [ends_after(invoke_event(str(number))) for number in range(20)]
    with FakeLambda([*events, SHUTDOWN], register=[ends_after(REGISTERED)]) as api:
        status, stdout, stderr = run_to_end(extension, api)
        assert len(api.requests_for("event/next")) == 21
    assert (status, stderr) == (0, "")
    assert re.findall(r'"requestId": "(\d+)"', stdout) == [str(number) for number in range(20)]


@pytest.mark.parametrize(
    "report", [answer(500), resets, b"no HTTP\r\n", hangs], ids=["refused", "reset", "odd", "none"]
)
def test_a_report_that_fails_does_not_hide_the_error(extension, report):
    with FakeLambda([NOT_TODAY], report=report) as api:
        start = time.monotonic()
        assert_fails_with_one_line(extension, api, f"{NEXT}: ", "not today")
        assert time.monotonic() - start < 30  # it takes at most 5 seconds
        assert len(api.requests_for("exit/error")) == 1


# In your code, when …


@pytest.mark.parametrize(
    ("do", "name", "message"),
    [
        pytest.param("{}['no such key']", "KeyError", "'no such key'", id="a bug"),
        pytest.param("sys.exit(0)", "SystemExit", "0", id="sys.exit(0)"),
        pytest.param("raise KeyboardInterrupt", "KeyboardInterrupt", "", id="no Exception"),
    ],
)
def test_an_exception_in_process(scripted, do, name, message):
    """It is reported with its stack trace, and the extension requests no further event."""
    with FakeLambda([invoke_event(do=do), SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(scripted, api)
        report = only_report(api)
        assert len(api.requests_for("event/next")) == 1
    assert status == 1
    assert "SHUTDOWN" not in stdout
    assert report["errorType"] == f"Extension.{name}"
    assert report["errorMessage"] == message
    assert any("in process" in line for line in report["stackTrace"])
    assert stderr.startswith(f"[{NAME}] Traceback (most recent call last):\n")
    assert re.search(r'File ".*", line \d+, in process', stderr)


def test_an_exception_in_process_at_shutdown(scripted):
    """Here the SHUTDOWN event stands for a signal."""
    with FakeLambda() as api, started(scripted, api, AT_SHUTDOWN="1 / 0") as process:
        wait_until(lambda: api.requests_for("event/next"))
        process.terminate()
        assert process.wait(60) == 1
        assert only_report(api)["errorType"] == "Extension.ZeroDivisionError"
        assert process.err.count("Traceback") == 1


def test_process_may_modify_the_event(scripted):
    code = "event.clear(); log(f'The event is {event}')"
    with FakeLambda([invoke_event(do=code), SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(scripted, api, AT_SHUTDOWN=code)
    assert (status, stderr) == (0, "")
    assert stdout.count("The event is {}") == 2


@pytest.mark.parametrize("error", ["", "1 / 0"], ids=["at SHUTDOWN", "after an error"])
def test_threads_of_your_code_do_not_delay_the_exit(scripted, error):
    code = f"import threading; threading.Thread(target=time.sleep, args=[60]).start(); {error}"
    with FakeLambda([invoke_event(do=code), SHUTDOWN]) as api:
        start = time.monotonic()
        status, _, _ = run_to_end(scripted, api)
        assert time.monotonic() - start < 30  # not the thread's 60
    assert status == (1 if error else 0)


def test_the_error_is_printed_before_it_is_reported(scripted):
    """Lambda may end the environment at the report."""
    with (
        FakeLambda([invoke_event(do="1 / 0")], report=hangs) as api,
        started(scripted, api) as process,
    ):
        wait_until(lambda: api.requests_for("exit/error"))
        assert "ZeroDivisionError" in process.err


def test_your_code_may_close_standard_output(scripted):
    with FakeLambda([invoke_event(do="sys.stdout.close()"), SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(scripted, api)
    assert (status, stderr) == (0, "")
    assert "SHUTDOWN" not in stdout  # it could not be logged


@pytest.mark.parametrize("output", [">/dev/full", "> >(:)"], ids=["full disk", "closed pipe"])
@pytest.mark.parametrize("error", ["", "1 / 0"], ids=["no error", "an error"])
def test_output_that_cannot_be_written(scripted, output, error):
    """The extension keeps running without it, and still reports an error."""
    with FakeLambda([invoke_event(), invoke_event(do=error), SHUTDOWN]) as api:
        with_output = "bash", "-c", f'exec "$@" {output} 2>&1', "bash"
        status, _, _ = run_to_end(scripted, api, with_output)
        assert status == (1 if error else 0)
        assert len(api.requests_for("event/next")) == (2 if error else 3)
        assert len(api.requests_for("exit/error")) == (1 if error else 0)


def test_ignores_the_functions_environment(extension, tmp_path):
    """Neither its proxies, its .netrc, its locale nor its PYTHON* change what happens."""
    for module in "json.py", "requests.py", "sitecustomize.py":
        (tmp_path / module).write_text("raise SystemExit('this module is for the function')")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
    proxy = f"http://127.0.0.1:{free_port()}"
    environment = {"http_proxy": proxy, "all_proxy": proxy, "HTTP_PROXY": proxy}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    environment |= {"PYTHONHOME": "/no", "PYTHONWARNINGS": "error"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with FakeLambda([invoke_event("Füße, 足, 🦶"), SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(extension, api, **environment)
    assert (status, stderr) == (0, "")
    assert json.dumps("Füße, 足, 🦶") in stdout
    assert not any("Authorization" in request.headers for request in api.requests)


# SIGTERM or SIGINT comes …


def assert_signal_shuts_down(process, signum=signal.SIGTERM):
    """Asserts that the signal leads to one SHUTDOWN event, and to status 0."""
    process.send_signal(signum)
    assert process.wait(60) == 0
    assert process.received[-1] == "SHUTDOWN"
    assert process.received.count("SHUTDOWN") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_waiting_for_an_event(scripted, signum):
    """SHUTDOWN has a deadline 1.5 seconds ahead. A second signal changes nothing."""
    second_signal = f"os.kill(os.getpid(), {signum:d})"
    shutdown = re.compile(f'"shutdownReason": "{signum.name}", "deadlineMs": (\\d+)')

    def seconds():
        with FakeLambda() as api, started(scripted, api, AT_SHUTDOWN=second_signal) as process:
            wait_until(lambda: api.requests_for("event/next"))
            begin = time.time()
            assert_signal_shuts_down(process, signum)
            assert process.err == ""
            end = time.time()
            deadline = int(shutdown.search(process.out).group(1)) / 1000  # in whole milliseconds
            assert begin + 1.499 <= deadline <= end + 1.5
            return end - begin

    assert fastest(seconds, 1) < 1  # not only when the time for a shutdown is over


@pytest.mark.parametrize("where", ["import", "init", "process"])
def test_a_signal_while_your_code_runs(scripted, where, tmp_path):
    """Your code ends first: a handler must not call process() in the middle of it."""
    code = f"wait_for('{tmp_path}/end')"
    events = [invoke_event(do=code)] if where == "process" else []
    environment = {} if events else {f"AT_{where.upper()}": code}
    with FakeLambda(events) as api, started(scripted, api, **environment) as process:
        wait_until(lambda: "] Begun\n" in process.out)
        process.terminate()
        (tmp_path / "end").touch()
        assert_signal_shuts_down(process)
        assert len(api.requests_for("event/next")) == len(events)
    happened = re.findall(r"\] (Begun|Ended)\n|(SHUTDOWN)", process.out)
    assert happened == [("Begun", ""), ("Ended", ""), ("", "SHUTDOWN")]


@pytest.mark.parametrize("at_shutdown", [False, True], ids=["at an invocation", "at SHUTDOWN"])
def test_a_signal_while_process_hangs(scripted, at_shutdown):
    """It exits after 1.5 seconds; a second signal, in between, does not prolong them."""
    events = [] if at_shutdown else [invoke_event(do="time.sleep(60)")]
    environment = {"AT_SHUTDOWN": "time.sleep(60)"} if at_shutdown else {}

    def seconds():
        with FakeLambda(events) as api, started(scripted, api, **environment) as process:
            wait_until(lambda: api.requests_for("event/next") if at_shutdown else process.received)
            start = time.monotonic()
            process.terminate()
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            return time.monotonic() - start

    assert 1.5 <= fastest(seconds, 2.2) < 2.2


def test_a_signal_after_lambdas_shutdown(scripted):
    """Lambda and whoever stops the container may both ask for an end. One SHUTDOWN arrives."""
    with FakeLambda([SHUTDOWN]) as api:
        code = {"AT_SHUTDOWN": "log('Begun'); time.sleep(0.5)"}
        with started(scripted, api, **code) as process:
            wait_until(lambda: "] Begun\n" in process.out)
            assert_signal_shuts_down(process)


# In your code, when it has child processes …


def assert_continues_after(scripted, code, logged):
    """Asserts that the extension logs this in an invocation, and then waits for the next event."""
    with FakeLambda([invoke_event(do=code), hangs]) as api, started(scripted, api) as process:
        wait_until(lambda: len(api.requests_for("event/next")) == 2)
        assert_signal_shuts_down(process)
        assert len(api.requests_for("event/next")) == 2
        assert len(api.requests_for("register")) == 1
        assert not api.requests_for("exit/error")
        assert re.findall(r"\] (The child.*)\n", process.out) == [logged]


@pytest.mark.parametrize(
    ("child", "signum", "status"),
    [
        pytest.param("time.sleep(60); os._exit(9)", "SIGTERM", -15, id="terminated at once"),
        pytest.param("time.sleep(60); os._exit(9)", "SIGINT", -2, id="interrupted at once"),
        pytest.param("1 / 0", None, 1, id="fails"),
        pytest.param("pass", None, 0, id="returns"),
    ],
)
def test_a_forked_child_does_not_affect_the_extension(scripted, child, signum, status):
    """It ends as any program does, and neither reports nor requests events."""
    code = f"fork({child!r}, {signum and f'signal.{signum}'})"
    assert_continues_after(scripted, code, f"The child exited with {status}")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_works(scripted, method):
    """One child ends by itself. The other one is terminated as soon as it has started."""
    code = f"start_processes('{method}')"
    assert_continues_after(scripted, code, "The children exited with 0 and -15")
