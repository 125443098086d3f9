"""The Lambda Runtime API Daemon in place of the emulator, and AMQP.

The tests against the real Daemon need its path in LAMBDA_RUNTIME_API_DAEMON. Those of what the run script tells it need
only a stand-in, and those of the AMQP client only RabbitMQ.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import pika
import pytest
from conftest import (
    CREDENTIALS,
    DAEMON,
    HELLO,
    NAME,
    ROOT,
    copy_misbehaving_sample,
    free_port,
    missing,
    run,
    running,
    wait_until,
)

USER, PASSWORD = "lambda", "secret word"  # a user that RabbitMQ lets in from anywhere
TIMEOUT = 2
STAND_IN = """#!/usr/bin/env python3
import http.server, json, os, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            broker = socket.gethostbyname("host.docker.internal")
        except OSError:
            broker = None
        told = {"environ": dict(os.environ), "argv": sys.argv, "broker": broker}
        self.wfile.write(json.dumps(told).encode())
    do_POST = do_GET
    def log_message(self, *args):
        pass
address = os.environ.get("INVOKE_API_HOST", "0.0.0.0"), int(os.environ.get("PORT", 8080))
http.server.HTTPServer(address, Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def stand_in(folder):
    """A program that takes the Daemon's place and answers what it was told."""
    path = folder / "stand-in daemon"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    return str(path)


@contextlib.contextmanager
def with_daemon(way, sample, daemon, *arguments, **environment):
    """The running sample with that Daemon."""
    option, more = way
    with running(sample, option, *arguments, LAMBDA_RUNTIME_API_DAEMON=daemon, **more, **environment) as started:
        yield started


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory):
    """A RabbitMQ of the tests' own, in reach of this machine and its containers; gives its port."""
    server = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    if not os.path.exists(server):
        missing("no RabbitMQ on this machine")
    folder, port, epmd_port = tmp_path_factory.mktemp("rabbitmq"), free_port(), free_port()
    gateway = run("docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}")
    addresses = ["127.0.0.1", *gateway.stdout.split()] if shutil.which("docker") else ["127.0.0.1"]
    listeners = [f"listeners.tcp.{number} = {address}:{port}" for number, address in enumerate(addresses, 1)]
    (folder / "rabbitmq.conf").write_text("\n".join([*listeners, f"load_definitions = {folder}/definitions.json", ""]))
    allow = {"vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
    users = {"guest": "guest", USER: PASSWORD}
    definitions = {
        "vhosts": [{"name": "/"}],
        "users": [{"name": user, "password": password, "tags": ""} for user, password in users.items()],
        "permissions": [{"user": user, **allow} for user in users],
    }
    (folder / "definitions.json").write_text(json.dumps(definitions))
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(folder),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd_port),
        "RABBITMQ_NODENAME": "tests@localhost",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(folder),
        "RABBITMQ_LOG_BASE": str(folder),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
    }
    process = subprocess.Popen([server], env=environment, stdout=subprocess.DEVNULL, start_new_session=True)

    def up():
        assert process.poll() is None, "RabbitMQ ended"
        with contextlib.suppress(pika.exceptions.AMQPError), connect(port):
            return True

    wait_until(up, 60)
    yield port
    process.terminate()
    process.wait()
    run("epmd", "-port", str(epmd_port), "-kill", env=environment | {"ERL_EPMD_RELAXED_COMMAND_CHECK": "true"})


def connect(port):
    return pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))


def amqp_invoke(port, *arguments):
    """Runs the example client."""
    uri = f"amqp://{USER}:{PASSWORD.replace(' ', '%20')}@localhost:{port}"
    return run(sys.executable, ROOT / "examples" / "amqp_invoke.py", *arguments, env=os.environ | {"AMQP_URI": uri})


# --- What the run script checks, and what it tells the Daemon ---


@pytest.mark.parametrize("problem", ["there is no file", "is not executable"])
def test_a_daemon_that_cannot_be_run_is_one_line_and_exit_status_1(sample, tmp_path, problem):
    daemon = tmp_path / "daemon"
    if problem == "is not executable":
        daemon.write_text(STAND_IN)
    for path in [daemon] if problem == "is not executable" else [daemon, tmp_path]:
        environment = os.environ | {"LAMBDA_RUNTIME_API_DAEMON": str(path)}
        ran = run(sample / f"{NAME}.sh", env=environment)
        assert ran.returncode == 1
        assert ran.stderr.count("\n") == 1
        assert "LAMBDA_RUNTIME_API_DAEMON" in ran.stderr
        assert problem in ran.stderr


