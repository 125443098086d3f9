# shellcheck shell=bash
# Makes, once for each change of file $1, the virtual environment in folder $2 with the packages that the file pins.
venv() {
    cmp -s "$1" "$2/requirements.txt" && "$2/bin/python3" -c '' && return
    echo "Installing the packages of $1 into $2 (once, about half a minute)"
    rm -rf "$2"
    # Debian and Ubuntu keep venv's own pip in a separate package, so the pip outside installs into the environment.
    python3 -m venv --without-pip "$2"
    env -u PIP_TARGET -u PIP_PREFIX PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 "$2/bin/python3" \
        "$(python3 -c 'import pip; print(*pip.__path__)')" install --quiet --ignore-installed --disable-pip-version-check \
        --no-deps --require-hashes --only-binary :all: -r "$1"
    cp "$1" "$2/requirements.txt"
}
