"""What the extension does when something goes wrong.

Each row of docs/failure-handling.md is a test here.
"""

import contextlib
import json
import re
import signal
import socket
import time

import pytest
from extension_process import PYTHON, run_to_end, started, variant
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
from machine import PROGRAMS, fastest, free_port, run, wait_until
from sample import NAME

NOT_TODAY = {"errorType": "Extension.SomeReason", "errorMessage": "not today"}


def assert_fails(extension, api, *words, **environment):
    """Asserts that the extension exits with 1 and one line on standard error; returns the line.

    These words must be in the line.
    """
    status, _, stderr = run_to_end(extension, api, **environment)
    assert status == 1
    assert re.fullmatch(rf"\[{NAME}\] .*\n", stderr), stderr
    assert stderr.rstrip("\n").isprintable()
    assert len(stderr) < 2_000
    assert all(word in stderr for word in words), stderr
    return stderr


def only_report(api, phase="exit"):
    """The only report of an error that the API got, from JSON."""
    (request,) = api.requests_for(f"{phase}/error")
    assert request.method == "POST"
    assert request.headers["Lambda-Extension-Identifier"] == IDENTIFIER
    assert request.headers["Lambda-Extension-Function-Error-Type"] == request.json["errorType"]
    return request.json


def ends_after(content):
    """An answer that ends the connection: the end arrives together with it, not a moment later."""

    def send(connection):
        connection.sendall(content, getattr(socket, "MSG_MORE", 0))
        connection.shutdown(socket.SHUT_RDWR)

    return send


@pytest.mark.parametrize(
    "address",
    [
        None,
        "nonsense",
        "127.0.0.1:port",
        "127.0.0.1:65536",
        "127.0.0.1:099999",
        "http://127.0.0.1:9001",
        "host with space:9001",
        ":",
        ":+9001",
        "[127.0.0.1]:9001",
        "user:secret@127.0.0.1:9001",
        "127.0.0.1:9001/secret",
        "127.0.0.1:9001 secret",
        "127.0.0.1:9001@secret",
    ],
)
def test_aws_lambda_runtime_api_missing_or_malformed(extension, address):
    """The error does not show the value, which may be a secret in the wrong variable."""
    line = assert_fails(extension, address, "] AWS_LAMBDA_RUNTIME_API is not HOST:PORT")
    assert "secret" not in line


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        pytest.param("no..host:9001", "Unicode", id="not a host name"),
        pytest.param(
            "127.0.0.1:1",
            "ConnectionRefusedError: [Errno 111] Connection refused\n",
            id="a port where nothing listens",
        ),
    ],
)
def test_aws_lambda_runtime_api_wrong(extension, address, reason):
    """The address has the right form, but nothing answers there: the error shows it."""
    request = f"] POST http://{address}/2020-01-01/extension/register: "
    line = assert_fails(extension, address, f"{request}{reason}")
    assert re.search(r"/register: \w+Error: \S", line)


