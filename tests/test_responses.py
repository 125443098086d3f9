"""Whatever an API answers is an error in one line, or none.

FUZZ_CASES=5000 ./tests/run.sh -k responses tries more of them than the few hundred of an ordinary run.
"""

import importlib
import os

from extensions_api_server import REGISTERED, ExtensionsApiServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FUZZ_CASES", "300"))

PARTS = st.sampled_from(
    [b"HTTP/1.1 302 Found", b"HTTP/1.1 204 None", b"HTTP/1.1 100 Continue", b"HTTP/1.1 99999 Many", b"HTTP/1.1 -1 Less",
     b"HTTP/9 200", b"220 ESMTP", b"Location: http://[", b"Location: http://a..b/", b"Location: //" + b"x" * 64,
     b"Location: \xff\xfe", b"Content-Length: 1" + b"0" * 30, b"Content-Length: -5", b"Content-Length: five",
     b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", b"Content-Type: text/html; charset=no-such", b"No colon",
     b"Set-Cookie: \x00=\x01; expires=never", b"X: " + b"y" * 70_000, b"Lambda-Extension-Identifier: \x1b[31m",
     b"Lambda-Extension-Identifier: one\r\n two", b"Lambda-Extension-Identifier: \xa0", b"Connection: close", b"",
     b'{"eventType": "INVOKE"}', b'{"eventType": ["\x1b"]}', b"[" * 2_000, b'{"errorType":' * 2_000, b"-5\r\nabc\r\n",
     b"zz\r\n", b'{"errorType": "\xe2\x80\xae", "errorMessage": 1e999}', b'"\\ud800"', b"9" * 5_000]
) | st.binary(max_size=50)  # fmt: skip
START = st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 403 Forbidden"])
RESPONSES = st.builds(lambda start, parts: b"\r\n".join([start, *parts]), START | PARTS, st.lists(PARTS, max_size=8))


def test_responses_to_each_request(extension, monkeypatch):
    monkeypatch.syspath_prepend(extension.parent)
    client = importlib.import_module("extensions_api")

    def in_one_line(call):
        try:
            call()
        except client.ExtensionsApiError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 10 * client.TEXT_LENGTH

    @settings(max_examples=CASES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(RESPONSES)
    def ask(response):
        def respond(connection):
            connection.sendall(response)
            connection.shutdown(2)

        server.answers = {"register": [respond], "event/next": [respond], "error": [respond]}
        in_one_line(client.ExtensionsApi("name").register)
        server.answers["register"] = [REGISTERED]
        api = client.ExtensionsApi("name")
        api.register()
        for make_ready in (lambda: None), api.open_session:
            make_ready()
            in_one_line(api.next_event)
            api.report("Error", "text", [])

    with ExtensionsApiServer() as server:
        monkeypatch.setenv("AWS_LAMBDA_RUNTIME_API", server.address)
        ask()
