"""examples/compose.yaml, with a real Compose, RabbitMQ and Daemon, and images made here."""

import json
import os
import shutil
import sys

import pytest
from helpers import (
    AMQP_PASSWORD,
    AMQP_USERNAME,
    HELLO,
    NAME,
    ROOT,
    first_base_image,
    missing,
    real_daemon,
    run,
    wait_until,
)

pytestmark = pytest.mark.slow
RABBITMQ = "rabbitmq:4.2"


def compose():
    """The command of Compose: docker's plugin, or docker-compose."""
    if run("docker", "compose", "version").returncode == 0:
        return ["docker", "compose"]
    return [shutil.which("docker-compose") or missing("no Compose on this machine")]


@pytest.fixture
def daemon():
    """The path of the Daemon; asked for first, so that a test without one makes no image."""
    return real_daemon()


@pytest.fixture
def rabbitmq_image(daemon, engine, tmp_path):
    """The image of RabbitMQ that the example names, or, where it cannot be pulled, one with the distribution's."""
    if run("docker", "image", "inspect", RABBITMQ).returncode == 0 or run("docker", "pull", RABBITMQ).returncode == 0:
        yield
        return
    install = "apt-get update && apt-get install -y --no-install-recommends rabbitmq-server"
    # As in the image of that name, the server runs as user rabbitmq, and health checks as root.
    user = ["setpriv", "--reuid=rabbitmq", "--regid=rabbitmq", "--init-groups"]
    entrypoint = json.dumps([*user, "/usr/lib/rabbitmq/bin/rabbitmq-server"])
    home = "ENV HOME=/var/lib/rabbitmq PATH=/usr/lib/rabbitmq/bin:$PATH"
    dockerfile = f"FROM {first_base_image()}\nRUN {install}\n{home}\nENTRYPOINT {entrypoint}\n"
    (tmp_path / "Dockerfile").write_text(dockerfile)
    built = run("docker", "build", "--tag", RABBITMQ, tmp_path)
    assert built.returncode == 0, built.stderr
    yield
    run("docker", "rmi", RABBITMQ)


def test_one_command_starts_broker_daemon_and_function(daemon, rabbitmq_image):
    environment = os.environ | {
        "LAMBDA_RUNTIME_API_DAEMON": daemon,
        "AMQP_PASSWORD": AMQP_PASSWORD,
        "BASE_IMAGE": first_base_image(),
        "COMPOSE_PROJECT_NAME": f"{NAME}-test",
        "DOCKER_BUILDKIT": "0",
    }
    command = [*compose(), "--file", ROOT / "examples" / "compose.yaml"]
    try:
        up = run(*command, "up", "--build", "--detach", env=environment)  # docker-compose 1 has no --wait
        assert up.returncode == 0, up.stdout + up.stderr
        uri = f"amqp://{AMQP_USERNAME}:{AMQP_PASSWORD.replace(' ', '%20')}@localhost:5672"
        client = [ROOT / "examples" / "amqp_invoke.py", NAME, '{"key": "value"}']

        def answer():
            return run(sys.executable, *client, env=os.environ | {"AMQP_URI": uri}).stdout

        assert json.loads(wait_until(answer, 60)) == HELLO
        url = f"http://127.0.0.1:8080/2015-03-31/functions/{NAME}/invocations"
        assert json.loads(run("curl", "-s", "-XPOST", url, "-d", "{}").stdout) == HELLO
    finally:
        print(run(*command, "logs", env=environment).stdout)
        down = run(*command, "down", "--rmi", "local", "--volumes", env=environment)
    assert down.returncode == 0
