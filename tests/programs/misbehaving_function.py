"""A function that does to its environment what the event says; it takes the place of lambda_function.py in tests."""

import importlib
import os
import time


def lambda_handler(event, context):
    time.sleep(event.get("sleep", 0))
    if "exit" in event:
        os._exit(event["exit"])
    if "raise" in event:
        raise ValueError(event["raise"])
    if "import" in event:
        return str(importlib.import_module(event["import"]))
    if "list" in event:
        return os.listdir(event["list"])
    return dict(os.environ) if "environ" in event else event
