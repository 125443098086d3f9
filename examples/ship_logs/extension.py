# SPDX-License-Identifier: MIT-0
"""Ships the function's logs, and Lambda's platform events, to COLLECTOR_URL."""

import json
import os
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler

from batches import MARGIN_SECONDS, Batches
from extensions_api import SHUTDOWN, ExtensionsApiError, runs_on_managed_instances
from lifecycle import api, log

# https://docs.aws.amazon.com/lambda/latest/dg/telemetry-api.html
TELEMETRY_PATH = "/2022-07-01/telemetry"

# The types of records that tell process() that an invocation has started or ended, or that
# telemetry was lost.
NOTED_TYPES = ("platform.start", "platform.runtimeDone", "platform.logsDropped")

# How long process() waits for Lambda to say that the invocation has started.
START_SECONDS = 1

# Telemetry still arrives after SHUTDOWN. process() waits this long for it before the last batch.
LAST_TELEMETRY_SECONDS = 0.5


def init() -> None:
    """Subscribes to the Telemetry API, if there is one."""
    batches.start()
    server = Server(("", 0), Receiver)
    subscription = {
        # The version of the schema that works on Managed Instances, too.
        "schemaVersion": "2025-01-29",
        # Not "extension": what this extension logs would come back to it.
        "types": ["platform", "function"],
        # The shortest delay that is allowed, because process() waits for the invocation's end.
        "buffering": {"timeoutMs": 25},
        "destination": {
            "protocol": "HTTP",
            "URI": f"http://sandbox.localdomain:{server.server_address[1]}",
        },
    }
    try:
        outcome = api.request("PUT", TELEMETRY_PATH, subscription).status
    except ExtensionsApiError as error:
        outcome = error
    if outcome == 200:
        threading.Thread(target=server.serve_forever).start()
        telemetry.is_subscribed = True
    else:  # AWS's emulator usually answers 202, other emulators 404
        server.server_close()
        log(f"Not shipping logs: there is no Telemetry API here, or it refused: {outcome}")


def process(event: dict) -> None:
    """Waits until the function has finished, and sends what is due.

    If it did not wait, Lambda could freeze the environment before the records have been sent.
    """
    if telemetry.is_subscribed:
        if event["eventType"] == SHUTDOWN:
            time.sleep(LAST_TELEMETRY_SECONDS)
        else:
            telemetry.wait_for_end_of(event["requestId"], event["deadlineMs"] / 1000)
    batches.send(event)


class Telemetry:
    """What the Telemetry API has reported. The receiver's thread notes it; process() waits."""

    def __init__(self):
        self.is_subscribed = False
        self._changed = threading.Condition()  # also the lock for everything below
        self._started = None  # the request ID of the invocation that started most recently
        self._ended = None  # the request ID of the one that ended most recently
        self._is_incomplete = False  # something was lost since the last wait
        self._origin = origin_of_records(None)

    def take(self, body):
        """Handles the body of a request (bytes), a JSON array, and passes its records on."""
        with self._changed:
            texts = []
            try:
                for record, text in records_in(body.decode()):
                    if not isinstance(record, dict) or not record:  # {} has no end to add to
                        text = unreadable(text)
                    elif record.get("type") in NOTED_TYPES:
                        self._note(record)
                    texts.append(text[:-1] + self._origin)
            except (ValueError, LookupError, RecursionError) as error:
                # A record that is too long is split across two bodies, for example:
                # https://github.com/DataDog/datadog-lambda-extension/issues/1357
                texts = [unreadable(body.decode(errors="replace"))[:-1] + self._origin]
                self.report_loss(f"Telemetry is not JSON, and is shipped as text: {error}")
            batches.add_texts(texts)
            self._changed.notify_all()

    def report_loss(self, what):
        """Logs what did not arrive. process() may be waiting for it."""
        with self._changed:
            self._is_incomplete = True
            self._changed.notify_all()
        log(what)

    def _note(self, record):
        """Notes what a record says about invocations."""
        content = record.get("record")
        if record["type"] == "platform.logsDropped":
            self.report_loss(f"Lambda has dropped telemetry: {content}")
        elif isinstance(content, dict) and record["type"] == "platform.start":
            self._started = content.get("requestId")
            self._origin = origin_of_records(self._started)
        elif isinstance(content, dict):
            self._ended = content.get("requestId")

    def wait_for_end_of(self, request_id, deadline):
        """Waits until the function has finished an invocation, if that can be known.

        It is not known if telemetry was lost, or does not even say that the invocation has started.
        """
        begin = time.monotonic()
        end = begin + deadline - time.time() - MARGIN_SECONDS
        with self._changed:
            while request_id != self._ended and not self._is_incomplete:
                limit = end
                if request_id != self._started:  # it has not started, as far as Lambda says
                    limit = min(end, begin + START_SECONDS)
                seconds_left = limit - time.monotonic()
                if seconds_left <= 0:
                    log(f"Stopped waiting: no sign that invocation {request_id} has ended")
                    break
                self._changed.wait(seconds_left)
            self._is_incomplete = False
            self._ended = None  # a retry has the same ID


