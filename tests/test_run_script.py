"""python-example-extension.sh: its options, its errors, and its cleanup.

The tests run it with Docker, with podman, and without either.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from engine import DEFAULT_BASE_IMAGE, assert_confined_as_on_lambda, first_base_image
from machine import (
    fastest,
    free_port,
    path_with,
    path_without,
    processes_of,
    run,
    tool,
    wait_until,
)
from running import running
from sample import HELLO, NAME


def e_options(values):
    """The options that pass each of these, NAME or NAME=VALUE, with -e."""
    options = []
    for value in values:
        options += ["-e", value]
    return options


def run_script(sample, *arguments, **environment):
    """Runs the run script to its end."""
    command = sample / f"{NAME}.sh", "-p", free_port(), *arguments
    return run(*command, env=os.environ | environment, timeout=120)


def own_last_line(ran, status=1):
    """The last line of standard error, which must be the script's own."""
    assert ran.returncode == status, ran.stderr
    line = ran.stderr.splitlines()[-1]
    assert line.startswith(f"{NAME}: "), ran.stderr
    return line


def nothing_is_left_of(it, sample, folders=0):
    """Whether a run has left no process, no container, and at most that many folders.

    A killed run leaves one folder.
    """
    containers = ""
    if shutil.which("docker"):
        containers = run("docker", "ps", "-aq", "--filter", f"name={NAME}-{it.pid}").stdout
    left = len(list(sample.glob(".run/run.*")))
    return not containers and not processes_of(sample) and left <= folders


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
        "-p 999.1.1.1:8080",
        "-p 127.0.0.256:8080",
        "-p 127.0.0.01:8080",
        "-p :8080",
        "-e AWS_LAMBDA_FUNCTION_TIMEOUT=a",
        "-e AWS_LAMBDA_FUNCTION_MEMORY_SIZE=0",
        "-e AWS_LAMBDA_MAX_CONCURRENCY=-1",
        "-e LAMBDA_RUNTIME_API_DAEMON=/bin/true -e MAX_CONCURRENCY=many",
    ],
)
def test_a_usage_error_prints_one_line_and_exits_2(sample, arguments):
    ran = run_script(sample, *arguments.split())
    own_last_line(ran, status=2)
    assert ran.stderr.count("\n") == 1
    assert ran.stdout == ""


@pytest.mark.parametrize(
    ("programs", "arguments", "reason"),
    [
        pytest.param(
            {"uname": "echo Darwin"},
            [],
            "--no-docker needs Linux; use Docker here",
            id="on macOS",
        ),
        pytest.param(
            {},
            ["-e", "AWS_LAMBDA_MAX_CONCURRENCY=2"],
            "AWS_LAMBDA_MAX_CONCURRENCY needs Docker",
            id="as Managed Instances",
        ),
    ],
)
def test_it_says_what_cannot_run_without_docker(sample, tmp_path, programs, arguments, reason):
    path = path_with(tmp_path, programs)
    line = own_last_line(run_script(sample, "--no-docker", *arguments, PATH=path))
    assert line.startswith(f"{NAME}: {reason}")


@pytest.mark.parametrize(("version", "runs"), [((3, 9, 20), False), ((3, 10, 0), True)])
def test_python_3_10_is_the_oldest_that_runs_it(sample, tmp_path, version, runs):
    """python3 claims to be that version when the script checks it, and does nothing else."""
    pretends = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    python3 = f"""[ "$2" = -c ] || exit 0; exec "{sys.executable}" -c '{pretends}' "$3" """
    ran = run_script(sample, "--no-docker", PATH=path_with(tmp_path, {"python3": python3}))
    assert (ran.returncode == 0) == runs
    assert ("this needs Python 3.10 or newer" in ran.stderr) != runs


def test_the_error_of_a_python_that_fails_is_shown_first(sample, tmp_path):
    fails = "echo pyenv: version 3.9.99 is not installed >&2; exit 1"
    path = path_with(tmp_path, {"python3": fails})
    ran = run_script(sample, "--no-docker", PATH=path)
    assert ran.stderr.startswith("pyenv: version 3.9.99 is not installed\n")
    assert own_last_line(ran).startswith(f"{NAME}: this needs Python 3.10 or newer")


