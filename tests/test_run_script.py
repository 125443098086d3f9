"""python-example-extension.sh: its options, its errors, and its cleanup.

With Docker or podman and without.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from engine import first_base_image
from machine import free_port, processes_of, run, tool, wait_until
from running import running
from sample import HELLO, NAME


def script(sample, *arguments, **environment):
    """Runs the run script to its end."""
    command = sample / f"{NAME}.sh", "-p", free_port(), *arguments
    return run(*command, env=os.environ | environment, timeout=120)


def path_with(folder, name, program):
    """A PATH with the commands of this machine, but for one.

    A program of sh takes its place, or nothing if that is None.
    """
    for place in filter(os.path.isdir, reversed(os.environ["PATH"].split(":"))):
        run("cp", "-asf", f"{place}/.", folder)
    (folder / name).unlink(missing_ok=True)
    if program:
        (folder / name).write_text(f"#!/bin/sh\n{program}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def last_line(ran, status=1):
    """The last line of standard error, which must be the script's own."""
    assert ran.returncode == status, ran.stderr
    line = ran.stderr.splitlines()[-1]
    assert line.startswith(f"{NAME}: "), ran.stderr
    return line


@pytest.mark.parametrize(
    "arguments",
    [
        "--nonsense",
        "stray",
        "-e",
        "-p",
        "-e 1=2",
        "-e =2",
        "-e A-B=2",
        "-p http",
        "-p 0",
        "-p 08080",
        "-p 65536",
        "-p localhost:8080",
        "-p 127.0.0.1",
        "-p 127.0.0.1:",
        "-p [::1]:8080",
        "-p 1.2.3:8080",
        "-p :8080",
        "-e AWS_LAMBDA_FUNCTION_TIMEOUT=a",
        "-e AWS_LAMBDA_FUNCTION_MEMORY_SIZE=0",
        "-e AWS_LAMBDA_MAX_CONCURRENCY=-1",
        "-e LAMBDA_RUNTIME_API_DAEMON=/bin/true -e MAX_CONCURRENCY=many",
    ],
)
def test_a_usage_error_prints_one_line_and_exits_2(sample, arguments):
    ran = script(sample, *arguments.split())
    last_line(ran, status=2)
    assert (ran.stdout, ran.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    ("command", "program", "arguments", "reason"),
    [
        ("python3", "echo Python 3.9.2", [], "this needs Python 3.10 or newer"),
        ("uname", "echo Darwin", [], "--no-docker needs Linux; use Docker here"),
        (
            "none",
            "",
            ["-e", "AWS_LAMBDA_MAX_CONCURRENCY=2"],
            "AWS_LAMBDA_MAX_CONCURRENCY needs Docker",
        ),
    ],
)
def test_what_cannot_run_without_docker_is_said(
    sample, tmp_path, command, program, arguments, reason
):
    path = path_with(tmp_path, command, program)
    line = last_line(script(sample, "--no-docker", *arguments, PATH=path))
    assert line.startswith(f"{NAME}: {reason}")


@pytest.mark.parametrize(
    ("docker", "environment", "reason"),
    [
        (None, {}, "there is no docker command"),
        (
            "echo Client; echo permission denied >&2; exit 1",
            {},
            "no Docker engine answers: permission denied",
        ),
        (
            "[ $1 = version ]",
            {"BASE_IMAGE": "no/image"},
            "the base image no/image cannot be pulled",
        ),
    ],
)
def test_only_without_docker_option_does_it_fall_back_and_say_why(
    sample, folder, docker, environment, reason
):
    environment = environment | {"PATH": path_with(folder / "bin", "docker", docker)}
    with running(sample, **environment) as it:
        assert f"without Docker, on this machine: {reason}" in it.output
        assert it.invoke() == HELLO
    assert reason in last_line(script(sample, "--docker", **environment))


def test_two_runs_listen_side_by_side_each_on_its_address_alone(start, sample):
    with start(sample) as one, start(sample, host="127.0.0.2") as other:
        again = script(sample, start.option, "-p", str(one.port), **start.environment)
        assert f"port {one.port} is in use" in last_line(again)
        for address in ("127.0.0.2", one.port), ("127.0.0.1", other.port):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
        assert one.invoke() == other.invoke() == HELLO
        wait_until(lambda: one.received and other.received)
        one.stop()
        assert other.invoke() == HELLO


def is_gone(it, sample, folders=0):
    """Whether no process and no container of a run is left, and at most so many folders.

    A killed run leaves one.
    """
    containers = ""
    if shutil.which("docker"):
        containers = run("docker", "ps", "-aq", "--filter", f"publish={it.port}").stdout
    left = len(list(sample.glob(".run/run.*")))
    return not containers and not processes_of(sample) and left <= folders


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_it_within_two_seconds_with_0_and_nothing_is_left(start, copy, signum):
    with start(copy) as it:
        it.invoke()
        begin = time.monotonic()
        it.ends_cleanly(signum)
        assert time.monotonic() - begin < 2
        wait_until(lambda: is_gone(it, copy), 1)


def test_it_kills_what_ignores_the_signal_and_no_further_signal_interrupts_that(
    start, copy, stand_in
):
    with start(copy, "-e", "IGNORE_SIGTERM=1", LAMBDA_RUNTIME_API_DAEMON=stand_in) as it:
        begin = time.monotonic()
        while it.poll() is None:
            it.send_signal(signal.SIGTERM)
            time.sleep(0.00005)  # so that some come while the first one is handled
        assert (it.returncode, 2 <= time.monotonic() - begin < 15) == (0, True)
        wait_until(lambda: is_gone(it, copy), 1)


