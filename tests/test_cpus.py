"""The image on arm64, emulated if necessary, and on an unknown CPU."""

import json
import os

import pytest
from helpers import (
    BASE_IMAGES,
    HELLO,
    NAME,
    RECEIVED,
    TEST_IMAGE,
    available,
    container,
    docker_with,
    first_base_image,
    missing,
    run,
)

ARM64_BASE_IMAGE = os.environ.get("ARM64_BASE_IMAGE", f"arm64v8/{BASE_IMAGES[0]}")
ON_ARM64 = "--platform", "linux/arm64"


@pytest.fixture(scope="module")
def arm64_base_image(engine):
    if run("docker", "image", "inspect", ARM64_BASE_IMAGE).returncode != 0:
        run("docker", "pull", *ON_ARM64, ARM64_BASE_IMAGE)
    if run("docker", "run", "--rm", *ON_ARM64, available(ARM64_BASE_IMAGE), "uname", "-m").stdout != "aarch64\n":
        missing("no emulation of arm64")
    return ARM64_BASE_IMAGE


@pytest.mark.slow
@pytest.mark.parametrize("buildkit", ["0", "1"], ids=["classic builder", "BuildKit"])
def test_the_image_builds_and_runs_on_arm64(sample, arm64_base_image, buildkit):
    tag = f"{TEST_IMAGE}:arm64-{buildkit}"
    options = "--tag", tag, *ON_ARM64, "--build-arg", f"BASE_IMAGE={arm64_base_image}"
    built = docker_with(buildkit, "build", *options, sample)
    assert built.returncode == 0, built.stderr
    with container(tag, *ON_ARM64) as (name, answer):
        assert json.loads(answer) == HELLO
        assert run("docker", "exec", name, "uname", "-m").stdout == "aarch64\n"
        log = run("docker", "logs", name).stdout
    assert f'[{NAME}] {RECEIVED}: {{"eventType": "INVOKE"' in log


def test_the_build_fails_with_one_line_on_an_unknown_cpu(folder, engine, sample):
    base = folder / "riscv64"
    base.mkdir()
    (base / "uname").write_text("#!/bin/sh\necho riscv64\n")
    (base / "Dockerfile").write_text(
        f"FROM {first_base_image()}\nCOPY uname /usr/local/bin/\nRUN chmod 755 /usr/local/bin/uname\n"
    )
    tag = f"{TEST_IMAGE}:riscv64"
    assert run("docker", "build", "--tag", tag, base).returncode == 0
    built = run("docker", "build", "--build-arg", f"BASE_IMAGE={tag}", sample)
    assert built.returncode != 0
    assert "there is no emulator for the CPU riscv64" in built.stdout + built.stderr
    assert run("docker", "build", "--target", "lambda", "--build-arg", f"BASE_IMAGE={tag}", sample).returncode == 0
