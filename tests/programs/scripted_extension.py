"""An extension that runs the Python code that it is given. It takes the place of extension.py.

The code is in an event's "do", or in the environment variables AT_IMPORT, AT_INIT, AT_INVOKE and
AT_SHUTDOWN.
"""

import json
import os
import sys  # noqa: F401
import time  # noqa: F401

from lifecycle import log


def do(what, event=None):
    exec(what or "", {**globals(), "event": event})  # noqa: S102


do(os.environ.get("AT_IMPORT"))


def init():
    do(os.environ.get("AT_INIT"))


def process(event):
    log(f"Received event: {json.dumps(event)}")
    event_type = event["eventType"]  # now, because the code may change the event
    do(event.get("do"), event)
    do(os.environ.get(f"AT_{event_type}"), event)
    log("Done")
