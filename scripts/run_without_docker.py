# SPDX-License-Identifier: MIT-0
"""Runs the sample on this Linux machine, without Docker. python-example-extension.sh starts it:

    python3 -E scripts/run_without_docker.py ADDRESS PORT GREETING [NAME | NAME=VALUE]...

The emulator, or the Daemon that LAMBDA_RUNTIME_API_DAEMON names, listens on that address and port.
The function and the extension get the variables NAME of this process, those that are set here, and
no others. The greeting is printed when all is ready.

What the image would contain is installed into the folder .run, once for each Python and each set of
pins. Each run has a folder of its own in there, with the extension, which it shows as /opt.

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
OPT = Path("/opt")
# Not a link to it: from there, a relocatable Python would not find its standard library.
PYTHON = os.path.realpath(sys.executable)

# These are blocked from the start, and asked for where this program waits. So none of them can come
# at a bad moment, and none is lost.
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
    """Starts a command, which gets the signals that are blocked here; exits if one came before."""

    def unblock_signals():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, AWAITED_SIGNALS)

    if ENDING_SIGNALS & signal.sigpending():
        sys.exit(0)
    # This program has one thread, so preexec_fn is safe.
    return subprocess.Popen(command, preexec_fn=unblock_signals, **options)  # noqa: PLW1509


def wait_for(process: subprocess.Popen) -> int:
    """Waits until the process ends, and returns its status.

    Exits as soon as a signal asks for that, once the process has ended, or two seconds later has
    been killed.
    """
    while process.poll() is None:
        if signal.sigwait(AWAITED_SIGNALS) in ENDING_SIGNALS:
            # The process has got the signal, too.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
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
    """Keeps a folder to this process; yields the descriptor that holds the lock."""
    file = open_lock(folder)
    begin = time.monotonic()
    said = False
    while not try_to_lock(file):
        if not said and time.monotonic() - begin > 2:
            say("waiting for another run, which prepares itself")
            said = True
        if signal.sigtimedwait(ENDING_SIGNALS, 0.05):
            sys.exit(0)
    try:
        yield file
    finally:
        os.close(file)


def remove_folders_of_killed_runs() -> None:
    """Removes the folders in .run that no run uses."""
    for folder in RUNS.glob("run.*"):
        file = open_lock(folder)
        if try_to_lock(file):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(file)


@contextlib.contextmanager
def run_folder() -> Iterator[tuple[Path, int]]:
    """Makes a folder for this run.

    Yields it, with the descriptor of its lock. It is locked for as long as a process has that.
    """
    folder = Path(tempfile.mkdtemp(prefix="run.", dir=RUNS))
    try:
        with locked(folder) as lock:
            yield folder, lock
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pip_install(lock_file: Path, target: Path, run_folder: Path, *options: str) -> None:
    """Installs the packages that the lock file pins into the folder target."""
    command = [PYTHON, "-E", SAMPLE / "scripts" / "pip_install.py", lock_file, "--target", target]
    environment = os.environ | {"TMPDIR": str(run_folder)}
    if run([*command, *options], env=environment, stdout=sys.stderr) != 0:
        fail("pip failed; see its words above")


def install(run_folder: Path) -> Path:
    """Installs what the image contains, if necessary; returns the folder where it is."""
    function = SAMPLE / "requirements.txt"
    extension = SAMPLE / NAME / "requirements.txt"
    emulator = SAMPLE / "scripts" / "requirements-rie.txt"
    contents = f"{platform.machine()} {PYTHON} {sys.version}".encode()
    for file in function, extension, emulator, Path(__file__):
        contents += file.read_bytes()
    installed = RUNS / f"{NAME}-{hashlib.sha256(contents).hexdigest()[:16]}"
    if installed.exists():
        return installed

    cpu = {"x86_64": "x86_64", "aarch64": "arm64"}.get(platform.machine())
    if not cpu:
        fail(f"there is no emulator for the CPU {platform.machine()}")
    say(f"installing the dependencies into {RUNS} (once)")
    new = run_folder / "new"
    # The function's in a virtual environment, which hides this machine's packages.
    if run([PYTHON, "-E", "-m", "venv", "--without-pip", new / "python"]) != 0:
        fail("no virtual environment can be made; see above")
    (site_packages,) = new.glob("python/lib/python*/site-packages")
    pip_install(function, site_packages, run_folder)
    pip_install(extension, new / "opt" / NAME, run_folder)
    pip_install(emulator, run_folder / "sam", run_folder, "--no-compile")
    binary = run_folder / "sam" / "samcli" / "local" / "rapid" / f"aws-lambda-rie-{cpu}"
    binary.rename(new / "aws-lambda-rie")
    return new.rename(installed)


def copy_executable(file: Path, folder: Path) -> Path:
    """Copies a script into a folder, and makes it executable, whatever the checkout."""
    copy = Path(shutil.copy(file, folder))
    copy.chmod(0o755)
    return copy


def make_opt(installed: Path, run_folder: Path) -> Path:
    """Makes what is /opt in the image, and returns its folder."""
    opt = Path(shutil.copytree(installed / "opt", run_folder / "opt", symlinks=True))
    for file in (SAMPLE / NAME).glob("*.py"):
        shutil.copy(file, opt / NAME)
    (opt / "extensions").mkdir()
    copy_executable(SAMPLE / "extensions" / NAME, opt / "extensions")
    return opt


def namespaces(opt: Path) -> list[str | Path]:
    """Returns a command that runs another one, whose /opt shows that folder.

    The mounts are seen in a namespace of their own alone, and the other command's processes end
    with it. Returns an empty list where that is not possible; then `unshare` or `mount` has said
    why.
    """
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        unshare.append("--map-root-user")
    command = [*unshare, "sh", SAMPLE / "scripts" / "mount-opt", opt]
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
    """Links into /opt what that folder contains, and removes the links in the end."""
    say("no namespaces here, see above: linking into /opt for the duration of the run")
    with contextlib.ExitStack() as made:
        try:
            remove_dead_links()
            for path in opt.iterdir():
                link = OPT / path.name
                link.symlink_to(path)
                made.callback(link.unlink)
        except OSError as error:
            say(str(error))
            fail("cannot link into /opt; end the run that uses it, or use --docker, or root")
        yield


def free_port() -> int:
    """Returns a port of loopback that is free, and that no outgoing connection takes."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def emulator(installed: Path, address: str, port: str) -> tuple[list[str], dict[str, str]]:
    """Returns the command of what emulates Lambda, and the variables that it needs."""
    api_port = str(free_port())
    daemon = os.environ.get("LAMBDA_RUNTIME_API_DAEMON")
    if daemon:
        return [daemon], {"INVOKE_API_HOST": address, "PORT": port, "RUNTIME_API_PORT": api_port}
    command = [
        str(installed / "aws-lambda-rie"),
        *("--runtime-interface-emulator-address", f"{address}:{port}"),
        *("--runtime-api-address", f"127.0.0.1:{api_port}"),
    ]
    return command, {}


