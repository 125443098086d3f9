#!/usr/bin/env python3
"""A stand-in for the Lambda Runtime API Daemon: it answers each request with what it was told."""

import http.server
import json
import os
import signal
import sys
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        told = {
            "environ": dict(os.environ),
            "argv": sys.argv,
            "hosts": Path("/etc/hosts").read_text(),
        }
        self.wfile.write(json.dumps(told).encode())


def end(*_):
    sys.exit("Daemon ended by SIGTERM")


signal.signal(signal.SIGTERM, end)
address = os.environ.get("INVOKE_API_HOST", "0.0.0.0"), int(os.environ.get("PORT", "8080"))
http.server.HTTPServer(address, Handler).serve_forever()
