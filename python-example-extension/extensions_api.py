"""A client for the Lambda Extensions API.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
"""

import contextlib
import json
import os
import re
import select

INVOKE, SHUTDOWN = "INVOKE", "SHUTDOWN"  # event types
API = "/2020-01-01/extension"
NEXT = f"{API}/event/next"
IDENTIFIER = "Lambda-Extension-Identifier"  # a header
ERROR_TYPE = "Lambda-Extension-Function-Error-Type"  # another header
ANSWER_SECONDS = 5  # Lambda answers at once, unless it is asked for an event
TEXT_LENGTH = 1000  # of an error, at most


class ExtensionsApiError(Exception):
    """The API is unreachable, refuses, or sends an invalid response.

    The text is one line: the request, and why.
    """

    def __init__(self, text):
        super().__init__(" ".join(text[:TEXT_LENGTH].split()).encode("unicode_escape").decode())


class ExtensionsApi:
    """One extension's connection to Lambda.

    All methods but report() raise ExtensionsApiError when they fail.

    It has two HTTP clients, because requests takes longer to import than all else in a cold start:
    http.client asks first, and a session of requests, once it is open, for event after event.
    """

    def __init__(self, name):
        self.session = None  # requests.Session, once open
        # A header; once registered, the identifier's.
        self._sender = {"Lambda-Extension-Name": name}
        self._phase = None  # "init" once registered, "exit" once events are asked for
        self._connection = None  # http.client's, while idle
        self._address = os.environ.get("AWS_LAMBDA_RUNTIME_API", "").strip()
        self._url = f"http://{self._address}"

    def register(self):
        """Registers for INVOKE and SHUTDOWN and returns the identifier (str).

        The documentation calls it "Register".
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*:[0-9]+", self._address):
            raise ExtensionsApiError(
                "AWS_LAMBDA_RUNTIME_API is not HOST:PORT: Lambda, or its emulator, sets it"
            )
        managed = os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "lambda-managed-instances"
        events = [SHUTDOWN] if managed else [INVOKE, SHUTDOWN]  # they run many invocations at once
        _, headers, _ = self.send("POST", f"{API}/register", {"events": events})
        identifier = headers.get(IDENTIFIER, "")
        if not re.fullmatch("[!-~]+", identifier):  # printable ASCII
            raise ExtensionsApiError(
                f"POST {self._url}{API}/register: no valid {IDENTIFIER} in the response"
            )
        self._sender = {IDENTIFIER: identifier}
        self._phase = "init"
        return identifier

    def next_event(self):
        """Waits for the next event ("Next") and returns it: a dict with an eventType (str)."""
        self._phase = "exit"
        asked = f"GET {self._url}{NEXT}"
        ask = self._ask_session if self.session else lambda: self._ask("GET", NEXT)
        _, _, content = checked(asked, ask)
        # It may be not JSON, nested too deeply, not a dict, or without an eventType.
        with contextlib.suppress(Exception):
            event = json.loads(content)
            if isinstance(event["eventType"], str):
                return event
        text = content[:TEXT_LENGTH].decode(errors="replace")
        raise ExtensionsApiError(f"{asked}: not an event: {text}")

    def open_session(self):
        """Opens the session, with one pooled connection, that next_event() uses from then on."""
        import requests

        self.session = requests.Session()
        # HTTP_PROXY, NO_PROXY and ~/.netrc are meant for external hosts.
        self.session.trust_env = False
        request = requests.Request("GET", f"{self._url}{NEXT}", self._sender)
        self._request = self.session.prepare_request(request)

    def send(self, method, path, body, headers=None):
        """Sends a body that JSON can hold.

        Returns the response's status (int), headers and content (bytes).
        """
        headers = {"Content-Type": "application/json"} | (headers or {})
        request = method, path, json.dumps(body), headers, ANSWER_SECONDS
        return checked(f"{method} {self._url}{path}", lambda: self._ask(*request))

    def report(self, name, text, traceback):
        """Reports an exception: its name and text (str), and its traceback (lines).

        The documentation calls it "Init error" or "Exit error".
        """
        error_type = "Extension." + name.encode("unicode_escape").decode()
        body = {
            "errorMessage": text[:TEXT_LENGTH],
            "errorType": error_type,
            "stackTrace": traceback,
        }
        if self._phase:
            with contextlib.suppress(ExtensionsApiError):
                self.send("POST", f"{API}/{self._phase}/error", body, {ERROR_TYPE: error_type})

    def _ask_session(self):
        response = self.session.send(self._request, allow_redirects=False, timeout=None)
        return response.status_code, response.headers, response.content

    def _ask(self, method, path, body=None, headers=None, seconds=None):
        """Asks with http.client. No read takes longer than those seconds."""
        import http.client  # slow, so not before signals are caught

        connection, self._connection = self._connection, None
        # A connection that is readable while idle was closed by the server.
        if not connection or not connection.sock or select.select([connection.sock], [], [], 0)[0]:
            connection = http.client.HTTPConnection(self._address, timeout=ANSWER_SECONDS)
            connection.connect()
        connection.sock.settimeout(seconds)
        connection.request(method, path, body, self._sender | (headers or {}))
        response = connection.getresponse()
        content = response.read()
        self._connection = connection
        return response.status, response.headers, content


def checked(asked, ask):
    """Returns the status, headers and content that ask() returns, if they mean success."""
    try:
        status, headers, content = ask()
        if 200 <= status < 300:
            return status, headers, content
        reason = f"{status} {content[:TEXT_LENGTH].decode(errors='replace')}"
    except Exception as error:  # HTTP clients raise more than they document
        reason = f"{type(error).__name__}: {error}"
    raise ExtensionsApiError(f"{asked}: {reason}")
