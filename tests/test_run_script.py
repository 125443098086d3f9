"""python-example-extension.sh: its options, its errors, and its cleanup."""

import contextlib
import json
import os
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
    ROOT,
    copy_misbehaving_sample,
    copy_sample,
    first_base_image,
    free_port,
    need_namespaces,
    processes_of,
    run,
    running,
    wait_until,
)

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux")


def script(sample, *arguments, path=None, **environment):
    """Runs the run script to its end. With a path, only the commands there are to be found."""
    environment = os.environ | environment | ({"PATH": str(path)} if path else {})
    return run(sample / f"{NAME}.sh", *arguments, env=environment, timeout=120)


@pytest.fixture
def commands(tmp_path):
    """A folder for PATH with the commands of this machine, but for those that a test removes or replaces."""
    path = tmp_path / "commands"
    path.mkdir()
    folders = filter(os.path.isdir, reversed(os.environ["PATH"].split(":")))
    for name, command in {entry.name: entry.path for folder in folders for entry in os.scandir(folder)}.items():
        os.symlink(command, path / name)
    return path


def replace(commands, name, script):
    (commands / name).unlink(missing_ok=True)
    (commands / name).write_text(f"#!/bin/sh\n{script}\n")
    (commands / name).chmod(0o755)


def one_line(ran):
    """The last line of standard error, which must be the script's own."""
    line = ran.stderr.splitlines()[-1]
    assert line.startswith(f"{NAME}: "), ran.stderr
    return line


def tree(folder):
    """Every path below a folder."""
    return sorted(str(path) for path in Path(folder).rglob("*"))


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_the_usage(sample, option):
    ran = script(sample, option)
    assert ran.returncode == 0
    assert ran.stdout.startswith(
        f"usage: {sample}/{NAME}.sh [--docker | --no-docker] [-p [ADDRESS:]PORT] [-e NAME[=VALUE]]...\n"
    )


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--nonsense"], {}),
        (["stray"], {}),
        (["--docker", "--no-docker"], {}),
        (["-e"], {}),
        (["-e", "1=2"], {}),
        (["-e", "=2"], {}),
        (["-e", "A-B=2"], {}),
        (["-p"], {}),
        *((["-p", publish], {}) for publish in ["", "http", "0", "08080", "65536", "localhost:8080", "[::1]:8080"]),
        *((["-p", publish], {}) for publish in ["256.1.1.1:8080", "1.2.3:8080", ":8080", "127.0.0.1:", "127.0.0.1"]),
        ([], {"AWS_LAMBDA_FUNCTION_TIMEOUT": "abc"}),
        ([], {"AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "0"}),
        ([], {"AWS_LAMBDA_MAX_CONCURRENCY": "-1"}),
        ([], {"LAMBDA_RUNTIME_API_DAEMON": "/bin/true", "MAX_CONCURRENCY": "many"}),
    ],
)
def test_a_usage_error_prints_one_line_and_exits_2(sample, arguments, environment):
    ran = script(sample, *arguments, **environment)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    one_line(ran)


def test_a_port_in_use_fails_with_one_line(way, sample):
    option, environment = way
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = script(sample, option, "-p", str(port), **environment)
    assert ran.returncode == 1
    assert f"port {port} is in use" in one_line(ran)


@on_linux
@pytest.mark.parametrize("version", [None, (3, 9)], ids=["none", "too old"])
def test_no_python_or_an_old_one_fails_with_one_line(sample, commands, version):
    (commands / "python3").unlink()
    if version:
        program = f"import sys; sys.version_info = {version}; exec(sys.argv[-1])"
        replace(commands, "python3", f'exec {shlex.quote(sys.executable)} -c "{program}" "$@"')
    ran = script(sample, "--no-docker", "-p", str(free_port()), path=commands)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "Python 3.10" in one_line(ran)


@on_linux
def test_no_pip_fails_with_one_line(folder, commands):
    fresh = copy_sample(folder / "no pip")
    without_pip = folder / "without pip"
    run(sys.executable, "-m", "venv", "--without-pip", without_pip)
    (commands / "python3").unlink()
    replace(commands, "python3", f'exec "{without_pip}/bin/python3" "$@"')
    ran = script(fresh, "--no-docker", "-p", str(free_port()), path=commands)
    assert ran.returncode == 1
    reason = "this python3 has no pip; try: apt-get install python3-pip, or another python3"
    assert one_line(ran) == f"{NAME}: the dependencies cannot be installed: {reason}"
    assert not list((fresh / ".run").iterdir())


