"""examples/ship_logs/: batches.py in the README's extension.py, and the whole example.

Some collectors work, some fail.
"""

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
from itertools import pairwise
from pathlib import Path
from unittest.mock import ANY

import collector as collectors
import pytest
from collector import FAILURES, SUCCESSES, TOKEN, Collector, refuses
from engine import first_base_image
from extension_process import end_of, started, variant
from fake_lambda import IDENTIFIER, SHUTDOWN, FakeLambda, answer, hangs, invoke
from machine import ROOT, Logged, free_port, post, processes_of, wait_until
from pages import code_blocks
from running import running
from sample import NAME

README, _ = code_blocks("README.md", "Make it your own", "python")
EXAMPLE = ROOT / "examples" / "ship_logs"
BATCHES = (EXAMPLE / "batches.py").read_text()
# In Lambda the example must listen on all addresses; here it listens on loopback only.
ANYWHERE, LOOPBACK = 'Server(("", 0), Receiver)', 'Server(("127.0.0.1", 0), Receiver)'
SHIPPING = (EXAMPLE / "extension.py").read_text()
assert ANYWHERE in SHIPPING
SHIPPING = SHIPPING.replace(ANYWHERE, LOOPBACK)
FORMATS = re.findall(r"(?ms)^```python\n(.*?)^```", (EXAMPLE / "README.md").read_text())
NOWHERE = "http://127.0.0.1:1/"


def extension_with(extension, folder, code, settings=""):
    """An extension with this code, and batches.py with changed settings, such as "A = 1"."""
    changed = "".join(f"batches.{setting}\n" for setting in settings.split("; ") if setting)
    files = {"batches.py": BATCHES, "extension.py": f"import batches\n{changed}{code}"}
    return variant(extension, folder, files)


@pytest.fixture
def batching(extension, tmp_path):
    """The README's extension.py, with batches.py next to it."""
    return extension_with(extension, tmp_path, README)


@pytest.fixture
def small(extension, tmp_path):
    """The same, but ten records are a batch."""
    return extension_with(extension, tmp_path, README, "BATCH_RECORDS = 10")


def events(*numbers, **more):
    return [invoke(str(number), **more) for number in range(*numbers)]


def timed(times, event=bytes):
    """An answer that notes when it was asked for, and gives what event() makes, or nothing."""

    def give(connection):
        times.append(time.monotonic())
        connection.sendall(event())

    return give


