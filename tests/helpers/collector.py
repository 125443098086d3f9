"""A collector of batches on loopback that does what the test wants."""

import datetime
import gzip
import json
import re
import time

from fake_lambda import ScriptedServer, answer, hangs, resets

TOKEN = "secret"


class Collector(ScriptedServer):
    """Answers one batch after the other; the last answer repeats.

    A judge is a function that gets the request and returns the answer instead. The collector
    keeps what it was sent, whatever it answered.
    """

    def __init__(self, *answers, judge=None):
        super().__init__({"": [*answers]})
        self.judge = judge
        self.url = f"http://{self.address}/records?token={TOKEN}"

    def answer_to(self, request):
        return self.judge(request) if self.judge else super().answer_to(request)

    @property
    def records(self):
        return [record for request in self.requests for record in request.json]


def refuses(word, status=400):
    """A judge that refuses each request in which a record contains that word."""
    return lambda request: answer(status if word.encode() in request.body else 200)


def answers_after(seconds):
    """Answers 200 after that many seconds."""

    def wait(connection):
        time.sleep(seconds)
        connection.sendall(answer())

    return wait


def answers_once(connection):
    """Answers this request, but no further one on the same connection, as after a freeze."""
    connection.sendall(answer())
    time.sleep(60)


def drips(start):
    """Sends an answer that starts with these bytes and never ends, a byte from time to time."""

    def drip(connection):
        connection.sendall(start)
        while True:
            time.sleep(0.2)
            connection.sendall(b"x")

    return drip


# A few hundred kilobytes, which become 200 megabytes when they are unpacked.
BOMB = {
    "body": gzip.compress(bytes(2_000_000)) * 100,
    "Content_Encoding": "gzip",
    "Location": "/elsewhere",
}
# What a collector does with a batch that it has taken.
SUCCESSES = {
    "works": answer(),
    "accepts": answer(202),
    "is slow": answers_after(1.3),  # longer than process() waits
    "answers once on a connection": answers_once,
    "drips the body of its answer": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
    "answers with a bomb": answer(200, **BOMB),
}
# What it does with a batch that it has not taken, and the reason that the log then gives.
FAILURES = {
    **{
        f"answers {status}": (answer(status), f"status {status}")
        for status in (401, 403, 404, 408, 429, 500)
    },
    "redirects": (answer(302, Location="/elsewhere"), "status 302"),
    "redirects to half an address": (answer(302, Location="http://["), "status 302"),
    "redirects with a bomb": (answer(302, **BOMB), "status 302"),
    "resets": (resets, "ConnectionError"),
    "closes": (None, "ConnectionError"),
    "speaks no HTTP": (b"What?\r\n\r\n", "ConnectionError"),
    "hangs": (hangs, ""),
    "drips": (drips(b"HTTP/1.1 200 OK\r\nX: "), ""),
}


def as_loki(request):
    """Answers as Grafana Loki does, so far as the shape of a request is concerned.

    https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs
    """
    if request.headers["Authorization"] != f"Bearer {TOKEN}":
        return answer(401)
    if request.headers["Content-Encoding"] != "gzip":
        return answer(400)
    for stream in json.loads(gzip.decompress(request.body))["streams"]:
        if not stream["stream"] or not all(isinstance(it, str) for it in stream["stream"].values()):
            return answer(400)
        for nanoseconds, line in stream["values"]:
            if not re.fullmatch("[0-9]{19}", nanoseconds) or not isinstance(line, str):
                return answer(400)
    return answer(204)


def as_elasticsearch(request):
    """Answers as Elasticsearch's bulk API does, so far as the shape of a request is concerned.

    https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-bulk
    """
    if request.headers["Authorization"] != f"ApiKey {TOKEN}":
        return answer(401)
    if request.headers["Content-Type"] != "application/x-ndjson":
        return answer(406)
    *lines, end = request.body.split(b"\n")
    if end or len(lines) % 2:
        return answer(400)
    for action, document in zip(lines[::2], lines[1::2], strict=True):
        if json.loads(action) != {"create": {}}:
            return answer(400)
        # A data stream demands the action "create", and one type for each field.
        fields = json.loads(document)
        if not isinstance(fields["message"], str):
            return answer(400)
        datetime.datetime.fromisoformat(fields["@timestamp"].replace("Z", "+00:00"))
    return answer(200, {"errors": False})


def as_otlp(request):
    """Answers as an OpenTelemetry collector does, so far as the shape of a request is concerned.

    https://opentelemetry.io/docs/specs/otlp/#otlphttp-request
    """
    if request.headers["Content-Type"] != "application/json":
        return answer(415)
    for resource in request.json["resourceLogs"]:
        attributes = resource["resource"]["attributes"]
        if "service.name" not in [attribute["key"] for attribute in attributes]:
            return answer(400)
        for scope in resource["scopeLogs"]:
            for record in scope["logRecords"]:
                if not re.fullmatch("[0-9]{19}", record["timeUnixNano"]):
                    return answer(400)
                if not isinstance(record["body"]["stringValue"], str):
                    return answer(400)
    return answer(200, {})
