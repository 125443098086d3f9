"""examples/amqp_invoke.py, with a real RabbitMQ."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import amqp_invoke as example
import pika
import pytest
from machine import ROOT, free_port, run, wait_until
from rabbitmq import invoke_by_amqp
from sample import NAME


@pytest.fixture
def channel(rabbitmq):
    with rabbitmq.connect() as connection:
        yield connection.channel()


@pytest.fixture
def queue(channel):
    """The name of the queue of a function."""
    return channel.queue_declare("", exclusive=True).method.queue


@pytest.fixture
def request_of(channel, queue):
    """Calls a function that invokes; returns the future of its end, and the request, as (properties, body)."""

    def request():
        method, *message = channel.basic_get(queue, auto_ack=True)
        return message if method else None

    with ThreadPoolExecutor() as pool:
        yield lambda invoke, *arguments: (pool.submit(invoke, *arguments), *wait_until(request))


def answer(channel, request, body):
    """Answers the request after another one's answer."""
    for correlation_id, text in ("of another", b"wrong"), (request.correlation_id, body):
        channel.basic_publish("", request.reply_to, text, pika.BasicProperties(correlation_id=correlation_id))


@pytest.mark.parametrize(
    ("arguments", "event", "expiration"), [([], b"{}", "30000"), (["--timeout", "5", "[1]"], b"[1]", "5000")]
)
def test_the_client_prints_its_own_answer(rabbitmq, channel, queue, request_of, arguments, event, expiration):
    client, request, body = request_of(invoke_by_amqp, rabbitmq.port, queue, *arguments)
    assert (body, request.content_type, request.expiration) == (event, "application/json", expiration)
    answer(channel, request, b"the answer")
    assert (client.result().returncode, client.result().stdout) == (0, "the answer\n")


def test_one_channel_serves_several_invocations_and_leaves_no_queue(rabbitmq, channel, queue, request_of):
    with rabbitmq.connect() as connection:
        its_channel = connection.channel()
        for event in b"1", b"2":
            client, request, _ = request_of(example.invoke, its_channel, queue, event)
            answer(channel, request, b"answer to " + event)
            assert client.result() == b"answer to " + event
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
                connection.channel().queue_declare(request.reply_to, passive=True)


def test_nobody_else_can_read_the_answers_or_extend_the_wait(rabbitmq, channel, queue, request_of):
    client, request, _ = request_of(invoke_by_amqp, rabbitmq.port, queue, "--timeout", "1")
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="RESOURCE_LOCKED"):
        channel.connection.channel().basic_get(request.reply_to)
    deadline = time.monotonic() + 10
    while not client.done():
        assert time.monotonic() < deadline
        channel.basic_publish("", request.reply_to, b"wrong")
        time.sleep(0.1)
    assert (client.result().returncode, client.result().stderr) == (1, f"no answer from {queue} within 1.0 s\n")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("amqp://lambda:secret%20word@localhost:{broker}", f"nothing serves the function {NAME}"),
        ("amqp://user:secret@localhost:{port}", "no RabbitMQ at localhost:{port}, or access denied"),
        ("amqp://user:secret@no-such-host.invalid", "no RabbitMQ at no-such-host.invalid:5672, or access denied"),
        ("user:secret@localhost", "AMQP_URI takes amqp://"),
        ("amqp://user:secret@localhost:port", "AMQP_URI takes amqp://"),
    ],
)
def test_the_client_says_in_one_line_why_it_cannot_invoke(rabbitmq, uri, said):
    ports = {"broker": rabbitmq.port, "port": free_port()}
    client = ROOT / "examples" / "amqp_invoke.py"
    ran = run(sys.executable, client, NAME, env=os.environ | {"AMQP_URI": uri.format(**ports)})
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(said.format(**ports))
    assert "secret" not in ran.stderr
