"""batches.py in the README's extension.py, with collectors that work and collectors that fail."""

import re
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
from batching import NOWHERE, counted
from extension_process import run_to_end, started
from fake_collector import FAILURES, SUCCESSES, TOKEN, Collector, answers_after, refuses
from fake_lambda import SHUTDOWN, FakeLambda, ScriptedServer, answer, hangs, invoke_event
from machine import PROGRAMS, fastest, wait_until
from pages import code_blocks
from sample import NAME

README, _ = code_blocks("README.md", "Make it your own", "python")
SCRIPTED = (PROGRAMS / "batching_extension.py").read_text()


@pytest.fixture
def batching(batching_with):
    """The README's extension.py, with batches.py next to it."""
    return batching_with(README)


@pytest.fixture
def scripted_batching(batching_with):
    """The same, but it first runs what the event says under "do"."""
    return batching_with(SCRIPTED)


def events(*numbers, bad=(), **more):
    """Events with these request IDs, numbers as for range(); the bad ones say so."""
    return [
        invoke_event(str(number), word="bad" if number in bad else "", **more)
        for number in range(*numbers)
    ]


def run_batching(extension, url, events, **environment):
    """Runs the extension with these events and a shutdown, and returns what it logged.

    It must exit with 0, take little memory, and show neither an error nor the token.
    """
    peaks = []

    def shutdown(connection):
        status = Path(f"/proc/{process.pid}/status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)))
        connection.sendall(SHUTDOWN)

    with (
        FakeLambda([*events, shutdown]) as api,
        started(extension, api, COLLECTOR_URL=url, **environment) as process,
    ):
        assert process.wait(60) == 0
        assert process.err == ""
        assert TOKEN not in process.out
        assert peaks[0] < 100_000
        return process.out


def ids(records):
    """The request IDs in records, None for SHUTDOWN, each once."""
    return list(dict.fromkeys(record.get("requestId") for record in records))


def ids_sent(number):
    """The request IDs that events(number) and the SHUTDOWN after them have."""
    return [*map(str, range(number)), None]


def ids_taken(collector):
    """The request IDs of the records in the requests without a bad record."""
    requests = [request for request in collector.requests if b"bad" not in request.body]
    return [record.get("requestId") for request in requests for record in request.json]


@pytest.mark.parametrize("success", SUCCESSES.values(), ids=SUCCESSES)
def test_every_record_arrives_at_a_working_collector(success, batching):
    with Collector(success) as collector:
        assert "dropped" not in run_batching(batching, collector.url, events(150))
    assert ids(collector.records) == ids_sent(150)
    types = {request.headers["Content-Type"] for request in collector.requests}
    assert types == {"application/json"}


@pytest.mark.parametrize("failure, reason", FAILURES.values(), ids=FAILURES)
def test_every_record_arrives_after_one_failure(failure, reason, batching_with):
    """The failed batch is sent again at SHUTDOWN, together with the records after it."""
    batching = batching_with(README, BATCH_RECORDS=10)
    with Collector(failure, answer()) as collector:
        log = run_batching(batching, collector.url, events(15))
    assert ids(collector.requests[-1].json) == ids_sent(15)
    assert f"[{NAME}] Records not sent yet: 10 ({reason})\n" in log


def test_survives_a_collector_that_always_fails(batching_with):
    """It tries at the tenth record, and at the last one."""
    batching = batching_with(README, BATCH_RECORDS=10)
    with Collector(answer(500)) as collector:
        log = run_batching(batching, collector.url, events(50))
    assert f"[{NAME}] Records not confirmed before the end: 51\n" in log
    assert len(collector.requests) == 2


def test_only_rejected_records_are_lost(batching):
    """Two bad ones are in the first batch, the third one is in the second; all others arrive."""
    bad = {7, 57, 107}
    with Collector(judge=refuses("bad")) as collector:
        log = run_batching(batching, collector.url, events(150, bad=bad))
    sent = [sent for sent in ids_sent(150) if sent is None or int(sent) not in bad]
    assert sorted(ids_taken(collector), key=str) == sorted(sent, key=str)
    assert counted(log, "refused") == 3
    assert counted(log, "dropped") == 0
    assert len(collector.requests) < 60  # it makes smaller requests only for a while


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_rejected_record_does_not_delay_the_others(batching_with, status):
    """There is no further event, not even SHUTDOWN, at which it could send them."""
    batching = batching_with(README, BATCH_RECORDS=20, BATCH_SECONDS=1000)
    answers = [*events(20, bad={7}), hangs]
    with Collector(judge=refuses("bad", status)) as collector, FakeLambda(answers) as api:
        with started(batching, api, COLLECTOR_URL=collector.url) as process:
            refused = f"[{NAME}] Records refused: 1 (status {status})\n"
            wait_until(lambda: refused in process.out)
            assert len(ids_taken(collector)) == 19


def test_adding_an_unserializable_record_raises(scripted_batching):
    """The traceback shows process(), which has added it, and not the thread that sends."""
    with FakeLambda([invoke_event(do="event['value'] = float('nan')")]) as api:
        status, _, stderr = run_to_end(scripted_batching, api, COLLECTOR_URL=NOWHERE)
    assert status == 1
    assert "in process" in stderr
    assert "ValueError" in stderr


def test_any_thread_can_add_records(scripted_batching):
    with Collector(answer()) as collector:
        run_batching(scripted_batching, collector.url, [invoke_event(do="add_in_threads()")])
    assert len(collector.records) == 8 * 500 + 2


def test_the_token_goes_into_a_header_whatever_netrc_says(batching, tmp_path):
    """White space around the settings is ignored."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
    for token, header in (f"{TOKEN}\n", f"Bearer {TOKEN}"), ("", None):
        with Collector(answer()) as collector:
            settings = {"COLLECTOR_TOKEN": token, "HOME": str(tmp_path)}
            run_batching(batching, f" {collector.url}\n", events(1), **settings)
            assert collector.requests[0].headers["Authorization"] == header


def test_a_proxy_is_used_unless_no_proxy_names_the_collector(batching):
    url = "http://collector.invalid/records"
    with ScriptedServer({"": [answer()]}) as proxy:
        settings = {"http_proxy": f"http://{proxy.address}"}
        run_batching(batching, url, events(1), **settings)
        assert {request.path for request in proxy.requests} == {url}
        proxy.requests.clear()
        log = run_batching(batching, url, events(1), no_proxy="collector.invalid", **settings)
        assert proxy.requests == []
    assert counted(log, "not confirmed before the end") == 2


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"COLLECTOR_URL": f"ftp://{TOKEN}"}, "COLLECTOR_URL must be an http:// or https:// URL"),
        (
            {"COLLECTOR_URL": NOWHERE, "REQUESTS_CA_BUNDLE": "/no/file.pem"},
            "REQUESTS_CA_BUNDLE names no file: /no/file.pem",
        ),
    ],
    ids=["another URL", "no certificates"],
)
def test_a_wrong_setting_fails_at_startup_with_one_line(settings, error, batching):
    with FakeLambda() as api:
        status, _, stderr = run_to_end(batching, api, **settings)
        assert (status, stderr) == (1, f"[{NAME}] {error}\n")
        assert not api.requests_for("event/next")


def test_overflow_drops_the_oldest_records_and_counts_them(batching):
    """The collector fails until there have been ten megabytes, and then recovers."""
    with Collector(answer(503)) as collector:

        def recover(connection):
            collector.answers[""] = [answer()]
            connection.sendall(invoke_event("1000"))

        log = run_batching(batching, collector.url, [*events(1000, more=10_000 * "x"), recover])
    arrived = ids(record for request in collector.requests[1:] for record in request.json)
    everything = ids_sent(1001)
    assert arrived == everything[-len(arrived) :]
    assert 90 < len(arrived) < 110
    assert counted(log, "dropped") == len(everything) - len(arrived)


def test_an_oversized_record_does_not_evict_others(batching):
    """A record that fills more than a request gets one of its own, and is dropped beyond that."""
    long = invoke_event("long", more=600_000 * "x")
    oversized = invoke_event("oversized", more=1_000_000 * "x")
    with Collector(answer()) as collector:
        log = run_batching(batching, collector.url, [*events(10), long, oversized, *events(10, 20)])
    assert ids(collector.records) == [*ids_sent(10)[:-1], "long", *ids_sent(20)[10:]]
    (alone,) = [request for request in collector.requests if b'"long"' in request.body]
    assert len(alone.json) == 1
    assert counted(log, "dropped") == 1


def test_small_records_are_counted_by_memory_used(scripted_batching):
    """A string of one character takes about 50 bytes."""
    many = invoke_event(do="batches.add_texts(['1'] * 100_000)")
    with Collector(answer(503)) as collector:
        log = run_batching(scripted_batching, collector.url, [many, many])
    assert counted(log, "dropped") > 150_000


def test_requests_are_limited_in_records_and_size(batching):
    """When the collector recovers, 1,500 short records and a long one are waiting."""
    with Collector(answer(503)) as collector:

        def recover(connection):
            collector.answers[""] = [answer()]
            connection.sendall(invoke_event("large", more=400_000 * "x"))

        run_batching(batching, collector.url, [*events(1500), recover])
    lengths = [len(request.json) for request in collector.requests]
    assert next(length for length in lengths if length > 100) == 1000
    assert max(len(request.body) for request in collector.requests) < 510_000


def test_recovers_from_hung_connections_after_a_freeze(batching_with):
    """Three requests hang, each for a minute by the wall clock; the fourth is answered."""
    frozen = batching_with(SCRIPTED, TIMEOUT_SECONDS=30, HANGING_SECONDS=31)
    minute_later = invoke_event(do="move_clock(60)")
    answers = [hangs, hangs, hangs, answer()]
    with Collector(*answers) as collector, FakeLambda([*[minute_later] * 5, hangs]) as api:
        with started(frozen, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(collector.requests) >= 4)
            assert len(collector.requests[3].json) >= 4


def test_setting_the_clock_back_delays_nothing(batching_with):
    """The clock is set back by an hour, in the second invocation, while the collector hangs."""
    set_back = batching_with(SCRIPTED, BATCH_RECORDS=1, BATCH_SECONDS=1000)
    answers = [invoke_event("0"), invoke_event("1", do="move_clock(-3600)"), SHUTDOWN]
    with Collector(hangs, answer()) as collector, FakeLambda(answers) as api:
        assert run_to_end(set_back, api, COLLECTOR_URL=collector.url)[0] == 0
    assert ids(collector.requests[1].json)[:2] == ["0", "1"]


def test_tries_again_after_a_timeout_of_five_seconds(batching_with):
    """No further event comes. Here the five seconds pass within one."""
    batching = batching_with(README, speed=5, BATCH_SECONDS=0.1)
    with Collector(hangs, answer()) as collector, FakeLambda([invoke_event(), hangs]) as api:
        with started(batching, api, COLLECTOR_URL=collector.url) as process:
            wait_until(lambda: len(collector.requests) == 2)
            assert f"[{NAME}] Records not sent yet: 1 (ReadTimeout)\n" in process.out
    assert 1 < collector.requests[1].time - collector.requests[0].time < 10


def test_a_hanging_thread_counts_until_it_gets_its_response(batching_with):
    """One can hang beside the current one. Before each event a minute passes.

    What a batch that was given up has sent arrives again, whatever its late response says.
    """
    settings = {"TIMEOUT_SECONDS": 30, "HANGING_SECONDS": 31, "PATIENCE_SECONDS": 0}
    batching = batching_with(SCRIPTED, BATCH_RECORDS=1, MAX_HANGING_THREADS=1, **settings)
    is_late = threading.Event()

    def late(connection):
        is_late.wait(60)
        connection.sendall(answer())

    def event(number):
        def give(connection):
            wait_until(lambda: len(collector.requests) == min(number, 2))
            if number == 3:
                is_late.set()
                time.sleep(0.3)  # in which the first thread gets its response
            connection.sendall(invoke_event(str(number), do="move_clock(60)"))

        return give

    with Collector(late, hangs, answer()) as collector:
        run_batching(batching, collector.url, map(event, range(4)))
    sent = [ids(request.json) for request in collector.requests]
    assert sent[:3] == [["0"], ["0", "1"], ["0", "1", "2", "3"]]


def test_backs_off_after_a_failure_in_a_long_invocation(batching_with):
    batching = batching_with(README, BATCH_RECORDS=1, BATCH_SECONDS=0.5)
    with Collector(answer(500)) as collector, FakeLambda([invoke_event(), hangs]) as api:
        with started(batching, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(collector.requests) >= 4)
    # The first request can be late, and the timer has begun before it.
    times = [request.time for request in collector.requests[1:4]]
    assert min(later - earlier for earlier, later in pairwise(times)) > 0.4


def test_a_slow_batch_is_not_given_up(batching_with):
    """Each request gets its response in time, but all of them together take longer."""
    batching = batching_with(README, BATCH_RECORDS=6, RECORDS_IN_REQUEST=1, SHUTDOWN_SECONDS=20)
    with Collector(answers_after(0.4)) as collector:
        log = run_batching(batching, collector.url, events(6))
    assert [record.get("requestId") for record in collector.records] == ids_sent(6)
    assert "not sent yet" not in log


def test_a_hanging_collector_delays_an_invocation_by_a_second(batching):
    """The hundredth record makes a batch, for which process() waits."""

    def seconds():
        with Collector(hangs) as collector, FakeLambda([*events(100), SHUTDOWN]) as api:
            run_to_end(batching, api, COLLECTOR_URL=collector.url)
        return api.durations[-1]

    assert 0.9 < fastest(seconds, 2) < 2


def test_does_not_wait_just_before_the_deadline(batching_with):
    """Of eight invocations the shortest counts, because a busy machine can only prolong them."""
    patient = batching_with(README, BATCH_RECORDS=1, PATIENCE_SECONDS=60)

    def hurried(connection):
        connection.sendall(invoke_event(seconds=0.5))

    with Collector(hangs) as collector, FakeLambda([*[hurried] * 8, SHUTDOWN]) as api:
        run_to_end(patient, api, COLLECTOR_URL=collector.url)
    assert 0.29 < min(api.durations) < 0.5


def test_shuts_down_in_time_with_a_hanging_collector(batching):
    """Lambda allows 2 seconds after SHUTDOWN, and the Daemon gives a deadline that is wrong."""

    def seconds():
        with Collector(hangs) as collector, FakeLambda([invoke_event(), SHUTDOWN]) as api:
            _, stdout, _ = run_to_end(batching, api, COLLECTOR_URL=collector.url)
            end = time.monotonic()
        assert counted(stdout, "not confirmed before the end") == 2
        return end - api.requests[-1].time

    assert 1.1 < fastest(seconds, 2) < 2
