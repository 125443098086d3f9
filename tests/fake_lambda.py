"""Lambda's APIs on loopback, scripted: for the tests, and for the benchmark.

An answer is bytes, sent as they are, or a function that gets the connection (a socket) and does
what it likes with it. An answer of None, or a function that raises OSError, ends the connection.
"""

import contextlib
import http.client
import io
import itertools
import json
import socket
import socketserver
import struct
import threading
import time
import typing

IDENTIFIER = "11111111-2222-3333-4444-555555555555"  # that the extension gets
IN_THE_YEAR_2100 = 4_102_444_800_000  # as a deadline, in milliseconds: never


def answer(status=200, body: object = b"", **headers):
    """An HTTP answer as bytes. The body is bytes, or anything else that JSON can hold."""
    if not isinstance(body, bytes):
        body, headers = json.dumps(body).encode(), {"Content_Type": "application/json"} | headers
    headers = {"Content_Length": len(body)} | headers
    lines = [
        f"HTTP/1.1 {status} Status",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def invoke_event(request_id="request-1", seconds=3600, **more):
    """The answer that brings the event of an invocation, which must end so many seconds later.

    The event has these further keys, such as "do" for a scripted extension.
    """
    deadline = int((time.time() + seconds) * 1000)
    event = {"eventType": "INVOKE", "requestId": request_id, "deadlineMs": deadline}
    return answer(body=event | more)


def resets(connection):
    """Ends the connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionResetError


def hangs(connection):
    """Gives no answer."""


# Answers that are always the same.
REGISTERED = answer(body={"functionName": "f"}, Lambda_Extension_Identifier=IDENTIFIER)
ACCEPTED = answer(202)
SHUTDOWN = answer(
    body={"eventType": "SHUTDOWN", "shutdownReason": "spindown", "deadlineMs": IN_THE_YEAR_2100}
)


class Request(typing.NamedTuple):
    """A request that a server got."""

    time: float  # of its arrival, by time.monotonic()
    method: str
    path: str
    head: bytes  # the header fields
    body: bytes

    @property
    def headers(self):
        """The header fields, by their names, in any case."""
        return http.client.parse_headers(io.BytesIO(self.head))

    @property
    def json(self):
        """The body, from JSON; None if there is none."""
        return json.loads(self.body or "null")


class _Connection(socketserver.StreamRequestHandler):
    """Reads the requests of one TCP connection, with little work, and sends the answers."""

    disable_nagle_algorithm = True

    def handle(self):
        server = self.server
        assert isinstance(server, ScriptedServer)
        server.connections += 1
        with contextlib.suppress(OSError):
            while request_line := self.rfile.readline():
                request = self._read_request(request_line)
                server.requests.append(request)
                reply = server.answer_to(request)
                if reply is None:
                    return
                if callable(reply):
                    reply(self.connection)
                else:
                    self.connection.sendall(reply)

    def _read_request(self, request_line):
        arrival = time.monotonic()
        method, path, _ = request_line.decode().split()
        head, content_length = b"", 0
        while (field := self.rfile.readline()) not in (b"\r\n", b""):
            head += field
            name, _, value = field.partition(b":")
            if name.lower() == b"content-length":
                content_length = int(value)
        return Request(arrival, method, path, head, self.rfile.read(content_length))


class ScriptedServer(socketserver.ThreadingTCPServer):
    """An HTTP server that answers each request with the next of the answers for its path.

    `answers` has these, {end of the path: [answer]}. The last answer of a list repeats. The server
    keeps the requests, and counts the connections.
    """

    daemon_threads = True
    request_queue_size = 128
    # After a reset there is nothing to shut down.
    shutdown_request = socketserver.TCPServer.close_request

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.answers = answers
        self.requests: list[Request] = []
        self.connections = 0
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def answer_to(self, request):
        """The next answer for the path of a request."""
        for end, answers in self.answers.items():
            if request.path.endswith(end):
                return answers.pop(0) if len(answers) > 1 else answers[0]
        raise LookupError(f"no answer for {request.path}")


class FakeLambda(ScriptedServer):
    """Lambda's Extensions API.

    It answers requests for events with `events`, registrations with `register`, and reports of
    errors with `report`.
    """

    def __init__(self, events=(), register=(REGISTERED,), report=ACCEPTED):
        super().__init__(
            {
                "/extension/register": [*register],
                "/extension/event/next": [*events] or [hangs],
                "/error": [report],
            }
        )

    def requests_for(self, path):
        """The requests for a path of the Extensions API, such as "register"."""
        return [request for request in self.requests if request.path.endswith("/extension/" + path)]

    @property
    def durations(self):
        """How long the extension took for each event but the last, if it got them at once."""
        times = [request.time for request in self.requests_for("event/next")]
        return [later - earlier for earlier, later in itertools.pairwise(times)]
