#!/bin/sh -e
# Runs $SCRIPT as in a plain container, which refuses namespaces. The folder $OPT becomes its /opt.
# With $TOOLS, all commands come from that folder; with $MOUNT, `mount` is the one in that folder;
# otherwise `unshare` fails.
if [ -z "$REFUSED" ]; then
    export REFUSED=yes
    exec unshare --map-root-user --mount "$0" "$@"
fi
mount --bind "$OPT" /opt
if [ -n "$TOOLS" ]; then
    export PATH="$TOOLS"
elif [ -n "$MOUNT" ]; then
    mount --bind "$MOUNT/mount" "$(command -v mount)"
else
    mount --bind /bin/false "$(command -v unshare)"
fi
exec "$SCRIPT" "$@"
