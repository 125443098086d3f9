"""scripts/run_without_docker.py: what it installs, and how it shows /opt to a run."""

import os
import re
import shutil
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_lambda import ScriptedServer, hangs
from machine import PROGRAMS, processes_of, run, skip_except_on_ci, wait_until
from running import running
from sample import HELLO, NAME, copy_sample

IS_ROOT = os.geteuid() == 0
# What precedes a command to run it in a mount namespace of its own, as root of that namespace, or
# as an ordinary user.
IN_NAMESPACE = ["unshare", "--mount"] if IS_ROOT else ["unshare", "--mount", "--map-root-user"]
AS_USER = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"] if IS_ROOT else []
# What root's PATH names may be in root's home, which nobody else can enter.
USER_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"} if IS_ROOT else {}


@pytest.fixture
def fresh(folder):
    """A copy of the sample that has never been run."""
    return copy_sample(folder / uuid.uuid4().hex)


def owned_by_user(copy):
    """Gives a copy to the user of AS_USER, who may have another Python than these tests."""
    options = {"env": os.environ | USER_ENVIRONMENT, "cwd": "/"}
    if run(*AS_USER, "python3", "-m", "pip", "--version", **options).returncode != 0:
        skip_except_on_ci("an ordinary user has no Python with pip here")
    shutil.rmtree(copy / ".run", ignore_errors=True)
    for path in [copy, *copy.rglob("*")] if IS_ROOT else []:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    return copy


def script(copy):
    return copy / f"{NAME}.sh"


def running_without_mounts(copy, opt, **options):
    """Runs a copy as in a plain container, which refuses namespaces; the folder opt is its /opt."""
    command = [*IN_NAMESPACE, PROGRAMS / "without_namespaces.sh", script(copy)]
    return running(copy, "--no-docker", command=command, OPT=str(opt), **options)


@pytest.fixture
def installing(fresh):
    """A first run, while pip waits for an index."""
    with ScriptedServer({"": [hangs]}) as index:
        settings = {"PIP_INDEX_URL": f"http://{index.address}/"}
        with running(fresh, "--no-docker", wait=False, **settings) as process:
            wait_until(lambda: index.requests)
            yield process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_installation_leaves_nothing(fresh, installing, signum):
    assert installing.stop(signum) == 130
    wait_until(lambda: not processes_of(fresh), 10)
    assert os.listdir(fresh / ".run") == []


def test_a_killed_installation_ends_pip(fresh, installing):
    installing.kill()
    wait_until(lambda: not processes_of(fresh), 10)


@pytest.mark.slow
def test_two_first_runs_at_once_do_not_hurt_each_other(fresh):
    command = [*AS_USER, script(owned_by_user(fresh))]
    with (
        running(fresh, "--no-docker", wait=False, command=command, **USER_ENVIRONMENT) as one,
        running(fresh, "--no-docker", command=command, **USER_ENVIRONMENT) as other,
    ):
        one.wait_until_ready()
        for process in one, other:
            assert process.invoke() == HELLO
            process.assert_signal_ends_it()
    assert len([*fresh.glob(f".run/{NAME}-*")]) == 1
    assert not [*fresh.glob(".run/new.*")]


@pytest.mark.slow
def test_a_failing_pip_is_shown_and_leaves_nothing(fresh):
    lock_file = fresh / NAME / "requirements.txt"
    lock_file.write_text(re.sub("sha256:[0-9a-f]{8}", "sha256:00000000", lock_file.read_text()))
    with running(fresh, "--no-docker", wait=False) as process:
        assert process.wait(120) == 1
        assert "THESE PACKAGES DO NOT MATCH THE HASHES" in process.output
        assert f"{NAME}: pip failed; see above." in process.output
    assert os.listdir(fresh / ".run") == []


@pytest.mark.slow
def test_writes_nothing_outside_its_ignored_folder(fresh, tmp_path):
    """pip may be set up to install for the user, or in virtual environments alone."""

    def tree():
        paths = *fresh.rglob("*"), *tmp_path.rglob("*")
        return {path for path in paths if ".run" not in path.parts and ".cache" not in path.parts}

    before = tree()
    # pip asks rustc for its version, and rustup then writes its settings.
    folders = os.environ["PATH"].split(":")
    path = ":".join(each for each in folders if not os.path.exists(f"{each}/rustc"))
    settings = {"HOME": str(tmp_path), "PATH": path, "PIP_USER": "1", "PYTHONHOME": "/no"}
    settings |= {"PIP_REQUIRE_VIRTUALENV": "1", "TMPDIR": str(tmp_path)}
    with running(fresh, "--no-docker", **settings) as process:
        assert process.invoke() == HELLO
        assert not os.path.exists(f"/opt/{NAME}")
    assert tree() == before


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
def test_a_folder_of_another_user_fails_with_one_line(fresh):
    command = [*AS_USER, script(fresh)]
    with running(fresh, "--no-docker", wait=False, command=command, **USER_ENVIRONMENT) as process:
        assert process.wait(60) == 1
    assert process.output.startswith(f"{NAME}: cannot run here: [Errno 13] Permission denied: ")
    assert process.output.count("\n") == 1