def variables(words: list[str]) -> dict[str, str]:
    """Returns the variables NAME of this process, and those that are given as NAME=VALUE."""
    found = {}
    for word in words:
        name, is_given, value = word.partition("=")
        if is_given:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def run_sample(address: str, port: str, greeting: str, words: list[str]) -> None:
    """Runs the sample until it ends, or a signal ends it."""
    RUNS.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with locked(RUNS):
            remove_folders_of_killed_runs()
            folder, lock = stack.enter_context(run_folder())
            installed = install(folder)
        opt = make_opt(installed, folder)
        isolated = namespaces(opt)
        if not isolated:
            stack.enter_context(links(opt))

        command, settings = emulator(installed, address, port)
        environment = {
            "PATH": f"{installed}/python/bin:/usr/local/bin:/usr/bin:/bin",
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
            env=environment | settings | variables(words),
            cwd="/",  # the emulator stumbles over some folders' names
            pass_fds=[lock],
        )
        fail(f"{Path(command[0]).name} ended with status {status}; see its output above")


def main() -> None:
    """Runs the sample as the command line says."""
    signal.pthread_sigmask(signal.SIG_BLOCK, AWAITED_SIGNALS)
    address, port, greeting, *words = sys.argv[1:]
    try:
        run_sample(address, port, greeting, words)
    except OSError as error:
        if RUNS.exists() and RUNS.stat().st_uid != os.geteuid():
            fail(f"{RUNS} belongs to another user, who ran this before: remove it. {error}")
        fail(f"cannot run here: {error}")


main()
