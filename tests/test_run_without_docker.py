"""The run script without Docker: what it installs, how it recovers, and how it isolates a run."""

import json
import os
import re
import signal
import sys
import time
import uuid

import pytest
from helpers import (
    HELLO,
    NAME,
    RECEIVED,
    copy_misbehaving_sample,
    copy_sample,
    need_namespaces,
    processes_of,
    remove_hashes,
    running,
    wait_until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux")


@pytest.fixture
def fresh(folder):
    """A copy of the sample that was never run."""
    need_namespaces()
    return copy_sample(folder / uuid.uuid4().hex)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.2, 1.5])
def test_an_interrupted_installation_leaves_nothing_running_and_the_next_run_works(fresh, signum, seconds):
    with running(fresh, "--no-docker", wait=False) as started:
        wait_until(lambda: list(fresh.glob(".run/run.*")))
        time.sleep(seconds)
        started.stop(signum)
        wait_until(lambda: not processes_of(fresh), 2)
    with running(fresh, "--no-docker") as started:
        assert json.loads(started.invoke()) == HELLO
    assert len(list(fresh.glob(".run/*"))) == 1


@pytest.mark.slow
def test_of_two_first_runs_of_an_ordinary_user_at_once_one_installs_for_both(fresh):
    options = {}
    if os.geteuid() == 0:
        options = {"user": 12345, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"}
        for path in [fresh, *fresh.rglob("*")]:
            os.chown(path, 12345, 12345)
    with running(fresh, "--no-docker", wait=False, **options) as one, running(fresh, "--no-docker", **options) as other:
        one.wait_until_ready()
        assert (one.output + other.output).count("installing the dependencies") == 1
        for started in one, other:
            with started.receives():
                assert json.loads(started.invoke()) == HELLO
            assert started.stop()[0] == 0
    assert not processes_of(fresh)
    assert len(list(fresh.glob(".run/*"))) == 1


NO_INDEX = {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (NO_INDEX | {"PIP_INDEX_URL": "http://127.0.0.1:1/simple"}, "Connection refused"),
        ({}, "Hashes are required in --require-hashes mode"),
    ],
)
def test_when_pip_fails_its_words_stand_and_nothing_is_left(fresh, environment, words):
    if not environment:
        remove_hashes(fresh / NAME / "requirements.txt")
    with running(fresh, "--no-docker", wait=False, **environment) as started:
        assert started.process.wait(120) == 1
        assert words in started.output
        assert started.output.endswith(f"{NAME}: pip failed; see its words above\n")
    assert not list(fresh.glob(".run/*"))


@pytest.mark.slow
def test_writes_nothing_outside_its_ignored_folder_whatever_the_settings_of_pip(fresh, tmp_path):
    def tree():
        return {path for folder in (fresh, tmp_path) for path in folder.rglob("*") if ".run" not in path.parts}

    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    before = tree()
    settings = {"PREFIX": f"{tmp_path}/prefix", "TARGET": f"{tmp_path}/target", "USER": "1", "REQUIRE_VIRTUALENV": "1"}
    environment = {f"PIP_{name}": value for name, value in settings.items()}
    environment |= {"HOME": f"{tmp_path}/home", "TMPDIR": f"{tmp_path}/tmp", "PIP_NO_BINARY": ":all:"}
    # pip asks rustc for its version, and rustup then writes its settings.
    path = ":".join(folder for folder in os.environ["PATH"].split(":") if not os.path.exists(f"{folder}/rustc"))
    with running(fresh, "--no-docker", PATH=path, **environment) as started:
        assert json.loads(started.invoke()) == HELLO
        assert not os.path.exists(f"/opt/{NAME}")
        assert (fresh / ".run").stat().st_mode & 0o777 == 0o700
    assert tree() == before


@pytest.mark.slow
@pytest.mark.usefixtures("installed_sample")
def test_the_next_run_has_each_edit_and_installs_again_after_one_of_the_pins(copy):
    function, extension = copy / "lambda_function.py", copy / NAME / "extension.py"
    function.write_text(function.read_text().replace("Hello from", "Good morning from"))
    extension.write_text(extension.read_text().replace(RECEIVED, "Saw event"))
    with running(copy, "--no-docker") as started:
        assert "installing" not in started.output
        assert json.loads(started.invoke())["body"] == '"Good morning from Lambda!"'
        wait_until(lambda: "Saw event" in started.output)
    with (copy / NAME / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    with running(copy, "--no-docker") as started:
        assert "installing" in started.output


def test_the_dockerfiles_function_sees_its_folder_and_opt_but_no_process_or_package_of_this_machine(
    installed_sample, folder
):
    copy = copy_misbehaving_sample(folder / uuid.uuid4().hex, installed_sample)
    (copy / "lambda_function.py").rename(copy / "other.py")
    dockerfile = (copy / "Dockerfile").read_text()
    (copy / "Dockerfile").write_text(re.sub("(?m)^CMD .*", 'CMD [ "other.lambda_handler" ] ', dockerfile))
    with running(copy, "--no-docker") as started:

        def listing(path):
            return json.loads(started.invoke(json.dumps({"list": path}).encode()))

        assert "template.yaml" in listing(".")
        assert {NAME, "extensions", *os.listdir("/opt")} <= {*listing("/opt")}
        assert NAME in listing("/opt/extensions")
        assert str(os.getpid()) not in listing("/proc")
        assert json.loads(started.invoke(b'{"import": "pip"}'))["errorType"] == "ModuleNotFoundError"
