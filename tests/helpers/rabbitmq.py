"""A real RabbitMQ, and the example client of the functions behind it."""

import contextlib
import ipaddress
import logging
import os
import shutil
import subprocess
import sys

import pika
import pytest
from machine import ROOT, free_port, missing, run, wait_until

USERNAME, PASSWORD = "lambda", "secret word"  # RabbitMQ accepts this user from anywhere, guest only from loopback

logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs every attempt to connect


class Broker:
    """The broker, reachable from this machine and its containers."""

    def __init__(self):
        self.port = free_port()

    def connect(self):
        """A connection to it, a context manager."""
        credentials = pika.PlainCredentials(USERNAME, PASSWORD)
        return pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", self.port, credentials=credentials))


def invoke_by_amqp(port, *arguments):
    """Runs the example client with the broker at that port."""
    uri = f"amqp://{USERNAME}:{PASSWORD.replace(' ', '%20')}@localhost:{port}"
    return run(sys.executable, ROOT / "examples" / "amqp_invoke.py", *arguments, env=os.environ | {"AMQP_URI": uri})


def docker_gateway():
    """The address at which containers reach this machine, in a list, which is empty without an engine."""
    network = "docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}"
    subnet = run(*network).stdout.strip() if shutil.which("docker") else ""
    return [str(ipaddress.ip_network(subnet)[1])] if subnet else []


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory):
    """The broker."""
    server = shutil.which("rabbitmq-server", path="/usr/lib/rabbitmq/bin") or missing("no RabbitMQ on this machine")
    broker, folder, epmd_port = Broker(), tmp_path_factory.mktemp("rabbitmq"), str(free_port())
    settings = [f"default_user = {USERNAME}", f"default_pass = {PASSWORD}"]
    for number, address in enumerate(["127.0.0.1", *docker_gateway()], 1):
        settings.append(f"listeners.tcp.{number} = {address}:{broker.port}")
    (folder / "rabbitmq.conf").write_text("\n".join([*settings, ""]))
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": epmd_port,
        "RABBITMQ_NODENAME": "tests@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(folder),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
    }
    process = subprocess.Popen([server], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)

    def is_up():
        assert process.poll() is None, "RabbitMQ ended"
        with contextlib.suppress(pika.exceptions.AMQPError), broker.connect():
            return True

    wait_until(is_up, 60)
    yield broker
    process.terminate()
    process.wait()
    run("epmd", "-port", epmd_port, "-kill", env=environment | {"ERL_EPMD_RELAXED_COMMAND_CHECK": "true"})
