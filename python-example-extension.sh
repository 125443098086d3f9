#!/usr/bin/env bash
# SPDX-License-Identifier: MIT-0
#
# Builds the sample's image and runs it in Docker. Where there is no Docker, runs the sample on this
# Linux machine instead: see scripts/run_without_docker.py. Works with macOS's bash 3.2, too.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

usage() {
    cat <<END_OF_USAGE
usage: $0 [--docker | --no-docker] [-p [ADDRESS:]PORT] [-e NAME[=VALUE]]...

  --docker      build the image and run it
  --no-docker   run on this Linux machine; requires Python 3.10 or newer, with pip
  -p            listen on this port and IPv4 address (default: 127.0.0.1:8080)
  -e            set an environment variable for the function and the extension, or pass one through
                from this shell; may be repeated
With neither --docker nor --no-docker: uses Docker if available; otherwise says why not, and runs
on this machine.
END_OF_USAGE
}

say() { echo "$sample_name: $*" >&2; }

fail() {
    say "$1"
    exit "${2:-1}"
}

# Prints the reason why Docker cannot be used, if there is one.
obstacle_to_docker() {
    if ! command -v docker >/dev/null; then
        echo "there is no docker command"
    elif ! docker version >/dev/null; then
        echo "no Docker engine answers"
    elif ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
        docker pull "$BASE_IMAGE" >&2 ||
            echo "the base image $BASE_IMAGE cannot be pulled; set BASE_IMAGE to a local image"
    fi
}

script_path=$(readlink -f "$0" 2>/dev/null || echo "$0") # older macOS has no -f
sample_name=$(basename "$script_path" .sh)
way_to_run=''
listen_address=127.0.0.1
listen_port=8080
# What the function gets: NAME, with the value that this script exports, or NAME=VALUE.
function_variables=(AWS_LAMBDA_FUNCTION_NAME AWS_LAMBDA_FUNCTION_MEMORY_SIZE
    AWS_LAMBDA_FUNCTION_TIMEOUT)

function_name=$sample_name # whatever the shell says; only -e changes it
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --docker | --no-docker) way_to_run=$1 ;;
    -p)
        [[ ${2:-} =~ ^(([0-9]+\.[0-9]+\.[0-9]+\.[0-9]+):)?([1-9][0-9]*)$ ]] ||
            fail "-p expects [ADDRESS:]PORT, an IPv4 address and a port, not '${2:-}'" 2
        listen_address=${BASH_REMATCH[2]:-127.0.0.1}
        listen_port=${BASH_REMATCH[3]}
        shift
        ;;
    -e)
        [[ ${2:-} =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] ||
            fail "-e expects NAME or NAME=VALUE, not '${2:-}'" 2
        case $2 in
        AWS_LAMBDA_FUNCTION_NAME) function_name=${AWS_LAMBDA_FUNCTION_NAME:-$sample_name} ;;
        AWS_LAMBDA_FUNCTION_NAME=*) function_name=${2#*=} ;;
        # What configures this run as well.
        AWS_LAMBDA_*=* | AMQP_*=* | MAX_CONCURRENCY=* | LAMBDA_RUNTIME_API_DAEMON=* | BASE_IMAGE=*)
            export "${2?}"
            function_variables+=("${2%%=*}")
            ;;
        *) function_variables+=("$2") ;;
        esac
        shift
        ;;
    *) fail "unknown argument '$1'; see --help" 2 ;;
    esac
    shift
done
export AWS_LAMBDA_FUNCTION_NAME=$function_name

