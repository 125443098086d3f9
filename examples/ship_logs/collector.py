# SPDX-License-Identifier: MIT-0
"""A collector to try the example with: prints each record that it gets, on a line of its own."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Collector(BaseHTTPRequestHandler):
    """Takes JSON arrays."""

    def do_POST(self):
        """Prints the records of one request, and answers 200."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for record in json.loads(body):
            print(json.dumps(record), flush=True)
        self.send_response_only(200)
        self.end_headers()


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Collector).serve_forever()
