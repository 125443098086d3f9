#!/usr/bin/env bash
# SPDX-License-Identifier: MIT-0
#
# Runs the sample with this example, invokes the function, and shows what a collector gets:
#   examples/ship_logs/try.sh logs|events [PORT [OPTION]...]
# logs ships the function's log. This needs Docker, because AWS's emulator has a Telemetry API only
# while it emulates Managed Instances. events sends batches of events, with Docker or without. The
# options are those of the sample's own script.
set -euo pipefail
cd "$(dirname "$0")/../.."

what=${1:-}
port=${2:-8080}
if [[ $what != logs && $what != events || ! $port =~ ^[0-9]+$ ]]; then
    echo "usage: $0 logs|events [PORT [OPTION]...]" >&2
    exit 2
fi
shift $(($# > 1 ? 2 : 1))
name=$(basename "$(dirname ./*/extension.py)")

# A copy of the sample, with this example in it.
copy=$(mktemp -d)
trap 'rm -rf "$copy"; kill "${invoker:-}" 2>/dev/null || true' EXIT
cp -R Dockerfile template.yaml ./*.sh ./*.txt ./*.py scripts extensions "$name" "$copy"
cp examples/ship_logs/*.py "$copy/$name"
options=(-p "$port")
if [ "$what" = logs ]; then
    options+=(--docker)
    export AWS_LAMBDA_MAX_CONCURRENCY=1
else
    cat >"$copy/$name/extension.py" <<'PYTHON'
from batches import Batches

batches = Batches()
init = batches.start


def process(event):
    batches.add(event)
    batches.send(event)
PYTHON
fi
cat >"$copy/lambda_function.py" <<'PYTHON'
def lambda_handler(event, context):
    print("Hello from the function's log:", event)
    return "Hello from Lambda!"
PYTHON
# The collector runs in the extension's own process, so that nothing has to be set up for it.
cat >"$copy/$name/main.py" <<'PYTHON'
import os
import threading
from http.server import ThreadingHTTPServer

from collector import Collector
from lifecycle import main

server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
threading.Thread(target=server.serve_forever).start()
os.environ["COLLECTOR_URL"] = f"http://127.0.0.1:{server.server_port}"
main()
PYTHON

if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
    echo "$0: port $port is in use; choose another one" >&2
    exit 1
fi
while sleep 1; do
    curl --silent --output /dev/null --noproxy '*' -H 'Content-Type: application/json' \
        "http://127.0.0.1:$port/2015-03-31/functions/function/invocations" -d '{"key": "value"}' ||
        true # the emulator has not started yet
done &
invoker=$!
echo "$0: invoking once a second; what the collector gets appears after 10 seconds"
"$copy/$name.sh" "${options[@]}" "$@"
