"""python-example-extension.sh: its options, its errors, and how a run ends.

The tests run it with Docker, with podman, and without either.
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
from engine import DEFAULT_BASE_IMAGE, assert_confined_as_on_lambda, first_base_image
from installation import locked
from machine import (
    fastest,
    free_port,
    path_with,
    path_without,
    processes_of,
    run,
    skip_except_on_ci,
    tool,
    wait_until,
)
from running import running
from sample import HELLO, NAME


def run_script(sample, *arguments, **environment):
    """Runs the script to its end."""
    command = sample / f"{NAME}.sh", "-p", free_port(), *arguments
    return run(*command, env=os.environ | environment, timeout=120)


def own_last_line(ran, status=1):
    """The last line of standard error, which must be the script's own."""
    assert ran.returncode == status, ran.stderr
    line = ran.stderr.splitlines()[-1]
    assert line.startswith(f"{NAME}: "), ran.stderr
    return line


def nothing_is_left_of(process, sample):
    """Whether a run has left neither a process nor a container."""
    containers = ""
    if shutil.which("docker"):
        containers = run("docker", "ps", "-aq", "--filter", f"name={NAME}-{process.pid}").stdout
    return not containers and not processes_of(sample)


@pytest.mark.parametrize(
    "arguments",
    ["--nonsense", "-e", "-p", "-e A-B=2", "-p http", "-p localhost:8080", "-p 127.0.0.1:"],
)
def test_a_usage_error_prints_one_line_and_exits_with_2(sample, arguments):
    ran = run_script(sample, *arguments.split())
    own_last_line(ran, status=2)
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


@pytest.mark.parametrize(
    ("programs", "arguments", "reason"),
    [
        ({"uname": "echo Darwin"}, [], "--no-docker needs Linux; use Docker here"),
        ({}, ["-e", "AWS_LAMBDA_MAX_CONCURRENCY=2"], "AWS_LAMBDA_MAX_CONCURRENCY needs Docker"),
        ({"python3": "echo no version >&2; exit 1"}, [], "this needs Python 3.10 or newer"),
    ],
    ids=["macOS", "Managed Instances", "no Python"],
)
def test_explains_what_it_lacks_without_docker(sample, tmp_path, programs, arguments, reason):
    path = path_with(tmp_path, programs)
    line = own_last_line(run_script(sample, "--no-docker", *arguments, PATH=path))
    assert line.startswith(f"{NAME}: {reason}")


@pytest.mark.parametrize(
    ("docker", "shown", "reason"),
    [
        (None, "", "there is no docker command"),
        ("echo Client; echo denied >&2; exit 1", "denied\n", "no Docker engine answers"),
        ("[ $1 = version ]", "", "the base image no/image cannot be pulled"),
    ],
    ids=["no command", "no engine", "no base image"],
)
def test_falls_back_and_says_why_unless_docker_is_asked_for(
    installed_sample, tmp_path, docker, shown, reason
):
    """What Docker itself writes to standard error is shown before the reason, and nothing else."""
    path = path_with(tmp_path, {"docker": docker}) if docker else path_without(tmp_path, "docker")
    environment = {"PATH": path, "BASE_IMAGE": "no/image"}
    with running(installed_sample, **environment) as process:
        said = f"{shown}{NAME}: running without Docker, on this machine: {reason}"
        assert process.output.startswith(said)
        assert process.invoke() == HELLO
    assert reason in own_last_line(run_script(installed_sample, "--docker", **environment))


def test_builds_and_runs_with_docker_as_documented(sample, tmp_path):
    """Another builder may keep the image; one of that name in a registry is not this one.

    Here, the base image must be pulled.
    """
    program = '[ $1 != image ] && echo "docker $*" "${BUILDX_BUILDER-own builder}"'
    environment = {name: value for name, value in os.environ.items() if name != "BASE_IMAGE"}
    environment |= {"PATH": path_with(tmp_path, {"docker": program}), "BUILDX_BUILDER": "other"}
    with locked("port-8080"):
        ran = run(sample / f"{NAME}.sh", "--docker", env=environment)
    if "port 8080 is in use" in ran.stderr:
        skip_except_on_ci("port 8080 is in use")
    build, start = [line for line in ran.stdout.splitlines() if line.startswith("docker ")]
    base_image = f"--build-arg BASE_IMAGE={DEFAULT_BASE_IMAGE}"
    assert build == f"docker build {base_image} --tag {NAME} . own builder"
    for option in "--rm", "--pull never", "--memory 256m", "--publish 127.0.0.1:8080:8080":
        assert f" {option} " in start


