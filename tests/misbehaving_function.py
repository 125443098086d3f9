"""A function that does to its environment what the event says; it takes the place of lambda_function.py in tests."""

import importlib
import os
import time


def lambda_handler(event, context):
    if "sleep" in event:
        time.sleep(event["sleep"])
    if "exit" in event:
        os._exit(event["exit"])
    if "raise" in event:
        raise ValueError(event["raise"])
    if "import" in event:
        return str(importlib.import_module(event["import"]))
    if "list" in event:
        return os.listdir(event["list"])
    if "environ" in event:
        return dict(os.environ)
    return event