def send(extension, url, events, seconds=20, **environment):
    """Runs it with these events and a shutdown; it must take no more seconds, and little memory.

    Returns what it logged.
    """
    peaks = []

    def shutdown(connection):
        peaks.extend(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{it.pid}/status").read_text()))
        connection.sendall(SHUTDOWN)

    with (
        FakeLambda([*events, shutdown]) as api,
        started(extension, api, COLLECTOR_URL=url, **environment) as it,
    ):
        assert (it.wait(seconds), it.err, TOKEN in it.out) == (0, "", False)
        assert int(*peaks) < 100_000
        return it.out


def ids(records):
    """The request IDs in records, None for SHUTDOWN, each once."""
    return list(dict.fromkeys(record.get("requestId") for record in records))


def ids_of(*numbers):
    return [*map(str, range(*numbers)), None]


def counted(log, what):
    """The sum of the numbers of records in lines of a log, such as "Records dropped: 5 (…)"."""
    return sum(map(int, re.findall(rf"(?m)^\[{NAME}\] Records {what}: (\d+)", log)))


@pytest.mark.parametrize("success", SUCCESSES.values(), ids=SUCCESSES)
def test_every_record_arrives_at_a_collector_that(success, batching):
    with Collector(success) as collector:
        assert "dropped" not in send(batching, collector.url, events(150))
    assert ids(collector.records) == ids_of(150)
    types = {request.headers["Content-Type"] for request in collector.requests}
    assert types == {"application/json"}


@pytest.mark.parametrize("failure, reason", FAILURES.values(), ids=FAILURES)
def test_every_record_arrives_at_a_collector_that_first(failure, reason, small):
    with Collector(failure, answer()) as collector:
        log = send(small, collector.url, events(15))
    assert ids(collector.requests[1].json) == ids_of(15)
    assert not reason or f"[{NAME}] Records not sent yet: 10 ({reason})\n" in log


KINDS_OF_FAILURE = "answers 500", "redirects", "resets", "speaks no HTTP", "hangs", "drips"


@pytest.mark.parametrize(
    "failure, reason", [FAILURES[kind] for kind in KINDS_OF_FAILURE], ids=KINDS_OF_FAILURE
)
def test_it_goes_on_with_a_collector_that_always(failure, reason, small):
    """It tries at the tenth record, and at the last one; if it gets no answer, once more."""
    with Collector(failure) as collector:
        log = send(small, collector.url, events(50))
    assert f"[{NAME}] Records not confirmed before the end: 51\n" in log
    assert len(collector.requests) in ([2] if reason else [2, 3])


def test_only_the_records_that_the_collector_refuses_are_lost(batching):
    sent = [invoke(str(number), more="bad" * (number % 50 == 7)) for number in range(150)]
    with Collector(judge=refuses("bad")) as collector:
        log = send(batching, collector.url, sent)
        taken = [each for each in collector.requests if b"bad" not in each.body]
    arrived = [
        record["requestId"] for each in taken for record in each.json if "requestId" in record
    ]
    expected = [str(number) for number in range(150) if number % 50 != 7]
    assert sorted(arrived, key=int) == expected
    assert counted(log, "refused") == 3
    assert counted(log, "dropped") == 0


@pytest.mark.parametrize("status", [400, 413, 422])
def test_all_records_but_the_one_that_is_refused_arrive_in_the_same_invocation(
    extension, tmp_path, status
):
    """There is no further event, not even SHUTDOWN, at which it could send them."""
    settings = "BATCH_RECORDS = 20; BATCH_SECONDS = 1000"
    batching = extension_with(extension, tmp_path, README, settings)
    sent = [invoke(str(number), more="bad" * (number == 7)) for number in range(20)]
    with (
        Collector(judge=refuses("bad", status)) as collector,
        FakeLambda([*sent, hangs]) as api,
    ):
        with started(batching, api, COLLECTOR_URL=collector.url) as it:
            refused = f"[{NAME}] Records refused: 1 (status {status})\n"
            wait_until(lambda: refused in it.out)
            taken = [each for each in collector.requests if b"bad" not in each.body]
    arrived = ids(record for each in taken for record in each.json)
    assert arrived == [str(number) for number in range(20) if number != 7]


def test_a_record_that_is_no_json_is_a_bug_where_it_is_added(extension, tmp_path):
    code = README.replace("batches.add(event)", "batches.add(float('nan'))")
    nan = extension_with(extension, tmp_path, code)
    with FakeLambda([invoke()]) as api:
        status, _, stderr = end_of(nan, api, COLLECTOR_URL=NOWHERE)
    assert (status, "in process" in stderr, "ValueError" in stderr) == (1, True, True)


def test_a_bug_in_request_shows_its_traceback_and_ends_the_extension(extension, tmp_path):
    own = "class Own(Batches):\n    def request(self, texts):\n        1 / 0\n\nbatches = Own()"
    buggy = extension_with(extension, tmp_path, README.replace("batches = Batches()", own))
    with FakeLambda([*events(100), hangs]) as api:
        status, _, stderr = end_of(buggy, api, COLLECTOR_URL=NOWHERE)
        assert [each.json["errorType"] for each in api.asked("exit/error")] == [
            "Extension.ZeroDivisionError"
        ]
    assert (status, "in request" in stderr, stderr.count("Traceback")) == (1, True, 1)


def test_the_token_goes_into_a_header_and_white_space_around_settings_is_ignored(batching):
    with Collector(answer(500), answer()) as collector:
        settings = {"COLLECTOR_TOKEN": f"{TOKEN}\n"}
        send(batching, f" {collector.url}\n", events(150), **settings)
    assert {each.headers["Authorization"] for each in collector.requests} == {f"Bearer {TOKEN}"}
    assert {f"http://{collector.address}{each.path}" for each in collector.requests} == {
        collector.url
    }


def test_records_beyond_a_megabyte_are_dropped_the_oldest_first_and_counted_exactly(batching):
    with Collector(answer(503)) as collector:

        def recover(connection):
            collector.answers[""] = [answer()]
            connection.sendall(invoke("1000"))

        log = send(batching, collector.url, [*events(1000, more=10_000 * "x"), recover])
    arrived = ids(record for request in collector.requests[1:] for record in request.json)
    assert arrived == ids_of(1001 - len(arrived) + 1, 1001)
    assert 90 < len(arrived) < 110
    assert counted(log, "dropped") == 1002 - len(arrived)


def test_a_record_larger_than_the_buffer_is_dropped_alone(batching):
    with Collector(answer()) as collector:
        large = invoke("large", more=1_000_000 * "x")
        log = send(batching, collector.url, [*events(10), large, *events(10, 20)])
    assert ids(collector.records) == ids_of(20)
    assert counted(log, "dropped") == 1


def test_many_small_records_take_little_memory(extension, tmp_path):
    code = README.replace("batches.add(event)", "batches.add_texts(['1'] * 100_000)")
    small = extension_with(extension, tmp_path, code)
    with Collector(answer(503)) as collector:
        log = send(small, collector.url, [invoke(), invoke()])
    assert counted(log, "dropped") > 250_000


def test_a_request_is_neither_too_long_nor_too_large(batching):
    with Collector(answer(503)) as collector:

        def recover(connection):
            collector.answers[""] = [answer()]
            connection.sendall(invoke("large", more=400_000 * "x"))

        send(batching, collector.url, [*events(1500), recover])
        sent = [request for request in collector.requests if len(request.json) > 100]
    assert len(sent[0].json) == 1000
    assert max(len(request.body) for request in collector.requests) < 510_000


@pytest.mark.parametrize("address", ["http://[", "http://a..b", "https://:80"])
def test_an_unusable_url_does_not_end_the_extension(address, batching):
    log = send(batching, f"{address}/{TOKEN}", events(50))
    assert counted(log, "not confirmed before the end") == 51


@pytest.mark.parametrize(
    "environment", [{}, {"COLLECTOR_URL": ""}, {"COLLECTOR_URL": f"collector/{TOKEN}"}]
)
def test_a_missing_url_is_an_error_of_one_line_at_the_start(environment, batching):
    with FakeLambda() as api:
        status, _, stderr = end_of(batching, api, **environment)
        assert status == 1
        assert stderr == f"[{NAME}] COLLECTOR_URL must be an http:// or https:// URL\n"
        assert not api.asked("event/next")


CLOCK = """
import time
real_time, passed = time.time, 0
time.time = lambda: real_time() + passed
"""


# A minute passes before each event. During a freeze the wall clock goes on, but no time limit of a
# connection does.
FROZEN = CLOCK + README.replace(
    "    batches.add", "    global passed; passed += 60\n    batches.add"
)


def test_connections_that_hang_do_not_stop_it_after_a_freeze(extension, tmp_path):
    frozen = extension_with(extension, tmp_path, FROZEN, "TIMEOUT_SECONDS = 30")
    answers = [hangs, hangs, hangs, answer()]
    with Collector(*answers) as collector, FakeLambda([*events(5), hangs]) as api:
        with started(frozen, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.asked("event/next")) == 6)
            wait_until(lambda: len(collector.requests) >= 4)
            assert {"0", "1", "2", "3"} <= {*ids(collector.requests[3].json)}