def test_variables_of_the_function_a_netrc_and_white_space_around_the_address(extension, tmp_path):
    """Nothing of this changes what the extension runs, sends or prints."""
    for module in "json.py", "requests.py", "sitecustomize.py":
        (tmp_path / module).write_text("raise SystemExit('this module is for the function')")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
    proxy = f"http://127.0.0.1:{free_port()}"
    variables = {"http_proxy": proxy, "all_proxy": proxy, "HTTP_PROXY": proxy}
    variables |= {"HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    variables |= {"PYTHONHOME": "/no", "PYTHONWARNINGS": "error"}
    variables |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with FakeLambda([invoke_event("Füße, 足, 🦶"), invoke_event(), SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(extension, f" {api.address}\n", **variables)
    assert (status, stderr) == (0, "")
    assert json.dumps("Füße, 足, 🦶") in stdout
    assert not any("Authorization" in request.headers for request in api.requests)


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(">&-", id="closed from the start"),
        pytest.param("> >(:)", id="closed by its reader"),
        pytest.param(">/dev/full", id="on a full disk"),
    ],
)
def test_standard_output_closed_or_on_a_full_disk(extension, output):
    """It works without logging."""
    with FakeLambda([invoke_event(), invoke_event(), SHUTDOWN]) as api:
        with_output = "bash", "-c", f'exec "$@" {output}', "bash"
        status, stdout, stderr = run_to_end(extension, api, with_output)
        assert (status, stdout, stderr) == (0, "", "")
        assert len(api.requests_for("event/next")) == 3


@pytest.mark.parametrize(
    "close", ["sys.stdout.close(); sys.stderr.close()", "os.close(1)", "sys.stdout = None"]
)
def test_standard_output_closed_by_your_code(obedient, close):
    """What log() writes still arrives, and only there: a new connection may get descriptor 1."""
    gone = ends_after(invoke_event(do=f"{close}; log('closed')"))
    with FakeLambda([gone, invoke_event(do="log('still logged')"), SHUTDOWN]) as api:
        status, stdout, _ = run_to_end(obedient, api)
        assert len(api.requests) == 4
    assert status == 0
    assert f"[{NAME}] closed\n" in stdout
    assert f"[{NAME}] still logged\n" in stdout


def test_standard_output_read_slowly(obedient):
    """A line arrives whole, even if a signal that a library catches interrupts its writing."""
    catch = "import signal; signal.signal(signal.SIGALRM, lambda *_: None)"
    ring = f"{catch}; signal.setitimer(signal.ITIMER_REAL, 0.2)"
    slowly = "bash", "-c", 'exec "$@" > >(sleep 1; cat)', "bash"
    events = invoke_event(do=f"{ring}; log('x' * 200_000)"), SHUTDOWN
    with FakeLambda(events) as api, started(obedient, api, slowly) as it:
        assert it.wait(60) == 0
        wait_until(lambda: f"\n[{NAME}] {'x' * 200_000}\n" in it.out)


NO_IDENTIFIER = ": no valid Lambda-Extension-Identifier in the response\n"


@pytest.mark.parametrize(
    ("response", "words"),
    [
        pytest.param(answer(300), [": 300"], id="a status"),
        pytest.param(answer(307, Location="http://127.0.0.1:1/"), [": 307"], id="a redirect"),
        pytest.param(answer(403, NOT_TODAY), [": 403 ", *NOT_TODAY.values()], id="a refusal"),
        pytest.param(answer(), [NO_IDENTIFIER], id="no identifier"),
        pytest.param(
            answer(Lambda_Extension_Identifier="two\twords"),
            [NO_IDENTIFIER],
            id="a bad identifier",
        ),
        pytest.param(resets, [": "], id="a reset"),
        pytest.param(None, [": "], id="an end"),
        pytest.param(hangs, [": TimeoutError"], id="nothing"),
        pytest.param(b"220 mail.example.com ESMTP\r\n", [": "], id="another protocol"),
    ],
)
def test_a_registration_that_is_refused_or_not_answered_as_documented(extension, response, words):
    """It shows the response, and does not try again."""
    with FakeLambda(register=[response]) as api:
        request = f"] POST http://{api.address}/2020-01-01/extension/register: "
        assert_fails(extension, api, request, *words)
        assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("response", "words"),
    [
        pytest.param(answer(300), [": 300"], id="a status"),
        pytest.param(answer(302, Location="http://127.0.0.1:1/"), [": 302"], id="a redirect"),
        pytest.param(answer(403, NOT_TODAY), [": 403 ", *NOT_TODAY.values()], id="a refusal"),
        pytest.param(answer(body=b""), [": not an event:"], id="no body"),
        pytest.param(answer(body=b"soon"), [": not an event: soon"], id="no JSON"),
        pytest.param(answer(body=b"\xff\xfe"), [": not an event:"], id="no text"),
        pytest.param(answer(body=b"5"), [": not an event: 5"], id="a number"),
        pytest.param(answer(body=b"[]"), [": not an event: []"], id="a list"),
        pytest.param(answer(body=b"{}"), [": not an event: {}"], id="no type"),
        pytest.param(
            answer(body=b'{"eventType": null}'), [': not an event: {"ev'], id="a type that is null"
        ),
        pytest.param(
            answer(body=b'{"eventType": [5]}'), [': not an event: {"ev'], id="a type that is a list"
        ),
        pytest.param(answer(body=b"[" * 9_999), [": not an event: [[[["], id="deep nesting"),
        pytest.param(None, [": "], id="an end"),
        pytest.param(resets, [": "], id="a reset"),
        pytest.param(b"hello\r\n\r\n", [": "], id="another protocol"),
        pytest.param(
            ends_after(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
            [": "],
            id="an end within the body",
        ),
    ],
)
def test_an_event_that_is_refused_or_not_sent_as_documented(extension, response, words):
    """It shows and reports the response, and does not ask again."""
    with FakeLambda([response]) as api:
        request = f"] GET http://{api.address}/2020-01-01/extension/event/next: "
        line = assert_fails(extension, api, request, *words)
        assert len(api.requests_for("event/next")) == 1
        report = only_report(api)
    assert report["errorMessage"] in line
    assert report["errorType"] == "Extension.ExtensionsApiError"
    assert report["stackTrace"] == []


def test_an_unknown_event_type(extension):
    """Lambda may have new types some day: it logs this one, and goes on."""
    unknown = answer(body={"eventType": "\x1b" + 100 * "x"})
    with FakeLambda([unknown, invoke_event("after"), SHUTDOWN]) as api:
        status, stdout, _ = run_to_end(extension, api)
    assert status == 0
    assert f"[{NAME}] Ignored an unknown event: '\\x1b{99 * 'x'}'\n" in stdout
    assert '"requestId": "after"' in stdout


def test_connection_closed_between_events(extension):
    """It connects again for each of twenty events, and loses none."""
    events = [ends_after(invoke_event(str(number))) for number in range(20)]
    with FakeLambda([*events, SHUTDOWN], register=[ends_after(REGISTERED)]) as api:
        status, stdout, stderr = run_to_end(extension, api)
        assert len(api.requests_for("event/next")) == 21
    assert (status, stderr) == (0, "")
    assert re.findall(r'"requestId": "(\d+)"', stdout) == [str(number) for number in range(20)]


@pytest.mark.parametrize(
    ("do", "name", "text"),
    [
        pytest.param("{}['no such key']", "KeyError", "'no such key'", id="a bug"),
        pytest.param("sys.exit(0)", "SystemExit", "0", id="sys.exit"),
        pytest.param("raise Exception('x' * 1001)", "Exception", 1000 * "x", id="a long text"),
        pytest.param("raise KeyboardInterrupt", "KeyboardInterrupt", "", id="no text"),
        pytest.param(
            "raise type('Unlucky', (BaseException,), {'__str__': lambda _: 1 / 0})",
            "Unlucky",
            "<exception str() failed>",
            id="a text that fails",
        ),
        pytest.param(
            "raise type('Größe\\n', (Exception,), {})('5')",
            "Gr\\xf6\\xdfe\\n",
            "5",
            id="a name that no header may have",
        ),
        pytest.param(
            "raise SyntaxError('5', ('file.py', 1, 1.5, 'text'))",
            "SyntaxError",
            None,
            id="details that fail",
        ),
        pytest.param(
            "raise type('E', (Exception,), {'__getattr__': lambda *_: {}[0]})('5')",
            "E",
            None,
            id="attributes that fail",
        ),
    ],
)
def test_a_bug_in_process(obedient, do, name, text):
    """Whatever process() raises is shown and reported, with the place where it happened."""
    with FakeLambda([invoke_event(do=do), SHUTDOWN]) as api:
        status, _, stderr = run_to_end(obedient, api)
        report = only_report(api)
        assert len(api.requests_for("event/next")) == 1
    assert status == 1
    assert report["errorType"] == f"Extension.{name}"
    if text is not None:  # otherwise what Python shows depends on its version
        assert report["errorMessage"] in (
            text,
            f"<unprintable {name} object>",  # Python 3.10
            f"an exception that cannot be shown: {name}",  # not even Python can show it
        )
    assert any("in process" in line for line in report["stackTrace"])
    assert re.match(rf"\[{NAME}\] (Traceback \(most|an exception that cannot be shown)", stderr)
    assert re.search(r'File ".*", line \d+, in process', stderr)
    assert stderr.count("Traceback") <= 1


def test_a_bug_in_process_at_shutdown(obedient):
    """Here the SHUTDOWN event stands for a signal."""
    with FakeLambda() as api, started(obedient, api, AT_SHUTDOWN="1 / 0") as it:
        wait_until(lambda: api.requests_for("event/next"))
        it.terminate()
        assert it.wait(60) == 1
        assert only_report(api)["errorType"] == "Extension.ZeroDivisionError"
        assert it.err.count("Traceback") == 1


# Code after which the process can open no further file.
NO_FURTHER_FILE = (
    "import resource",
    "in_use = [int(descriptor) for descriptor in os.listdir('/proc/self/fd')]",
    "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (max(in_use), most))",
)
# Code after which it can start no further thread: there is no memory for a stack.
NO_FURTHER_THREAD = (
    "import resource, threading",
    "threading.Thread(target=time.sleep, args=[60]).start()",
    "threading.stack_size(1 << 30)",
    "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()",
    "resource.setrlimit(resource.RLIMIT_AS, (size + (32 << 20), resource.RLIM_INFINITY))",
)


@pytest.mark.parametrize("exhaust", [NO_FURTHER_FILE, NO_FURTHER_THREAD], ids=["file", "thread"])
@pytest.mark.parametrize("where", ["process", "init"])
def test_an_error_when_no_further_file_can_be_opened_or_thread_started(obedient, where, exhaust):
    """Showing and reporting an error needs neither, and waits for no thread."""
    code = "\n".join([*exhaust, "{}['no such key']"])
    environment = {"AT_INIT": code} if where == "init" else {}
    with FakeLambda([invoke_event(do=code)]) as api:
        start = time.monotonic()
        status, _, stderr = run_to_end(obedient, api, **environment)
        assert time.monotonic() - start < 30  # not the thread's 60
        report = only_report(api, "init" if where == "init" else "exit")
    assert status == 1
    assert report["errorType"] == "Extension.KeyError"
    assert stderr.count("Traceback") == 1


def test_an_error_in_init(obedient):
    """sys.exit("reason") shows the reason alone, and no event is asked for."""
    with FakeLambda() as api:
        assert_fails(obedient, api, "] COLOR is not set\n", AT_INIT="sys.exit('COLOR is not set')")
        assert only_report(api, "init")["errorMessage"] == "COLOR is not set"
        assert not api.requests_for("event/next")


def test_an_event_that_process_changes(obedient):
    """Without its type, the extension could not know whether the event was the last one."""
    with FakeLambda([invoke_event(do="event.clear()"), SHUTDOWN]) as api:
        status, _, _ = run_to_end(obedient, api, AT_SHUTDOWN="event.clear()")
        assert status == 0
        assert len(api.requests_for("event/next")) == 2


def drip(connection):
    """An answer that comes byte by byte, one a second."""
    for byte in answer(202):
        connection.sendall(bytes([byte]))
        time.sleep(1)


@pytest.mark.parametrize(
    "report",
    [
        pytest.param(answer(500), id="refused"),
        pytest.param(resets, id="reset"),
        pytest.param(b"no HTTP\r\n", id="no HTTP"),
        pytest.param(answer(202, Content_Length=10**30), id="never complete"),
        pytest.param(drip, id="slow"),
        pytest.param(hangs, id="no answer"),
    ],
)
def test_an_error_report_that_fails(extension, report):
    """The error is shown all the same, and the extension ends within five seconds."""
    with FakeLambda([answer(403, NOT_TODAY)], report=report) as api:
        start = time.monotonic()
        assert_fails(extension, api, "/extension/event/next: 403 ", "not today")
        assert time.monotonic() - start < 10  # twice the time limit
        assert len(api.requests_for("exit/error")) == 1


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        pytest.param(b"why " * 12_500_000, ": 403 why why ", id="50 MB"),
        pytest.param(
            b"red \x1b[31m, \a, and\nleft \xe2\x80\xae\xff",
            r": 403 red \x1b[31m, \x07, and left \u202e\ufffd",
            id="control characters",
        ),
    ],
)
def test_an_error_response_of_any_size_and_content(extension, body, shown):
    """It shows the beginning of the response, in one line and escaped."""
    with FakeLambda([answer(403, body)]) as api:
        line = assert_fails(extension, api, shown)
        assert only_report(api)["errorMessage"] in line


