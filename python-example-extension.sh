#!/usr/bin/env bash
# Builds the sample and runs it here: in Docker, or directly on this Linux machine. It works with
# macOS's bash 3.2 too.
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

listens() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; }
say() { echo "$name: $*" >&2; }
fail() {
    say "$1"
    exit "${2:-1}"
}

self=$(readlink -f "$0" 2>/dev/null || echo "$0") # older macOS has no -f
name=$(basename "$self" .sh)

# --- Options and variables ------------------------------------------------------------------------
# The function and the extension get these variables of this shell, and what -e adds: NAME here,
# NAME=VALUE there.
passed=(AWS_LAMBDA_FUNCTION_NAME AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_TIMEOUT
    AWS_LAMBDA_MAX_CONCURRENCY MAX_CONCURRENCY AMQP_URI AMQP_USERNAME AMQP_PASSWORD)
assigned=()
settings=" ${passed[*]} BASE_IMAGE LAMBDA_RUNTIME_API_DAEMON " # for this script, too, also by -e
AWS_LAMBDA_FUNCTION_NAME=$name
way='' obstacle='' publish=127.0.0.1:8080 job='' container='' run=''
while [ $# -gt 0 ]; do
    [[ $1 != -[ep] || $# -gt 1 ]] || fail "$1 takes a value; see --help" 2
    case $1 in
    -h | --help) usage && exit ;;
    --docker | --no-docker) way=$1 ;;
    -p) publish=$2 && shift ;;
    -e)
        [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*(=|$) ]] || fail "-e takes NAME or NAME=VALUE, not '$2'" 2
        if [[ $2 != *=* ]]; then
            if printenv "$2" >/dev/null; then passed+=("$2"); fi
        elif [[ $settings = *" ${2%%=*} "* ]]; then
            export "${2?}"
        else
            assigned+=("$2")
        fi
        shift
        ;;
    *) fail "unknown argument '$1'; see --help" 2 ;;
    esac
    shift
done