def test_a_clock_that_is_set_back_holds_back_neither_records_nor_an_invocation(extension, tmp_path):
    """The clock is set back by an hour, in the second invocation, while the collector hangs."""
    code = CLOCK + README.replace(
        "    batches.add", "    global passed; passed += event.get('passes', 0)\n    batches.add"
    )
    settings = "BATCH_RECORDS = 1; BATCH_SECONDS = 1000"
    set_back = extension_with(extension, tmp_path, code, settings)
    sent = [invoke("0"), invoke("1", passes=-3600), hangs]
    with Collector(hangs, answer()) as collector, FakeLambda(sent) as api:
        with started(set_back, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.asked("event/next")) == 3)
            wait_until(lambda: len(collector.requests) == 2)
    assert ids(collector.requests[1].json) == ["0", "1"]


# Lets the time limits of connections pass five times as fast.
SHORT_LIMITS = """
import socket
set_limit = socket.socket.settimeout
socket.socket.settimeout = lambda self, limit: set_limit(self, limit and limit / 5)
"""


def test_a_collector_that_does_not_answer_within_five_seconds_is_asked_again(extension, tmp_path):
    """It is so without a further event. Here the five seconds pass within one."""
    code = SHORT_LIMITS + README
    batching = extension_with(extension, tmp_path, code, "BATCH_SECONDS = 0.1")
    times = []
    with Collector(hangs, timed(times, answer)) as collector:
        with FakeLambda([timed(times, invoke), hangs]) as api:
            with started(batching, api, COLLECTOR_URL=collector.url) as it:
                wait_until(lambda: len(times) == 2)
                assert f"[{NAME}] Records not sent yet: 1 (ReadTimeout)\n" in it.out
    assert 1 < times[1] - times[0] < 10


