"""A function that takes as much CPU time as its environment variables say, and answers.

START_MS is how many milliseconds at its start, FIRST_INVOCATION_MS in its first invocation.
"""

import os
import time


def spend(variable):
    """Takes the CPU time, as imports would."""
    end = time.process_time() + int(os.environ.get(variable, "0")) / 1000
    while time.process_time() < end:
        pass


def lambda_handler(event, context):
    """Answers at once, except in the first invocation."""
    global is_first
    if is_first:
        is_first = False
        spend("FIRST_INVOCATION_MS")
    return "Hello from Lambda!"


is_first = True
spend("START_MS")