@on_linux
def test_without_a_docker_command_it_says_so_and_runs_without_docker(sample, commands):
    (commands / "docker").unlink(missing_ok=True)
    with running(sample, PATH=str(commands)) as started:
        assert "without Docker, on this machine: there is no docker command" in started.output
        assert json.loads(started.invoke()) == HELLO


@on_linux
def test_without_a_docker_engine_it_says_so_and_runs_without_docker(sample, commands):
    replace(commands, "docker", "echo Client: Docker; echo permission denied >&2; exit 1")
    reason = "no Docker engine answers: permission denied"
    with running(sample, PATH=str(commands)) as started:
        assert f"without Docker, on this machine: {reason}\n" in started.output
        assert json.loads(started.invoke()) == HELLO
    ran = script(sample, "--docker", "-p", str(free_port()), path=commands)
    assert ran.returncode == 1
    assert reason in one_line(ran)


@on_linux
def test_without_a_base_image_it_says_so_and_runs_without_docker(sample, engine):
    image = "localhost:1/no/such/image:here"
    with running(sample, BASE_IMAGE=image) as started:
        assert f"without Docker, on this machine: the base image {image} cannot be pulled" in started.output
        assert json.loads(started.invoke()) == HELLO


def test_docker_never_falls_back_without_base_image(sample, engine):
    ran = script(sample, "--docker", "-p", str(free_port()), BASE_IMAGE="localhost:1/no/such/image:here")
    assert ran.returncode == 1
    assert "localhost:1/no/such/image:here cannot be pulled" in one_line(ran)
    assert "BASE_IMAGE" in one_line(ran)
    assert "--no-docker" in one_line(ran)


def test_with_an_engine_and_a_base_image_it_runs_in_docker(sample, engine):
    with running(sample, BASE_IMAGE=first_base_image()) as started:
        assert started.container
        assert json.loads(started.invoke()) == HELLO


def test_anything_but_linux_needs_docker(sample, commands):
    replace(commands, "uname", "echo Darwin")
    ran = script(sample, "--no-docker", "-p", str(free_port()), path=commands)
    assert ran.returncode == 1
    assert "Docker" in one_line(ran)


def test_listens_on_loopback_by_default(way, sample):
    option, environment = way
    with running(sample, option, **environment) as started, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", started.port))
    with running(sample, option, host="127.0.0.2", **environment) as started:
        assert f"http://127.0.0.2:{started.port}/" in started.output
        assert json.loads(started.invoke()) == HELLO


def test_two_copies_run_side_by_side_on_two_ports(way, sample):
    option, environment = way
    with running(sample, option, **environment) as one, running(sample, option, **environment) as other:
        assert json.loads(one.invoke()) == json.loads(other.invoke()) == HELLO
        wait_until(lambda: one.received and other.received)
        assert one.received != other.received
        one.stop()
        assert json.loads(other.invoke()) == HELLO


def nothing_is_left_of(started, sample):
    """Asserts that neither a container nor a process of a run is left, nor a temporary file."""
    if shutil.which("docker"):
        assert run("docker", "ps", "--all", "--quiet", "--filter", f"publish={started.port}").stdout == ""
    assert not processes_of(sample)
    assert not list(sample.glob(".run/run.*"))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", started.port))


def test_ends_before_the_first_invocation(way, sample):
    option, environment = way
    with running(sample, option, **environment) as started:
        assert started.stop()[0] == 0
        nothing_is_left_of(started, sample)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_ends_within_two_seconds_with_0_and_leaves_nothing_behind(way, sample, tmp_path, signum):
    option, environment = way
    with running(sample, option, TMPDIR=str(tmp_path), **environment) as started:
        started.invoke()
        status, seconds = started.stop(signum)
        assert status == 0
        assert seconds < 2
        assert '"eventType": "SHUTDOWN"' in started.output
        nothing_is_left_of(started, sample)
        assert not list(tmp_path.iterdir())


def test_a_second_signal_does_not_interrupt_the_cleanup(way, sample, tmp_path):
    option, environment = way
    with running(sample, option, TMPDIR=str(tmp_path), **environment) as started:
        started.process.send_signal(signal.SIGTERM)
        while started.process.poll() is None:
            started.process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        assert started.process.returncode == 0
        nothing_is_left_of(started, sample)
        assert not list(tmp_path.iterdir())