def test_two_runs_listen_side_by_side(start, sample):
    """They may even have the same port, on addresses of their own."""
    with start(sample) as one:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", one.port))
        with start(sample, host="127.0.0.2", port=one.port) as other:
            place = f"127.0.0.2:{one.port}"
            again = run_script(sample, start.option, "-p", place, **start.environment)
            assert f"port {one.port} is in use on 127.0.0.2" in own_last_line(again)
            assert one.invoke() == other.invoke() == HELLO
            wait_until(lambda: one.received and other.received)
            one.stop()
            assert other.invoke() == HELLO


@pytest.mark.parametrize(
    ("signum", "at_shutdown"),
    [
        pytest.param(signal.SIGINT, "", id="Ctrl-C"),  # which reaches the whole process group
        pytest.param(signal.SIGTERM, "", id="SIGTERM"),
        pytest.param(signal.SIGTERM, "time.sleep(60)", id="the extension hangs"),
    ],
)
def test_a_signal_stops_it_in_time_and_nothing_is_left(start, scripted_copy, signum, at_shutdown):
    def seconds():
        with start(scripted_copy, "-e", f"AT_SHUTDOWN={at_shutdown}") as process:
            process.invoke()
            begin = time.monotonic()
            process.assert_signal_ends_it(signum)
            end = time.monotonic()
            wait_until(lambda: nothing_is_left_of(process, scripted_copy))
            return end - begin

    assert fastest(seconds, 3) < 3


@pytest.mark.parametrize("command", ["version", "pull", "build"])
def test_ctrl_c_ends_what_comes_before_the_run(sample, tmp_path, command):
    hangs = f"case $1 in {command}) exec sleep 600 ;; image) exit 1 ;; esac"
    path = path_with(tmp_path, {"docker": hangs})
    with running(sample, "--docker", wait=False, PATH=path) as process:
        wait_until(lambda: "sleep 600" in processes_of(sample).values())
        assert process.stop(signal.SIGINT) != 0
        wait_until(lambda: not processes_of(sample))


def test_e_passes_what_it_names_and_nothing_else(start, evaluating, tmp_path):
    """It writes no secret to a file or a command line."""
    secret = secrets.token_hex()
    shell = {
        "LINES": "one\ntwo = 'three' \"four\" $five OTHER six\n",
        "EMPTY": "",
        "LONG": "x" * 70_000,
        "PASSWORD": secret,
    }
    given = {"GIVEN": "a b=c OTHER d", "TMPDIR": "/nowhere", "BASH_ENV": "/nowhere"}
    given["AWS_LAMBDA_OWN"] = "like those that configure the run, even with a = in it"
    given["PYTHONDONTWRITEBYTECODE"] = ""  # which a run without Docker sets
    words = []
    for word in [*shell, "UNSET", *(f"{name}={value}" for name, value in given.items())]:
        words += ["-e", word]
    others = {"OTHER": "other", "AMQP_PASSWORD": secret, "BASH_FUNC_other%%": "() { :; }"}
    with start(evaluating, *words, **shell, **others, TMPDIR=str(tmp_path)) as process:
        environ = process.invoke({"do": "dict(os.environ)"})
        shown = command_lines()
        for file in *tmp_path.rglob("*"), *evaluating.rglob("*"):
            if file.is_file():
                shown += file.read_text(errors="replace")
    assert {name: environ.get(name) for name in shell | given} == shell | given
    assert not {*others, "UNSET", "PYTEST_CURRENT_TEST"} & environ.keys()
    assert given["GIVEN"] in shown
    assert secret not in shown


