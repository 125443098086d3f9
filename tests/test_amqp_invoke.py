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


class Function:
    """A function behind a queue, which the test plays."""

    def __init__(self, channel, pool):
        self.channel, self.queue = channel, channel.queue_declare("", exclusive=True).method.queue
        self.submit = pool.submit  # calls what invokes it

    def request(self):
        """Waits for a request; returns its properties and its body (bytes)."""
        return wait_until(lambda: [*filter(None, self.channel.basic_get(self.queue, auto_ack=True))])[1:]

    def answer(self, request, body):
        """Answers the request (properties) after another one's answer."""
        for correlation_id, text in ("of another", b"wrong"), (request.correlation_id, body):
            properties = pika.BasicProperties(correlation_id=correlation_id)
            self.channel.basic_publish("", request.reply_to, text, properties)


@pytest.fixture
def function(rabbitmq):
    with rabbitmq.connect() as connection, ThreadPoolExecutor() as pool:
        yield Function(connection.channel(), pool)


@pytest.mark.parametrize(
    ("arguments", "event", "expiration"), [([], b"{}", "30000"), (["--timeout", "5", "[1]"], b"[1]", "5000")]
)
def test_the_client_prints_its_own_answer(rabbitmq, function, arguments, event, expiration):
    client = function.submit(invoke_by_amqp, rabbitmq.host, function.queue, *arguments)
    request, body = function.request()
    assert (body, request.content_type, request.expiration) == (event, "application/json", expiration)
    function.answer(request, b"the answer")
    assert (client.result().returncode, client.result().stdout) == (0, "the answer\n")


def test_one_channel_serves_several_invocations_and_leaves_no_queue(rabbitmq, function):
    with rabbitmq.connect() as connection:
        channel = connection.channel()
        for event in b"1", b"2":
            client = function.submit(example.invoke, channel, function.queue, event)
            request, _ = function.request()
            function.answer(request, b"answer to " + event)
            assert client.result() == b"answer to " + event
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
                connection.channel().queue_declare(request.reply_to, passive=True)


def test_what_others_send_does_not_extend_the_wait(rabbitmq, function):
    client = function.submit(invoke_by_amqp, rabbitmq.host, function.queue, "--timeout", "1")
    request, _ = function.request()
    deadline = time.monotonic() + 10
    while not client.done() and time.monotonic() < deadline:
        function.channel.basic_publish("", request.reply_to, b"wrong")
        time.sleep(0.1)
    assert client.result(0).returncode == 1
    assert client.result().stderr == f"no answer from {function.queue} within 1.0 s\n"


@pytest.mark.parametrize(("uri", "said"), [
    ("amqp://lambda:secret%20word@{broker}", f"nothing serves the function {NAME}"),
    ("amqp://user:secret@localhost:{port}", "no RabbitMQ at localhost:{port}, or access denied"),
    ("amqp://user:secret@no-such-host.invalid", "no RabbitMQ at no-such-host.invalid:5672, or access denied"),
    ("user:secret@localhost", "AMQP_URI takes amqp://"),
    ("amqp://user:secret@localhost:port", "AMQP_URI takes amqp://"),
])  # fmt: skip
def test_the_client_says_in_one_line_why_it_cannot_invoke(rabbitmq, uri, said):
    places = {"broker": rabbitmq.host, "port": free_port()}
    client = ROOT / "examples" / "amqp_invoke.py"
    ran = run(sys.executable, client, NAME, env=os.environ | {"AMQP_URI": uri.format(**places)})
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(said.format(**places))
    assert "secret" not in ran.stderr
