"""Interrupted and failed first runs without Docker: the next run recovers."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import HELLO, NAME, copy_sample, free_port, need_namespaces, run, running, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux"),
]


@pytest.fixture
def fresh(folder, request):
    """A copy of the sample that was never run."""
    need_namespaces()
    return copy_sample(folder / request.node.name)


def start(fresh, *prefix, **environment):
    return subprocess.Popen(
        [*prefix, fresh / f"{NAME}.sh", "--no-docker", "-p", str(free_port())],
        env=os.environ | environment,
        cwd=fresh,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def says_hello(fresh):
    """Asserts that the next run works; returns its output."""
    with running(fresh, "--no-docker") as started:
        assert json.loads(started.invoke()) == HELLO
        return started.output


def half_made(fresh):
    """What an installation has left in .run besides complete sets of dependencies."""
    return [path for path in fresh.glob(".run/*") if not (path / "aws-lambda-rie").exists()]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.2, 1.5])
def test_an_interrupted_installation_does_not_disturb_the_next_run(fresh, signum, seconds):
    process = start(fresh)
    wait_until(lambda: list(fresh.glob(".run/run.*")))
    time.sleep(seconds)
    os.killpg(process.pid, signum)
    assert "ready" not in process.communicate(timeout=60)[0]
    says_hello(fresh)
    if signum != signal.SIGKILL:  # after which nobody could clean up
        assert not half_made(fresh)


def test_two_first_runs_at_once_both_work(fresh):
    with running(fresh, "--no-docker", wait=False) as one, running(fresh, "--no-docker") as other:
        one.wait_until_ready()
        assert "installing" in one.output
        assert "installing" in other.output
        assert json.loads(one.invoke()) == json.loads(other.invoke()) == HELLO
    says_hello(fresh)
    assert len(list(fresh.glob(".run/*"))) == 1


def test_without_network_it_fails_with_one_line_and_the_next_run_works(fresh):
    nowhere = "http://127.0.0.1:1/simple"
    process = start(fresh, PIP_INDEX_URL=nowhere, PIP_EXTRA_INDEX_URL=nowhere, PIP_CONFIG_FILE=os.devnull)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "pip cannot reach its package index" in output.splitlines()[-1]
    assert not half_made(fresh)
    says_hello(fresh)


def test_on_a_full_disk_it_fails_with_one_line_and_the_next_run_works(fresh):
    (fresh / ".run").mkdir()
    full = 'mount -t tmpfs -o size=2m none .run && exec "$@"'
    for options in [], ["--map-root-user"]:
        prefix = ["unshare", "--mount", *options, "sh", "-c", full, "sh"]
        if run(*prefix, "true", cwd=fresh).returncode == 0:
            break
    else:
        pytest.skip("this user cannot mount a small file system on this machine")
    process = start(fresh, *prefix)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "No space left on device" in output.splitlines()[-1]
    says_hello(fresh)


def test_changed_requirements_are_noticed(fresh):
    says_hello(fresh)
    assert "installing" not in says_hello(fresh)
    with (fresh / NAME / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert "installing" in says_hello(fresh)