@pytest.mark.parametrize(
    ("docker", "environment", "shown", "reason"),
    [
        pytest.param(None, {}, "", "there is no docker command", id="no command"),
        pytest.param(
            "echo Client; echo permission denied >&2; exit 1",
            {},
            "permission denied\n",
            "no Docker engine answers",
            id="no engine",
        ),
        pytest.param(
            "[ $1 = version ]",
            {"BASE_IMAGE": "no/image"},
            "",
            "the base image no/image cannot be pulled",
            id="no base image",
        ),
    ],
)
def test_it_falls_back_and_says_why_unless_docker_is_asked_for(
    installed_sample, tmp_path, docker, environment, shown, reason
):
    """What Docker itself writes to standard error is shown before the reason, and nothing else."""
    if docker is None:
        path = path_without(tmp_path, "docker")
    else:
        path = path_with(tmp_path, {"docker": docker})
    environment = environment | {"PATH": path}
    with running(installed_sample, **environment) as it:
        said = f"{NAME}: running without Docker, on this machine: {reason}"
        before, found, _ = it.output.partition(said)
        assert found
        assert before == shown
        assert it.invoke() == HELLO
    assert reason in own_last_line(run_script(installed_sample, "--docker", **environment))


def test_the_option_e_may_name_the_base_image(sample, tmp_path):
    path = path_with(tmp_path, {"docker": "[ $1 = version ]"})
    ran = run_script(sample, "--docker", "-e", "BASE_IMAGE=no/image", PATH=path)
    assert "the base image no/image cannot be pulled" in own_last_line(ran)


def hanging_docker(folder, command):
    """A PATH with an engine that hangs at a command, and does nothing at the others."""
    return path_with(folder, {"docker": f'case "$1 $2" in "{command}"*) exec sleep 600 ;; esac'})


@pytest.mark.parametrize("command", ["version", "image inspect"])
def test_while_the_engine_hangs_it_says_so_and_a_signal_ends_it(sample, tmp_path, command):
    path = hanging_docker(tmp_path, command)
    with running(sample, "--docker", wait=False, PATH=path) as it:
        wait_until(lambda: f"{NAME}: waiting for the Docker engine\n" in it.output)
        assert it.stop() == 0  # not after the engine's 600 seconds
        wait_until(lambda: not processes_of(sample))


def test_a_container_does_not_survive_its_client(sample, engine):
    with running(sample, "--docker", BASE_IMAGE=first_base_image()) as it:
        (client,) = [
            pid for pid, command in processes_of(sample).items() if command.startswith("docker run")
        ]
        os.kill(client, signal.SIGKILL)
        assert it.wait(60) == 1
        assert it.output.endswith("the container ended with status 137; see its output above\n")
        wait_until(lambda: nothing_is_left_of(it, sample))


def test_a_failing_docker_stop_is_followed_by_docker_kill(sample, engine, tmp_path):
    docker = tool("docker")
    fails = f'[ "$1" != stop ] || exit 1; exec "{docker}" "$@"'
    path = path_with(tmp_path, {"docker": fails})
    with running(sample, "--docker", PATH=path, BASE_IMAGE=first_base_image()) as it:
        assert it.stop() == 0
        wait_until(lambda: nothing_is_left_of(it, sample))
        assert "Docker has not ended" not in it.output


@pytest.mark.parametrize("command", ["version", "image inspect", "build", "run"])
def test_a_kill_while_the_engine_hangs_leaves_nothing_running(copy, tmp_path, command):
    path = hanging_docker(tmp_path, command)
    with running(copy, "--docker", wait=False, PATH=path) as it:
        wait_until(lambda: "sleep 600" in processes_of(copy).values())
        it.kill()
        wait_until(lambda: not processes_of(copy))


def test_it_listens_on_port_8080_of_loopback_unless_told_otherwise(sample, tmp_path):
    """If that port is taken on this machine, the error message shows the same."""
    path = path_with(tmp_path, {"docker": '[ "$1" != run ] || { echo "$@"; exit 1; }'})
    ran = run(sample / f"{NAME}.sh", "--docker", env=os.environ | {"PATH": path})
    published = "--publish 127.0.0.1:8080:8080 " in ran.stdout
    assert published or "port 8080 is in use on 127.0.0.1" in ran.stderr


def test_while_the_port_does_not_answer_it_says_so_and_a_signal_ends_it(sample):
    """A full backlog lets a connection neither succeed nor fail."""
    with socket.create_server(("127.0.0.1", free_port()), backlog=0) as server:
        address = server.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        with running(sample, wait=False, port=address[1]) as it:
            wait_until(lambda: f"waiting for 127.0.0.1:{address[1]}\n" in it.output)
            assert it.stop() == 0
        for filler in fillers:
            filler.close()


