"""The whole of examples/ship_logs/: an extension that ships what the function logs."""

import gzip
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from unittest.mock import ANY

import formats
import pytest
from batching import EXAMPLE, NOWHERE, SHORT_LIMITS, counted, timed
from engine import first_base_image
from extension_process import run_to_end, started
from fake_collector import TOKEN, Collector, answers_after
from fake_lambda import IDENTIFIER, SHUTDOWN, FakeLambda, answer, hangs, invoke_event
from google.protobuf import json_format
from machine import LoggedProcess, fastest, free_port, run, wait_until
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from running import running
from sample import NAME

# In Lambda the example must listen on all addresses. Here it listens on loopback only.
SHIPPING = """
import socket
bind = socket.socket.bind
def bind_to_loopback(self, address):
    host, port = address
    assert host == "", "Lambda could not reach it"
    bind(self, ("127.0.0.1", port))
socket.socket.bind = bind_to_loopback
""" + (EXAMPLE / "extension.py").read_text()


@pytest.fixture
def shipping(batching_with):
    """The extension with the example's files over its own."""
    return batching_with(SHIPPING)


class TelemetryApi(FakeLambda):
    """Lambda, with a Telemetry API."""

    def __init__(self, events, subscribed=200):
        super().__init__(events)
        self.answers["/telemetry"] = [answer(subscribed)]

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
        """Posts records, as JSON, or bytes as they are; returns the status of the response."""
        body = records if isinstance(records, bytes) else json.dumps(records).encode()
        head = f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        response = self.send_raw(head.encode() + body)
        if not response:
            raise ConnectionError("the extension has given up the connection")
        return int(response.split(b" ")[1])

    def invocation_that_lasts(self, number, asked):
        """An invocation that goes on for a moment after its event, and then ends.

        Tells the list asked whether the extension has asked for the next event before that.
        """

        def invoke(connection):
            self.deliver(records_of(number, ["platform.start"]))
            connection.sendall(invoke_event(str(number)))
            asked.append(bool(select.select([connection], [], [], 0.3)[0]))
            self.deliver(records_of(number, ["platform.runtimeDone"]))

        return invoke


KINDS = "platform.start", "function", "platform.runtimeDone", "platform.report"


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


def test_every_record_of_four_hundred_invocations_arrives(shipping):
    """Some records come before the event, others after it; every second time out of order."""
    chance, not_waited_for = random.Random(20), []

    def invocation(number):
        records = records_of(number)
        if number % 2:
            chance.shuffle(records)
        split = chance.randrange(5)
        early, late = records[:split], records[split:]

        def deliver(connection):
            api.deliver(early)
            connection.sendall(invoke_event(str(number)))
            is_running = "platform.runtimeDone" in [record["type"] for record in late]
            if is_running and select.select([connection], [], [], 0.002)[0]:
                not_waited_for.append(number)  # it has asked for the next event too soon
            api.deliver(late)

        return deliver

    def end(connection):
        connection.sendall(SHUTDOWN)
        api.deliver(records_of("the end"))

    with (
        Collector(answer()) as collector,
        TelemetryApi([*map(invocation, range(400)), end]) as api,
    ):
        assert run_to_end(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
    sent = [record for number in [*range(400), "the end"] for record in records_of(number)]
    assert contents(sent) <= contents(collector.records)
    assert not not_waited_for


def test_records_name_their_function_and_invocation(shipping):
    """So does what is JSON but not a record, and is shipped as text."""
    records = [*records_of(1), {"type": 5}, {"type": "platform.start"}]
    no_records = [{}, "text", 5, None, [1]]

    def deliver(connection):
        connection.sendall(invoke_event("1"))
        api.deliver([*records, *no_records])

    function = {"AWS_LAMBDA_FUNCTION_NAME": "f", "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST"}
    with Collector(answer()) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        status, _, stderr = run_to_end(shipping, api, COLLECTOR_URL=collector.url, **function)
    assert (status, stderr) == (0, "")
    origin = {"function": "f", "version": "$LATEST", "requestId": "1"}
    unreadable = [record for record in collector.records if record["type"] == "unreadable"]
    readable = [record for record in collector.records if record not in unreadable]
    assert readable == [record | origin for record in records]
    assert unreadable == [record | origin for record in unreadable]
    assert [json.loads(record["record"]) for record in unreadable] == no_records


# What Lambda may send instead of the end of an invocation.
CUT = json.dumps(records_of(0, more="x" * 100)).encode()
LOSSES = {
    "a record cut into two requests": [CUT[:300], CUT[300:]],
    "no UTF-8": [b'[{"type": "function", "record": "\xff"}]'],
    "no array": [b'{"type": "function"}'],
    "nothing": [b""],
    "too deep": [b"[" * 100_000],
    "dropped records": [records_of(0, ["platform.logsDropped"])],
}
ALREADY_LOST = "a record cut into two requests", "dropped records"


@pytest.mark.parametrize(
    ("loss", "when"),
    [
        *((loss, "after the event") for loss in LOSSES),
        *((loss, "before it") for loss in ALREADY_LOST),
    ],
)
def test_a_missing_runtime_done_does_not_block(shipping, loss, when):
    """Otherwise process() would wait for an hour, as platform.start says that the function runs."""
    bodies = LOSSES[loss]
    lost_before = 1 if when == "before it" else 0  # how many of them arrive before the event

    def deliver(connection):
        api.deliver(records_of(0, ["platform.start"]))
        for body in bodies[:lost_before]:
            api.deliver(body)
        connection.sendall(invoke_event("0"))
        for body in bodies[lost_before:]:
            api.deliver(body)

    with Collector(answer()) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(shipping, api, COLLECTOR_URL=collector.url)
    assert (status, stderr) == (0, "")
    lines = [line for line in stdout.splitlines() if "elemetry" in line]
    assert len(lines) == len(bodies)
    if loss != "dropped records":
        unreadable = [
            record["record"] for record in collector.records if record["type"] == "unreadable"
        ]
        assert unreadable == [body.decode(errors="replace") for body in bodies]
        assert len(collector.records) == 1 + len(bodies)  # each arrives once, in one form


def test_waits_again_after_lost_telemetry(shipping):
    asked = []

    def loss(connection):
        api.deliver(records_of(0, ["platform.start", "platform.logsDropped"]))
        connection.sendall(invoke_event("0"))

    with TelemetryApi([loss]) as api:
        api.answers["/extension/event/next"] += [api.invocation_that_lasts(1, asked), SHUTDOWN]
        assert run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)[0] == 0
    assert asked == [False]


