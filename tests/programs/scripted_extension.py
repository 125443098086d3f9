"""An extension that runs the Python code that it is given. It takes the place of extension.py.

The code is in an event's "do", or in the environment variables AT_IMPORT, AT_INIT, AT_INVOKE and
AT_SHUTDOWN. It can call what is defined here.
"""

import json
import multiprocessing
import os
import signal  # noqa: F401
import sys  # noqa: F401
import threading
import time

import lifecycle
from lifecycle import log


def execute(code, event=None):
    exec(code or "", {**globals(), "event": event})  # noqa: S102


def is_first_time(folder):
    """Whether this is the first call with that folder, which it creates in order to remember."""
    if os.path.exists(folder):
        return False
    os.makedirs(folder)
    return True


def wait_for(file):
    """Waits until the file exists. What follows a signal may then take long on a busy machine."""
    lifecycle.SHUTDOWN_SECONDS = 60
    log("Begun")
    while not os.path.exists(file):
        time.sleep(0.01)
    log("Ended")


def log_in_threads():
    """Logs 8 times 200 lines."""

    def write():
        for _ in range(200):
            log("x" * 100)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def fork(code, signum=None):
    """Runs the code in a forked child, sends it the signal, if any, and logs its exit status."""
    pid = os.fork()
    if pid == 0:
        exec(code)  # noqa: S102
        return
    if signum:
        os.kill(pid, signum)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    log(f"The child exited with {status}")


def start_processes(method):
    """Starts one process that ends by itself, and one that is terminated at once."""
    context = multiprocessing.get_context(method)
    ends = context.Process(target=print, args=["Hello from the child"])
    ends.start()
    ends.join()
    sleeps = context.Process(target=time.sleep, args=[60])
    sleeps.start()
    sleeps.terminate()
    sleeps.join()
    log(f"The children exited with {ends.exitcode} and {sleeps.exitcode}")


execute(os.environ.get("AT_IMPORT"))


def init():
    execute(os.environ.get("AT_INIT"))


def process(event):
    log(f"Received event: {json.dumps(event)}")
    event_type = event["eventType"]  # now, because the code may change the event
    execute(event.get("do"), event)
    execute(os.environ.get(f"AT_{event_type}"), event)
    log("Done")
