#!/bin/sh
# Runs a command for which the file $1 is /etc/resolv.conf; needs a mount namespace of its own.
mount --bind "$1" /etc/resolv.conf || exit
shift
exec "$@"
