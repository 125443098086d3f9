"""Runs an extension as if it were alone: in a folder that becomes /opt, with part of a CPU core."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = next(ROOT.glob("*/extension.py")).parent.name


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def installed():
    """What the run script installs, and an environment for the function.

    Returns the emulator, the extension's packages and that environment.
    """
    script = ["env", "LAMBDA_RUNTIME_API_DAEMON=", ROOT / f"{NAME}.sh"]
    script += ["--no-docker", "-p", str(free_port())]
    with subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        if not any(b"curl" in line for line in process.stderr):
            sys.exit(f"{NAME}.sh --no-docker does not start here")
        process.terminate()
    folder = max((ROOT / ".run").glob(f"{NAME}-*"), key=os.path.getmtime)
    environment = {
        "PATH": f"{folder}/python/bin:/usr/local/bin:/usr/bin:/bin",
        "LAMBDA_TASK_ROOT": str(ROOT),
        "AWS_LAMBDA_FUNCTION_NAME": "function",  # the emulator's name for it, for the Daemon
    }
    return folder / "aws-lambda-rie", folder / "opt" / NAME, environment


def stage(opt, source, packages, environment):
    """Fills a folder for /opt.

    Then it is like another one, or has a program in the place of extension.py, or nothing.
    """
    (opt / "extensions").mkdir(parents=True)
    if source and source.is_dir():
        shutil.copytree(source, opt, dirs_exist_ok=True)
    elif source:
        shutil.copytree(packages, opt / NAME)
        shutil.copytree(ROOT / NAME, opt / NAME, dirs_exist_ok=True)
        shutil.copy(source, opt / NAME / "extension.py")
        shutil.copy(ROOT / "extensions" / NAME, opt / "extensions")
    # As in the image.
    subprocess.run(["python3", "-m", "compileall", "-q", opt], check=True, env=environment)


def in_opt(opt, *command):
    """The command, in namespaces where /opt holds what that folder holds."""
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return [*namespaces, ROOT / "scripts" / "mount-opt", opt, *command]


@contextlib.contextmanager
def cpu_limit(cores):
    """Makes a cgroup that gets that part of a core; yields its file of PIDs."""
    parent, quota = Path("/sys/fs/cgroup"), "cpu.max"
    if (parent / "cpu").is_dir():  # version 1
        parent, quota = parent / "cpu", "cpu.cfs_quota_us"
    group = parent / f"{NAME}-{os.getpid()}"
    group.mkdir()
    try:
        (group / quota).write_text(f"{cores * 100_000:.0f}")  # microseconds of each 100,000
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


@contextlib.contextmanager
def running(server, opt, environment, limit=None):
    """Runs the emulator or the Daemon.

    Yields a connection to it, its Runtime API's address, and its log's path.
    """
    port, api_port = free_port(), free_port()
    command = in_opt(opt, server)
    if server.name == "aws-lambda-rie":
        command += ["--runtime-interface-emulator-address", f"127.0.0.1:{port}"]
        command += ["--runtime-api-address", f"127.0.0.1:{api_port}"]
    daemon = {"INVOKE_API_HOST": "127.0.0.1", "PORT": str(port), "RUNTIME_API_PORT": str(api_port)}
    command += [ROOT / "lambda-entrypoint.sh", "lambda_function.lambda_handler"]
    with tempfile.NamedTemporaryFile() as log:
        options = {
            "cwd": "/",
            "env": environment | daemon,
            "preexec_fn": limit and (lambda: limit.write_text("0")),
            "start_new_session": True,  # the Daemon may kill its process group
        }
        process = subprocess.Popen(command, stdout=log, stderr=log, **options)
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            while not connection.sock:
                # After the server's start, too: the first invocation finds the whole limit.
                time.sleep(0.2)
                assert process.poll() is None, Path(log.name).read_text()
                with contextlib.suppress(ConnectionRefusedError):
                    connection.connect()
            yield connection, f"127.0.0.1:{api_port}", Path(log.name)
        finally:
            process.kill()
            process.wait()
            while limit and limit.read_text():
                time.sleep(0.01)
