# SPDX-License-Identifier: MIT-0
"""A collector to try the example with: prints each record that it gets, on a line of its own.

    python3 collector.py [ADDRESS:]PORT

It listens on loopback, where no container reaches it, unless an address such as 0.0.0.0 is given.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Collector(BaseHTTPRequestHandler):
    """Accepts JSON arrays."""

    def do_POST(self):
        """Prints the records of one request, and answers 200."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for record in json.loads(body):
            print(json.dumps(record), flush=True)
        self.send_response_only(200)
        self.end_headers()


if __name__ == "__main__":
    address, _, port = sys.argv[1].rpartition(":")
    ThreadingHTTPServer((address or "127.0.0.1", int(port)), Collector).serve_forever()
