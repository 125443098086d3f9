#!/usr/bin/env bash
# SPDX-License-Identifier: MIT-0
#
# Tries this example: runs the sample with it, invokes the function, and shows what a collector in
# the same container gets. This script takes the options of the sample's own run script.
set -euo pipefail
cd "$(dirname "$0")/../.."

extension=$(echo ./*/extension.py)
name=$(basename "$(dirname "$extension")")
copy=$(mktemp -d)
run=''

finish() {
    if [ -n "$run" ]; then
        kill "$run" 2>/dev/null || true
        wait "$run" || true
    fi
    rm -rf "$copy"
}
trap finish EXIT
trap 'exit 0' INT TERM

# A copy of the sample, with this extension in it, and a function that logs something.
cp -R Dockerfile template.yaml ./*.sh ./*.txt ./*.py scripts extensions "$name" "$copy"
cp examples/ship_logs/*.py "$copy/$name"
cat >"$copy/lambda_function.py" <<'END'
def lambda_handler(event, context):
    print("Hello from the function's log:", event)
    return "Hello from Lambda!"
END

# The emulator has a Telemetry API only in its mode for Managed Instances.
export AWS_LAMBDA_MAX_CONCURRENCY=1
"$copy/$name.sh" --docker -e COLLECTOR_URL=http://127.0.0.1:9000 "$@" &
run=$!

# The run script names the container after its process.
container=$name-$run
until docker exec "$container" true 2>/dev/null; do
    kill -0 "$run" || exit 1 # it has said why
    sleep 1
done
docker exec "$container" python3 "/opt/$name/collector.py" 9000 &

address=$(docker port "$container" 8080 | head -n 1)
until curl --silent --fail --output /dev/null --noproxy '*' -H 'Content-Type: application/json' \
    -d '{"key": "value"}' "http://$address/2015-03-31/functions/function/invocations"; do
    kill -0 "$run" || exit 1
    sleep 1
done
echo "try.sh: The function was invoked. Within 10 seconds, you will see what the collector gets."
wait "$run"
