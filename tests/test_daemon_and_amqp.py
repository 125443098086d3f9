"""The Lambda Runtime API Daemon in the emulator's place, and the examples for it.

These are the AMQP client, Compose and Kubernetes.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import amqp_invoke
import pika
import pytest
import yaml
from engine import assert_confined_as_on_lambda, build, first_base_image
from installation import locked
from machine import (
    ROOT,
    free_port,
    post,
    real_daemon,
    run,
    skip_except_on_ci,
    tool,
    wait_until,
)
from rabbitmq import PASSWORD, USERNAME, connect, invoke_by_amqp
from sample import HELLO, NAME, copy_sample, make_evaluating, make_scripted

CREDENTIALS = {"AMQP_USERNAME": USERNAME, "AMQP_PASSWORD": PASSWORD}
FOUR_SECONDS = {"AWS_LAMBDA_FUNCTION_TIMEOUT": "4"}
EXAMPLES = ROOT / "examples"
# How the Daemon stays connected: the run script and both examples say it.
AMQP_PARAMETERS = "connection_attempts=1000000&retry_delay=10&heartbeat=10"
INSTANCES = ["1", "2", "3"]


@pytest.mark.parametrize("path", ["/tmp", "/etc/passwd"])
def test_an_unusable_daemon_path_fails_with_one_line(sample, path):
    """A folder, and a file that is not executable."""
    ran = run(sample / f"{NAME}.sh", env=os.environ | {"LAMBDA_RUNTIME_API_DAEMON": path})
    line = f"{NAME}: LAMBDA_RUNTIME_API_DAEMON: {path} is not an executable file\n"
    assert (ran.returncode, ran.stderr) == (1, line)


def test_the_daemon_replaces_the_emulator(start, sample, stand_in):
    """A stand-in for the Daemon returns its arguments, environment and hosts."""
    folder, relative_path = os.path.split(stand_in)
    settings = {"LAMBDA_RUNTIME_API_DAEMON": relative_path, "AWS_LAMBDA_MAX_CONCURRENCY": "4"}
    with start(sample, cwd=folder, **settings, **FOUR_SECONDS) as process:
        received = process.invoke(function=NAME)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", process.port))
        url = f"http://127.0.0.1:{process.port}/2015-03-31/functions/{NAME}/invocations"
        assert f"    curl -XPOST {url} -d " in process.output
        process.stop()
        assert "Daemon ended by SIGTERM\n" in process.output
    assert received["argv"][-1] == "lambda_function.lambda_handler"
    assert not [argument for argument in received["argv"] if argument.startswith("--runtime")]
    expected = {
        "AWS_LAMBDA_FUNCTION_NAME": NAME,
        "MAX_CONCURRENCY": "1",
        "AMQP_URI": f"amqp://{start.host_name}:5672?{AMQP_PARAMETERS}",
        **FOUR_SECONDS,
    }
    assert expected.items() <= received["environ"].items()
    assert "AWS_LAMBDA_MAX_CONCURRENCY" not in received["environ"]
    assert start.host_name in received["hosts"]


def count_consumers(rabbitmq, queue):
    """The number of the queue's consumers, or None if there is no such queue."""
    with (
        connect(rabbitmq) as connection,
        contextlib.suppress(pika.exceptions.ChannelClosedByBroker),
    ):
        return connection.channel().queue_declare(queue, passive=True).method.consumer_count


@pytest.fixture(scope="module")
def daemon_run(start, rabbitmq, folder, sample):
    """The real Daemon with a function that does what the event says."""
    settings = CREDENTIALS | FOUR_SECONDS | {"AMQP_URI": f"amqp://{rabbitmq}"}
    copy = make_evaluating(copy_sample(folder / f"daemon {start.option}", sample))
    with start(copy, LAMBDA_RUNTIME_API_DAEMON=real_daemon(), **settings) as process:
        wait_until(lambda: count_consumers(rabbitmq, NAME))
        yield process


@pytest.fixture
def channel(rabbitmq):
    """A channel of the broker that confirms deliveries."""
    with connect(rabbitmq) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel


@pytest.mark.parametrize("protocol", ["HTTP", "AMQP"])
def test_the_daemon_answers_a_hundred_invocations(daemon_run, channel, protocol):
    already_received = len(daemon_run.received)
    for number in range(100):
        event = {"number": number}
        if protocol == "HTTP":
            assert daemon_run.invoke(event, NAME) == event
        else:
            response = amqp_invoke.invoke(channel, NAME, json.dumps(event).encode())
            assert json.loads(response) == event
    wait_until(lambda: len(daemon_run.received) == already_received + 100)


def test_the_daemon_survives_failing_invocations(daemon_run):
    """An exception, a timeout, and a dead runtime."""
    assert daemon_run.invoke({"do": "1 / 0"}, NAME)["errorMessage"] == "division by zero"
    for statement in "time.sleep(6)", "os._exit(3)":
        message = daemon_run.invoke({"do": statement}, NAME)["errorMessage"]
        assert "Task timed out after 4" in message
        wait_until(lambda: daemon_run.invoke({"still": "here"}, NAME) == {"still": "here"})


def test_without_a_broker_two_http_invocations_run_at_once(start, evaluating):
    """In the meantime the Daemon tries to connect: the log says retry=2."""
    settings = {
        "LAMBDA_RUNTIME_API_DAEMON": real_daemon(),
        "MAX_CONCURRENCY": "2",
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "300",
    }
    with ThreadPoolExecutor() as pool, start(evaluating, **settings) as process:
        pool.submit(process.invoke, {"do": "time.sleep(200)"}, NAME)
        wait_until(lambda: process.received)
        assert process.invoke({"key": 1}, NAME) == {"key": 1}
        wait_until(lambda: "retry=2" in process.output)
        assert process.invoke({"key": 2}, NAME) == {"key": 2}
        process.stop()
        assert '"eventType": "SHUTDOWN"' in process.output


def test_an_extension_that_died_is_started_again(start, scripted_copy, tmp_path):
    arguments = "-e", f"AT_INVOKE=if is_first_time('{tmp_path}/died'): os._exit(1)"
    settings = {"LAMBDA_RUNTIME_API_DAEMON": real_daemon(), "AMQP_URI": "", **FOUR_SECONDS}
    with start(scripted_copy, *arguments, **settings) as process:
        wait_until(lambda: process.invoke(function=NAME) == HELLO and process.received)


def instances_that_respond(channel, queue, after_twenty):
    """Puts a hundred invocations into a queue, and waits for the responses: each one's INSTANCE.

    Calls after_twenty() when there are twenty.
    """
    replies = channel.queue_declare("", exclusive=True).method.queue
    # sleep() returns None, so the value is that of the environment variable.
    event = b'{"do": "time.sleep(0.05) or os.environ[\'INSTANCE\']"}'
    for number in range(100):
        properties = pika.BasicProperties(reply_to=replies, correlation_id=str(number))
        channel.basic_publish("", queue, event, properties)
    instances = {}
    messages = channel.consume(replies, auto_ack=True, inactivity_timeout=60)
    for method, properties, response in messages:
        assert method, f"{len(instances)} of 100 responses"
        instances[properties.correlation_id] = json.loads(response)
        if len(instances) == 20:
            after_twenty()
        if len(instances) == 100:
            return sorted(set(instances.values()))


@pytest.fixture
def image_with_daemon(engine, evaluating, tmp_path):
    """An image for Kubernetes, built as the page says."""
    sample = build(make_scripted(evaluating), "sample", first_base_image())
    copy = f"COPY {os.path.basename(real_daemon())} /usr/local/bin/aws-lambda-rie"
    (tmp_path / "Dockerfile").write_text(f"FROM {sample}\n{copy}\n")
    dockerfile = f"--file={tmp_path / 'Dockerfile'}"
    return build(os.path.dirname(real_daemon()), "daemon", first_base_image(), dockerfile)


def kubernetes_objects():
    """The Deployment and the NetworkPolicy of the example."""
    return [*yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())]


