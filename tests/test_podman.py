"""The sample where docker is podman, as Debian's podman-docker makes it, for a user without root."""

import json
import os
import pwd
import re
import shutil
from pathlib import Path

import pytest
from helpers import HELLO, NAME, copy_sample, first_base_image, missing, run, running, tool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def podman(folder, engine):
    """A user's sample, the options for running it with podman, and a function that runs podman as that user."""
    if os.geteuid() != 0:
        pytest.skip("this needs root, to become another user")
    ranges = Path("/etc/subuid").read_text() if Path("/etc/subuid").exists() else ""
    users = [name for name in re.findall(r"^([^:]+):", ranges, re.MULTILINE) if name != "root"]
    user = pwd.getpwnam(users[0]).pw_uid if users else missing("no user with a range in /etc/subuid")
    home = folder / "podman"
    sample = copy_sample(home / "sample")
    (home / "bin").mkdir()
    (home / "bin" / "docker").symlink_to(tool("podman"))
    archive = home / "base.tar"
    assert run("docker", "save", "--output", archive, first_base_image()).returncode == 0
    for path in [home, *home.rglob("*")]:
        shutil.chown(path, user, user)
    environment = {"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}

    def podman(*arguments):
        identity = {"user": user, "group": user, "extra_groups": []}
        return run("podman", *arguments, cwd="/", env=os.environ | environment, **identity)

    loaded = podman("load", "--input", archive)
    assert loaded.returncode == 0, loaded.stderr
    archive.unlink()
    yield sample, {"user": user, "BASE_IMAGE": f"localhost/{first_base_image()}"} | environment, podman
    podman("system", "reset", "--force")


def test_podman_runs_the_sample_and_removes_its_container(podman):
    sample, options, command = podman
    with running(sample, "--docker", **options) as started:
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
        assert started.stop()[0] == 0
        assert '"eventType": "SHUTDOWN"' in started.output
    assert command("ps", "--all", "--quiet").stdout == ""


def test_podman_runs_the_daemon_with_a_broker_of_this_machine_and_without_its_proxies(podman, stand_in):
    sample, options, _ = podman
    with running(sample, "--docker", LAMBDA_RUNTIME_API_DAEMON=stand_in, no_proxy="any", **options) as started:
        environ = json.loads(started.invoke(function=NAME))["environ"]
    assert environ["AMQP_URI"].startswith("amqp://host.containers.internal:5672")
    assert "no_proxy" not in environ
