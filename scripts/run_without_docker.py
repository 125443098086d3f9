# SPDX-License-Identifier: MIT-0
"""Runs the sample on this Linux machine, without Docker. python-example-extension.sh starts it:

    python3 -E scripts/run_without_docker.py ADDRESS PORT GREETING [NAME | NAME=VALUE]...

The emulator, or the Daemon that LAMBDA_RUNTIME_API_DAEMON names, listens on that address and port.
The function and the extension get each variable NAME=VALUE, each NAME with its value in this
process, and what they need from here, but nothing else. The greeting is printed when all is ready.

What the image would contain is installed into the folder .run, once for each Python and each set of
pins. Each run has a folder of its own in .run; the folder opt inside it appears as /opt.

SIGINT, SIGTERM, SIGHUP or SIGQUIT ends it. The signal must be sent to its process group, so that
the emulator gets it as well.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

SAMPLE = Path(__file__).resolve().parents[1]
NAME = next(SAMPLE.glob("*/extension.py")).parent.name
RUNS = SAMPLE / ".run"
PIP_INSTALL = SAMPLE / "scripts" / "pip_install.py"
OPT = Path("/opt")
# Not a link to it: an environment made through a link looks for the standard library beside it.
PYTHON = os.path.realpath(sys.executable)

# These signals stay blocked, and the program takes them where it waits (sigwait). So none of them
# interrupts it elsewhere, and none is lost: Linux keeps a blocked signal pending, SIGCHLD included.
ENDING_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
AWAITED_SIGNALS = ENDING_SIGNALS | {signal.SIGCHLD}


def say(text: str) -> None:
    """Prints a line of this program's own to standard error."""
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def fail(text: str) -> NoReturn:
    """Prints why the sample cannot run, and exits with status 1."""
    say(text)
    sys.exit(1)


def start(command: list[str | Path], **options) -> subprocess.Popen:
    """Starts a command, in which AWAITED_SIGNALS are not blocked.

    Exits instead if a signal has asked this program to end.
    """

    def unblock_signals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED_SIGNALS)

    if ENDING_SIGNALS & signal.sigpending():
        sys.exit(0)
    # This program has one thread, so preexec_fn is safe.
    return subprocess.Popen(command, preexec_fn=unblock_signals, **options)  # noqa: PLW1509


def wait_for(process: subprocess.Popen) -> int:
    """Waits until the process ends, and returns its status.

    If a signal asks this program to end, waits up to three seconds for the process, which has got
    the signal as well, then kills it if necessary, and exits with status 0.
    """
    while process.poll() is None:
        if signal.sigwait(AWAITED_SIGNALS) in ENDING_SIGNALS:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=3)  # AWS's emulator kills an extension after two
            process.kill()
            process.wait()
            sys.exit(0)
    return process.returncode


def run(command: list[str | Path], **options) -> int:
    """Runs a command to its end, and returns its status."""
    return wait_for(start(command, **options))


def try_to_lock(file: int) -> bool:
    """Locks a file, unless another process holds its lock; returns whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(folder: Path) -> int:
    """Opens the lock file of a folder, and returns its descriptor."""
    # For writing, because the locks of NFS need that.
    return os.open(folder / "lock", os.O_CREAT | os.O_WRONLY, 0o600)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Locks a folder, waiting if another run has locked it; yields the descriptor of the lock.

    The lock lasts until the last process that has inherited the descriptor has ended.
    """
    file = open_lock(folder)
    begin = time.monotonic()
    said = False
    while not try_to_lock(file):
        if not said and time.monotonic() - begin > 2:
            say("waiting for another run to get ready")
            said = True
        if signal.sigtimedwait(ENDING_SIGNALS, 0.05):
            sys.exit(0)
    try:
        yield file
    finally:
        os.close(file)


def remove_folders_of_killed_runs() -> None:
    """Removes the folders in .run that no run has locked."""
    for folder in RUNS.glob("run.*"):
        try:
            file = open_lock(folder)
        except FileNotFoundError:
            continue  # its run has just ended, and removed it
        if try_to_lock(file):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(file)


