"""A client for the Lambda Extensions API.

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
"""

import contextlib
import http.client
import json
import os

API_PATH = "/2020-01-01/extension"
NAME_HEADER = "Lambda-Extension-Name"
IDENTIFIER_HEADER = "Lambda-Extension-Identifier"
ERROR_TYPE_HEADER = "Lambda-Extension-Function-Error-Type"
JSON = {"Content-Type": "application/json"}
INVOKE, SHUTDOWN = "INVOKE", "SHUTDOWN"  # event types
POST_SECONDS = 5  # Lambda answers every POST at once


class ExtensionsApiError(Exception):
    """The API is unreachable, refuses, or sends an invalid response. The text is one line: the request, and why.

    error_type (str or None) is the errorType in the API's response, such as "Extension.InvalidEventType".
    """

    def __init__(self, message, error_type=None):
        printable = (c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
        super().__init__("".join(printable))
        self.error_type = error_type


class ExtensionsApi:
    """One extension's connection to Lambda. register() and events() raise ExtensionsApiError when they fail."""

    def __init__(self, name):
        self.name = name  # str: the file's name in /opt/extensions
        self.identifier = None  # str, once registered
        self._address = os.environ.get("AWS_LAMBDA_RUNTIME_API")  # host:port
        self._phase = "init"  # "exit" once events are asked for

    def register(self):
        """Registers for INVOKE and SHUTDOWN ("Register" in the API's documentation) and sets the identifier.

        Lambda Managed Instances run invocations concurrently and offer extensions SHUTDOWN alone.
        """
        if not self._address:
            raise ExtensionsApiError("AWS_LAMBDA_RUNTIME_API is not set: Lambda, or its emulator, must start this")
        managed = os.environ.get("AWS_LAMBDA_INITIALIZATION_TYPE") == "lambda-managed-instances"
        try:
            headers = self._register([SHUTDOWN] if managed else [INVOKE, SHUTDOWN])
        except ExtensionsApiError as error:
            if managed or error.error_type != "Extension.InvalidEventType":
                raise
            headers = self._register([SHUTDOWN])
        self.identifier = headers.get(IDENTIFIER_HEADER)
        if not self.identifier:
            raise ExtensionsApiError(f"POST {self._url('register')}: no {IDENTIFIER_HEADER} in the response")

    def events(self):
        """Yields each event ("Next"), a dict with an eventType (str), until SHUTDOWN. Call it after register()."""
        import requests  # slow, so it runs after registration, while Lambda starts the runtime

        session = requests.Session()
        session.trust_env = False  # HTTP_PROXY, NO_PROXY and ~/.netrc are meant for external hosts
        headers = {IDENTIFIER_HEADER: self.identifier}
        request = session.prepare_request(requests.Request("GET", self._url("event/next"), headers))
        asked, self._phase = f"GET {request.url}", "exit"
        while True:
            try:
                response = session.send(request, allow_redirects=False, timeout=None)
            except OSError as error:  # the base of every requests exception
                raise ExtensionsApiError(f"{asked}: {error}") from error
            check(asked, response.status_code, response.content)
            try:
                event = json.loads(response.content)
            except ValueError:
                event = None
            if not isinstance(event, dict) or not isinstance(event.get("eventType"), str):
                raise ExtensionsApiError(f"{asked}: not an event: {response.content[:200]!r}")
            yield event
            if event["eventType"] == SHUTDOWN:
                return

    def report(self, error):
        """Reports the exception that ends this extension ("Init error" or "Exit error").

        Does nothing before registration, and ignores a report that fails.
        """
        if not self.identifier:
            return
        import traceback

        is_bug = not isinstance(error, ExtensionsApiError)
        body = {
            "errorMessage": str(error),
            "errorType": f"Extension.{type(error).__name__}",
            "stackTrace": traceback.format_tb(error.__traceback__) if is_bug else [],
        }
        headers = {IDENTIFIER_HEADER: self.identifier, ERROR_TYPE_HEADER: body["errorType"]}
        with contextlib.suppress(ExtensionsApiError):
            self._post(f"{self._phase}/error", headers, body)

    def _register(self, events):
        return self._post("register", {NAME_HEADER: self.name}, {"events": events})

    def _post(self, path, headers, body):
        asked = f"POST {self._url(path)}"
        try:
            with contextlib.closing(http.client.HTTPConnection(self._address, timeout=POST_SECONDS)) as connection:
                connection.request("POST", f"{API_PATH}/{path}", json.dumps(body), JSON | headers)
                response = connection.getresponse()
                content = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ExtensionsApiError(f"{asked}: {type(error).__name__}: {error}") from error
        check(asked, response.status, content)
        return response.headers

    def _url(self, path):
        return f"http://{self._address}{API_PATH}/{path}"


def check(asked, status, content):
    """Raises ExtensionsApiError unless status (int) means success. content (bytes) is the response's body."""
    if 200 <= status < 300:
        return
    try:
        error = json.loads(content)
        error_type, message = error["errorType"], error["errorMessage"]
    except (ValueError, TypeError, KeyError):
        error_type, message = None, content[:200].decode(errors="replace")
    raise ExtensionsApiError(f"{asked}: {status} {error_type or ''} {message}", error_type)
