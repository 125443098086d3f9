"""The sample where docker is podman, as Debian's podman-docker makes it, with root and without."""

import json
import os
import pwd
import re
import shutil
from pathlib import Path

import pytest
from helpers import (
    HELLO,
    NAME,
    copy_sample,
    first_base_image,
    missing,
    real_daemon,
    run,
    running,
    tool,
    wait_until,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def docker(folder):
    """A folder for PATH in which docker is podman."""
    path = folder / "podman"
    path.mkdir()
    (path / "docker").write_text(f'#!/bin/sh\nexec {tool("podman")} "$@"\n')
    (path / "docker").chmod(0o755)
    return path


def rootless_user():
    """The first user of this machine who may run containers without root."""
    ranges = Path("/etc/subuid").read_text() if Path("/etc/subuid").exists() else ""
    for user in re.findall(r"^([^:]+):", ranges, re.MULTILINE):
        if user != "root":
            return pwd.getpwnam(user)
    return missing("no user with a range in /etc/subuid")


@pytest.fixture(scope="module", params=["with root", "rootless"])
def podman(request, folder, docker, engine):
    """The sample, its owner's options for running it with podman, and a function that runs a podman command as them."""
    if os.geteuid() != 0:
        pytest.skip("this needs root, to become another user")
    home = folder / request.param
    sample = copy_sample(home / "sample")
    options, environment = {}, {"PATH": f"{docker}:{os.environ['PATH']}", "HOME": str(home)}
    if request.param == "rootless":
        user = rootless_user()
        for path in [home, *home.rglob("*")]:
            os.chown(path, user.pw_uid, user.pw_gid)
        options = {"user": user.pw_uid}
        environment["XDG_RUNTIME_DIR"] = str(home)

    def command(*arguments):
        identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if options else {}
        return run("docker", *arguments, cwd="/", env=os.environ | environment, **identity)

    archive = home / "base.tar"
    assert run(shutil.which("docker"), "save", "--output", archive, first_base_image()).returncode == 0
    archive.chmod(0o644)
    loaded = command("load", "--input", archive)
    assert loaded.returncode == 0, loaded.stderr
    archive.unlink()
    yield sample, options | environment | {"BASE_IMAGE": f"localhost/{first_base_image()}"}, command
    if options:
        command("system", "reset", "--force")
    else:
        command("rmi", "--force", NAME)


def test_podman_runs_the_sample_read_only_and_without_capabilities(podman):
    sample, options, command = podman
    with running(sample, "--docker", **options) as started:
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
        container = command("ps", "--quiet").stdout.strip()
        assert re.search(r"^CapEff:\s+0+$", command("exec", container, "cat", "/proc/1/status").stdout, re.MULTILINE)
        assert command("exec", container, "touch", "/var/task/file").returncode != 0
        assert started.stop()[0] == 0
        assert '"eventType": "SHUTDOWN"' in started.output
    assert command("ps", "--all", "--quiet").stdout == ""


def test_podman_runs_managed_instances(podman):
    sample, options, _ = podman
    with running(sample, "--docker", AWS_LAMBDA_MAX_CONCURRENCY="2", **options) as started:
        assert json.loads(started.invoke(**{"Content-Type": "application/json"})) == HELLO


def test_podman_runs_the_daemon(podman):
    sample, options, _ = podman
    daemon = real_daemon()
    with running(sample, "--docker", LAMBDA_RUNTIME_API_DAEMON=daemon, **options) as started:
        assert json.loads(started.invoke(function=NAME)) == HELLO
        wait_until(lambda: "AMQP Connection Opening" in started.output)