def test_a_signal_while_a_report_hangs(extension):
    """It has shown the error. It ends without SHUTDOWN for process(), and with 1."""

    def seconds():
        with (
            FakeLambda([answer(403, NOT_TODAY)], report=hangs) as api,
            started(extension, api) as it,
        ):
            wait_until(lambda: api.requests_for("exit/error"))
            begin = time.monotonic()
            it.terminate()
            assert it.wait(60) == 1
            assert it.err.count("\n") == 1
            assert it.err.count("not today") == 1
            assert it.received == []
            return time.monotonic() - begin

    assert fastest(seconds, 2.5) < 2.5  # not the 5 that a report may take


def assert_signal_ends_it(it, signum=signal.SIGTERM, stderr=""):
    """Asserts that a signal ends the extension with 0, after one SHUTDOWN event.

    Standard error must hold exactly stderr; if that is None, it may hold anything.
    """
    it.send_signal(signum)
    assert it.wait(60) == 0
    if stderr is not None:
        assert it.err == stderr
    assert it.received[-1] == "SHUTDOWN"
    assert it.received.count("SHUTDOWN") == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_run(extension, tmp_path, signum):
    """Nothing has begun that must be shut down, so it ends at once."""
    slow_start = "print('Begun')\nimport time\ntime.sleep(60)\n"
    slow = variant(extension, tmp_path, {"extension.py": f"import lifecycle\n{slow_start}"})
    with FakeLambda() as api, started(slow, api) as it:
        wait_until(lambda: it.out == "Begun\n")  # Python may write the end of the line by itself
        it.send_signal(signum)
        assert it.wait(60) == 0
        assert (it.out, it.err) == ("Begun\n", "")
        assert not api.requests


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_waiting(obedient, signum):
    """The SHUTDOWN event has a deadline 1.5 seconds ahead. A second signal changes nothing."""
    another_one = f"os.kill(os.getpid(), {signum:d})"
    shutdown = re.compile(f'"shutdownReason": "{signum.name}", "deadlineMs": (\\d+)')

    def seconds():
        with FakeLambda() as api, started(obedient, api, AT_SHUTDOWN=another_one) as it:
            wait_until(lambda: api.requests_for("event/next"))
            begin = time.time()
            assert_signal_ends_it(it, signum)
            end = time.time()
            deadline = int(shutdown.search(it.out).group(1)) / 1000  # rounded to milliseconds
            assert begin + 1.499 <= deadline
            assert deadline <= end + 1.5
            return end - begin

    assert fastest(seconds, 1) < 1  # not only when the time for a shutdown is over


