# SPDX-License-Identifier: MIT-0
"""The function: the hello-world handler that the Lambda console creates."""

import json


def lambda_handler(event, context):
    """Answers any event with an HTTP response as API Gateway's proxy integration expects it.

    event is what the caller sent, from JSON. The answer is a dict that becomes JSON.
    """
    return {"statusCode": 200, "body": json.dumps("Hello from Lambda!")}
