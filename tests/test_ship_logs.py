"""examples/ship_logs/: batches.py in the README's extension.py, and the whole example.

The collectors are good and bad.
"""

import json
import random
import re
import select
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import ANY

import pytest
from collector import FAILURES, SUCCESSES, TOKEN, Collector
from engine import first_base_image
from extension_process import end_of, started, variant
from extensions_api_server import IDENTIFIER, SHUTDOWN, ExtensionsApiServer, answer, hangs, invoke
from machine import ROOT, post, wait_until
from pages import code_blocks
from running import running
from sample import NAME, replace

README, _ = code_blocks("README.md", "Make it your own", "python")
DRIPS = FAILURES["drips"][0]
FILES = {path.name: path.read_text() for path in ROOT.glob("examples/ship_logs/*.py")}
NOWHERE = "http://127.0.0.1:1/"


@pytest.fixture
def batching(extension, tmp_path):
    """The README's extension.py, with batches.py next to it."""
    return variant(extension, tmp_path, {"batches.py": FILES["batches.py"], "extension.py": README})


@pytest.fixture
def hasty(batching):
    """The same, but a batch is due after a tenth of a second."""
    replace(batching.with_name("batches.py"), "SECONDS = 100, 10\n", "SECONDS = 100, 0.1\n")
    return batching


def events(*numbers, **more):
    return [invoke(str(number), **more) for number in range(*numbers)]


