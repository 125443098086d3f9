"""The function: the hello-world handler that the Lambda console creates."""

import json


def lambda_handler(event, context):
    """Answers any event (dict) with a dict of HTTP status and JSON body, as API Gateway's proxy integration expects."""
    return {"statusCode": 200, "body": json.dumps("Hello from Lambda!")}
