"""What the extension does when something goes wrong.

Each row of docs/failure-handling.md is a test here.
"""

import contextlib
import json
import re
import signal
import socket
import subprocess
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

    The line must have these words in it.
    """
    status, _, stderr = run_to_end(extension, api, **environment)
    assert status == 1
    assert re.fullmatch(rf"\[{NAME}\] .*\n", stderr), stderr
    assert stderr.rstrip("\n").isprintable()
    assert len(stderr) < 2_000
    assert all(word in stderr for word in words), stderr
    return stderr


def reported(api, phase="exit"):
    """The one report of an error that the API got, as JSON."""
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
    assert "secret" not in assert_fails(
        extension, address, "] AWS_LAMBDA_RUNTIME_API is not HOST:PORT"
    )


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("no..host:9001", "Unicode"),
        ("127.0.0.1:99999", ""),
        ("127.0.0.1:1", "ConnectionRefusedError: [Errno 111] Connection refused\n"),
    ],
)
def test_aws_lambda_runtime_api_wrong(extension, address, reason):
    request = f"] POST http://{address}/2020-01-01/extension/register: "
    line = assert_fails(extension, address, f"{request}{reason}")
    assert re.search(r"/register: \w+Error: \S", line)


def test_variables_of_the_function_a_netrc_and_white_space_around_the_address(extension, tmp_path):
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


@pytest.mark.parametrize("closed", [">&-", "> >(:)"], ids=["from the start", "by its reader"])
def test_standard_output_closed(extension, closed):
    with FakeLambda([invoke_event(), invoke_event(), SHUTDOWN]) as api:
        assert run_to_end(extension, api, ["bash", "-c", f'exec "$@" {closed}', "bash"]) == (
            0,
            "",
            "",
        )
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
    """A signal that a library catches interrupts a write in the middle."""
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
        (answer(300), [": 300"]),
        (answer(307, Location="http://127.0.0.1:1/"), [": 307"]),
        (answer(403, NOT_TODAY), [": 403 ", *NOT_TODAY.values()]),
        (answer(), [NO_IDENTIFIER]),
        (answer(Lambda_Extension_Identifier="two\twords"), [NO_IDENTIFIER]),
        (resets, [": "]),
        (None, [": "]),
        (hangs, [": TimeoutError"]),
        (b"220 mail.example.com ESMTP\r\n", [": "]),
    ],
)
def test_a_registration_that_is_refused_or_not_answered_as_documented(extension, response, words):
    with FakeLambda(register=[response]) as api:
        request = f"] POST http://{api.address}/2020-01-01/extension/register: "
        assert_fails(extension, api, request, *words)
        assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (answer(300), [": 300"]),
        (answer(302, Location="http://127.0.0.1:1/"), [": 302"]),
        (answer(403, NOT_TODAY), [": 403 ", *NOT_TODAY.values()]),
        (answer(body=b""), [": not an event:"]),
        (answer(body=b"soon"), [": not an event: soon"]),
        (answer(body=b"\xff\xfe"), [": not an event:"]),
        (answer(body=b"5"), [": not an event: 5"]),
        (answer(body=b"[]"), [": not an event: []"]),
        (answer(body=b"{}"), [": not an event: {}"]),
        (answer(body=b'{"eventType": null}'), [': not an event: {"ev']),
        (answer(body=b"[" * 9_999), [": not an event: [[[["]),
        (None, [": "]),
        (resets, [": "]),
        (b"hello\r\n\r\n", [": "]),
        (ends_after(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"), [": "]),
    ],
)
def test_an_event_that_is_refused_or_not_sent_as_documented(extension, response, words):
    with FakeLambda([response]) as api:
        request = f"] GET http://{api.address}/2020-01-01/extension/event/next: "
        line = assert_fails(extension, api, request, *words)
        assert len(api.requests_for("event/next")) == 1
        report = reported(api)
    assert report["errorMessage"] in line
    assert (report["errorType"], report["stackTrace"]) == ("Extension.ExtensionsApiError", [])


def test_an_unknown_event_type(extension):
    unknown = answer(body={"eventType": "\x1b" + 100 * "x"})
    with FakeLambda([unknown, invoke_event("after"), SHUTDOWN]) as api:
        status, stdout, _ = run_to_end(extension, api)
    assert status == 0
    assert f"[{NAME}] Ignored an unknown event: '\\x1b{99 * 'x'}'\n" in stdout
    assert '"requestId": "after"' in stdout


def test_connection_closed_between_events(extension):
    events = [ends_after(invoke_event(str(number))) for number in range(20)]
    with FakeLambda([*events, SHUTDOWN], register=[ends_after(REGISTERED)]) as api:
        status, stdout, stderr = run_to_end(extension, api)
        assert len(api.requests_for("event/next")) == 21
    assert (status, stderr) == (0, "")
    assert re.findall(r'"requestId": "(\d+)"', stdout) == [str(number) for number in range(20)]


@pytest.mark.parametrize(
    ("do", "name", "text"),
    [
        ("{}['no such key']", "KeyError", "'no such key'"),
        ("sys.exit(0)", "SystemExit", "0"),
        ("raise Exception('x' * 1001)", "Exception", 1000 * "x"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt", ""),
        (
            "raise type('Unlucky', (BaseException,), {'__str__': lambda _: 1 / 0})",
            "Unlucky",
            "<exception str() failed>",
        ),
        ("raise type('Größe\\n', (Exception,), {})('5')", "Gr\\xf6\\xdfe\\n", "5"),
        ("raise SyntaxError('5', ('file.py', 1, 1.5, 'text'))", "SyntaxError", None),
        ("raise type('E', (Exception,), {'__getattr__': lambda *_: {}[0]})('5')", "E", None),
    ],
)
def test_a_bug_in_process(obedient, do, name, text):
    with FakeLambda([invoke_event(do=do), SHUTDOWN]) as api:
        status, _, stderr = run_to_end(obedient, api)
        report = reported(api)
        assert len(api.requests_for("event/next")) == 1
    assert (status, report["errorType"]) == (1, f"Extension.{name}")
    # The first is what Python 3.10 shows, the second is for what Python cannot show at all.
    unprintable = f"<unprintable {name} object>", f"an exception that cannot be shown: {name}"
    assert text is None or report["errorMessage"] in (text, *unprintable)
    assert any("in process" in line for line in report["stackTrace"])
    assert re.match(rf"\[{NAME}\] (Traceback \(most|an exception that cannot be shown)", stderr)
    assert re.search(r'File ".*", line \d+, in process', stderr)
    assert stderr.count("Traceback") <= 1


def test_a_bug_in_process_at_shutdown(obedient):
    with FakeLambda() as api, started(obedient, api, AT_SHUTDOWN="1 / 0") as it:
        wait_until(lambda: api.requests_for("event/next"))
        it.terminate()
        assert it.wait(60) == 1
        assert reported(api)["errorType"] == "Extension.ZeroDivisionError"
        assert it.err.count("Traceback") == 1


NO_FURTHER_FILE = (
    "import resource",
    "in_use = [int(descriptor) for descriptor in os.listdir('/proc/self/fd')]",
    "_, most = resource.getrlimit(resource.RLIMIT_NOFILE)",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (max(in_use), most))",
)
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
    code = "\n".join([*exhaust, "{}['no such key']"])
    environment = {"AT_INIT": code} if where == "init" else {}
    with FakeLambda([invoke_event(do=code)]) as api:
        start = time.monotonic()
        status, _, stderr = run_to_end(obedient, api, **environment)
        assert time.monotonic() - start < 30  # not the thread's 60
        report = reported(api, "init" if where == "init" else "exit")
    assert (status, report["errorType"]) == (1, "Extension.KeyError")
    assert stderr.count("Traceback") == 1


def test_an_error_in_init(obedient):
    with FakeLambda() as api:
        assert_fails(obedient, api, "] COLOR is not set\n", AT_INIT="sys.exit('COLOR is not set')")
        assert reported(api, "init")["errorMessage"] == "COLOR is not set"
        assert not api.requests_for("event/next")


def test_an_event_that_process_changes(obedient):
    with FakeLambda([invoke_event(do="event.clear()"), SHUTDOWN]) as api:
        assert run_to_end(obedient, api, AT_SHUTDOWN="event.clear()")[0] == 0
        assert len(api.requests_for("event/next")) == 2


def drip(connection):
    for byte in answer(202):
        connection.sendall(bytes([byte]))
        time.sleep(1)


@pytest.mark.parametrize(
    "report", [answer(500), resets, b"no HTTP\r\n", answer(202, Content_Length=10**30), drip, hangs]
)
def test_an_error_report_that_fails(extension, report):
    with FakeLambda([answer(403, NOT_TODAY)], report=report) as api:
        start = time.monotonic()
        assert_fails(extension, api, "/extension/event/next: 403 ", "not today")
        assert time.monotonic() - start < 10  # twice the time limit
        assert len(api.requests_for("exit/error")) == 1


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"why " * 12_500_000, ": 403 why why "),
        (
            b"red \x1b[31m, \a, and\nleft \xe2\x80\xae\xff",
            r": 403 red \x1b[31m, \x07, and left \u202e\ufffd",
        ),
    ],
)
def test_an_error_response_of_any_size_and_content(extension, body, shown):
    with FakeLambda([answer(403, body)]) as api:
        line = assert_fails(extension, api, shown)
        assert reported(api)["errorMessage"] in line


def test_a_signal_while_a_report_hangs(extension):
    def seconds():
        with (
            FakeLambda([answer(403, NOT_TODAY)], report=hangs) as api,
            started(extension, api) as it,
        ):
            wait_until(lambda: api.requests_for("exit/error"))
            begin = time.monotonic()
            it.terminate()
            assert it.wait(60) == 1
            assert it.err.count("not today") == it.err.count("\n") == 1
            assert it.received == []
            return time.monotonic() - begin

    assert fastest(seconds, 2.5) < 2.5  # not the 5 that a report may take


def assert_signal_ends_it(it, signum=signal.SIGTERM, stderr=""):
    """Asserts that a signal ends the extension with 0, after one SHUTDOWN event.

    Standard error must hold exactly stderr; if that is None, it may hold anything.
    """
    it.send_signal(signum)
    assert it.wait(60) == 0
    assert stderr in (None, it.err)
    assert it.received.index("SHUTDOWN") == len(it.received) - 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_run(extension, tmp_path, signum):
    slow_start = "print('Begun')\nimport time\ntime.sleep(60)\n"
    slow = variant(extension, tmp_path, {"extension.py": f"import lifecycle\n{slow_start}"})
    with FakeLambda() as api, started(slow, api) as it:
        wait_until(lambda: "Begun" in it.out)
        it.send_signal(signum)
        assert (it.wait(60), it.out, it.err) == (0, "Begun\n", "")
        assert not api.requests


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_waiting(obedient, signum):
    another_one = f"os.kill(os.getpid(), {signum:d})"
    shutdown = re.compile(f'"shutdownReason": "{signum.name}", "deadlineMs": (\\d+)')

    def seconds():
        with FakeLambda() as api, started(obedient, api, AT_SHUTDOWN=another_one) as it:
            wait_until(lambda: api.requests_for("event/next"))
            begin = time.time()
            assert_signal_ends_it(it, signum)
            end = time.time()
            deadline = int(shutdown.search(it.out).group(1)) / 1000
            assert begin + 1.5 <= deadline + 0.001 <= end + 1.501
            return end - begin

    assert fastest(seconds, 1) < 1  # not only when the time for a shutdown is over


@pytest.mark.parametrize("where", ["process", "init"])
def test_a_signal_while_your_code_runs(obedient, where, tmp_path):
    """Your code ends first: a handler must not call process() in the middle of it."""
    waiting = f"while not os.path.exists('{tmp_path}/end'): time.sleep(0.01)"
    code = f"log('Begun')\n{waiting}\nlog('Ended')"
    events, environment = (
        ([invoke_event(do=code)], {}) if where == "process" else ([], {"AT_INIT": code})
    )
    with FakeLambda(events) as api, started(obedient, api, **environment) as it:
        wait_until(lambda: "] Begun\n" in it.out)
        it.terminate()
        (tmp_path / "end").touch()
        assert_signal_ends_it(it)
        assert len(api.requests_for("event/next")) == len(events)
    happened = re.findall(r"\] (Begun|Ended)\n|(SHUTDOWN)", it.out)
    assert happened == [("Begun", ""), ("Ended", ""), ("", "SHUTDOWN")]


@pytest.mark.parametrize("do", ["time.sleep(60)", "os.system('sleep 3')"])
@pytest.mark.parametrize("at_shutdown", [False, True])
def test_a_signal_when_process_takes_longer_than_a_shutdown(obedient, do, at_shutdown):
    events, environment = ([], {"AT_SHUTDOWN": do}) if at_shutdown else ([invoke_event(do=do)], {})
    with FakeLambda([*events, hangs]) as api, started(obedient, api, **environment) as it:
        wait_until(lambda: api.requests_for("event/next") if at_shutdown else it.received)
        start = time.monotonic()
        it.terminate()
        control = subprocess.Popen(["sleep", "2.5"])  # later on a busy machine
        wait_until(lambda: it.poll() is not None or control.poll() is not None)
        assert (it.poll(), control.poll()) == (0, None)
        assert time.monotonic() - start >= 1.5
        control.kill()
        control.wait()
        # os.system() is a call into C, which returns only after 3 seconds.
        assert "Done" not in it.out


def test_a_signal_after_shutdown(obedient):
    """While Python itself ends, a signal would kill it."""
    with FakeLambda([SHUTDOWN]) as api:
        for delay in range(0, 20, 4):
            with started(obedient, api) as it:
                wait_until(lambda it=it: "Done" in it.out)
                time.sleep(delay / 1000)
                it.terminate()
                assert it.wait(60) == 0


def assert_goes_on_after(obedient, events, logged):
    """Asserts that the extension goes on after events with these codes, [[line]].

    It must log the lines that are given, and register no second time.
    """
    codes = ["\n".join(["import signal", *lines]) for lines in events]
    answers = [*(invoke_event(do=code) for code in codes), hangs]
    with FakeLambda([*answers]) as api, started(obedient, api) as it:
        wait_until(lambda: len(api.requests_for("event/next")) == len(answers))
        assert re.findall(r"\] (The .*)\n", it.out) == logged
        time.sleep(2)  # longer than the watchdog waits
        assert it.poll() is None
        assert not api.requests_for("exit/error")
        assert len(api.requests_for("event/next")) == len(answers)
        assert len(api.requests_for("register")) == 1
        assert_signal_ends_it(it, stderr=None)


def test_signals_that_are_not_for_the_extension(obedient):
    alarm = (
        "signal.signal(signal.SIGALRM, lambda *_: log('The alarm rang'))",
        "signal.raise_signal(signal.SIGALRM)",
    )
    assert_goes_on_after(obedient, [alarm], ["The alarm rang"])


FORK = (
    "reader, writer = os.pipe()",
    "pid = os.fork()",
    "if pid == 0:",
    "    {child}",
    "    os.write(writer, b'ready')",
    "    for _ in range(600): time.sleep(0.1)",  # a signal just before a sleep waits for its end
    "{parent}",
    "_, status = os.wait()",
    "log(f'The child ended with {{os.waitstatus_to_exitcode(status)}}')",
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


def test_a_child_process_that_your_code_forks(obedient):
    codes = [
        [line.format(child=child, parent=parent) for line in FORK] for child, parent, _ in FORKS
    ]
    assert_goes_on_after(
        obedient, codes, [f"The child ended with {status:d}" for *_, status in FORKS]
    )


def test_a_child_process_that_returns_from_your_code(obedient):
    code = (
        "pid = os.fork()",
        "status = pid and os.wait()[1]",
        "pid and log(f'The child ended with {os.waitstatus_to_exitcode(status)}')",
    )
    assert_goes_on_after(obedient, [code], ["The child ended with 0"])


def test_child_processes_of_multiprocessing(obedient):
    """One ends by itself, the other one by a SIGTERM: with -15, or by a handler of its own."""
    code = (
        "import multiprocessing",
        "context = multiprocessing.get_context('{method}')",
        "ends = context.Process(target=print, args=['Hello from the child'])",
        "sleeps = context.Process(target=time.sleep, args=[60])",
        "ends.start(); ends.join()",
        "sleeps.start(); sleeps.terminate(); sleeps.join()",
        "log(f'The children ended: {{ends.exitcode == 0 and sleeps.exitcode in (0, -15)}}')",
    )
    methods = "fork", "spawn", "forkserver"
    codes = [[line.format(method=method) for line in code] for method in methods]
    assert_goes_on_after(obedient, codes, ["The children ended: True"] * 3)


def test_a_signal_while_it_is_suspended(obedient):
    """When a process goes on, any of its threads may get the signal, not only the main one."""
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
            assert (it.wait(60), it.received) == (0, ["SHUTDOWN"])


def test_a_signal_at_any_moment_between_two_events(extension):
    with FakeLambda([invoke_event("event")]) as api:
        program = PROGRAMS / "signal_at_any_moment.py"
        environment = {"AWS_LAMBDA_RUNTIME_API": api.address}
        ran = run(*PYTHON, program, extension.parent, env=environment, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert len(api.requests_for("event/next")) == 2
    endings = json.loads(ran.stdout.splitlines()[-1])
    assert len(endings) > 100
    good = "0 SHUTDOWN", "0 INVOKESHUTDOWN"
    assert {place: ending for place, ending in endings.items() if ending not in good} == {}
