"""batches.py in the README's extension.py, with collectors that work and collectors that fail."""

import re
import time
from itertools import pairwise
from pathlib import Path

import pytest
from batching import NOWHERE, SHORT_LIMITS, counted, extension_with, timed
from collector import FAILURES, SUCCESSES, TOKEN, Collector, refuses
from extension_process import run_to_end, started
from fake_lambda import SHUTDOWN, FakeLambda, answer, hangs, invoke_event
from machine import PROGRAMS, fastest, wait_until
from pages import code_blocks
from sample import NAME

README, _ = code_blocks("README.md", "Make it your own", "python")
OBEDIENT = (PROGRAMS / "batching_extension.py").read_text()


@pytest.fixture
def batching(extension, tmp_path):
    """The README's extension.py, with batches.py next to it."""
    return extension_with(extension, tmp_path, README)


@pytest.fixture
def small(extension, tmp_path):
    """The same, but ten records are a batch."""
    return extension_with(extension, tmp_path, README, "BATCH_RECORDS = 10")


@pytest.fixture
def obedient(extension, tmp_path):
    """The same, but it first does what the event says."""
    return extension_with(extension, tmp_path, OBEDIENT)


def events(*numbers, **more):
    return [invoke_event(str(number), **more) for number in range(*numbers)]


def send(extension, url, events, **environment):
    """Runs it with these events and a shutdown, and returns what it logged.

    It must end with 0, take little memory, and show neither an error nor the token.
    """
    peaks = []

    def shutdown(connection):
        peaks.extend(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{it.pid}/status").read_text()))
        connection.sendall(SHUTDOWN)

    with (
        FakeLambda([*events, shutdown]) as api,
        started(extension, api, COLLECTOR_URL=url, **environment) as it,
    ):
        assert (it.wait(60), it.err, TOKEN in it.out) == (0, "", False)
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
    sent = [invoke_event(str(number), more="bad" * (number % 50 == 7)) for number in range(150)]
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
    sent = [invoke_event(str(number), more="bad" * (number == 7)) for number in range(20)]
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


def test_a_record_that_json_cannot_hold_is_a_bug_where_it_is_added(obedient):
    with FakeLambda([invoke_event(do="event['value'] = float('nan')")]) as api:
        status, _, stderr = run_to_end(obedient, api, COLLECTOR_URL=NOWHERE)
    assert (status, "in process" in stderr, "ValueError" in stderr) == (1, True, True)


def test_a_bug_in_request_shows_its_traceback_and_ends_the_extension(obedient):
    bug = "def request(texts): 1 / 0\nbatches.request = request"
    with FakeLambda([invoke_event(do=bug), *events(100), hangs]) as api:
        status, _, stderr = run_to_end(obedient, api, COLLECTOR_URL=NOWHERE)
        (report,) = api.requests_for("exit/error")
    assert report.json["errorType"] == "Extension.ZeroDivisionError"
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
            connection.sendall(invoke_event("1000"))

        log = send(batching, collector.url, [*events(1000, more=10_000 * "x"), recover])
    arrived = ids(record for request in collector.requests[1:] for record in request.json)
    assert arrived == ids_of(1001 - len(arrived) + 1, 1001)
    assert 90 < len(arrived) < 110
    assert counted(log, "dropped") == 1002 - len(arrived)


def test_a_record_larger_than_the_buffer_is_dropped_alone(batching):
    with Collector(answer()) as collector:
        large = invoke_event("large", more=1_000_000 * "x")
        log = send(batching, collector.url, [*events(10), large, *events(10, 20)])
    assert ids(collector.records) == ids_of(20)
    assert counted(log, "dropped") == 1


def test_many_small_records_count_with_the_memory_that_they_take(obedient):
    """A string of one character takes about 50 bytes."""
    many = invoke_event(do="batches.add_texts(['1'] * 100_000)")
    with Collector(answer(503)) as collector:
        log = send(obedient, collector.url, [many, many])
    assert counted(log, "dropped") > 150_000


def test_a_request_is_neither_too_long_nor_too_large(batching):
    with Collector(answer(503)) as collector:

        def recover(connection):
            collector.answers[""] = [answer()]
            connection.sendall(invoke_event("large", more=400_000 * "x"))

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
        status, _, stderr = run_to_end(batching, api, **environment)
        assert status == 1
        assert stderr == f"[{NAME}] COLLECTOR_URL must be an http:// or https:// URL\n"
        assert not api.requests_for("event/next")


def passes(seconds):
    """Code that sets the wall clock forward. The monotonic clock, and with it all time limits of
    connections, does not notice. It is the same after a freeze.
    """
    return f"before = time.time; time.time = lambda before=before: before() + {seconds}"


def test_connections_that_hang_do_not_stop_it_after_a_freeze(extension, tmp_path):
    frozen = extension_with(extension, tmp_path, OBEDIENT, "TIMEOUT_SECONDS = 30")
    minute_later = invoke_event(do=passes(60))
    answers = [hangs, hangs, hangs, answer()]
    with Collector(*answers) as collector, FakeLambda([*[minute_later] * 5, hangs]) as api:
        with started(frozen, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.requests_for("event/next")) == 6)
            wait_until(lambda: len(collector.requests) >= 4)
            assert len(collector.requests[3].json) >= 4


