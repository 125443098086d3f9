"""The lifecycle of an extension: it registers, initializes, processes event after event, and ends.

https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtime-environment.html
"""

import _thread
import contextlib
import os
import signal
import sys
import time

from extensions_api import ANSWER_SECONDS, INVOKE, SHUTDOWN, ExtensionsApi, ExtensionsApiError

# Lambda knows an extension by the name of its file in /opt/extensions; this folder has that name.
NAME = os.path.basename(os.path.dirname(os.path.abspath(__file__)))
SIGNALS = signal.SIGTERM, signal.SIGINT
SHUTDOWN_SECONDS = 1.5  # Lambda allows 2 and reserves up to 0.3 of them for the runtime

api = ExtensionsApi(NAME)
exit_status = 0


def run(process, init=lambda: None):
    """Registers, calls init(), then process(event) with each event (dict), and exits with 0.

    SHUTDOWN is the last event, and SIGTERM and SIGINT count as one. An exception is shown, reported
    to Lambda, and ends it with 1: an error of the API, or sys.exit("reason"), in one line, a bug
    with its traceback.
    """
    waiting = False  # for an event, so neither init() nor process() is running
    shutdown = None  # the event that a signal stands for

    def stop(signum, frame):
        nonlocal shutdown
        if shutdown:
            return
        deadline = int((time.time() + SHUTDOWN_SECONDS) * 1000)
        shutdown = {
            "eventType": SHUTDOWN,
            "shutdownReason": signal.Signals(signum).name,
            "deadlineMs": deadline,
        }
        # Otherwise process_events() takes the event next, or has failed.
        if waiting and exit_status == 0:
            end_with(lambda: process(shutdown))

    def process_events():
        nonlocal waiting
        log(f"Registered with ID: {api.register()}")
        init()
        while True:
            waiting = True
            event = shutdown or api.next_event()
            waiting = False
            event_type = event["eventType"]  # now, because process() may change the event
            if event_type in (INVOKE, SHUTDOWN):
                process(event)
            else:
                log(f"Ignored an unknown event: {event_type[:100]!r}")
            if event_type == SHUTDOWN:
                return
            if not api.session:
                api.open_session()

    catch_signals(stop)
    end_with(process_events)


def log(message, stream=sys.stdout):
    """Writes one line (str) to standard output or error, which Lambda sends to CloudWatch Logs."""
    line = f"[{NAME}] {message}\n".encode(errors="backslashreplace")
    with contextlib.suppress(OSError):  # a lost line must not stop the extension
        while stream and line:  # no stream: it was closed from the start
            line = line[os.write(stream.fileno(), line) :]


def end_with(task):
    """Calls task(), then ends the process.

    Shows what it raises, and reports it for ANSWER_SECONDS at most.
    """
    global exit_status
    try:
        task()
    except BaseException as error:
        exit_status = 1
        import traceback

        # It copes with an exception whose str() fails.
        details = traceback.TracebackException.from_exception(error)
        has_reason = isinstance(error, SystemExit) and isinstance(error.code, str)
        plain = has_reason or isinstance(error, ExtensionsApiError)
        log(details if plain else "".join(details.format()).rstrip(), sys.stderr)
        _thread.start_new_thread(exit_after, (ANSWER_SECONDS,))
        api.report(type(error).__name__, str(details), [] if plain else details.stack.format())
    os._exit(exit_status)  # Python's own end takes longer, and a signal would kill it meanwhile


def exit_after(seconds):
    """Ends the process then, whatever its main thread is doing."""
    time.sleep(seconds)
    os._exit(exit_status)


def catch_signals(stop):
    """Lets SIGTERM and SIGINT call stop(signum, frame), and end it SHUTDOWN_SECONDS later.

    Signals that a fork gets do neither.
    """

    def wait_for_signal():
        while os.read(reader, 1)[0] not in SIGNALS:
            pass  # a signal that a library catches
        exit_after(SHUTDOWN_SECONDS)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # At once, while stop() waits for the end of a call into C, such as one for DNS.
    signal.set_wakeup_fd(writer)
    _thread.start_new_thread(wait_for_signal, ())
    for signum in SIGNALS:
        signal.signal(signum, stop)
        os.register_at_fork(after_in_child=lambda each=signum: signal.signal(each, signal.SIG_DFL))
