"""The whole of examples/ship_logs/: an extension that ships what the function logs."""

import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import ANY

import pytest
from batching import EXAMPLE, NOWHERE, counted
from engine import first_base_image
from extension_process import run_to_end, started
from fake_collector import Collector, answers_after
from fake_lambda import IDENTIFIER, SHUTDOWN, FakeLambda, answer, hangs, invoke_event
from machine import LoggedProcess, free_port, run, wait_until
from running import running
from sample import NAME

SHIPPING = (EXAMPLE / "extension.py").read_text()
KINDS = "platform.start", "function", "platform.runtimeDone", "platform.report"


@pytest.fixture
def shipping(batching_with):
    """The extension with the example's files over its own."""
    return batching_with(SHIPPING)


class TelemetryApi(FakeLambda):
    """Lambda, with a Telemetry API."""

    def __init__(self):
        super().__init__()
        self.answers["/telemetry"] = [answer()]

    @property
    def subscription(self):
        (request,) = [each for each in self.requests if each.path == "/2022-07-01/telemetry"]
        assert request.method == "PUT"
        assert request.headers["Lambda-Extension-Identifier"] == IDENTIFIER
        return request.json

    def send_raw(self, request):
        """Sends a request to the extension as it is (bytes); returns the start of the response.

        That is empty if the extension gives up the connection.
        """
        url = self.subscription["destination"]["URI"]
        port = int(url.removeprefix("http://sandbox.localdomain:"))
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(request)
            return client.recv(1000)

    def deliver(self, records):
        """Posts records, as JSON, or bytes as they are; returns when the extension takes them."""
        body = records if isinstance(records, bytes) else json.dumps(records).encode()
        head = f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        assert b" 200 " in self.send_raw(head.encode() + body)


@pytest.fixture
def api():
    """Such a Lambda, whose events ship() sets."""
    with TelemetryApi() as api:
        yield api


def records_of(number, kinds=KINDS, more=""):
    """What Lambda delivers about an invocation."""
    record = {"requestId": str(number), "more": more}
    moment = "2026-11-27T12:00:00.123Z"
    return [{"time": moment, "type": kind, "record": record} for kind in kinds]


def lines_of(texts):
    """What Lambda delivers when the function logs these lines."""
    return [{"time": "", "type": "function", "record": text} for text in texts]


def contents(records):
    """The type and the content of each record, without what the extension adds to it."""
    return {(record["type"], json.dumps(record["record"])) for record in records}


def invocation(api, number, before=(), after=()):
    """An invocation, with what Lambda delivers before its event and after it, body by body."""

    def give(connection):
        for body in before:
            api.deliver(body)
        connection.sendall(invoke_event(str(number)))
        for body in after:
            api.deliver(body)

    return give


def ship(shipping, api, events, url=NOWHERE, **environment):
    """Runs the extension with these events and SHUTDOWN; returns what it logged.

    It must exit with 0, without an error.
    """
    api.answers["/extension/event/next"] = [*events, SHUTDOWN]
    status, stdout, stderr = run_to_end(shipping, api, COLLECTOR_URL=url, **environment)
    assert (status, stderr) == (0, "")
    return stdout


def test_every_record_of_four_hundred_invocations_arrives(shipping, api):
    """Some records come before the event, others after it; every second time out of order."""
    chance = random.Random(20)
    events, sent = [], []
    for number in range(400):
        records = records_of(number)
        if number % 2:
            chance.shuffle(records)
        split = chance.randrange(5)
        events.append(invocation(api, number, [records[:split]], [records[split:]]))
        sent += records
    with Collector(answer()) as collector:
        ship(shipping, api, events, collector.url)
    assert contents(sent) <= contents(collector.records)


