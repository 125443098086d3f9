"""Ships what the function logs, and what Lambda says about its invocations, to COLLECTOR_URL."""

import collections
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from batches import MARGIN, Batches
from extensions_api import ExtensionsApiError
from lifecycle import api, log, run

batches = Batches()
# Request IDs of the last invocations that the function has finished.
done = collections.deque(maxlen=100)
subscribed = threading.Event()


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        for record in json.loads(self.rfile.read(int(self.headers["Content-Length"]))):
            batches.add(record)
            if record["type"] == "platform.runtimeDone":
                done.append(record["record"]["requestId"])
        self.send_response_only(200)
        self.end_headers()


def init():
    """Subscribes to the Telemetry API.

    https://docs.aws.amazon.com/lambda/latest/dg/telemetry-api.html
    """
    batches.start()
    server = ThreadingHTTPServer(("", 0), _Receiver)
    address = f"http://sandbox.localdomain:{server.server_port}"
    subscription = {
        "schemaVersion": "2025-01-29",  # which Managed Instances know
        "types": ["platform", "function"],  # not "extension": its own lines would come back
        "buffering": {"timeoutMs": 25},  # the least delay
        "destination": {"protocol": "HTTP", "URI": address},
    }
    try:
        status = api.send("PUT", "/2022-07-01/telemetry", subscription).status
    except ExtensionsApiError as error:
        status = error
    if status == 200:
        threading.Thread(target=server.serve_forever).start()
        subscribed.set()
    else:  # AWS's emulator answers 202 NotSupported, others 404
        server.server_close()
        log(f"Ships no logs, because the Telemetry API is not supported here, or refuses: {status}")


def process(event):
    """Waits until the function has finished, and sends what is due.

    Then the environment may be frozen.
    """
    if event["eventType"] == "SHUTDOWN":
        time.sleep(0.2)  # the last records are on their way
    elif subscribed.is_set():
        while event["requestId"] not in done and time.time() < event["deadlineMs"] / 1000 - MARGIN:
            time.sleep(0.005)
    batches.send(event)


run(process, init)
