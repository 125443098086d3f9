#!/usr/bin/env bash
# Builds the sample and runs it here: in Docker, or directly on this Linux host. It runs with macOS's bash 3.2 too.
set -euo pipefail
umask 022 # on Lambda Managed Instances another user has to read what is installed here

name=$(basename "$0" .sh)
HOST=${HOST:-127.0.0.1} PORT=${PORT:-8080}

usage() {
    cat <<END
usage: ./$name.sh [--docker | --host] [-e NAME[=VALUE]]...

Without --docker or --host: in Docker if that is possible, otherwise on this host.
  --docker   build the image and run it
  --host     run without Docker (Linux, with Python 3.10 or newer and pip)
  -e         set an environment variable of the function, or pass on one of this shell's; may be repeated

Environment: HOST and PORT to listen on (127.0.0.1, 8080), BASE_IMAGE of the image,
AWS_LAMBDA_FUNCTION_TIMEOUT in seconds, AWS_LAMBDA_MAX_CONCURRENCY for Lambda Managed Instances.
LAMBDA_RUNTIME_API_DAEMON is the path of the Lambda Runtime API Daemon, to use instead of AWS's emulator;
AWS_LAMBDA_MAX_CONCURRENCY is then its number of runtimes, and AMQP_URI, AMQP_USERNAME, AMQP_PASSWORD its broker.
END
}

say() { echo "$name: $*" >&2; }

fail() {
    say "$1"
    exit "${2:-1}"
}

# --- What to do -------------------------------------------------------------------------------------------------------

mode=
environment=("AWS_LAMBDA_FUNCTION_NAME=$name")

# Adds NAME=VALUE, or NAME with its value in this shell if it has one.
pass_on() {
    [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] || fail "-e takes NAME or NAME=VALUE, not '$1'" 2
    if [[ $1 = *=* ]]; then
        environment+=("$1")
    elif [ -n "${!1+set}" ]; then
        environment+=("$1=${!1}")
    fi
}

daemon=${LAMBDA_RUNTIME_API_DAEMON:-}
pass_on AWS_LAMBDA_FUNCTION_TIMEOUT
if [ -z "$daemon" ]; then
    pass_on AWS_LAMBDA_MAX_CONCURRENCY
else
    environment+=("MAX_CONCURRENCY=${AWS_LAMBDA_MAX_CONCURRENCY:-1}")
    pass_on AMQP_USERNAME
    pass_on AMQP_PASSWORD
fi
while [ $# -gt 0 ]; do
    case $1 in
    --docker | --host)
        [ -z "$mode" ] || fail "--docker or --host, not both; see --help" 2
        mode=${1#--}
        ;;
    -e)
        [ $# -gt 1 ] || fail "-e takes NAME or NAME=VALUE" 2
        pass_on "$2"
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
managed=''
for variable in "${environment[@]}"; do
    [[ $variable != AWS_LAMBDA_MAX_CONCURRENCY=* ]] || managed=yes
done
[[ $HOST =~ ^[0-9]+(\.[0-9]+){3}$ ]] || fail "HOST takes an IPv4 address, not '$HOST'" 2
[[ $PORT =~ ^[1-9][0-9]{0,4}$ && $PORT -le 65535 ]] || fail "PORT takes a number from 1 to 65535, not '$PORT'" 2

if [ -n "$daemon" ]; then
    [ -f "$daemon" ] || fail "LAMBDA_RUNTIME_API_DAEMON: there is no file $daemon"
    [ -x "$daemon" ] || fail "LAMBDA_RUNTIME_API_DAEMON: $daemon is not executable; try: chmod +x $daemon"
    daemon=$(CDPATH='' cd "$(dirname "$daemon")" && pwd)/${daemon##*/}
fi
CDPATH='' cd "$(dirname "$0")"
[ -n "${BASE_IMAGE:-}" ] || BASE_IMAGE=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)

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
        docker pull "$BASE_IMAGE" >&2 || echo "the base image $BASE_IMAGE cannot be pulled"
    fi
}

if [ "$mode" != host ]; then
    obstacle=$(docker_obstacle)
    if [ -z "$obstacle" ]; then
        mode=docker
    elif [ "$mode" = docker ]; then
        fail "$obstacle; name an image that is here with BASE_IMAGE, or try --host"
    else
        mode=host
        say "without Docker, on this host: $obstacle"
    fi
fi
[ "$mode" = docker ] || [ "$(uname)" = Linux ] || fail "--host needs Linux; here the sample needs Docker"

# Whether something listens there, and whether it speaks HTTP.
listens() { (exec 3<>"/dev/tcp/$HOST/$PORT") 2>/dev/null; }
answers() {
    (
        exec 3<>"/dev/tcp/$HOST/$PORT"
        printf 'GET / HTTP/1.0\r\n\r\n' >&3
        read -r -t 2 <&3
    ) 2>/dev/null
}
! listens || fail "port $PORT is in use on $HOST; choose another: PORT=9000 ./$name.sh"