def test_a_killed_run_leaves_nothing_running_and_the_next_run_removes_its_folder(
    start, copy, tmp_path
):
    with start(copy) as it:
        it.invoke()
        os.killpg(it.pid, signal.SIGKILL)
        wait_until(lambda: is_gone(it, copy, folders=1))
    # What bash reads first; with this, it is killed when its job has just started.
    trap = tmp_path / "bash_env"
    starts_job = "job=?!docker | job=?!timeout"
    kill = f"case $BASH_COMMAND${{1-}} in {starts_job}) kill -9 -$$ ;; esac"
    trap.write_text(f"set -T; trap '{kill}' DEBUG")
    with start(copy, wait=False, BASH_ENV=str(trap)) as it:
        wait_until(lambda: is_gone(it, copy, folders=1))
    with start(copy) as it:
        assert it.invoke() == HELLO
    wait_until(lambda: is_gone(it, copy), 1)


def test_e_passes_values_of_any_kind_and_nothing_else_and_writes_no_secret_anywhere(
    start, evaluating, tmp_path
):
    secret = secrets.token_hex()
    shell = {
        "LINES": "one\ntwo = 'three' \"four\" $five OTHER six\n",
        "EMPTY": "",
        "LONG": "x" * 70_000,
    }
    shell |= {"PASSWORD": secret, "AMQP_PASSWORD": secret}
    # The run uses the last four itself; what they are for the function means nothing to it.
    given = {
        "GIVEN": "a b=c OTHER d",
        "UID": "5",
        "TMPDIR": "/nowhere",
        "BASH_ENV": "/nowhere",
        "PORT": "http",
    }
    words = [word for name in [*shell, "UNSET", "port", "BASH_VERSION"] for word in ("-e", name)]
    words += [word for name, value in given.items() for word in ("-e", f"{name}={value}")]
    others = {"OTHER": "other", "HOST": "x86_64-conda-linux-gnu", "BASH_FUNC_other%%": "() { :; }"}
    with start(evaluating, *words, **shell, **others, TMPDIR=str(tmp_path)) as it:
        environ = it.invoke({"do": "dict(os.environ)"})
        files = *tmp_path.rglob("*"), *evaluating.rglob("*"), *Path("/proc").glob("[0-9]*/cmdline")
        written = b""
        for file in files:
            with contextlib.suppress(OSError):
                written += file.read_bytes()
    assert {name: environ.get(name) for name in shell | given} == shell | given
    others = {*others, "UNSET", "port", "BASH_VERSION", "BASE_IMAGE", "PYTEST_CURRENT_TEST"}
    assert not others & environ.keys()
    assert given["GIVEN"].encode() in written
    assert secret.encode() not in written


@pytest.mark.parametrize(
    ("how", "memory"), [("not at all", 256), ("with -e", 200), ("in the shell", 200)]
)
def test_with_an_engine_it_runs_in_docker_confined_as_lambda_confines_a_function(
    sample, engine, how, memory
):
    variables = {"BASE_IMAGE": first_base_image()}
    if memory == 200:  # and empty as if it were not set
        variables |= {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "200", "AWS_LAMBDA_MAX_CONCURRENCY": ""}
    words = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]
    with running(sample, *words) if how == "with -e" else running(sample, **variables) as it:
        assert it.invoke() == HELLO
        (inspected,) = json.loads(run("docker", "inspect", it.container).stdout)
    config, host = inspected["Config"], inspected["HostConfig"]
    assert (config["User"], host["CapDrop"], host["CapAdd"]) == ("60999:60999", ["ALL"], None)
    assert f"AWS_LAMBDA_FUNCTION_MEMORY_SIZE={memory}" in config["Env"]
    assert (host["Memory"], host["PidsLimit"]) == (memory * 1024 * 1024, 1024)
    assert (host["ReadonlyRootfs"], host["Tmpfs"]) == (True, {"/tmp": "exec,size=512m"})
    assert host["SecurityOpt"] == ["no-new-privileges"]


def test_it_can_be_started_by_a_link_by_sh_and_in_posix_mode_as_sh_is_on_macos(sample, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(os.path.relpath(sample / f"{NAME}.sh", tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for shell in [], ["sh"], ["bash", "--posix"]:
            assert "is in use" in last_line(run(*shell, link, "-p", server.getsockname()[1]))


@pytest.mark.slow
def test_docker_may_be_podman_rootless_but_for_root(sample, stand_in, engine, tmp_path):
    (tmp_path / "docker").symlink_to(tool("podman"))
    assert run("sh", "-c", f"docker save {first_base_image()} | podman load").returncode == 0
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BASE_IMAGE": f"localhost/{first_base_image()}",
    }
    with running(sample, "--docker", **environment) as it:
        assert it.invoke() == HELLO
        it.ends_cleanly()
    assert run("podman", "ps", "--all", "--quiet").stdout == ""
    environment |= {"LAMBDA_RUNTIME_API_DAEMON": stand_in, "no_proxy": "any"}
    with running(sample, "--docker", **environment) as it:
        environ = it.invoke(function=NAME)["environ"]
    assert environ["AMQP_URI"].startswith("amqp://host.containers.internal:5672")
    assert "no_proxy" not in environ
