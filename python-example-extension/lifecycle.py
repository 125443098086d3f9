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

# Lambda knows an extension by its file's name in /opt/extensions. This folder has the same name.
NAME = os.path.basename(os.path.dirname(os.path.abspath(__file__)))

# The signals that ask the extension to exit. They come from a container engine, an emulator or
# Ctrl-C; Lambda itself sends a SHUTDOWN event.
SIGNALS = (signal.SIGTERM, signal.SIGINT)

# How long the extension may take to exit after a signal. Lambda allows 2 seconds after a SHUTDOWN
# event, and reserves up to half a second of that for the function's runtime:
# https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
SHUTDOWN_SECONDS = 1.5

# If your code forks, the child has another process ID, and must not act as the extension.
PROCESS_ID = os.getpid()

api = ExtensionsApi(NAME)


def main() -> None:
    """Registers, imports extension.py, calls init(), and then process() for each event.

    The last event is SHUTDOWN. Then the program exits with status 0, or with 1 after an exception,
    which it first prints to standard error and reports to Lambda. Errors of the Extensions API and
    sys.exit("reason") take one line. Anything else comes with a traceback.
    """
    # Escape what cannot be encoded, instead of raising an exception.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore
    lifecycle = Lifecycle()
    for signum in SIGNALS:
        signal.signal(signum, lifecycle.on_signal)
    os.register_at_fork(
        before=block_signals, after_in_parent=unblock_signals, after_in_child=restore_signals
    )
    run_and_exit(lifecycle.process_events)


def log(message: object) -> None:
    """Writes a message to standard output, which Lambda sends to CloudWatch Logs.

    CloudWatch stores each line as a log event of its own.
    """
    write_line(sys.stdout, message)


class Lifecycle:
    """Calls init(), and process() for each event from Lambda or a signal."""

    def __init__(self):
        self.process = None  # from extension.py, once that has been imported
        self.waits_for_event = False  # while True, neither init() nor process() is running
        self.signal_event = None  # the SHUTDOWN event for the first signal, once there was one

    def process_events(self):
        """Registers and initializes, then processes events until SHUTDOWN."""
        log(f"Registered with ID: {api.register()}")
        # Lambda starts the function's runtime now. Anything slow belongs below this line.
        import extension

        self.process = extension.process
        api.open_session()
        if hasattr(extension, "init"):
            extension.init()
        event_type = None
        while event_type != SHUTDOWN:
            event = self.next_event()
            event_type = event["eventType"]  # before process(), which may change the event
            self.process(event)

    def next_event(self):
        """Returns the event for a signal, if there was one, or else waits for Lambda's next."""
        if os.getpid() != PROCESS_ID:
            sys.exit()  # a forked child has returned from your code; events are not for it
        # Set this first, so that a signal that comes now is not missed.
        self.waits_for_event = True
        try:
            return self.signal_event or api.next_event()
        finally:
            self.waits_for_event = False

    def on_signal(self, signum, frame):
        """Handles a signal. Python calls it in the middle of what the main thread is doing.

        While that waits for an event, this processes SHUTDOWN and exits. Otherwise next_event()
        returns SHUTDOWN afterwards.
        """
        if self.signal_event:  # a second signal changes nothing
            return
        self.signal_event = {
            "eventType": SHUTDOWN,
            "shutdownReason": signal.Signals(signum).name,
            "deadlineMs": int((time.time() + SHUTDOWN_SECONDS) * 1000),
        }
        # Exit in time even if process() hangs.
        threading.Timer(SHUTDOWN_SECONDS, os._exit, [0]).start()
        if self.waits_for_event:
            run_and_exit(self.process, self.signal_event)


def block_signals():
    """Holds signals back during a fork, until the child has called restore_signals().

    Python would drop a signal to the child that comes earlier, and whoever has sent it, such as
    multiprocessing, would wait for the child's end for ever.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def unblock_signals():
    """Lets signals through again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def restore_signals():
    """Lets SIGTERM and SIGINT end a forked child, as they end any program."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)
    unblock_signals()


def run_and_exit(task, *arguments):
    """Calls task(*arguments), then exits with status 0, or through fail_with() if it raises.

    os._exit() does not wait for threads, and no signal interrupts it.
    """
    try:
        task(*arguments)
    except BaseException as error:  # even sys.exit(): only SHUTDOWN is a proper end
        if os.getpid() != PROCESS_ID:
            raise  # a child exits as any program does
        fail_with(error)
    os._exit(0)


def fail_with(error: BaseException) -> None:
    """Prints an exception to standard error, reports it to Lambda, and exits with status 1."""
    import traceback  # not at the top: it would delay the registration

    details = traceback.TracebackException.from_exception(error)  # copes with odd exceptions
    message = str(details)
    has_reason = isinstance(error, SystemExit) and isinstance(error.code, str)
    if isinstance(error, ExtensionsApiError) or has_reason:  # the message says what is wrong
        output = message
        stack_trace = []
    else:
        output = "".join(details.format()).rstrip()
        stack_trace = details.stack.format()
    write_line(sys.stderr, output)
    api.report_error(type(error).__name__, message, stack_trace)
    os._exit(1)


def write_line(stream, message):
    """Writes a message with this extension's name to a text stream.

    One write keeps the lines of several threads apart. Output that fails, for example because the
    disk is full, must not stop the extension.
    """
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        stream.write(f"[{NAME}] {message}\n")
        stream.flush()
