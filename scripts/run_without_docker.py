# SPDX-License-Identifier: MIT-0
"""Runs the sample on this Linux machine, without Docker. python-example-extension.sh starts it:

    python3 -E scripts/run_without_docker.py ADDRESS PORT GREETING [NAME | NAME=VALUE]...

The emulator, or the Daemon that LAMBDA_RUNTIME_API_DAEMON names, listens on that address and port.
The function and the extension get each variable NAME=VALUE, each NAME with its value in this
process, and what they need from here, but nothing else.

What the image would contain is installed into the folder .run, once for each Python and each set of
pins. This program then becomes the emulator, so whatever stops the emulator stops the run.
"""

import contextlib
import hashlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1]
NAME = next(SAMPLE.glob("*/extension.py")).parent.name
RUNS = SAMPLE / ".run"
# Not a link to it: a venv created through a link looks for the standard library next to the link.
PYTHON = os.path.realpath(sys.executable)

# With these words before it, a command does not outlive the process that has started it.
END_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL"]

# A shell's code. It shows the folder $0 as /opt, with this machine's own /opt in .machine below it,
# and then becomes a command.
SHOW_OPT = 'mount --rbind /opt "$0/.machine" && mount --rbind "$0" /opt && exec "$@"'


def say(text: str) -> None:
    """Prints a line of this program's own to standard error."""
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def pip_install(pins: Path, target: Path) -> None:
    """Installs the wheels that a lock file pins into the folder target."""
    pip = [PYTHON, "-E", "-m", "pip", "install", "--disable-pip-version-check"]
    options = ["--no-deps", "--require-hashes", "--target", target, "--requirement", pins]
    # The user may have set these two for pip, and neither fits --target.
    environment = os.environ | {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    command = [*END_WITH_PARENT, *pip, *options]
    installed = subprocess.run(command, env=environment, check=False)
    if installed.returncode != 0:
        sys.exit(f"{NAME}: pip failed; see above. If pip is missing: apt-get install python3-pip")


def install() -> Path:
    """Installs what the image contains, if necessary; returns the folder where it is."""
    function_pins = SAMPLE / "requirements.txt"
    extension_pins = SAMPLE / NAME / "requirements.txt"
    emulator_pins = SAMPLE / "scripts" / "requirements-rie.txt"
    key = f"{platform.machine()} {PYTHON} {sys.version}".encode()
    for file in function_pins, extension_pins, emulator_pins, Path(__file__):
        key += file.read_bytes()
    installed = RUNS / f"{NAME}-{hashlib.sha256(key).hexdigest()[:16]}"
    if installed.exists():
        return installed

    say(f"installing the dependencies into {RUNS} (once)")
    with tempfile.TemporaryDirectory(prefix="new.", dir=RUNS) as folder:
        new = Path(folder, "new")
        # The function's packages go into a virtual environment, which hides this machine's.
        venv = [PYTHON, "-E", "-m", "venv", "--without-pip", new / "python"]
        subprocess.run([*END_WITH_PARENT, *venv], check=True)
        (site_packages,) = new.glob("python/lib/python*/site-packages")
        pip_install(function_pins, site_packages)
        pip_install(extension_pins, new / "extension")
        pip_install(emulator_pins, new / "emulator")
        with contextlib.suppress(OSError):  # another run was faster
            new.rename(installed)
    return installed


def copy_script(file: Path, folder: Path) -> str:
    """Copies a script, as the Dockerfile does: executable, and without Windows line endings."""
    copy = folder / file.name
    copy.write_bytes(file.read_bytes().replace(b"\r\n", b"\n"))
    copy.chmod(0o755)
    return str(copy)


def make_opt(installed: Path, opt: Path) -> None:
    """Creates what is /opt in the image, beside what this machine has there."""
    shutil.rmtree(opt, ignore_errors=True)
    shutil.copytree(installed / "extension", opt / NAME)
    for file in (SAMPLE / NAME).glob("*.py"):
        shutil.copy(file, opt / NAME)
    (opt / "extensions").mkdir()
    copy_script(SAMPLE / "extensions" / NAME, opt / "extensions")
    (opt / ".machine").mkdir()
    for path in Path("/opt").iterdir():
        if path.name not in ("extensions", NAME):
            (opt / path.name).symlink_to(f".machine/{path.name}")


def words_that_show_opt(opt: Path) -> list[str]:
    """Returns the words to put before a command so that it alone sees that folder as /opt.

    For an ordinary user, the command runs as root of a namespace of its own, without more rights.
    Where this is refused, links the folder into /opt instead, and returns an empty list.
    """
    options = ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]
    words = ["unshare", *options, "sh", "-c", SHOW_OPT, str(opt)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run([*words, "true"], check=False).returncode == 0:
            return words
    say("this machine refuses a mount of its own, see above: linking into /opt")
    for name in "extensions", NAME:
        link = Path("/opt", name)
        if link.is_symlink() and "/.run/" in os.readlink(link):
            link.unlink()  # of an earlier run
        try:
            link.symlink_to(opt / name)
        except OSError as error:
            sys.exit(f"{NAME}: {error}; use --docker, or run as root")
    return []


def emulator(installed: Path, address: str, port: str) -> tuple[list[str], dict[str, str]]:
    """Returns the command of what emulates Lambda, and the variables that it needs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        api_port = str(server.getsockname()[1])  # which is free
    daemon = os.environ.get("LAMBDA_RUNTIME_API_DAEMON")
    if daemon:
        return [daemon], {"INVOKE_API_HOST": address, "PORT": port, "RUNTIME_API_PORT": api_port}
    cpu = platform.machine().replace("aarch64", "arm64")
    command = [
        f"{installed}/emulator/samcli/local/rapid/aws-lambda-rie-{cpu}",
        f"--runtime-interface-emulator-address={address}:{port}",
        f"--runtime-api-address=127.0.0.1:{api_port}",
    ]
    return command, {}


def environment_of(words: list[str], installed: Path) -> dict[str, str]:
    """Returns what the function and the extension get: what the words say, and what they need."""
    given = {name: os.environ[name] for name in words if name in os.environ}
    given |= dict(word.split("=", 1) for word in words if "=" in word)
    path = [f"{installed}/python/bin", given.pop("PATH", ""), "/usr/local/bin:/usr/bin:/bin"]
    needed = {
        "PATH": ":".join(filter(None, path)),
        "LAMBDA_TASK_ROOT": str(SAMPLE),
        "PYTHONDONTWRITEBYTECODE": "1",  # the function runs in the sample's folder
    }
    return needed | given


def main() -> None:
    """Becomes the emulator."""
    # Until then, SIGTERM raises an exception, as Ctrl-C does: pip ends, and `with` cleans up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    address, port, greeting, *words = sys.argv[1:]
    RUNS.mkdir(exist_ok=True)
    installed = install()
    # Only one run at a time can listen there, so this folder is its own.
    folder = RUNS / f"{address}-{port}"
    make_opt(installed, folder / "opt")
    command, settings = emulator(installed, address, port)
    entrypoint = copy_script(SAMPLE / "lambda-entrypoint.sh", folder)
    (handler,) = re.findall(r'(?m)^CMD.*"(.*)"', (SAMPLE / "Dockerfile").read_text())
    # The extension notices by itself that the emulator has ended.
    runtime = [*END_WITH_PARENT, entrypoint, handler]
    command = [*words_that_show_opt(folder / "opt"), *command, *runtime]
    environment = environment_of(words, installed) | settings
    say(greeting)
    os.chdir("/")
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"{NAME}: cannot run here: {error}")
