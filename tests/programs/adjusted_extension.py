"""Runs an example's extension.py, here named example.py, as the test wants it.

It takes the place of extension.py. adjustments.json has values for names in batches.py; the name of
a format; and how many times as fast the time limits of connections pass.
"""

import json
import socket
from pathlib import Path

import batches
import formats

adjustments = json.loads(Path(__file__).with_name("adjustments.json").read_text())
speed = adjustments.pop("speed")
format_name = adjustments.pop("format_name")
for name, value in adjustments.items():
    setattr(batches, name, value)

real_bind, real_settimeout = socket.socket.bind, socket.socket.settimeout


def bind_to_loopback(self, address):
    """On Lambda, the example must listen on all addresses."""
    host, port = address
    assert host == "", "Lambda could not reach it"
    real_bind(self, ("127.0.0.1", port))


def settimeout(self, seconds):
    real_settimeout(self, seconds and seconds / speed)


socket.socket.bind = bind_to_loopback
socket.socket.settimeout = settimeout

import example  # noqa: E402
from example import init, process  # noqa: E402, F401

if format_name:
    example.batches = batches.Batches(getattr(formats, format_name))
