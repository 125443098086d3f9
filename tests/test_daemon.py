"""The Lambda Runtime API Daemon in place of the emulator, on this machine, and in the examples for several."""

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import amqp_invoke as client
import pika
import pytest
from helpers import (
    AMQP_PASSWORD,
    AMQP_USERNAME,
    HELLO,
    NAME,
    ROOT,
    TEST_IMAGE,
    build,
    connect,
    copy_misbehaving_sample,
    docker_gateway,
    first_base_image,
    free_port,
    once,
    real_daemon,
    run,
    running,
    tool,
    wait_until,
)
from helpers import amqp_invoke as invoke_by_amqp

CREDENTIALS = {"AMQP_USERNAME": AMQP_USERNAME, "AMQP_PASSWORD": AMQP_PASSWORD}
COMPOSE, MANIFEST = ROOT / "examples" / "compose.yaml", ROOT / "examples" / "kubernetes.yaml"
# For machines that cannot pull the image. As in it, the server runs as user rabbitmq, and health checks as root.
RABBITMQ = """FROM {}
RUN apt-get update && apt-get install -y --no-install-recommends rabbitmq-server
ENV HOME=/var/lib/rabbitmq
ENTRYPOINT ["setpriv", "--reuid=rabbitmq", "--regid=rabbitmq", "--init-groups", "/usr/lib/rabbitmq/bin/rabbitmq-server"]
"""
TIMEOUT = {"AWS_LAMBDA_FUNCTION_TIMEOUT": "4"}


def with_daemon(way, sample, daemon, **environment):
    option, more = way
    return running(sample, option, LAMBDA_RUNTIME_API_DAEMON=daemon, **more, **environment)


@pytest.fixture(scope="module")
def host(way):
    """The name of this machine for what runs that way."""
    return "host.docker.internal" if way[0] == "--docker" else "localhost"


@pytest.fixture(scope="module")
def misbehaving_copy(folder, sample):
    return copy_misbehaving_sample(folder / "misbehaving with the daemon", sample)


@pytest.mark.parametrize("daemon", ["/nothing", "/tmp", "/etc/passwd"])
def test_a_daemon_that_cannot_run_fails_with_one_line(sample, daemon):
    ran = run(sample / f"{NAME}.sh", env=os.environ | {"LAMBDA_RUNTIME_API_DAEMON": daemon})
    line = f"{NAME}: LAMBDA_RUNTIME_API_DAEMON: {daemon} is not an executable file\n"
    assert (ran.returncode, ran.stderr) == (1, line)


def test_the_daemon_replaces_the_emulator_on_loopback(way, host, sample, stand_in):
    with with_daemon(way, sample, stand_in) as started:
        told = json.loads(started.invoke(function=NAME))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", started.port))
        assert f"/functions/{NAME}/invocations" in started.output
    assert told["argv"][-1] == "lambda_function.lambda_handler"
    assert not [argument for argument in told["argv"] if argument.startswith("--")]
    assert (told["environ"]["AWS_LAMBDA_FUNCTION_NAME"], told["environ"]["MAX_CONCURRENCY"]) == (NAME, "1")
    options = "connection_attempts=1000000&retry_delay=10&heartbeat=10"
    assert told["environ"]["AMQP_URI"] == f"amqp://{host}:5672?{options}"
    assert bool(told["broker"]) == (host != "localhost")


def test_the_daemon_has_its_settings_from_the_environment_and_its_path_may_be_relative(way, sample, stand_in):
    settings = CREDENTIALS | TIMEOUT | {"AMQP_URI": "amqp://one:two@broker.example.com:1234", "MAX_CONCURRENCY": "4"}
    relative = os.path.relpath(stand_in, "/")  # the tests run the script from /
    with with_daemon(way, sample, relative, AWS_LAMBDA_MAX_CONCURRENCY="4", **settings) as started:
        environ = json.loads(started.invoke(function=NAME))["environ"]
        assert settings["AMQP_URI"] not in started.output
    assert settings.items() <= environ.items()
    assert "AWS_LAMBDA_MAX_CONCURRENCY" not in environ


def consumers(rabbitmq, queue):
    """How many consumers the queue has, or None if there is no such queue."""
    with connect(rabbitmq) as connection, contextlib.suppress(pika.exceptions.ChannelClosedByBroker):
        return connection.channel().queue_declare(queue, passive=True).method.consumer_count