@contextlib.contextmanager
def own_folder() -> Iterator[tuple[Path, int]]:
    """Makes a folder for this run and locks it; yields it, and the descriptor of its lock."""
    folder = Path(tempfile.mkdtemp(prefix="run.", dir=RUNS))
    try:
        with locked(folder) as lock:
            yield folder, lock
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pip_install(pins: Path, target: Path, temporary: Path, *options: str) -> None:
    """Installs the packages that a file pins into the folder target."""
    command = [PYTHON, "-E", PIP_INSTALL, pins, "--target", target]
    environment = os.environ | {"TMPDIR": str(temporary)}
    if run([*command, *options], env=environment, stdout=sys.stderr) != 0:
        fail("pip failed; see its output above")


def install(folder: Path) -> Path:
    """Installs what the image contains, if necessary; returns the folder where it is.

    It is put together in this run's own folder, and appears in .run all at once.
    """
    function_pins = SAMPLE / "requirements.txt"
    extension_pins = SAMPLE / NAME / "requirements.txt"
    emulator_pins = SAMPLE / "scripts" / "requirements-rie.txt"
    # Whatever decides what is installed.
    key = f"{platform.machine()} {PYTHON} {sys.version}".encode()
    for file in function_pins, extension_pins, emulator_pins, PIP_INSTALL, Path(__file__):
        key += file.read_bytes()
    installed = RUNS / f"{NAME}-{hashlib.sha256(key).hexdigest()[:16]}"
    if installed.exists():
        return installed

    cpu = {"x86_64": "x86_64", "aarch64": "arm64"}.get(platform.machine())
    if not cpu:
        fail(f"there is no emulator for the CPU {platform.machine()}")
    say(f"installing the dependencies into {RUNS} (once)")
    new = folder / "new"
    # The function's packages go into a virtual environment, which hides this machine's.
    if run([PYTHON, "-E", "-m", "venv", "--without-pip", new / "python"]) != 0:
        fail("no virtual environment can be made; see above")
    (site_packages,) = new.glob("python/lib/python*/site-packages")
    pip_install(function_pins, site_packages, folder)
    pip_install(extension_pins, new / "opt" / NAME, folder)
    pip_install(emulator_pins, folder / "sam", folder, "--no-compile")
    binary = folder / "sam" / "samcli" / "local" / "rapid" / f"aws-lambda-rie-{cpu}"
    binary.rename(new / "aws-lambda-rie")
    return new.rename(installed)


def copy_executable(file: Path, folder: Path) -> Path:
    """Copies a script into a folder, and makes it executable: a ZIP file may have lost that."""
    copy = Path(shutil.copy(file, folder))
    copy.chmod(0o755)
    return copy


def make_opt(installed: Path, folder: Path) -> Path:
    """Makes what is /opt in the image, and returns its folder."""
    opt = Path(shutil.copytree(installed / "opt", folder / "opt", symlinks=True))
    for file in (SAMPLE / NAME).glob("*.py"):
        shutil.copy(file, opt / NAME)
    (opt / "extensions").mkdir()
    copy_executable(SAMPLE / "extensions" / NAME, opt / "extensions")
    return opt


def isolating_command(opt: Path) -> list[str | Path]:
    """Returns the words to put before a command so that it sees that folder as /opt.

    Only that command sees the mounts, and all its processes end with it. For an ordinary user, it
    runs as root of a namespace of its own, without more rights. Returns an empty list where this
    does not work; then `unshare` or `mount` has said why.
    """
    options = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        options.append("--map-root-user")
    command = ["unshare", *options, "sh", SAMPLE / "scripts" / "mount-opt", opt]
    try:
        status = run([*command, "true"])
    except FileNotFoundError as error:
        say(str(error))
        return []
    return command if status == 0 else []


def remove_dead_links() -> None:
    """Removes from /opt the links of runs that were killed."""
    for link in OPT.iterdir():
        if link.is_symlink() and "/.run/run." in os.readlink(link) and not link.exists():
            link.unlink()


