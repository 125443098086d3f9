#!/usr/bin/env bash
# Makes layer.zip, the extension as a Lambda layer for functions on managed Python runtimes. Run it with the Python
# version of those functions: the layer then contains matching bytecode, and no cold start compiles anything.
set -euo pipefail
umask 022 # for the user that Lambda runs it as
cd "$(dirname "$0")"

extension=$(echo ./*/extension.py)
name=$(basename "$(dirname "$extension")")
layer=$(mktemp -d)
trap 'rm -rf "$layer"' EXIT

# Pure wheels serve any CPU. Bytecode is unchecked because a zip does not keep exact times.
env -u PIP_PREFIX PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 python3 -m pip install --quiet --disable-pip-version-check \
    --no-deps --require-hashes --only-binary :all: --platform any --implementation py --abi none --no-compile \
    --target "$layer/$name" -r "$name/requirements.txt"
install -m 644 "$name"/*.py "$layer/$name"
mkdir "$layer/extensions"
install -m 755 "extensions/$name" "$layer/extensions"
python3 -m compileall -q --invalidation-mode unchecked-hash "$layer/$name"

rm -f layer.zip
(cd "$layer" && python3 -m zipfile -c "$OLDPWD/layer.zip" extensions "$name")
echo "layer.zip: /opt/extensions/$name and /opt/$name"
