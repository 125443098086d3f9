#!/usr/bin/env python3
# SPDX-License-Identifier: MIT-0
"""Invokes a Lambda function through RabbitMQ.

The Lambda Runtime API Daemon must serve a queue there that has the function's name.
"""

# /// script
# dependencies = ["pika"]
# ///

import argparse
import os
import sys
import threading
import time
import uuid

import pika
import pika.exceptions


def invoke(channel, function: str, event: bytes, seconds: float = 30) -> bytes:
    """Publishes the event (JSON, as bytes) to the function's queue and returns its answer (bytes).

    channel is an open pika channel with delivery confirmation. Raises
    pika.exceptions.UnroutableError if the function has no queue, which means that nothing serves
    it, and TimeoutError if there is no answer within that many seconds.
    """
    answers = channel.queue_declare(queue="", exclusive=True).method.queue
    correlation_id = str(uuid.uuid4())
    properties = pika.BasicProperties(
        content_type="application/json",
        correlation_id=correlation_id,
        reply_to=answers,
        expiration=str(int(seconds * 1000)),  # drop requests whose caller has given up
    )
    channel.basic_publish(
        exchange="", routing_key=function, body=event, properties=properties, mandatory=True
    )
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            consumed = channel.consume(answers, auto_ack=True, inactivity_timeout=left)
            _, properties, answer = next(consumed)  # None, None, None when the time is up
            if answer is not None and properties.correlation_id == correlation_id:
                return answer
    finally:
        if channel.is_open:
            channel.cancel()
            channel.queue_delete(answers)
    raise TimeoutError(f"no answer from {function} within {seconds} s")


def exit_after(seconds: float, message: str) -> None:
    """Ends this program with the message unless it has ended within that many seconds.

    This holds whatever the program waits for: a name server, the broker, or the answer.
    """

    def give_up():
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()


def main() -> None:
    """Invokes the function that the command line names, and prints its answer."""
    broker = "amqp://user:password@host:port (default: amqp://localhost)"
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"AMQP_URI names the broker, {broker}."
    )
    parser.add_argument("function")
    parser.add_argument("event", nargs="?", default="{}", help="JSON (default: {})")
    parser.add_argument(
        "--timeout",
        type=float,
        default=30,
        metavar="SECONDS",
        help="limit for everything, from the connection to the answer (default: 30)",
    )
    options = parser.parse_intermixed_args()
    if not 0 < options.timeout <= threading.TIMEOUT_MAX:
        parser.error("--timeout takes more than 0 seconds, and not centuries")
    uri = os.environ.get("AMQP_URI", "amqp://localhost")
    try:
        uri.index("://")  # without a scheme pika takes it for something else
        parameters = pika.URLParameters(uri)
    except ValueError:
        sys.exit("AMQP_URI takes amqp://user:password@host:port")
    # The URI may be the one of the Daemon, and tell it to try for months.
    parameters.connection_attempts = 1
    broker = f"{parameters.host}:{parameters.port}"
    exit_after(options.timeout, f"no answer from {options.function} within {options.timeout} s")
    try:
        with pika.BlockingConnection(parameters) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            event = options.event.encode()
            answer = invoke(channel, options.function, event, options.timeout)
            sys.stdout.buffer.write(answer + b"\n")
    except pika.exceptions.UnroutableError:
        sys.exit(f"nothing serves the function {options.function}: it has no queue at {broker}")
    except TimeoutError as error:
        sys.exit(str(error))
    except (pika.exceptions.AMQPError, OSError) as error:
        sys.exit(f"no RabbitMQ at {broker}, or access denied: {error!r}")


if __name__ == "__main__":
    main()