def test_kills_what_ignores_the_signal(way, sample, stand_in):
    option, environment = way
    environment = environment | {"LAMBDA_RUNTIME_API_DAEMON": stand_in}
    with running(sample, option, "-e", "IGNORE_SIGTERM=1", **environment) as started:
        status, seconds = started.stop()
        assert status == 0
        assert 2 <= seconds < 15
        nothing_is_left_of(started, sample)


@pytest.mark.slow
def test_says_when_nothing_answers(sample, tmp_path, engine):
    mute = tmp_path / "mute daemon"
    mute.write_text("#!/bin/sh\nexec sleep 60\n")
    mute.chmod(0o755)
    environment = {"LAMBDA_RUNTIME_API_DAEMON": str(mute), "BASE_IMAGE": first_base_image()}
    with running(sample, "--docker", wait=False, **environment) as started:
        wait_until(lambda: f"nothing answers at 127.0.0.1:{started.port} yet" in started.output, 60)


def test_says_with_which_status_the_container_exited(sample, engine):
    with running(sample, "--docker", BASE_IMAGE=first_base_image()) as started:
        run("docker", "kill", started.container)
        assert started.process.wait(60) == 1
        line = started.output.splitlines()[-1]
        assert line == f"{NAME}: the container exited with status 137; see its output above"


