"""A real RabbitMQ, the one of examples/compose.yaml, and the example client."""

import contextlib
import os
import re
import sys

import pika
import pytest
from engine import build, first_base_image
from machine import PROGRAMS, ROOT, run, wait_until

USERNAME, PASSWORD = "lambda", "secret word"


def connect(host):
    """A connection to the broker, a context manager."""
    credentials = pika.PlainCredentials(USERNAME, PASSWORD)
    return pika.BlockingConnection(pika.ConnectionParameters(host, credentials=credentials))


def invoke_by_amqp(host, *arguments):
    """Runs the example client with these arguments; returns its CompletedProcess.

    What is not UTF-8 in its output becomes surrogates, as in os.fsdecode().
    """
    uri = f"amqp://{USERNAME}:{PASSWORD.replace(' ', '%20')}@{host}"
    client = ROOT / "examples" / "amqp_invoke.py"
    environment = os.environ | {"AMQP_URI": uri}
    command = sys.executable, client, *arguments
    return run(*command, env=environment, encoding="utf-8", errors="surrogateescape")


@pytest.fixture(scope="session")
def rabbitmq_image(engine):
    """The image of examples/compose.yaml, or without a registry, one with Debian's RabbitMQ."""
    (image,) = re.findall(r"image: (rabbitmq\S+)", (ROOT / "examples" / "compose.yaml").read_text())
    commands = ["image", "inspect"], ["pull"]
    if any(run("docker", *command, image).returncode == 0 for command in commands):
        return image
    # Under a name of its own, so that nobody takes it for the official one.
    dockerfile = "--file", PROGRAMS / "rabbitmq.Dockerfile"
    return build(ROOT, "kept", first_base_image(), *dockerfile, name="sample-test-rabbitmq")


@pytest.fixture(scope="session")
def rabbitmq(rabbitmq_image):
    """The address of the broker for this machine and for containers."""
    user = f"--env=RABBITMQ_DEFAULT_USER={USERNAME}", f"--env=RABBITMQ_DEFAULT_PASS={PASSWORD}"
    container = run("docker", "run", "--rm", "--detach", *user, rabbitmq_image).stdout.strip()
    address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    host = run("docker", "inspect", "--format", address, container).stdout.strip()

    def is_up():
        with contextlib.suppress(pika.exceptions.AMQPError), connect(host):
            return True

    wait_until(is_up)
    yield host
    run("docker", "kill", container)
