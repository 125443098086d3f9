"""The whole of examples/ship_logs/: an extension that ships what the function logs."""

import contextlib
import json
import os
import random
import re
import select
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import ANY

import collector as collectors
import pytest
from batching import EXAMPLE, NOWHERE, SHORT_LIMITS, counted, timed
from collector import TOKEN, Collector, answers_after
from engine import first_base_image
from extension_process import run_to_end, started
from fake_lambda import IDENTIFIER, SHUTDOWN, FakeLambda, answer, hangs, invoke_event
from machine import LoggedProcess, fastest, free_port, path_with, processes_of, run, wait_until
from pages import code_blocks
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
FORMATS = code_blocks("examples/ship_logs/README.md", "Other formats", "python")


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


def test_records_say_which_function_and_invocation_they_are_from(shipping):
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
    "a record cut into two requests": [CUT[:150], CUT[150:]],
    "a record that is not quoted": [b'[{"type": "function", "record": what?}]'],
    "a record with NaN": [b'[{"type": "function", "record": NaN}]'],
    "no UTF-8": [b'[{"type": "function", "record": "\xff"}]'],
    "no array": [b'{"type": "function"}'],
    "something before the array": [b'x[{"type": "function"}]'],
    "an array without its end": [b'[{"type": "function"},'],
    "something after the array": [b'[{"type": "function"}] done"}]'],
    "nothing": [b""],
    "too deep": [b"[" * 100_000],
    "dropped records": [records_of(0, ["platform.logsDropped"])],
}
ALREADY_LOST = "a record cut into two requests", "a record that is not quoted", "dropped records"


@pytest.mark.parametrize(
    ("loss", "when"),
    [
        *((loss, "after the event") for loss in LOSSES),
        *((loss, "before it") for loss in ALREADY_LOST),
    ],
)
def test_no_invocation_is_held_for_an_end_that_does_not_arrive(shipping, loss, when):
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
        unreadable = [it["record"] for it in collector.records if it["type"] == "unreadable"]
        assert unreadable == [body.decode(errors="replace") for body in bodies]


def test_after_a_loss_the_next_invocation_is_waited_for_again(shipping):
    asked = []

    def loss(connection):
        api.deliver(records_of(0, ["platform.start", "platform.logsDropped"]))
        connection.sendall(invoke_event("0"))

    with TelemetryApi([loss]) as api:
        api.answers["/extension/event/next"] += [api.invocation_that_lasts(1, asked), SHUTDOWN]
        assert run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)[0] == 0
    assert asked == [False]


