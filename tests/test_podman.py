"""The sample where docker is podman, as Debian's podman-docker makes it, for a user without root."""

import os
import pwd
import re
import shutil
from pathlib import Path

import pytest
from engine import first_base_image
from machine import missing, run, tool
from running import running
from sample import HELLO, NAME, copy_sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(folder, engine):
    """The options of running() for a user whose docker is podman, with a copy of the sample in HOME."""
    if os.geteuid() != 0:
        pytest.skip("this needs root, to become another user")
    ranges = Path("/etc/subuid").read_text() if Path("/etc/subuid").exists() else ""
    users = [name for name in re.findall(r"(?m)^([^:]+):", ranges) if name != "root"]
    user = pwd.getpwnam(users[0]).pw_uid if users else missing("no user with a range in /etc/subuid")
    home = folder / "podman"
    copy_sample(home / "sample")
    (home / "bin").mkdir()
    (home / "bin" / "docker").symlink_to(tool("podman"))
    assert run("docker", "save", "--output", home / "base.tar", first_base_image()).returncode == 0
    for path in [home, *home.rglob("*")]:
        shutil.chown(path, user, user)
    environment = {"PATH": f"{home}/bin:{os.environ['PATH']}", "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}

    def podman(*arguments):
        identity = {"user": user, "group": user, "extra_groups": []}
        return run("podman", *arguments, cwd="/", env=os.environ | environment, **identity)

    loaded = podman("load", "--input", home / "base.tar")
    assert loaded.returncode == 0, loaded.stderr
    yield {"user": user, "BASE_IMAGE": f"localhost/{first_base_image()}"} | environment
    left = podman("ps", "--all", "--quiet").stdout
    podman("system", "reset", "--force")
    assert left == ""


def test_podman_runs_the_sample(options):
    with running(Path(options["HOME"], "sample"), "--docker", **options) as it:
        assert it.invoke() == HELLO
        it.ends_cleanly()


def test_podman_runs_the_daemon_with_a_broker_of_this_machine_and_without_its_proxies(options, stand_in):
    environment = options | {"LAMBDA_RUNTIME_API_DAEMON": stand_in, "no_proxy": "any"}
    with running(Path(options["HOME"], "sample"), "--docker", **environment) as it:
        environ = it.invoke(function=NAME)["environ"]
    assert environ["AMQP_URI"].startswith("amqp://host.containers.internal:5672")
    assert "no_proxy" not in environ
