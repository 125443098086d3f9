"""python-example-extension.sh: its options, its errors, and its cleanup, with and without Docker."""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import (
    HELLO,
    NAME,
    RECEIVED,
    copy_misbehaving_sample,
    first_base_image,
    free_port,
    processes_of,
    run,
    running,
    wait_until,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux")
NO_IMAGE = "localhost:1/no/such/image:here"


def script(sample, *arguments, path=None, **environment):
    """Runs the run script to its end. With a path, only the commands there are to be found."""
    environment = os.environ | environment | ({"PATH": str(path)} if path else {})
    return run(sample / f"{NAME}.sh", "-p", free_port(), *arguments, env=environment, timeout=120)


@pytest.fixture
def commands(tmp_path):
    """A folder for PATH with the commands of this machine, but for those that a test removes or replaces."""
    path = tmp_path / "commands"
    path.mkdir()
    folders = filter(os.path.isdir, reversed(os.environ["PATH"].split(":")))
    for name, command in {entry.name: entry.path for folder in folders for entry in os.scandir(folder)}.items():
        os.symlink(command, path / name)
    return path


def replace(commands, name, program):
    (commands / name).unlink(missing_ok=True)
    if program:
        (commands / name).write_text(f"#!/bin/sh\n{program}\n")
        (commands / name).chmod(0o755)


def one_line(ran, status=1):
    """The last line of standard error, which must be the script's own."""
    assert ran.returncode == status, ran.stderr
    line = ran.stderr.splitlines()[-1]
    assert line.startswith(f"{NAME}: "), ran.stderr
    return line


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_the_usage(sample, option):
    ran = script(sample, option)
    assert ran.returncode == 0
    assert ran.stdout.startswith(f"usage: {sample}/{NAME}.sh [--docker | --no-docker] ")


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--nonsense"], {}),
        (["stray"], {}),
        *((["-e", *variable], {}) for variable in [[], ["1=2"], ["=2"], ["A-B=2"]]),
        *((["-p", *publish], {}) for publish in [[], ["http"], ["0"], ["08080"], ["65536"], ["localhost:8080"]]),
        *((["-p", publish], {}) for publish in ["[::1]:8080", "1.2.3:8080", ":8080", "127.0.0.1:", "127.0.0.1"]),
        ([], {"AWS_LAMBDA_FUNCTION_TIMEOUT": "abc"}),
        (["-e", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE=0"], {}),
        (["-e", "AWS_LAMBDA_MAX_CONCURRENCY"], {"AWS_LAMBDA_MAX_CONCURRENCY": "-1"}),
        ([], {"LAMBDA_RUNTIME_API_DAEMON": "/bin/true", "MAX_CONCURRENCY": "many"}),
    ],
)
def test_a_usage_error_prints_one_line_and_exits_2(sample, arguments, environment):
    ran = script(sample, *arguments, **environment)
    one_line(ran, status=2)
    assert (ran.stdout, ran.stderr.count("\n")) == ("", 1)


@on_linux
@pytest.mark.parametrize(
    ("command", "program", "reason"),
    [
        ("python3", None, "this needs Python 3.10 or newer"),
        ("python3", "echo Python 3.9.2", "this needs Python 3.10 or newer"),
        ("uname", "echo Darwin", "--no-docker needs Linux; use Docker here"),
    ],
)
def test_a_machine_that_cannot_run_it_without_docker_is_told_so(sample, commands, command, program, reason):
    replace(commands, command, program)
    assert reason in one_line(script(sample, "--no-docker", path=commands))


@on_linux
@pytest.mark.parametrize(
    ("docker", "environment", "reason"),
    [
        (None, {}, "there is no docker command"),
        ("echo Client; echo permission denied >&2; exit 1", {}, "no Docker engine answers: permission denied"),
        ("[ $1 = version ]", {"BASE_IMAGE": NO_IMAGE}, f"the base image {NO_IMAGE} cannot be pulled"),
    ],
)
def test_only_without_docker_option_does_it_fall_back_and_say_why(sample, commands, docker, environment, reason):
    replace(commands, "docker", docker)
    with running(sample, PATH=str(commands), **environment) as started:
        assert f"without Docker, on this machine: {reason}" in started.output
        assert json.loads(started.invoke()) == HELLO
    assert reason in one_line(script(sample, "--docker", path=commands, **environment))


def test_with_an_engine_and_a_base_image_it_runs_in_docker(sample, engine):
    with running(sample, BASE_IMAGE=first_base_image()) as started:
        assert started.container
        assert json.loads(started.invoke()) == HELLO


def test_listens_on_loopback_by_default(way, sample):
    option, environment = way
    with running(sample, option, **environment) as started, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", started.port))
    with running(sample, option, host="127.0.0.2", **environment) as started:
        assert f"http://127.0.0.2:{started.port}/" in started.output
        assert json.loads(started.invoke()) == HELLO


def test_a_port_in_use_fails_with_one_line(way, sample):
    option, environment = way
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"port {port} is in use" in one_line(script(sample, option, "-p", str(port), **environment))


def test_of_three_starts_on_one_port_at_once_one_runs_and_the_others_fail_and_clean_up(way, copy):
    option, environment = way
    port = str(free_port())
    with contextlib.ExitStack() as stack:
        starts = [running(copy, option, "-p", port, wait=False, **environment) for _ in range(3)]
        starts = [stack.enter_context(start) for start in starts]
        wait_until(lambda: sum(start.process.poll() is None for start in starts) == 1, 60)
        assert sorted(start.process.poll() or 0 for start in starts) == [0, 1, 1]
        (winner,) = [start for start in starts if start.process.poll() is None]
        winner.endpoint = f"http://127.0.0.1:{port}"
        assert json.loads(winner.invoke()) == HELLO
        assert len(list(copy.glob(".run/run.*"))) == (option == "--no-docker")


def test_two_copies_run_side_by_side_on_two_ports(way, sample):
    option, environment = way
    with running(sample, option, **environment) as one, running(sample, option, **environment) as other:
        assert json.loads(one.invoke()) == json.loads(other.invoke()) == HELLO
        wait_until(lambda: one.received and other.received)
        assert one.received != other.received
        one.stop()
        assert json.loads(other.invoke()) == HELLO


def nothing_runs(started, sample):
    """Whether no process and no container of a run is left."""
    containers = shutil.which("docker") and run("docker", "ps", "-aq", "--filter", f"publish={started.port}").stdout
    return not containers and not processes_of(sample)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_ends_within_two_seconds_with_0_and_leaves_nothing_behind(way, copy, tmp_path, signum):
    option, environment = way
    with running(copy, option, TMPDIR=str(tmp_path), **environment) as started:
        started.invoke()
        assert not list(tmp_path.iterdir())
        status, seconds = started.stop(signum)
        assert (status, seconds < 2) == (0, True)
        assert '"eventType": "SHUTDOWN"' in started.output
        wait_until(lambda: nothing_runs(started, copy), 1)
        assert not list(copy.glob(".run/run.*"))


def test_ends_before_the_first_invocation_and_a_second_signal_does_not_interrupt_that(way, copy):
    option, environment = way
    with running(copy, option, **environment) as started:
        while started.process.poll() is None:
            started.process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        assert started.process.returncode == 0
        wait_until(lambda: nothing_runs(started, copy), 1)
        assert not list(copy.glob(".run/run.*"))


def test_kills_what_ignores_the_signal(way, copy, stand_in):
    option, environment = way
    with running(copy, option, "-e", "IGNORE_SIGTERM=1", LAMBDA_RUNTIME_API_DAEMON=stand_in, **environment) as started:
        status, seconds = started.stop()
        assert (status, 2 <= seconds < 15) == (0, True)
        wait_until(lambda: nothing_runs(started, copy), 1)


def test_a_killed_run_leaves_nothing_running_and_the_next_run_removes_its_folder(way, copy):
    option, environment = way
    with running(copy, option, **environment) as started:
        started.invoke()
        os.killpg(started.process.pid, signal.SIGKILL)
        wait_until(lambda: nothing_runs(started, copy))
    with running(copy, option, **environment) as started:
        assert json.loads(started.invoke()) == HELLO
    assert not list(copy.glob(".run/run.*"))


def test_says_with_which_status_the_container_ended(sample, engine):
    with running(sample, "--docker", BASE_IMAGE=first_base_image()) as started:
        run("docker", "kill", started.container)
        assert started.process.wait(60) == 1
        line = started.output.splitlines()[-1]
        assert line == f"{NAME}: the container ended with status 137; see its output above"


def test_a_failed_build_fails_with_one_line(copy, engine):
    with (copy / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("RUN false\n")
    ran = script(copy, "--docker", BASE_IMAGE=first_base_image())
    assert one_line(ran) == f"{NAME}: the image cannot be built; see above"


@on_linux
@pytest.mark.parametrize("name", ["PASSWORD", "AMQP_PASSWORD"])
def test_a_secret_reaches_the_function_but_no_command_line_and_no_file(way, sample, tmp_path, name):
    option, environment = way
    copy = copy_misbehaving_sample(tmp_path / "copy", sample)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = environment | {name: secrets.token_hex(), "TMPDIR": str(temporary)}
    seen, stop = [], threading.Event()

    def scan():
        while not stop.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    seen.append(process.joinpath("cmdline").read_bytes())

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        with running(copy, option, "-e", name, **environment) as started:
            assert json.loads(started.invoke(b'{"environ": true}'))[name] == environment[name]
            files = [file for folder in (temporary, copy) for file in folder.rglob("*") if file.is_file()]
            assert not [file for file in files if environment[name].encode() in file.read_bytes()]
    finally:
        stop.set()
        scanner.join()
    assert any(NAME.encode() in command for command in seen)
    assert not [command for command in seen if environment[name].encode() in command]


def test_e_passes_values_of_any_kind_and_nothing_else_of_the_shell(way, sample, tmp_path):
    option, environment = way
    copy = copy_misbehaving_sample(tmp_path / "copy", sample)
    shell = {"LINES": "one\ntwo = 'three' \"four\" $five OTHER six\n", "EMPTY": "", "LONG": "x" * 70_000}
    given = {"GIVEN": "a b=c OTHER d", "UID": "5"}
    # The run uses these itself; what they are for the function means nothing to it.
    given |= {"DOCKER_HOST": "tcp://nowhere", "TMPDIR": "/nowhere", "BASH_ENV": "/nowhere", "PORT": "http"}
    words = [word for name in [*shell, "UNSET", "port", "BASH_VERSION"] for word in ("-e", name)]
    words += [word for name, value in given.items() for word in ("-e", f"{name}={value}")]
    others = {"OTHER": "other", "HOST": "x86_64-conda-linux-gnu", "BASH_FUNC_other%%": "() { :; }"}
    with running(copy, option, *words, **shell, **others, **environment) as started:
        environ = json.loads(started.invoke(b'{"environ": true}'))
    assert {name: environ.get(name) for name in shell | given} == shell | given
    assert not {*others, "UNSET", "port", "BASH_VERSION", "BASE_IMAGE", "PYTEST_CURRENT_TEST"} & environ.keys()


@pytest.mark.parametrize("how", ["-e", "the environment"])
def test_e_of_a_variable_of_the_run_is_the_same_as_that_variable(sample, tmp_path, engine, how):
    copy = copy_misbehaving_sample(tmp_path / "copy", sample)
    variables = {"BASE_IMAGE": first_base_image(), "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "200"}
    variables |= {"AWS_LAMBDA_MAX_CONCURRENCY": "", "AWS_LAMBDA_FUNCTION_TIMEOUT": ""}  # as if they were not set
    words = [word for name, value in variables.items() for word in ("-e", f"{name}={value}")] if how == "-e" else []
    with running(copy, "--docker", *words, **({} if words else variables)) as started:
        environ = json.loads(started.invoke(b'{"environ": true}'))
        (inspected,) = json.loads(run("docker", "inspect", started.container).stdout)
    assert environ["AWS_LAMBDA_FUNCTION_MEMORY_SIZE"] == "200"
    assert inspected["HostConfig"]["Memory"] == 200 * 1024 * 1024
    assert not {"AWS_LAMBDA_MAX_CONCURRENCY"} & environ.keys()


def test_the_container_is_confined_as_lambda_confines_a_function(sample, engine):
    with running(sample, "--docker", BASE_IMAGE=first_base_image()) as started:
        assert json.loads(started.invoke()) == HELLO
        container = started.container
        (inspected,) = json.loads(run("docker", "inspect", container).stdout)
        assert run("docker", "exec", container, "sh", "-c", "cp /bin/true /tmp && /tmp/true").returncode == 0
        assert run("docker", "exec", container, "sh", "-c", "touch /var/task/file").returncode != 0
    host = inspected["HostConfig"]
    assert inspected["Config"]["User"] == "60999:60999"
    assert (host["Memory"], host["PidsLimit"]) == (256 * 1024 * 1024, 1024)
    assert (host["ReadonlyRootfs"], host["Tmpfs"]) == (True, {"/tmp": "exec,size=512m"})
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], None)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["AutoRemove"]


@on_linux
@pytest.mark.parametrize("how", ["a symlink", "sh", "bash --posix"])  # the last is what sh is on macOS
def test_it_can_be_started_in_any_way(sample, tmp_path, how):
    starter = tmp_path / "start it"
    if how == "a symlink":
        starter.symlink_to(sample / f"{NAME}.sh")
    else:
        starter.write_text(f'#!/bin/sh\nexec {how} {shlex.quote(f"{sample}/{NAME}.sh")} "$@"\n')
        starter.chmod(0o755)
    with running(tmp_path, "--no-docker", script=starter.name) as started:
        assert json.loads(started.invoke()) == HELLO


@on_linux
@pytest.mark.usefixtures("installed_sample")
def test_the_next_run_has_an_edit_of_the_function_or_the_extension(copy):
    function, extension = copy / "lambda_function.py", copy / NAME / "extension.py"
    function.write_text(function.read_text().replace("Hello from", "Good morning from"))
    extension.write_text(extension.read_text().replace(RECEIVED, "Saw event"))
    with running(copy, "--no-docker") as started:
        assert "installing" not in started.output
        assert json.loads(started.invoke())["body"] == '"Good morning from Lambda!"'
        wait_until(lambda: "Saw event" in started.output)