def test_records_name_their_function_and_invocation(shipping, api):
    """So does what is JSON but not a record, and is shipped as text."""
    records = [*records_of(1), {"type": 5}, {"type": "platform.start"}]
    no_records = [{}, "text", 5, None, [1]]
    function = {"AWS_LAMBDA_FUNCTION_NAME": "f", "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST"}
    with Collector(answer()) as collector:
        event = invocation(api, 1, after=[[*records, *no_records]])
        ship(shipping, api, [event], collector.url, **function)
    origin = {"function": "f", "version": "$LATEST", "requestId": "1"}
    unreadable = [record for record in collector.records if record["type"] == "unreadable"]
    readable = [record for record in collector.records if record not in unreadable]
    assert readable == [record | origin for record in records]
    assert unreadable == [record | origin for record in unreadable]
    assert [json.loads(record["record"]) for record in unreadable] == no_records


# What Lambda may send instead of the end of an invocation, body by body.
CUT = json.dumps(records_of(0, more="x" * 100)).encode()
LOSSES = {
    "a record cut into two requests": [CUT[:300], CUT[300:]],
    "no UTF-8": [b'[{"type": "function", "record": "\xff"}]'],
    "no array": [b'{"type": "function"}'],
    "no JSON": [b'[{"type": "function", "record": NaN}]'],
    "nothing": [b""],
    "too deep": [b"[" * 100_000],
    "dropped records": [records_of(0, ["platform.logsDropped"])],
}


