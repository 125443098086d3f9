"""The Lambda Runtime API Daemon in place of the emulator.

The tests against the real Daemon need its path in LAMBDA_RUNTIME_API_DAEMON. Those of what the run script tells it need
only a stand-in, and those of the AMQP client only RabbitMQ.
"""

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
import uuid
from pathlib import Path

import amqp_invoke as example
import pika
import pytest
from helpers import (
    AMQP_PASSWORD,
    AMQP_USERNAME,
    AWS_CLI,
    CREDENTIALS,
    HELLO,
    NAME,
    ROOT,
    TEST_IMAGE,
    amqp_invoke,
    build,
    connect,
    copy_misbehaving_sample,
    first_base_image,
    once,
    real_daemon,
    run,
    running,
    wait_until,
)

TIMEOUT = 4


@contextlib.contextmanager
def with_daemon(way, sample, daemon, *arguments, **environment):
    """The running sample with that Daemon."""
    option, more = way
    with running(sample, option, *arguments, LAMBDA_RUNTIME_API_DAEMON=daemon, **more, **environment) as started:
        yield started


# --- What the run script checks, and what it tells the Daemon ---


@pytest.mark.parametrize("daemon", ["nothing", "a folder", "not executable"])
def test_a_daemon_that_cannot_run_fails_with_one_line(sample, tmp_path, daemon):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "not executable").touch()
    path = str(tmp_path / daemon)
    ran = run(sample / f"{NAME}.sh", env=os.environ | {"LAMBDA_RUNTIME_API_DAEMON": path})
    assert ran.returncode == 1
    assert ran.stderr == f"{NAME}: LAMBDA_RUNTIME_API_DAEMON: {path} is not an executable file\n"


def test_the_daemon_replaces_the_emulator(way, sample, stand_in):
    with with_daemon(way, sample, stand_in) as started:
        told = json.loads(started.invoke(function=NAME))
        in_docker = way[0] == "--docker"
        assert told["argv"][-1] == "lambda_function.lambda_handler"
        assert told["argv"][0] == ("/usr/local/bin/aws-lambda-rie" if in_docker else stand_in)
        assert not [argument for argument in told["argv"] if argument.startswith("--")]
        assert told["environ"]["AWS_LAMBDA_FUNCTION_NAME"] == NAME
        assert told["environ"]["MAX_CONCURRENCY"] == "1"
        broker = "host.docker.internal" if in_docker else "localhost"
        options = "connection_attempts=1000000&retry_delay=10&heartbeat=10"
        assert told["environ"]["AMQP_URI"] == f"amqp://{broker}:5672?{options}"
        assert bool(told["broker"]) == in_docker
        assert f"/functions/{NAME}/invocations" in started.output


def test_the_daemon_gets_its_settings_from_the_environment(way, sample, stand_in):
    settings = {
        "AMQP_URI": "amqp://one:two@broker.example.com:1234",
        "AMQP_USERNAME": AMQP_USERNAME,
        "AMQP_PASSWORD": AMQP_PASSWORD,
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "7",
        "MAX_CONCURRENCY": "4",
    }
    with with_daemon(way, sample, stand_in, **settings) as started:
        environ = json.loads(started.invoke(function=NAME))["environ"]
        assert settings["AMQP_URI"] not in started.output
    assert environ["MAX_CONCURRENCY"] == "4"
    assert {name: environ[name] for name in settings} == settings
    assert "AWS_LAMBDA_MAX_CONCURRENCY" not in environ


def test_a_relative_path_of_the_daemon_starts_at_the_working_directory(sample, stand_in):
    relative = os.path.relpath(stand_in, "/")  # the tests run the script from /
    with running(sample, "--no-docker", LAMBDA_RUNTIME_API_DAEMON=relative) as started:
        assert json.loads(started.invoke(function=NAME))["argv"][0] == stand_in


# --- The real Daemon ---


