"""Runs the sample on this Linux machine without Docker: what the image contains, at the paths of the image.

    python3 -E scripts/run_without_docker.py ADDRESS PORT [DAEMON] <VARIABLES

The run script calls it. DAEMON replaces AWS's emulator. VARIABLES are those of the function and the extension, as
NAME=VALUE, each ended by a NUL. Nobody else can read them here, as they could on a command line. SIGTERM ends the run.
"""

import contextlib
import hashlib
import json
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

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / ".run"  # ignored by git; all that a run writes, but for links in /opt where namespaces are refused
NAME = next(ROOT.glob("*/extension.py")).parent.name
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT
CPUS = {"x86_64": "x86_64", "aarch64": "arm64"}  # the names that the emulator's files have
STOP_SECONDS = 2  # what Lambda allows for a shutdown

# As root of its namespaces: fills a private folder $2, and shows its opt in /opt.
MOUNTS = """
mount -t tmpfs -o mode=755 none "$2" && cd "$2" && {fill} &&
mount -t overlay -o lowerdir=opt:/opt overlay /opt && mount --bind opt/extensions /opt/extensions &&
mount -t proc proc /proc"""
# Fills it with the code in $0 and the dependencies in $1, or, to try whether all this is allowed, with nothing.
COPY = """cp -a "$0/opt" "$0/var" "$1"/. . && chmod -R u=rwX,go=rX . &&
chmod 755 opt/extensions/* var/runtime/bootstrap aws-lambda-rie"""
NOTHING = "mkdir -p opt/extensions var"
# For Lambda Managed Instances the emulator takes no other path than those in /var.
MOUNT_VAR = " && mount -t overlay -o lowerdir=var:/var overlay /var"

# Before /proc is mounted: the PID as seen from outside.
WRITE_PID = 'read -r pid _ </proc/self/stat && echo "$pid" >"$0/pid" &&'


def fail(message):
    """Ends the program with exit status 1 and one line (str)."""
    sys.exit(f"{NAME}: {message}")


