"""A Lambda external extension. process() is your code; main() is the lifecycle around it."""

import json
import os
import signal
import sys

from extensions_api import INVOKE, SHUTDOWN, ExtensionsApi, ExtensionsApiError

# Lambda knows an extension by the name of its file in /opt/extensions; this folder has the same name.
NAME = os.path.basename(os.path.dirname(os.path.abspath(__file__)))
SHUTDOWN_SECONDS = 1.5  # Lambda allows 2 and reserves up to 0.3 of them for the runtime


def process(event):
    """Your code goes here. Lambda sends an INVOKE event with every invocation, and SHUTDOWN as the last one.

    event is a dict with the keys of "Next" in https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html;
    it carries no payload. The environment takes no further invocation until process() returns, and that time counts
    towards the function's Timeout and the bill. Threads must be daemons: Python waits for any other before it exits.
    """
    log(f"Received event: {json.dumps(event)}")


def log(message, stream=sys.stdout):
    """Writes one line (str) to standard output or error, which Lambda sends to CloudWatch Logs."""
    try:
        os.write(stream.fileno(), f"[{NAME}] {message}\n".encode(errors="backslashreplace"))
    except (OSError, AttributeError):
        pass  # a lost log line must not stop the extension


def main():
    """Registers, then processes events until SHUTDOWN. Exits with 0, or with 1 after showing and reporting an error."""
    api = ExtensionsApi(NAME)
    status, busy, stopping = 0, False, False

    def stop(signum, frame):
        nonlocal stopping
        if stopping or not busy:
            os._exit(status)  # sys.exit() has no effect in a finalizer
        stopping = True
        signal.setitimer(signal.ITIMER_REAL, SHUTDOWN_SECONDS)

    for signum in signal.SIGTERM, signal.SIGINT, signal.SIGALRM:
        signal.signal(signum, stop)

    try:
        api.register()
        log(f"Registered with ID: {api.identifier}")
        for event in api.events():
            busy = True
            if event["eventType"] in (INVOKE, SHUTDOWN):
                process(event)
            else:
                log(f"Ignored an unknown event: {json.dumps(event)}")
            busy = False
            if stopping:
                break
    except Exception as error:
        busy, status = True, 1  # a signal now must not end it before the error is shown
        if isinstance(error, ExtensionsApiError):
            log(error, sys.stderr)
        else:
            sys.excepthook(*sys.exc_info())  # a bug in process(), with its traceback
        api.report(error)
        raise SystemExit(status) from error


if __name__ == "__main__":
    main()