def test_the_number_of_hanging_senders_is_limited(extension, tmp_path):
    settings = "MAX_HANGING_SENDERS = 2; PATIENCE_SECONDS = 0; TIMEOUT_SECONDS = 30"
    frozen = extension_with(extension, tmp_path, FROZEN, settings)

    def after(requests):
        def give(connection):
            wait_until(lambda: len(collector.requests) == requests)
            connection.sendall(invoke())

        return give

    asks = [*map(after, [0, 1, 2, 3, 3, 3, 3]), hangs]
    with Collector(hangs) as collector, FakeLambda(asks) as api:
        with started(frozen, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.asked("event/next")) == len(asks))
            time.sleep(0.5)  # in which another sender would have made its request
            assert len(collector.requests) == 3


def test_if_no_thread_can_be_started_the_sender_stays(extension, tmp_path):
    code = README + "\nimport threading\n"
    no_thread = (
        "def fail(*_): raise RuntimeError\n    threading.Thread.start = fail\n    batches.add"
    )
    code = f"import threading\n{README}".replace("batches.add", no_thread)
    with Collector(hangs, answer()) as collector:
        lonely = extension_with(extension, tmp_path, code, "TIMEOUT_SECONDS = 0.3")
        log = send(lonely, collector.url, events(300))
    assert "Traceback" not in log
    assert ids(collector.requests[-1].json)[-1] is None


def test_a_collector_that_hangs_holds_an_invocation_for_a_second(batching):
    times = []
    asks = [*events(99), timed(times, invoke), timed(times)]
    with Collector(hangs) as collector, FakeLambda(asks) as api:
        with started(batching, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(times) == 2)
    assert 0.9 < times[1] - times[0] < 2.5


def test_half_a_second_before_its_deadline_no_invocation_waits_for_a_collector_that_hangs(
    extension, tmp_path
):
    """Of four invocations the shortest counts, because a busy machine can only prolong them."""
    settings = "BATCH_RECORDS = 1; PATIENCE_SECONDS = 60"
    patient = extension_with(extension, tmp_path, README, settings)
    times = []
    hurried = timed(times, lambda: invoke(seconds=0.7))
    with Collector(hangs) as collector:
        with FakeLambda([*[hurried] * 4, timed(times)]) as api:
            with started(patient, api, COLLECTOR_URL=collector.url):
                wait_until(lambda: len(times) == 5)
    assert 0.19 < min(end - begin for begin, end in pairwise(times)) < 0.4


def test_with_a_collector_that_hangs_it_ends_within_the_two_seconds_that_lambda_allows(batching):
    times = []
    asks = [invoke(), timed(times, lambda: SHUTDOWN)]
    with Collector(hangs) as collector, FakeLambda(asks) as api:
        status, stdout, _ = end_of(batching, api, COLLECTOR_URL=collector.url)
        times.append(time.monotonic())
    assert (status, counted(stdout, "not confirmed before the end")) == (0, 2)
    assert 1.1 < times[1] - times[0] < 2