def test_a_failed_build_fails_with_one_line(copy, engine):
    with (copy / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("RUN false\n")
    ran = script(copy, "--docker", "-p", str(free_port()), BASE_IMAGE=first_base_image())
    assert ran.returncode == 1
    assert one_line(ran) == f"{NAME}: the image cannot be built"


@on_linux
def test_a_secret_never_appears_on_a_command_line(way, sample):
    option, environment = way
    secret, seen, stop = "hunter2 of this test", [], threading.Event()

    def scan():
        while not stop.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    seen.append(process.joinpath("cmdline").read_bytes())

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        with running(sample, option, "-e", "PASSWORD", PASSWORD=secret, **environment) as started:
            started.invoke()
    finally:
        stop.set()
        scanner.join()
    assert any(NAME.encode() in command for command in seen)
    assert not [command for command in seen if secret.encode() in command]


def test_host_and_port_of_the_environment_mean_nothing(way, sample):
    option, environment = way
    with running(sample, option, HOST="x86_64-conda-linux-gnu", PORT="http", **environment) as started:
        assert json.loads(started.invoke()) == HELLO


def test_the_container_is_confined_as_lambda_confines_a_function(sample, engine):
    environment = {"BASE_IMAGE": first_base_image(), "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "200"}
    with running(sample, "--docker", **environment) as started:
        assert json.loads(started.invoke()) == HELLO
        container = started.container
        (inspected,) = json.loads(run("docker", "inspect", container).stdout)
        assert run("docker", "exec", container, "sh", "-c", "cp /bin/true /tmp && /tmp/true").returncode == 0
        assert run("docker", "exec", container, "sh", "-c", "touch /var/task/file").returncode != 0
    host = inspected["HostConfig"]
    assert inspected["Config"]["User"] == "60999:60999"
    assert inspected["Config"]["Image"].startswith("sha256:")  # the name may be another checkout's by now
    assert (host["Memory"], host["PidsLimit"]) == (200 * 1024 * 1024, 1024)
    assert (host["ReadonlyRootfs"], host["Tmpfs"]) == (True, {"/tmp": "exec,size=512m"})
    assert (host["CapDrop"], host["CapAdd"]) == (["ALL"], None)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["AutoRemove"]


def test_e_passes_values_of_any_kind_and_none_of_the_scripts_own_variables(way, sample, tmp_path):
    option, environment = way
    copy = copy_misbehaving_sample(tmp_path / "copy", sample)
    own = ["way", "port", "address", "name", "self", "managed", "BASH_VERSION"]
    names = [word for name in [*own, "LINES_OF_KEY", "EMPTY"] for word in ("-e", name)]
    lines = {"LINES_OF_KEY": "one\ntwo = 'three' \"four\" $five\n", "EMPTY": ""}
    with running(copy, option, *names, "-e", "GIVEN=a b=c", **lines, **environment) as started:
        environ = json.loads(started.invoke(b'{"environ": true}'))
    assert {name: environ.get(name) for name in [*lines, "GIVEN"]} == lines | {"GIVEN": "a b=c"}
    assert not {*own} & environ.keys()


@on_linux
@pytest.mark.parametrize("how", ["a symlink", "sh"])
def test_it_can_be_started_in_any_way(sample, tmp_path, how):
    starter = tmp_path / "start it"
    if how == "sh":
        starter.write_text(f'#!/bin/sh\nexec sh "{sample}/{NAME}.sh" "$@"\n')
        starter.chmod(0o755)
    else:
        starter.symlink_to(sample / f"{NAME}.sh")
    with running(tmp_path, "--no-docker", script=starter.name) as started:
        assert json.loads(started.invoke()) == HELLO


@on_linux
@pytest.mark.skipif(os.geteuid() != 0, reason="root cannot be kept from writing by modes, nor others by root's files")
@pytest.mark.parametrize("whose", ["another user's", "a full disk"])
def test_a_folder_it_cannot_write_to_fails_with_one_line_and_loses_nothing(folder, whose):
    fresh = copy_sample(folder / f"unwritable {len(whose)}")
    for path in [fresh, *fresh.rglob("*")]:
        os.chown(path, 12345, 12345)
    (fresh / ".run").mkdir()
    before = tree(fresh)
    prefix = []
    if whose == "a full disk":
        need_namespaces()
        full = 'mount -t tmpfs -o nr_inodes=1,uid=12345 none .run && exec setpriv --reuid 12345 "$@"'
        prefix = ["unshare", "--mount", "sh", "-c", full, "sh"]
    else:
        prefix = ["setpriv", "--reuid", "12345", "--clear-groups"]
    environment = os.environ | {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    ran = run(*prefix, fresh / f"{NAME}.sh", "--no-docker", "-p", str(free_port()), cwd=fresh, env=environment)
    assert ran.returncode == 1
    assert one_line(ran).startswith(f"{NAME}: cannot write to {fresh}/.run: ")
    assert tree(fresh) == before


@on_linux
def test_leaves_nothing_running_when_it_is_killed(copy):
    with running(copy, "--no-docker") as started:
        started.invoke()
        started.process.kill()
        wait_until(lambda: not processes_of(copy))


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_writes_nothing_outside_its_ignored_folder(folder, tmp_path, commands, signum):
    (commands / "rustc").unlink(missing_ok=True)  # pip asks for its version, and rustup then writes its settings
    fresh = copy_sample(folder / f"written-{signum}")
    before = tree(fresh)
    for name in "home", "tmp":
        (tmp_path / name).mkdir()
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PATH": str(commands)}
    with running(fresh, "--no-docker", **environment) as started:
        started.invoke()
        assert not os.path.exists(f"/opt/{NAME}")
        started.stop(signum)
    assert tree(tmp_path / "home") == tree(tmp_path / "tmp") == []
    assert [path for path in tree(fresh) if f"{fresh}/.run" not in path] == before
    assert not list(fresh.glob(".run/run.*"))
    assert "/.run/" in (ROOT / ".gitignore").read_text().splitlines()


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


@on_linux
def test_the_function_sees_the_machines_own_opt_as_well(copy):
    (copy / "lambda_function.py").write_text(
        "import os\ndef lambda_handler(event, _):\n    return os.listdir('/opt') + os.listdir('/opt/extensions')\n"
    )
    before = set(os.listdir("/opt"))
    with running(copy, "--no-docker") as started:
        seen = json.loads(started.invoke())
    assert {NAME, "extensions", *before & set(os.listdir("/opt"))} <= set(seen)


@pytest.mark.slow
@on_linux
@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_works_as_an_ordinary_user(folder):
    theirs = copy_sample(folder / "of an ordinary user")
    for path in [theirs, *theirs.rglob("*")]:
        os.chown(path, 12345, 12345)
    with running(theirs, "--no-docker", user=12345, HOME="/", PATH="/usr/local/bin:/usr/bin:/bin") as started:
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
        assert started.stop()[0] == 0
    assert not processes_of(theirs)
    environment = os.environ | {"PATH": "/usr/local/bin:/usr/bin:/bin", "AWS_LAMBDA_MAX_CONCURRENCY": "2"}
    command = theirs / f"{NAME}.sh", "--no-docker", "-p", str(free_port())
    ran = run(*command, user=12345, group=12345, extra_groups=[], env=environment, cwd="/")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "AWS_LAMBDA_MAX_CONCURRENCY needs root and mount namespaces here; or use --docker" in one_line(ran)
