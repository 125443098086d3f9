"""Sends SIGTERM to an extension at each moment between its first event and its second.

The argument is the extension's folder. A moment is a line of the extension, or a function that a
line calls. At each of them a fork gets the signal. Prints how the forks ended, as JSON:
{"file:line what": "exit status, events got"}.
"""

import json
import os
import signal
import sys

sys.path.insert(0, sys.argv[1])
import lifecycle

endings, events, got = {}, [], []


def trace(frame, what, argument):
    file = frame.f_code.co_filename
    where = frame.f_lineno if file.startswith(sys.argv[1]) else frame.f_code.co_name
    place = f"{file}:{where} {what}"
    if file == __file__:
        return None
    if place in endings:
        return trace
    reader, writer = os.pipe()
    handler = signal.getsignal(signal.SIGTERM)
    pid = os.fork()
    if pid == 0:
        sys.settrace(None)
        got.append(writer)
        # A fork usually ends at a signal as any program does, and asks for no event. This one
        # stands for its parent, so it handles the signal, but must not tell the parent's watchdog.
        lifecycle.signals.is_fork = False
        lifecycle.signals.limit_time = lambda order: None
        signal.signal(signal.SIGTERM, handler)
        signal.alarm(5)  # it should have ended long before
        os.kill(os.getpid(), signal.SIGTERM)
        return None
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    endings[place] = f"{status} {os.read(reader, 100).decode()}"
    os.close(reader)
    return trace


def process(event):
    events.append(event)
    if got:
        os.write(got[0], event["eventType"].encode())
    elif len(events) == 1:
        sys.settrace(trace)
        sys._getframe(1).f_trace = trace
    elif len(events) == 2:
        sys.settrace(None)
        print(json.dumps(endings))
        os._exit(0)


lifecycle.run(process)
