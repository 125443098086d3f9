"""examples/ship_logs/ with a Telemetry API and a collector of the tests, and under AWS's emulator."""

import json
import random
import re
import select
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from collector import Collector
from engine import first_base_image
from extension_process import end_of, started, variant
from extensions_api_server import IDENTIFIER, SHUTDOWN, ExtensionsApiServer, answer, hangs, invoke
from machine import ROOT, post, wait_until
from running import running
from sample import NAME, replace

FILES = list((ROOT / "examples" / "ship_logs").glob("*.py"))
NOWHERE = "http://127.0.0.1:1/"


@pytest.fixture
def shipping(extension, tmp_path):
    """The extension with the example's files over its own. Here it listens on loopback only."""
    files = {file.name: file.read_text().replace('("", 0)', '("127.0.0.1", 0)') for file in FILES}
    return variant(extension, tmp_path, files)


class TelemetryApi(ExtensionsApiServer):
    """Lambda, with a Telemetry API."""

    def __init__(self, events, subscribed=200):
        super().__init__(events)
        self.answers["/2022-07-01/telemetry"] = [answer(subscribed)]

    @property
    def subscription(self):
        (request,) = [request for request in self.requests if request.path == "/2022-07-01/telemetry"]
        assert (request.method, request.headers["Lambda-Extension-Identifier"]) == ("PUT", IDENTIFIER)
        return request.json

    def deliver(self, records):
        """Posts records to the extension."""
        address = self.subscription["destination"]["URI"].replace("sandbox.localdomain", "127.0.0.1")
        post(address, json.dumps(records).encode())


def records_of(number):
    """What Lambda delivers about an invocation."""
    kinds = "platform.start", "function", "platform.runtimeDone", "platform.report"
    return [{"time": f"at {number}", "type": kind, "record": {"requestId": str(number)}} for kind in kinds]


def test_every_record_of_a_thousand_invocations_arrives(shipping):
    chance, not_waited_for = random.Random(20), []

    def invocation(number):
        def deliver(connection):
            """Some of the records before the event, the others after it; every second time out of order."""
            records = chance.sample(records_of(number), 4) if number % 2 else records_of(number)
            before = chance.randrange(5)
            api.deliver(records[:before])
            connection.sendall(invoke(str(number)))
            if "platform.runtimeDone" in str(records[before:]) and select.select([connection], [], [], 0.002)[0]:
                not_waited_for.append(number)
            api.deliver(records[before:])

        return deliver

    def end(connection):
        connection.sendall(SHUTDOWN)
        api.deliver(records_of("the end"))

    with Collector(answer()) as collector, TelemetryApi([*map(invocation, range(1000)), end]) as api:
        assert end_of(shipping, api, COLLECTOR_URL=collector.url)[0] == 0
    delivered = [record for number in [*range(1000), "the end"] for record in records_of(number)]
    assert {*map(str, delivered)} <= {*map(str, collector.records)}
    assert not not_waited_for


def test_an_invocation_that_does_not_end_does_not_keep_it_from_the_next_event(shipping):
    limit, asked = time.time() + 4, []
    events = [invoke(seconds=4), lambda connection: asked.append(time.time())]
    with TelemetryApi(events) as api, started(shipping, api, COLLECTOR_URL=NOWHERE):
        wait_until(lambda: asked)
    assert asked[0] < limit


def test_managed_instances_need_no_invoke_event(shipping):
    replace(shipping.with_name("batches.py"), "SECONDS = 100, 10 ", "SECONDS = 100, 0.5 ")
    environment = {"AWS_LAMBDA_INITIALIZATION_TYPE": "lambda-managed-instances"}
    with Collector(answer()) as collector, TelemetryApi([hangs]) as api:
        with started(shipping, api, COLLECTOR_URL=collector.url, **environment):
            wait_until(lambda: api.asked("event/next"))
            api.deliver(records_of(1))
            wait_until(lambda: len(collector.records) == 4)
    assert [request.json for request in api.asked("register")] == [{"events": ["SHUTDOWN"]}]
    assert (api.subscription["schemaVersion"], api.subscription["types"]) == ("2025-01-29", ["platform", "function"])


def test_without_a_telemetry_api_it_says_so_and_goes_on(shipping):
    with Collector(answer()) as collector, TelemetryApi([invoke(), SHUTDOWN], 202) as api:
        code, stdout, stderr = end_of(shipping, api, COLLECTOR_URL=collector.url)
    assert (code, stderr, collector.requests) == (0, "", [])
    assert stdout.count("Ships no logs") == len(stdout.splitlines()) - 1 == 1


def test_managed_instances_of_the_emulator_run_four_invocations_at_the_same_time_and_deliver(misbehaving, engine):
    for file in FILES:
        shutil.copy(file, misbehaving / NAME)
    managed = {"AWS_LAMBDA_MAX_CONCURRENCY": "4", "BASE_IMAGE": first_base_image()}
    with running(misbehaving, "--docker", "-e", f"COLLECTOR_URL={NOWHERE}", **managed) as it:
        assert "-H 'Content-Type: application/json'" in it.output
        with ThreadPoolExecutor(4) as pool:

            def invoke(event):
                return it.invoke(event, **{"Content-Type": "application/json"})

            events = [{"sleep": 2}] * 4
            wait_until(lambda: list(pool.map(invoke, events)) == events, 60)  # the first ones meet unready workers
        assert it.stop()[0] == 0
        assert re.search(r" [1-9]\d* records not sent yet: ConnectionError", it.output)