def test_an_engine_that_hangs_when_the_run_ends_does_not_hang_the_run(sample, engine, tmp_path):
    docker = tool("docker")
    hangs = f'[ "$1" != stop ] || exec sleep 600; exec "{docker}" "$@"'
    path = path_with(tmp_path, {"docker": hangs})
    with running(sample, "--docker", PATH=path, BASE_IMAGE=first_base_image()) as it:
        container = it.container
        assert it.stop() == 0
        assert f"Docker has not ended the container {NAME}-{it.pid}; if it still runs" in it.output
        run("docker", "kill", container)
        wait_until(lambda: nothing_is_left_of(it, sample))


def test_two_runs_listen_side_by_side_each_on_its_address_alone(start, sample):
    """They may even have the same port."""
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
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", one.port))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_ends_it_within_two_seconds_with_0_and_nothing_is_left(start, copy, signum):
    def seconds():
        with start(copy) as it:
            it.invoke()
            begin = time.monotonic()
            it.assert_signal_ends_it(signum)
            end = time.monotonic()
            wait_until(lambda: nothing_is_left_of(it, copy))
            return end - begin

    assert fastest(seconds, 2) < 2


def test_a_signal_ends_a_run_that_the_terminal_has_suspended(installed_sample, copy):
    """It suspends a job in the background that writes to it, if it is set so (stty tostop)."""
    with running(copy, "--no-docker") as it:
        it.invoke()
        jobs = {os.getpgid(pid) for pid, command in processes_of(copy).items() if "rie" in command}
        for job in jobs:
            os.killpg(job, signal.SIGSTOP)
        it.assert_signal_ends_it()


def test_it_kills_what_ignores_the_signal_and_no_further_signal_interrupts_that(
    start, copy, stand_in
):
    with start(copy, "-e", "IGNORE_SIGTERM=1", LAMBDA_RUNTIME_API_DAEMON=stand_in) as it:
        begin = time.monotonic()
        while it.poll() is None:
            it.send_signal(signal.SIGTERM)
            time.sleep(0.00005)  # so that some come while the first one is handled
        assert it.returncode == 0
        assert time.monotonic() - begin >= 2
        wait_until(lambda: nothing_is_left_of(it, copy))


def test_a_killed_run_leaves_nothing_running_and_the_next_run_removes_its_folder(start, copy):
    with start(copy) as it:
        it.invoke()
        os.killpg(it.pid, signal.SIGKILL)
        wait_until(lambda: nothing_is_left_of(it, copy, folders=1))
    with start(copy) as it:
        assert it.invoke() == HELLO
    wait_until(lambda: nothing_is_left_of(it, copy))


def test_a_run_that_is_killed_when_its_job_has_just_started_leaves_nothing_running(
    start, copy, tmp_path
):
    """bash first executes the file that BASH_ENV names. So the script kills itself at `job=$!`.

    If the script no longer had that command, this test would fail.
    """
    trap = tmp_path / "bash_env"
    kill = "case $BASH_COMMAND${1-} in job=?!with_variables) kill -9 -$$ ;; esac"
    trap.write_text(f"set -T; trap '{kill}' DEBUG")
    with start(copy, wait=False, BASH_ENV=str(trap)) as it:
        assert it.wait(60) == -signal.SIGKILL
        wait_until(lambda: nothing_is_left_of(it, copy, folders=1))


def test_e_passes_any_value_but_no_other_variable_and_writes_no_secret(start, evaluating, tmp_path):
    secret = secrets.token_hex()
    shell = {
        "LINES": "one\ntwo = 'three' \"four\" $five OTHER six\n",
        "EMPTY": "",
        "LONG": "x" * 70_000,
        "PASSWORD": secret,
        "AMQP_PASSWORD": secret,
    }
    # The run script uses the last four itself; the values for the function must not affect it.
    given = {
        "GIVEN": "a b=c OTHER d",
        "UID": "5",
        "TMPDIR": "/nowhere",
        "BASH_ENV": "/nowhere",
        "PORT": "http",
    }
    not_exported = ["UNSET", "port", "BASH_VERSION"]  # the last two are set, but not exported
    words = e_options([*shell, *not_exported])
    words += e_options(f"{name}={value}" for name, value in given.items())
    others = {"OTHER": "other", "HOST": "x86_64-conda-linux-gnu", "BASH_FUNC_other%%": "() { :; }"}
    with start(evaluating, *words, **shell, **others, TMPDIR=str(tmp_path)) as it:
        environ = it.invoke({"do": "dict(os.environ)"})
        files = *tmp_path.rglob("*"), *evaluating.rglob("*"), *Path("/proc").glob("[0-9]*/cmdline")
        written = b""
        for file in files:
            with contextlib.suppress(OSError):
                written += file.read_bytes()
    assert {name: environ.get(name) for name in shell | given} == shell | given
    must_stay_out = {*others, *not_exported, "BASE_IMAGE", "PYTEST_CURRENT_TEST"}
    assert not must_stay_out & environ.keys()
    assert given["GIVEN"].encode() in written
    assert secret.encode() not in written


