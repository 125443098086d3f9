"""batches.py in the README's extension.py, with collectors that work and collectors that fail."""

import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
from batching import NOWHERE, SHORT_LIMITS, counted, timed
from collector import FAILURES, SUCCESSES, TOKEN, Collector, refuses
from extension_process import run_to_end, started
from fake_lambda import SHUTDOWN, FakeLambda, answer, hangs, invoke_event
from machine import PROGRAMS, fastest, wait_until
from pages import code_blocks
from sample import NAME

README, _ = code_blocks("README.md", "Make it your own", "python")
OBEDIENT = (PROGRAMS / "batching_extension.py").read_text()


@pytest.fixture
def batching(batching_with):
    """The README's extension.py, with batches.py next to it."""
    return batching_with(README)


@pytest.fixture
def batching_tens(batching_with):
    """The same, but ten records are a batch."""
    return batching_with(README, BATCH_RECORDS=10)


@pytest.fixture
def obedient_batching(batching_with):
    """The same, but it first executes what the event says under "do"."""
    return batching_with(OBEDIENT)


def events(*numbers, **more):
    """Events with these request IDs, numbers as for range()."""
    return [invoke_event(str(number), **more) for number in range(*numbers)]


def events_with_bad(numbers, bad):
    """Events with these request IDs, numbers; the bad ones say so."""
    return [invoke_event(str(number), more="bad" if number in bad else "") for number in numbers]