@pytest.mark.usefixtures("installed_sample")
def test_runs_from_a_zip_file(copy):
    """Execute bits get lost there, and git on Windows may have changed the line endings."""
    for file in copy.rglob("*"):
        if file.is_file() and ".run" not in file.parts:
            file.chmod(0o644)
    for name in f"extensions/{NAME}", "lambda-entrypoint.sh":
        (copy / name).write_text((copy / name).read_text(), newline="\r\n")
    with running(copy, "--no-docker", command=["bash", script(copy)]) as process:
        assert process.invoke() == HELLO


@pytest.mark.usefixtures("installed_sample")
def test_a_killed_run_ends_its_processes_and_the_next_one_works(evaluating):
    """As when the machine runs out of memory: not even a busy function survives the emulator."""
    with ThreadPoolExecutor() as pool, running(evaluating, "--no-docker") as process:
        invoked = pool.submit(process.invoke, {"do": "time.sleep(60)"})
        wait_until(lambda: process.received)
        start = time.monotonic()
        process.kill()
        wait_until(lambda: not processes_of(evaluating))
        assert time.monotonic() - start < 30  # not the function's 60
        assert isinstance(invoked.exception(), OSError)
    with running(evaluating, "--no-docker", port=process.port) as process:
        assert process.invoke({"do": "1 + 1"}) == 2


@pytest.mark.usefixtures("installed_sample")
@pytest.mark.parametrize("user", [[], AS_USER], ids=["this user", "an ordinary user"])
def test_what_is_mounted_below_opt_stays_visible(evaluating, user):
    """Another extension of this machine stays out."""
    copy = owned_by_user(evaluating) if user else evaluating
    environment = USER_ENVIRONMENT if user else {}
    command = [*IN_NAMESPACE, PROGRAMS / "with_mount_below_opt.sh", *user, script(copy)]
    with running(copy, "--no-docker", command=command, **environment) as process:
        assert process.invoke({"do": "open('/opt/mounted/file').read()"}) == "mounted\n"
        assert {NAME, "extensions", "mounted"} <= {*process.invoke({"do": "os.listdir('/opt')"})}
        assert process.invoke({"do": "os.listdir('/opt/extensions')"}) == [NAME]
        assert "refuses a mount" not in process.output


@pytest.mark.usefixtures("installed_sample")
def test_links_into_opt_where_mounts_are_refused(copy, tmp_path):
    """The next run replaces the links."""
    for _ in range(2):
        with running_without_mounts(copy, tmp_path) as process:
            assert f"{NAME}: this machine refuses a mount of its own, see above: " in process.output
            assert process.invoke() == HELLO
            wait_until(lambda process=process: process.received)
            assert {*os.listdir(tmp_path)} == {"extensions", NAME}
            process.assert_signal_ends_it()


@pytest.mark.usefixtures("installed_sample")
@pytest.mark.parametrize("create", [Path.mkdir, lambda path: path.symlink_to("/usr")])
def test_replaces_nothing_else_in_opt(copy, tmp_path, create):
    """A folder, or a link that is not of an earlier run."""
    create(tmp_path / "extensions")
    with running_without_mounts(copy, tmp_path, wait=False) as process:
        assert process.wait(60) == 1
        assert process.output.endswith("; use --docker, or run as root\n")
    assert os.listdir(tmp_path) == ["extensions"]


@pytest.mark.usefixtures("installed_sample")
def test_installs_again_only_when_a_pin_changes(copy):
    with running(copy, "--no-docker") as process:
        assert "installing" not in process.output
    with (copy / NAME / "requirements.txt").open("a") as edited:
        edited.write("# changed\n")
    with running(copy, "--no-docker", wait=False) as process:
        wait_until(lambda: "installing the dependencies" in process.output)


@pytest.mark.usefixtures("installed_sample")
def test_the_function_sees_its_folder_and_only_its_packages(evaluating):
    with running(evaluating, "--no-docker") as process:
        assert "template.yaml" in process.invoke({"do": "os.listdir()"})
        assert process.invoke({"do": "__import__('pip')"})["errorType"] == "ModuleNotFoundError"


@pytest.mark.usefixtures("installed_sample")
def test_the_runtime_api_listens_on_loopback_only(evaluating):
    """Whoever reaches it can take invocations. -p is for the endpoint alone."""
    with running(evaluating, "--no-docker", host="127.0.0.2") as process:
        address = process.invoke({"do": "os.environ['AWS_LAMBDA_RUNTIME_API']"})
    assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
