#!/bin/sh
# ENTRYPOINT of the image, and its /var/runtime/bootstrap: starts the runtime interface client (RIC)
# on Lambda, and everywhere else the Runtime Interface Emulator (RIE) with the RIC as its child.

if [ $# -gt 1 ] || [ -z "${1:-${_HANDLER:-}}" ]; then
    where="as the only argument or in \$_HANDLER"
    echo "usage: ${0##*/} HANDLER, such as lambda_function.lambda_handler, $where" >&2
    exit 142 # as AWS's base images do
fi

# Where the function and its dependencies are, whatever the working directory.
cd "${LAMBDA_TASK_ROOT:-.}" || exit
export _HANDLER="${1:-$_HANDLER}"
set -- python3 -m awslambdaric "$_HANDLER"
if [ -n "${AWS_LAMBDA_EXEC_WRAPPER:-}" ]; then
    # It may change _HANDLER:
    # https://docs.aws.amazon.com/lambda/latest/dg/runtimes-modify.html#runtime-wrapper
    set -- "$AWS_LAMBDA_EXEC_WRAPPER" env -u AWS_LAMBDA_EXEC_WRAPPER "$0"
fi
[ -n "${AWS_LAMBDA_RUNTIME_API:-}" ] || set -- /usr/local/bin/aws-lambda-rie "$@"
exec "$@"
