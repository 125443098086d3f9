"""The run script without Docker.

What it installs, how it recovers, and how it isolates a run, or links into /opt.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import time
import uuid

import pytest
from machine import PROGRAMS, processes_of, run, tool, wait_until
from running import running
from sample import HELLO, NAME, copy_sample, replace


def installed(sample):
    """The folder with what the first run has installed."""
    (found,) = sample.glob(f".run/{NAME}-*")
    return found


@pytest.fixture
def fresh(folder):
    """A copy of the sample that has never been run."""
    return copy_sample(folder / uuid.uuid4().hex)


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
    options = as_user(fresh)
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
    replace(fresh / NAME / "requirements.txt", "--hash=", "# ")
    with running(fresh, "--no-docker", wait=False) as it:
        assert it.wait(120) == 1
        assert "Hashes are required in --require-hashes mode" in it.output
        assert it.output.endswith(f"{NAME}: pip failed; see its output above\n")
    assert os.listdir(fresh / ".run") == ["lock"]


@pytest.mark.slow
def test_writes_nothing_outside_its_ignored_folder_whatever_the_settings_of_pip(fresh, tmp_path):
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


def as_user(path, user=12345):
    """Options of running() for an ordinary user, who owns the folder."""
    if os.geteuid() != 0:
        return {}
    for link in path.glob(".run/*-*"):  # into the cache, which the user may be unable to read
        installed = link.resolve()
        link.unlink()
        shutil.copytree(installed, link, symlinks=True)
    for each in [path, *path.rglob("*")]:
        os.chown(each, user, user, follow_symlinks=False)
    return {"user": user, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"}


def assert_refuses_to_run(sample, *said, **options):
    """Runs a copy that cannot run, and asserts that it prints one line, with these words."""
    with running(sample, "--no-docker", wait=False, **options) as it:
        assert it.wait(60) == 1
    assert it.output.count("\n") == 1 and it.output.startswith(f"{NAME}: ")
    for words in said:
        assert words in it.output


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(fresh):
    assert_refuses_to_run(
        fresh, "Permission denied", f"{fresh}/.run", user=12345, PATH="/usr/bin:/bin"
    )
    (fresh / ".run").mkdir(0o700)
    said = f"{fresh}/.run belongs to another user, who ran this before: remove it"
    assert_refuses_to_run(fresh, said, user=12345, PATH="/usr/bin:/bin")


def test_a_file_where_the_folder_should_be_is_an_error_of_one_line(fresh):
    (fresh / ".run").touch()
    assert_refuses_to_run(fresh, f"{fresh}/.run is not a folder: remove it")


@pytest.mark.usefixtures("installed_sample")
def test_it_runs_without_execute_bits_and_with_a_tmpdir_that_is_no_folder(copy):
    for file in copy.rglob("*"):
        if file.is_file() and ".run" not in file.parts:
            file.chmod(0o644)
    (copy / f"{NAME}.sh").chmod(0o755)  # instead of `bash python-example-extension.sh`
    with running(copy, "--no-docker", TMPDIR="/etc/passwd") as it:
        assert it.invoke() == HELLO
        assert "passwd" not in it.output


@pytest.mark.usefixtures("installed_sample")
def test_while_another_run_prepares_itself_it_says_so_and_a_signal_ends_it(copy):
    with open(copy / ".run" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with running(copy, "--no-docker", wait=False) as it:
            said = f"{NAME}: waiting for another run to get ready\n"
            wait_until(lambda: said in it.output)
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
    options = as_user(evaluating)
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
    options = {"SCRIPT": f"{copy}/{NAME}.sh", "OPT": str(tmp_path / "opt"), "MOUNT": str(path)}
    script = PROGRAMS / "without_namespaces.sh"
    with running(copy, "--no-docker", script=script, **options) as it:
        assert "mount: permission denied\n" in it.output
        assert it.invoke() == HELLO
        wait_until(lambda: it.received)
        assert {*os.listdir(tmp_path / "opt")} == {"extensions", NAME}
        it.assert_signal_ends_it()
    assert not os.listdir(tmp_path / "opt")


@pytest.mark.usefixtures("installed_sample")
def test_with_the_tools_of_busybox_it_links_into_opt(copy, tmp_path):
    busybox = tool("busybox")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "opt").mkdir()
    run(busybox, "--install", "-s", tools)
    python = os.path.realpath(sys.executable)
    for name, path in ("bash", shutil.which("bash")), ("python3", python):
        (tools / name).unlink(missing_ok=True)
        (tools / name).symlink_to(path)
    options = {"SCRIPT": f"{copy}/{NAME}.sh", "OPT": str(tmp_path / "opt"), "TOOLS": str(tools)}
    script = PROGRAMS / "without_namespaces.sh"
    with running(copy, "--no-docker", script=script, **options) as it:
        assert "unrecognized option" in it.output
        assert it.invoke() == HELLO
        it.assert_signal_ends_it()
    assert not os.listdir(tmp_path / "opt")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run it for another user")
@pytest.mark.usefixtures("installed_sample")
def test_root_may_run_what_another_user_has_run_before(copy):
    os.chown(copy / ".run", 12345, 12345)
    with running(copy, "--no-docker") as it:
        assert it.invoke() == HELLO


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "before"),
    [
        ("requirements.txt", "simplejson=="),
        ("scripts/requirements-rie.txt", "aws-sam-cli=="),
        ("scripts/pip_install.py", '"""Installs'),
    ],
)
@pytest.mark.usefixtures("installed_sample")
def test_the_next_run_installs_again_after_an_edit_of_anything_that_decides(copy, file, before):
    after = f"# changed\n{before}"
    replace(copy / file, before, after, count=1)
    with running(copy, "--no-docker") as it:
        assert "installing" in it.output
        assert it.invoke() == HELLO


