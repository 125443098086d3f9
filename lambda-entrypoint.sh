#!/bin/sh
# SPDX-License-Identifier: MIT-0
#
# The image's ENTRYPOINT, and also its /var/runtime/bootstrap. On Lambda, which sets
# AWS_LAMBDA_RUNTIME_API, it becomes the runtime interface client (RIC), which calls the handler.
# Elsewhere it becomes the Runtime Interface Emulator (RIE), which starts the RIC.

if [ $# -gt 1 ] || [ -z "${1:-${_HANDLER:-}}" ]; then
    echo "usage: ${0##*/} HANDLER, such as lambda_function.lambda_handler," \
        "as the only argument or in \$_HANDLER" >&2
    exit 142 # as AWS's base images do
fi

# `python3 -m` imports the function and its dependencies from the working directory.
cd "${LAMBDA_TASK_ROOT:-.}" || exit

# The function's PATH may lack Python and the emulator.
export PATH="${PATH:+$PATH:}/usr/local/bin:/usr/bin:/bin"

# "$@" becomes the command to run. It is put together from back to front.
export _HANDLER="${1:-$_HANDLER}"
set -- python3 -m awslambdaric "$_HANDLER"
if [ -n "${AWS_LAMBDA_EXEC_WRAPPER:-}" ]; then
    # A wrapper script may change _HANDLER, so what it runs is this script again, this time without
    # a wrapper: https://docs.aws.amazon.com/lambda/latest/dg/runtimes-modify.html#runtime-wrapper
    set -- "$AWS_LAMBDA_EXEC_WRAPPER" env -u AWS_LAMBDA_EXEC_WRAPPER sh "$0"
fi
if [ -z "${AWS_LAMBDA_RUNTIME_API:-}" ]; then
    set -- aws-lambda-rie "$@"
fi
exec "$@"
