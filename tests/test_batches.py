"""examples/ship_logs/batches.py in the README's extension.py, with collectors good and bad."""

import contextlib
import os
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from collector import FAILURES, SUCCESSES, TOKEN, Collector
from extensions_api_server import SHUTDOWN, ExtensionsApiServer, answer, invoke
from helpers import NAME, ROOT, free_port, run, wait_until
from started_extension import end_of, started
from test_docs import code_blocks

README, _ = code_blocks("README.md", "Make it your own", "python")
DRIPS, HANGS = FAILURES["drips"][0], FAILURES["hangs"][0]


@pytest.fixture
def batching(extension, tmp_path):
    """The README's extension.py, with batches.py next to it."""
    folder = Path(shutil.copytree(extension.parent, tmp_path / NAME))
    shutil.copy(ROOT / "examples" / "ship_logs" / "batches.py", folder)
    (folder / "extension.py").write_text(README)
    return folder / "extension.py"


def change(extension, before, after):
    """Changes batches.py, for the test to be short."""
    batches = extension.parent / "batches.py"
    assert batches.read_text().count(before) == 1
    batches.write_text(batches.read_text().replace(before, after))


def event(number, seconds=3600, **more):
    """An invocation that must end so many seconds later."""
    return invoke(str(number), deadlineMs=int((time.time() + seconds) * 1000), **more)


def send(batching, url, events, prefix=()):
    """Runs it for these events and a shutdown, each within seconds and little memory; returns what it logged."""
    peaks = []
    shutdown = lambda connection: (peaks.append(it.peak_memory), connection.sendall(SHUTDOWN))  # noqa: E731
    with ExtensionsApiServer([*events, shutdown]) as api, started(batching, api, prefix, COLLECTOR_URL=url) as it:
        assert (it.process.wait(8), it.stderr) == (0, "")
        assert peaks[0] < 100_000
        assert TOKEN not in it.stdout
        return it.stdout


def ids(records):
    """The request IDs in records, None for SHUTDOWN, each once."""
    return list(dict.fromkeys(record.get("requestId") for record in records))


def ids_of(count):
    return [*map(str, range(count)), None]


@pytest.mark.parametrize("success", SUCCESSES.values(), ids=SUCCESSES)
def test_every_record_arrives_at_a_collector_that(success, batching):
    with Collector(success) as collector:
        assert "not sent yet" not in send(batching, collector.url, map(event, range(150)))
    assert ids(collector.records) == ids_of(150)
    assert {request.headers["content-type"] for request in collector.requests} == {"application/json"}


@pytest.mark.parametrize("failure, reason", FAILURES.values(), ids=FAILURES)
def test_every_record_arrives_at_a_collector_that_first(failure, reason, batching):
    with Collector(failure, answer()) as collector:
        log = send(batching, collector.url, map(event, range(150)))
    assert ids(collector.requests[1].json) == ids_of(150)
    assert reason == "no answer" or f"[{NAME}] 100 records not sent yet: {reason};" in log


@pytest.mark.parametrize("failure, reason", FAILURES.values(), ids=FAILURES)
def test_it_goes_on_with_a_collector_that_always(failure, reason, batching):
    with Collector(failure) as collector:
        log = send(batching, collector.url, map(event, range(500)))
    assert re.search(rf"^\[{NAME}\] 501 records not sent.*: {reason}", log, re.MULTILINE)
    assert len(collector.requests) == 2  # with the 100th record, and with the last one


def test_a_batch_that_is_refused_keeps_no_other_one_from_arriving(batching):
    with Collector(answer(400), answer()) as collector:
        log = send(batching, collector.url, map(event, range(150)))
    assert f"[{NAME}] 100 records refused: status 400; 0 older ones dropped" in log
    assert ids(collector.requests[1].json) == ids_of(150)[100:]


def test_a_record_that_is_too_large_drops_itself_alone(batching):
    large = event(10, more=1_000_000 * "x")
    with Collector(answer()) as collector:
        log = send(batching, collector.url, [*map(event, range(10)), large, *map(event, range(11, 20))])
    assert ids(collector.records) == [each for each in ids_of(20) if each != "10"]
    assert "1 older ones dropped" in log


def test_an_array_has_500_records_at_most(batching):
    with Collector(answer(503)) as collector:

        def recover(connection):
            collector.answers[""] = [answer()]
            connection.sendall(event(1000))

        send(batching, collector.url, [*map(event, range(1000)), recover])
    assert [len(request.json) for request in collector.requests[1:]] == [500, 500, 2]


@contextlib.contextmanager
def nothing_listens(folder):
    yield (), f"http://127.0.0.1:{free_port()}/{TOKEN}", "not sent yet: ConnectionError"