def test_an_unreadable_request_does_not_block(shipping):
    """It may have been the one with the end of the invocation."""

    def deliver(connection):
        api.deliver(records_of(0, ["platform.start"]))
        connection.sendall(invoke_event("0"))
        for request in b"POST / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n":
            api.send_raw(request)

    with TelemetryApi([deliver, SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)
    assert (status, stderr) == (0, "")
    assert stdout.count("Telemetry did not arrive: ") == 2


def test_a_truncated_request_does_not_block_the_next(batching_with):
    """The five seconds for the other half pass within one: see SHORT_LIMITS."""
    shipping = batching_with(SHORT_LIMITS + SHIPPING)
    with TelemetryApi([hangs]) as api, started(shipping, api, COLLECTOR_URL=NOWHERE) as process:
        wait_until(lambda: api.requests_for("event/next"))
        start = time.monotonic()
        assert api.send_raw(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n[") == b""
        assert 0.9 < time.monotonic() - start < 10
        assert process.out.count("Telemetry did not arrive: ") == 1
        assert api.deliver(records_of(0)) == 200


def test_without_telemetry_it_waits_for_a_second(shipping):
    """It could have taken an hour."""
    times = []
    answers = [timed(times, lambda: invoke_event("0")), timed(times, lambda: SHUTDOWN)]
    with TelemetryApi(answers) as api:
        _, stdout, _ = run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)
    assert 0.9 < times[1] - times[0] < 10
    assert stdout.count("no sign that invocation 0 has ended") == 1


def test_a_retry_with_the_same_id_waits_for_its_own_end(shipping):
    """Lambda retries an invocation under its old ID, whose end has been noted once already."""
    asked = []

    def first(connection):
        connection.sendall(invoke_event("0"))
        api.deliver(records_of(0))

    with TelemetryApi([first]) as api:
        api.answers["/extension/event/next"] += [api.invocation_that_lasts(0, asked), SHUTDOWN]
        assert run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)[0] == 0
    assert asked == [False]


def test_what_arrives_after_shutdown_is_sent(batching_with):
    """The second record comes later, when the first one is on its way to the collector."""
    shipping = batching_with(SHIPPING, SHUTDOWN_SECONDS=20)

    def end(connection):
        connection.sendall(SHUTDOWN)
        api.deliver(records_of(1, ["function"]))

    def deliver_another(connection):
        api.deliver(records_of(2, ["function"]))
        connection.sendall(answer())

    with Collector(deliver_another, answer()) as collector, TelemetryApi([end]) as api:
        assert run_to_end(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
    assert [record["record"]["requestId"] for record in collector.records] == ["1", "2"]


def test_thousands_of_records_at_shutdown_arrive(shipping):
    """Half of them are delivered before SHUTDOWN, the other half after it."""

    def end(connection):
        api.deliver(records_of(0, ["function"] * 2000))
        connection.sendall(SHUTDOWN)
        api.deliver(records_of(1, ["function"] * 2000))

    with Collector(answers_after(0.2)) as collector, TelemetryApi([end]) as api:
        _, stdout, _ = run_to_end(shipping, api, COLLECTOR_URL=collector.url)
    assert len(collector.records) == 4000
    assert counted(stdout, "dropped") == 0


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
def test_every_line_arrives_once_at_any_rate_and_size(batching_with, size, number, seconds):
    """There are more lines than the buffer holds, so that deliveries have to wait for room."""
    shipping = batching_with(SHIPPING, SHUTDOWN_SECONDS=20)
    texts = [f"{'x' * (size - 100)} {each}" for each in range(number)]
    at_once = 250_000 // size  # about as many as Lambda puts into one delivery

    def deliver(connection):
        connection.sendall(invoke_event("0"))
        for first in range(0, number, at_once):
            api.deliver(lines_of(texts[first : first + at_once]))
        api.deliver(records_of(0, ["platform.runtimeDone"]))

    with (
        Collector(answers_after(seconds)) as collector,
        TelemetryApi([deliver, SHUTDOWN]) as api,
    ):
        _, stdout, _ = run_to_end(shipping, api, COLLECTOR_URL=collector.url)
    lines = [
        record["record"].split(" ")[1]
        for record in collector.records
        if record["type"] == "function"
    ]
    assert sorted(map(int, lines)) == list(range(number))
    assert "Records" not in stdout


def test_a_hanging_collector_delays_few_deliveries(shipping):
    """36,000 lines and the record of the end: each arrives at last, or is counted as dropped."""
    held = []
    lines = lines_of(["x" * 60] * 1000)

    def deliver(connection):
        connection.sendall(invoke_event("0"))
        for _ in range(36):
            start = time.monotonic()
            api.deliver(lines)
            held.append(time.monotonic() - start)
        collector.answers[""] = [answer()]
        api.deliver(records_of(0, ["platform.runtimeDone"]))

    with Collector(hangs) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        _, stdout, _ = run_to_end(shipping, api, COLLECTOR_URL=collector.url)
    assert sum(seconds > 0.8 for seconds in held) < len(held) / 3
    arrived = [record for request in collector.requests[1:] for record in request.json]
    assert len(arrived) + counted(stdout, "dropped") == 36_001


# A line, an object, as functions and Lambda itself log them, and what was no JSON.
RECORDS = [
    {"time": "2026-11-27T12:00:00.123Z", "type": kind, "record": record, **labels}
    for labels in [{"function": "f", "requestId": None}]  # before the first invocation
    for kind, record in [("function", "a line"), ("function", {"level": "INFO"}), ("x", "no JSON")]
]
TEXTS = [json.dumps(record) for record in RECORDS]
MESSAGES = ["a line", '{"level": "INFO"}', "no JSON"]
NANOSECONDS = 1_795_780_800_123_000_000


@pytest.fixture
def tokyo(monkeypatch):
    """The time zone in which the test runs; times are in UTC regardless."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    yield
    monkeypatch.delenv("TZ")
    time.tzset()


@pytest.mark.usefixtures("tokyo")
def test_loki_gets_records_as_lines(monkeypatch):
    """https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs"""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "f")
    body, headers = formats.loki(TEXTS, TOKEN)
    (stream,) = json.loads(gzip.decompress(body))["streams"]
    assert headers["Content-Encoding"] == "gzip"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert stream["stream"] == {"service_name": "f"}
    assert stream["values"] == [[str(NANOSECONDS), text] for text in TEXTS]


def test_elasticsearch_gets_one_document_per_record():
    """https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-bulk"""
    body, headers = formats.elasticsearch(TEXTS, TOKEN)
    *lines, end = body.decode().split("\n")
    assert headers == {"Content-Type": "application/x-ndjson", "Authorization": f"ApiKey {TOKEN}"}
    assert end == ""
    assert [json.loads(action) for action in lines[::2]] == [{"create": {}}] * 3
    documents = [json.loads(document) for document in lines[1::2]]
    assert [document["message"] for document in documents] == MESSAGES
    assert {document["@timestamp"] for document in documents} == {RECORDS[0]["time"]}
    assert documents[0]["labels"] == {"type": "function", "function": "f"}


def test_otlp_is_what_the_official_classes_read(monkeypatch):
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "f")
    body, headers = formats.otlp(TEXTS, "")
    request = logs_service_pb2.ExportLogsServiceRequest()
    json_format.Parse(body, request)  # raises an error for an unknown field or a wrong type
    (resource_logs,) = request.resource_logs
    (name,) = resource_logs.resource.attributes
    assert headers == {"Content-Type": "application/json"}
    assert (name.key, name.value.string_value) == ("service.name", "f")
    (scope_logs,) = resource_logs.scope_logs
    records = scope_logs.log_records
    assert [record.body.string_value for record in records] == MESSAGES
    assert {record.time_unix_nano for record in records} == {NANOSECONDS}
    labels = {each.key: each.value.string_value for each in records[0].attributes}
    assert labels == {"type": "function", "function": "f"}


def test_one_line_of_extension_py_names_the_format(batching_with):
    before, after = "batches = Batches()\n", "batches = Batches(formats.elasticsearch)\n"
    assert before in SHIPPING
    shipping = batching_with("import formats\n" + SHIPPING.replace(before, after))

    def deliver(connection):
        connection.sendall(invoke_event("0"))
        api.deliver(records_of(0))
        api.deliver(b"no JSON")

    with Collector(answer()) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(shipping, api, COLLECTOR_URL=collector.url)
    assert (status, stderr) == (0, "")
    assert b"".join(request.body for request in collector.requests).count(b"@timestamp") == 5
    assert "Records" not in stdout  # none was refused, or not sent


def test_without_telemetry_it_returns_before_the_deadline(shipping):
    """Of four invocations the shortest counts, because a busy machine can only prolong them."""
    times = []
    hurried = timed(times, lambda: invoke_event("0", seconds=0.5))
    with TelemetryApi([*[hurried] * 4, timed(times)]) as api:
        with started(shipping, api, COLLECTOR_URL=NOWHERE):
            wait_until(lambda: len(times) == 5)
    assert min(end - begin for begin, end in pairwise(times)) < 0.5


def test_returns_before_the_deadline_of_an_invocation(shipping):
    """It has four seconds left, after one that had none left."""

    def seconds():
        times = []

        def endless(connection):
            api.deliver(records_of(0, ["platform.start"]))
            times.append(time.monotonic())
            connection.sendall(invoke_event("0", seconds=4))

        with TelemetryApi([invoke_event(seconds=0), endless, timed(times)]) as api:
            with started(shipping, api, COLLECTOR_URL=NOWHERE):
                wait_until(lambda: len(times) == 2)
        return times[1] - times[0]

    assert fastest(seconds, 5) < 5


def test_managed_instances_send_records_without_an_event(batching_with):
    """Such instances have no INVOKE event. The test shows what the extension subscribes to, too."""
    shipping = batching_with(SHIPPING, BATCH_SECONDS=0.5)
    environment = {"AWS_LAMBDA_INITIALIZATION_TYPE": "lambda-managed-instances"}
    with Collector(answer()) as collector, TelemetryApi([hangs]) as api:
        with started(shipping, api, COLLECTOR_URL=collector.url, **environment):
            wait_until(lambda: api.requests_for("event/next"))
            api.deliver(records_of(1))
            wait_until(lambda: len(collector.records) >= 4)
    origin = {"function": None, "version": None}  # without an invocation: many run at once
    assert collector.records == [record | origin for record in records_of(1)]
    assert [request.json for request in api.requests_for("register")] == [{"events": ["SHUTDOWN"]}]
    assert api.subscription == {
        "schemaVersion": "2025-01-29",
        "types": ["platform", "function"],
        "buffering": {"timeoutMs": 25},
        "destination": {"protocol": "HTTP", "URI": ANY},
    }


@pytest.mark.parametrize("status", [202, 404])
def test_without_a_telemetry_api_it_ships_nothing(shipping, status):
    with Collector(answer()) as collector, TelemetryApi([invoke_event(), SHUTDOWN], status) as api:
        code, stdout, stderr = run_to_end(shipping, api, COLLECTOR_URL=collector.url)
    assert (code, stderr) == (0, "")
    assert collector.requests == []
    _, line = stdout.splitlines()  # the first one says that it has registered
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