@pytest.fixture(scope="module")
def daemon_run(way, host, rabbitmq, misbehaving_copy):
    """The real Daemon with a function that does what the event says."""
    environment = CREDENTIALS | TIMEOUT | {"AMQP_URI": f"amqp://{host}:{rabbitmq}"}
    with with_daemon(way, misbehaving_copy, real_daemon(), **environment) as started:
        wait_until(lambda: consumers(rabbitmq, NAME))
        yield started


@pytest.fixture(params=["HTTP", "AMQP"])
def invoke(request, daemon_run, rabbitmq):
    """Invokes that function and returns its answer, by each way in."""
    with connect(rabbitmq) as connection:
        channel = connection.channel()
        channel.confirm_delivery()
        amqp = functools.partial(client.invoke, channel, NAME)
        http = functools.partial(daemon_run.invoke, function=NAME)
        yield lambda event: json.loads((http if request.param == "HTTP" else amqp)(event))


def test_the_daemon_answers_a_hundred_invocations_and_the_extension_logs_them(daemon_run, invoke):
    with daemon_run.receives(100):
        assert all(invoke(b'{"number": %d}' % number) == {"number": number} for number in range(100))


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (b'{"raise": "no"}', "no"),
        (b'{"sleep": 6}', "Task timed out after 4"),
        (b'{"exit": 3}', "Task timed out after 4"),
    ],
)
def test_the_daemon_answers_an_error_and_continues(invoke, event, message):
    assert message in invoke(event)["errorMessage"]
    wait_until(lambda: invoke(b'{"still": "here"}') == {"still": "here"})


def test_without_a_broker_http_works_concurrently_until_the_run_ends_with_a_shutdown(way, misbehaving_copy):
    settings = {"MAX_CONCURRENCY": "2", "AWS_LAMBDA_FUNCTION_TIMEOUT": "60"}
    with ThreadPoolExecutor() as pool, with_daemon(way, misbehaving_copy, real_daemon(), **settings) as started:
        pool.submit(started.invoke, b'{"sleep": 40}', NAME)
        wait_until(lambda: started.received)
        assert json.loads(started.invoke(b'{"key": 1}', NAME)) == {"key": 1}
        wait_until(lambda: "retry=2" in started.output, 30)
        assert json.loads(started.invoke(b'{"key": 2}', NAME)) == {"key": 2}
        assert started.stop()[0] == 0
        assert '"eventType": "SHUTDOWN"' in started.output


@pytest.mark.parametrize(
    ("indent", "where"), [("", "from lifecycle"), ("    ", "log(f")], ids=["starts", "gets an event"]
)
def test_an_extension_that_dies_is_started_again_when_it(way, copy, indent, where):
    extension = copy / NAME / "extension.py"
    with once("os._exit(1)") as line:
        source = extension.read_text().replace(f"{indent}{where}", f"{indent}{line}{indent}{where}")
        extension.write_text(f"import os\n{source}")
        with with_daemon(way, copy, real_daemon(), AMQP_URI="", **TIMEOUT) as started:

            def answer():
                with contextlib.suppress(OSError):  # the invocation that started it gets no answer
                    return json.loads(started.invoke(function=NAME, timeout=5))

            wait_until(lambda: answer() == HELLO, 60)


@pytest.mark.parametrize("example", [COMPOSE, MANIFEST], ids=["Compose", "Kubernetes"])
def test_stopping_one_of_three_copies_as_an_example_does_loses_no_message(example, engine, rabbitmq, misbehaving_copy):
    name, text = example.stem, example.read_text()
    options = [f"--stop-signal={signal}" for signal in re.findall(r"stop_signal: (\w+)", text)]
    command = [word for words in re.findall(r" command: (.*)", text) for word in json.loads(words)]
    options += [f"--entrypoint={word}" for word in command[:1]]
    settings = {"AWS_LAMBDA_FUNCTION_NAME": name, "AWS_LAMBDA_FUNCTION_TIMEOUT": "10"}
    settings |= CREDENTIALS | {"AMQP_URI": f"amqp://host.docker.internal:{rabbitmq}"}
    options += [f"--env={key}={value}" for key, value in settings.items()]
    options += [
        "--add-host=host.docker.internal:host-gateway",
        f"--volume={real_daemon()}:/usr/local/bin/aws-lambda-rie",
    ]
    image = build(misbehaving_copy, f"{TEST_IMAGE}:copies", first_base_image())
    answered, containers = {}, []
    with connect(rabbitmq) as connection, contextlib.ExitStack() as stack:
        for number in "123":
            start = "docker", "run", "--rm", "--detach", *options, f"--env=COPY={number}", image, *command[1:]
            containers.append(run(*start).stdout.strip())
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


