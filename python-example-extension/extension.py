# SPDX-License-Identifier: MIT-0
"""Your extension: process() gets each event, and init() prepares what it needs."""

import json

from lifecycle import log


def init() -> None:
    """Prepares what process() needs. Lambda sends no invocation until it returns. Optional.

    The extensions and the function have 10 seconds in total to initialize. If that is not enough,
    Lambda starts all of them again at the first invocation, within the function's timeout, so
    init() may run twice. Provisioned concurrency and Managed Instances allow more time:
    https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtime-environment.html
    """


def process(event: dict) -> None:
    """Processes an INVOKE event for every invocation, and one SHUTDOWN event at the end.

    It runs at the same time as the handler. The environment takes no further invocation until
    process() returns, and that time is billed, and counts towards the function's timeout.

    Once process() has returned from SHUTDOWN, nothing else runs, neither threads nor atexit
    functions. SIGTERM and SIGINT lead to SHUTDOWN, too. Managed Instances send SHUTDOWN alone.

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