def run_batching(extension, url, events, **environment):
    """Runs it with these events and a shutdown, and returns what it logged.

    It must end with 0, take little memory, and show neither an error nor the token.
    """
    peaks = []

    def shutdown(connection):
        status = Path(f"/proc/{it.pid}/status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)))
        connection.sendall(SHUTDOWN)

    with (
        FakeLambda([*events, shutdown]) as api,
        started(extension, api, COLLECTOR_URL=url, **environment) as it,
    ):
        assert it.wait(60) == 0
        assert it.err == ""
        assert TOKEN not in it.out
        assert peaks[0] < 100_000
        return it.out


def ids(records):
    """The request IDs in records, None for SHUTDOWN, each once."""
    return list(dict.fromkeys(record.get("requestId") for record in records))


def ids_sent(number):
    """The request IDs that events(number) and the SHUTDOWN after them have."""
    return [*map(str, range(number)), None]


def records_taken(collector):
    """The records in the requests without a bad one, as often as they arrived."""
    taken = [request for request in collector.requests if b"bad" not in request.body]
    return [record for request in taken for record in request.json]


@pytest.mark.parametrize("success", SUCCESSES.values(), ids=SUCCESSES)
def test_every_record_arrives_at_a_working_collector(success, batching):
    with Collector(success) as collector:
        assert "dropped" not in run_batching(batching, collector.url, events(150))
    assert ids(collector.records) == ids_sent(150)
    types = {request.headers["Content-Type"] for request in collector.requests}
    assert types == {"application/json"}


@pytest.mark.parametrize("failure, reason", FAILURES.values(), ids=FAILURES)
def test_every_record_arrives_at_a_collector_that_fails_once(failure, reason, batching_tens):
    """The failed batch is sent again at SHUTDOWN, together with the records after it."""
    with Collector(failure, answer()) as collector:
        log = run_batching(batching_tens, collector.url, events(15))
    assert ids(collector.requests[1].json) == ids_sent(15)
    assert not reason or f"[{NAME}] Records not sent yet: 10 ({reason})\n" in log


KINDS_OF_FAILURE = "answers 500", "redirects", "resets", "speaks no HTTP", "hangs", "drips"


@pytest.mark.parametrize(
    "failure, reason", [FAILURES[kind] for kind in KINDS_OF_FAILURE], ids=KINDS_OF_FAILURE
)
def test_it_goes_on_with_a_collector_that_always_fails(failure, reason, batching_tens):
    """It tries at the tenth record, and at the last one; if it gets no answer, once more."""
    with Collector(failure) as collector:
        log = run_batching(batching_tens, collector.url, events(50))
    assert f"[{NAME}] Records not confirmed before the end: 51\n" in log
    assert len(collector.requests) in ([2] if reason else [2, 3])


def test_only_the_records_that_the_collector_refuses_are_lost(batching):
    """Two bad ones are in the first batch, the third one is in the second; all others arrive."""
    bad = {7, 57, 107}
    with Collector(judge=refuses("bad")) as collector:
        log = run_batching(batching, collector.url, events_with_bad(range(150), bad))
    arrived = [int(it["requestId"]) for it in records_taken(collector) if "requestId" in it]
    assert sorted(arrived) == [number for number in range(150) if number not in bad]
    assert counted(log, "refused") == 3
    assert counted(log, "dropped") == 0
    assert len(collector.requests) < 60  # it makes smaller requests only for a while


@pytest.mark.parametrize("status", [400, 413, 422])
def test_all_records_but_the_one_that_is_refused_arrive_in_the_same_invocation(
    batching_with, status
):
    """There is no further event, not even SHUTDOWN, at which it could send them."""
    batching = batching_with(README, BATCH_RECORDS=20, BATCH_SECONDS=1000)
    answers = [*events_with_bad(range(20), bad={7}), hangs]
    with Collector(judge=refuses("bad", status)) as collector, FakeLambda(answers) as api:
        with started(batching, api, COLLECTOR_URL=collector.url) as it:
            refused = f"[{NAME}] Records refused: 1 (status {status})\n"
            wait_until(lambda: refused in it.out)
            arrived = ids(records_taken(collector))
    assert arrived == [str(number) for number in range(20) if number != 7]


def test_a_record_that_json_cannot_hold_is_a_bug_where_it_is_added(obedient_batching):
    """The traceback shows process(), which has added it, and not the sender."""
    with FakeLambda([invoke_event(do="event['value'] = float('nan')")]) as api:
        status, _, stderr = run_to_end(obedient_batching, api, COLLECTOR_URL=NOWHERE)
    assert status == 1
    assert "in process" in stderr
    assert "ValueError" in stderr


def test_a_bug_in_request_shows_its_traceback_and_ends_the_extension(obedient_batching):
    """The sender calls request(), in a thread of its own, when it has a hundred records."""
    bug = "def request(texts): 1 / 0\nbatches.request = request"
    with FakeLambda([invoke_event(do=bug), *events(100), hangs]) as api:
        status, _, stderr = run_to_end(obedient_batching, api, COLLECTOR_URL=NOWHERE)
        (report,) = api.requests_for("exit/error")
    assert report.json["errorType"] == "Extension.ZeroDivisionError"
    assert status == 1
    assert "in request" in stderr
    assert stderr.count("Traceback") == 1


def test_the_token_goes_into_a_header_and_white_space_around_settings_is_ignored(batching):
    with Collector(answer(500), answer()) as collector:
        settings = {"COLLECTOR_TOKEN": f"{TOKEN}\n"}
        run_batching(batching, f" {collector.url}\n", events(150), **settings)
    assert {each.headers["Authorization"] for each in collector.requests} == {f"Bearer {TOKEN}"}
    urls = {f"http://{collector.address}{each.path}" for each in collector.requests}
    assert urls == {collector.url}


def test_records_beyond_a_megabyte_are_dropped_the_oldest_first_and_counted_exactly(batching):
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


def test_a_record_larger_than_the_buffer_is_dropped_alone(batching):
    with Collector(answer()) as collector:
        large = invoke_event("large", more=1_000_000 * "x")
        log = run_batching(batching, collector.url, [*events(10), large, *events(10, 20)])
    assert ids(collector.records) == ids_sent(20)
    assert counted(log, "dropped") == 1


def test_a_record_that_is_longer_than_a_request_may_be_gets_one_of_its_own(batching):
    long = invoke_event("long", more=600_000 * "x")
    with Collector(answer()) as collector:
        run_batching(batching, collector.url, [*events(10), long, *events(10, 20)])
    assert len(ids(collector.records)) == 22
    (alone,) = [request for request in collector.requests if b'"long"' in request.body]
    assert len(alone.json) == 1


def test_many_small_records_count_with_the_memory_that_they_take(obedient_batching):
    """A string of one character takes about 50 bytes."""
    many = invoke_event(do="batches.add_texts(['1'] * 100_000)")
    with Collector(answer(503)) as collector:
        log = run_batching(obedient_batching, collector.url, [many, many])
    assert counted(log, "dropped") > 150_000


def test_a_request_is_neither_too_long_nor_too_large(batching):
    """When the collector recovers, 1,500 short records and a long one are waiting."""
    with Collector(answer(503)) as collector:

        def recover(connection):
            collector.answers[""] = [answer()]
            connection.sendall(invoke_event("large", more=400_000 * "x"))

        run_batching(batching, collector.url, [*events(1500), recover])
    lengths = [len(request.json) for request in collector.requests]
    assert next(length for length in lengths if length > 100) == 1000
    assert max(len(request.body) for request in collector.requests) < 510_000


@pytest.mark.parametrize("address", ["http://[", "http://a..b", "https://:80"])
def test_an_unusable_url_does_not_end_the_extension(address, batching):
    """It looks like a URL, so start() accepts it, but no request can be made."""
    log = run_batching(batching, f"{address}/{TOKEN}", events(50))
    assert counted(log, "not confirmed before the end") == 51


@pytest.mark.parametrize(
    "environment", [{}, {"COLLECTOR_URL": ""}, {"COLLECTOR_URL": f"collector/{TOKEN}"}]
)
def test_a_missing_url_is_an_error_of_one_line_at_the_start(environment, batching):
    with FakeLambda() as api:
        status, _, stderr = run_to_end(batching, api, **environment)
        assert status == 1
        assert stderr == f"[{NAME}] COLLECTOR_URL must be an http:// or https:// URL\n"
        assert not api.requests_for("event/next")


def test_connections_that_hang_do_not_stop_it_after_a_freeze(batching_with):
    """Three requests hang, each for a minute by the wall clock; the fourth is answered."""
    frozen = batching_with(OBEDIENT, TIMEOUT_SECONDS=30)
    minute_later = invoke_event(do="move_clock(60)")
    answers = [hangs, hangs, hangs, answer()]
    with Collector(*answers) as collector, FakeLambda([*[minute_later] * 5, hangs]) as api:
        with started(frozen, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.requests_for("event/next")) == 6)
            wait_until(lambda: len(collector.requests) >= 4)
            assert len(collector.requests[3].json) >= 4