[[ $publish =~ ^(([0-9]+(\.[0-9]+){3}):)?([1-9][0-9]{0,4})$ && ${publish##*:} -le 65535 ]] ||
    fail "-p takes [ADDRESS:]PORT, an IPv4 address and a number from 1 to 65535, not '$publish'" 2
address=${BASH_REMATCH[2]:-127.0.0.1} port=${publish##*:}

daemon=${LAMBDA_RUNTIME_API_DAEMON:-}
if [ -n "$daemon" ]; then
    if [[ $daemon != /* ]]; then daemon=${PWD%/}/$daemon; fi
    [[ -f $daemon && -x $daemon ]] ||
        fail "LAMBDA_RUNTIME_API_DAEMON: $daemon is not an executable file"
    : "${MAX_CONCURRENCY:=1}"
    unset AWS_LAMBDA_MAX_CONCURRENCY # it is for the emulator, and would change the runtime
fi
for variable in AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_TIMEOUT \
    AWS_LAMBDA_MAX_CONCURRENCY ${daemon:+MAX_CONCURRENCY}; do
    [ -n "${!variable:-}" ] || unset "$variable" # the emulator takes an empty one for a number
    [[ ${!variable:-1} =~ ^[1-9][0-9]*$ ]] ||
        fail "$variable takes a whole number from 1, not '${!variable}'" 2
done

CDPATH='' cd "$(dirname "$self")"
: "${BASE_IMAGE:=$(sed -n 's/^ARG BASE_IMAGE=//p' Dockerfile)}"
: "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE:=$(sed -n 's/^ *MemorySize: //p' template.yaml)}"

# --- What this script starts ends with it ---------------------------------------------------------
# This script alone holds descriptor 3, so descriptor 4 reads to an end when it is killed.
lifeline=$(mktemp -u)
mkfifo -m 600 "$lifeline" && exec 3<>"$lifeline" && exec 4<"$lifeline" && rm "$lifeline"

# Runs a command to its end, in a process group that no Ctrl-C reaches; a watcher ends it when this
# script is killed.
await() {
    kill -- "-$job" 2>/dev/null || : # the watcher of the job before
    set -m
    (
        job=$(exec sh -c 'echo $PPID') # macOS's bash has no BASHPID
        (read -r || end_job) <&4 >/dev/null 2>&1 &
        exec "$@" 4<&-
    ) 3>&- &
    job=$!
    set +m
    wait "$job"
}

end_job() {
    [ -n "$container" ] || kill -- "-$job"
    # Nothing can stop a container before it is created.
    while [ -n "$container" ] && kill -0 "$job" && ! docker stop -t 2 "$container"; do
        sleep 0.1
    done
}

finish() {
    trap '' INT TERM HUP QUIT
    set +e
    end_job
    while kill -0 "$job"; do wait "$job"; done # a signal from before may cut one wait short
    rm -rf "$run"
    remove_dead_links
} >/dev/null 2>&1
trap finish EXIT
# Not in EXIT's trap, which another signal would cut short.
trap 'finish; trap - EXIT; exit 0' INT TERM HUP QUIT

run_in_docker() {
    # Another builder than the engine's own may keep the image to itself.
    await env -u BUILDX_BUILDER docker build --build-arg "BASE_IMAGE=$BASE_IMAGE" --tag "$name" . ||
        fail "the image cannot be built; see above"
    # As on Lambda: an unprivileged user, no capabilities, 512 MB of /tmp in a read-only file
    # system, 1,024 processes.
    local options=(--cap-drop ALL --security-opt no-new-privileges --read-only
        --tmpfs "/tmp:exec,size=512m" --pids-limit 1024
        --memory "${AWS_LAMBDA_FUNCTION_MEMORY_SIZE}m" --publish "$address:$port:8080")
    if [[ $engine = *Podman* ]]; then
        machine=host.containers.internal
        options+=(--http-proxy=false) # otherwise the function gets the variables of proxies
    else
        machine=host.docker.internal
        options+=(--add-host "$machine:host-gateway")
    fi
    if [ -n "$daemon" ]; then
        options+=(--volume "$daemon:/usr/local/bin/aws-lambda-rie:ro")
        assigned+=(INVOKE_API_HOST=0.0.0.0 PORT=8080)
    elif [ -n "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ]; then
        # For Lambda Managed Instances the emulator starts as root, and the extension and the
        # runtime as Lambda's user.
        options+=(--user root --cap-add SETUID --cap-add SETGID --cap-add KILL)
    fi
    announce
    container=$name-$$
    # Never pulled: it would be a stranger's image.
    await docker run --rm --name "$container" --pull never "${options[@]}" \
        "${passed[@]/#/--env=}" ${assigned[@]+"${assigned[@]/#/--env=}"} "$name" ||
        fail "the container ended with status $?; see its output above"
    exit
}

# Says how to invoke the function, and exports its variables.
announce() {
    local function=function headers=''
    if [ -n "$daemon" ]; then
        function=$AWS_LAMBDA_FUNCTION_NAME
        # The Daemon exits when it runs out of attempts. An empty AMQP_URI means no broker.
        local parameters="connection_attempts=1000000&retry_delay=10&heartbeat=10"
        AMQP_URI=${AMQP_URI-amqp://$machine:5672?$parameters}
    elif [ -n "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ]; then
        headers=" -H 'Content-Type: application/json'"
    fi
    export "${passed[@]}"
    local url=http://$address:$port/2015-03-31/functions/$function/invocations
    say "starting; Ctrl-C ends it. Try:
    curl -XPOST $url$headers -d '{\"key\": \"value\"}'"
}

# Makes a folder for this run, locked for as long as one of its processes lives, and removes those
# of killed runs.
make_run_folder() {
    install -d -m 700 .run
    exec 8<.run
    await flock 8 # one run at a time prepares itself
    find .run -maxdepth 1 -name 'run.*' -exec flock -n {} rm -rf {} \;
    run=$(mktemp -d "$PWD/.run/run.XXXXXX")
    exec 9<"$run" && flock 9
}

# Installs what the image contains, once for each Python and each set of pins; sets $installed.
install_dependencies() {
    local files=(scripts/pip-install requirements.txt requirements-rie.txt "$name/requirements.txt")
    installed=$PWD/.run/$name-$({ uname -m && command -v python3 && python3 --version &&
        cat "${files[@]}"; } | cksum | tr ' ' -)
    if [ -d "$installed" ]; then return; fi
    say "installing the dependencies into $PWD/.run (once)"
    # The function's in a virtual environment, which hides this machine's packages.
    await python3 -E -m venv --without-pip "$run/new/python"
    pip_install requirements.txt --target "$run"/new/python/lib/python*/site-packages
    pip_install "$name/requirements.txt" --target "$run/new/opt/$name"
    pip_install requirements-rie.txt --target "$run/sam" --no-compile
    mv "$run/sam/samcli/local/rapid/aws-lambda-rie-$(uname -m | sed s/aarch64/arm64/)" \
        "$run/new/aws-lambda-rie"
    mv "$run/new" "$installed"
}

pip_install() {
    TMPDIR=$run await scripts/pip-install "$@" >&2 || fail "pip failed; see its words above"
}

# Shows the extension in /opt: by mounts that only this run sees, or where these are refused, by
# links.
show_in_opt() {
    cp -Rp "$installed/opt" "$run"
    cp "$name"/*.py "$run/opt/$name"
    mkdir "$run/opt/extensions"
    install -m 755 "extensions/$name" "$run/opt/extensions"
    isolated=(unshare --mount --pid --fork --kill-child --mount-proc)
    if [ "$(id -u)" != 0 ]; then isolated+=(--map-root-user); fi
    isolated+=(scripts/mount-opt "$run/opt")
    if ! "${isolated[@]}" true; then
        isolated=()
        say "no namespaces here: linking into /opt for the duration of the run"
        remove_dead_links
        ln -s "$run"/opt/* /opt ||
            fail "cannot link into /opt; end the run that uses it, or use --docker, or root"
    fi
}

remove_dead_links() { find /opt -maxdepth 1 -xtype l -lname '*/.run/run.*' -delete; }

run_without_docker() {
    [ "$(uname)" = Linux ] || fail "--no-docker needs Linux; use Docker here"
    [ -z "${AWS_LAMBDA_MAX_CONCURRENCY:-}" ] || fail "AWS_LAMBDA_MAX_CONCURRENCY needs Docker"
    [[ $(python3 --version 2>&1) =~ ^Python\ 3\.([0-9]+) && ${BASH_REMATCH[1]} -ge 10 ]] ||
        fail "this needs Python 3.10 or newer; try: apt-get install python3 python3-pip"
    make_run_folder
    install_dependencies
    show_in_opt
    exec 8<&- # the next run may prepare itself
    local machine=localhost emulator api_port=$((10000 + RANDOM % 20000)) hidden=() variable
    while listens 127.0.0.1 "$api_port"; do api_port=$((api_port + 1)); done
    emulator=("$installed/aws-lambda-rie" --runtime-interface-emulator-address "$address:$port"
        --runtime-api-address "127.0.0.1:$api_port")
    if [ -n "$daemon" ]; then
        emulator=("$daemon")
        assigned+=("INVOKE_API_HOST=$address" "PORT=$port" "RUNTIME_API_PORT=$api_port")
    fi
    announce
    while IFS='=' read -r -d '' variable _; do
        if [[ " ${passed[*]} " != *" $variable "* ]]; then hidden+=("--unset=$variable"); fi
    done < <(env -0)
    # The function runs in this folder, and leaves no bytecode; the emulator elsewhere: it stumbles
    # over some names.
    await timeout --kill-after 2 0 "${isolated[@]}" env --chdir / "${hidden[@]}" \
        "PATH=$installed/python/bin:/usr/local/bin:/usr/bin:/bin" "LAMBDA_TASK_ROOT=$PWD" \
        PYTHONDONTWRITEBYTECODE=1 ${assigned[@]+"${assigned[@]}"} "${emulator[@]}" \
        "$PWD/lambda-entrypoint.sh" "$(sed -n 's/^CMD.*"\(.*\)".*/\1/p' Dockerfile)" ||
        fail "${emulator[0]##*/} ended with status $?; see its output above"
}

! listens "$address" "$port" || fail "port $port is in use on $address; choose another with -p"
if [ "$way" != --no-docker ]; then
    if ! command -v docker >/dev/null; then
        obstacle="there is no docker command"
    elif ! engine=$(docker version 2>&1); then
        obstacle="no Docker engine answers: ${engine##*$'\n'}"
    elif ! docker image inspect "$BASE_IMAGE" >/dev/null 2>&1 &&
        ! await docker pull "$BASE_IMAGE" >&2; then
        obstacle="the base image $BASE_IMAGE cannot be pulled; set BASE_IMAGE to a local image"
    fi
    [ -n "$obstacle" ] || run_in_docker # and exit
    [ -z "$way" ] || fail "$obstacle; on Linux, --no-docker runs without it"
    say "running without Docker, on this machine: $obstacle"
fi
run_without_docker
