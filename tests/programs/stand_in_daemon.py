#!/usr/bin/env python3
"""A stand-in for the Lambda Runtime API Daemon: it answers each request with what it was told."""

import http.server
import json
import os
import signal
import socket
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            broker = socket.gethostbyname("host.docker.internal")
        except OSError:
            broker = None
        told = {"environ": dict(os.environ), "argv": sys.argv, "broker": broker}
        self.wfile.write(json.dumps(told).encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass


signal.signal(signal.SIGTERM, signal.SIG_IGN if "IGNORE_SIGTERM" in os.environ else lambda *_: sys.exit())
address = os.environ.get("INVOKE_API_HOST", "0.0.0.0"), int(os.environ.get("PORT", "8080"))
http.server.HTTPServer(address, Handler).serve_forever()
