#!/usr/bin/env python3
# SPDX-License-Identifier: MIT-0
"""Invokes a Lambda function through RabbitMQ, where the Lambda Runtime API Daemon serves it.

AMQP_URI names the broker: amqp://user:password@host:port (default: amqp://localhost).
"""

# /// script
# dependencies = ["pika"]
# ///

import argparse
import os
import sys
import uuid

import pika
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.exceptions import AMQPError, UnroutableError


def invoke(channel: BlockingChannel, function: str, event: bytes, seconds: float = 30) -> bytes:
    """Sends the event (JSON) to the queue that has the function's name; returns the response.

    The channel must have delivery confirmation. Raises UnroutableError if there is no such queue,
    so nothing serves the function, and TimeoutError after that many seconds without a response.
    """
    # Each invocation has a reply queue of its own, so what arrives there is its response.
    replies = channel.queue_declare("", exclusive=True).method.queue
    properties = pika.BasicProperties(
        correlation_id=str(uuid.uuid4()),  # becomes the request ID
        reply_to=replies,
        expiration=str(int(seconds * 1000)),  # later, nobody waits for the response any more
    )
    try:
        channel.basic_publish("", function, event, properties, mandatory=True)
        _, _, response = next(channel.consume(replies, auto_ack=True, inactivity_timeout=seconds))
    finally:
        if channel.is_open:
            channel.cancel()
            channel.queue_delete(replies)
    if response is None:
        raise TimeoutError(f"no response from {function} within {seconds:g} s")
    return response


def main() -> None:
    """Invokes the function that the command line names, and prints its response."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function")
    parser.add_argument("event", nargs="?", default="{}", help="JSON (default: {})")
    parser.add_argument("--timeout", type=float, default=30, help="seconds to wait (default: 30)")
    options = parser.parse_intermixed_args()
    try:
        broker = pika.URLParameters(os.environ.get("AMQP_URI", "amqp://localhost"))
    except (ValueError, IndexError):  # whose text can contain a part of the password
        sys.exit("AMQP_URI must have the form amqp://user:password@host:port")
    broker.connection_attempts = 1  # the URI may be the Daemon's, which allows a million
    broker.heartbeat = 10  # notices a broker that has vanished
    broker.stack_timeout = broker.blocked_connection_timeout = options.timeout
    try:
        with pika.BlockingConnection(broker) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            response = invoke(channel, options.function, options.event.encode(), options.timeout)
    except UnroutableError:
        sys.exit(f"nothing serves {options.function}: {broker.host} has no queue of that name")
    except TimeoutError as error:
        sys.exit(str(error))
    except (AMQPError, AMQPConnectorException, OSError) as error:
        sys.exit(f"no RabbitMQ at {broker.host}:{broker.port}, or access denied: {error!r}")
    sys.stdout.buffer.write(response + b"\n")


if __name__ == "__main__":
    main()