def test_a_clock_that_is_set_back_delays_neither_records_nor_invocations(batching_with):
    """The clock is set back by an hour, in the second invocation, while the collector hangs."""
    set_back = batching_with(OBEDIENT, BATCH_RECORDS=1, BATCH_SECONDS=1000)
    answers = [invoke_event("0"), invoke_event("1", do="move_clock(-3600)"), hangs]
    with Collector(hangs, answer()) as collector, FakeLambda(answers) as api:
        with started(set_back, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.requests_for("event/next")) == 3)
            wait_until(lambda: len(collector.requests) == 2)
    assert ids(collector.requests[1].json) == ["0", "1"]


def test_a_collector_that_does_not_answer_within_five_seconds_is_asked_again(batching_with):
    """No further event comes. The five seconds pass within one: see SHORT_LIMITS."""
    batching = batching_with(SHORT_LIMITS + README, BATCH_SECONDS=0.1)
    times = []
    with Collector(hangs, timed(times, answer)) as collector:
        with FakeLambda([timed(times, invoke_event), hangs]) as api:
            with started(batching, api, COLLECTOR_URL=collector.url) as it:
                wait_until(lambda: len(times) == 2)
                assert f"[{NAME}] Records not sent yet: 1 (ReadTimeout)\n" in it.out
    assert 1 < times[1] - times[0] < 10


def test_the_number_of_hanging_senders_is_limited(batching_with):
    """A minute passes before each event. Two replaced senders may hang beside the current one."""
    settings = {"MAX_HANGING_SENDERS": 2, "PATIENCE_SECONDS": 0, "TIMEOUT_SECONDS": 30}
    many = batching_with(OBEDIENT, **settings)

    def event_after(requests):
        """Sends an event when the collector has got so many requests."""

        def give(connection):
            wait_until(lambda: len(collector.requests) == requests)
            connection.sendall(invoke_event(do="move_clock(60)"))

        return give

    answers = [*map(event_after, [0, 1, 2, 3, 3, 3, 3]), hangs]
    with Collector(hangs) as collector, FakeLambda(answers) as api:
        with started(many, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.requests_for("event/next")) == len(answers))
            time.sleep(0.5)  # in which another sender would have made its request
            assert len(collector.requests) == 3