def test_the_daemon_takes_the_place_of_the_emulator(way, sample, stand_in):
    with with_daemon(way, sample, stand_in) as started:
        told = json.loads(started.invoke(function=NAME))
        in_docker = way[0] == "--docker"
        assert told["argv"][-1] == "lambda_function.lambda_handler"
        assert told["argv"][0] == ("/usr/local/bin/aws-lambda-rie" if in_docker else stand_in)
        assert not [argument for argument in told["argv"] if argument.startswith("--")]
        assert told["environ"]["AWS_LAMBDA_FUNCTION_NAME"] == NAME
        assert told["environ"]["MAX_CONCURRENCY"] == "1"
        broker = "host.docker.internal" if in_docker else "localhost"
        options = "connection_attempts=20&retry_delay=10&heartbeat=0"
        assert told["environ"]["AMQP_URI"] == f"amqp://{broker}:5672?{options}"
        assert bool(told["broker"]) == in_docker
        assert f"/functions/{NAME}/invocations" in started.output
        assert f"queue {NAME} at amqp://{broker}:5672" in started.output
        assert ("accepts user guest only from localhost" in started.output) == in_docker


def test_the_daemon_gets_what_the_environment_says(way, sample, stand_in):
    settings = {
        "AMQP_URI": "amqp://one:two@broker.example.com:1234",
        "AMQP_USERNAME": USER,
        "AMQP_PASSWORD": PASSWORD,
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "7",
        "MAX_CONCURRENCY": "4",
    }
    with with_daemon(way, sample, stand_in, **settings) as started:
        environ = json.loads(started.invoke(function=NAME))["environ"]
        assert settings["AMQP_URI"] not in started.output
        assert "broker.example.com:1234" in started.output
    assert environ["MAX_CONCURRENCY"] == "4"
    assert {name: environ[name] for name in settings} == settings
    assert "AWS_LAMBDA_MAX_CONCURRENCY" not in environ


def test_an_empty_amqp_uri_means_no_broker(way, sample, stand_in):
    with with_daemon(way, sample, stand_in, AMQP_URI="") as started:
        assert json.loads(started.invoke(function=NAME))["environ"]["AMQP_URI"] == ""
        assert "no broker" in started.output


def test_a_relative_path_of_the_daemon_is_from_where_the_user_is(sample, stand_in):
    relative = os.path.relpath(stand_in, "/")  # the tests run the script from /
    with running(sample, "--no-docker", LAMBDA_RUNTIME_API_DAEMON=relative) as started:
        assert json.loads(started.invoke(function=NAME))["argv"][0] == stand_in


# --- The AMQP client ---


@pytest.fixture
def queue(rabbitmq):
    """A queue of a name of its own, and the messages that were sent to it, as (properties, body)."""
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


def test_the_client_prints_the_answer_that_is_its_own(rabbitmq, queue):
    name, messages = queue
    ran = amqp_invoke(rabbitmq, name, '{"key": "value"}')
    assert (ran.returncode, ran.stdout) == (0, 'answer to {"key": "value"}\n')
    ((properties, _),) = messages
    assert properties.content_type == "application/json"
    assert properties.reply_to


def test_the_client_says_when_there_is_no_answer_in_time(rabbitmq, queue):
    ran = amqp_invoke(rabbitmq, queue[0], '"keep quiet"', "--timeout", "0.5")
    assert (ran.returncode, ran.stderr) == (1, f"no answer from {queue[0]} within 0.5 s\n")


def test_the_client_says_when_nothing_serves_the_function(rabbitmq):
    ran = amqp_invoke(rabbitmq, "no-such-function")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "nothing serves the function no-such-function" in ran.stderr


def test_the_client_says_when_there_is_no_broker():
    ran = amqp_invoke(free_port(), NAME)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith("no RabbitMQ at localhost:")
    assert "secret" not in ran.stderr


# --- The real Daemon ---


@pytest.fixture(scope="module")
def daemon():
    return DAEMON or pytest.skip("LAMBDA_RUNTIME_API_DAEMON names no Lambda Runtime API Daemon")


@pytest.fixture(scope="module")
def broker(daemon, rabbitmq):
    """The settings for the broker, for a way to run the sample."""

    def settings(way):
        host = "host.docker.internal" if way[0] == "--docker" else "localhost"
        return {"AMQP_URI": f"amqp://{host}:{rabbitmq}", "AMQP_USERNAME": USER, "AMQP_PASSWORD": PASSWORD}

    return settings


@pytest.fixture(scope="module")
def misbehaving_copy(folder):
    return copy_misbehaving_sample(folder / "misbehaving with the daemon")


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

    from_examples = str(ROOT / "examples")
    sys.path.insert(0, from_examples)
    from amqp_invoke import invoke

    def by_amqp(event):
        with connect(rabbitmq) as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            return json.loads(invoke(channel, NAME, event))

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


