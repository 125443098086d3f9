"""A real RabbitMQ, the one of examples/compose.yaml, and the example client of the functions behind it."""

import contextlib
import logging
import os
import re
import sys

import pika
import pytest
from engine import build, first_base_image
from machine import PROGRAMS, ROOT, run, wait_until

USERNAME, PASSWORD = "lambda", "secret word"

logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs every attempt to connect


class Broker:
    """A broker that this machine and its containers reach at the same address."""

    def __init__(self, container):
        self.host = run("docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", container).stdout.strip()

    def connect(self):
        """A connection to it, a context manager."""
        return pika.BlockingConnection(
            pika.ConnectionParameters(self.host, credentials=pika.PlainCredentials(USERNAME, PASSWORD))
        )

    def is_up(self):
        with contextlib.suppress(pika.exceptions.AMQPError), self.connect():
            return True


def rabbitmq_image():
    """The name of the image, pulled, or made of Debian's package."""
    (image,) = re.findall(r"image: (rabbitmq\S+)", (ROOT / "examples" / "compose.yaml").read_text())
    if all(run("docker", *command, image).returncode != 0 for command in (["image", "inspect"], ["pull"])):
        build(ROOT, image, first_base_image(), "--file", PROGRAMS / "rabbitmq.Dockerfile")
    return image


def invoke_by_amqp(host, *arguments):
    """Runs the example client with the broker there."""
    uri = f"amqp://{USERNAME}:{PASSWORD.replace(' ', '%20')}@{host}"
    return run(sys.executable, ROOT / "examples" / "amqp_invoke.py", *arguments, env=os.environ | {"AMQP_URI": uri})


@pytest.fixture(scope="session")
def rabbitmq(engine):
    """The broker."""
    user = f"--env=RABBITMQ_DEFAULT_USER={USERNAME}", f"--env=RABBITMQ_DEFAULT_PASS={PASSWORD}"
    container = run("docker", "run", "--rm", "--detach", *user, rabbitmq_image()).stdout.strip()
    broker = Broker(container)
    wait_until(broker.is_up, 60)
    yield broker
    run("docker", "kill", container)
