"""examples/ship_logs/batches.py in the README's extension.py, with collectors good and bad."""

import os
import re
import socket
import sys
import time

import pytest
from collector import FAILURES, SUCCESSES, TOKEN, Collector
from extension_process import end_of, started, variant
from extensions_api_server import SHUTDOWN, ExtensionsApiServer, answer, hangs, invoke
from machine import PROGRAMS, ROOT, need_namespaces, wait_until
from pages import code_blocks
from sample import NAME, replace

README, _ = code_blocks("README.md", "Make it your own", "python")
DRIPS = FAILURES["drips"][0]


@pytest.fixture
def batching(extension, tmp_path):
    """The README's extension.py, with batches.py next to it."""
    batches = (ROOT / "examples" / "ship_logs" / "batches.py").read_text()
    return variant(extension, tmp_path, {"batches.py": batches, "extension.py": README})


@pytest.fixture
def hasty(batching):
    """The same, but a batch is due after a tenth of a second."""
    replace(batching.with_name("batches.py"), "SECONDS = 100, 10 ", "SECONDS = 100, 0.1 ")
    return batching


def events(*numbers, **more):
    return [invoke(str(number), **more) for number in range(*numbers)]


def send(extension, url, events, prefix=()):
    """Runs it for these events and a shutdown, within seconds and little memory; returns what it logged."""
    peaks = []

    def shutdown(connection):
        peaks.append(it.memory("VmHWM"))
        connection.sendall(SHUTDOWN)

    with ExtensionsApiServer([*events, shutdown]) as api, started(extension, api, prefix, COLLECTOR_URL=url) as it:
        assert (it.wait(8), it.err) == (0, "")
        assert peaks[0] < 100_000
        assert TOKEN not in it.out
        return it.out


def ids(records):
    """The request IDs in records, None for SHUTDOWN, each once."""
    return list(dict.fromkeys(record.get("requestId") for record in records))


def ids_of(*numbers):
    return [*map(str, range(*numbers)), None]


@pytest.mark.parametrize("success", SUCCESSES.values(), ids=SUCCESSES)
def test_every_record_arrives_at_a_collector_that(success, batching):
    with Collector(success) as collector:
        assert "not sent yet" not in send(batching, collector.url, events(150))
    assert ids(collector.records) == ids_of(150)
    assert {request.headers["Content-Type"] for request in collector.requests} == {"application/json"}


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


def test_a_record_that_is_too_large_drops_itself_alone(batching):
    with Collector(answer()) as collector:
        log = send(batching, collector.url, [*events(10), invoke("large", more=1_000_000 * "x"), *events(10, 20)])
    assert ids(collector.records) == ids_of(20)
    assert "1 older ones dropped" in log


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
        log = send(hasty, collector.url, [*events(1000, more=10_000 * "x"), recovering(collector, 4)])
    assert sum(map(int, re.findall(r"(\d+) older ones dropped", log))) > 800
    arrived = [record for request in collector.requests[3:] for record in request.json]
    assert ids(arrived)[-90:] == ids_of(912, 1001)
    assert max(int(request.headers["Content-Length"]) for request in collector.requests) <= 1_000_001


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="another resolv.conf needs Linux and root")
def test_it_goes_on_where_no_name_server_answers(batching, tmp_path):
    need_namespaces()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # another run of the tests may do the same
        server.bind(("127.0.0.153", 53))
        (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.153\n")
        prefix = "unshare", "--mount", PROGRAMS / "with_resolv_conf.sh", tmp_path / "resolv.conf"
        assert "501 records not sent: no answer" in send(batching, "https://collector.example/", events(500), prefix)


@pytest.mark.parametrize("address", ["[", "a..b", ":80"])
def test_no_url_ends_the_extension(address, batching):
    assert "51 records not sent yet: " in send(batching, f"http://{address}/{TOKEN}", events(50))


@pytest.mark.parametrize("environment", [{}, {"COLLECTOR_URL": ""}, {"COLLECTOR_URL": f"collector/{TOKEN}"}])
def test_a_missing_url_ends_the_start_in_one_line(environment, batching):
    with ExtensionsApiServer() as api:
        status, _, stderr = end_of(batching, api, **environment)
        assert (status, stderr) == (1, f"[{NAME}] COLLECTOR_URL must be an http:// or https:// URL\n")
        assert not api.asked("event/next")


def test_a_few_records_are_sent_after_a_while_although_the_monotonic_clock_stood_still(hasty):
    replace(hasty.with_name("batches.py"), "time.sleep(0.2)", "time.sleep(60)")  # of a thread, which was frozen
    replace(hasty, "from batches", "import time\ntime.monotonic = lambda: 0\nfrom batches")
    later = lambda connection: (time.sleep(0.2), connection.sendall(invoke("1")))  # noqa: E731
    collector, api = Collector(answer()), ExtensionsApiServer([invoke("0"), later, hangs])
    with collector, api, started(hasty, api, COLLECTOR_URL=collector.url):
        wait_until(lambda: len(api.asked("event/next")) == 3)
        assert ids(collector.records) == ["0", "1"]


def test_batches_that_are_stuck_are_few_and_stop_no_other_one_and_not_the_last(hasty):
    collector, api = Collector(DRIPS, DRIPS, DRIPS, answer()), ExtensionsApiServer([invoke("0"), hangs])
    with collector, api, started(hasty, api, COLLECTOR_URL=collector.url) as it:
        wait_until(lambda: len(collector.requests) == 3)
        time.sleep(1)
        assert len(collector.requests) == 3
        it.terminate()
        assert it.wait(10) == 0
    assert ids(collector.requests[3].json) == ids_of(1)


def test_an_invocation_does_not_reach_its_deadline_for_a_collector_that_hangs(batching):
    seen = []
    hurried = lambda connection: (seen.append(time.time()), connection.sendall(invoke(seconds=0.9)))  # noqa: E731
    asks_again = lambda connection: (seen.append(time.time()), connection.sendall(invoke()))  # noqa: E731
    with Collector(hangs) as collector:
        send(batching, collector.url, [*events(99), hurried, asks_again])
    assert seen[1] - seen[0] < 0.9