@pytest.mark.parametrize("where", ["process", "init"])
def test_a_signal_while_your_code_runs(obedient, where, tmp_path):
    """Your code ends first: a handler must not call process() in the middle of it."""
    waiting = f"while not os.path.exists('{tmp_path}/end'): time.sleep(0.01)"
    code = f"log('Begun')\n{waiting}\nlog('Ended')"
    events = [invoke_event(do=code)] if where == "process" else []
    environment = {"AT_INIT": code} if where == "init" else {}
    with FakeLambda(events) as api, started(obedient, api, **environment) as it:
        wait_until(lambda: "] Begun\n" in it.out)
        it.terminate()
        (tmp_path / "end").touch()
        assert_signal_ends_it(it)
        assert len(api.requests_for("event/next")) == len(events)
    happened = re.findall(r"\] (Begun|Ended)\n|(SHUTDOWN)", it.out)
    assert happened == [("Begun", ""), ("Ended", ""), ("", "SHUTDOWN")]


# A signal that a library catches, and sends.
ALARM = "signal.signal(signal.SIGALRM, lambda *_: None); signal.raise_signal(signal.SIGALRM)"


@pytest.mark.parametrize(
    ("before", "hang", "at_shutdown"),
    [
        pytest.param("", "time.sleep(60)", False, id="in Python"),
        pytest.param("", "os.system('sleep 3')", False, id="in C"),
        pytest.param("", "time.sleep(60)", True, id="in Python, at SHUTDOWN"),
        pytest.param("", "os.system('sleep 3')", True, id="in C, at SHUTDOWN"),
        pytest.param("signal.set_wakeup_fd(-1)", "time.sleep(60)", False, id="in asyncio"),
        pytest.param(ALARM, "time.sleep(60)", False, id="after a library's own signal"),
    ],
)
def test_a_signal_when_process_takes_longer_than_a_shutdown(obedient, before, hang, at_shutdown):
    """It ends after 1.5 seconds, even in os.system(), a call into C that takes 3 seconds here."""
    events = [] if at_shutdown else [invoke_event(do=hang)]
    environment = {"AT_INIT": f"import signal; {before}"}
    if at_shutdown:
        environment["AT_SHUTDOWN"] = hang

    def seconds():
        with FakeLambda([*events, hangs]) as api, started(obedient, api, **environment) as it:
            wait_until(lambda: api.requests_for("event/next") if at_shutdown else it.received)
            start = time.monotonic()
            it.terminate()
            assert it.wait(60) == 0
            assert "Done" not in it.out
            return time.monotonic() - start

    assert 1.5 <= fastest(seconds, 2.5) < 2.5


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],
    ids=["SIGTERM first", "SIGINT first"],
)
def test_a_second_signal_when_process_takes_longer_than_a_shutdown(obedient, first, second):
    """It does not let the extension live longer: the first one counts."""

    def seconds():
        with FakeLambda([invoke_event(do="time.sleep(60)")]) as api, started(obedient, api) as it:
            wait_until(lambda: it.received)
            start = time.monotonic()
            it.send_signal(first)
            time.sleep(1)
            it.send_signal(second)
            assert it.wait(60) == 0
            return time.monotonic() - start

    assert fastest(seconds, 2.2) < 2.2


