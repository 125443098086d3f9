"""Running without Docker where namespaces are refused, as in a plain container: by links into /opt."""

import json
import os
import signal
import sys

import pytest
from helpers import HELLO, NAME, ROOT, processes_of, running, wait_until

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux")
pytestmark = [on_linux, pytest.mark.usefixtures("installed_sample")]


@pytest.fixture
def opt(tmp_path):
    """The folder that such a run takes for /opt."""
    (tmp_path / "opt").mkdir()
    return tmp_path / "opt"


def running_there(sample, opt, **options):
    script = ROOT / "tests" / "without_namespaces.sh"
    return running(sample, "--no-docker", script=script, SCRIPT=f"{sample}/{NAME}.sh", OPT=str(opt), **options)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_it_links_into_opt_for_the_duration_of_the_run_and_replaces_the_links_of_a_killed_one(copy, opt):
    with running_there(copy, opt) as started:
        assert f"{NAME}: no namespaces here: linking into /opt for the duration of the run\n" in started.output
        os.killpg(started.process.pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(copy))
        assert names(opt) == {"extensions", NAME}
    with running_there(copy, opt) as started:
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
        assert names(opt) == {"extensions", NAME}
        assert started.stop()[0] == 0
        assert '"eventType": "SHUTDOWN"' in started.output
    assert names(opt) == set()
    assert not processes_of(copy)


def test_it_does_not_replace_what_is_in_opt(copy, opt):
    (opt / "extensions").mkdir()
    with running_there(copy, opt, wait=False) as started:
        assert started.process.wait(60) == 1
        advice = "end the run that uses it, or use --docker, or root"
        assert started.output.endswith(f"{NAME}: cannot link into /opt; {advice}\n")
    assert names(opt) == {"extensions"}
