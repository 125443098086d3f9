"""A function that does to its environment what the event says; it takes the place of lambda_function.py in tests."""

import os
import time


def lambda_handler(event, context):
    if "sleep" in event:
        time.sleep(event["sleep"])
    if "raise" in event:
        raise ValueError(event["raise"])
    if "exit" in event:
        os._exit(event["exit"])
    if "environ" in event:
        return dict(os.environ)
    return event
