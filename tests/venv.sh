# shellcheck shell=bash
# Makes, once for each change of file $1, the virtual environment in folder $2 with the packages that the file pins.
venv() {
    local made_for
    made_for="$PWD $(cksum <"$1")" # its scripts contain its path
    mkdir -p .venv
    (
        python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' # until another run has made it
        [ "$(cat "$2/made-for" 2>/dev/null)" != "$made_for" ] || ! "$2/bin/python3" -c '' || exit 0
        echo "Installing the $(grep -c == "$1") packages of $1 into $2, once"
        rm -rf "$2"
        # Debian and Ubuntu keep venv's own pip in a separate package, so the pip outside installs into the environment,
        # with the options of scripts/pip-install, which cannot install programs.
        python3 -m venv --without-pip "$2"
        env -u PIP_TARGET -u PIP_PREFIX PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 "$2/bin/python3" \
            "$(python3 -c 'import pip; print(*pip.__path__)')" install --ignore-installed --disable-pip-version-check \
            --no-deps --require-hashes --only-binary :all: -r "$1"
        echo "$made_for" >"$2/made-for"
    ) 9>.venv/lock
}
