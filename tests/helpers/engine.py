"""The Docker engine: base images, and the sample's image on each."""

import os
import re

import pytest
from machine import ROOT, missing, run, tool

DEFAULT_BASE_IMAGE = re.search("(?m)^ARG BASE_IMAGE=(.*)$", (ROOT / "Dockerfile").read_text()).group(1)
# On CI more than one, such as "debian:bookworm debian:trixie".
BASE_IMAGES = os.environ.get("BASE_IMAGES", os.environ.get("BASE_IMAGE", DEFAULT_BASE_IMAGE)).split()
TEST_IMAGE = f"sample-test-{os.getpid()}"  # the name of the images that this process builds


def pulled(image):
    """The image's name, after pulling the image if necessary."""
    if run("docker", "image", "inspect", image).returncode != 0 and run("docker", "pull", image).returncode != 0:
        missing(f"no base image {image}")
    return image


def first_base_image():
    """The base image for tests that need only one."""
    return pulled(BASE_IMAGES[0])


def build(folder, tag, base_image, *options):
    """Builds an image with the engine's own builder, and returns its name."""
    name = tag if ":" in tag else f"{TEST_IMAGE}:{tag}"
    built = run("docker", "build", "--tag", name, "--build-arg", f"BASE_IMAGE={base_image}", *options, folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return name


@pytest.fixture(scope="session")
def engine():
    """Skips the test unless a Docker engine answers."""
    if run(tool("docker"), "version").returncode != 0:
        missing("no Docker engine on this machine")
    yield
    images = run("docker", "images", "--format", "{{.Repository}}:{{.Tag}}", TEST_IMAGE).stdout.split()
    run("docker", "image", "rm", "--force", *images)


@pytest.fixture(scope="session", params=BASE_IMAGES)
def base_image(request, engine):
    """The name of a base image, pulled if necessary."""
    return pulled(request.param)


@pytest.fixture(scope="session")
def image(sample, base_image):
    """The image, built on that base."""
    return build(sample, re.sub(r"\W", "-", base_image), base_image)