def test_e_overrides_nothing_that_the_daemon_needs(start, sample, stand_in):
    """It answers at the address that -p names, to the function's own name."""
    words = "-e", "PORT=1", "-e", "INVOKE_API_HOST=192.0.2.1", "-e", "AWS_LAMBDA_FUNCTION_NAME="
    with start(sample, *words, LAMBDA_RUNTIME_API_DAEMON=stand_in) as it:
        assert it.invoke(function=NAME)["environ"]["AWS_LAMBDA_FUNCTION_NAME"] == NAME


def test_of_the_shells_variables_amqp_uri_counts_but_not_the_functions_name(
    start, sample, stand_in
):
    """An empty AMQP_URI says that there is no broker."""
    shell = {"AWS_LAMBDA_FUNCTION_NAME": "of-the-shell", "AMQP_URI": ""}
    with start(sample, LAMBDA_RUNTIME_API_DAEMON=stand_in, **shell) as it:
        environ = it.invoke(function=NAME)["environ"]
    assert environ["AWS_LAMBDA_FUNCTION_NAME"] == NAME
    assert environ["AMQP_URI"] == ""


def test_when_a_run_is_killed_the_daemon_is_killed_too(start, copy, stand_in):
    """On SIGTERM it would lose the messages that it has taken from its queue."""
    with start(copy, "-e", "IGNORE_SIGTERM=1", LAMBDA_RUNTIME_API_DAEMON=stand_in) as it:
        it.kill()
        wait_until(lambda: nothing_is_left_of(it, copy, folders=1))
        assert "Daemon ended by SIGTERM" not in it.output


def test_it_builds_with_the_engines_own_builder_and_never_pulls_the_image(sample, tmp_path):
    """Another builder may keep the image; one of that name in a registry is not this one."""
    log = tmp_path / "log"
    program = f'echo "$@" BUILDX_BUILDER=${{BUILDX_BUILDER-none}} >>"{log}"'
    path = path_with(tmp_path, {"docker": program})
    environment = {name: value for name, value in os.environ.items() if name != "BASE_IMAGE"}
    environment |= {"PATH": path, "BUILDX_BUILDER": "other"}
    ran = run(sample / f"{NAME}.sh", "--docker", "-p", free_port(), env=environment)
    assert ran.returncode == 0, ran.stderr
    asked = log.read_text().splitlines()
    (build,) = [line for line in asked if line.startswith("build ")]
    base_image = f"--build-arg BASE_IMAGE={DEFAULT_BASE_IMAGE}"
    assert f"{base_image} --tag {NAME} . BUILDX_BUILDER=none" in build
    (start,) = [line for line in asked if line.startswith("run ") and "--help" not in line]
    for option in "--rm", "--pull never", "--memory 256m":
        assert f" {option} " in start


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("", id="empty"),
        pytest.param("/nowhere", id="without Python"),
        pytest.param("/usr/bin:/bin", id="with this machine's Python"),
    ],
)
def test_a_function_may_have_any_path(start, sample, path):
    with start(sample, "-e", f"PATH={path}") as it:
        assert it.invoke() == HELLO


def test_it_runs_without_a_path_and_under_a_parent_that_ignores_sigchld(start, sample):
    becomes = "trap '' CHLD; unset PATH; exec \"$@\""
    with start(sample, prefix=["bash", "-c", becomes, "bash"]) as it:
        assert it.invoke() == HELLO


# The names of the variables that the run script and scripts/mount-opt set.
USED_BY_THE_SCRIPTS = """
address assigned byte client container container_name daemon function_name headers job machine name
obstacle options own_settings parameters passed path port process_group proxies publish self
settings status try url variable way what
"""