@pytest.mark.parametrize("path", ["", "/nowhere"], ids=["empty", "without Python"])
def test_function_can_have_any_path(start, sample, path):
    with start(sample, "-e", f"PATH={path}") as process:
        assert process.invoke() == HELLO


def test_names_the_function_as_e_says_and_not_as_the_shell(start, evaluating):
    name = {"do": "os.environ['AWS_LAMBDA_FUNCTION_NAME']"}
    with start(evaluating, AWS_LAMBDA_FUNCTION_NAME="of-the-shell") as process:
        assert process.invoke(name) == NAME
    words = "-e", "AWS_LAMBDA_FUNCTION_NAME"
    with start(evaluating, *words, AWS_LAMBDA_FUNCTION_NAME="of-the-shell") as process:
        assert process.invoke(name) == "of-the-shell"


def command_lines():
    """The command lines of all processes, as one text."""
    text = b""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            text += file.read_bytes()
    return text.decode(errors="replace")


def test_e_cannot_override_the_daemons_address(start, sample, stand_in):
    """It listens where -p says. Its other settings reach it, on no command line."""
    uri = f"amqp://user:{secrets.token_hex()}@localhost"
    words = "-e", "PORT=1", "-e", "INVOKE_API_HOST=192.0.2.1", "-e", "MAX_CONCURRENCY=4"
    with start(sample, *words, LAMBDA_RUNTIME_API_DAEMON=stand_in, AMQP_URI=uri) as process:
        environ = process.invoke(function=NAME)["environ"]
        assert uri not in command_lines()
    assert (environ["AMQP_URI"], environ["MAX_CONCURRENCY"]) == (uri, "4")


def test_an_empty_amqp_uri_means_no_broker(start, sample, stand_in):
    with start(sample, LAMBDA_RUNTIME_API_DAEMON=stand_in, AMQP_URI="") as process:
        assert process.invoke(function=NAME)["environ"]["AMQP_URI"] == ""


@pytest.mark.parametrize("where", ["-e", "shell"])
def test_container_has_lambdas_limits(sample, engine, where):
    settings = {"BASE_IMAGE": first_base_image(), "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "200"}
    words = []
    if where == "-e":
        for name, value in settings.items():
            words += ["-e", f"{name}={value}"]
        settings = {}
    with running(sample, *words, **settings) as process:
        assert process.invoke() == HELLO
        (inspected,) = json.loads(run("docker", "inspect", process.container).stdout)
    assert "AWS_LAMBDA_FUNCTION_MEMORY_SIZE=200" in inspected["Config"]["Env"]
    assert_confined_as_on_lambda(inspected, 200)


def test_can_be_started_by_a_link_by_sh_and_in_posix_mode(sample, tmp_path):
    """On macOS, sh is bash in POSIX mode."""
    link = tmp_path / "link"
    link.symlink_to(os.path.relpath(sample / f"{NAME}.sh", tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for shell in [], ["sh"], ["bash", "--posix"]:
            assert "is in use" in own_last_line(run(*shell, link, "-p", server.getsockname()[1]))


@pytest.mark.slow
def test_works_with_podman(sample, stand_in, engine, tmp_path):
    """Rootless, unless root runs the tests."""
    (tmp_path / "docker").symlink_to(tool("podman"))
    assert run("sh", "-c", f"docker save {first_base_image()} | podman load").returncode == 0
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BASE_IMAGE": f"localhost/{first_base_image()}",
    }
    with running(sample, "--docker", **environment) as process:
        assert process.invoke() == HELLO
        process.assert_signal_ends_it()
    assert run("podman", "ps", "--all", "--quiet").stdout == ""
    environment |= {"LAMBDA_RUNTIME_API_DAEMON": stand_in, "no_proxy": "any"}
    with running(sample, "--docker", **environment) as process:
        environ = process.invoke(function=NAME)["environ"]
    assert environ["AMQP_URI"].startswith("amqp://host.containers.internal:5672")
    assert "no_proxy" not in environ