@pytest.fixture(scope="module")
def daemon():
    return real_daemon()


@pytest.fixture(scope="module")
def broker(daemon, rabbitmq):
    """The settings for the broker, for a way to run the sample."""

    def settings(way):
        host = "host.docker.internal" if way[0] == "--docker" else "localhost"
        return {"AMQP_URI": f"amqp://{host}:{rabbitmq}", "AMQP_USERNAME": AMQP_USERNAME, "AMQP_PASSWORD": AMQP_PASSWORD}

    return settings


@pytest.fixture(scope="module")
def misbehaving_copy(folder, sample):
    return copy_misbehaving_sample(folder / "misbehaving with the daemon", sample)


@pytest.fixture(scope="module")
def daemon_run(way, daemon, broker, misbehaving_copy):
    """The sample under the real Daemon, with a function that does what the event says."""
    timeout = {"AWS_LAMBDA_FUNCTION_TIMEOUT": str(TIMEOUT)}
    with with_daemon(way, misbehaving_copy, daemon, **broker(way), **timeout) as started:
        yield started


@pytest.fixture(params=["HTTP", "HTTP with the name function", "AMQP"])
def invoke(request, daemon_run, rabbitmq):
    """Invokes the function and returns its answer, by each way in."""
    if request.param != "AMQP":
        function = "function" if "function" in request.param else NAME
        return lambda event: json.loads(daemon_run.invoke(event, function))

    def by_amqp(event):
        with connect(rabbitmq) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            return json.loads(example.invoke(channel, NAME, event))

    wait_until(lambda: amqp_invoke(rabbitmq, NAME).returncode == 0)
    return by_amqp


def test_the_daemon_answers_and_the_extension_logs_the_event(daemon_run, invoke):
    with daemon_run.receives():
        assert invoke(b'{"key": "value"}') == {"key": "value"}


def test_the_daemon_answers_a_hundred_invocations_in_a_row(daemon_run, invoke):
    with daemon_run.receives(100):
        assert all(invoke(b'{"number": %d}' % number) == {"number": number} for number in range(100))


def test_the_daemon_passes_five_megabytes(invoke):
    event = {"data": "x" * 5_000_000}
    assert invoke(json.dumps(event).encode()) == event


def test_the_daemon_answers_errors_and_continues(invoke):
    assert invoke(b'{"raise": "no"}')["errorType"] == "ValueError"
    assert invoke(b"{not json")["errorType"] == "Runtime.UnmarshalError"
    assert invoke(b'{"still": "here"}') == {"still": "here"}


def test_the_daemon_answers_a_timeout_and_continues(invoke):
    assert f"Task timed out after {TIMEOUT}.00 seconds" in invoke(b'{"sleep": 10}')["errorMessage"]
    wait_until(lambda: invoke(b'{"still": "here"}') == {"still": "here"})


def test_the_daemon_restarts_a_function_whose_process_dies(invoke):
    assert "Task timed out" in invoke(b'{"exit": 3}')["errorMessage"]
    wait_until(lambda: invoke(b'{"still": "here"}') == {"still": "here"})


@pytest.mark.slow
def test_the_aws_cli_and_boto3_reach_the_daemon_by_the_real_name(daemon_run, tmp_path):
    command = [*AWS_CLI, "lambda", "invoke", "--endpoint-url", daemon_run.endpoint]
    answer = tmp_path / "answer.json"
    options = ["--function-name", NAME, "--payload", '{"key": "value"}', answer]
    invoked = run(*command, *options, env=os.environ | CREDENTIALS)
    assert invoked.returncode == 0, invoked.stderr
    assert json.loads(answer.read_text()) == {"key": "value"}
    assert daemon_run.boto3_answer(NAME) == {"key": "value"}


def test_the_daemon_listens_on_loopback_only(daemon_run):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", daemon_run.port))


