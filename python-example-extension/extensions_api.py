# SPDX-License-Identifier: MIT-0
"""A client for the Lambda Extensions API.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
"""

import contextlib
import http.client
import json
import os

# Event types.
INVOKE = "INVOKE"
SHUTDOWN = "SHUTDOWN"

# Paths and headers of requests.
API_PATH = "/2020-01-01/extension"
NAME_HEADER = "Lambda-Extension-Name"
IDENTIFIER_HEADER = "Lambda-Extension-Identifier"
ERROR_TYPE_HEADER = "Lambda-Extension-Function-Error-Type"

# How long to wait for a response. Lambda responds at once, except to the request for an event.
TIMEOUT_SECONDS = 5

# Where an error is reported: before the first event has been requested, and afterwards.
INIT_ERROR_PATH = f"{API_PATH}/init/error"
EXIT_ERROR_PATH = f"{API_PATH}/exit/error"


class ExtensionsApiError(Exception):
    """A request failed. The message names the request and the reason, in one line."""


class ExtensionsApi:
    """One extension's client of the Extensions API.

    Call register() once, then open_session() once, then next_event() repeatedly. register(),
    next_event() and request() raise ExtensionsApiError when they fail.

    There are two HTTP clients. Lambda starts the function's runtime once the extension has
    registered, and importing requests takes longer than everything before it. So the standard
    library's http.client registers. Then requests is imported, and one session requests every
    event.
    """

    def __init__(self, name: str) -> None:
        self._address = os.environ.get("AWS_LAMBDA_RUNTIME_API", "")
        self._name = name
        self._identifier = ""  # set by register()
        self._error_path = ""  # none before the registration

    def register(self) -> str:
        """Registers for INVOKE and SHUTDOWN events; returns the extension's identifier.

        See "Register" in the API's documentation.
        """
        if not self._address:
            raise ExtensionsApiError("AWS_LAMBDA_RUNTIME_API is not set; Lambda sets it")
        events = [INVOKE, SHUTDOWN]
        if runs_on_managed_instances():  # which send no INVOKE events
            events = [SHUTDOWN]
        path = f"{API_PATH}/register"
        response = self._send("POST", path, {"events": events}, {NAME_HEADER: self._name})
        self._identifier = response.headers.get(IDENTIFIER_HEADER, "")
        if not self._identifier:
            raise ExtensionsApiError(f"{path}: no {IDENTIFIER_HEADER} in the response")
        self._error_path = INIT_ERROR_PATH
        return self._identifier

    def open_session(self) -> None:
        """Imports requests, and opens the session that next_event() uses."""
        import requests  # not at the top of the file: see the class

        # A session keeps its connection open, and reuses it for the next request:
        # https://requests.readthedocs.io/en/latest/user/advanced/#session-objects
        self._session = requests.Session()
        # Ignore HTTP_PROXY and ~/.netrc, which are meant for other hosts.
        self._session.trust_env = False
        # Lambda needs none of the session's default headers, and each takes time in every event.
        self._session.headers.clear()
        # The request is always the same, so it is prepared once, not for each event.
        url = f"http://{self._address}{API_PATH}/event/next"
        headers = {IDENTIFIER_HEADER: self._identifier}
        request = requests.Request("GET", url, headers=headers)
        self._next_request = self._session.prepare_request(request)

    def next_event(self) -> dict:
        """Waits for the next event and returns it, a dict with an eventType (str).

        There is no time limit, because Lambda freezes the environment between invocations. See
        "Next" in the API's documentation.
        """
        self._error_path = EXIT_ERROR_PATH
        with api_errors(f"GET {self._next_request.url}"):
            response = self._session.send(self._next_request, allow_redirects=False, timeout=None)
            require_success(response.status_code, response.content)
            event = json.loads(response.content)
            event["eventType"]  # fails if this is not an event
            return event

    def request(
        self, method: str, path: str, body: object, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """Sends body as JSON; returns a response whose content has been read.

        Lambda's other APIs for extensions, such as the Telemetry API, are at the same address.
        """
        headers = {IDENTIFIER_HEADER: self._identifier, **(headers or {})}
        return self._send(method, path, body, headers)

    def report_error(self, name: str, message: str, stack_trace: list[str]) -> None:
        """Reports an exception of that name to Lambda, if the extension has registered.

        It never raises. See "Init error" and "Exit error" in the API's documentation.
        """
        if not self._error_path:
            return
        error_type = f"Extension.{name}"
        body = {"errorMessage": message, "errorType": error_type, "stackTrace": stack_trace}
        with contextlib.suppress(ExtensionsApiError):
            self.request("POST", self._error_path, body, {ERROR_TYPE_HEADER: error_type})

    def _send(self, method, path, body, headers):
        # These requests are rare. An idle connection would be dead by the time of the next one.
        content = json.dumps(body)
        headers = {"Content-Type": "application/json", **headers}
        with api_errors(f"{method} http://{self._address}{path}"):
            connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_SECONDS)
            with contextlib.closing(connection):
                connection.request(method, path, content, headers)
                response = connection.getresponse()
                require_success(response.status, response.read())
                return response


def runs_on_managed_instances() -> bool:
    """Returns whether this is a Managed Instance, which handles many invocations at once.

    https://docs.aws.amazon.com/lambda/latest/dg/lambda-managed-instances.html
    """
    return os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "lambda-managed-instances"


def require_success(status, content):
    """Raises an HTTPException that quotes the content (bytes), unless the status is 2xx."""
    if not 200 <= status < 300:
        raise http.client.HTTPException(f"status {status} {content[:1000]!r}")


@contextlib.contextmanager
def api_errors(request_line):
    """Turns any exception in the with block into an ExtensionsApiError that names the request."""
    try:
        yield
    except Exception as error:  # HTTP clients raise more than they document
        raise ExtensionsApiError(f"{request_line}: {type(error).__name__}: {error}") from None
