# SPDX-License-Identifier: MIT-0
"""Your extension: write init(), which runs once, and process(), which gets each event."""

from lifecycle import log, run  # first: it catches signals, and other imports may take long

# isort: split
import json


def init() -> None:
    """Gets ready. Lambda sends no invocation before init() returns.

    The extensions and the function share 10 seconds to get ready. If that is not enough, Lambda
    starts all of them again at the first invocation, within the function's timeout, so init() may
    run twice. Provisioned concurrency, SnapStart and Managed Instances allow more time:
    https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtime-environment.html
    """


def process(event: dict) -> None:
    """Takes an INVOKE event at every invocation, while the handler runs, and SHUTDOWN in the end.

    Managed Instances have no INVOKE event.

    The environment takes no further invocation until process() returns, and that time counts
    towards the function's timeout and the bill.

    Once process() has returned from SHUTDOWN, nothing else runs, neither threads nor atexit
    functions. A signal also leads to SHUTDOWN. The extension then ends within 1.5 seconds of the
    signal, even if process() has not returned, or has not yet been given SHUTDOWN.

    An event is one of these dicts. It does not contain the invocation's payload. (See "Next" in
    https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html)

        {"eventType": "INVOKE",
         "deadlineMs": 1795773542898,  # when the function's timeout ends, in Unix time
         "requestId": "3da1f2dc-3222-475e-9205-e2e6c6318895",
         "invokedFunctionArn": "arn:aws:lambda:eu-central-1:123456789012:function:my-function",
         "tracing": {"type": "X-Amzn-Trace-Id", "value": "Root=1-5f35ae12-0c0fec14…"}}

        {"eventType": "SHUTDOWN",
         "deadlineMs": 1795773542898,  # when the extension is killed
         "shutdownReason": "spindown"}  # or another reason, or the name of a signal
    """
    log(f"Received event: {json.dumps(event)}")


if __name__ == "__main__":  # and not when multiprocessing imports this file
    run(process, init)
