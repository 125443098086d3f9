"""An extension that does what it is told, in Python, by its events and its environment.

It takes the place of extension.py in tests.
"""

import json
import os
import sys  # noqa: F401
import time  # noqa: F401

from lifecycle import log, run


def do(what, event=None):
    exec(what or "", {**globals(), "event": event})  # noqa: S102


def process(event):
    log(f"Received event: {json.dumps(event)}")
    event_type = event.get("eventType")
    do(event.get("do"), event)
    do(os.environ.get(f"AT_{event_type}"), event)
    log("Done")


if __name__ == "__main__":
    run(process, lambda: do(os.environ.get("AT_INIT")))