def send(extension, url, events, seconds=8):
    """Runs it for these events and a shutdown, within these seconds and little memory.

    Returns what it logged.
    """
    peaks = []

    def shutdown(connection):
        peaks.extend(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{it.pid}/status").read_text()))
        connection.sendall(SHUTDOWN)

    with (
        ExtensionsApiServer([*events, shutdown]) as api,
        started(extension, api, COLLECTOR_URL=url) as it,
    ):
        assert (it.wait(seconds), it.err, TOKEN in it.out) == (0, "", False)
        assert int(*peaks) < 100_000
        return it.out


def ids(records):
    """The request IDs in records, None for SHUTDOWN, each once."""
    return list(dict.fromkeys(record.get("requestId") for record in records))


def ids_of(*numbers):
    return [*map(str, range(*numbers)), None]


@pytest.mark.parametrize("success", SUCCESSES.values(), ids=SUCCESSES)
def test_every_record_arrives_at_a_collector_that(success, batching):
    with Collector(success) as collector:
        assert "dropped" not in send(batching, collector.url, events(150))
    assert ids(collector.records) == ids_of(150)
    types = {request.headers["Content-Type"] for request in collector.requests}
    assert types == {"application/json"}


@pytest.mark.parametrize("failure, reason", FAILURES.values(), ids=FAILURES)
def test_every_record_arrives_at_a_collector_that_first(failure, reason, batching):
    with Collector(failure, answer()) as collector:
        log = send(batching, collector.url, events(150))
    assert ids(collector.requests[1].json) == ids_of(150)
    assert reason == "no answer" or f"[{NAME}] 100 records not sent yet: {reason};" in log


@pytest.mark.parametrize("failure, reason", FAILURES.values(), ids=FAILURES)
def test_it_goes_on_with_a_collector_that_always(failure, reason, batching):
    with Collector(failure) as collector:
        log = send(batching, collector.url, events(500))
    assert re.search(rf"(?m)^\[{NAME}\] 501 records not sent.*: {reason}", log)
    assert len(collector.requests) == 2  # with the 100th record, and with the last one


def test_a_batch_that_is_refused_keeps_no_other_one_from_arriving(batching):
    with Collector(answer(400), answer()) as collector:
        log = send(batching, collector.url, events(150))
    assert f"[{NAME}] 100 records refused: status 400; 0 older ones dropped" in log
    assert ids(collector.requests[1].json) == ids_of(100, 150)


@pytest.mark.parametrize(
    ("size", "numbers", "dropped"), [(1_000_000, (10, 20), 11), (1_000_001, (0, 20), 1)]
)
def test_a_megabyte_drops_all_older_records_and_a_larger_record_itself_alone(
    size, numbers, dropped, batching
):
    more = (size - len(invoke("large", more="").partition(b"\r\n\r\n")[2])) * "x"
    with Collector(answer()) as collector:
        large = invoke("large", more=more)
        log = send(batching, collector.url, [*events(10), large, *events(10, 20)])
    assert ids(collector.records) == ids_of(*numbers)
    assert f" records sent: status 200; {dropped} older ones dropped\n" in log


def recovering(collector, failures):
    """An event after which the collector, which has failed so many times, works."""

    def recover(connection):
        wait_until(lambda: len(collector.requests) >= failures)
        collector.answers[""] = [answer()]
        connection.sendall(invoke("1000"))

    return recover


def test_an_array_has_500_records_at_most(batching):
    with Collector(answer(503)) as collector:
        send(batching, collector.url, [*events(1000), recovering(collector, 1)])
    assert [len(request.json) for request in collector.requests[1:]] == [500, 500, 2]


def test_the_newest_records_arrive_after_a_long_failure_and_the_log_counts_the_others(hasty):
    with Collector(answer(503)) as collector:
        sent = [*events(1000, more=10_000 * "x"), recovering(collector, 4)]
        log = send(hasty, collector.url, sent, seconds=20)
    assert sum(map(int, re.findall(r"; (\d+) older ones dropped", log))) > 800
    arrived = [record for request in collector.requests[3:] for record in request.json]
    assert ids(arrived)[-90:] == ids_of(912, 1001)
    sizes = [int(request.headers["Content-Length"]) for request in collector.requests]
    assert max(sizes) <= 1_000_001


@pytest.mark.parametrize("address", ["http://[", "http://a..b", "https://:80"])
def test_no_url_ends_the_extension(address, batching):
    assert "51 records not sent yet: " in send(batching, f"{address}/{TOKEN}", events(50))


@pytest.mark.parametrize(
    "environment", [{}, {"COLLECTOR_URL": ""}, {"COLLECTOR_URL": f"collector/{TOKEN}"}]
)
def test_a_missing_url_ends_the_start_in_one_line(environment, batching):
    with ExtensionsApiServer() as api:
        status, _, stderr = end_of(batching, api, **environment)
        assert status == 1
        assert stderr == f"[{NAME}] COLLECTOR_URL must be an http:// or https:// URL\n"
        assert not api.asked("event/next")


def test_a_few_records_are_sent_after_a_while_although_the_monotonic_clock_stood_still(hasty):
    # The sleep of a thread, which was frozen.
    replace(hasty.with_name("batches.py"), "time.sleep(0.2)", "time.sleep(60)")
    replace(hasty, "from batches", "import time\ntime.monotonic = lambda: 0\nfrom batches")
    later = lambda connection: (time.sleep(0.2), connection.sendall(invoke("1")))  # noqa: E731
    collector, api = Collector(answer()), ExtensionsApiServer([invoke("0"), later, hangs])
    with collector, api, started(hasty, api, COLLECTOR_URL=collector.url):
        wait_until(lambda: len(api.asked("event/next")) == 3)
        assert ids(collector.records) == ["0", "1"]


def test_batches_that_are_stuck_are_few_and_stop_no_other_one_and_not_the_last(hasty):
    collector = Collector(DRIPS, DRIPS, DRIPS, answer())
    api = ExtensionsApiServer([invoke("0"), hangs])
    with collector, api, started(hasty, api, COLLECTOR_URL=collector.url) as it:
        wait_until(lambda: len(collector.requests) == 3)
        time.sleep(1)
        assert len(collector.requests) == 3
        it.terminate()
        assert it.wait(10) == 0
    assert ids(collector.requests[3].json) == ids_of(1)


def test_an_invocation_does_not_reach_its_deadline_for_a_collector_that_hangs(batching):
    seen = []

    def hurried(connection):
        seen.append(time.time())
        connection.sendall(invoke(seconds=0.9))

    def asks_again(connection):
        seen.append(time.time())
        connection.sendall(invoke())

    with Collector(hangs) as collector:
        send(batching, collector.url, [*events(99), hurried, asks_again])
    assert 0.39 < seen[1] - seen[0] < 0.9


@pytest.fixture
def shipping(extension, tmp_path):
    """The extension with the example's files over its own. Here it listens on loopback only."""
    files = {name: text.replace('("", 0)', '("127.0.0.1", 0)') for name, text in FILES.items()}
    return variant(extension, tmp_path, files)


class TelemetryApi(ExtensionsApiServer):
    """Lambda, with a Telemetry API."""

    def __init__(self, events, subscribed=200):
        super().__init__(events)
        self.answers["/2022-07-01/telemetry"] = [answer(subscribed)]

    @property
    def subscription(self):
        (request,) = [each for each in self.requests if each.path == "/2022-07-01/telemetry"]
        assert request.method == "PUT"
        assert request.headers["Lambda-Extension-Identifier"] == IDENTIFIER
        return request.json

    def deliver(self, records):
        """Posts records to the extension."""
        address = self.subscription["destination"]["URI"]
        address = address.replace("sandbox.localdomain", "127.0.0.1")
        post(address, json.dumps(records).encode())


def records_of(number):
    """What Lambda delivers about an invocation."""
    kinds = "platform.start", "function", "platform.runtimeDone", "platform.report"
    record = {"requestId": str(number)}
    return [{"time": f"at {number}", "type": kind, "record": record} for kind in kinds]


def test_every_record_of_a_thousand_invocations_arrives(shipping):
    chance, not_waited_for = random.Random(20), []

    def invocation(number):
        def deliver(connection):
            """Some of the records before the event, the others after it.

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
        TelemetryApi([*map(invocation, range(1000)), end]) as api,
    ):
        assert end_of(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
    delivered = [record for number in [*range(1000), "the end"] for record in records_of(number)]
    assert {*map(str, delivered)} <= {*map(str, collector.records)}
    assert not not_waited_for


def test_an_invocation_that_does_not_end_does_not_keep_it_from_the_next_event(shipping):
    limit, asked = time.time() + 6, []  # after the first event, which imports requests
    events = [invoke(seconds=0), invoke(seconds=6), lambda connection: asked.append(time.time())]
    with TelemetryApi(events) as api, started(shipping, api, COLLECTOR_URL=NOWHERE) as it:
        wait_until(lambda: asked)
        nanoseconds_of_cpu = int(Path(f"/proc/{it.pid}/schedstat").read_text().split()[0])
        assert nanoseconds_of_cpu < 1.5e9  # it does not spin
    assert asked[0] < limit


def test_managed_instances_need_no_invoke_event(shipping):
    replace(shipping.with_name("batches.py"), "SECONDS = 100, 10\n", "SECONDS = 100, 0.5\n")
    environment = {"AWS_LAMBDA_INITIALIZATION_TYPE": "lambda-managed-instances"}
    with Collector(answer()) as collector, TelemetryApi([hangs]) as api:
        with started(shipping, api, COLLECTOR_URL=collector.url, **environment):
            wait_until(lambda: api.asked("event/next"))
            api.deliver(records_of(1))
            wait_until(lambda: len(collector.records) == 4)
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


def test_managed_instances_of_the_emulator_run_four_invocations_at_the_same_time_and_deliver(
    evaluating, engine
):
    shutil.copytree(ROOT / "examples" / "ship_logs", evaluating / NAME, dirs_exist_ok=True)
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
        assert re.search(r" [1-9]\d* records not sent yet: ConnectionError", it.output)
