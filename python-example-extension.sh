#!/usr/bin/env bash
# Builds the sample and runs it here: in Docker, or directly on this Linux machine. It works with macOS's bash 3.2 too.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

usage() {
    cat <<END
usage: $0 [--docker | --no-docker] [-p [ADDRESS:]PORT] [-e NAME[=VALUE]]...

  --docker      build the image and run it
  --no-docker   run on this Linux machine; requires Python 3.10 or newer, with pip
  -p            listen on this port and IPv4 address (default: 127.0.0.1:8080)
  -e            set a variable for the function and the extension, or pass one through from this shell; may be repeated

Without --docker or --no-docker: uses Docker if available; otherwise runs on this machine and says why.
See docs/running-locally.md for the environment variables.
END
}

say() { echo "$(basename "$0" .sh): $*" >&2; }

fail() {
    say "$1"
    exit "${2:-1}"
}

# --- Options -------------------------------------------------------------------------------------------------------------

way='' publish=127.0.0.1:8080 environment=()

# Adds NAME=VALUE to the function's environment, or NAME with its value in this shell, if any.
pass_on() {
    [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] || fail "-e takes NAME or NAME=VALUE, not '$1'" 2
    if [[ $1 = *=* ]]; then
        environment+=("$1")
    elif printenv "$1" >/dev/null; then
        environment+=("$1=${!1}")
    fi
}

while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage && exit ;;
    --docker | --no-docker) [ -z "$way" ] || fail "$way was given already; see --help" 2 ;;
    -e | -p) [ $# -gt 1 ] || fail "$1 takes a value; see --help" 2 ;;
    esac
    case $1 in
    --docker | --no-docker) way=$1 ;;
    -e) pass_on "$2" && shift ;;
    -p) publish=$2 && shift ;;
    *) fail "unknown argument '$1'; see --help" 2 ;;
    esac
    shift
done