@pytest.fixture
def shipping(extension, tmp_path):
    """The extension with the example's files over its own."""
    return extension_with(extension, tmp_path, SHIPPING)


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

    @property
    def destination(self):
        """Where the extension receives telemetry, as a URL."""
        return self.subscription["destination"]["URI"].replace("sandbox.localdomain", "127.0.0.1")

    def send_raw(self, request):
        """Sends a request to the extension as it is (bytes); returns the start of the response.

        That is empty if the extension gives up the connection.
        """
        host, port = self.destination.removeprefix("http://").split(":")
        with socket.create_connection((host, port), timeout=20) as client:
            client.sendall(request)
            return client.recv(1000)

    def offer(self, records):
        """Posts records to the extension as JSON; returns the status of the response."""
        body = json.dumps(records).encode()
        head = f"POST / HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        return int(self.send_raw(head.encode() + body).split(b" ")[1])

    def deliver(self, records):
        """Posts records to the extension as JSON, or bytes as they are."""
        body = records if isinstance(records, bytes) else json.dumps(records).encode()
        post(self.destination, body)


KINDS = "platform.start", "function", "platform.runtimeDone", "platform.report"


def records_of(number, kinds=KINDS, more=""):
    """What Lambda delivers about an invocation."""
    record = {"requestId": str(number), "more": more}
    time = "2026-11-27T12:00:00.123Z"
    return [{"time": time, "type": kind, "record": record} for kind in kinds]


def delivered(records, arrived):
    """How often each of these records has arrived, whatever was added to it."""
    keys = "time", "type", "record"
    arrived = [json.dumps({key: record[key] for key in keys}) for record in arrived]
    return [arrived.count(json.dumps(record)) for record in records]