def test_a_signal_after_shutdown(obedient):
    """While Python itself ends, a signal would kill it."""
    with FakeLambda([SHUTDOWN]) as api:
        for delay in range(0, 20, 4):
            with started(obedient, api) as it:
                wait_until(lambda it=it: "Done" in it.out)
                time.sleep(delay / 1000)
                it.terminate()
                assert it.wait(60) == 0


def assert_goes_on_after(obedient, codes, logged):
    """Asserts that the extension goes on after events with these codes, which are lists of lines.

    It must log the lines that are given, and register no second time.
    """
    events = [invoke_event(do="\n".join(["import signal", *lines])) for lines in codes]
    with FakeLambda([*events, hangs]) as api, started(obedient, api) as it:
        wait_until(lambda: len(api.requests_for("event/next")) == len(events) + 1)
        assert re.findall(r"\] (The .*)\n", it.out) == logged
        time.sleep(2)  # longer than the watchdog waits
        assert it.poll() is None
        assert not api.requests_for("exit/error")
        assert len(api.requests_for("event/next")) == len(events) + 1
        assert len(api.requests_for("register")) == 1
        assert_signal_ends_it(it, stderr=None)


def test_signals_that_are_not_for_the_extension(obedient):
    """A library may use other signals, such as an alarm."""
    alarm = (
        "signal.signal(signal.SIGALRM, lambda *_: log('The alarm rang'))",
        "signal.raise_signal(signal.SIGALRM)",
    )
    assert_goes_on_after(obedient, [alarm], ["The alarm rang"])


