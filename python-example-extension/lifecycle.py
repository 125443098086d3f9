# SPDX-License-Identifier: MIT-0
"""The lifecycle of an extension: it registers, initializes, takes event after event, and ends.

https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtime-environment.html
"""

import signals  # first: it catches signals, and the other imports take a while

# isort: split
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable

from extensions_api import INVOKE, SHUTDOWN, ExtensionsApi, ExtensionsApiError

# Lambda knows an extension by the name of its file in /opt/extensions. This folder has that name.
NAME = os.path.basename(os.path.dirname(os.path.abspath(__file__)))


def duplicate(stream):
    """Returns another descriptor (int) of a stream, or None for a stream that is None.

    A standard stream is None if it was closed when Python started.
    """
    return None if stream is None else os.dup(stream.fileno())


# log() writes to a duplicate. If it wrote to descriptor 1, and your code closed that, the next
# connection to Lambda could get number 1, and receive the lines.
STANDARD_OUTPUT = duplicate(sys.stdout)
STANDARD_ERROR = duplicate(sys.stderr)

# Closed when something fails. Otherwise a process that has used up its descriptors could neither
# import what shows the error nor connect to Lambda.
SPARE_DESCRIPTOR = os.open(os.devnull, os.O_RDONLY)

api = ExtensionsApi(NAME)


def run(process: Callable[[dict], object], init: Callable[[], object] | None = None) -> None:
    """Registers, calls init(), then process(event) for each event, and exits with status 0.

    The last event is SHUTDOWN. SIGTERM and SIGINT lead to one, too.

    After an exception it exits with status 1. Before that, it shows the exception and reports it to
    Lambda. An error of the Extensions API and sys.exit("reason") come without a traceback, anything
    else comes with one.
    """
    extension = Extension(process, init)
    signals.set_signal_handler(extension.on_signal)
    end_with(extension.process_events)


def log(message: object) -> None:
    """Writes a line to standard output, which Lambda sends to CloudWatch Logs."""
    write(STANDARD_OUTPUT, message)


class Extension:
    """Calls init() and process(event) as Lambda's events, or a signal, demand."""

    def __init__(self, process, init):
        self.process = process
        self.init = init
        self.waits_for_event = False  # if so, the main thread runs neither init() nor process()
        self.signal_event = None  # once a signal has come, the SHUTDOWN event that stands for it

    def process_events(self):
        """Gets ready, and processes one event after the other until SHUTDOWN."""
        log(f"Registered with ID: {api.register()}")
        api.open_session()  # while Lambda starts the function's runtime
        if self.init:
            self.init()
        event_type = None
        while event_type != SHUTDOWN:
            event = self.next_event()
            event_type = event["eventType"]  # now, because process() may change the event
            if event_type in (INVOKE, SHUTDOWN):
                self.process(event)
            else:
                log(f"Ignored an unknown event: {event_type[:100]!r}")

    def next_event(self):
        """Returns the event for a signal that has come, or else waits for Lambda's next one."""
        if signals.is_fork:
            sys.exit()  # your code has forked, and the child has returned: events are not for it
        # Set this before looking at signal_event, so that a signal in between is handled, too.
        self.waits_for_event = True
        try:
            return self.signal_event or api.next_event()
        finally:
            self.waits_for_event = False

    def on_signal(self, signum, frame):
        """Handles a signal. Python calls it in the middle of what the main thread is doing.

        If the main thread is waiting for an event, this processes SHUTDOWN and ends the process. If
        it is doing something else, such as process(), next_event() returns SHUTDOWN afterwards.
        """
        # A library such as asyncio may have kept Python from telling the watchdog.
        signals.limit_time(signum)
        if self.signal_event:
            return
        self.signal_event = {
            "eventType": SHUTDOWN,
            "shutdownReason": signal.Signals(signum).name,
            "deadlineMs": int((time.time() + signals.SHUTDOWN_SECONDS) * 1000),
        }
        if self.waits_for_event:
            end_with(self.process, self.signal_event)


def end_with(task, *arguments):
    """Calls task(*arguments) and ends the process: with 0, or with 1 if the task raises something.

    os._exit() ends it at once. Python's own end would wait for threads, and run code that a signal
    could interrupt.
    """
    try:
        task(*arguments)
    except BaseException as error:  # also sys.exit(), since only SHUTDOWN is a proper end
        if signals.is_fork:
            raise  # your code has forked: the child ends as any Python program does
        fail_with(error)
    os._exit(0)


def fail_with(error):
    """Shows an exception, reports it to Lambda, and ends the process with 1, whatever happens."""
    signals.limit_time(signals.FAILURE)
    try:
        with contextlib.suppress(OSError):  # your code may have closed it
            os.close(SPARE_DESCRIPTOR)
        text, stack_trace, shown = description_of(error)
        write(STANDARD_ERROR, shown)
        api.report(type(error).__name__, text, stack_trace)
    finally:
        os._exit(1)


def description_of(error):
    """Returns an exception's text (str), its stack trace (list of str), and what to show (str)."""
    import traceback  # importing it takes long, and it is seldom needed

    try:
        details = traceback.TracebackException.from_exception(error)
        text = str(details)
        stack_trace = details.stack.format()
        shown = "".join(details.format()).rstrip()
    except Exception:  # the exception's own methods may fail
        text = f"an exception that cannot be shown: {type(error).__name__}"
        stack_trace = traceback.format_tb(error.__traceback__)
        shown = f"{text}\n{''.join(stack_trace)}".rstrip()
    has_reason = isinstance(error, SystemExit) and isinstance(error.code, str)
    if isinstance(error, ExtensionsApiError) or has_reason:
        return text, [], text
    return text, stack_trace, shown


def write(descriptor, message):
    """Writes a line with this extension's name to a descriptor (int), or nowhere if it is None."""
    if descriptor is None:
        return
    line = f"[{NAME}] {message}\n".encode(errors="backslashreplace")
    with contextlib.suppress(OSError):  # a lost line must not stop the extension
        while line:
            written = os.write(descriptor, line)
            line = line[written:]