def test_the_daemon_runs_up_to_max_concurrency_invocations_at_once(way, daemon, broker, misbehaving_copy):
    settings = broker(way) | {"MAX_CONCURRENCY": "4", "AWS_LAMBDA_FUNCTION_TIMEOUT": "30"}
    with with_daemon(way, misbehaving_copy, daemon, **settings) as started:
        threads = [threading.Thread(target=started.invoke, args=(b'{"sleep": 4}', NAME)) for _ in range(4)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
            time.sleep(0.2)  # of invocations that arrive within a millisecond it may start a runtime for one only
        for thread in threads:
            thread.join()
        assert time.monotonic() - start < 12  # one after the other they would take sixteen seconds
        assert started.stop()[0] == 0


def test_without_a_broker_http_works_and_the_daemon_keeps_trying(way, daemon, misbehaving_copy):
    with with_daemon(way, misbehaving_copy, daemon) as started:
        wait_until(lambda: "AMQP Connection Opening" in started.output)
        assert json.loads(started.invoke(b'{"key": 1}', NAME)) == {"key": 1}
        assert "retry=2" in wait_until(lambda: "retry=2" in started.output and started.output, 30)
        assert json.loads(started.invoke(b'{"key": 2}', NAME)) == {"key": 2}


def messages_are_answered(channel, queue, count, meanwhile=lambda answered: None):
    """Publishes that many messages to the queue and returns the answers, by the number of the message."""
    answers = channel.queue_declare("", exclusive=True).method.queue
    for number in range(count):
        properties = pika.BasicProperties(reply_to=answers, correlation_id=str(number))
        channel.basic_publish("", queue, b'{"sleep": 0.05, "environ": true}', properties)
    answered = {}
    for method, properties, answer in channel.consume(answers, auto_ack=True, inactivity_timeout=60):
        assert method, f"{len(answered)} of {count} answered"
        answered[int(properties.correlation_id)] = json.loads(answer)
        meanwhile(answered)
        if len(answered) == count:
            return answered


def pids(program, variable):
    """The process ids of a program, by its path or script, with that variable, as NAME=VALUE, in its environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, variables = ((process / file).read_text().split("\0") for file in ("cmdline", "environ"))
            if variable in variables and (words[0] == program or words[-2].endswith(program)):
                found.append(int(process.name))
    return found


def extensions_of(function):
    return pids("/extension.py", f"AWS_LAMBDA_FUNCTION_NAME={function}")


def test_a_killed_extension_restarts_and_every_message_is_answered(way, daemon, broker, rabbitmq, misbehaving_copy):
    name = f"killed-{uuid.uuid4()}"
    settings = broker(way) | {"AWS_LAMBDA_FUNCTION_TIMEOUT": str(TIMEOUT)}
    with contextlib.ExitStack() as stack:
        started = stack.enter_context(
            with_daemon(way, misbehaving_copy, daemon, "-e", f"AWS_LAMBDA_FUNCTION_NAME={name}", **settings)
        )
        channel = stack.enter_context(connect(rabbitmq)).channel()
        wait_until(lambda: channel.connection.is_open and has_queue(rabbitmq, name))
        killed = []

        def kill(answered):
            if len(answered) == 20:
                killed.extend(extensions_of(name))
                os.kill(killed[0], signal.SIGKILL)

        answers = messages_are_answered(channel, name, 100, kill)
        timed_out = [answer for answer in answers.values() if "errorMessage" in answer]
        assert len(timed_out) <= 5  # what the copy had taken from the queue
        assert json.loads(started.invoke(b'{"still": "here"}', name)) == {"still": "here"}
        assert len(killed) == len(extensions_of(name)) == 1
        assert extensions_of(name) != killed


def test_an_extension_that_ends_before_it_registers_is_started_again(way, daemon, copy):
    extension = copy / NAME / "extension.py"
    with once("os._exit(1)") as line:
        extension.write_text(f"import os\n{line}{extension.read_text()}")
        with with_daemon(way, copy, daemon, AMQP_URI="") as started:

            def answer():
                with contextlib.suppress(OSError):  # the invocation that started it gets no answer
                    return started.invoke(function=NAME, timeout=5)

            assert json.loads(wait_until(answer, 60)) == HELLO


def has_queue(rabbitmq, name):
    with connect(rabbitmq) as connection, contextlib.suppress(pika.exceptions.ChannelClosedByBroker):
        return connection.channel().queue_declare(name, passive=True)


def test_copies_share_a_queue_and_nothing_is_lost_when_one_is_killed(daemon, broker, rabbitmq, misbehaving_copy):
    way, name = ("--no-docker", {}), "copies"
    with contextlib.ExitStack() as stack:
        copies = []
        for number in range(3):
            variables = ["-e", f"AWS_LAMBDA_FUNCTION_NAME={name}", "-e", f"COPY={number}"]
            copies.append(stack.enter_context(with_daemon(way, misbehaving_copy, daemon, *variables, **broker(way))))

        def kill(answered):
            if len(answered) == 20:
                os.kill(*pids(daemon, f"PORT={copies[1].port}"), signal.SIGKILL)

        with connect(rabbitmq) as connection:
            channel = connection.channel()
            wait_until(lambda: channel.queue_declare(name, passive=True).method.consumer_count == 3)
            answers = messages_are_answered(channel, name, 90, kill)
        assert {answer["COPY"] for answer in answers.values()} == {"0", "1", "2"}
        assert copies[1].process.wait() == 1
        assert json.loads(copies[0].invoke(b'{"still": "here"}', NAME)) == {"still": "here"}


@pytest.mark.parametrize("example", ["compose.yaml", "kubernetes.yaml"])
def test_stopping_one_of_three_copies_as_an_example_does_loses_no_message(
    example, daemon, engine, broker, rabbitmq, misbehaving_copy
):
    text = (ROOT / "examples" / example).read_text()
    options = [f"--stop-signal={name}" for name in re.findall(r"stop_signal: (\w+)", text)]
    command = [word for words in re.findall(r" command: (.*)", text) for word in json.loads(words)]
    image = build(misbehaving_copy, f"{TEST_IMAGE}:copies", first_base_image())
    settings = broker(("--docker", {})) | {"AWS_LAMBDA_FUNCTION_NAME": example, "AWS_LAMBDA_FUNCTION_TIMEOUT": "10"}
    options += [f"--env={name}={value}" for name, value in settings.items()]
    options += ["--add-host=host.docker.internal:host-gateway", f"--volume={daemon}:/usr/local/bin/aws-lambda-rie:ro"]
    start = "docker", "run", "--rm", "--detach", *options, *(["--entrypoint", command[0]] if command else []), image
    copies = []

    def stop(answered):
        if len(answered) == 20:
            run("docker", "stop", "--time", "1", copies[1])

    try:
        with connect(rabbitmq) as connection:
            copies += [run(*start, *command[1:]).stdout.strip() for _ in range(3)]
            channel = connection.channel()
            wait_until(lambda: (queue := has_queue(rabbitmq, example)) and queue.method.consumer_count == 3)
            assert len(messages_are_answered(channel, example, 100, stop)) == 100
    finally:
        run("docker", "kill", *copies)


def test_hello_from_lambda_through_the_daemon(way, sample, daemon, broker, rabbitmq):
    name = "hello"  # a queue of its own
    with with_daemon(way, sample, daemon, "-e", f"AWS_LAMBDA_FUNCTION_NAME={name}", **broker(way)) as started:
        assert json.loads(started.invoke(function=name)) == HELLO
        wait_until(lambda: amqp_invoke(rabbitmq, name).returncode == 0)
        assert json.loads(amqp_invoke(rabbitmq, name, '{"key": "value"}').stdout) == HELLO
        assert started.stop()[1] < 2