def test_the_daemon_answers_errors_and_goes_on(invoke):
    assert invoke(b'{"raise": "no"}')["errorType"] == "ValueError"
    assert invoke(b"{not json")["errorType"] == "Runtime.UnmarshalError"
    assert invoke(b'{"still": "here"}') == {"still": "here"}


def test_the_daemon_answers_a_timeout_and_goes_on(invoke):
    assert f"Task timed out after {TIMEOUT}.00 seconds" in invoke(b'{"sleep": 3}')["errorMessage"]
    wait_until(lambda: invoke(b'{"still": "here"}') == {"still": "here"})


def test_the_daemon_starts_a_function_whose_process_dies_anew(invoke):
    assert "Task timed out" in invoke(b'{"exit": 3}')["errorMessage"]
    wait_until(lambda: invoke(b'{"still": "here"}') == {"still": "here"})


def test_the_aws_cli_and_boto3_reach_the_daemon_by_the_real_name(daemon_run, tmp_path):
    command = [sys.executable, "-m", "awscli", "lambda", "invoke", "--endpoint-url", daemon_run.endpoint]
    answer = tmp_path / "answer.json"
    options = ["--function-name", NAME, "--payload", '{"key": "value"}', answer]
    invoked = run(*command, *options, env=os.environ | CREDENTIALS)
    assert invoked.returncode == 0, invoked.stderr
    assert json.loads(answer.read_text()) == {"key": "value"}
    assert daemon_run.boto3_answer(NAME) == {"key": "value"}


def test_the_daemon_listens_on_loopback_only(daemon_run):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", daemon_run.port))


def test_the_daemon_runs_as_many_invocations_at_a_time_as_told(way, daemon, broker, misbehaving_copy):
    settings = broker(way) | {"MAX_CONCURRENCY": "4", "AWS_LAMBDA_FUNCTION_TIMEOUT": "30"}
    with with_daemon(way, misbehaving_copy, daemon, **settings) as started:
        threads = [threading.Thread(target=started.invoke, args=(b'{"sleep": 2}', NAME)) for _ in range(4)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start < 6  # one after the other they would take eight seconds
        assert started.stop()[0] == 0


def test_without_a_broker_http_works_and_the_terminal_says_so(way, daemon, misbehaving_copy):
    with with_daemon(way, misbehaving_copy, daemon, AMQP_URI=f"amqp://127.0.0.1:{free_port()}") as started:
        assert json.loads(started.invoke(b'{"key": 1}', NAME)) == {"key": 1}
        assert "Without a broker there, HTTP works all the same" in started.output
        wait_until(lambda: "failed to connect to AMQP broker" in started.output)


def test_copies_share_a_queue_and_nothing_is_lost_when_one_is_killed(daemon, broker, rabbitmq, misbehaving_copy):
    way, name = ("--no-docker", {}), "copies"
    with contextlib.ExitStack() as stack:
        copies = []
        for number in range(3):
            variables = ["-e", f"AWS_LAMBDA_FUNCTION_NAME={name}", "-e", f"COPY={number}"]
            copies.append(stack.enter_context(with_daemon(way, misbehaving_copy, daemon, *variables, **broker(way))))
        with connect(rabbitmq) as connection:
            channel = connection.channel()
            wait_until(lambda: channel.queue_declare(name, passive=True).method.consumer_count == 3)
            answers = channel.queue_declare("", exclusive=True).method.queue
            asked = {str(number) for number in range(90)}
            for number in asked:
                properties = pika.BasicProperties(reply_to=answers, correlation_id=number)
                channel.basic_publish("", name, b'{"sleep": 0.1, "environ": true}', properties)
            answered, by = set(), set()
            for method, properties, answer in channel.consume(answers, auto_ack=True, inactivity_timeout=20):
                assert method, f"no answer to {asked - answered}"
                answered.add(properties.correlation_id)
                by.add(json.loads(answer)["COPY"])
                if len(answered) == 20:
                    os.killpg(copies[1].process.pid, signal.SIGKILL)
                if answered == asked:
                    break
        assert by == {"0", "1", "2"}
        assert copies[1].process.wait() == -signal.SIGKILL
        assert json.loads(copies[0].invoke(b'{"still": "here"}', NAME)) == {"still": "here"}


def test_hello_from_lambda_through_the_daemon(way, sample, daemon, broker, rabbitmq):
    name = "hello"  # a queue of its own
    with with_daemon(way, sample, daemon, "-e", f"AWS_LAMBDA_FUNCTION_NAME={name}", **broker(way)) as started:
        assert json.loads(started.invoke(function=name)) == HELLO
        wait_until(lambda: amqp_invoke(rabbitmq, name).returncode == 0)
        assert json.loads(amqp_invoke(rabbitmq, name, '{"key": "value"}').stdout) == HELLO
        assert started.stop()[1] < 2
