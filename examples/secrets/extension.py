# SPDX-License-Identifier: MIT-0
"""Fetches a secret from SECRET_URL, and keeps it in a file for the function.

The handler reads the file at each invocation. If the function's module needs the secret while it is
imported, call init() in main.py, before main(): the function then starts only afterwards. Managed
Instances have no INVOKE events: there, fetch the secret again in a thread.
"""

import os
import tempfile
import time

import requests
from lifecycle import log

# Where the function finds the secret. Only its owner can read the file: on Lambda, the function and
# the extension run as the same user.
SECRET_FILE = "/tmp/secret"

# How old the secret can get, and how long to wait for a new one.
MAX_AGE_SECONDS = 300
TIMEOUT_SECONDS = 2

fetched_at = 0.0  # by the wall clock, which keeps running while Lambda freezes the environment


def init() -> None:
    """Fetches the secret before the first invocation. If that fails, so does the cold start."""
    global fetched_at
    response = requests.get(os.environ["SECRET_URL"], timeout=TIMEOUT_SECONDS)
    response.raise_for_status()
    # A new file replaces the old one at once, so that nobody reads half of it. mkstemp() lets
    # nobody else read it.
    file, path = tempfile.mkstemp(dir=os.path.dirname(SECRET_FILE))
    with os.fdopen(file, "wb") as new:
        new.write(response.content)
    os.replace(path, SECRET_FILE)
    fetched_at = time.time()


def process(event: dict) -> None:
    """Fetches the secret again when it is old, while the handler runs with the old one."""
    if event["eventType"] == "INVOKE" and time.time() - fetched_at > MAX_AGE_SECONDS:
        try:
            init()
        except requests.RequestException as error:
            log(f"Keeping the old secret: {type(error).__name__}")
