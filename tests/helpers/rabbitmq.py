"""A real RabbitMQ, the one of examples/compose.yaml, and the example client."""

import os
import sys

import pika
from machine import ROOT, run

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
