#!/usr/bin/env bash
# SPDX-License-Identifier: MIT-0
#
# Builds the sample's image and runs it here, in Docker. Where there is no Docker, this script
# starts scripts/run_without_docker.py instead. It works with macOS's bash 3.2 too.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail +o posix
export PATH # if the environment has none, bash sets one, but does not export it

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
print_exported() {
    while [ $# -gt 0 ]; do
        if [[ $1 = -e && ${2:-} =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] && printenv "$2" >/dev/null; then
            printf '%s=%s\0' "$2" "${!2}"
        fi
        shift
    done
}

# Fetches the values of -e NAME here, before this script's own variables overwrite those of the same
# names. They are read further down.
exec 4< <(print_exported "$@")

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
# Variables that configure this run, from the shell or from -e. The function gets these, and what -e
# names, but nothing else of the shell.
settings=(AWS_LAMBDA_FUNCTION_NAME AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_TIMEOUT
    AWS_LAMBDA_MAX_CONCURRENCY MAX_CONCURRENCY AMQP_URI AMQP_USERNAME AMQP_PASSWORD)
# These configure the run as well, but do not reach the function.
own_settings=(BASE_IMAGE LAMBDA_RUNTIME_API_DAEMON)

# Whether NAME=VALUE sets one of them.
is_setting() { [[ " ${settings[*]} ${own_settings[*]} " = *" ${1%%=*} "* ]]; }

AWS_LAMBDA_FUNCTION_NAME=$name # whatever the shell says; only -e changes it
while IFS= read -r -d '' variable <&4; do
    if is_setting "$variable"; then
        export "${variable?}"
    else
        passed+=("$variable")
    fi
done
exec 4<&-
while [ $# -gt 0 ]; do
    if [[ $1 = -[ep] && $# -lt 2 ]]; then
        fail "$1 takes a value; see --help" 2
    fi
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
        if [[ $2 != *=* ]]; then
            : # one of those above
        elif is_setting "$2"; then
            export "${2?}"
        else
            assigned+=("$2")
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

: "${AWS_LAMBDA_FUNCTION_NAME:=$name}"
for variable in AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_TIMEOUT \
    AWS_LAMBDA_MAX_CONCURRENCY ${daemon:+MAX_CONCURRENCY}; do
    if [ -z "${!variable:-}" ]; then
        unset "$variable" # an empty AWS_LAMBDA_MAX_CONCURRENCY would turn on managed mode
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

# Runs a command without input, and returns its status. bash lets a command in the foreground end
# before it acts on a signal, but not `wait`, so the command runs in the background.
await() {
    # With job control (set -m) the command gets a process group of its own. The terminal's Ctrl-C
    # reaches only this script, which then ends the whole group.
    set -m
    (
        # A line for the watcher says what to end if this script is killed from now on. $PPID is the
        # process ID of this subshell, for which macOS's bash has no variable.
        sh -c 'echo "$PPID $1"' sh "$container" >&3
        exec 3>&- # so that this script alone holds it: see watch
        "$@"
    ) </dev/null &
    job=$!
    set +m
    local status=0
    wait "$job" 2>/dev/null || status=$?
    kill -s KILL -- "-$job" 2>/dev/null || : # what say_if_slow may have left
    job=''
    (echo >&3) 2>/dev/null || : # an empty line: there is nothing to end
    return "$status"
}

# Runs a command that prints nothing while it waits; after two seconds says what it waits for. Only
# for await, which ends what is left of the sleep.
say_if_slow() {
    local what=$1
    shift
    (sleep 2 && say "waiting for $what") &
    "$@"
}

# Ends the job with a signal, TERM or KILL, and after five seconds with KILL.
end_job() {
    local client=''
    local try
    for try in {1..50}; do
        kill -0 "$job" 2>/dev/null || return 0
        if [ -z "$container" ]; then
            # A second time after a second, because a subshell that has just begun may miss one.
            if [ "$try" = 1 ] || [ "$try" = 11 ]; then
                signal_job "$1"
            fi
        elif ! kill -0 "$client" 2>/dev/null; then
            # Nothing can stop a container before it is created, so this tries again.
            end_container "$1" "$try" >/dev/null 2>&1 &
            client=$!
        fi
        sleep 0.1
    done
    if [ -n "$container" ]; then
        say "Docker has not ended the container $container; if it still runs, end it"
        kill -s KILL "$client" 2>/dev/null
    fi
    signal_job KILL
}

signal_job() {
    kill -s "$1" -- "-$job" 2>/dev/null
    kill -s CONT -- "-$job" 2>/dev/null # the terminal may have suspended it
}

# `docker run`, which is the job, ends with its container.
end_container() {
    if [ "$1" = TERM ] && [ "$2" -le 25 ]; then
        exec docker stop -t 2 "$container" # SIGTERM, and SIGKILL two seconds later
    else
        exec docker kill "$container"
    fi
}

# Ends the job if this script cannot, because it was killed. It reads what the job is from a pipe
# whose other end, descriptor 3, only the script holds. So the pipe ends when the script does.
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
        # When the Daemon is killed, the messages that it took from its queue go to other copies. On
        # SIGTERM it would lose them.
        end_job KILL
    else
        end_job TERM
    fi
}

# With job control, a signal to this script's process group does not reach the watcher.
exec 3> >(
    set -m
    watch <&0 >/dev/null 2>&1 &
)

# Status 0, because whoever sends one of these wants the run to end.
trap finish INT TERM HUP QUIT
finish() {
    trap '' INT TERM HUP QUIT
    set +e
    if [ -n "$job" ]; then
        end_job TERM
        wait "$job" 2>/dev/null
    fi
    exit 0
}

# --- The two ways to run --------------------------------------------------------------------------

# Becomes a command, with some variables set (NAME=VALUE) and others unset (NAME). Only for await.
#   with_variables [NAME[=VALUE]]... -- COMMAND...
# It declares no variable, because that could hide one that is to be passed.
with_variables() {
    while [ "$1" != -- ]; do
        unset "${1%%=*}" # it may be an array of this script, which cannot be exported
        if [[ $1 = *=* ]]; then
            export "${1?}"
        fi
        shift
    done
    shift
    exec "$@"
}

# Sets AMQP_URI unless it is set already; an empty one means no broker. The Daemon exits when it has
# used up its attempts to connect.
#   default_amqp_uri NAME_OF_THIS_MACHINE
default_amqp_uri() {
    local parameters="connection_attempts=1000000&retry_delay=10&heartbeat=10"
    AMQP_URI=${AMQP_URI-amqp://$1:5672?$parameters}
}

# Prints how to invoke the function.
greeting() {
    local function_name=function # the emulator knows no other
    local headers=''
    if [ -n "$daemon" ]; then
        function_name=$AWS_LAMBDA_FUNCTION_NAME
    elif [ -n "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ]; then
        # The runtime of Managed Instances asks for it.
        headers=" -H 'Content-Type: application/json'"
    fi
    local url=http://$address:$port/2015-03-31/functions/$function_name/invocations
    echo "starting; Ctrl-C ends it. Try:"
    echo "    curl -XPOST $url$headers -d '{\"key\": \"value\"}'"
}

run_in_docker() {
    # Without this variable Docker uses the engine's own builder. Another one may keep the image to
    # itself.
    await env -u BUILDX_BUILDER docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" --tag "$name" . ||
        fail "the image cannot be built; see above"

    # As on Lambda: an unprivileged user without capabilities, a read-only file system with 512 MB
    # of /tmp and without /dev/shm, 1,024 processes, each with 1,024 open files.
    local options=(--cap-drop ALL --security-opt no-new-privileges --read-only
        --tmpfs "/tmp:exec,size=512m" --ipc none --pids-limit 1024
        --memory "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE}m" --publish "$address:$port:8080")
    local machine=host.docker.internal
    if await is_podman; then
        machine=host.containers.internal
        options+=(--http-proxy=false) # otherwise the function gets this shell's proxies
    else
        # Given --ulimit, podman would forget its other limits.
        options+=(--add-host "$machine:host-gateway" --ulimit nofile=1024)
    fi
    if [ -n "$daemon" ]; then
        default_amqp_uri "$machine"
        # With z, SELinux lets containers read the file, from now on.
        options+=(--volume "$daemon:/usr/local/bin/aws-lambda-rie:ro,z")
        assigned+=(INVOKE_API_HOST=0.0.0.0 PORT=8080)
    elif [ -n "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ]; then
        # For Lambda Managed Instances, the emulator runs as root, and starts the extension and the
        # runtime as Lambda's user.
        options+=(--user root --cap-add SETUID --cap-add SETGID --cap-add KILL)
    fi

    # Naming a variable without setting it keeps it out of the container. Without their names here,
    # Docker would add the proxies of its own configuration, with their passwords.
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
    # Never pulled: an image of this name in a registry is not this one.
    await with_variables "${proxies[@]}" ${passed[@]+"${passed[@]}"} -- \
        docker run --rm --name "$container" --pull never "${options[@]}" "$name" || {
        local status=$?
        # It still runs if only its client has ended, for example because nobody reads its output.
        await docker kill "$container" >/dev/null 2>&1 || :
        fail "the container ended with status $status; see its output above"
    }
}

run_without_docker() {
    [ "$(uname)" = Linux ] || fail "--no-docker needs Linux; use Docker here"
    [ -z "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ] || fail "AWS_LAMBDA_MAX_CONCURRENCY needs Docker"
    # With -E, Python ignores the shell's PYTHON* variables, such as PYTHONHOME.
    await say_if_slow "python3" python3 -E -c '
import sys
if sys.version_info < (3, 10):
    sys.exit("this is Python " + sys.version)
' || fail "this needs Python 3.10 or newer; try: apt-get install python3 python3-pip"
    if [ -n "$daemon" ]; then
        default_amqp_uri localhost
    fi
    export "${settings[@]}"
    # If it fails, it has already said why.
    await with_variables ${passed[@]+"${passed[@]}"} "LAMBDA_RUNTIME_API_DAEMON=$daemon" -- \
        python3 -E scripts/run_without_docker.py "$address" "$port" "$(greeting)" \
        "${settings[@]}" ${passed[@]+"${passed[@]%%=*}"} ${assigned[@]+"${assigned[@]}"} || exit 1
}

# Asks the engine, and pulls the base image if necessary. Sets $obstacle to the reason why Docker
# cannot be used, or to an empty string.
prepare_docker() {
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

is_podman() { [[ $(docker run --help 2>&1) = *--http-proxy* ]]; }

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
prepare_docker
if [ -z "$obstacle" ]; then
    run_in_docker
elif [ "$way" = --docker ]; then
    fail "$obstacle; on Linux, --no-docker runs without it"
else
    say "running without Docker, on this machine: $obstacle"
    run_without_docker
fi