def test_after_a_failure_in_a_long_invocation_the_sender_waits_before_it_tries_again(batching_with):
    batching = batching_with(README, BATCH_RECORDS=1, BATCH_SECONDS=0.5)
    times = []
    with Collector(timed(times, lambda: answer(500))) as collector:
        with FakeLambda([invoke_event(), hangs]) as api:
            with started(batching, api, COLLECTOR_URL=collector.url):
                wait_until(lambda: len(times) >= 4)
    assert min(later - earlier for earlier, later in pairwise(times[:4])) > 0.4


def test_an_answer_to_a_sender_that_has_been_replaced_changes_nothing(batching_with):
    """The first batch is answered only after a freeze, when the next one is on its way."""
    batching = batching_with(OBEDIENT, BATCH_RECORDS=1, TIMEOUT_SECONDS=30)
    answered = []

    def late(connection):
        wait_until(lambda: len(collector.requests) == 2)
        connection.sendall(answer())
        answered.append(True)

    def later(connection):
        wait_until(lambda: answered)
        time.sleep(0.3)  # in which the first sender gets its answer
        connection.sendall(answer())

    frozen = [invoke_event("0"), invoke_event("1", do="move_clock(60)")]
    with Collector(late, later, answer()) as collector:
        run_batching(batching, collector.url, frozen)
    arrived = [record.get("requestId") for record in collector.records]
    assert arrived == ["0", "0", "1", None]


def test_if_no_thread_can_be_started_the_sender_stays(batching_with):
    """It sends everything in the end, SHUTDOWN included, after its own time limit."""
    settings = {"BATCH_RECORDS": 1, "PATIENCE_SECONDS": 0, "TIMEOUT_SECONDS": 1}
    lonely = batching_with(OBEDIENT, **settings)
    no_thread = "def fail(*_): raise RuntimeError\nimport threading; threading.Thread.start = fail"

    def shutdown(connection):
        wait_until(lambda: f"[{NAME}] Records not sent yet: 1 (ReadTimeout)\n" in it.out)
        connection.sendall(SHUTDOWN)

    answers = [invoke_event("0"), invoke_event("1", do=f"{no_thread}\nmove_clock(60)"), shutdown]
    with Collector(hangs, answer()) as collector, FakeLambda(answers) as api:
        with started(lonely, api, COLLECTOR_URL=collector.url) as it:
            assert it.wait(60) == 0
            assert it.err == ""
    arrived = ids(record for request in collector.requests[1:] for record in request.json)
    assert arrived == ["0", "1", None]


def test_a_collector_that_hangs_holds_an_invocation_for_a_second(batching):
    """The hundredth record makes a batch, for which process() waits."""

    def seconds():
        times = []
        answers = [*events(99), timed(times, invoke_event), timed(times)]
        with Collector(hangs) as collector, FakeLambda(answers) as api:
            with started(batching, api, COLLECTOR_URL=collector.url):
                wait_until(lambda: len(times) == 2)
        return times[1] - times[0]

    assert 0.9 < fastest(seconds, 2) < 2


def test_in_its_last_half_second_an_invocation_waits_for_no_collector(batching_with):
    """Of eight invocations the shortest counts, because a busy machine can only prolong them."""
    patient = batching_with(README, BATCH_RECORDS=1, PATIENCE_SECONDS=60)
    times = []
    hurried = timed(times, lambda: invoke_event(seconds=0.7))
    with Collector(hangs) as collector:
        with FakeLambda([*[hurried] * 8, timed(times)]) as api:
            with started(patient, api, COLLECTOR_URL=collector.url):
                wait_until(lambda: len(times) == 9)
    assert 0.19 < min(end - begin for begin, end in pairwise(times)) < 0.4


def test_with_a_hanging_collector_it_still_ends_within_two_seconds(batching):
    """Lambda allows no more after SHUTDOWN."""

    def seconds():
        times = []
        answers = [invoke_event(), timed(times, lambda: SHUTDOWN)]
        with Collector(hangs) as collector, FakeLambda(answers) as api:
            status, stdout, _ = run_to_end(batching, api, COLLECTOR_URL=collector.url)
            times.append(time.monotonic())
        assert status == 0
        assert counted(stdout, "not confirmed before the end") == 2
        return times[1] - times[0]

    assert 1.1 < fastest(seconds, 2) < 2
