"""The README's "Make it your own": another name, by renaming files and one line of the Dockerfile, and other code."""

import http.server
import json
import re
import socket
import threading
import time

import pytest
from extensions_api_server import SHUTDOWN, ExtensionsApiServer, invoke
from helpers import HELLO, NAME, RECEIVED, free_port, rename, run, running, wait_until
from started_extension import end_of, replace_process, started
from test_docs import code_blocks

THEIRS = "my-extension"
(BATCHING,) = code_blocks("README.md", "Make it your own", "python")


def test_renamed_files_and_one_line_make_it_another_extension(way, copy):
    option, environment = way
    rename(copy, THEIRS)
    extension = copy / THEIRS / "extension.py"
    source = extension.read_text()
    assert source.count(RECEIVED) == 1
    extension.write_text(source.replace(RECEIVED, "My own code got"))

    with running(copy, option, script=f"{THEIRS}.sh", **environment) as started:
        assert json.loads(started.invoke()) == HELLO
        wait_until(lambda: f"[{THEIRS}] My own code got: " in started.output)
        assert f"[{THEIRS}] Registered with ID: " in started.output
        assert re.search(rf"External agent {THEIRS} \(\S+\) registered", started.output)
        assert NAME not in started.output
        if option == "--no-docker":
            assert "installing" in started.output  # nothing of the old name is used
        else:
            image = run("docker", "ps", "--filter", f"publish={started.port}", "--format", "{{.Image}}").stdout.strip()
            tags = json.loads(run("docker", "image", "inspect", "--format", "{{json .RepoTags}}", image).stdout)
            assert f"{THEIRS}:latest" in tags


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes batches of records, and answers them with the statuses that the test wants, 200 after the last."""

    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connections += 1

    def do_POST(self):
        batch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = next(self.server.statuses, 200)
        if status == 200:
            self.server.batches.append(batch)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def collector():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.batches, server.connections, server.statuses = [], 0, iter(())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def batching(extension, tmp_path):
    """The extension with the README's process(event), which sends batches."""
    return replace_process(extension, BATCHING.rstrip("\n"), tmp_path)


def events(count):
    return [*(invoke(str(number)) for number in range(count)), SHUTDOWN]


def ids(batches):
    """The request ids in these batches; None for SHUTDOWN."""
    return [record.get("requestId") for batch in batches for record in batch]


def send(batching, port, count):
    """Runs it for that many invocations and a shutdown; returns the numbers of records not sent, and the reasons."""
    with ExtensionsApiServer(events(count)) as api:
        url = {"COLLECTOR_URL": f"http://127.0.0.1:{port}/records"}
        status, stdout, stderr = end_of(batching, api, **url)
        assert (status, stderr, len(api.asked("event/next"))) == (0, "", count + 1)
    return re.findall(rf"^\[{NAME}\] (\d+) records not sent: (.*)$", stdout, re.MULTILINE)


def test_batches_lose_no_record_of_a_thousand_events_and_a_shutdown(batching, collector):
    assert send(batching, collector.server_port, 1000) == []
    assert ids(collector.batches) == [*map(str, range(1000)), None]
    assert [len(batch) for batch in collector.batches] == [100] * 10 + [1]
    assert collector.connections == 1


def test_a_small_batch_is_sent_after_ten_seconds(batching, collector):
    assert BATCHING.count(">= 10 ") == 1
    batching.write_text(batching.read_text().replace(">= 10 ", ">= 0.5 "))  # for the test to be short

    def later(connection):
        time.sleep(0.6)
        connection.sendall(invoke("1"))

    url = f"http://127.0.0.1:{collector.server_port}/records"
    with ExtensionsApiServer([later, lambda connection: None]) as api, started(batching, api, COLLECTOR_URL=url):
        wait_until(lambda: len(api.asked("event/next")) == 2)
        assert ids(collector.batches) == ["1"]


def test_a_batch_that_is_refused_goes_with_the_next_one(batching, collector):
    collector.statuses = iter([503])
    ((number, reason),) = send(batching, collector.server_port, 300)
    assert number == "100"
    assert reason.startswith("503 ")
    assert ids(collector.batches) == [*map(str, range(300)), None]
    assert [len(batch) for batch in collector.batches] == [200, 100, 1]


def test_a_batch_that_is_refused_twice_is_lost(batching, collector):
    collector.statuses = iter([500, 403])
    assert [number for number, _ in send(batching, collector.server_port, 300)] == ["100", "200"]
    assert ids(collector.batches) == [*map(str, range(100, 300)), None]


def test_an_unreachable_collector_does_not_end_the_extension(batching):
    numbers, reasons = zip(*send(batching, free_port(), 1000), strict=True)
    assert numbers == ("100", *["200"] * 9, "101")
    assert all("Connection refused" in reason for reason in reasons)


def test_a_collector_that_hangs_does_not_end_the_extension(batching):
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        numbers, reasons = zip(*send(batching, hanging.getsockname()[1], 200), strict=True)
    assert numbers == ("100", "200", "101")
    assert all("timed out" in reason for reason in reasons)