octet='(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])'
[[ $publish =~ ^(($octet(\.$octet){3}):)?([1-9][0-9]{0,4})$ && ${publish##*:} -le 65535 ]] ||
    fail "-p takes [ADDRESS:]PORT, an IPv4 address and a number from 1 to 65535, not '$publish'" 2
port=${publish##*:} address=127.0.0.1
[[ $publish != *:* ]] || address=${publish%:*}

daemon=${LAMBDA_RUNTIME_API_DAEMON:-}
concurrency=AWS_LAMBDA_MAX_CONCURRENCY
if [ -n "$daemon" ]; then
    [ -f "$daemon" ] || fail "LAMBDA_RUNTIME_API_DAEMON: there is no file $daemon"
    [ -x "$daemon" ] || fail "LAMBDA_RUNTIME_API_DAEMON: $daemon is not executable; try: chmod +x $daemon"
    daemon=$(CDPATH='' cd "$(dirname "$daemon")" && pwd)/${daemon##*/}
    concurrency=MAX_CONCURRENCY
fi
for variable in AWS_LAMBDA_FUNCTION_TIMEOUT AWS_LAMBDA_FUNCTION_MEMORY_SIZE "$concurrency"; do
    [[ ${!variable:-1} =~ ^[1-9][0-9]*$ ]] || fail "$variable takes a whole number from 1, not '${!variable}'" 2
done

self=$(readlink -f "$0" 2>/dev/null || echo "$0") # older macOS has no -f
CDPATH='' cd "$(dirname "$self")"
name=$(basename "$self" .sh)
: "${BASE_IMAGE:=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}"
: "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE:=$(sed -n 's/^ *MemorySize: //p' template.yaml)}"

# --- Docker, or not ------------------------------------------------------------------------------------------------------

# Prints why Docker cannot run the sample here, or nothing if it can.
docker_obstacle() {
    local answer
    if ! command -v docker >/dev/null; then
        echo "there is no docker command"
    elif ! answer=$(docker version 2>&1); then
        echo "no Docker engine answers: ${answer##*$'\n'}"
    elif ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
        say "pulling the base image $BASE_IMAGE"
        docker pull "$BASE_IMAGE" >&2 || echo "the base image $BASE_IMAGE cannot be pulled; set BASE_IMAGE to a local image"
    fi
}

if [ "$way" != --no-docker ]; then
    obstacle=$(docker_obstacle)
    if [ -n "$obstacle" ]; then
        [ -z "$way" ] || fail "$obstacle; on Linux, --no-docker runs without it"
        say "running without Docker, on this machine: $obstacle"
        way=--no-docker
    fi
fi
if [ "$way" = --no-docker ]; then
    [ "$(uname)" = Linux ] || fail "--no-docker needs Linux; use Docker here"
    python3 -E -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "this needs Python 3.10 or newer; try: apt-get install python3 python3-pip"
fi
! (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null || fail "port $port is in use on $address; choose another with -p"

# --- The environment of the function and the extension -------------------------------------------------------------------

environment=("AWS_LAMBDA_FUNCTION_NAME=$name" "AWS_LAMBDA_FUNCTION_MEMORY_SIZE=$AWS_LAMBDA_FUNCTION_MEMORY_SIZE"
    ${AWS_LAMBDA_FUNCTION_TIMEOUT:+"AWS_LAMBDA_FUNCTION_TIMEOUT=$AWS_LAMBDA_FUNCTION_TIMEOUT"}
    ${environment[@]+"${environment[@]}"})
options=(--cap-drop ALL) function=function headers=''
if [ -n "$daemon" ]; then
    function=$name broker=localhost
    if [ "$way" != --no-docker ]; then
        options+=(--volume "$daemon:/usr/local/bin/aws-lambda-rie:ro")
        broker=host.docker.internal
        # podman before 4.7 knows no host-gateway, but has a name of its own.
        if [[ $(docker version) = *Podman* ]]; then
            broker=host.containers.internal
        else
            options+=(--add-host "$broker:host-gateway")
        fi
        [ -n "${AMQP_USERNAME:-}" ] ||
            say "RabbitMQ accepts user guest only from localhost: set AMQP_USERNAME and AMQP_PASSWORD"
    fi
    # The Daemon exits when it runs out of attempts. An empty AMQP_URI means no broker.
    AMQP_URI=${AMQP_URI-amqp://$broker:5672?connection_attempts=1000000&retry_delay=10&heartbeat=10}
    environment+=("AMQP_URI=$AMQP_URI" "MAX_CONCURRENCY=${MAX_CONCURRENCY:-1}")
    pass_on AMQP_USERNAME
    pass_on AMQP_PASSWORD
    AMQP_URI=${AMQP_URI##*@} # without a password
    say "AMQP: queue $name at ${AMQP_URI:-no broker}"
else
    [ -z "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ] || pass_on AWS_LAMBDA_MAX_CONCURRENCY
    for variable in "${environment[@]}"; do
        # For Lambda Managed Instances the emulator starts as root, and the extension and the runtime as Lambda's user.
        [[ $variable != AWS_LAMBDA_MAX_CONCURRENCY=?* ]] || {
            options+=(--user root --cap-add SETUID --cap-add SETGID --cap-add KILL)
            headers=" -H 'Content-Type: application/json'"
        }
    done
fi

# --- The job: it ends when the emulator does -----------------------------------------------------------------------------

job='' container='' files=''

start_in_docker() {
    local variable
    files=$(mktemp -d)
    # Not on the command line, which everyone can read: in a file, or, with a value of several lines, which a file cannot
    # hold, in the environment.
    for variable in "${environment[@]}"; do
        if [[ $variable = *$'\n'* ]]; then
            export "${variable?}"
            options+=(--env "${variable%%=*}")
        else
            printf '%s\n' "$variable" >>"$files/environment"
        fi
    done
    docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" --iidfile "$files/image" --tag "$name" . &
    job=$!
    wait "$job" || fail "the image cannot be built"
    container=$name-$$
    set -m # in its own process group: Ctrl-C does not reach it, so it prints the container's output to the end
    # As on Lambda: an unprivileged user, no capabilities, 512 MB of /tmp in a read-only file system, 1,024 processes.
    docker run --rm --name "$container" --publish "$address:$port:8080" --env-file "$files/environment" \
        --security-opt no-new-privileges --read-only --tmpfs /tmp:exec,size=512m --pids-limit 1024 \
        --memory "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE}m" "${options[@]}" "$(cat "$files/image")" &
    job=$!
    set +m
}

start_without_docker() {
    setpriv --pdeathsig TERM python3 -E scripts/run_without_docker.py "$address" "$port" ${daemon:+"$daemon"} \
        < <(printf '%s\0' "${environment[@]}") &
    job=$!
}

# Ends what was started, within the 2 seconds that Lambda allows, and leaves nothing behind.
finish() {
    local status=$?
    trap '' INT TERM HUP QUIT
    set +e
    {
        # It cannot stop a container before it is created.
        while [ -n "$container" ] && kill -0 "$job"; do docker stop --time 2 "$container" || sleep 0.1; done
        [ -z "$job" ] || kill "$job"
        wait
    } >/dev/null 2>&1
    [ -z "$files" ] || rm -rf "$files"
    exit "$status"
}
trap finish EXIT
trap 'exit 0' INT TERM HUP QUIT

answers() {
    exec 3<>"/dev/tcp/$address/$port" && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && read -r -t 2 <&3
}

if [ "$way" = --no-docker ]; then start_without_docker; else start_in_docker; fi
waited=0
until (answers) 2>/dev/null; do
    kill -0 "$job" 2>/dev/null || break
    [ "$way" = --no-docker ] || [ $((waited += 1)) -ne 200 ] ||
        say "nothing answers at $address:$port yet; is the Docker engine on another machine?"
    sleep 0.05
done
! kill -0 "$job" 2>/dev/null || say "ready; Ctrl-C ends it. Try:
    curl -XPOST http://$address:$port/2015-03-31/functions/$function/invocations$headers -d '{\"key\": \"value\"}'"
status=0 hint=''
wait "$job" || status=$?
[ "$status" != 2 ] || [ -n "$daemon" ] || hint=". It runs one invocation at a time"
# Without Docker the job has said why it ended.
[ "$way" = --no-docker ] || [ "$status" = 0 ] ||
    say "the container exited with status $status; see its output above$hint"
[ "$status" = 0 ] || exit 1
