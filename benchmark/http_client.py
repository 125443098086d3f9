"""The floor for Python: http.client, one TCP connection, nothing checked."""

import http.client
import json
import os

NAME = os.path.basename(os.path.dirname(__file__))
API = "/2020-01-01/extension"

connection = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
events = json.dumps({"events": ["INVOKE", "SHUTDOWN"]})
connection.request("POST", f"{API}/register", events, {"Lambda-Extension-Name": NAME})
registered = connection.getresponse()
registered.read()
headers = {"Lambda-Extension-Identifier": registered.headers["Lambda-Extension-Identifier"]}
event = {"eventType": None}
while event["eventType"] != "SHUTDOWN":
    connection.request("GET", f"{API}/event/next", headers=headers)
    event = json.loads(connection.getresponse().read())
    print(f"[{NAME}] Received event: {json.dumps(event)}", flush=True)