@contextlib.contextmanager
def nobody_accepts(folder):
    """A server whose queue of connections is full, like an address where nobody is."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, contextlib.ExitStack() as clients:
        for _ in range(2):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield (), f"http://127.0.0.1:{server.getsockname()[1]}/{TOKEN}", "not sent: no answer"


@contextlib.contextmanager
def no_name_server_answers(folder):
    unshare = "unshare", "--mount"
    if os.getuid() != 0 or run(*unshare, "true").returncode != 0:
        pytest.skip("replacing /etc/resolv.conf needs root and namespaces")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # another run of the tests may do the same
        server.bind(("127.0.0.153", 53))
        (folder / "resolv.conf").write_text("nameserver 127.0.0.153\n")
        prefix = *unshare, ROOT / "tests" / "with_resolv_conf.sh", folder / "resolv.conf"
        yield prefix, f"https://collector.example/{TOKEN}", "not sent: no answer"


@pytest.mark.parametrize("where", [nothing_listens, nobody_accepts, no_name_server_answers])
def test_it_goes_on_where(where, batching, tmp_path):
    with where(tmp_path) as (prefix, url, reason):
        assert f"501 records {reason}" in send(batching, url, map(event, range(500)), prefix)


@pytest.mark.parametrize("address", ["[", "a..b", 64 * "a", ":80"])
def test_no_url_ends_the_extension(address, batching):
    assert "51 records not sent yet: " in send(batching, f"http://{address}/{TOKEN}", map(event, range(50)))


@pytest.mark.parametrize("environment", [{}, {"COLLECTOR_URL": ""}, {"COLLECTOR_URL": f"collector/{TOKEN}"}])
def test_a_missing_url_ends_the_start_in_one_line(environment, batching):
    with ExtensionsApiServer() as api:
        status, _, stderr = end_of(batching, api, **environment)
        assert (status, stderr) == (1, f"[{NAME}] COLLECTOR_URL must be an http:// or https:// URL\n")
        assert not api.asked("event/next")


def test_the_newest_records_arrive_after_a_long_failure_and_the_log_counts_the_others(batching):
    change(batching, "SECONDS = 100, 10 ", "SECONDS = 100, 0.1 ")
    with Collector(answer(503)) as collector:

        def recover(connection):
            wait_until(lambda: len(collector.requests) > 3)
            collector.answers[""] = [answer()]
            connection.sendall(event(1000))

        log = send(batching, collector.url, [*(event(number, more=10_000 * "x") for number in range(1000)), recover])
    dropped = sum(map(int, re.findall(r"(\d+) older ones dropped", log)))
    assert dropped > 800
    assert ids(record for request in collector.requests[3:] for record in request.json)[-100:] == ids_of(1001)[-100:]
    assert max(len(request.body) for request in collector.requests) <= 1_000_001


def test_a_few_records_are_sent_after_a_while_although_the_monotonic_clock_stood_still(batching):
    change(batching, "SECONDS = 100, 10 ", "SECONDS = 100, 0.5 ")
    change(batching, "time.sleep(0.2)", "time.sleep(60)")  # of a thread, which was frozen
    batching.write_text("import time\ntime.monotonic = lambda: 0\n" + batching.read_text())
    later = lambda connection: (time.sleep(0.6), connection.sendall(event(2)))  # noqa: E731
    collector, api = Collector(answer()), ExtensionsApiServer([event(1), later, HANGS])
    with collector, api, started(batching, api, COLLECTOR_URL=collector.url):
        wait_until(lambda: len(api.asked("event/next")) == 3)
        assert ids(collector.records) == ["1", "2"]


def test_batches_that_are_stuck_are_few_and_stop_no_other_one_and_not_the_last(batching):
    change(batching, "SECONDS = 100, 10 ", "SECONDS = 100, 0.1 ")
    collector, api = Collector(DRIPS, DRIPS, DRIPS, answer()), ExtensionsApiServer([event(1), HANGS])
    with collector, api, started(batching, api, COLLECTOR_URL=collector.url) as it:
        wait_until(lambda: len(collector.requests) == 3)
        time.sleep(1)
        assert len(collector.requests) == 3
        it.process.terminate()
        assert it.process.wait(10) == 0
    assert ids(collector.requests[3].json) == ["1", None]


def test_an_invocation_does_not_reach_its_deadline_for_a_collector_that_hangs(batching):
    seen = []
    hurried = lambda connection: (seen.append(time.time()), connection.sendall(event(100, seconds=0.9)))  # noqa: E731
    asks_again = lambda connection: (seen.append(time.time()), connection.sendall(event(101)))  # noqa: E731
    with Collector(HANGS) as collector:
        send(batching, collector.url, [*map(event, range(99)), hurried, asks_again])
    assert seen[1] - seen[0] < 0.9
