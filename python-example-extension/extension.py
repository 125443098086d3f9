#!/usr/bin/env python3
"""A Lambda external extension. process() is your code; main() is the lifecycle around it."""

import json
import os
import signal
import sys

from extensions_api import INVOKE, SHUTDOWN, ExtensionsApi, ExtensionsApiError

# Lambda knows an extension by the name of its file in /opt/extensions; this folder has the same name.
NAME = os.path.basename(os.path.dirname(os.path.abspath(__file__)))
SHUTDOWN_SECONDS = 2  # what Lambda allows an extension to shut down in


def process(event):
    """Your code goes here. It gets each event, a dict, as soon as Lambda sends it.

    An INVOKE event comes with every invocation of the function and names it by its requestId. A SHUTDOWN event is the
    last one, with a shutdownReason: the place to send what is still buffered. The keys are those of "Next" in
    https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
    """
    log(f"Received event: {json.dumps(event)}")


def log(message):
    """Writes one line (str) to standard output, which Lambda sends to CloudWatch Logs."""
    try:
        os.write(sys.stdout.fileno(), f"[{NAME}] {message}\n".encode(errors="backslashreplace"))
    except (OSError, AttributeError):
        pass  # nobody reads the log (any more), which is no reason to stop


def main():
    """Registers, then processes events until SHUTDOWN. Exit status 0, or 1 after an error, which Lambda is told of."""
    api = ExtensionsApi(NAME)
    stopping = False

    def stop(signum, frame):
        nonlocal stopping
        if api.waiting or stopping:
            sys.exit(0)
        stopping = True  # process() may finish, but not for longer than a shutdown may take
        signal.alarm(SHUTDOWN_SECONDS)

    for signum in signal.SIGTERM, signal.SIGINT, signal.SIGALRM:
        signal.signal(signum, stop)

    try:
        api.register()
        log(f"Registered with ID: {api.identifier}")
        while not stopping:
            event = api.next_event()
            if event["eventType"] in (INVOKE, SHUTDOWN):
                process(event)
            else:
                log(f"Passed over an unknown event: {json.dumps(event)}")
            if event["eventType"] == SHUTDOWN:
                return
    except ExtensionsApiError as error:
        api.report(error)
        sys.exit(f"[{NAME}] {error}")
    except Exception as error:  # a bug in process()
        api.report(error)
        raise


if __name__ == "__main__":
    main()