def test_kubernetes_lets_the_broker_and_callers_through():
    """The ports of the policy are those that the Daemon uses."""
    deployment, policy = kubernetes_objects()
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (uri,) = [each["value"] for each in container["env"] if each["name"] == "AMQP_URI"]
    broker, _ = policy["spec"]["egress"]
    assert [f":{port['port']}?" in uri for port in broker["ports"]] == [True]
    (callers,) = policy["spec"]["ingress"]
    assert [port["port"] for port in callers["ports"]] == [8080]
    assert container["readinessProbe"]["tcpSocket"]["port"] == 8080


@pytest.mark.slow
def test_a_kubernetes_stop_loses_no_message_and_no_shutdown(rabbitmq, channel, image_with_daemon):
    """Docker stands in for Kubernetes: it starts and stops containers as the example says."""
    deployment, _ = kubernetes_objects()
    pod = deployment["spec"]["template"]["spec"]
    entrypoint, *arguments = pod["containers"][0]["command"]
    settings = CREDENTIALS | {
        "AWS_LAMBDA_FUNCTION_NAME": "stopped",
        "AMQP_URI": f"amqp://{rabbitmq}",
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "60",
        "AT_SHUTDOWN": "time.sleep(1); log('Shut down')",
    }
    options = [f"--env={key}={value}" for key, value in settings.items()]
    options += [f"--entrypoint={entrypoint}", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL"]
    start = "docker", "run", "--detach", *options
    stop = "docker", "stop", "--time", str(pod["terminationGracePeriodSeconds"])
    containers = [
        run(*start, f"--env=INSTANCE={i}", image_with_daemon, *arguments).stdout.strip()
        for i in INSTANCES
    ]
    try:
        wait_until(lambda: count_consumers(rabbitmq, "stopped") == 3)
        stop_one = functools.partial(run, *stop, containers[1])
        assert instances_that_respond(channel, "stopped", stop_one) == INSTANCES
        assert f"[{NAME}] Shut down\n" in run("docker", "logs", containers[1]).stdout
        # sh has stopped the container, not Kubernetes.
        status = run("docker", "inspect", "--format", "{{.State.ExitCode}}", containers[1]).stdout
        assert int(status) == 128 + signal.SIGTERM
    finally:
        run("docker", "rm", "--force", *containers)


@pytest.fixture
def composed(rabbitmq_image, stand_in, tmp_path):
    """Runs the Compose example; returns what the engine says of the function's container."""
    compose = ["docker", "compose"]
    if run(*compose, "version").returncode != 0:
        compose = [tool("docker-compose")]
    override = tmp_path / "override.yaml"
    override.write_text(f"services: {{rabbitmq: {{image: '{rabbitmq_image}'}}}}\n")
    compose += ["--file", EXAMPLES / "compose.yaml", "--file", override]
    compose += ["--project-name", f"sample-test-{os.getpid()}"]
    settings = {"AMQP_PASSWORD": PASSWORD, "LAMBDA_RUNTIME_API_DAEMON": stand_in}
    settings["BASE_IMAGE"] = first_base_image()
    run_compose = functools.partial(run, *compose, env=os.environ | settings, cwd=ROOT)

    def inspect_function():
        container = run_compose("ps", "--quiet", "function").stdout.strip()
        (inspected,) = json.loads(run("docker", "inspect", container).stdout)
        return inspected

    with locked("port-8080"):
        for port in 5672, 8080:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                skip_except_on_ci(f"port {port} is in use")
        try:
            up = run_compose("up", "--build", "--detach")
            assert up.returncode == 0, up.stdout + up.stderr
            wait_until(lambda: inspect_function()["State"]["Health"]["Status"] == "healthy")
            yield inspect_function()
        finally:
            run_compose("down", "--volumes", "--rmi", "local")


@pytest.mark.slow
def test_compose_runs_and_confines_the_function(composed):
    url = f"http://127.0.0.1:8080/2015-03-31/functions/{NAME}/invocations"
    received = json.loads(post(url))["environ"]
    assert received["AWS_LAMBDA_FUNCTION_NAME"] == NAME
    assert received["AMQP_URI"] == f"amqp://rabbitmq:5672?{AMQP_PARAMETERS}"
    assert CREDENTIALS.items() <= received.items()
    with connect("127.0.0.1"):  # the broker accepts them
        pass
    assert_confined_as_on_lambda(composed)
    (published,) = composed["HostConfig"]["PortBindings"]["8080/tcp"]
    assert published["HostIp"] == "127.0.0.1"


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture
def queue(channel):
    """The queue of a function. The test itself takes the requests from it."""
    return channel.queue_declare("", exclusive=True).method.queue


def next_request(channel, queue):
    """Waits for a request, and returns its properties and its body (bytes)."""

    def request():
        method, properties, body = channel.basic_get(queue, auto_ack=True)
        return (properties, body) if method else None

    return wait_until(request)


def test_the_client_prints_the_response_as_it_is(rabbitmq, channel, queue, pool):
    """Even if it is not UTF-8."""
    ran = pool.submit(invoke_by_amqp, rabbitmq, queue, "--timeout", "5", "[1]")
    request, event = next_request(channel, queue)
    assert (event, request.expiration) == (b"[1]", "5000")
    response = b"\xc3\xbc \xff"
    channel.basic_publish("", request.reply_to, response)
    assert (ran.result().returncode, ran.result().stdout) == (0, f"{os.fsdecode(response)}\n")


def test_a_channel_serves_several_invocations(rabbitmq, channel, queue, pool):
    """No reply queue is left, and each invocation has an ID of its own."""
    ids = set()
    with connect(rabbitmq) as connection:
        invoking_channel = connection.channel()
        for event in b"1", b"2":
            response = pool.submit(amqp_invoke.invoke, invoking_channel, queue, event)
            request, _ = next_request(channel, queue)
            assert request.expiration == "30000"
            ids.add(request.correlation_id)
            channel.basic_publish("", request.reply_to, b"response to " + event)
            assert response.result() == b"response to " + event
            assert count_consumers(rabbitmq, request.reply_to) is None
    assert len(ids) == 2


def test_the_client_gives_up_and_nobody_else_reads_replies(rabbitmq, channel, queue, pool):
    ran = pool.submit(invoke_by_amqp, rabbitmq, queue, "--timeout", "1")
    request, event = next_request(channel, queue)
    assert event == b"{}"
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="RESOURCE_LOCKED"):
        channel.connection.channel().basic_get(request.reply_to)
    message = f"no response from {queue} within 1 s\n"
    assert (ran.result().returncode, ran.result().stderr) == (1, message)