# Where the Lambda Runtime API Daemon is, if it takes the emulator's place.
daemon_path=${LAMBDA_RUNTIME_API_DAEMON:-}
[[ -z $daemon_path || $daemon_path = /* ]] || daemon_path=$PWD/$daemon_path
[[ -z $daemon_path || (-f $daemon_path && -x $daemon_path) ]] ||
    fail "LAMBDA_RUNTIME_API_DAEMON: $daemon_path is not an executable file"

CDPATH='' cd "$(dirname "$script_path")"
: "${BASE_IMAGE:=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}"
: "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE:=$(sed -n 's/^ *MemorySize: //p' template.yaml)}"
export AWS_LAMBDA_FUNCTION_MEMORY_SIZE

if (: <"/dev/tcp/$listen_address/$listen_port") 2>/dev/null; then
    fail "port $listen_port is in use on $listen_address; choose another with -p"
fi

if [ "$way_to_run" != --no-docker ]; then
    obstacle=$(obstacle_to_docker)
    if [ -n "$obstacle" ] && [ "$way_to_run" = --docker ]; then
        fail "$obstacle; on Linux, --no-docker runs without it"
    elif [ -n "$obstacle" ]; then
        say "running without Docker, on this machine: $obstacle"
        way_to_run=--no-docker
    fi
fi

# As on Lambda: an unprivileged user without capabilities, a read-only file system with 512 MB of
# /tmp and without /dev/shm, 1,024 processes, each with 1,024 open files.
docker_options=(--cap-drop ALL --security-opt no-new-privileges --read-only
    --tmpfs "/tmp:exec,size=512m" --ipc none --pids-limit 1024
    --memory "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE}m")

# How the function reaches this machine.
if [ "$way_to_run" = --no-docker ]; then
    host_name=localhost
elif [[ $(docker run --help 2>&1) = *--http-proxy* ]]; then # it is podman
    host_name=host.containers.internal
    docker_options+=(--http-proxy=false) # otherwise podman passes on this shell's proxies
else
    host_name=host.docker.internal
    # With --ulimit, podman would drop its other limits.
    docker_options+=(--add-host "$host_name:host-gateway" --ulimit nofile=1024)
fi

invoked_name=function # the emulator knows no other
curl_header=''
if [ -n "$daemon_path" ]; then
    invoked_name=$AWS_LAMBDA_FUNCTION_NAME
    # The Daemon exits when it has used up its attempts to connect. An empty URI means no broker.
    uri_parameters="connection_attempts=1000000&retry_delay=10&heartbeat=10"
    export AMQP_URI=${AMQP_URI-amqp://$host_name:5672?$uri_parameters}
    export MAX_CONCURRENCY=${MAX_CONCURRENCY:-1}
    function_variables+=(AMQP_URI AMQP_USERNAME AMQP_PASSWORD MAX_CONCURRENCY)
    function_variables+=(INVOKE_API_HOST=0.0.0.0 PORT=8080) # in the container
    # With z, SELinux lets containers read the file, from now on.
    docker_options+=(--volume "$daemon_path:/usr/local/bin/aws-lambda-rie:ro,z")
elif [ -n "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ]; then
    [ "$way_to_run" != --no-docker ] || fail "AWS_LAMBDA_MAX_CONCURRENCY needs Docker"
    function_variables+=(AWS_LAMBDA_MAX_CONCURRENCY)
    # For Lambda Managed Instances, the emulator runs as root, and starts the extension and the
    # runtime as Lambda's user.
    docker_options+=(--user root --cap-add SETUID --cap-add SETGID --cap-add KILL)
    curl_header=" -H 'Content-Type: application/json'" # their runtime requires it
fi
invoke_url=http://$listen_address:$listen_port/2015-03-31/functions/$invoked_name/invocations
greeting="starting; Ctrl-C stops it. Try:
    curl -XPOST $invoke_url$curl_header -d '{\"key\": \"value\"}'"

if [ "$way_to_run" = --no-docker ]; then
    [ "$(uname)" = Linux ] || fail "--no-docker needs Linux; use Docker here"
    python3 -E -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "this needs Python 3.10 or newer; try: apt-get install python3 python3-pip"
    LAMBDA_RUNTIME_API_DAEMON=$daemon_path exec python3 -E scripts/run_without_docker.py \
        "$listen_address" "$listen_port" "$greeting" "${function_variables[@]}"
fi

unset BUILDX_BUILDER # another builder than the engine's may keep the image to itself
docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" --tag "$sample_name" .
say "$greeting"
# Never pulled: an image of this name in a registry is not this one.
exec docker run --rm --name "$sample_name-$$" --pull never "${docker_options[@]}" \
    "${function_variables[@]/#/--env=}" --publish "$listen_address:$listen_port:8080" "$sample_name"
