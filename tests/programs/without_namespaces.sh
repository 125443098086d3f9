#!/bin/sh -e
# Runs $SCRIPT as a plain container does, which refuses namespaces: here unshare fails, or it is one
# of the commands in the folder $TOOLS, or mount is the one in the folder $MOUNT. $OPT is its /opt.
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
