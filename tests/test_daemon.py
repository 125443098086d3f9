"""The Lambda Runtime API Daemon in place of the emulator, on this machine, and in the examples for several."""

import contextlib
import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor

import amqp_invoke as client
import pika
import pytest
from engine import build, first_base_image
from machine import ROOT, real_daemon, run, tool, wait_until
from rabbitmq import PASSWORD, USERNAME, invoke_by_amqp, rabbitmq_image
from running import Running
from sample import HELLO, NAME, copy_sample, misbehave, once, replace

CREDENTIALS = {"AMQP_USERNAME": USERNAME, "AMQP_PASSWORD": PASSWORD}
TIMEOUT = {"AWS_LAMBDA_FUNCTION_TIMEOUT": "4"}
COMPOSE, MANIFEST = ROOT / "examples" / "compose.yaml", ROOT / "examples" / "kubernetes.yaml"


@pytest.mark.parametrize("daemon", ["/nothing", "/tmp", "/etc/passwd"])
def test_a_daemon_that_cannot_run_fails_with_one_line(sample, daemon):
    ran = run(sample / f"{NAME}.sh", env=os.environ | {"LAMBDA_RUNTIME_API_DAEMON": daemon})
    line = f"{NAME}: LAMBDA_RUNTIME_API_DAEMON: {daemon} is not an executable file\n"
    assert (ran.returncode, ran.stderr) == (1, line)


def test_the_daemon_replaces_the_emulator_on_loopback_and_its_path_may_be_relative(start, sample, stand_in):
    relative = os.path.relpath(stand_in, "/")  # the tests run the script from /
    with start(sample, LAMBDA_RUNTIME_API_DAEMON=relative, AWS_LAMBDA_MAX_CONCURRENCY="4", **TIMEOUT) as it:
        told = it.invoke(function=NAME)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", it.port))
        assert f"/functions/{NAME}/invocations" in it.output
    assert told["argv"][-1] == "lambda_function.lambda_handler"
    assert not [argument for argument in told["argv"] if argument.startswith("--")]
    options = "connection_attempts=1000000&retry_delay=10&heartbeat=10"
    variables = {"AWS_LAMBDA_FUNCTION_NAME": NAME, "MAX_CONCURRENCY": "1", **TIMEOUT}
    variables["AMQP_URI"] = f"amqp://{start.machine}:5672?{options}"
    assert variables.items() <= told["environ"].items()
    assert "AWS_LAMBDA_MAX_CONCURRENCY" not in told["environ"]
    assert start.machine in told["hosts"]


def consumers(rabbitmq, queue):
    """How many consumers the queue has, or None if there is no such queue."""
    with rabbitmq.connect() as connection, contextlib.suppress(pika.exceptions.ChannelClosedByBroker):
        return connection.channel().queue_declare(queue, passive=True).method.consumer_count


@pytest.fixture(scope="module")
def daemon_run(start, rabbitmq, folder, sample):
    """The real Daemon with a function that does what the event says."""
    environment = CREDENTIALS | TIMEOUT | {"AMQP_URI": f"amqp://{rabbitmq.host}"}
    copy = misbehave(copy_sample(folder / f"daemon {start.option}", sample))
    with start(copy, LAMBDA_RUNTIME_API_DAEMON=real_daemon(), **environment) as it:
        wait_until(lambda: consumers(rabbitmq, NAME))
        yield it


@pytest.fixture(params=["HTTP", "AMQP"])
def invoke(request, daemon_run, rabbitmq):
    """Invokes that function with an event and returns its answer, by each way in."""
    with rabbitmq.connect() as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        if request.param == "HTTP":
            yield lambda event: daemon_run.invoke(event, NAME)
        else:
            yield lambda event: json.loads(client.invoke(channel, NAME, json.dumps(event).encode()))


def test_the_daemon_answers_a_hundred_invocations_and_the_extension_logs_them(daemon_run, invoke):
    before = len(daemon_run.received)
    assert all(invoke({"number": number}) == {"number": number} for number in range(100))
    wait_until(lambda: len(daemon_run.received) == before + 100)


@pytest.mark.parametrize(("event", "message"), [({"raise": "no"}, "no"), ({"sleep": 6}, "out"), ({"exit": 3}, "out")])
def test_the_daemon_answers_an_error_and_continues(invoke, event, message):
    assert re.search(f"^{message}$|Task timed {message} after 4", invoke(event)["errorMessage"])
    wait_until(lambda: invoke({"still": "here"}) == {"still": "here"})


