# SPDX-License-Identifier: MIT-0
"""A client for the Lambda Extensions API.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
"""

import contextlib
import http.client
import json
import os

# The types of events.
INVOKE = "INVOKE"
SHUTDOWN = "SHUTDOWN"

# Paths and headers of requests.
API_PATH = "/2020-01-01/extension"
NAME_HEADER = "Lambda-Extension-Name"
IDENTIFIER_HEADER = "Lambda-Extension-Identifier"
ERROR_TYPE_HEADER = "Lambda-Extension-Function-Error-Type"

# How long to wait for a response, in seconds. Lambda responds at once, except when it is asked for
# an event.
TIMEOUT_SECONDS = 5

# The phases of an extension. In the last two, it can report an error, under a path of this name.
BEFORE_REGISTRATION = "before registration"
INIT = "init"
EXIT = "exit"


class ExtensionsApiError(Exception):
    """A request failed. The text names the request and the reason, in one line."""


class ExtensionsApi:
    """The Extensions API, as one extension uses it.

    Call register() once, then open_session() once, then next_event() again and again. register(),
    next_event() and request() raise ExtensionsApiError when they fail.

    Two HTTP clients share the work. Lambda starts the function's runtime once the extension has
    registered, and importing requests takes longer than everything else in a cold start. So the
    standard library's http.client registers, and requests is imported afterwards. Then one session
    requests every event. Nothing is imported during an invocation, when somebody waits for it.
    """

    def __init__(self, name):
        self._address = os.environ.get("AWS_LAMBDA_RUNTIME_API", "")
        self._name = name
        self._identifier = ""  # Lambda returns one to register()
        self._phase = BEFORE_REGISTRATION

    def register(self):
        """Registers for INVOKE and SHUTDOWN events; returns the extension's identifier (str).

        See "Register" in the API's documentation.
        """
        if not self._address:
            raise ExtensionsApiError("AWS_LAMBDA_RUNTIME_API is not set. Lambda sets it.")
        events = [INVOKE, SHUTDOWN]
        if runs_on_managed_instances():  # they have no INVOKE event
            events = [SHUTDOWN]
        path = f"{API_PATH}/register"
        response = self._send("POST", path, {"events": events}, {NAME_HEADER: self._name})
        self._identifier = response.headers.get(IDENTIFIER_HEADER, "")
        if not self._identifier:
            raise ExtensionsApiError(f"POST {path}: no {IDENTIFIER_HEADER} in the response")
        self._phase = INIT
        return self._identifier

    def open_session(self):
        """Imports requests, and opens the session that next_event() uses."""
        import requests  # not at the top of the file: see the class

        # A session keeps its connection open, and uses it again for the next request:
        # https://requests.readthedocs.io/en/latest/user/advanced/#session-objects
        self._session = requests.Session()
        # Ignore HTTP_PROXY and ~/.netrc, which are meant for other hosts.
        self._session.trust_env = False
        # Lambda needs none of the default headers, and each takes time in every event.
        self._session.headers.clear()
        # The request is always the same, so it is prepared once, not for each event.
        url = f"http://{self._address}{API_PATH}/event/next"
        request = requests.Request("GET", url, {IDENTIFIER_HEADER: self._identifier})
        self._next_request = self._session.prepare_request(request)

    def next_event(self):
        """Waits for the next event and returns it, a dict with an eventType (str).

        It waits without a time limit, because Lambda freezes the environment until the next
        invocation. See "Next" in the API's documentation.
        """
        self._phase = EXIT
        with api_errors(f"GET {self._next_request.url}"):
            response = self._session.send(self._next_request, allow_redirects=False, timeout=None)
            require_success(response.status_code, response.content)
            event = json.loads(response.content)
            event["eventType"]  # raises KeyError if this is no event
            return event

    def request(self, method, path, body, headers=None):
        """Sends a request with a body that becomes JSON; returns an http.client.HTTPResponse.

        The content of the response has been read already; use its status (int) and headers.
        """
        headers = {IDENTIFIER_HEADER: self._identifier, **(headers or {})}
        return self._send(method, path, body, headers)

    def report(self, name, message, stack_trace):
        """Reports an exception to Lambda, if the extension has registered. Never raises.

        It takes the exception's name and message (str), and its stack trace (a list of str). See
        "Init error" and "Exit error" in the API's documentation.
        """
        if self._phase == BEFORE_REGISTRATION:
            return
        error_type = f"Extension.{name}"
        body = {"errorMessage": message, "errorType": error_type, "stackTrace": stack_trace}
        path = f"{API_PATH}/{self._phase}/error"
        with contextlib.suppress(ExtensionsApiError):
            self.request("POST", path, body, {ERROR_TYPE_HEADER: error_type})

    def _send(self, method, path, body, headers):
        # Each of these requests has a connection of its own: there are few, and hours may lie
        # between them, in which an idle connection would die.
        with api_errors(f"{method} http://{self._address}{path}"):
            connection = http.client.HTTPConnection(self._address, timeout=TIMEOUT_SECONDS)
            with contextlib.closing(connection):
                headers = {"Content-Type": "application/json", **headers}
                connection.request(method, path, json.dumps(body), headers)
                response = connection.getresponse()
                require_success(response.status, response.read())
                return response


def runs_on_managed_instances():
    """Returns whether this is a Managed Instance, which runs many invocations at once.

    https://docs.aws.amazon.com/lambda/latest/dg/lambda-managed-instances.html
    """
    return os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "lambda-managed-instances"


def require_success(status, content):
    """Raises an HTTPException that quotes the content (bytes), unless the status (int) is 2xx."""
    if not 200 <= status < 300:
        raise http.client.HTTPException(f"status {status} {content[:1000]!r}")


@contextlib.contextmanager
def api_errors(request):
    """Turns what is raised in the with block into an ExtensionsApiError that names the request."""
    try:
        yield
    except Exception as error:  # HTTP clients raise more than they document
        raise ExtensionsApiError(f"{request}: {type(error).__name__}: {error}") from None
