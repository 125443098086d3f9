#!/usr/bin/env bash
# SPDX-License-Identifier: MIT-0
#
# Builds the sample's image and runs it here, in Docker. Where there is no Docker, it leaves that to
# scripts/run_without_docker.py. It works with macOS's bash 3.2 too.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail +o posix

usage() {
    cat <<END
usage: $0 [--docker | --no-docker] [-p [ADDRESS:]PORT] [-e NAME[=VALUE]]...

  --docker      build the image and run it
  --no-docker   run on this Linux machine; requires Python 3.10 or newer, with pip
  -p            listen on this port and IPv4 address (default: 127.0.0.1:8080)
  -e            set a variable for the function and the extension, or pass one through from this
                shell; may be repeated
Without --docker and --no-docker: uses Docker if available; otherwise runs on this machine and says
why.
END
}

say() { echo "$name: $*" >&2; }

fail() {
    say "$1"
    exit "${2:-1}"
}

# Prints NAME=VALUE and a NUL for each option -e NAME whose variable the shell exports.
variables_to_pass() {
    while [ $# -gt 0 ]; do
        if [[ $1 = -e && ${2:-} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] && printenv "$2" >/dev/null; then
            printf '%s=%s\0' "$2" "${!2}"
        fi
        shift
    done
}

# This is read further down, but looked up now, before this script sets variables of its own: they
# could have the same names.
exec 3< <(variables_to_pass "$@")

self=$(readlink -f "$0" 2>/dev/null || echo "$0") # older macOS has no -f
name=$(basename "$self" .sh)

# --- Options and variables ------------------------------------------------------------------------

# --docker, --no-docker, or neither.
way=''
# Where to listen.
publish=127.0.0.1:8080
# What -e sets: NAME=VALUE each.
assigned=()
# What -e passes through from the shell: NAME=VALUE each. No command line ever shows these values.
passed=()
# Variables that configure this run, set in the shell or with -e. The function gets these, and no
# other variable of the shell:
settings=(AWS_LAMBDA_FUNCTION_NAME AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_TIMEOUT
    AWS_LAMBDA_MAX_CONCURRENCY MAX_CONCURRENCY AMQP_URI AMQP_USERNAME AMQP_PASSWORD)
# And these are for this script alone:
own_settings=(BASE_IMAGE LAMBDA_RUNTIME_API_DAEMON)

# Sets a variable, NAME=VALUE, if it is one that configures this run.
set_if_setting() {
    [[ " ${settings[*]} ${own_settings[*]} " = *" ${1%%=*} "* ]] && export "${1?}"
}

AWS_LAMBDA_FUNCTION_NAME=$name
while IFS= read -r -d '' variable <&3; do
    set_if_setting "$variable" || passed+=("$variable")
done
exec 3<&-
while [ $# -gt 0 ]; do
    [[ $1 != -[ep] || $# -gt 1 ]] || fail "$1 takes a value; see --help" 2
    case $1 in
    -h | --help)
        usage
        exit
        ;;
    --docker | --no-docker)
        way=$1
        ;;
    -p)
        publish=$2
        shift
        ;;
    -e)
        [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] || fail "-e takes NAME or NAME=VALUE, not '$2'" 2
        if [[ $2 = *=* ]]; then
            set_if_setting "$2" || assigned+=("$2")
        fi
        shift
        ;;
    *)
        fail "unknown argument '$1'; see --help" 2
        ;;
    esac
    shift
done

