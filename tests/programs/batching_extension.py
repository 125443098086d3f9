"""An extension that adds each event to a batch, after it has done what the event says, in Python.

It takes the place of extension.py in tests.
"""

import time  # noqa: F401

from batches import Batches
from lifecycle import run

batches = Batches()


def process(event):
    exec(event.get("do", ""), globals() | {"event": event})  # noqa: S102
    batches.add(event)
    batches.send(event)


if __name__ == "__main__":
    run(process, batches.start)
