"""The sample where docker is podman, as Debian's podman-docker makes it: rootless, unless root runs the tests."""

import os

import pytest
from engine import first_base_image
from machine import run, tool
from running import running
from sample import HELLO, NAME

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(folder, engine):
    """The environment of running() where docker is podman."""
    (folder / "podman").mkdir()
    (folder / "podman" / "docker").symlink_to(tool("podman"))
    assert run("sh", "-c", f"docker save {first_base_image()} | podman load").returncode == 0
    return {"PATH": f"{folder}/podman:{os.environ['PATH']}", "BASE_IMAGE": f"localhost/{first_base_image()}"}


def test_podman_runs_the_sample_and_removes_its_container(options, sample):
    with running(sample, "--docker", **options) as it:
        assert it.invoke() == HELLO
        it.ends_cleanly()
    assert run("podman", "ps", "--all", "--quiet").stdout == ""


def test_podman_runs_the_daemon_with_a_broker_of_this_machine_and_without_its_proxies(options, sample, stand_in):
    with running(sample, "--docker", LAMBDA_RUNTIME_API_DAEMON=stand_in, no_proxy="any", **options) as it:
        environ = it.invoke(function=NAME)["environ"]
    assert environ["AMQP_URI"].startswith("amqp://host.containers.internal:5672")
    assert "no_proxy" not in environ
