#!/bin/sh -e
# Runs $SCRIPT as a plain container does, which refuses namespaces: here unshare fails. The folder
# $OPT is its /opt.
if [ -z "$REFUSED" ]; then
    export REFUSED=yes
    exec unshare --map-root-user --mount "$0" "$@"
fi
mount --bind "$OPT" /opt
mount --bind /bin/false "$(command -v unshare)"
exec "$SCRIPT" "$@"
