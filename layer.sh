#!/usr/bin/env bash
# Makes layer.zip, the extension as a Lambda layer for functions on managed Python runtimes. Run it with the Python
# version of those functions: its bytecode is in the layer then, and not compiled anew at every cold start.
set -euo pipefail
umask 022 # for the user that Lambda runs it as
cd "$(dirname "$0")"

extension=$(echo ./*/extension.py)
name=$(basename "$(dirname "$extension")")
layer=$(mktemp -d)
trap 'rm -rf "$layer"' EXIT

python3 -m pip install --quiet --disable-pip-version-check --target "$layer/$name" -r "$name/requirements.txt"
install -m 755 "$name"/*.py "$layer/$name"
mkdir "$layer/extensions"
install -m 755 "extensions/$name" "$layer/extensions"
python3 -m compileall -q "$layer/$name"

rm -f layer.zip
(cd "$layer" && python3 -m zipfile -c "$OLDPWD/layer.zip" extensions "$name")
echo "layer.zip: /opt/extensions/$name and /opt/$name"
