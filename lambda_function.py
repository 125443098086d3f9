"""The function: the hello-world handler that the Lambda console creates."""

import json


def lambda_handler(event, context):
    """Answers any event (dict) with a dict of HTTP status and JSON body.

    API Gateway's proxy integration expects that.
    """
    return {"statusCode": 200, "body": json.dumps("Hello from Lambda!")}
