"""A Lambda Extensions API on loopback, scripted by the test.

An answer is bytes, sent as they are, or a function that gets the connection (a socket) and does what it likes with it.
A connection is closed after an answer of None.
"""

import json
import socket
import struct
import threading

IDENTIFIER = "11111111-2222-3333-4444-555555555555"


def answer(status=200, body=b"", **headers):
    """An HTTP answer as bytes. The body is bytes, or anything else that JSON can hold."""
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def error(status, error_type, message="as the test wants it"):
    return answer(status, {"errorType": error_type, "errorMessage": message})


def invoke(request_id="request-1", **more):
    return answer(body={"eventType": "INVOKE", "requestId": request_id, "deadlineMs": 1, **more})


def reset(connection):
    """Ends the connection with a TCP reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


REGISTERED = answer(body={"functionName": "f"}, Lambda_Extension_Identifier=IDENTIFIER)
REPORTED = answer(202)
SHUTDOWN = answer(body={"eventType": "SHUTDOWN", "shutdownReason": "spindown", "deadlineMs": 1})


class Request:
    """What the extension asked: method, path, headers (names in lower case) and body (bytes)."""

    def __init__(self, head, body):
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.path, _ = first.split(" ")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.body = body

    @property
    def json(self):
        return json.loads(self.body)


class ExtensionsApiServer:
    """Answers registrations with `register`, one after the other, requests for events with `events`, reports with 202.

    The last answer of each repeats. A request without an answer waits forever.
    """

    def __init__(self, events=(), register=(REGISTERED,), report=REPORTED):
        self.answers = {"register": list(register), "event/next": list(events), "error": [report]}
        self.requests = []
        self.connections = 0
        self._open = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.close()
        for connection in self._open:
            connection.close()

    def asked(self, path):
        """The requests for a path, such as "register"."""
        return [request for request in self.requests if request.path.endswith("/extension/" + path)]

    def _accept(self):
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = b""
        try:
            while True:
                while b"\r\n\r\n" not in data:
                    if not (more := connection.recv(65536)):
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                request = Request(head, b"")
                while len(data) < int(request.headers.get("content-length", 0)):
                    data += connection.recv(65536)
                request.body, data = data, b""
                self.requests.append(request)
                answers = next(answers for end, answers in self.answers.items() if request.path.endswith(end))
                if not answers:
                    continue
                now = answers.pop(0) if len(answers) > 1 else answers[0]
                if callable(now):
                    now(connection)
                elif now is None:
                    connection.close()
                else:
                    connection.sendall(now)
        except OSError:
            pass
        finally:
            connection.close()