@pytest.mark.slow
@pytest.mark.usefixtures("installed_sample")
def test_the_next_run_installs_again_after_an_edit_of_the_pins(copy):
    with running(copy, "--no-docker") as it:
        assert "installing" not in it.output
    replace(copy / NAME / "requirements.txt", "requests==", "# changed\nrequests==")
    with running(copy, "--no-docker") as it:
        assert "installing" in it.output


@pytest.mark.usefixtures("installed_sample")
def test_the_dockerfiles_handler_sees_its_folder_and_opt_but_no_process_or_package_of_this_machine(
    evaluating,
):
    (evaluating / "lambda_function.py").rename(evaluating / "other.py")
    replace(
        evaluating / "Dockerfile",
        'CMD ["lambda_function.lambda_handler"]',
        'CMD [ "other.lambda_handler" ] ',
    )
    with running(evaluating, "--no-docker") as it:
        assert "template.yaml" in it.invoke({"do": "os.listdir()"})
        shown = it.invoke({"do": "os.listdir('/opt')"})
        assert {NAME, "extensions", *os.listdir("/opt")} <= {*shown}
        assert NAME in it.invoke({"do": "os.listdir('/opt/extensions')"})
        assert str(os.getpid()) not in it.invoke({"do": "os.listdir('/proc')"})
        assert it.invoke({"do": "__import__('pip')"})["errorType"] == "ModuleNotFoundError"


@pytest.mark.usefixtures("installed_sample")
def test_without_namespaces_it_links_into_opt_while_it_runs_and_replaces_only_dead_links(
    copy, tmp_path
):
    def linking(**options):
        options |= {"SCRIPT": f"{copy}/{NAME}.sh", "OPT": str(tmp_path)}
        return running(copy, "--no-docker", script=PROGRAMS / "without_namespaces.sh", **options)

    with linking() as it:
        said = "no namespaces here, see above: linking into /opt for the duration of the run"
        assert f"{NAME}: {said}\n" in it.output
        # As when the machine runs out of memory. First the program that would remove the links.
        processes = processes_of(copy)
        for pid in sorted(processes, key=lambda pid: "run_without_docker" not in processes[pid]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(copy))
        assert {*os.listdir(tmp_path)} == {"extensions", NAME}
    with linking() as it:
        assert it.invoke() == HELLO
        it.assert_signal_ends_it()
    wait_until(lambda: not os.listdir(tmp_path) and not processes_of(copy))
    (tmp_path / "extensions").mkdir()
    with linking(wait=False) as it:
        assert it.wait(60) == 1
        said = "cannot link into /opt; end the other run there, or use --docker, or run as root"
        assert f"{NAME}: {said}\n" in it.output
    assert os.listdir(tmp_path) == ["extensions"]
