# SPDX-License-Identifier: MIT-0
"""A client for the Lambda Extensions API.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
"""

import contextlib
import http.client
import json
import os
import re

# The types of events.
INVOKE = "INVOKE"
SHUTDOWN = "SHUTDOWN"

# Paths and headers of requests.
API_PATH = "/2020-01-01/extension"
REGISTER_PATH = f"{API_PATH}/register"
NEXT_PATH = f"{API_PATH}/event/next"
NAME_HEADER = "Lambda-Extension-Name"
IDENTIFIER_HEADER = "Lambda-Extension-Identifier"
ERROR_TYPE_HEADER = "Lambda-Extension-Function-Error-Type"

# How long to wait for a connection, or for more of a response. Lambda responds at once, except when
# it is asked for an event.
TIMEOUT_SECONDS = 5

# Error messages, and what they quote of a response, are cut to this many characters.
TEXT_LENGTH = 1000


class ExtensionsApiError(Exception):
    """A request failed: the text says in one line which one, and why.

    The API is unreachable, or its response is an error, or is not as documented.
    """

    def __init__(self, text):
        # What a response says may contain line ends and control characters: keep them out of logs.
        one_line = " ".join(text[:TEXT_LENGTH].split())
        super().__init__(one_line.encode("unicode_escape").decode())


class ExtensionsApi:
    """The Extensions API, as one extension uses it.

    Call register() once, then open_session() once, then next_event() again and again. register(),
    next_event() and send() raise ExtensionsApiError when they fail.

    Two HTTP clients share the work. Importing requests takes longer than everything else in a cold
    start, and Lambda starts the function's runtime only when the extension has registered. So the
    standard library's http.client registers. Then, while the runtime starts, open_session()
    imports requests, and one session asks for every event. Nothing is imported while an
    invocation runs and somebody waits for it.
    """

    def __init__(self, name):
        self._headers = {NAME_HEADER: name}  # after register(), the identifier instead
        self._is_registered = False
        self._has_asked_for_event = False
        self._address = os.environ.get("AWS_LAMBDA_RUNTIME_API", "").strip()
        self._url = f"http://{self._address}"

    def register(self):
        """Registers for INVOKE and SHUTDOWN events; returns the extension's identifier (str).

        See "Register" in the API's documentation.
        """
        address = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*:([0-9]{1,5})", self._address)
        # getaddrinfo() takes 65537 for port 1, and so on.
        if not address or int(address[1]) > 65535:
            raise ExtensionsApiError(
                "AWS_LAMBDA_RUNTIME_API is not HOST:PORT: Lambda, or its emulator, sets it"
            )
        events = [INVOKE, SHUTDOWN]
        if runs_on_managed_instances():  # they have no INVOKE event
            events = [SHUTDOWN]
        response = self.send("POST", REGISTER_PATH, {"events": events})
        identifier = response.headers.get(IDENTIFIER_HEADER, "")
        if not re.fullmatch("[!-~]+", identifier):  # printable ASCII
            raise ExtensionsApiError(
                f"POST {self._url}{REGISTER_PATH}: no valid {IDENTIFIER_HEADER} in the response"
            )
        self._headers = {IDENTIFIER_HEADER: identifier}
        self._is_registered = True
        return identifier

    def open_session(self):
        """Imports requests, and opens the session that next_event() uses."""
        import requests  # not at the top of the file: see the class

        # A session keeps its connection open, and uses it again for the next request:
        # https://requests.readthedocs.io/en/latest/user/advanced/#session-objects
        self._session = requests.Session()
        # Ignore HTTP_PROXY and ~/.netrc, which are meant for other hosts.
        self._session.trust_env = False
        # The request is always the same, so it is prepared once, not for each event.
        request = requests.Request("GET", f"{self._url}{NEXT_PATH}", self._headers)
        self._next_request = self._session.prepare_request(request)

    def next_event(self):
        """Waits for the next event and returns it, a dict with an eventType (str).

        It waits without a time limit, because Lambda freezes the environment until the next
        invocation. See "Next" in the API's documentation.
        """
        self._has_asked_for_event = True
        with api_errors(f"GET {self._url}{NEXT_PATH}"):
            response = self._session.send(self._next_request, allow_redirects=False, timeout=None)
            require_success(response.status_code, response.content)
            return event_in(response.content)

    def send(self, method, path, body, headers=None):
        """Sends a request with a body that becomes JSON; returns an http.client.HTTPResponse.

        Each request has a connection of its own: there are few requests, and hours may lie between
        them, in which an idle connection would die. The content of the response has been read
        already; use its status (int) and headers.
        """
        headers = {"Content-Type": "application/json", **self._headers, **(headers or {})}
        with api_errors(f"{method} {self._url}{path}"):
            connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_SECONDS)
            with contextlib.closing(connection):
                connection.request(method, path, json.dumps(body), headers)
                response = connection.getresponse()
                require_success(response.status, response.read())
                return response

    def report(self, name, text, stack_trace):
        """Reports an exception to Lambda, if the extension has registered. Never raises.

        It takes the exception's name and text (str), and its stack trace (a list of str). See
        "Init error" and "Exit error" in the API's documentation.
        """
        if not self._is_registered:
            return
        phase = "exit" if self._has_asked_for_event else "init"
        # The name of a class may have letters that a header may not.
        error_type = "Extension." + name.encode("unicode_escape").decode()
        body = {
            "errorMessage": text[:TEXT_LENGTH],
            "errorType": error_type,
            "stackTrace": stack_trace,
        }
        with contextlib.suppress(ExtensionsApiError):
            self.send("POST", f"{API_PATH}/{phase}/error", body, {ERROR_TYPE_HEADER: error_type})


def runs_on_managed_instances():
    """Returns whether this is a Managed Instance, which runs many invocations at once.

    https://docs.aws.amazon.com/lambda/latest/dg/lambda-managed-instances.html
    """
    return os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "lambda-managed-instances"


class UnexpectedResponse(Exception):
    """A response is an error, or is not as documented. The text says what it is."""


def require_success(status, content):
    """Raises an UnexpectedResponse, quoting the content, unless the status (int) is a success."""
    if not 200 <= status < 300:
        raise UnexpectedResponse(f"{status} {excerpt(content)}")


def event_in(content):
    """Returns the event in the content (bytes) of a response, or raises UnexpectedResponse."""
    # It is not an event if it is not JSON, nested too deeply, not a dict, or without an eventType.
    with contextlib.suppress(Exception):
        event = json.loads(content)
        if isinstance(event["eventType"], str):
            return event
    raise UnexpectedResponse(f"not an event: {excerpt(content)}")


def excerpt(content):
    """Returns the beginning of a response's content (bytes) as text."""
    return content[:TEXT_LENGTH].decode(errors="replace")


@contextlib.contextmanager
def api_errors(request):
    """Turns what is raised in the with block into an ExtensionsApiError that names the request."""
    try:
        yield
    except UnexpectedResponse as error:
        raise ExtensionsApiError(f"{request}: {error}") from None
    except Exception as error:  # HTTP clients raise more than they document
        raise ExtensionsApiError(f"{request}: {type(error).__name__}: {error}") from None
