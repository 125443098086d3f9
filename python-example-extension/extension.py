# SPDX-License-Identifier: MIT-0
"""Your extension: init() prepares it, and process() handles each event."""

import json

from lifecycle import log


def init() -> None:
    """Prepares what process() needs, before the first invocation. You can leave init() out.

    The extensions and the function have 10 seconds in total to initialize. If they take longer,
    Lambda starts them all again at the first invocation, within the function's timeout, so init()
    can run twice. Provisioned concurrency and Managed Instances allow more time:
    https://docs.aws.amazon.com/lambda/latest/dg/lambda-runtime-environment.html
    """


def process(event: dict) -> None:
    """Handles an INVOKE event for every invocation, and one SHUTDOWN event at the end.

    It runs in parallel with the function's handler. The environment accepts no further invocation
    until process() returns. That time is billed, and counts towards the function's timeout.

    After process() has returned from SHUTDOWN, nothing else runs: no threads, no atexit functions.
    SIGTERM and SIGINT cause SHUTDOWN, too. On Managed Instances, SHUTDOWN is the only event.

    An event is one of these dicts, without the invocation's payload. (See "Next" in
    https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html)

        {"eventType": "INVOKE",
         "deadlineMs": 1795773542898,  # when the function times out, in Unix time
         "requestId": "3da1f2dc-3222-475e-9205-e2e6c6318895",
         "invokedFunctionArn": "arn:aws:lambda:eu-central-1:123456789012:function:my-function",
         "tracing": {"type": "X-Amzn-Trace-Id", "value": "Root=1-5f35ae12-0c0fec14…"}}

        {"eventType": "SHUTDOWN",
         "deadlineMs": 1795773542898,  # when the extension is killed
         "shutdownReason": "spindown"}  # or another reason, or a signal, such as "SIGTERM"
    """
    log(f"Received event: {json.dumps(event)}")
