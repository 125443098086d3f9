"""The Docker engine: base images, and the sample's image on each."""

import contextlib
import json
import os
import re

from installation import locked
from machine import ROOT, free_port, post, run, skip_except_on_ci, wait_until
from sample import HELLO, NAME, RECEIVED

DOCKERFILE = (ROOT / "Dockerfile").read_text()
DEFAULT_BASE_IMAGE = re.search("(?m)^ARG BASE_IMAGE=(.*)$", DOCKERFILE).group(1)
BASE_IMAGE = os.environ.get("BASE_IMAGE", DEFAULT_BASE_IMAGE)
# On CI there is more than one, such as "debian:bookworm debian:trixie".
BASE_IMAGES = os.environ.get("BASE_IMAGES", BASE_IMAGE).split()
TEST_IMAGE = f"sample-test-{os.getpid()}"  # the name of the images that this process builds


def pulled(image):
    """The image's name, after pulling the image if necessary."""
    is_here = run("docker", "image", "inspect", image).returncode == 0
    if not is_here and run("docker", "pull", image).returncode != 0:
        skip_except_on_ci(f"no base image {image}")
    return image


def first_base_image():
    """The base image for tests that need only one."""
    return pulled(BASE_IMAGES[0])


def build(folder, tag, base_image, *options, name=TEST_IMAGE, lock="docker"):
    """Builds the image NAME:TAG with the engine's own builder, and returns that name.

    Builds with the same lock wait for each other: what one has built, the others find in the
    engine's cache.
    """
    image = f"{name}:{tag}"
    argument = f"--build-arg=BASE_IMAGE={base_image}"
    with locked(lock):
        built = run("docker", "build", "--tag", image, argument, *options, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return image


def assert_runs(image, *options, extension=NAME):
    """Asserts that a container answers, and that the extension logs the event."""
    port = free_port()
    start = "docker", "run", "--rm", "--detach", f"--publish=127.0.0.1:{port}:8080"
    name = run(*start, *options, image).stdout.strip()
    url = f"http://127.0.0.1:{port}/2015-03-31/functions/function/invocations"

    def invoke():
        with contextlib.suppress(OSError):
            return post(url, timeout=60)

    try:
        assert json.loads(wait_until(invoke)) == HELLO
        wait_until(lambda: f"[{extension}] {RECEIVED}" in run("docker", "logs", name).stdout)
    finally:
        run("docker", "kill", name)


def assert_confined_as_on_lambda(inspected, memory_mb=256):
    """Asserts that a container, as `docker inspect` shows it, has the limits that Lambda sets."""
    host = inspected["HostConfig"]
    assert inspected["Config"]["User"] == "60999:60999"
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"]
    assert host["Tmpfs"] == {"/tmp": "exec,size=512m"}
    assert host["IpcMode"] == "none"
    assert host["Memory"] == memory_mb * 1024 * 1024
    assert host["PidsLimit"] == 1024
    assert host["Ulimits"] == [{"Name": "nofile", "Hard": 1024, "Soft": 1024}]
