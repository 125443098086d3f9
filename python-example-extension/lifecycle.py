# SPDX-License-Identifier: MIT-0
"""The lifecycle of an extension: it registers, initializes, processes events, and exits.

https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtime-environment.html
"""

import contextlib
import os
import signal
import sys
import threading
import time

from extensions_api import SHUTDOWN, ExtensionsApi, ExtensionsApiError

# Lambda knows an extension by the name of its file in /opt/extensions. This folder has that name.
NAME = os.path.basename(os.path.dirname(os.path.abspath(__file__)))

# The signals that ask the extension to exit. They come from a container engine, an emulator or
# Ctrl-C; Lambda itself sends a SHUTDOWN event.
SIGNALS = (signal.SIGTERM, signal.SIGINT)

# How long the extension may take to exit after a signal. Lambda allows 2 seconds after a SHUTDOWN
# event, and keeps up to half a second of them for the function's runtime:
# https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
SHUTDOWN_SECONDS = 1.5

# Your code may fork. The child is another process, and not the extension.
PROCESS_ID = os.getpid()

api = ExtensionsApi(NAME)


def main() -> None:
    """Registers, imports extension.py, calls its init() and, for each event, its process(event).

    The last event is SHUTDOWN. Then the process exits with status 0, or after an exception with 1.
    Before that, it prints the exception to standard error, and reports it to Lambda. An error of
    the Extensions API and sys.exit("reason") take one line, anything else comes with a traceback.
    """
    # What cannot be encoded must not stop the extension.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore
    lifecycle = Lifecycle()
    for signum in SIGNALS:
        signal.signal(signum, lifecycle.on_signal)
    os.register_at_fork(
        before=block_signals, after_in_parent=unblock_signals, after_in_child=restore_signals
    )
    exit_after(lifecycle.process_events)


def log(message: object) -> None:
    """Writes a message to standard output, which Lambda sends to CloudWatch Logs.

    CloudWatch makes each line of it a log event of its own.
    """
    write_line(sys.stdout, message)


class Lifecycle:
    """Calls init() and process(event) as Lambda's events, or a signal, demand."""

    def __init__(self):
        self.process = None  # from extension.py, once that has been imported
        self.waits_for_event = False  # if so, neither init() nor process() is running
        self.signal_event = None  # once a signal has come, the SHUTDOWN event that stands for it

    def process_events(self):
        """Gets ready, and processes one event after the other until SHUTDOWN."""
        log(f"Registered with ID: {api.register()}")
        # Lambda starts the function's runtime now. Whatever takes long comes below this line.
        import extension

        self.process = extension.process
        api.open_session()
        if hasattr(extension, "init"):
            extension.init()
        event_type = None
        while event_type != SHUTDOWN:
            event = self.next_event()
            event_type = event["eventType"]  # now, because process() may change the event
            self.process(event)

    def next_event(self):
        """Returns the event for a signal that has come, or else waits for Lambda's next one."""
        if os.getpid() != PROCESS_ID:
            sys.exit()  # a child has returned from your code, and events are not for it
        # Set this before looking at signal_event, so that a signal in between is handled, too.
        self.waits_for_event = True
        try:
            return self.signal_event or api.next_event()
        finally:
            self.waits_for_event = False

    def on_signal(self, signum, frame):
        """Handles a signal. Python calls it in the middle of what the main thread is doing.

        If the main thread is waiting for an event, this processes SHUTDOWN and exits. If it is
        doing something else, such as process(), next_event() returns SHUTDOWN afterwards.
        """
        if self.signal_event:
            return
        self.signal_event = {
            "eventType": SHUTDOWN,
            "shutdownReason": signal.Signals(signum).name,
            "deadlineMs": int((time.time() + SHUTDOWN_SECONDS) * 1000),
        }
        threading.Timer(SHUTDOWN_SECONDS, os._exit, [0]).start()
        if self.waits_for_event:
            exit_after(self.process, self.signal_event)


def block_signals():
    """Keeps signals pending while your code forks. Python would drop those that are for the child.

    A library may terminate a child at once, and then wait for its end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def unblock_signals():
    """Lets signals come again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def restore_signals():
    """Lets SIGTERM and SIGINT end a child that your code forks, as they end any program."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    unblock_signals()


def exit_after(task, *arguments):
    """Calls task(*arguments) and exits: with status 0, or as fail_with() does if the task raises.

    os._exit() exits at once. sys.exit() would wait for threads, and could be stopped by a signal.
    """
    try:
        task(*arguments)
    except BaseException as error:  # sys.exit(), too: only SHUTDOWN is a proper end
        if os.getpid() != PROCESS_ID:
            raise  # a child exits as any program does
        fail_with(error)
    os._exit(0)


def fail_with(error: BaseException) -> None:
    """Prints an exception to standard error, reports it to Lambda, and exits with status 1."""
    import traceback  # importing it takes a while, and it is seldom needed

    details = traceback.TracebackException.from_exception(error)
    message = str(details)
    stack_trace = details.stack.format()
    shown = "".join(details.format()).rstrip()
    has_reason = isinstance(error, SystemExit) and isinstance(error.code, str)
    if isinstance(error, ExtensionsApiError) or has_reason:  # the message says what is wrong
        stack_trace = []
        shown = message
    write_line(sys.stderr, shown)
    api.report(type(error).__name__, message, stack_trace)
    os._exit(1)


def write_line(stream, message):
    """Writes a line with this extension's name to a text stream.

    One call writes all of it, so that lines of several threads do not mix. A line that cannot be
    written, for example on a full disk, must not stop the extension.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: your code has closed the stream
        stream.write(f"[{NAME}] {message}\n")
        stream.flush()
