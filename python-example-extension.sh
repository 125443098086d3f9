#!/usr/bin/env bash
# Builds the sample and runs it here: in Docker, or directly on this Linux machine. It works with macOS's bash 3.2 too.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

usage() {
    cat <<END
usage: $0 [--docker | --no-docker] [-p [ADDRESS:]PORT] [-e NAME[=VALUE]]...

Without --docker or --no-docker: uses Docker if available; otherwise runs on this Linux machine.
  --docker      build the image and run it
  --no-docker   run on this machine (Linux, with Python 3.10 or newer and pip)
  -p            listen on that port and IPv4 address (default: 127.0.0.1:8080)
  -e            set an environment variable of the function, or pass one through from this shell; may be repeated

Environment: BASE_IMAGE of the image, AWS_LAMBDA_FUNCTION_TIMEOUT in seconds, AWS_LAMBDA_FUNCTION_MEMORY_SIZE in MB,
AWS_LAMBDA_MAX_CONCURRENCY to emulate Lambda Managed Instances. LAMBDA_RUNTIME_API_DAEMON is the path of the
Lambda Runtime API Daemon, which replaces AWS's emulator; MAX_CONCURRENCY is its number of runtimes, and AMQP_URI,
AMQP_USERNAME, AMQP_PASSWORD name its broker.
END
}

say() { echo "$(basename "$0" .sh): $*" >&2; }

fail() {
    say "$1"
    exit "${2:-1}"
}

# --- Options: before anything else is named, so that -e NAME finds only what this shell was given -----------------------

way='' publish=127.0.0.1:8080 environment=()

# Adds NAME=VALUE, or NAME with its value in this shell if it has one.
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
    --docker | --no-docker)
        [ -z "$way" ] || fail "$way was given already; see --help" 2
        way=$1
        ;;
    -e | -p)
        [ $# -gt 1 ] || fail "$1 takes a value; see --help" 2
        if [ "$1" = -e ]; then pass_on "$2"; else publish=$2; fi
        shift
        ;;
    -h | --help)
        usage
        exit
        ;;
    *) fail "unknown argument '$1'; see --help" 2 ;;
    esac
    shift
done