byte='(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])'
[[ $publish =~ ^(($byte(\.$byte){3}):)?([1-9][0-9]{0,4})$ && ${publish##*:} -le 65535 ]] ||
    fail "-p takes [ADDRESS:]PORT, an IPv4 address and a number from 1 to 65535, not '$publish'" 2
address=${BASH_REMATCH[2]:-127.0.0.1}
port=${publish##*:}

# The path of the Lambda Runtime API Daemon, if it takes the emulator's place.
daemon=${LAMBDA_RUNTIME_API_DAEMON:-}
if [ -n "$daemon" ]; then
    if [[ $daemon != /* ]]; then
        daemon=${PWD%/}/$daemon
    fi
    [[ -f $daemon && -x $daemon ]] ||
        fail "LAMBDA_RUNTIME_API_DAEMON: $daemon is not an executable file"
    : "${MAX_CONCURRENCY:=1}"
    unset AWS_LAMBDA_MAX_CONCURRENCY # it is for the emulator, and would change the runtime
fi

for variable in AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_TIMEOUT \
    AWS_LAMBDA_MAX_CONCURRENCY ${daemon:+MAX_CONCURRENCY}; do
    if [ -z "${!variable:-}" ]; then
        unset "$variable" # the emulator takes an empty one for a number
    elif [[ ! ${!variable} =~ ^[1-9][0-9]*$ ]]; then
        fail "$variable takes a whole number from 1, not '${!variable}'" 2
    fi
done

CDPATH='' cd "$(dirname "$self")"
: "${BASE_IMAGE:=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}"
: "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE:=$(sed -n 's/^ *MemorySize: //p' template.yaml)}"

# --- What this script starts ends with it ---------------------------------------------------------

# The process group of the command that this script waits for, if any.
job=''
# The name of the container that this command runs, if any.
container=''

# Runs a command to its end and returns its status. Unlike a command in the foreground, a signal to
# this script can end it at any time.
await() {
    # Job control (set -m) gives the command a process group of its own. So Ctrl-C, which the
    # terminal sends to the group of this script, does not reach it, and one kill reaches all of it.
    set -m
    (
        # Tells the watcher first, so that it can end whatever comes next. This is the subshell's
        # process ID, for which macOS's bash has no variable.
        sh -c 'echo "$PPID $1"' sh "$container" >&3
        "$@" 3>&-
    ) </dev/null &
    job=$!
    set +m
    local status=0
    wait "$job" || status=$?
    kill -- "-$job" 2>/dev/null || : # what say_if_slow may have left
    job=''
    echo >&3
    return "$status"
}

# Runs a command that prints nothing while it waits; after two seconds says what it waits for.
say_if_slow() {
    local what=$1
    shift
    (sleep 2 && say "waiting for $what") &
    "$@"
}

# Ends the job by SIGTERM, or by SIGKILL: end_job TERM | KILL
end_job() {
    if [ -n "$container" ]; then
        end_container "$1"
    else
        kill -s "$1" -- "-$job" 2>/dev/null
    fi
}

# Ends the container, and so the `docker run` that is the job.
end_container() {
    local command=(docker stop -t 2) # SIGTERM, and SIGKILL two seconds later
    local client=''
    if [ "$1" = KILL ]; then
        command=(docker kill)
    fi
    # Nothing can stop a container before it is created, so this tries again. But an engine that
    # hangs never answers.
    for _ in {1..50}; do
        kill -0 "$job" 2>/dev/null || return 0
        if [ -z "$client" ] || ! kill -0 "$client" 2>/dev/null; then
            "${command[@]}" "$container" >/dev/null 2>&1 &
            client=$!
        fi
        sleep 0.1
    done
    say "Docker does not answer; if the container $container still runs, end it"
    kill -s KILL "$client" -- "-$job" 2>/dev/null
}

# Ends the job if this script cannot, because it was killed. Only the script holds the other end of
# the pipe from which this reads what the job is; so when the pipe ends, the script is gone.
watch() {
    trap '' INT TERM HUP QUIT
    local process_group container_name
    while read -r process_group container_name; do
        job=$process_group
        container=$container_name
    done
    if [ -z "$job" ]; then
        return
    fi
    if [ -n "$daemon" ]; then
        # Killed, the Daemon leaves to other copies what it took from its queue. On SIGTERM it
        # would lose that.
        end_job KILL
    else
        end_job TERM
    fi
}

# Job control puts the watcher out of reach of what is sent to this script's process group.
exec 3> >(
    set -m
    watch <&0 >/dev/null 2>&1 &
)

finish() {
    trap '' INT TERM HUP QUIT
    set +e
    if [ -n "$job" ]; then
        end_job TERM
        # A signal that came before may cut one wait short.
        while kill -0 "$job" 2>/dev/null; do
            wait "$job" 2>/dev/null
        done
    fi
}

trap finish EXIT
# Not in EXIT's trap, which another signal would cut short.
trap 'finish; trap - EXIT; exit 0' INT TERM HUP QUIT

# --- The two ways to run --------------------------------------------------------------------------

# Becomes a command, with some variables set (NAME=VALUE) and others unset (NAME):
#   with_variables [NAME[=VALUE]]... -- COMMAND...
# It has no variables of its own, because those could have the same names.
with_variables() {
    while [ "$1" != -- ]; do
        unset "${1%%=*}" # an array of this script could not be exported
        if [[ $1 = *=* ]]; then
            export "${1?}"
        fi
        shift
    done
    shift
    exec "$@"
}

# The Daemon exits when it runs out of attempts to connect. An empty AMQP_URI means no broker.
#   set_amqp_uri NAME_OF_THIS_MACHINE
set_amqp_uri() {
    local parameters="connection_attempts=1000000&retry_delay=10&heartbeat=10"
    AMQP_URI=${AMQP_URI-amqp://$1:5672?$parameters}
}

# Prints how to invoke the function.
greeting() {
    local function=function
    local headers=''
    if [ -n "$daemon" ]; then
        function=$AWS_LAMBDA_FUNCTION_NAME
    elif [ -n "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ]; then
        headers=" -H 'Content-Type: application/json'"
    fi
    local url=http://$address:$port/2015-03-31/functions/$function/invocations
    echo "starting; Ctrl-C ends it. Try:"
    echo "    curl -XPOST $url$headers -d '{\"key\": \"value\"}'"
}

run_in_docker() {
    # Another builder than the engine's own may keep the image to itself.
    await env -u BUILDX_BUILDER docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" --tag "$name" . ||
        fail "the image cannot be built; see above"

    # As on Lambda: an unprivileged user without capabilities, a read-only file system with 512 MB
    # of /tmp and without /dev/shm, 1,024 processes, each with 1,024 open files.
    local options=(--cap-drop ALL --security-opt no-new-privileges --read-only
        --tmpfs "/tmp:exec,size=512m" --ipc none --pids-limit 1024 --ulimit nofile=1024
        --memory "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE}m" --publish "$address:$port:8080")
    local machine=host.docker.internal
    if [[ $(docker --version 2>/dev/null) = podman* ]]; then
        machine=host.containers.internal
        options+=(--http-proxy=false) # otherwise the function gets this shell's proxies
    else
        options+=(--add-host "$machine:host-gateway")
    fi
    if [ -n "$daemon" ]; then
        set_amqp_uri "$machine"
        # With z, SELinux lets containers read the file.
        options+=(--volume "$daemon:/usr/local/bin/aws-lambda-rie:ro,z")
        assigned+=(INVOKE_API_HOST=0.0.0.0 PORT=8080)
    elif [ -n "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ]; then
        # For Lambda Managed Instances the emulator starts as root, and the extension and the
        # runtime as Lambda's user.
        options+=(--user root --cap-add SETUID --cap-add SETGID --cap-add KILL)
    fi

    # A variable that is named, but not set, stays out of the container. Otherwise Docker adds the
    # proxies of its own configuration, with their passwords.
    local proxies=(HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY
        http_proxy https_proxy ftp_proxy all_proxy no_proxy)
    local variable
    for variable in "${proxies[@]}" "${settings[@]}" ${passed[@]+"${passed[@]%%=*}"} \
        ${assigned[@]+"${assigned[@]}"}; do
        options+=(--env "$variable")
    done

    export "${settings[@]}"
    say "$(greeting)"
    container=$name-$$
    # Never pulled: it would be a stranger's image.
    await with_variables "${proxies[@]}" ${passed[@]+"${passed[@]}"} -- \
        docker run --rm --name "$container" --pull never "${options[@]}" "$name" ||
        fail "the container ended with status $?; see its output above"
}

run_without_docker() {
    [ "$(uname)" = Linux ] || fail "--no-docker needs Linux; use Docker here"
    [ -z "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ] || fail "AWS_LAMBDA_MAX_CONCURRENCY needs Docker"
    # With -E, the shell's variables for Python, such as PYTHONHOME, do not count.
    await say_if_slow "python3" python3 -E -c '
import sys
if sys.version_info < (3, 10):
    sys.exit("this is Python " + sys.version)
' || fail "this needs Python 3.10 or newer; try: apt-get install python3 python3-pip"
    if [ -n "$daemon" ]; then
        set_amqp_uri localhost
    fi
    export "${settings[@]}"
    # It says itself what goes wrong.
    await with_variables ${passed[@]+"${passed[@]}"} "LAMBDA_RUNTIME_API_DAEMON=$daemon" -- \
        python3 -E scripts/run_without_docker.py "$address" "$port" "$(greeting)" \
        "${settings[@]}" ${passed[@]+"${passed[@]%%=*}"} ${assigned[@]+"${assigned[@]}"} || exit 1
}

# Finds out why Docker cannot be used, and sets $obstacle to that, or to nothing.
find_obstacle() {
    obstacle=''
    if ! command -v docker >/dev/null; then
        obstacle="there is no docker command"
    elif ! await say_if_slow "the Docker engine" docker version >/dev/null; then
        obstacle="no Docker engine answers"
    elif ! await say_if_slow "the Docker engine" has_image "$BASE_IMAGE" &&
        ! await docker pull "$BASE_IMAGE" >&2; then
        obstacle="the base image $BASE_IMAGE cannot be pulled; set BASE_IMAGE to a local image"
    fi
}

has_image() { docker image inspect "$1" >/dev/null 2>&1; }

# Whether something listens on an address and port.
listens() { (exec 4<>"/dev/tcp/$1/$2") 2>/dev/null; }

if await say_if_slow "$address:$port" listens "$address" "$port"; then
    fail "port $port is in use on $address; choose another with -p"
fi
if [ "$way" = --no-docker ]; then
    run_without_docker
    exit
fi
find_obstacle
if [ -z "$obstacle" ]; then
    run_in_docker
elif [ "$way" = --docker ]; then
    fail "$obstacle; on Linux, --no-docker runs without it"
else
    say "running without Docker, on this machine: $obstacle"
    run_without_docker
fi