LOG_HOW_IT_ENDS = (
    "_, status = os.wait()",
    "log(f'The child ended with {os.waitstatus_to_exitcode(status)}')",
)
KILL_AT_ONCE = "os.kill(pid, signal.SIGTERM)"
KILL_WHEN_READY = "os.read(reader, 1); os.kill(pid, signal.SIGTERM)"
# What the child does, what its parent does, and the status with which the child ends.
FORKS = [
    ("pass", KILL_AT_ONCE, -signal.SIGTERM),
    ("pass", KILL_WHEN_READY, -signal.SIGTERM),
    ("signal.signal(signal.SIGTERM, lambda *_: os._exit(5))", KILL_WHEN_READY, 5),
    ("sys.exit(0)", "pass", 0),
    ("1 / 0", "pass", 1),
]


def fork(child, parent):
    """The lines of code that fork; the child and its parent do what these say."""
    return (
        "reader, writer = os.pipe()",
        "pid = os.fork()",
        "if pid == 0:",
        f"    {child}",
        "    os.write(writer, b'ready')",
        # Short sleeps, because a signal that comes just before a sleep waits for its end.
        "    for _ in range(600): time.sleep(0.1)",
        # Otherwise a child that no signal ends would go on into its parent's code, and send the
        # signal to process 0, which means its whole process group: the tests.
        "    os._exit(9)",
        parent,
        *LOG_HOW_IT_ENDS,
    )


