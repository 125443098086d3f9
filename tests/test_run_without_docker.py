"""The run script without Docker.

What it installs, how it recovers, and how it isolates a run, or links into /opt.
"""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import sys
import time
import uuid

import pytest
from machine import PROGRAMS, free_port, path_with, processes_of, run, tool, wait_until
from running import running
from sample import HELLO, NAME, copy_sample, remove_hashes

USER = 12345  # the ID of an ordinary user


def installed(sample):
    """The folder with what the first run has installed."""
    (found,) = sample.glob(f".run/{NAME}-*")
    return found


@pytest.fixture
def fresh(folder):
    """A copy of the sample that has never been run."""
    return copy_sample(folder / uuid.uuid4().hex)


def give_to_user(copy):
    """Gives a copy to an ordinary user; returns the options of running() for that user.

    Without root, the tests run as an ordinary user anyway: then it changes nothing.
    """
    if os.geteuid() != 0:
        return {}
    for link in copy.glob(".run/*-*"):  # into the cache, which the user may be unable to read
        original = link.resolve()
        link.unlink()
        shutil.copytree(original, link, symlinks=True)
    for path in [copy, *copy.rglob("*")]:
        os.chown(path, USER, USER, follow_symlinks=False)
    return {"user": USER, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"}


def running_without_namespaces(copy, opt, **options):
    """Runs a copy as in a plain container, which refuses namespaces; the folder opt is its /opt."""
    options |= {"SCRIPT": f"{copy}/{NAME}.sh", "OPT": str(opt)}
    return running(copy, "--no-docker", script=PROGRAMS / "without_namespaces.sh", **options)


def assert_refuses_to_run(sample, *said, **options):
    """Runs a copy that cannot run, and asserts that it prints one line, with these words."""
    with running(sample, "--no-docker", wait=False, **options) as it:
        assert it.wait(60) == 1
    assert it.output.startswith(f"{NAME}: ")
    assert it.output.count("\n") == 1
    for words in said:
        assert words in it.output


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.2, 1.5])
def test_an_interrupted_installation_leaves_nothing_running_and_the_next_run_works(
    fresh, signum, seconds
):
    with running(fresh, "--no-docker", wait=False) as it:
        wait_until(lambda: list(fresh.glob(".run/run.*")))
        time.sleep(seconds)
        it.stop(signum)
        wait_until(lambda: not processes_of(fresh))
    with running(fresh, "--no-docker") as it:
        assert it.invoke() == HELLO
    assert {path.name for path in fresh.glob(".run/*")} == {"lock", installed(fresh).name}


@pytest.mark.slow
def test_when_two_first_runs_start_at_once_one_installs_for_both(fresh):
    options = give_to_user(fresh)
    with (
        running(fresh, "--no-docker", wait=False, **options) as one,
        running(fresh, "--no-docker", **options) as other,
    ):
        one.wait_until_ready()
        assert (one.output + other.output).count("installing the dependencies") == 1
        for it in one, other:
            assert it.invoke() == HELLO
            it.assert_signal_ends_it()
    wait_until(lambda: not processes_of(fresh))
    assert {path.name for path in fresh.glob(".run/*")} == {"lock", installed(fresh).name}


@pytest.mark.slow
def test_when_pip_fails_its_output_is_shown_and_nothing_is_left(fresh):
    remove_hashes(fresh / NAME / "requirements.txt")
    with running(fresh, "--no-docker", wait=False) as it:
        assert it.wait(120) == 1
        assert "Hashes are required in --require-hashes mode" in it.output
        assert it.output.endswith(f"{NAME}: pip failed; see its output above\n")
    assert os.listdir(fresh / ".run") == ["lock"]


@pytest.mark.slow
def test_it_writes_nothing_outside_its_ignored_folder_whatever_pips_settings(fresh, tmp_path):
    def tree():
        paths = *fresh.rglob("*"), *tmp_path.rglob("*")
        return {path for path in paths if ".run" not in path.parts}

    settings = tmp_path / ".config" / "pip" / "pip.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[global]\nprefix = {tmp_path}/prefix\n[install]\nuser = yes\n")
    before = tree()
    # pip asks rustc for its version, and rustup then writes its settings.
    folders = os.environ["PATH"].split(":")
    path = ":".join(each for each in folders if not os.path.exists(f"{each}/rustc"))
    environment = {
        "HOME": str(tmp_path),
        "PATH": path,
        "PIP_PREFIX": f"{tmp_path}/prefix",
        "PIP_USER": "1",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "PIP_NO_BINARY": ":all:",
        "PIP_CONSTRAINT": "/nowhere",
    }
    with running(fresh, "--no-docker", TMPDIR=str(tmp_path), PYTHONHOME="/no", **environment) as it:
        assert it.invoke() == HELLO
        assert not os.path.exists(f"/opt/{NAME}")
        assert (fresh / ".run").stat().st_mode & 0o777 == 0o700
    assert tree() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(fresh):
    options = {"user": USER, "PATH": "/usr/bin:/bin"}
    assert_refuses_to_run(fresh, "Permission denied", f"{fresh}/.run", **options)
    (fresh / ".run").mkdir(0o700)
    said = f"{fresh}/.run belongs to another user, who ran this before: remove it"
    assert_refuses_to_run(fresh, said, **options)