# --- Ways to run it: each starts the background job that ends when the function's emulator does -------------------------

job='' container='' folder='' links=()

# Tells the Daemon which broker to use, on machine $1 unless AMQP_URI says otherwise; an empty AMQP_URI means none.
set_broker() {
    AMQP_URI=${AMQP_URI-amqp://$1:5672?connection_attempts=20&retry_delay=10&heartbeat=0}
    environment+=("AMQP_URI=$AMQP_URI")
}

run_in_docker() {
    local variable options=(--user 1000:1000)
    # For Lambda Managed Instances the emulator starts as root, and the extension and the runtime as Lambda's user.
    [ -z "$managed" ] || options=(--user root --cap-add SETUID --cap-add SETGID --cap-add KILL)
    if [ -n "$daemon" ]; then
        set_broker host.docker.internal
        options+=(--volume "$daemon:/usr/local/bin/aws-lambda-rie:ro" --add-host host.docker.internal:host-gateway)
    fi
    for variable in "${environment[@]}"; do
        options+=(--env "$variable")
    done
    docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" --tag "$name" . &
    job=$!
    wait "$job" || fail "the image cannot be built"
    # As on Lambda: any user, no capabilities, a read-only file system but for /tmp.
    container=$(docker create --rm --publish "$HOST:$PORT:8080" "${options[@]}" --cap-drop ALL \
        --security-opt no-new-privileges --read-only --tmpfs /tmp "$name")
    set -m # in a process group of its own it outlives Ctrl-C, and shows how the container ends
    docker start --attach "$container" &
    job=$!
    set +m
}

# Installs into folder $1 what the image has: the dependencies and the emulator.
install_dependencies() {
    local errors cpu
    pip() { errors=$("$python" -m pip install --quiet --no-cache-dir --disable-pip-version-check "$@" 2>&1) || return 1; }
    "$python" -m pip --version >/dev/null 2>&1 || fail "pip is missing; try: apt-get install python3-pip"
    say "installing the dependencies into $PWD/.host (once, a few seconds)"
    case $(uname -m) in aarch64) cpu=arm64 ;; *) cpu=x86_64 ;; esac
    if ! pip --target "$1/var/task" -r requirements.txt ||
        ! pip --target "$1/opt/$name" -r "$name/requirements.txt" ||
        ! pip --target "$1/sam" --no-deps --no-compile -r requirements-rie.txt ||
        ! errors=$(install "$1/sam/samcli/local/rapid/aws-lambda-rie-$cpu" "$1/aws-lambda-rie" 2>&1); then
        case $errors in
        *"connection broken"*) errors="pip cannot reach its package index; is there a network?" ;;
        *"No space left on device"*) errors="No space left on device" ;;
        esac
        fail "the dependencies cannot be installed: ${errors##*$'\n'}"
    fi
    rm -rf "$1/sam"
}

