"""Extensions that send batches, and what they log."""

import re
import time

from extension_process import variant
from machine import ROOT
from sample import NAME

EXAMPLE = ROOT / "examples" / "ship_logs"
BATCHES = (EXAMPLE / "batches.py").read_text()
NOWHERE = "http://127.0.0.1:1/"  # a collector that does not exist

# Code before an extension's own. It lets the time limits of connections pass five times as fast.
SHORT_LIMITS = """
import socket
set_limit = socket.socket.settimeout
socket.socket.settimeout = lambda self, limit: set_limit(self, limit and limit / 5)
"""


def extension_with(extension, folder, code, settings=""):
    """An extension with this code, and batches.py with changed settings, such as "A = 1; B = 2"."""
    changed = "".join(f"batches.{setting}\n" for setting in settings.split("; ") if setting)
    files = {"batches.py": BATCHES, "extension.py": f"import batches\n{changed}{code}"}
    return variant(extension, folder, files)


def counted(log, what):
    """The sum of the numbers of records in lines of a log, such as "Records dropped: 5 (…)"."""
    return sum(map(int, re.findall(rf"(?m)^\[{NAME}\] Records {what}: (\d+)", log)))


def timed(times, event=bytes):
    """An answer that notes when it was asked for, and gives what event() makes, or nothing."""

    def give(connection):
        times.append(time.monotonic())
        connection.sendall(event())

    return give
