#!/bin/sh -e
# Runs a command where something is mounted below /opt, in a mount namespace of its own.
mount -t tmpfs tmpfs /opt
mkdir /opt/mounted /opt/extensions
touch /opt/extensions/foreign
mount -t tmpfs tmpfs /opt/mounted
echo mounted >/opt/mounted/file
exec "$@"
