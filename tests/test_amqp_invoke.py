"""examples/amqp_invoke.py, with a real RabbitMQ."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import amqp_invoke as example
import pika
import pytest
from helpers import NAME, ROOT, amqp_invoke, connect, free_port, run, wait_until

CLIENT = ROOT / "examples" / "amqp_invoke.py"


@pytest.fixture
def queue(rabbitmq):
    """The name of a queue that answers, and the messages sent to it, as (properties, body)."""
    name, messages = f"function-{uuid.uuid4()}", []

    def serve():
        with connect(rabbitmq) as connection:
            channel = connection.channel()
            channel.queue_declare(name, auto_delete=True)
            ready.set()
            for method, properties, body in channel.consume(name, auto_ack=True, inactivity_timeout=0.1):
                if stop.is_set():
                    break
                if method:
                    messages.append((properties, body))
                    if body != b'"keep quiet"':
                        other = pika.BasicProperties(correlation_id="of another invocation")
                        same = pika.BasicProperties(correlation_id=properties.correlation_id)
                        channel.basic_publish("", properties.reply_to, b"wrong", other)
                        channel.basic_publish("", properties.reply_to, b"answer to " + body, same)

    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(10)
    yield name, messages
    stop.set()
    thread.join()


def test_the_client_prints_its_own_answer(rabbitmq, queue):
    name, messages = queue
    ran = amqp_invoke(rabbitmq, name, '{"key": "value"}')
    assert (ran.returncode, ran.stdout) == (0, 'answer to {"key": "value"}\n')
    ((properties, _),) = messages
    assert properties.content_type == "application/json"
    assert properties.reply_to
    assert properties.expiration == "30000"


def test_the_default_event_is_an_empty_object(rabbitmq, queue):
    assert amqp_invoke(rabbitmq, queue[0]).stdout == "answer to {}\n"


def test_the_client_accepts_options_between_its_arguments(rabbitmq, queue):
    ran = amqp_invoke(rabbitmq, queue[0], "--timeout", "5", "[1]")
    assert (ran.returncode, ran.stdout) == (0, "answer to [1]\n")


def test_one_channel_serves_several_invocations_and_leaves_no_queue(rabbitmq, queue):
    name, messages = queue
    with connect(rabbitmq) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        assert [example.invoke(channel, name, event) for event in (b"1", b"2")] == [b"answer to 1", b"answer to 2"]
        for properties, _ in messages:
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
                connection.channel().queue_declare(properties.reply_to, passive=True)


def test_the_client_says_when_no_answer_comes_in_time(rabbitmq, queue):
    ran = amqp_invoke(rabbitmq, queue[0], '"keep quiet"', "--timeout", "0.5")
    assert (ran.returncode, ran.stderr) == (1, f"no answer from {queue[0]} within 0.5 s\n")
    ((properties, _),) = queue[1]
    assert properties.expiration == "500"


@pytest.fixture
def waiting_client(rabbitmq, queue):
    """A client that waits in vain for a second: the future of its end, and the properties of its request."""
    with ThreadPoolExecutor() as pool:
        client = pool.submit(amqp_invoke, rabbitmq, queue[0], '"keep quiet"', "--timeout", "1")
        ((request, _),) = wait_until(lambda: queue[1])
        yield client, request


def test_answers_to_others_do_not_extend_the_wait(rabbitmq, waiting_client):
    client, request = waiting_client
    with connect(rabbitmq) as connection:
        channel, other = connection.channel(), pika.BasicProperties(correlation_id="of another invocation")
        deadline = time.monotonic() + 10
        while not client.done():
            assert time.monotonic() < deadline
            channel.basic_publish("", request.reply_to, b"wrong", other)
            time.sleep(0.1)
    assert client.result().returncode == 1


def test_a_client_that_waits_does_not_disturb_another_one(rabbitmq, queue, waiting_client):
    assert amqp_invoke(rabbitmq, queue[0]).stdout == "answer to {}\n"


def test_nobody_else_can_read_the_answers(rabbitmq, waiting_client):
    _, request = waiting_client
    locked = pytest.raises(pika.exceptions.ChannelClosedByBroker, match="RESOURCE_LOCKED")
    with connect(rabbitmq) as connection, locked:
        connection.channel().basic_get(request.reply_to)


def test_the_client_says_when_nothing_serves_the_function(rabbitmq):
    ran = amqp_invoke(rabbitmq, "no-such-function")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "nothing serves the function no-such-function" in ran.stderr


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("amqp://user:secret@localhost:{port}", "no RabbitMQ at localhost:{port}, or access denied"),
        ("amqp://user:secret@no-such-host.invalid", "no RabbitMQ at no-such-host.invalid:5672, or access denied"),
        ("user:secret@localhost", "AMQP_URI takes amqp://"),
        ("amqp://user:secret@localhost:port", "AMQP_URI takes amqp://"),
    ],
)
def test_the_client_says_in_one_line_that_there_is_no_broker(uri, said):
    port = free_port()
    ran = run(sys.executable, CLIENT, NAME, env=os.environ | {"AMQP_URI": uri.format(port=port)})
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(said.format(port=port))
    assert "secret" not in ran.stderr


def test_the_client_says_in_one_line_that_it_lost_the_broker(rabbitmq, queue):
    environment = os.environ | {"AMQP_URI": f"amqp://localhost:{rabbitmq}?heartbeat=1"}
    command = [sys.executable, CLIENT, queue[0], '"keep quiet"']
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as client:
        wait_until(lambda: queue[1])
        client.send_signal(signal.SIGSTOP)
        time.sleep(4)  # RabbitMQ closes the connection
        client.send_signal(signal.SIGCONT)
        stderr = client.stderr.read()
    assert (client.returncode, stderr.count("\n")) == (1, 1)
    assert stderr.startswith(f"no RabbitMQ at localhost:{rabbitmq}")
