"""Sends the extension in the folder of its argument SIGTERM at any moment between its second event and its third.

At each of its lines, and in each function that these call, a fork gets the signal. Prints how each of them ended, as
JSON: {"file:line what": "exit status, events got"}.
"""

import json
import os
import signal
import sys
import time

sys.path.insert(0, sys.argv[1])
import lifecycle

endings, events, got = {}, [], []


def ending(pid, pipe):
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return f"{os.waitstatus_to_exitcode(status)} {os.read(pipe, 100).decode()}"
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "still there after 5 seconds"


def trace(frame, what, argument):
    if frame.f_code.co_filename == __file__:
        return None
    file, own = frame.f_code.co_filename, frame.f_code.co_filename.startswith(sys.argv[1])
    place = f"{file}:{frame.f_lineno if own else frame.f_code.co_name} {what}"
    if place not in endings:
        reader, writer = os.pipe()
        handler = signal.getsignal(signal.SIGTERM)
        pid = os.fork()
        if pid == 0:
            sys.settrace(None)
            got.append(writer)
            # A fork ends by its own signals, but this one stands for its parent, and must not tell it.
            signal.signal(signal.SIGTERM, handler)
            signal.set_wakeup_fd(-1)
            os.kill(os.getpid(), signal.SIGTERM)
            return None
        os.close(writer)
        endings[place] = ending(pid, reader)
        os.close(reader)
    return trace


def process(event):
    if got:
        os.write(got[0], event["eventType"].encode())
        return
    events.append(event)
    if len(events) == 2:  # after the import of requests, which has too many lines
        sys.settrace(trace)
        sys._getframe(1).f_trace = trace
    elif len(events) == 3:
        sys.settrace(None)
        print(json.dumps(endings))
        os._exit(0)


lifecycle.run(process)
