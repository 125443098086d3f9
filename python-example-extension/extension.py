"""Your extension: Lambda runs init() once, and process() beside the function."""

import json

from lifecycle import log, run


def init():
    """Gets ready.

    Lambda sends no invocation before it returns, but ends an init phase that takes 10 seconds.
    """


def process(event):
    """Takes an INVOKE event with every invocation, and SHUTDOWN as the last one.

    SHUTDOWN comes also when a signal ends the extension. event is a dict, "Next" in
    https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html; it carries no
    payload. The environment takes no further invocation until process() returns, and that time
    counts towards the function's Timeout and the bill. After SHUTDOWN nothing runs any more,
    neither threads nor atexit functions.
    """
    log(f"Received event: {json.dumps(event)}")


run(process, init)
