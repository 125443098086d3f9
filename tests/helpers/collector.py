"""A collector of batches on loopback that does what the test wants."""

import gzip
import time

from extensions_api_server import ExtensionsApiServer, answer, hangs, reset

TOKEN = "secret"


class Collector(ExtensionsApiServer):
    """Answers one batch after the other; the last answer repeats.

    It keeps what it was sent, whatever it answered.
    """

    def __init__(self, *answers):
        super().__init__()
        self.answers = {"": list(answers)}
        self.url = f"http://{self.address}/records?token={TOKEN}"

    @property
    def records(self):
        return [record for request in self.requests for record in request.json]


def slow(connection):
    """Answers after the time that process() waits."""
    time.sleep(1.3)
    connection.sendall(answer())


def deaf(connection):
    """Answers this request, and no other one on the same connection, as after a freeze."""
    connection.sendall(answer())
    time.sleep(60)


def drips(start):
    """Gives an answer with that start (bytes) and no end, a byte from time to time."""

    def drip(connection):
        connection.sendall(start)
        while True:
            time.sleep(0.2)
            connection.sendall(b"x")

    return drip


# Some hundred kilobytes that are 200 megabytes for those who read them.
BOMB = {
    "body": gzip.compress(bytes(2_000_000)) * 100,
    "Content_Encoding": "gzip",
    "Location": "/elsewhere",
}
# What a collector does with a batch that it has taken.
SUCCESSES = {
    "works": answer(),
    "accepts": answer(202),
    "is slow": slow,
    "answers once on a connection": deaf,
    "drips the body of its answer": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
    "answers with a bomb": answer(200, **BOMB),
}
# What it does with others, and the reason in the log.
FAILURES = {
    **{f"answers {status}": (answer(status), f"status {status}") for status in (408, 429, 500)},
    "redirects": (answer(302, Location="/elsewhere"), "status 302"),
    "redirects to half an address": (answer(302, Location="http://["), "status 302"),
    "redirects with a bomb": (answer(302, **BOMB), "status 302"),
    "resets": (reset, "ConnectionError"),
    "closes": (None, "ConnectionError"),
    "speaks no HTTP": (b"What?\r\n\r\n", "ConnectionError"),
    "hangs": (hangs, "no answer"),
    "drips": (drips(b"HTTP/1.1 200 OK\r\nX: "), "no answer"),
}