def test_a_request_that_cannot_be_read_holds_no_invocation(shipping):
    """It may have been the one with the end of the invocation."""

    def deliver(connection):
        api.deliver(records_of(0, ["platform.start"]))
        connection.sendall(invoke_event("0"))
        for request in b"POST / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n":
            api.send_raw(request)

    with TelemetryApi([deliver, SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)
    assert (status, stderr) == (0, "")
    assert stdout.count("Telemetry that did not arrive: ") == 2


def test_half_a_request_does_not_keep_the_next_one_from_being_received(batching_with):
    """The five seconds for the other half pass within one: see SHORT_LIMITS."""
    shipping = batching_with(SHORT_LIMITS + SHIPPING)
    with TelemetryApi([hangs]) as api, started(shipping, api, COLLECTOR_URL=NOWHERE) as it:
        wait_until(lambda: api.requests_for("event/next"))
        start = time.monotonic()
        assert api.send_raw(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n[") == b""
        assert 0.9 < time.monotonic() - start < 10
        assert it.out.count("Telemetry that did not arrive: ") == 1
        assert api.deliver(records_of(0)) == 200


def test_without_any_telemetry_an_invocation_is_held_for_a_second(shipping):
    """It could have taken an hour."""
    times = []
    answers = [timed(times, lambda: invoke_event("0")), timed(times, lambda: SHUTDOWN)]
    with TelemetryApi(answers) as api:
        _, stdout, _ = run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)
    assert 0.9 < times[1] - times[0] < 10
    assert stdout.count("Telemetry does not say that invocation 0 has ended") == 1


def test_a_retry_with_the_same_request_id_waits_for_its_own_end(shipping):
    """Lambda retries an invocation under its old ID, whose end has been noted once already."""
    asked = []

    def first(connection):
        connection.sendall(invoke_event("0"))
        api.deliver(records_of(0))

    with TelemetryApi([first]) as api:
        api.answers["/extension/event/next"] += [api.invocation_that_lasts(0, asked), SHUTDOWN]
        assert run_to_end(shipping, api, COLLECTOR_URL=NOWHERE)[0] == 0
    assert asked == [False]


def test_the_end_of_an_invocation_is_noticed_without_polling(shipping):
    """A thread that polls wakes up, and so switches context, many times a second."""
    with TelemetryApi([invoke_event("0"), SHUTDOWN]) as api:
        with started(shipping, api, COLLECTOR_URL=NOWHERE) as it:
            wait_until(lambda: it.poll() is None and len(api.requests_for("event/next")) == 1)
            api.deliver(records_of(0, ["platform.start"]))
            before = context_switches(it.pid)
            time.sleep(2)
            assert context_switches(it.pid) - before < 20
            api.deliver(records_of(0, ["platform.runtimeDone"]))
            assert it.wait(60) == 0


def context_switches(pid):
    """How often the threads of a process have waited."""
    switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        counts = re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text())
        switches += sum(map(int, counts))
    return switches


def test_what_arrives_after_shutdown_is_sent_or_not_taken(shipping):
    """The first three must be taken, unless a busy machine sends them late.

    The third comes later than QUIET_SECONDS after SHUTDOWN, but not after the second one.
    """
    delays = 0, 0.3, 0.2, 0.6

    def late(connection):
        connection.sendall(SHUTDOWN)
        for number, delay in enumerate(delays):
            time.sleep(delay)
            with contextlib.suppress(OSError):  # it has ended
                if api.deliver(records_of(number, ["function"])) == 200:
                    taken.add(str(number))

    for _ in range(5):
        taken = set()
        with Collector(answer()) as collector, TelemetryApi([late]) as api:
            assert run_to_end(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
        assert {record["record"]["requestId"] for record in collector.records} == taken
        if {"0", "1", "2"} <= taken:
            break
    assert {"0", "1", "2"} <= taken


def test_what_arrives_when_the_last_records_are_on_their_way_is_refused(batching_with):
    """Otherwise Lambda would think that it will be sent."""
    shipping = batching_with(SHIPPING, SHUTDOWN_SECONDS=20)
    statuses = []

    def last(connection):
        statuses.append(api.deliver(records_of(1, ["function"])))
        connection.sendall(SHUTDOWN)

    def meanwhile(connection):
        statuses.append(api.deliver(records_of(2, ["function"])))
        connection.sendall(answer())

    with Collector(meanwhile, answer()) as collector, TelemetryApi([last]) as api:
        assert run_to_end(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
    assert statuses == [200, 503]
    assert [record["record"]["requestId"] for record in collector.records] == ["1"]


def test_four_thousand_records_at_shutdown_arrive_at_a_slow_collector(shipping):
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
def test_every_line_arrives_once_at_a_collector_that_answers(batching_with, size, number, seconds):
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
    lines = [it["record"].split(" ")[1] for it in collector.records if it["type"] == "function"]
    assert sorted(map(int, lines)) == list(range(number))
    assert "Records" not in stdout


def test_a_hanging_collector_does_not_delay_every_delivery_and_lost_lines_are_counted(shipping):
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


JUDGES = collectors.as_loki, collectors.as_elasticsearch, collectors.as_otlp


@pytest.mark.parametrize(
    ("code", "judge"),
    [*zip(FORMATS, JUDGES, strict=True)],
    ids=["Loki", "Elasticsearch", "OpenTelemetry"],
)
def test_each_format_in_the_readme_suits_its_collector(batching_with, code, judge):
    """A body that is not JSON, and is shipped as text, suits it as well."""
    (name,) = re.findall(r"class (\w+)\(Batches\)", code)
    shipping = batching_with(f"import own\nbatches.Batches = own.{name}\n{SHIPPING}")
    (shipping.parent / "own.py").write_text(code)

    def deliver(connection):
        connection.sendall(invoke_event("0"))
        api.deliver(records_of(0))
        api.deliver(b"no JSON")

    settings = {"AWS_LAMBDA_FUNCTION_NAME": "f", "COLLECTOR_TOKEN": TOKEN}
    with Collector(judge=judge) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        environment = settings | {"COLLECTOR_URL": collector.url}
        status, stdout, stderr = run_to_end(shipping, api, **environment)
    assert (status, stderr) == (0, "")
    assert collector.requests
    assert "Records" not in stdout  # none was refused, or not sent
    assert TOKEN not in stdout


def test_an_invocation_that_does_not_end_does_not_keep_it_from_the_next_event(shipping):
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


def test_on_managed_instances_records_are_sent_without_an_event(batching_with):
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
def test_without_a_telemetry_api_it_says_so_and_goes_on(shipping, status):
    with Collector(answer()) as collector, TelemetryApi([invoke_event(), SHUTDOWN], status) as api:
        code, stdout, stderr = run_to_end(shipping, api, COLLECTOR_URL=collector.url)
    assert (code, stderr) == (0, "")
    assert collector.requests == []
    _, line = stdout.splitlines()  # the first one says that it has registered
    assert "Ships no logs" in line


def test_on_the_emulators_managed_instances_telemetry_arrives(evaluating, engine):
    """Four invocations run at once.

    Nothing listens at COLLECTOR_URL, so what has arrived shows in the log as not sent yet.
    """
    shutil.copytree(EXAMPLE, evaluating / NAME, dirs_exist_ok=True)
    managed = {"AWS_LAMBDA_MAX_CONCURRENCY": "4", "BASE_IMAGE": first_base_image()}
    with running(evaluating, "--docker", "-e", f"COLLECTOR_URL={NOWHERE}", **managed) as it:
        assert "-H 'Content-Type: application/json'" in it.output
        with ThreadPoolExecutor(4) as pool:

            def invoke(event):
                return it.invoke(event, **{"Content-Type": "application/json"})

            events = [{"do": "time.sleep(2) or 2"}] * 4
            # The first ones meet unready workers.
            wait_until(lambda: list(pool.map(invoke, events)) == [2] * 4)
        assert it.stop() == 0
        assert re.search(r" Records not sent yet: [1-9]\d* \(ConnectionError\)", it.output)


def test_try_sh_ends_with_the_run_script(sample, tmp_path):
    path = path_with(tmp_path, {"docker": "exit 1"})
    command = sample / "examples" / "ship_logs" / "try.sh", "-p", free_port()
    ran = run(*command, env=os.environ | {"PATH": path}, timeout=60)
    assert ran.returncode == 1
    assert "no Docker engine answers" in ran.stderr


@pytest.mark.slow
def test_try_sh_shows_the_line_that_the_function_logs(sample, engine):
    command = sample / "examples" / "ship_logs" / "try.sh", "-p", free_port()
    environment = os.environ | {"BASE_IMAGE": first_base_image(), "http_proxy": NOWHERE}
    with LoggedProcess(command, env=environment, start_new_session=True) as it:
        shown = "\"record\": \"Hello from the function's log: {'key': 'value'}"
        try:
            wait_until(lambda: it.poll() is not None or shown in it.out, 300)
            assert shown in it.out, it.output
        finally:
            it.terminate()
            it.wait(60)
    assert not processes_of(sample)