def function_answers(port, broker_port):
    """Asserts that the function answers through RabbitMQ and over HTTP."""
    event = '{"key": "value"}'
    assert json.loads(wait_until(lambda: invoke_by_amqp(broker_port, NAME, event).stdout, 60)) == HELLO
    url = f"http://127.0.0.1:{port}/2015-03-31/functions/{NAME}/invocations"
    assert json.loads(run(tool("curl"), "-s", "-XPOST", url, "-d", event).stdout) == HELLO


@pytest.mark.slow
def test_compose_starts_broker_daemon_and_function(engine, tmp_path):
    environment = os.environ | {"LAMBDA_RUNTIME_API_DAEMON": real_daemon(), "AMQP_PASSWORD": AMQP_PASSWORD}
    environment |= {"BASE_IMAGE": first_base_image(), "COMPOSE_PROJECT_NAME": f"{NAME}-test", "DOCKER_BUILDKIT": "0"}
    plugin = run("docker", "compose", "version").returncode == 0
    compose = [*(["docker", "compose"] if plugin else [tool("docker-compose")]), "--file", COMPOSE]
    (broker,) = re.findall(r"image: (\S+)", COMPOSE.read_text())
    stand_in = all(run("docker", *command, broker).returncode != 0 for command in (["image", "inspect"], ["pull"]))
    if stand_in:
        (tmp_path / "Dockerfile").write_text(RABBITMQ.format(first_base_image()))
        build(tmp_path, broker, first_base_image())
    try:
        up = run(*compose, "up", "--build", "--detach", env=environment)  # docker-compose 1 has no --wait
        assert up.returncode == 0, up.stdout + up.stderr
        function_answers(8080, 5672)
    finally:
        print(run(*compose, "logs", env=environment).stdout)
        down = run(*compose, "down", "--rmi", "local", "--volumes", env=environment)
        run("docker", "rmi", *([broker] if stand_in else []))
    assert down.returncode == 0


@pytest.mark.slow
def test_the_manifest_is_valid():
    validated = run(tool("kubernetes-validate"), "--strict", MANIFEST)
    assert validated.returncode == 0, validated.stdout + validated.stderr


@pytest.mark.slow
def test_podman_plays_the_manifest(sample, engine, rabbitmq, tmp_path):
    podman, port, (host,) = tool("podman"), free_port(), docker_gateway()
    if re.search(r"version [1-4]\.", run(podman, "--version").stdout):
        pytest.skip("podman before 5 plays no such manifest")
    daemon, images = "lambda-runtime-api-daemon", re.findall(r"image: (\S+)", MANIFEST.read_text())
    shutil.copy(real_daemon(), tmp_path / daemon)
    (tmp_path / "Dockerfile").write_text(f'FROM scratch\nCOPY {daemon} /\nENTRYPOINT ["/{daemon}"]\n')
    for image, folder in zip(images, (tmp_path, sample), strict=True):
        build(folder, image, first_base_image())
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            subprocess.run([podman, "load"], stdin=saved.stdout, check=True, stdout=subprocess.DEVNULL)
    credentials = json.dumps({"username": AMQP_USERNAME, "password": AMQP_PASSWORD})
    secret = f"---\napiVersion: v1\nkind: Secret\nmetadata: {{name: rabbitmq}}\nstringData: {credentials}\n---\n"
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(secret + MANIFEST.read_text().replace("rabbitmq:5672", f"{host}:{rabbitmq}"))
    try:
        played = run(podman, "kube", "play", "--publish", f"127.0.0.1:{port}:8080", manifest)
        assert played.returncode == 0, played.stderr
        function_answers(port, rabbitmq)
    finally:
        print(run(podman, "pod", "logs", f"{NAME}-pod").stdout)
        run(podman, "kube", "down", "--force", manifest)
        run(podman, "rmi", "--force", *images)
        run("docker", "rmi", "--force", *images)
