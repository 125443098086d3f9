"""examples/kubernetes.yaml: valid, and run by podman, which plays manifests."""

import contextlib
import json
import re
import shutil
import subprocess

import pytest
from helpers import (
    AMQP_PASSWORD,
    AMQP_USERNAME,
    HELLO,
    NAME,
    ROOT,
    amqp_invoke,
    docker_gateway,
    docker_with,
    first_base_image,
    free_port,
    real_daemon,
    run,
    tool,
    wait_until,
)

MANIFEST = ROOT / "examples" / "kubernetes.yaml"


@pytest.mark.slow
def test_the_manifest_is_valid():
    validated = run(tool("kubernetes-validate"), "--strict", MANIFEST)
    assert validated.returncode == 0, validated.stdout + validated.stderr


def build_images(podman, sample, folder):
    """Makes the two images that the manifest names, and loads them into podman."""
    function, daemon = (image for image in re.findall(r"image: (\S+)", MANIFEST.read_text())[::-1])
    shutil.copy(real_daemon(), folder / "lambda-runtime-api-daemon")
    (folder / "Dockerfile").write_text(
        'FROM scratch\nCOPY lambda-runtime-api-daemon /\nENTRYPOINT ["/lambda-runtime-api-daemon"]\n'
    )
    base = f"BASE_IMAGE={first_base_image()}"
    for image, arguments in (function, ["--build-arg", base, sample]), (daemon, [folder]):
        built = docker_with("0", "build", "--tag", image, *arguments)
        assert built.returncode == 0, built.stderr
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            subprocess.run([podman, "load"], stdin=saved.stdout, check=True, stdout=subprocess.DEVNULL)
    return function, daemon


@pytest.mark.slow
def test_podman_plays_the_manifest_and_the_function_answers_through_rabbitmq(sample, engine, rabbitmq, tmp_path):
    podman = tool("podman")
    version = int(re.search(r"version (\d+)", run(podman, "--version").stdout).group(1))
    if version < 5:
        pytest.skip(f"podman {version} plays no such manifest")
    images = build_images(podman, sample, tmp_path)
    (host,) = docker_gateway()
    credentials = json.dumps({"username": AMQP_USERNAME, "password": AMQP_PASSWORD})
    secret = f"---\napiVersion: v1\nkind: Secret\nmetadata: {{name: rabbitmq}}\nstringData: {credentials}\n"
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(secret + "---\n" + MANIFEST.read_text().replace("rabbitmq:5672", f"{host}:{rabbitmq}"))
    port = free_port()
    try:
        played = run(podman, "kube", "play", "--publish", f"127.0.0.1:{port}:8080", manifest)
        assert played.returncode == 0, played.stderr
        wait_until(lambda: amqp_invoke(rabbitmq, NAME).returncode == 0, 60)
        assert json.loads(amqp_invoke(rabbitmq, NAME, '{"key": "value"}').stdout) == HELLO
        curl = f"http://127.0.0.1:{port}/2015-03-31/functions/{NAME}/invocations"
        assert json.loads(run(tool("curl"), "-s", "-XPOST", curl, "-d", "{}").stdout) == HELLO
    finally:
        with contextlib.suppress(OSError):
            print(run(podman, "pod", "logs", f"{NAME}-pod").stdout)
        run(podman, "kube", "down", "--force", manifest)
        run(podman, "rmi", "--force", *images)
        run("docker", "rmi", "--force", *images)