@pytest.mark.parametrize("bodies", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("before", [0, 1], ids=["after the event", "before it"])
def test_a_missing_runtime_done_does_not_block(shipping, api, bodies, before):
    """Otherwise process() would wait for an hour, as platform.start says that the function runs.

    What cannot be read is shipped as text, once.
    """
    start = records_of(0, ["platform.start"])
    event = invocation(api, 0, [start, *bodies[:before]], bodies[before:])
    with Collector(answer()) as collector:
        log = ship(shipping, api, [event], collector.url)
    assert log.count("elemetry") == len(bodies)
    texts = [body.decode(errors="replace") for body in bodies if isinstance(body, bytes)]
    unreadable = [record for record in collector.records if record["type"] == "unreadable"]
    assert [record["record"] for record in unreadable] == texts
    assert len(collector.records) == 1 + len(bodies)


def lasting(api, number):
    """An invocation whose end Lambda reports 0.3 seconds after its event."""

    def give(connection):
        invocation(api, number, [records_of(number, ["platform.start"])])(connection)
        end = records_of(number, ["platform.runtimeDone"])
        threading.Timer(0.3, api.deliver, [end]).start()

    return give


def test_waits_again_after_lost_telemetry(shipping, api):
    loss = records_of(0, ["platform.start", "platform.logsDropped"])
    ship(shipping, api, [invocation(api, 0, [loss]), lasting(api, 1)])
    assert api.durations[1] > 0.3


def test_a_retry_with_the_same_id_waits_for_its_own_end(shipping, api):
    """Lambda retries an invocation under its old ID, whose end has been noted once already."""
    ship(shipping, api, [invocation(api, 0, after=[records_of(0)]), lasting(api, 0)])
    assert api.durations[1] > 0.3


@pytest.mark.parametrize("header", ["", "Content-Length: x\r\n"], ids=["no length", "odd length"])
def test_an_unreadable_request_does_not_block(shipping, api, header):
    """It may have been the one with the end of the invocation."""

    def event(connection):
        invocation(api, 0, [records_of(0, ["platform.start"])])(connection)
        api.send_raw(f"POST / HTTP/1.1\r\n{header}\r\n".encode())

    assert ship(shipping, api, [event]).count("Telemetry did not arrive: ") == 1


def test_a_truncated_request_does_not_block_the_next(batching_with, api):
    """Here the five seconds for the other half pass within one."""

    def event(connection):
        start = time.monotonic()
        assert api.send_raw(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n[") == b""
        assert 0.9 < time.monotonic() - start < 10
        invocation(api, 0, after=[records_of(0)])(connection)

    log = ship(batching_with(SHIPPING, speed=5), api, [event])
    assert log.count("Telemetry did not arrive: ") == 1


def test_without_telemetry_it_waits_for_a_second(shipping, api):
    """It could have taken an hour."""
    log = ship(shipping, api, [invoke_event("0")])
    assert 0.9 < api.durations[0] < 10
    assert log.count("no sign that invocation 0 has ended") == 1


@pytest.mark.parametrize("kinds", [[], ["platform.start"]], ids=["not started", "started"])
def test_returns_before_the_deadline_of_an_invocation(shipping, api, kinds):
    """The shortest counts, because a busy machine can only prolong them."""

    def hurried(connection):
        api.deliver(records_of(0, kinds))
        connection.sendall(invoke_event("0", seconds=0.5))

    ship(shipping, api, [hurried] * 4)
    assert min(api.durations) < 0.5


def test_what_arrives_around_shutdown_is_sent(batching_with, api):
    """Some of it arrives when the first records are already on their way to the collector."""

    def end(connection):
        api.deliver(records_of(0, ["function"] * 2000))
        connection.sendall(SHUTDOWN)
        api.deliver(records_of(1, ["function"] * 2000))

    def deliver_another(connection):
        api.deliver(records_of(2, ["function"]))
        connection.sendall(answer())

    with Collector(deliver_another, answers_after(0.2)) as collector:
        log = ship(batching_with(SHIPPING, SHUTDOWN_SECONDS=20), api, [end], collector.url)
    assert len(collector.records) == 4001
    assert "Records" not in log


@pytest.mark.parametrize(
    ("size", "number", "seconds"),
    [
        pytest.param(250_000, 20, 0, id="long lines"),
        pytest.param(20_000, 400, 0, id="lines"),
        pytest.param(100, 10_000, 0, id="short lines"),
        pytest.param(20_000, 400, 0.05, id="after 50 ms"),
        pytest.param(250_000, 10, 0.4, id="a batch takes more than a second"),
    ],
)
def test_every_line_arrives_once_at_any_rate_and_size(batching_with, api, size, number, seconds):
    """There are more lines than the buffer holds, so that deliveries have to wait for room."""
    shipping = batching_with(SHIPPING, SHUTDOWN_SECONDS=20)
    texts = [f"{'x' * (size - 100)} {each}" for each in range(number)]
    at_once = 250_000 // size  # about as many as Lambda puts into one delivery
    bodies = [lines_of(texts[first : first + at_once]) for first in range(0, number, at_once)]
    bodies.append(records_of(0, ["platform.runtimeDone"]))
    with Collector(answers_after(seconds)) as collector:
        log = ship(shipping, api, [invocation(api, 0, after=bodies)], collector.url)
    arrived = [record["record"] for record in collector.records if record["type"] == "function"]
    assert sorted(arrived) == sorted(texts)
    assert "Records" not in log


def test_a_hanging_collector_delays_few_deliveries(shipping, api):
    """36,000 lines and the record of the end: each arrives at last, or is counted as dropped."""
    held = []
    lines = lines_of(["x" * 60] * 1000)

    def event(connection):
        connection.sendall(invoke_event("0"))
        for _ in range(36):
            start = time.monotonic()
            api.deliver(lines)
            held.append(time.monotonic() - start)
        collector.answers[""] = [answer()]
        api.deliver(records_of(0, ["platform.runtimeDone"]))

    with Collector(hangs) as collector:
        log = ship(shipping, api, [event], collector.url)
    assert sum(seconds > 0.8 for seconds in held) < len(held) / 3
    arrived = [record for request in collector.requests[1:] for record in request.json]
    assert len(arrived) + counted(log, "dropped") == 36_001


def test_sends_the_format_that_extension_py_names(batching_with, api):
    """Text that is not JSON fits into the format, too."""
    shipping = batching_with(SHIPPING, format_name="elasticsearch")
    with Collector(answer()) as collector:
        event = invocation(api, 0, after=[records_of(0), b"no JSON"])
        log = ship(shipping, api, [event], collector.url)
    assert b"".join(request.body for request in collector.requests).count(b"@timestamp") == 5
    assert "Records" not in log  # none was refused, or not sent


def test_a_bug_in_a_format_ends_the_extension(batching_with, api):
    """Here, a variable that Loki's format needs is not set."""
    shipping = batching_with(SHIPPING, format_name="loki", BATCH_RECORDS=1)
    api.answers["/extension/event/next"] = [invocation(api, 0, after=[records_of(0)]), hangs]
    status, _, stderr = run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)
    (report,) = api.requests_for("exit/error")
    assert report.json["errorType"] == "Extension.KeyError"
    assert (status, stderr.count("Traceback")) == (1, 1)


def test_managed_instances_send_records_without_an_event(batching_with, api):
    """Such instances have no INVOKE event. The test shows what the extension subscribes to, too."""
    shipping = batching_with(SHIPPING, BATCH_SECONDS=0.5)
    environment = {"AWS_LAMBDA_INITIALIZATION_TYPE": "lambda-managed-instances"}
    with (
        Collector(answer()) as collector,
        started(shipping, api, COLLECTOR_URL=collector.url, **environment),
    ):
        wait_until(lambda: api.requests_for("event/next"))
        api.deliver(records_of(1))
        wait_until(lambda: len(collector.records) >= 4)
    origin = {"function": None, "version": None}  # without an invocation: many run at once
    assert collector.records == [record | origin for record in records_of(1)]
    assert api.subscription == {
        "schemaVersion": "2025-01-29",
        "types": ["platform", "function"],
        "buffering": {"timeoutMs": 25},
        "destination": {"protocol": "HTTP", "URI": ANY},
    }


@pytest.mark.parametrize("status", [202, 404])
def test_without_a_telemetry_api_it_ships_nothing(shipping, api, status):
    api.answers["/telemetry"] = [answer(status)]
    with Collector(answer()) as collector:
        log = ship(shipping, api, [invoke_event()], collector.url)
    assert collector.requests == []
    _, line = log.splitlines()  # the first one says that it has registered
    assert "Not shipping logs" in line


def test_telemetry_arrives_from_the_emulator(evaluating, engine):
    """Four invocations run at once.

    Nothing listens at COLLECTOR_URL, so what has arrived shows in the log as not sent yet.
    """
    shutil.copytree(EXAMPLE, evaluating / NAME, dirs_exist_ok=True)
    managed = {"AWS_LAMBDA_MAX_CONCURRENCY": "4", "BASE_IMAGE": first_base_image()}
    with running(evaluating, "--docker", "-e", f"COLLECTOR_URL={NOWHERE}", **managed) as process:
        assert "-H 'Content-Type: application/json'" in process.output
        with ThreadPoolExecutor(4) as pool:

            def invoke(event):
                return process.invoke(event, **{"Content-Type": "application/json"})

            events = [{"do": "time.sleep(2) or 2"}] * 4
            # The first ones meet unready workers.
            wait_until(lambda: list(pool.map(invoke, events)) == [2] * 4)
        assert process.stop() == 0
        assert "Failed sending Kill signal" not in process.output
        assert re.search(r" Records not sent yet: [1-9]\d* \(ConnectionError\)", process.output)


def test_try_sh_says_that_its_port_is_in_use(sample):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = run(sample / "examples" / "ship_logs" / "try.sh", "events", port, timeout=60)
    assert ran.returncode == 1
    assert f"port {port} is in use" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["logs"], "\"record\": \"Hello from the function's log: {'key': 'value'}"),
        (["events", "--docker"], '\n{"eventType": "INVOKE"'),
        (["events", "--no-docker"], '\n{"eventType": "INVOKE"'),
    ],
    ids=" ".join,
)
def test_try_sh_shows_what_a_collector_gets(sample, engine, words, shown):
    what, *options = words
    command = sample / "examples" / "ship_logs" / "try.sh", what, free_port(), *options
    environment = os.environ | {"BASE_IMAGE": first_base_image(), "http_proxy": NOWHERE}
    with LoggedProcess(command, env=environment, start_new_session=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or shown in process.out, 300)
            assert shown in process.out, process.output
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
            process.wait(60)