run_on_host() {
    local version api_port installed emulator handler mounts link path
    # Its version, a free port for the emulator's internal API, and its real path (python3 may be a slow wrapper).
    read -r version api_port python < <(python3 -c '
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print("%d.%d" % sys.version_info[:2], server.getsockname()[1], sys.executable)' 2>/dev/null) &&
        [ "${version#3.}" -ge 10 ] || fail "this needs Python 3.10 or newer; try: apt-get install python3 python3-pip"

    # Every set of dependencies has a folder, which gets its name only when it is complete.
    installed=.host/$version-$(uname -m)-$(cat "$name.sh" requirements*.txt "$name/requirements.txt" | cksum | tr ' ' -)
    if ! mkdir -p .host || ! path=$(mktemp -d "$PWD/.host/run.XXXXXX"); then
        fail "cannot write to $PWD/.host"
    fi
    folder=$path
    if [ ! -d "$installed" ]; then
        install_dependencies "$folder/new"
        mv -T "$folder/new" "$installed" 2>/dev/null || [ -d "$installed" ] || fail "cannot write to $PWD/.host"
    fi

    # What this run sees, as it is in the image; the dependencies as hard links.
    if ! cp -al "$installed/." "$folder" ||
        ! install -D "extensions/$name" "$folder/opt/extensions/$name" ||
        ! install "$name"/*.py "$folder/opt/$name" ||
        ! install ./*.py "$folder/var/task" ||
        ! install -D lambda-entrypoint.sh "$folder/var/runtime/bootstrap"; then
        fail "cannot write to $folder"
    fi
    chmod 755 "$folder"

    # In mount and PID namespaces of its own /opt shows ours above the host's, and whatever is started ends with this
    # script, however that ends.
    # shellcheck disable=SC2016 # it is the inner shell that expands
    mounts='cd "$0" && mount -t overlay -o lowerdir=opt:/opt overlay /opt && mount --bind opt/extensions /opt/extensions &&
        mount -t proc proc /proc'
    # For Lambda Managed Instances the emulator takes no other path than these.
    [ -z "$managed" ] || mounts+=' && mount -t overlay -o lowerdir=var:/var overlay /var'
    isolate=(setpriv --pdeathsig KILL unshare --mount --pid --fork --kill-child)
    if ! "${isolate[@]}" sh -c "$mounts" "$folder" 2>/dev/null; then
        [ -z "$managed" ] || fail "AWS_LAMBDA_MAX_CONCURRENCY needs root here (and mount namespaces); or use --docker"
        isolate+=(--map-root-user)
        if ! "${isolate[@]}" sh -c "$mounts" "$folder" 2>/dev/null; then
            say "no namespaces here: linking into /opt for the time of this run"
            isolate=(setsid) mounts=:
            for path in "$folder"/opt/*; do
                link=/opt/${path##*/}
                [ ! -e "$link" ] && [ ! -L "$link" ] || fail "$link is there already; remove it, or use --docker"
                ln -s "$path" "$link" 2>/dev/null || fail "no user namespaces, and no permission to write to /opt; use --docker, or root"
                links+=("$link")
            done
        fi
    fi

    emulator=("$folder/aws-lambda-rie" --runtime-interface-emulator-address "$HOST:$PORT"
        --runtime-api-address "127.0.0.1:$api_port")
    if [ -n "$daemon" ]; then
        set_broker localhost
        environment+=("INVOKE_API_HOST=$HOST" "PORT=$PORT" "RUNTIME_API_PORT=$api_port")
        emulator=("$daemon")
    fi
    handler=$(sed -n 's/^CMD \["\(.*\)"\]$/\1/p' Dockerfile)
    # Nothing of this shell's environment. (env comes first: what it is told is on its command line for a moment only.)
    # shellcheck disable=SC2016
    env -i PATH="${python%/*}:/usr/local/bin:/usr/bin:/bin" LAMBDA_TASK_ROOT="$folder/var/task" "${environment[@]}" \
        "${isolate[@]}" sh -c 'read -r pid _ </proc/self/stat && echo "$pid" >"$0/pid" # as seen from outside
            '"$mounts"'
            cd "$0/var/task" && exec "$@"' "$folder" "${emulator[@]}" "$folder/var/runtime/bootstrap" "$handler" &
    job=$!
}

# --- Run it until it ends, or until Ctrl-C ------------------------------------------------------------------------------

# Ends what was started, with the 2 seconds for it that Lambda allows, and leaves nothing behind.
finish() {
    local status=$? pid='' stat session
    trap '' INT TERM HUP
    set +e
    if [ -n "$container" ]; then
        docker stop --time 2 "$container"
        docker rm --force "$container"
    elif [ -n "$job" ]; then
        read -r pid <"$folder/pid" || pid=$job
        kill -TERM "$pid"
        for _ in {1..40}; do
            kill -0 "$job" || break
            sleep 0.05
        done
        kill -KILL "$pid" "$job"
        # Without a PID namespace the extension and the runtime outlive the emulator.
        if [ ${#links[@]} -gt 0 ]; then
            for stat in /proc/[0-9]*/stat; do
                read -r _ _ _ _ _ session _ <"$stat" && [ "$session" = "$pid" ] && kill -KILL "$(basename "$(dirname "$stat")")"
            done
            rm -f "${links[@]}"
        fi
    fi >/dev/null 2>&1
    [ -z "$job" ] || wait "$job" 2>/dev/null || true
    [ -z "$folder" ] || rm -rf "$folder"
    exit "$status"
}
trap finish EXIT
trap 'exit 0' INT TERM HUP

if [ "$mode" = docker ]; then run_in_docker; else run_on_host; fi
until answers; do
    kill -0 "$job" 2>/dev/null || fail "it ended before it was ready; its own words are above"
    sleep 0.05
done
# AWS's emulator knows the function by this name alone, the Daemon by its own.
function=function
if [ -n "$daemon" ]; then
    function=$name
    AMQP_URI=${AMQP_URI##*@} # without a password
    say "AMQP: queue $name at ${AMQP_URI:-no broker}. Without a broker there, HTTP works all the same."
    [ "$mode" = host ] || [ -n "${AMQP_USERNAME:-}" ] ||
        say "RabbitMQ lets its user guest in from its own machine only: set AMQP_USERNAME and AMQP_PASSWORD"
fi
say "ready; Ctrl-C ends it. Try:
    curl -XPOST http://${HOST/127.0.0.1/localhost}:$PORT/2015-03-31/functions/$function/invocations -d '{\"key\": \"value\"}'"
wait "$job" || fail "it ended with exit status $?"