@contextlib.contextmanager
def links(opt: Path) -> Iterator[None]:
    """Links the extension into /opt, and removes the links in the end."""
    with contextlib.ExitStack() as made:
        try:
            remove_dead_links()
            for name in "extensions", NAME:
                link = OPT / name
                link.symlink_to(opt / name)
                made.callback(link.unlink)
        except OSError as error:
            say(str(error))
            fail("cannot link into /opt; end the other run there, or use --docker, or run as root")
        yield


def free_port(reserved: int) -> int:
    """Returns a free port of loopback, from below those that Linux uses for connections.

    It is not the reserved one, on which nothing listens yet.
    """
    while True:
        port = random.randrange(20_000, 32_768)
        if port == reserved:
            continue
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def emulator_command(installed: Path, address: str, port: str) -> tuple[list[str], dict[str, str]]:
    """Returns the command of what emulates Lambda, and the variables that it needs."""
    api_port = str(free_port(reserved=int(port)))
    daemon = os.environ.get("LAMBDA_RUNTIME_API_DAEMON")
    if daemon:
        return [daemon], {"INVOKE_API_HOST": address, "PORT": port, "RUNTIME_API_PORT": api_port}
    command = [
        str(installed / "aws-lambda-rie"),
        f"--runtime-interface-emulator-address={address}:{port}",
        f"--runtime-api-address=127.0.0.1:{api_port}",
    ]
    return command, {}


def variables(words: list[str]) -> dict[str, str]:
    """Returns the variables NAME of this process, and those that are given as NAME=VALUE."""
    found = {}
    for word in words:
        name, equals_sign, value = word.partition("=")
        if equals_sign:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def run_sample(address: str, port: str, greeting: str, words: list[str]) -> NoReturn:
    """Runs the sample until it ends, or a signal ends it."""
    with contextlib.ExitStack() as stack:
        # One run at a time cleans up and installs, so none removes what another has just made.
        with locked(RUNS):
            remove_folders_of_killed_runs()
            folder, lock = stack.enter_context(own_folder())
            installed = install(folder)
        opt = make_opt(installed, folder)
        isolated = isolating_command(opt)
        if not isolated:
            say("no namespaces here, see above: linking into /opt for the duration of the run")
            stack.enter_context(links(opt))

        command, settings = emulator_command(installed, address, port)
        given = variables(words)
        path = [f"{installed}/python/bin", given.pop("PATH", ""), "/usr/local/bin:/usr/bin:/bin"]
        environment = {
            "PATH": ":".join(filter(None, path)),
            # The function runs in the sample's folder, and leaves no bytecode there.
            "LAMBDA_TASK_ROOT": str(SAMPLE),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        entrypoint = copy_executable(SAMPLE / "lambda-entrypoint.sh", folder)
        handler = re.search(r'(?m)^CMD.*"(.*)"', (SAMPLE / "Dockerfile").read_text())
        if not handler:
            fail('the Dockerfile has no CMD ["HANDLER"]')
        say(greeting)
        status = run(
            [*isolated, *command, entrypoint, handler[1]],
            env=environment | given | settings,
            cwd="/",  # the emulator stumbles over some folders' names
            pass_fds=[lock],  # another run keeps this folder even if this program alone is killed
        )
        fail(f"{Path(command[0]).name} ended with status {status}; see its output above")


def make_folder_of_runs() -> None:
    """Makes .run, which nobody else can read, or says why not."""
    try:
        RUNS.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        fail(f"{RUNS} is not a folder: remove it")
    if os.geteuid() not in (0, RUNS.stat().st_uid):
        fail(f"{RUNS} belongs to another user, who ran this before: remove it")


def main() -> None:
    """Runs the sample as the command line says."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would never be pending
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED_SIGNALS)
    address, port, greeting, *words = sys.argv[1:]
    try:
        make_folder_of_runs()
        run_sample(address, port, greeting, words)
    except OSError as error:
        fail(f"cannot run here: {error}")


main()