def test_every_record_of_four_hundred_invocations_arrives(shipping):
    chance, not_waited_for = random.Random(20), []

    def invocation(number):
        def deliver(connection):
            """Delivers some of the records before the event, the others after it.

            Every second time they are out of order.
            """
            records = chance.sample(records_of(number), 4) if number % 2 else records_of(number)
            before = chance.randrange(5)
            api.deliver(records[:before])
            connection.sendall(invoke(str(number)))
            is_done = "platform.runtimeDone" not in str(records[before:])
            if not is_done and select.select([connection], [], [], 0.002)[0]:
                not_waited_for.append(number)
            api.deliver(records[before:])

        return deliver

    def end(connection):
        connection.sendall(SHUTDOWN)
        api.deliver(records_of("the end"))

    with (
        Collector(answer()) as collector,
        TelemetryApi([*map(invocation, range(400)), end]) as api,
    ):
        assert end_of(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
    sent = [record for number in [*range(400), "the end"] for record in records_of(number)]
    arrived = {json.dumps(record["record"]) + record["type"] for record in collector.records}
    assert {json.dumps(record["record"]) + record["type"] for record in sent} <= arrived
    assert not not_waited_for


def test_records_say_which_function_and_invocation_they_are_from(shipping):
    odd = [{}, "text", 5, None, [1], {"type": 5}, {"type": "platform.start"}]

    def deliver(connection):
        connection.sendall(invoke("1"))
        api.deliver([*records_of(1), *odd])

    function = {"AWS_LAMBDA_FUNCTION_NAME": "f", "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST"}
    with Collector(answer()) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        status, _, stderr = end_of(shipping, api, COLLECTOR_URL=collector.url, **function)
    assert (status, stderr) == (0, "")
    origin = {"function": "f", "version": "$LATEST", "requestId": "1"}
    with_origin = [record | origin for record in [*records_of(1), *odd[-2:]]]
    unreadable = [record for record in collector.records if record["type"] == "unreadable"]
    assert [record for record in collector.records if record not in unreadable] == with_origin
    assert [json.loads(record["record"]) for record in unreadable] == odd[:5]


# What Lambda may send instead of the end of an invocation.
CUT = json.dumps(records_of(0, more="x" * 100)).encode()
LOSSES = {
    "a record cut into two requests": [CUT[:150], CUT[150:]],
    "a record that is not quoted": [b'[{"type": "function", "record": what?}]'],
    "a record with NaN": [b'[{"type": "function", "record": NaN}]'],
    "no UTF-8": [b'[{"type": "function", "record": "\xff"}]'],
    "no array": [b'{"type": "function"}'],
    "something before the array": [b'x[{"type": "function"}]'],
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
    """The invocation may take an hour, and another record arrives that shows that it goes on."""

    def deliver(connection):
        api.deliver(records_of(0, ["platform.start"]))
        if when == "before it":
            api.deliver(bodies[0])
        connection.sendall(invoke("0"))
        for body in bodies[1 if when == "before it" else 0 :]:
            api.deliver(body)
        released.append(time.time())

    def asks_again(connection):
        released.append(time.time())
        connection.sendall(SHUTDOWN)

    bodies, released = LOSSES[loss], []
    with Collector(answer()) as collector, TelemetryApi([deliver, asks_again]) as api:
        status, stdout, stderr = end_of(shipping, api, COLLECTOR_URL=collector.url)
    assert (status, stderr) == (0, "")
    lines = [line for line in stdout.splitlines() if "elemetry" in line]
    assert len(lines) == len(bodies)
    if loss != "dropped records":
        unreadable = [it["record"] for it in collector.records if it["type"] == "unreadable"]
        assert unreadable == [body.decode(errors="replace") for body in bodies]


def test_a_request_that_is_not_received_does_not_hold_an_invocation_either(shipping):
    def deliver(connection):
        api.deliver(records_of(0, ["platform.start"]))
        connection.sendall(invoke("0"))
        for request in b"POST / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n":
            api.send_raw(request)

    with TelemetryApi([deliver, SHUTDOWN]) as api:
        status, stdout, stderr = end_of(shipping, api, COLLECTOR_URL=NOWHERE)
    assert (status, stderr) == (0, "")
    assert stdout.count("Telemetry that did not arrive: ") == 2


def test_half_a_request_does_not_keep_the_next_one_from_being_received(extension, tmp_path):
    """The extension waits five seconds for the other half. Here these pass within one."""
    shipping = extension_with(extension, tmp_path, SHORT_LIMITS + SHIPPING)
    with TelemetryApi([hangs]) as api, started(shipping, api, COLLECTOR_URL=NOWHERE) as it:
        wait_until(lambda: api.asked("event/next"))
        start = time.monotonic()
        assert api.send_raw(b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n[") == b""
        assert 0.9 < time.monotonic() - start < 10
        assert it.out.count("Telemetry that did not arrive: ") == 1
        assert api.offer(records_of(0)) == 200


def test_without_any_telemetry_an_invocation_is_held_for_a_second(shipping):
    times = []
    silent, asks_again = timed(times, lambda: invoke("0")), timed(times, lambda: SHUTDOWN)
    with TelemetryApi([silent, asks_again]) as api:
        _, stdout, _ = end_of(shipping, api, COLLECTOR_URL=NOWHERE)
    assert 0.9 < times[1] - times[0] < 10  # it could have taken an hour
    assert stdout.count("Telemetry does not say that invocation 0 has ended") == 1


def test_a_retry_with_the_same_request_id_waits_for_its_own_end(shipping):
    asked = []

    def first(connection):
        connection.sendall(invoke("0"))
        api.deliver(records_of(0))

    def retry(connection):
        api.deliver(records_of(0, ["platform.start"]))
        connection.sendall(invoke("0"))
        asked.append(bool(select.select([connection], [], [], 0.3)[0]))
        api.deliver(records_of(0, ["platform.runtimeDone"]))

    with TelemetryApi([first, retry, SHUTDOWN]) as api:
        assert end_of(shipping, api, COLLECTOR_URL=NOWHERE)[0] == 0
    assert asked == [False]


def test_the_end_of_an_invocation_is_noticed_without_polling(shipping):
    with TelemetryApi([invoke("0"), SHUTDOWN]) as api:
        with started(shipping, api, COLLECTOR_URL=NOWHERE) as it:
            wait_until(lambda: it.poll() is None and len(api.asked("event/next")) == 1)
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
    answers = []

    def late(connection):
        connection.sendall(SHUTDOWN)
        for delay in 0, 0.35, 0.2, 0.6:
            time.sleep(delay)
            with contextlib.suppress(OSError):  # it has ended
                answers.append(api.offer(records_of(len(answers), ["function"])))

    with Collector(answer()) as collector, TelemetryApi([late]) as api:
        assert end_of(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
        wait_until(lambda: len(answers) >= 2)
    taken = [number for number, status in enumerate(answers) if status == 200]
    arrived = {record["record"]["requestId"] for record in collector.records}
    assert arrived == {str(number) for number in taken} >= {"0", "1"}


def test_what_arrives_when_the_last_records_are_on_their_way_is_refused(extension, tmp_path):
    """Otherwise Lambda would think that it will be sent."""
    shipping = extension_with(extension, tmp_path, SHIPPING, "SHUTDOWN_SECONDS = 20")
    statuses = []

    def last(connection):
        statuses.append(api.offer(records_of(1, ["function"])))
        connection.sendall(SHUTDOWN)

    def meanwhile(connection):
        statuses.append(api.offer(records_of(2, ["function"])))
        connection.sendall(answer())

    with Collector(meanwhile, answer()) as collector, TelemetryApi([last]) as api:
        assert end_of(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
    assert statuses == [200, 503]
    assert [record["record"]["requestId"] for record in collector.records] == ["1"]


def test_four_thousand_records_at_shutdown_arrive_at_a_slow_collector(shipping):
    def slowly(connection):
        time.sleep(0.2)
        connection.sendall(answer())

    def end(connection):
        api.deliver(records_of(0, ["function"] * 2000))
        connection.sendall(SHUTDOWN)
        api.deliver(records_of(1, ["function"] * 2000))

    with Collector(slowly) as collector, TelemetryApi([end]) as api:
        _, stdout, _ = end_of(shipping, api, COLLECTOR_URL=collector.url)
    assert (len(collector.records), counted(stdout, "dropped")) == (4000, 0)


@pytest.mark.parametrize(("size", "number"), [(250_000, 20), (20_000, 400), (100, 10_000)])
@pytest.mark.parametrize("seconds", [0, 0.05], ids=["at once", "after 50 ms"])
def test_every_line_arrives_once_at_a_collector_that_answers(shipping, size, number, seconds):
    def slowly(connection):
        time.sleep(seconds)
        connection.sendall(answer())

    def deliver(connection):
        connection.sendall(invoke("0"))
        line = "x" * (size - 100)
        for first in range(0, number, max(1, 250_000 // size)):
            numbers = range(first, min(number, first + max(1, 250_000 // size)))
            texts = [f"{line} {each}" for each in numbers]
            api.deliver([{"time": "", "type": "function", "record": text} for text in texts])
        api.deliver(records_of(0, ["platform.runtimeDone"]))

    with Collector(slowly) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        _, stdout, _ = end_of(shipping, api, COLLECTOR_URL=collector.url)
    lines = [it["record"].split(" ")[1] for it in collector.records if it["type"] == "function"]
    assert sorted(map(int, lines)) == list(range(number))
    assert "Records" not in stdout


def test_a_collector_that_hangs_holds_lambda_for_one_delivery_and_lost_lines_are_counted(shipping):
    held = []
    lines = [{"time": "", "type": "function", "record": "x" * 60}] * 1000

    def deliver(connection):
        connection.sendall(invoke("0"))
        for _ in range(36):
            start = time.monotonic()
            api.deliver(lines)
            held.append(time.monotonic() - start)
        collector.answers[""] = [answer()]
        api.deliver(records_of(0, ["platform.runtimeDone"]))

    with Collector(hangs) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        _, stdout, _ = end_of(shipping, api, COLLECTOR_URL=collector.url)
    assert sum(seconds > 0.8 for seconds in held) <= 2
    arrived = [record for request in collector.requests[1:] for record in request.json]
    assert len(arrived) + counted(stdout, "dropped") == 36_001


JUDGES = collectors.as_loki, collectors.as_elasticsearch, collectors.as_otlp
assert len(FORMATS) == len(JUDGES)


@pytest.mark.parametrize(
    ("code", "judge"),
    [*zip(FORMATS, JUDGES, strict=True)],
    ids=["Loki", "Elasticsearch", "OpenTelemetry"],
)
def test_each_format_in_the_readme_suits_its_collector(extension, tmp_path, code, judge):
    (name,) = re.findall(r"class (\w+)\(Batches\)", code)
    own = f"import own\n\nbatches = own.{name}()"
    shipping = SHIPPING.replace("batches = Batches()", own)
    ship = extension_with(extension, tmp_path, shipping)
    (ship.parent / "own.py").write_text(code)

    def deliver(connection):
        connection.sendall(invoke("0"))
        api.deliver(records_of(0))
        api.deliver(b"no JSON")

    settings = {"AWS_LAMBDA_FUNCTION_NAME": "f", "COLLECTOR_TOKEN": TOKEN}
    with Collector(judge=judge) as collector, TelemetryApi([deliver, SHUTDOWN]) as api:
        status, stdout, stderr = end_of(ship, api, COLLECTOR_URL=collector.url, **settings)
    assert (status, stderr, collector.requests == []) == (0, "", False)
    assert "Records" not in stdout  # none was refused, or not sent
    assert TOKEN not in stdout


def test_an_invocation_that_does_not_end_does_not_keep_it_from_the_next_event(shipping):
    limit, asked = time.time() + 6, []

    def endless(connection):
        api.deliver(records_of(0, ["platform.start"]))
        connection.sendall(invoke("0", seconds=4))

    last = lambda connection: asked.append(time.time())  # noqa: E731
    with TelemetryApi([invoke(seconds=0), endless, last]) as api:
        with started(shipping, api, COLLECTOR_URL=NOWHERE):
            wait_until(lambda: asked)
    assert asked[0] < limit


def test_managed_instances_need_no_invoke_event(extension, tmp_path):
    shipping = extension_with(extension, tmp_path, SHIPPING, "BATCH_SECONDS = 0.5")
    environment = {"AWS_LAMBDA_INITIALIZATION_TYPE": "lambda-managed-instances"}
    with Collector(answer()) as collector, TelemetryApi([hangs]) as api:
        with started(shipping, api, COLLECTOR_URL=collector.url, **environment):
            wait_until(lambda: api.asked("event/next"))
            api.deliver(records_of(1))
            wait_until(lambda: len(collector.records) >= 4)
    assert delivered(records_of(1), collector.records) == [1, 1, 1, 1]
    assert not any("requestId" in record for record in collector.records)
    assert [request.json for request in api.asked("register")] == [{"events": ["SHUTDOWN"]}]
    assert api.subscription == {
        "schemaVersion": "2025-01-29",
        "types": ["platform", "function"],
        "buffering": {"timeoutMs": 25},
        "destination": {"protocol": "HTTP", "URI": ANY},
    }


@pytest.mark.parametrize("status", [202, 404])
def test_without_a_telemetry_api_it_says_so_and_goes_on(shipping, status):
    with Collector(answer()) as collector, TelemetryApi([invoke(), SHUTDOWN], status) as api:
        code, stdout, stderr = end_of(shipping, api, COLLECTOR_URL=collector.url)
    assert (code, stderr, collector.requests) == (0, "", [])
    assert stdout.count("Ships no logs") == len(stdout.splitlines()) - 1 == 1


def test_managed_instances_of_the_emulator_run_four_invocations_at_once_and_deliver_telemetry(
    evaluating, engine
):
    shutil.copytree(EXAMPLE, evaluating / NAME, dirs_exist_ok=True)
    managed = {"AWS_LAMBDA_MAX_CONCURRENCY": "4", "BASE_IMAGE": first_base_image()}
    with running(evaluating, "--docker", "-e", f"COLLECTOR_URL={NOWHERE}", **managed) as it:
        assert "-H 'Content-Type: application/json'" in it.output
        with ThreadPoolExecutor(4) as pool:

            def invoke(event):
                return it.invoke(event, **{"Content-Type": "application/json"})

            events = [{"do": "time.sleep(2) or 2"}] * 4
            # The first ones meet unready workers.
            wait_until(lambda: list(pool.map(invoke, events)) == [2] * 4, 60)
        assert it.stop() == 0
        assert re.search(r" Records not sent yet: [1-9]\d* \(ConnectionError\)", it.output)


@pytest.mark.slow
def test_try_sh_shows_the_line_that_the_function_logs(sample, engine):
    command = sample / "examples" / "ship_logs" / "try.sh", "-p", free_port()
    environment = os.environ | {"BASE_IMAGE": first_base_image()}
    with Logged(command, env=environment, start_new_session=True) as it:
        shown = "\"record\": \"Hello from the function's log: {'key': 'value'}"
        try:
            wait_until(lambda: it.poll() is not None or shown in it.out, 300)
            assert shown in it.out, it.output
        finally:
            it.terminate()
            it.wait(60)
    assert not processes_of(sample)
