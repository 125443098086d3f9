"""A collector of batches on loopback that does what the test wants."""

import gzip
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
BOMB = {"body": gzip.compress(bytes(2_000_000)) * 100, "Content_Encoding": "gzip"}
# What a collector does with a batch that it has taken.
SUCCESSES = {
    "works": answer(202),
    "is slow": answers_after(1.3),  # longer than process() waits
    "answers once on a connection": answers_once,
    "drips the body of its answer": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
    "answers with a bomb": answer(200, **BOMB),
}
# What it does with a batch that it has not taken, and the reason that the log then gives.
FAILURES = {
    "knows no such token": (answer(401), "status 401"),
    "is overloaded": (answer(503), "status 503"),
    "redirects with a bomb": (answer(302, Location="http://[", **BOMB), "status 302"),
    "resets": (resets, "ConnectionError"),
    "closes": (None, "ConnectionError"),
    "speaks no HTTP": (b"What?\r\n\r\n", "ConnectionError"),
    "hangs": (hangs, "no response"),
    "drips": (drips(b"HTTP/1.1 200 OK\r\nX: "), "no response"),
}
