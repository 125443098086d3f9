"""examples/compose.yaml and kubernetes.yaml, with the real Compose, podman and Daemon, and images made here."""

import json
import os
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
    build,
    docker_gateway,
    first_base_image,
    free_port,
    real_daemon,
    run,
    tool,
    wait_until,
)

pytestmark = pytest.mark.slow
COMPOSE, MANIFEST = ROOT / "examples" / "compose.yaml", ROOT / "examples" / "kubernetes.yaml"
# For machines that cannot pull the image. As in it, the server runs as user rabbitmq, and health checks as root.
RABBITMQ = """FROM {}
RUN apt-get update && apt-get install -y --no-install-recommends rabbitmq-server
ENV HOME=/var/lib/rabbitmq
ENTRYPOINT ["setpriv", "--reuid=rabbitmq", "--regid=rabbitmq", "--init-groups", "/usr/lib/rabbitmq/bin/rabbitmq-server"]
"""


def function_answers(port, broker_port):
    """Asserts that the function answers through RabbitMQ and over HTTP."""
    event = '{"key": "value"}'
    assert json.loads(wait_until(lambda: amqp_invoke(broker_port, NAME, event).stdout, 60)) == HELLO
    url = f"http://127.0.0.1:{port}/2015-03-31/functions/{NAME}/invocations"
    assert json.loads(run(tool("curl"), "-s", "-XPOST", url, "-d", event).stdout) == HELLO


def test_compose_starts_broker_daemon_and_function(engine, tmp_path):
    environment = os.environ | {"LAMBDA_RUNTIME_API_DAEMON": real_daemon(), "AMQP_PASSWORD": AMQP_PASSWORD}
    environment |= {"BASE_IMAGE": first_base_image(), "COMPOSE_PROJECT_NAME": f"{NAME}-test", "DOCKER_BUILDKIT": "0"}
    plugin = run("docker", "compose", "version").returncode == 0
    compose = [*(["docker", "compose"] if plugin else [tool("docker-compose")]), "--file", COMPOSE]
    (broker,) = re.findall(r"image: (\S+)", COMPOSE.read_text())
    stand_in = all(run("docker", *command, broker).returncode != 0 for command in (["image", "inspect"], ["pull"]))
    if stand_in:
        (tmp_path / "Dockerfile").write_text(RABBITMQ.format(first_base_image()))
        build(tmp_path, broker, first_base_image())
    try:
        up = run(*compose, "up", "--build", "--detach", env=environment)  # docker-compose 1 has no --wait
        assert up.returncode == 0, up.stdout + up.stderr
        function_answers(8080, 5672)
    finally:
        print(run(*compose, "logs", env=environment).stdout)
        down = run(*compose, "down", "--rmi", "local", "--volumes", env=environment)
        run("docker", "rmi", *([broker] if stand_in else []))
    assert down.returncode == 0


def test_the_manifest_is_valid():
    validated = run(tool("kubernetes-validate"), "--strict", MANIFEST)
    assert validated.returncode == 0, validated.stdout + validated.stderr


def test_podman_plays_the_manifest(sample, engine, rabbitmq, tmp_path):
    podman, port, (host,) = tool("podman"), free_port(), docker_gateway()
    if re.search(r"version [1-4]\.", run(podman, "--version").stdout):
        pytest.skip("podman before 5 plays no such manifest")
    daemon, images = "lambda-runtime-api-daemon", re.findall(r"image: (\S+)", MANIFEST.read_text())
    shutil.copy(real_daemon(), tmp_path / daemon)
    (tmp_path / "Dockerfile").write_text(f'FROM scratch\nCOPY {daemon} /\nENTRYPOINT ["/{daemon}"]\n')
    for image, folder in zip(images, (tmp_path, sample), strict=True):
        build(folder, image, first_base_image())
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            subprocess.run([podman, "load"], stdin=saved.stdout, check=True, stdout=subprocess.DEVNULL)
    credentials = json.dumps({"username": AMQP_USERNAME, "password": AMQP_PASSWORD})
    secret = f"---\napiVersion: v1\nkind: Secret\nmetadata: {{name: rabbitmq}}\nstringData: {credentials}\n---\n"
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(secret + MANIFEST.read_text().replace("rabbitmq:5672", f"{host}:{rabbitmq}"))
    try:
        played = run(podman, "kube", "play", "--publish", f"127.0.0.1:{port}:8080", manifest)
        assert played.returncode == 0, played.stderr
        function_answers(port, rabbitmq)
    finally:
        print(run(podman, "pod", "logs", f"{NAME}-pod").stdout)
        run(podman, "kube", "down", "--force", manifest)
        run(podman, "rmi", "--force", *images)
        run("docker", "rmi", "--force", *images)
