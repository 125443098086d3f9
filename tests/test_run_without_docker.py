"""The run script without Docker.

What it installs, how it recovers, and how it isolates a run, or links into /opt.
"""

import os
import signal
import time
import uuid

import pytest
from machine import PROGRAMS, processes_of, wait_until
from running import running
from sample import HELLO, NAME, copy_sample, replace


@pytest.fixture
def fresh(folder):
    """A copy of the sample that was never run."""
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
        wait_until(lambda: not processes_of(fresh), 2)
    with running(fresh, "--no-docker") as it:
        assert it.invoke() == HELLO
    assert len(list(fresh.glob(".run/*"))) == 1


@pytest.mark.slow
def test_of_two_first_runs_of_an_ordinary_user_at_once_one_installs_for_both(fresh):
    options = {}
    if os.geteuid() == 0:
        options = {"user": 12345, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"}
        for path in [fresh, *fresh.rglob("*")]:
            os.chown(path, 12345, 12345)
    with (
        running(fresh, "--no-docker", wait=False, **options) as one,
        running(fresh, "--no-docker", **options) as other,
    ):
        one.wait_until_ready()
        assert (one.output + other.output).count("installing the dependencies") == 1
        for it in one, other:
            assert it.invoke() == HELLO
            it.ends_cleanly()
    assert not processes_of(fresh)
    assert len(list(fresh.glob(".run/*"))) == 1


@pytest.mark.slow
def test_when_pip_fails_its_words_stand_and_nothing_is_left(fresh):
    replace(fresh / NAME / "requirements.txt", "--hash=", "# ")
    with running(fresh, "--no-docker", wait=False) as it:
        assert it.wait(120) == 1
        assert "Hashes are required in --require-hashes mode" in it.output
        assert it.output.endswith(f"{NAME}: pip failed; see its words above\n")
    assert not list(fresh.glob(".run/*"))


@pytest.mark.slow
def test_writes_nothing_outside_its_ignored_folder_whatever_the_settings_of_pip(fresh, tmp_path):
    def tree():
        paths = *fresh.rglob("*"), *tmp_path.rglob("*")
        return {path for path in paths if ".run" not in path.parts}

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
    }
    with running(fresh, "--no-docker", TMPDIR=str(tmp_path), PYTHONHOME="/no", **environment) as it:
        assert it.invoke() == HELLO
        assert not os.path.exists(f"/opt/{NAME}")
        assert (fresh / ".run").stat().st_mode & 0o777 == 0o700
    assert tree() == before


@pytest.mark.slow
@pytest.mark.usefixtures("installed_sample")
def test_the_next_run_installs_again_after_an_edit_of_the_pins(copy):
    with running(copy, "--no-docker") as it:
        assert "installing" not in it.output
    replace(copy / NAME / "requirements.txt", "requests==", "# changed\nrequests==")
    with running(copy, "--no-docker") as it:
        assert "installing" in it.output


@pytest.mark.usefixtures("installed_sample")
def test_the_dockerfiles_function_sees_its_folder_and_opt_but_no_process_or_package_of_this_machine(
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
        said = f"{NAME}: no namespaces here: linking into /opt for the duration of the run\n"
        assert said in it.output
        os.killpg(it.pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(copy))
        assert {*os.listdir(tmp_path)} == {"extensions", NAME}
    with linking() as it:
        assert it.invoke() == HELLO
        it.ends_cleanly()
    assert not os.listdir(tmp_path) and not processes_of(copy)
    (tmp_path / "extensions").mkdir()
    with linking(wait=False) as it:
        assert it.wait(60) == 1
        said = "cannot link into /opt; end the run that uses it, or use --docker, or root"
        assert f"{NAME}: {said}\n" in it.output
    assert os.listdir(tmp_path) == ["extensions"]