def test_a_clock_that_is_set_back_holds_back_neither_records_nor_an_invocation(extension, tmp_path):
    """The clock is set back by an hour, in the second invocation, while the collector hangs."""
    settings = "BATCH_RECORDS = 1; BATCH_SECONDS = 1000"
    set_back = extension_with(extension, tmp_path, OBEDIENT, settings)
    sent = [invoke_event("0"), invoke_event("1", do=passes(-3600)), hangs]
    with Collector(hangs, answer()) as collector, FakeLambda(sent) as api:
        with started(set_back, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.requests_for("event/next")) == 3)
            wait_until(lambda: len(collector.requests) == 2)
    assert ids(collector.requests[1].json) == ["0", "1"]


def test_a_collector_that_does_not_answer_within_five_seconds_is_asked_again(extension, tmp_path):
    """It is so without a further event. Here the five seconds pass within one."""
    code = SHORT_LIMITS + README
    batching = extension_with(extension, tmp_path, code, "BATCH_SECONDS = 0.1")
    times = []
    with Collector(hangs, timed(times, answer)) as collector:
        with FakeLambda([timed(times, invoke_event), hangs]) as api:
            with started(batching, api, COLLECTOR_URL=collector.url) as it:
                wait_until(lambda: len(times) == 2)
                assert f"[{NAME}] Records not sent yet: 1 (ReadTimeout)\n" in it.out
    assert 1 < times[1] - times[0] < 10


def test_the_number_of_hanging_senders_is_limited(extension, tmp_path):
    """A minute passes before each invocation, and the collector has got all requests so far."""
    settings = "MAX_HANGING_SENDERS = 2; PATIENCE_SECONDS = 0; TIMEOUT_SECONDS = 30"
    many = extension_with(extension, tmp_path, OBEDIENT, settings)

    def after(requests):
        def give(connection):
            wait_until(lambda: len(collector.requests) == requests)
            connection.sendall(invoke_event(do=passes(60)))

        return give

    asks = [*map(after, [0, 1, 2, 3, 3, 3, 3]), hangs]
    with Collector(hangs) as collector, FakeLambda([*asks]) as api:
        with started(many, api, COLLECTOR_URL=collector.url):
            wait_until(lambda: len(api.requests_for("event/next")) == len(asks))
            time.sleep(0.5)  # in which another sender would have made its request
            assert len(collector.requests) == 3


def test_if_no_thread_can_be_started_the_sender_stays(extension, tmp_path):
    no_thread = "def fail(*_): raise RuntimeError\nimport threading; threading.Thread.start = fail"
    lonely = extension_with(extension, tmp_path, OBEDIENT, "TIMEOUT_SECONDS = 0.3")
    with Collector(hangs, answer()) as collector:
        log = send(lonely, collector.url, [invoke_event(do=no_thread), *events(300)])
    assert "Traceback" not in log
    assert ids(collector.requests[-1].json)[-1] is None


def test_a_collector_that_hangs_holds_an_invocation_for_a_second(batching):
    def seconds():
        times = []
        asks = [*events(99), timed(times, invoke_event), timed(times)]
        with Collector(hangs) as collector, FakeLambda(asks) as api:
            with started(batching, api, COLLECTOR_URL=collector.url):
                wait_until(lambda: len(times) == 2)
        return times[1] - times[0]

    assert 0.9 < fastest(seconds, 2) < 2


def test_half_a_second_before_its_deadline_no_invocation_waits_for_a_collector_that_hangs(
    extension, tmp_path
):
    """Of eight invocations the shortest counts, because a busy machine can only prolong them."""
    settings = "BATCH_RECORDS = 1; PATIENCE_SECONDS = 60"
    patient = extension_with(extension, tmp_path, README, settings)
    times = []
    hurried = timed(times, lambda: invoke_event(seconds=0.7))
    with Collector(hangs) as collector:
        with FakeLambda([*[hurried] * 8, timed(times)]) as api:
            with started(patient, api, COLLECTOR_URL=collector.url):
                wait_until(lambda: len(times) == 9)
    assert 0.19 < min(end - begin for begin, end in pairwise(times)) < 0.4


def test_with_a_collector_that_hangs_it_ends_within_the_two_seconds_that_lambda_allows(batching):
    def seconds():
        times = []
        asks = [invoke_event(), timed(times, lambda: SHUTDOWN)]
        with Collector(hangs) as collector, FakeLambda(asks) as api:
            status, stdout, _ = run_to_end(batching, api, COLLECTOR_URL=collector.url)
            times.append(time.monotonic())
        assert (status, counted(stdout, "not confirmed before the end")) == (0, 2)
        return times[1] - times[0]

    assert 1.1 < fastest(seconds, 2) < 2
