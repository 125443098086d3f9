"""A function that evaluates what its event says, in Python.

It takes the place of lambda_function.py in tests.
"""

import os  # noqa: F401
import time  # noqa: F401


def lambda_handler(event, context):
    return eval(event["do"]) if "do" in event else event