def test_e_passes_variables_whose_names_the_scripts_use_themselves(start, evaluating, monkeypatch):
    """One that the shell does not export stays unset."""
    names = USED_BY_THE_SCRIPTS.split()
    with start(evaluating, *e_options(names)) as it:
        assert not {*names} & {*it.invoke({"do": "[*os.environ]"})}
    shell = {name: f"the shell's {name}" for name in names}
    shell["AWS_LAMBDA_FUNCTION_NAME"] = "named-by-the-shell"
    for name, value in shell.items():
        monkeypatch.setenv(name, value)
    with start(evaluating, *e_options(shell)) as it:
        environ = it.invoke({"do": "dict(os.environ)"})
    assert {name: environ.get(name) for name in shell} == shell


def test_the_proxies_of_dockers_configuration_reach_no_function(evaluating, engine, tmp_path):
    """They may contain passwords. Neither do the shell's, unless -e names them."""
    # Building the image uses proxies, so these are of kinds that the build does not need.
    proxies = {"ftpProxy": "http://user:secret@proxy.example.com:3128", "noProxy": "example.com"}
    (tmp_path / "config.json").write_text(json.dumps({"proxies": {"default": proxies}}))
    environment = {"DOCKER_CONFIG": str(tmp_path), "BASE_IMAGE": first_base_image()}
    with running(evaluating, "--docker", FTP_PROXY="http://of-the-shell", **environment) as it:
        environ = it.invoke({"do": "dict(os.environ)"})
    assert not [name for name in environ if "proxy" in name.lower()]
    words = "-e", "ftp_proxy", "-e", "NO_PROXY=given"
    with running(evaluating, "--docker", *words, ftp_proxy="http://shell", **environment) as it:
        environ = it.invoke({"do": "dict(os.environ)"})
    assert {name: value for name, value in environ.items() if "proxy" in name.lower()} == {
        "ftp_proxy": "http://shell",
        "NO_PROXY": "given",
    }


MEMORY_SIZE = "AWS_LAMBDA_FUNCTION_MEMORY_SIZE"
MAX_CONCURRENCY = "AWS_LAMBDA_MAX_CONCURRENCY"


@pytest.mark.parametrize(
    ("assigned", "shell", "memory"),
    [
        pytest.param([], {}, 256, id="by default"),
        pytest.param([f"{MEMORY_SIZE}=200", f"{MAX_CONCURRENCY}="], {}, 200, id="set with -e"),
        pytest.param([], {MEMORY_SIZE: "200", MAX_CONCURRENCY: ""}, 200, id="set in the shell"),
    ],
)
def test_with_an_engine_it_runs_in_docker_confined_as_lambda_confines_a_function(
    sample, engine, assigned, shell, memory
):
    """An empty variable counts as not set: this one would turn on Managed Instances."""
    words = e_options([*assigned, f"BASE_IMAGE={first_base_image()}"])
    with running(sample, *words, **shell) as it:
        assert it.invoke() == HELLO
        (inspected,) = json.loads(run("docker", "inspect", it.container).stdout)
    assert f"{MEMORY_SIZE}={memory}" in inspected["Config"]["Env"]
    assert_confined_as_on_lambda(inspected, memory)


def test_it_can_be_started_by_a_link_by_sh_and_in_posix_mode(sample, tmp_path):
    """On macOS, sh is bash in POSIX mode."""
    link = tmp_path / "link"
    link.symlink_to(os.path.relpath(sample / f"{NAME}.sh", tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        for shell in [], ["sh"], ["bash", "--posix"]:
            assert "is in use" in own_last_line(run(*shell, link, "-p", server.getsockname()[1]))


@pytest.mark.slow
def test_docker_may_be_podman(sample, stand_in, engine, tmp_path):
    """Rootless, unless root runs the tests."""
    (tmp_path / "docker").symlink_to(tool("podman"))
    assert run("sh", "-c", f"docker save {first_base_image()} | podman load").returncode == 0
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "BASE_IMAGE": f"localhost/{first_base_image()}",
    }
    with running(sample, "--docker", **environment) as it:
        assert it.invoke() == HELLO
        it.assert_signal_ends_it()
    assert run("podman", "ps", "--all", "--quiet").stdout == ""
    environment |= {"LAMBDA_RUNTIME_API_DAEMON": stand_in, "no_proxy": "any"}
    with running(sample, "--docker", **environment) as it:
        environ = it.invoke(function=NAME)["environ"]
    assert environ["AMQP_URI"].startswith("amqp://host.containers.internal:5672")
    assert "no_proxy" not in environ