def install():
    """Installs into a folder what the image installs, once for each set of dependencies, and returns the folder."""
    cpu = CPUS.get(platform.machine()) or fail(f"there is no emulator for the CPU {platform.machine()}")
    lock_files = [ROOT / "requirements.txt", ROOT / "requirements-rie.txt", ROOT / NAME / "requirements.txt"]
    python = Path(sys.executable).resolve()
    contents = b"".join(file.read_bytes() for file in [Path(__file__), *lock_files]) + bytes(python)
    installed = RUNS / f"{NAME}-{platform.python_version()}-{cpu}-{hashlib.sha256(contents).hexdigest()[:12]}"
    if installed.exists():
        return installed
    print(f"{NAME}: installing the dependencies into {RUNS} (once, a few seconds)", file=sys.stderr)
    new = Path(tempfile.mkdtemp(prefix="new.", dir=RUNS))
    try:
        # A virtual environment without packages, so that the function sees none of this machine's.
        (new / "python" / "bin").mkdir(parents=True)
        (new / "python" / "bin" / "python3").symlink_to(python)
        (new / "python" / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
        pip_install(new / "var" / "task", lock_files[0])
        pip_install(new / "opt" / NAME, lock_files[2])
        pip_install(new / "sam", lock_files[1], "--no-compile")
        shutil.copy(new / "sam" / "samcli" / "local" / "rapid" / f"aws-lambda-rie-{cpu}", new / "aws-lambda-rie")
        shutil.rmtree(new / "sam")
        new.rename(installed)  # only once complete
    except OSError:
        if not installed.exists():  # made by another run meanwhile
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return installed


def pip_install(target, lock_file, *options):
    """Installs the wheels of a lock file into a folder. Only index, proxy and certificates are as the user set them."""
    temporary = target.with_name("tmp")
    temporary.mkdir(parents=True)  # within the run's folder, so that an interrupted pip leaves nothing elsewhere
    environment = os.environ | {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "TMPDIR": str(temporary)}
    environment.pop("PIP_PREFIX", None)
    install = "-E -m pip install --quiet --no-cache-dir --disable-pip-version-check --no-deps --require-hashes"
    command = [
        sys.executable,
        *install.split(),
        "--only-binary",
        ":all:",
        "--target",
        target,
        "-r",
        lock_file,
        *options,
    ]
    pip = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    shutil.rmtree(temporary)
    if pip.returncode == 0:
        return
    reasons = {
        "No module named pip": "this python3 has no pip; try: apt-get install python3-pip, or another python3",
        "CERTIFICATE_VERIFY_FAILED": "pip does not trust the certificate of its package index; set PIP_CERT",
        "connection broken": "pip cannot reach its package index; is there a network?",
        "No space left on device": "No space left on device",
        "HASHES": "a wheel does not match its pinned hash; check your package index, or proxy",
    }
    reason = next((reason for sign, reason in reasons.items() if sign in pip.stderr), None)
    if reason is None:
        print(pip.stderr, file=sys.stderr)
    fail(f"the dependencies cannot be installed: {reason or 'see the output of pip above'}")


def assemble(folder):
    """Copies the sample's own code into a folder, to the paths of the image; returns the handler's name."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    places = {f"extensions/{NAME}": "opt/extensions", f"{NAME}/*.py": f"opt/{NAME}"}
    # What the Dockerfile copies for the function, more folders included.
    for sources, place in re.findall(r"^COPY (.+) \.\$\{LAMBDA_TASK_ROOT\}(\S*)$", dockerfile, re.MULTILINE):
        places |= dict.fromkeys(sources.split(), f"var/task{place}")
    for pattern, place in places.items():
        for source in ROOT.glob(pattern):
            if source.is_dir():
                # Hidden files stay out of the image, too.
                shutil.copytree(source, folder / place, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
            else:
                (folder / place).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, folder / place)
    (folder / "var" / "runtime").mkdir()
    shutil.copy(ROOT / "lambda-entrypoint.sh", folder / "var" / "runtime" / "bootstrap")
    return json.loads(re.search(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE).group(1))[0]


def isolate(folder, installed, root, managed):
    """Returns the command prefix that runs a command in its own namespaces, or None where they are refused."""
    mounts = MOUNTS + (MOUNT_VAR if managed else "")
    prefix = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
    for options in [], ["--map-root-user"]:
        command = [*prefix, *options, "sh", "-c"]
        trial = [*command, mounts.format(fill=NOTHING), folder, installed, root]
        tried = subprocess.run(trial, check=False, stderr=subprocess.DEVNULL)
        if tried.returncode == 0:
            return [
                *command,
                f'{WRITE_PID} {mounts.format(fill=COPY)} && shift 2 && exec "$@"',
                folder,
                installed,
                root,
            ]
        if managed:
            fail("AWS_LAMBDA_MAX_CONCURRENCY needs root and mount namespaces here; or use --docker")
    return None


def link(folder, links):
    """Shows what is in the folder's opt in /opt, by links that it adds to a list."""
    print(f"{NAME}: no namespaces here: linking into /opt for the duration of the run", file=sys.stderr)
    for path in (folder / "opt").iterdir():
        place = Path("/opt") / path.name
        try:
            if place.is_symlink() and RUNS.name in os.readlink(place) and not place.exists():
                place.unlink()  # left behind by a run that was killed
            place.symlink_to(path)
        except FileExistsError:
            fail(f"{place} exists already; end the run that uses it, or remove it, or use --docker")
        except OSError:
            fail("no user namespaces, and no permission to write to /opt; use --docker, or root")
        links.append(place)


def run(folder, installed, links, address, port, daemon, variables):
    """Starts the emulator, or the Daemon, which starts the extension and the function; returns its process."""
    handler = assemble(folder)
    # A checkout in /opt disappears behind the overlay.
    root = Path("/mnt") if folder.is_relative_to("/opt") else folder / "root"
    root.mkdir(exist_ok=True)
    isolated = isolate(folder, installed, root, "AWS_LAMBDA_MAX_CONCURRENCY" in variables)
    if not isolated:
        shutil.copytree(installed, folder, dirs_exist_ok=True, symlinks=True)
        link(folder, links)
        root = folder
        isolated = ["setpriv", "--pdeathsig", "KILL", "sh", "-c", f'{WRITE_PID} exec "$@"', folder]
    environment = {
        "PATH": f"{root}/python/bin:/usr/local/bin:/usr/bin:/bin",
        "LAMBDA_TASK_ROOT": str(root / "var" / "task"),
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        api_port = server.getsockname()[1]
    if daemon:
        emulator = [daemon]
        environment |= {"INVOKE_API_HOST": address, "PORT": port, "RUNTIME_API_PORT": str(api_port)}
    else:
        emulator = [root / "aws-lambda-rie", "--runtime-interface-emulator-address", f"{address}:{port}"]
        emulator += ["--runtime-api-address", f"127.0.0.1:{api_port}"]
    command = [*isolated, *emulator, root / "var" / "runtime" / "bootstrap", handler]
    return subprocess.Popen(command, cwd=folder, env=environment | variables, start_new_session=True)


def stop(process, folder):
    """Ends the emulator and all that it started."""
    try:
        pid = int((folder / "pid").read_text())
        os.kill(pid, signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        process.kill()
    # Without a PID namespace the extension and the runtime outlive the emulator; its session is theirs, too.
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            session = stat.read_text().rpartition(")")[2].split()[3]
            if session == str(process.pid):
                os.kill(int(stat.parent.name), signal.SIGKILL)
    process.wait()


def ignore_signals():
    """Lets nothing interrupt the cleanup."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def leave(signum, frame):
    """Ends the program, cleanup included."""
    ignore_signals()
    sys.exit(0)


def main():
    """Runs the sample until the emulator ends, or until a signal."""
    address, port, *daemon = sys.argv[1:]
    variables = dict(variable.split("=", 1) for variable in sys.stdin.read().split("\0")[:-1])
    for signum in SIGNALS:
        signal.signal(signum, leave)
    try:
        socket.create_server((address, int(port))).close()
    except OSError as error:
        fail(f"cannot listen on {address}:{port}: {os.strerror(error.errno)}; choose another with -p")
    process, folder, links = None, None, []
    try:
        RUNS.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="run.", dir=RUNS))
        process = run(folder, install(), links, address, port, *(daemon or [None]), variables)
        status = process.wait()
    except OSError as error:
        fail(f"cannot write to {RUNS}: {error.strerror}")
    finally:
        ignore_signals()
        if process:
            stop(process, folder)
        for path in links:
            path.unlink(missing_ok=True)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    if status:
        program = "the Daemon" if daemon else "the emulator"
        hint = ". It runs one invocation at a time" if status == 2 and not daemon else ""
        fail(f"{program} exited with status {status}; see its output above{hint}")


if __name__ == "__main__":
    main()