octet='(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])'
[[ $publish =~ ^(($octet(\.$octet){3}):)?([1-9][0-9]{0,4})$ && ${publish##*:} -le 65535 ]] ||
    fail "-p takes [ADDRESS:]PORT, an IPv4 address and a number from 1 to 65535, not '$publish'" 2
port=${publish##*:} address=127.0.0.1
[[ $publish != *:* ]] || address=${publish%:*}

# An empty variable is one that is not set.
daemon=${LAMBDA_RUNTIME_API_DAEMON:-}
concurrency=${daemon:+MAX_CONCURRENCY}
for variable in AWS_LAMBDA_FUNCTION_TIMEOUT AWS_LAMBDA_FUNCTION_MEMORY_SIZE ${concurrency:-AWS_LAMBDA_MAX_CONCURRENCY}; do
    [[ ${!variable:-1} =~ ^[1-9][0-9]*$ ]] || fail "$variable takes a whole number from 1, not '${!variable}'" 2
done

self=$(readlink -f "$0" 2>/dev/null || echo "$0") # older macOS has no -f
if [ -n "$daemon" ]; then
    [ -f "$daemon" ] || fail "LAMBDA_RUNTIME_API_DAEMON: there is no file $daemon"
    [ -x "$daemon" ] || fail "LAMBDA_RUNTIME_API_DAEMON: $daemon is not executable; try: chmod +x $daemon"
    daemon=$(CDPATH='' cd "$(dirname "$daemon")" && pwd)/${daemon##*/}
fi
CDPATH='' cd "$(dirname "$self")"
name=$(basename "$self" .sh)
: "${BASE_IMAGE:=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}"
: "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE:=$(sed -n 's/^ *MemorySize: //p' template.yaml)}"
environment=("AWS_LAMBDA_FUNCTION_NAME=$name" "AWS_LAMBDA_FUNCTION_MEMORY_SIZE=$AWS_LAMBDA_FUNCTION_MEMORY_SIZE"
    ${AWS_LAMBDA_FUNCTION_TIMEOUT:+"AWS_LAMBDA_FUNCTION_TIMEOUT=$AWS_LAMBDA_FUNCTION_TIMEOUT"}
    ${environment[@]+"${environment[@]}"})
managed=''
if [ -n "$daemon" ]; then
    environment+=("MAX_CONCURRENCY=${MAX_CONCURRENCY:-1}")
    pass_on AMQP_USERNAME
    pass_on AMQP_PASSWORD
else
    [ -z "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ] || pass_on AWS_LAMBDA_MAX_CONCURRENCY
    for variable in "${environment[@]}"; do
        [[ $variable != AWS_LAMBDA_MAX_CONCURRENCY=?* ]] || managed=yes
    done
fi

# --- Docker, or not -----------------------------------------------------------------------------------------------------

# Prints why Docker cannot run the sample here, or nothing if it can.
docker_obstacle() {
    local answer
    if ! command -v docker >/dev/null; then
        echo "there is no docker command"
    elif ! answer=$(docker version 2>&1); then
        case $answer in
        *"permission denied"*) echo "this user may not use the Docker engine" ;;
        *) echo "no Docker engine answers" ;;
        esac
    elif ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1; then
        say "pulling the base image $BASE_IMAGE"
        docker pull "$BASE_IMAGE" >&2 || echo "the base image $BASE_IMAGE cannot be pulled; set BASE_IMAGE to a local image"
    fi
}

if [ "$way" != --no-docker ]; then
    obstacle=$(docker_obstacle)
    if [ -z "$obstacle" ]; then
        way=--docker
    elif [ "$way" = --docker ]; then
        fail "$obstacle, or try --no-docker"
    else
        way=--no-docker
        say "running without Docker, on this machine: $obstacle"
    fi
fi
if [ "$way" = --no-docker ]; then
    [ "$(uname)" = Linux ] || fail "--no-docker needs Linux; use Docker here"
    python3 -E -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "this needs Python 3.10 or newer; try: apt-get install python3 python3-pip"
fi

answers() {
    (
        exec 3<>"/dev/tcp/$address/$port"
        printf 'GET / HTTP/1.0\r\n\r\n' >&3
        read -r -t 2 <&3
    ) 2>/dev/null
}
! (exec 3<>"/dev/tcp/$address/$port") 2>/dev/null || fail "port $port is in use on $address; choose another with -p"

# --- The job: it ends when the emulator does ------------------------------------------------------------------------------

job='' container='' created='' files=''

# Tells the Daemon which broker to use, on machine $1 unless AMQP_URI says otherwise; an empty AMQP_URI means none.
set_broker() {
    AMQP_URI=${AMQP_URI-amqp://$1:5672?connection_attempts=20&retry_delay=10&heartbeat=0}
    environment+=("AMQP_URI=$AMQP_URI")
}

# Runs a command as a job that Ctrl-C does not reach, and waits for it.
await() {
    "$@" &
    job=$!
    wait "$job"
}

start_in_docker() {
    local variable options=()
    files=$(mktemp -d)
    # For Lambda Managed Instances the emulator starts as root, and the extension and the runtime as Lambda's user.
    [ -z "$managed" ] || options+=(--user root --cap-add SETUID --cap-add SETGID --cap-add KILL)
    if [ -n "$daemon" ]; then
        set_broker host.docker.internal
        options+=(--volume "$daemon:/usr/local/bin/aws-lambda-rie:ro" --add-host host.docker.internal:host-gateway)
    fi
    # Through a file, because everybody can read command lines; a file of variables cannot hold a value of several lines.
    for variable in "${environment[@]}"; do
        if [[ $variable = *$'\n'* ]]; then
            export "${variable?}"
            options+=(--env "${variable%%=*}")
        else
            printf '%s\n' "$variable" >>"$files/environment"
        fi
    done
    await docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" --iidfile "$files/image" --tag "$name" . ||
        fail "the image cannot be built"
    # As on Lambda: an unprivileged user, no capabilities, 512 MB of /tmp in a read-only file system, 1,024 processes.
    container=$name-$$
    await docker create --rm --name "$container" --publish "$address:$port:8080" --env-file "$files/environment" \
        --cap-drop ALL --security-opt no-new-privileges --read-only --tmpfs /tmp:exec,size=512m \
        --memory "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE}m" --pids-limit 1024 ${options[@]+"${options[@]}"} \
        "$(cat "$files/image")" >/dev/null || fail "the container cannot be created"
    created=yes
    set -m # in a process group of its own it outlives Ctrl-C, and shows how the container ends
    docker start --attach "$container" &
    job=$!
    set +m
}

start_without_docker() {
    local command=(python3 -E scripts/run_without_docker.py "$address" "$port")
    if [ -n "$daemon" ]; then
        set_broker localhost
        command+=("$daemon")
    fi
    setpriv --pdeathsig TERM "${command[@]}" < <(printf '%s\0' "${environment[@]}") &
    job=$!
}

# Ends what was started, within the 2 seconds that Lambda allows, and leaves nothing behind.
finish() {
    local status=$?
    trap '' INT TERM HUP QUIT
    set +e
    if [ -n "$container" ]; then
        [ -n "$created" ] || wait "$job"
        docker stop --time 2 "$container"
        docker rm --force "$container"
    elif [ -n "$job" ]; then
        kill "$job"
    fi >/dev/null 2>&1
    wait
    [ -z "$files" ] || rm -rf "$files"
    exit "$status"
}
trap finish EXIT
trap 'exit 0' INT TERM HUP QUIT

if [ "$way" = --docker ]; then start_in_docker; else start_without_docker; fi
waited=0
until answers; do
    kill -0 "$job" 2>/dev/null || break
    [ "$way" = --no-docker ] || [ $((waited += 1)) -ne 200 ] ||
        say "nothing answers at $address:$port yet; is the Docker engine on another machine?"
    sleep 0.05
done
if kill -0 "$job" 2>/dev/null; then
    # AWS's emulator knows the function by this name alone, the Daemon by its own.
    function=function
    if [ -n "$daemon" ]; then
        function=$name
        AMQP_URI=${AMQP_URI##*@} # without a password
        say "AMQP: queue $name at ${AMQP_URI:-no broker}. Without a broker there, HTTP works all the same."
        [ "$way" = --no-docker ] || [ -n "${AMQP_USERNAME:-}" ] ||
            say "RabbitMQ accepts user guest only from localhost: set AMQP_USERNAME and AMQP_PASSWORD"
    fi
    say "ready; Ctrl-C ends it. Try:
    curl -XPOST http://$address:$port/2015-03-31/functions/$function/invocations${managed:+ -H 'Content-Type: application/json'} -d '{\"key\": \"value\"}'"
fi
status=0
wait "$job" || status=$?
# Without Docker the job has said why it ended.
[ "$way" = --no-docker ] || [ "$status" = 0 ] ||
    say "the container exited with status $status; see its output above. The emulator runs one invocation at a time"
[ "$status" = 0 ] || exit 1
