# shellcheck shell=bash
# Makes, once for each change of file $1, the virtual environment in folder $2 with the packages that the file pins.
venv() {
    cmp -s "$1" "$2/requirements.txt" && "$2/bin/python3" -c '' && return
    echo "Installing the packages of $1 into $2 (once, about half a minute)"
    rm -rf "$2"
    # Debian and Ubuntu keep venv's own pip in a package apart; pip can serve an environment from outside.
    python3 -m venv --without-pip "$2"
    python3 -m pip --python "$2/bin/python3" install --quiet --disable-pip-version-check \
        --require-hashes --only-binary :all: -r "$1"
    cp "$1" "$2/requirements.txt"
}
