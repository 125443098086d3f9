"""The plainest extension: requests.get() for every event, as in AWS's example.

Each request opens a new TCP connection.
"""

import json
import os
from pathlib import Path

import requests

NAME = Path(__file__).parent.name
API = f"http://{os.environ['AWS_LAMBDA_RUNTIME_API']}/2020-01-01/extension"

events = {"events": ["INVOKE", "SHUTDOWN"]}
registered = requests.post(f"{API}/register", json=events, headers={"Lambda-Extension-Name": NAME})
headers = {"Lambda-Extension-Identifier": registered.headers["Lambda-Extension-Identifier"]}
event = {"eventType": None}
while event["eventType"] != "SHUTDOWN":
    event = requests.get(f"{API}/event/next", headers=headers).json()
    print(f"[{NAME}] Received event: {json.dumps(event)}", flush=True)