def test_the_client_gives_up_on_a_silent_broker():
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts, but says nothing
        broker = f"127.0.0.1:{server.getsockname()[1]}"
        environment = os.environ | {"AMQP_URI": f"amqp://{broker}?{AMQP_PARAMETERS}"}
        command = sys.executable, amqp_invoke.__file__, "function", "--timeout", "1.5"
        ran = run(*command, env=environment, timeout=12)
    assert ran.returncode == 1
    assert ran.stderr.startswith(f"no RabbitMQ at {broker}, or access denied: ")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("amqp://lambda:secret%20word@{broker}", "nothing serves no-function: {broker} has no"),
        ("amqp://lambda:secret@{broker}", "no RabbitMQ at {broker}:5672, or access denied: "),
        (f"amqp://user:secret@localhost:{{port}}?{AMQP_PARAMETERS}", "no RabbitMQ at localhost:"),
        ("amqp://user:secret@no-such-host.invalid", "no RabbitMQ at no-such-host.invalid:5672"),
        ("amqp://user:secret/@localhost", "AMQP_URI must have the form amqp://"),
        ("secret@localhost", "AMQP_URI must have the form amqp://"),
    ],
    ids=["no queue", "wrong password", "no broker", "no such host", "unquoted slash", "no scheme"],
)
def test_the_client_fails_with_one_line_and_no_password(rabbitmq, uri, message):
    places = {"broker": rabbitmq, "port": free_port()}
    environment = os.environ | {"AMQP_URI": uri.format(**places)}
    ran = run(sys.executable, amqp_invoke.__file__, "no-function", env=environment, timeout=60)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(message.format(**places))
    assert "secret" not in ran.stderr
