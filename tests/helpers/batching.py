"""Extensions that send batches, and what they log."""

import re
import time

from machine import ROOT
from sample import NAME

EXAMPLE = ROOT / "examples" / "ship_logs"
BATCHES = (EXAMPLE / "batches.py").read_text()
FORMATS = (EXAMPLE / "formats.py").read_text()
NOWHERE = "http://127.0.0.1:1/"  # a collector that does not exist

# Code before an extension's own. It lets the time limits of connections pass five times as fast.
SHORT_LIMITS = """
import socket
set_limit = socket.socket.settimeout
socket.socket.settimeout = lambda self, limit: set_limit(self, limit and limit / 5)
"""


def counted(log, what):
    """The sum of the numbers of records in lines of a log, such as "Records dropped: 5 (…)"."""
    return sum(map(int, re.findall(rf"(?m)^\[{NAME}\] Records {what}: (\d+)", log)))


def timed(times, make_answer=None):
    """An answer that notes the time of the request, and then sends what make_answer() returns.

    Without make_answer it sends nothing.
    """

    def note_time(connection):
        times.append(time.monotonic())
        if make_answer:
            connection.sendall(make_answer())

    return note_time