def test_without_a_broker_http_works_concurrently_until_the_run_ends_with_a_shutdown(start, misbehaving):
    settings = {"LAMBDA_RUNTIME_API_DAEMON": real_daemon(), "MAX_CONCURRENCY": "2", "AWS_LAMBDA_FUNCTION_TIMEOUT": "60"}
    with ThreadPoolExecutor() as pool, start(misbehaving, **settings) as it:
        pool.submit(it.invoke, {"sleep": 40}, NAME)
        wait_until(lambda: it.received)
        assert it.invoke({"key": 1}, NAME) == {"key": 1}
        wait_until(lambda: "retry=2" in it.output, 30)
        assert it.invoke({"key": 2}, NAME) == {"key": 2}
        it.ends_cleanly()


@pytest.mark.parametrize(("indent", "where"), [("", "from lifecycle"), ("    ", "log(f")])
def test_an_extension_that_dies_at_its_start_or_with_an_event_is_started_again(start, copy, tmp_path, indent, where):
    line = once(tmp_path, "os._exit(1)")
    replace(copy / NAME / "extension.py", f"{indent}{where}", f"{indent}{line}{indent}{where}")
    replace(copy / NAME / "extension.py", "import json\n", "import json\nimport os\n")
    with start(copy, LAMBDA_RUNTIME_API_DAEMON=real_daemon(), AMQP_URI="", **TIMEOUT) as it:

        def answer():
            with contextlib.suppress(OSError):  # the invocation that started it gets no answer
                return it.invoke(function=NAME, timeout=5)

        wait_until(lambda: answer() == HELLO, 60)


@pytest.mark.parametrize("example", [COMPOSE, MANIFEST])
def test_stopping_one_of_three_copies_as_an_example_does_loses_no_message(example, engine, rabbitmq, misbehaving):
    name, text = example.stem, example.read_text()
    signals, commands = re.findall(r"stop_signal: (\w+)", text), re.findall(r" command: (.*)", text)
    words = [word for command in commands for word in json.loads(command)]
    settings = CREDENTIALS | {"AWS_LAMBDA_FUNCTION_NAME": name, "AWS_LAMBDA_FUNCTION_TIMEOUT": "10"}
    settings["AMQP_URI"] = f"amqp://{rabbitmq.host}"
    options = [f"--env={key}={value}" for key, value in settings.items()]
    options += [f"--stop-signal={signal}" for signal in signals] + [f"--entrypoint={word}" for word in words[:1]]
    options += [f"--volume={real_daemon()}:/usr/local/bin/aws-lambda-rie"]
    options.append(build(misbehaving, "copies", first_base_image()))
    answered, containers = {}, []
    with rabbitmq.connect() as connection, contextlib.ExitStack() as stack:
        for number in "123":
            started = run("docker", "run", "--rm", "--detach", f"--env=COPY={number}", *options, *words[1:])
            containers.append(started.stdout.strip())
            stack.callback(run, "docker", "kill", containers[-1])
        wait_until(lambda: consumers(rabbitmq, name) == 3)
        channel = connection.channel()
        answers = channel.queue_declare("", exclusive=True).method.queue
        for number in range(100):
            properties = pika.BasicProperties(reply_to=answers, correlation_id=str(number))
            channel.basic_publish("", name, b'{"sleep": 0.05, "environ": true}', properties)
        for method, properties, answer in channel.consume(answers, auto_ack=True, inactivity_timeout=60):
            assert method, f"{len(answered)} of 100 answered"
            answered[properties.correlation_id] = json.loads(answer).get("COPY")
            if len(answered) == 20:
                run("docker", "stop", "--time", "1", containers[1])
            if len(answered) == 100:
                break
    assert set(answered.values()) == {*"123"}


@pytest.mark.slow
def test_compose_starts_broker_daemon_and_function(engine):
    environment = os.environ | {"LAMBDA_RUNTIME_API_DAEMON": real_daemon(), "AMQP_PASSWORD": PASSWORD}
    environment |= {"BASE_IMAGE": first_base_image(), "COMPOSE_PROJECT_NAME": f"{NAME}-test", "DOCKER_BUILDKIT": "0"}
    plugin = run("docker", "compose", "version").returncode == 0
    compose = [*(["docker", "compose"] if plugin else [tool("docker-compose")]), "--file", COMPOSE]
    rabbitmq_image()
    try:
        up = run(*compose, "up", "--build", "--detach", env=environment)  # docker-compose 1 has no --wait
        assert up.returncode == 0, up.stdout + up.stderr
        wait_until(lambda: invoke_by_amqp("localhost", NAME).stdout == f"{json.dumps(HELLO)}\n", 60)
        assert Running(["true"], "localhost", 8080).invoke(function=NAME) == HELLO
    finally:
        print(run(*compose, "logs", env=environment).stdout)
        down = run(*compose, "down", "--rmi", "local", "--volumes", env=environment)
    assert down.returncode == 0
