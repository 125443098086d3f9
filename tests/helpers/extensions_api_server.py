"""A Lambda Extensions API on loopback, scripted by the test.

An answer is bytes, sent as they are, or a function that gets the connection (a socket) and does
what it likes with it. An answer of None, or a function that raises OSError, ends the connection.
"""

import contextlib
import http.client
import json
import socket
import socketserver
import struct
import threading
import time
import typing

IDENTIFIER = "11111111-2222-3333-4444-555555555555"


def answer(status=200, body=b"", **headers):
    """An HTTP answer as bytes. The body is bytes, or anything else that JSON can hold."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    headers = {"Content_Length": len(body)} | headers
    lines = [
        f"HTTP/1.1 {status} Status",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def invoke(request_id="request-1", seconds=3600, **more):
    """An invocation that must end so many seconds later."""
    deadline = int((time.time() + seconds) * 1000)
    event = {"eventType": "INVOKE", "requestId": request_id, "deadlineMs": deadline}
    return answer(body=event | more)


def reset(connection):
    """Ends the connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise ConnectionResetError


def hangs(connection):
    """Gives no answer."""


REGISTERED = answer(body={"functionName": "f"}, Lambda_Extension_Identifier=IDENTIFIER)
REPORTED = answer(202)
IN_THE_YEAR_2100 = 4_102_444_800_000
SHUTDOWN = answer(
    body={"eventType": "SHUTDOWN", "shutdownReason": "spindown", "deadlineMs": IN_THE_YEAR_2100}
)


class Request(typing.NamedTuple):
    """A request that a server got."""

    method: str
    path: str
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self):
        """The body, from JSON; None if there is none."""
        return json.loads(self.body or "null")


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True

    def handle(self):
        server, self.server.connections = self.server, self.server.connections + 1
        with contextlib.suppress(OSError):
            while request_line := self.rfile.readline():
                method, path, _ = request_line.decode().split()
                headers = http.client.parse_headers(self.rfile)
                body = self.rfile.read(int(headers.get("Content-Length", 0)))
                request = Request(method, path, headers, body)
                server.requests.append(request)
                answer = server.answer_to(request)
                if answer is None:
                    return
                if callable(answer):
                    answer(self.connection)
                else:
                    self.connection.sendall(answer)


class ExtensionsApiServer(socketserver.ThreadingTCPServer):
    """Answers each request with the next of the answers for its kind.

    These are `register` for registrations, `events` for requests for events, and `report` for
    reports. The last answer of each kind repeats. The server keeps the requests.
    """

    daemon_threads = True
    # After a reset there is nothing to shut down.
    shutdown_request = socketserver.TCPServer.close_request

    def __init__(self, events=(), register=(REGISTERED,), report=REPORTED):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.answers = {
            "register": [*register],
            "event/next": [*events] or [hangs],
            "error": [report],
        }
        self.requests, self.connections = [], 0
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def answer_to(self, request):
        """The answer to a request."""
        answers = next(each for end, each in self.answers.items() if request.path.endswith(end))
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def asked(self, path):
        """The requests for a path, such as "register"."""
        return [request for request in self.requests if request.path.endswith("/extension/" + path)]