def test_a_file_where_the_folder_should_be_is_an_error_of_one_line(fresh):
    (fresh / ".run").touch()
    assert_refuses_to_run(fresh, f"{fresh}/.run is not a folder: remove it")


@pytest.mark.usefixtures("installed_sample")
def test_it_runs_without_execute_bits_and_with_a_tmpdir_that_is_no_folder(copy):
    """The bits get lost in a ZIP file."""
    for file in copy.rglob("*"):
        if file.is_file() and ".run" not in file.parts:
            file.chmod(0o644)
    (copy / f"{NAME}.sh").chmod(0o755)  # instead of `bash python-example-extension.sh`
    with running(copy, "--no-docker", TMPDIR="/etc/passwd") as it:
        assert it.invoke() == HELLO
        assert "passwd" not in it.output


@pytest.mark.usefixtures("installed_sample")
def test_it_runs_although_the_folder_of_another_run_vanishes_meanwhile(copy):
    """A link to nowhere looks the same: it is listed, but cannot be opened."""
    (copy / ".run" / "run.gone").symlink_to("/nowhere/at/all")
    with running(copy, "--no-docker") as it:
        assert it.invoke() == HELLO


@pytest.mark.usefixtures("installed_sample")
def test_while_another_run_prepares_itself_it_says_so_and_a_signal_ends_it(copy):
    with open(copy / ".run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with running(copy, "--no-docker", wait=False) as it:
            said = f"{NAME}: waiting for another run to get ready\n"
            wait_until(lambda: said in it.output)
            time.sleep(0.5)
            assert it.output.count(said) == 1
            assert it.stop() == 0  # although the test keeps the lock


@pytest.mark.slow
def test_a_python_that_is_a_link_makes_an_environment_of_what_it_links_to(fresh, tmp_path):
    # A relocatable Python finds its standard library only from where it really is.
    python = os.path.realpath(sys.executable)
    (tmp_path / "python3").symlink_to(python)
    with running(fresh, "--no-docker", PATH=f"{tmp_path}:{os.environ['PATH']}") as it:
        assert it.invoke() == HELLO
    settings = (installed(fresh) / "python" / "pyvenv.cfg").read_text()
    assert f"home = {os.path.dirname(python)}\n" in settings


@pytest.mark.usefixtures("shares_installed")
def test_what_is_mounted_below_opt_stays_visible_even_for_an_ordinary_user(evaluating):
    options = give_to_user(evaluating)
    script = PROGRAMS / "with_mount_below_opt.sh"
    options |= {"SCRIPT": f"{evaluating}/{NAME}.sh", "AS": str(options.pop("user", ""))}
    with running(evaluating, "--no-docker", script=script, **options) as it:
        assert it.invoke({"do": "open('/opt/mounted/file').read()"}) == "mounted\n"
        assert {NAME, "extensions", "mounted"} <= {*it.invoke({"do": "os.listdir('/opt')"})}
        # Another extension of this machine stays out.
        assert it.invoke({"do": "os.listdir('/opt/extensions')"}) == [NAME]
        assert "no namespaces" not in it.output


@pytest.mark.usefixtures("installed_sample")
def test_where_mounts_are_refused_it_links_into_opt(copy, tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    (path / "mount").write_text("#!/bin/sh\necho mount: permission denied >&2\nexit 1\n")
    (path / "mount").chmod(0o755)
    (tmp_path / "opt").mkdir()
    with running_without_namespaces(copy, tmp_path / "opt", MOUNT=str(path)) as it:
        assert "mount: permission denied\n" in it.output
        assert it.invoke() == HELLO
        wait_until(lambda: it.received)
        assert {*os.listdir(tmp_path / "opt")} == {"extensions", NAME}
        it.assert_signal_ends_it()
    assert not os.listdir(tmp_path / "opt")


@pytest.mark.usefixtures("installed_sample")
def test_with_the_tools_of_busybox_it_links_into_opt(copy, tmp_path):
    """Its `unshare` does not know all options."""
    busybox = tool("busybox")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "opt").mkdir()
    run(busybox, "--install", "-s", tools)
    python = os.path.realpath(sys.executable)
    for name, path in ("bash", shutil.which("bash")), ("python3", python):
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(path)
    with running_without_namespaces(copy, tmp_path / "opt", TOOLS=str(tools)) as it:
        assert "unrecognized option" in it.output
        assert it.invoke() == HELLO
        it.assert_signal_ends_it()
    assert not os.listdir(tmp_path / "opt")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run it for another user")
@pytest.mark.usefixtures("installed_sample")
def test_root_may_run_what_another_user_has_run_before(copy):
    os.chown(copy / ".run", USER, USER)
    with running(copy, "--no-docker") as it:
        assert it.invoke() == HELLO


@pytest.mark.slow
@pytest.mark.parametrize(
    "file",
    [
        "requirements.txt",
        f"{NAME}/requirements.txt",
        "scripts/requirements-rie.txt",
        "scripts/pip_install.py",
        "scripts/run_without_docker.py",
    ],
)
@pytest.mark.usefixtures("installed_sample")
def test_a_run_installs_again_only_after_an_edit_of_what_decides(copy, file):
    """What decides are the pins, and the programs that install them."""
    with running(copy, "--no-docker") as it:
        assert "installing" not in it.output
    with (copy / file).open("a") as edited:
        edited.write("# changed\n")
    with running(copy, "--no-docker") as it:
        assert "installing" in it.output
        assert it.invoke() == HELLO


@pytest.mark.usefixtures("installed_sample")
def test_it_calls_the_handler_of_the_dockerfile(copy):
    (copy / "lambda_function.py").rename(copy / "other.py")
    text = (copy / "Dockerfile").read_text()
    text = re.sub(r"(?m)^CMD .*", 'CMD [ "other.lambda_handler" ] ', text)
    (copy / "Dockerfile").write_text(text)
    with running(copy, "--no-docker") as it:
        assert it.invoke() == HELLO


@pytest.mark.usefixtures("installed_sample")
def test_the_function_sees_its_folder_and_opt_but_no_process_or_package_of_this_machine(evaluating):
    with running(evaluating, "--no-docker") as it:
        assert "template.yaml" in it.invoke({"do": "os.listdir()"})
        shown = it.invoke({"do": "os.listdir('/opt')"})
        assert {NAME, "extensions", *os.listdir("/opt")} <= {*shown}
        assert NAME in it.invoke({"do": "os.listdir('/opt/extensions')"})
        assert str(os.getpid()) not in it.invoke({"do": "os.listdir('/proc')"})
        assert it.invoke({"do": "__import__('pip')"})["errorType"] == "ModuleNotFoundError"


@pytest.mark.usefixtures("installed_sample")
def test_the_runtime_api_is_on_loopback_alone_and_no_signal_is_blocked(evaluating):
    with running(evaluating, "--no-docker") as it:
        address = it.invoke({"do": "os.environ['AWS_LAMBDA_RUNTIME_API']"})
        port = int(address.rpartition(":")[2])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
        blocked = "[*__import__('signal').pthread_sigmask(0, [])]"
        assert it.invoke({"do": blocked}) == []


@pytest.mark.usefixtures("installed_sample")
def test_the_runtime_api_never_gets_the_port_of_the_endpoint(copy, tmp_path):
    """Here that port is the first that chance offers."""
    port = free_port()
    # The run script calls `python3 -E PROGRAM.py ARGUMENT...`, and also `python3 -E -c CODE`.
    offer_it = f'shift; set -- -E "{PROGRAMS}/offer_port_first.py" {port} "$@"'
    python3 = f'case $2 in *.py) {offer_it} ;; esac; exec "{sys.executable}" "$@"'
    path = path_with(tmp_path, {"python3": python3})
    with running(copy, "--no-docker", port=port, PATH=path) as it:
        assert it.invoke() == HELLO


@pytest.mark.usefixtures("installed_sample")
def test_without_namespaces_it_links_into_opt_and_replaces_the_links_of_a_killed_run(
    copy, tmp_path
):
    with running_without_namespaces(copy, tmp_path) as it:
        said = "no namespaces here, see above: linking into /opt for the duration of the run"
        assert f"{NAME}: {said}\n" in it.output
        # As when the machine runs out of memory. First the program that would remove the links.
        processes = processes_of(copy)
        cleaners = [pid for pid in processes if "run_without_docker" in processes[pid]]
        for pid in [*cleaners, *processes]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(copy))
        assert {*os.listdir(tmp_path)} == {"extensions", NAME}
    with running_without_namespaces(copy, tmp_path) as it:
        assert it.invoke() == HELLO
        it.assert_signal_ends_it()
    wait_until(lambda: not os.listdir(tmp_path) and not processes_of(copy))


@pytest.mark.usefixtures("installed_sample")
def test_without_namespaces_it_replaces_nothing_else_in_opt(copy, tmp_path):
    (tmp_path / "extensions").mkdir()
    with running_without_namespaces(copy, tmp_path, wait=False) as it:
        assert it.wait(60) == 1
        said = "cannot link into /opt; end the other run there, or use --docker, or run as root"
        assert f"{NAME}: {said}\n" in it.output
    assert os.listdir(tmp_path) == ["extensions"]


@pytest.mark.usefixtures("installed_sample")
def test_without_namespaces_it_leaves_the_links_of_a_run_that_goes_on(copy, tmp_path):
    with running_without_namespaces(copy, tmp_path) as one:
        links = {path.name: os.readlink(path) for path in tmp_path.iterdir()}
        with running_without_namespaces(copy, tmp_path, wait=False) as other:
            assert other.wait(60) == 1
            assert f"{NAME}: cannot link into /opt" in other.output
        assert {path.name: os.readlink(path) for path in tmp_path.iterdir()} == links
        assert one.invoke() == HELLO
