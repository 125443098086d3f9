#!/bin/sh -e
# Runs $SCRIPT where something is mounted below /opt. If $AS is set, root runs $SCRIPT as that user.
if [ -z "$MOUNTED" ]; then
    export MOUNTED=yes
    if [ "$(id -u)" = 0 ]; then
        exec unshare --mount "$0" "$@"
    fi
    exec unshare --map-root-user --mount "$0" "$@"
fi
mount -t tmpfs tmpfs /opt
mkdir /opt/mounted /opt/extensions
touch /opt/extensions/foreign
mount -t tmpfs tmpfs /opt/mounted
echo mounted >/opt/mounted/file
if [ -n "$AS" ]; then
    exec setpriv --reuid "$AS" --regid "$AS" --clear-groups "$SCRIPT" "$@"
fi
exec "$SCRIPT" "$@"