class Server(socketserver.TCPServer):
    """Handles one request at a time, so that Lambda waits while there is no room in batches.

    It is not an HTTPServer, which would look up the name of this machine in DNS.
    """

    request_queue_size = 100  # what Lambda sends in the meantime

    def handle_error(self, request, client_address):
        """Logs in one line, instead of a traceback, that a request has failed."""
        telemetry.report_loss(f"Telemetry did not arrive: {sys.exc_info()[1]!r}")


class Receiver(BaseHTTPRequestHandler):
    """Receives one request from the Telemetry API."""

    timeout = 5  # seconds; a connection that hangs would block all others

    def do_POST(self):
        """Stores the records, and answers 200 once there is room for more, or after a moment."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        telemetry.take(body)
        batches.wait_for_room()
        self.send_response_only(200)
        self.end_headers()

    def log_error(self, format, *args):
        """Logs in one line that a request is not HTTP, or did not arrive in full and in time."""
        telemetry.report_loss(f"Telemetry did not arrive: {format % args}")


def records_in(text):
    """Yields the records of a JSON array, each with its own text.

    This takes 3 µs per record; parsing the array, and encoding each record again, would take 6.
    Raises ValueError, LookupError or RecursionError if the text is not such an array.
    """
    text = text.strip()
    if not text.startswith("["):
        raise ValueError("not an array")
    end = 1
    try:
        while True:
            while text[end] in ", \t\r\n":
                end += 1
            if text[end] == "]":
                break
            begin = end
            record, end = scan(text, begin)
            yield record, text[begin:end]
    except StopIteration as error:
        raise ValueError(f"no value at character {error}") from None
    if text[end:] != "]":
        raise ValueError(f"more than an array, from character {end}")


def refuse(constant):
    """Refuses NaN and infinity, which Python accepts as JSON, but few collectors do."""
    raise ValueError(f"{constant} is not JSON")


# Takes a text and a position; returns the value there, and the position after it. What raw_decode()
# adds to it takes time for each record.
scan = json.JSONDecoder(parse_constant=refuse).scan_once  # pyright: ignore


def unreadable(text):
    """Returns text that is not a record, wrapped in one, as JSON."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    return json.dumps({"time": now, "type": "unreadable", "record": text})


def origin_of_records(request_id):
    """Returns what is added to each record, as the end of a JSON object."""
    origin = {
        "function": os.environ.get("AWS_LAMBDA_FUNCTION_NAME"),
        "version": os.environ.get("AWS_LAMBDA_FUNCTION_VERSION"),
    }
    if not runs_on_managed_instances():  # there, records of many invocations arrive together
        origin["requestId"] = request_id
    return f", {json.dumps(origin)[1:]}"


batches = Batches()
telemetry = Telemetry()