def test_a_child_process_that_your_code_forks(obedient):
    """However the child ends, the extension goes on, and asks for the next event."""
    codes = [fork(child, parent) for child, parent, _ in FORKS]
    logged = [f"The child ended with {status}" for _, _, status in FORKS]
    assert_goes_on_after(obedient, codes, logged)


def test_a_child_process_that_returns_from_your_code(obedient):
    """The child ends where it would ask for an event. The extension goes on."""
    code = ("if os.fork() != 0:", *(f"    {line}" for line in LOG_HOW_IT_ENDS))
    assert_goes_on_after(obedient, [code], ["The child ended with 0"])


def test_child_processes_of_multiprocessing(obedient):
    """One ends by itself, the other one by a SIGTERM: with -15, or by a handler of its own."""
    codes = [
        (
            "import multiprocessing",
            f"context = multiprocessing.get_context('{method}')",
            "ends = context.Process(target=print, args=['Hello from the child'])",
            "sleeps = context.Process(target=time.sleep, args=[60])",
            "ends.start(); ends.join()",
            "sleeps.start(); sleeps.terminate(); sleeps.join()",
            "log(f'The children ended: {ends.exitcode == 0 and sleeps.exitcode in (0, -15)}')",
        )
        for method in ("fork", "spawn", "forkserver")
    ]
    assert_goes_on_after(obedient, codes, ["The children ended: True"] * 3)


def test_a_signal_while_it_is_suspended(obedient):
    """When a process goes on, any of its threads may get the signal: hence six extensions."""
    with FakeLambda() as api, contextlib.ExitStack() as stack:
        extensions = [stack.enter_context(started(obedient, api)) for _ in range(6)]
        wait_until(lambda: len(api.requests_for("event/next")) == len(extensions))
        for it in extensions:
            it.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        for it in extensions:
            it.terminate()
            it.send_signal(signal.SIGCONT)
        for it in extensions:
            assert it.wait(60) == 0
            assert it.received == ["SHUTDOWN"]


def test_a_signal_at_any_moment_between_two_events(extension):
    """In each fork of the extension, the signal comes at another line of its code."""
    with FakeLambda([invoke_event("event")]) as api:
        program = PROGRAMS / "signal_at_any_moment.py"
        environment = {"AWS_LAMBDA_RUNTIME_API": api.address}
        ran = run(*PYTHON, program, extension.parent, env=environment, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert len(api.requests_for("event/next")) == 2
    endings = json.loads(ran.stdout.splitlines()[-1])
    assert len(endings) > 100
    # A fork may have got its INVOKE event before the signal came.
    good = "0 SHUTDOWN", "0 INVOKESHUTDOWN"
    assert {place: ending for place, ending in endings.items() if ending not in good} == {}
