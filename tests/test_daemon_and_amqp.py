"""The Lambda Runtime API Daemon in place of the emulator, and the examples for it.

These are the client, Compose and Kubernetes.
"""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import amqp_invoke as client
import pika
import pytest
from engine import assert_confined_as_on_lambda, build, first_base_image
from machine import ROOT, free_port, post, real_daemon, run, tool, wait_until, yaml_documents
from rabbitmq import PASSWORD, USERNAME, connect, invoke_by_amqp
from sample import HELLO, NAME, copy_sample, make_evaluating, make_scripted, once

BROKER_CREDENTIALS = {"AMQP_USERNAME": USERNAME, "AMQP_PASSWORD": PASSWORD}
FOUR_SECONDS = {"AWS_LAMBDA_FUNCTION_TIMEOUT": "4"}
EXAMPLES = ROOT / "examples"
# How the Daemon stays connected: the run script and both examples say it.
AMQP_PARAMETERS = "connection_attempts=1000000&retry_delay=10&heartbeat=10"
COPIES = ["1", "2", "3"]


@pytest.mark.parametrize(
    "daemon",
    [
        pytest.param("/nothing", id="it does not exist"),
        pytest.param("/tmp", id="it is a folder"),
        pytest.param("/etc/passwd", id="it is not executable"),
    ],
)
def test_a_daemon_that_cannot_run_fails_with_one_line(sample, daemon):
    ran = run(sample / f"{NAME}.sh", env=os.environ | {"LAMBDA_RUNTIME_API_DAEMON": daemon})
    line = f"{NAME}: LAMBDA_RUNTIME_API_DAEMON: {daemon} is not an executable file\n"
    assert ran.returncode == 1
    assert ran.stderr == line


def test_the_daemon_replaces_the_emulator_on_loopback_and_its_path_may_be_relative(
    start, sample, stand_in
):
    """A stand-in for the Daemon tells which arguments, variables and hosts the run script gives."""
    folder, relative = os.path.split(stand_in)
    settings = {"LAMBDA_RUNTIME_API_DAEMON": relative, "AWS_LAMBDA_MAX_CONCURRENCY": "4"}
    with start(sample, cwd=folder, **settings, **FOUR_SECONDS) as it:
        told = it.invoke(function=NAME)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", it.port))
        url = f"http://127.0.0.1:{it.port}/2015-03-31/functions/{NAME}/invocations"
        assert f"    curl -XPOST {url} -d " in it.output
        it.stop()
        assert "Daemon ended by SIGTERM\n" in it.output
    assert told["argv"][-1] == "lambda_function.lambda_handler"
    assert not [argument for argument in told["argv"] if argument.startswith("--runtime")]
    variables = {
        "AWS_LAMBDA_FUNCTION_NAME": NAME,
        "MAX_CONCURRENCY": "1",
        "AMQP_URI": f"amqp://{start.host_name}:5672?{AMQP_PARAMETERS}",
        **FOUR_SECONDS,
    }
    assert variables.items() <= told["environ"].items()
    assert "AWS_LAMBDA_MAX_CONCURRENCY" not in told["environ"]
    assert start.host_name in told["hosts"]


def consumers(rabbitmq, queue):
    """How many consumers the queue has, or None if there is no such queue."""
    with (
        connect(rabbitmq) as connection,
        contextlib.suppress(pika.exceptions.ChannelClosedByBroker),
    ):
        return connection.channel().queue_declare(queue, passive=True).method.consumer_count


@pytest.fixture(scope="module")
def daemon_run(start, rabbitmq, folder, sample):
    """The real Daemon with a function that does what the event says."""
    environment = BROKER_CREDENTIALS | FOUR_SECONDS | {"AMQP_URI": f"amqp://{rabbitmq}"}
    copy = make_evaluating(copy_sample(folder / f"daemon {start.option}", sample))
    with start(copy, LAMBDA_RUNTIME_API_DAEMON=real_daemon(), **environment) as it:
        wait_until(lambda: consumers(rabbitmq, NAME))
        yield it


@pytest.fixture(params=["HTTP", "AMQP"])
def invoke(request, daemon_run, rabbitmq):
    """Invokes that function with an event, over HTTP or AMQP, and returns its answer."""
    with connect(rabbitmq) as connection:
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


def test_the_daemon_goes_on_after_a_function_fails(invoke):
    """An exception, a timeout, and a dead runtime."""
    assert invoke({"do": "1 / 0"})["errorMessage"] == "division by zero"
    for do in "time.sleep(6)", "os._exit(3)":
        assert "Task timed out after 4" in invoke({"do": do})["errorMessage"]
        wait_until(lambda: invoke({"still": "here"}) == {"still": "here"})


def test_without_a_broker_http_still_runs_two_invocations_at_once(start, evaluating):
    """Meanwhile the Daemon tries to connect: the log says retry=2. A signal still ends the run."""
    settings = {
        "LAMBDA_RUNTIME_API_DAEMON": real_daemon(),
        "MAX_CONCURRENCY": "2",
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "300",
    }
    with ThreadPoolExecutor() as pool, start(evaluating, **settings) as it:
        pool.submit(it.invoke, {"do": "time.sleep(200)"}, NAME)
        wait_until(lambda: it.received)
        assert it.invoke({"key": 1}, NAME) == {"key": 1}
        wait_until(lambda: "retry=2" in it.output)
        assert it.invoke({"key": 2}, NAME) == {"key": 2}
        it.stop()  # the Daemon's status is 1, because it has no broker
        assert '"eventType": "SHUTDOWN"' in it.output


@pytest.mark.parametrize("moment", ["AT_IMPORT", "AT_INVOKE"])
def test_an_extension_that_dies_is_started_again(start, copy, tmp_path, moment):
    """It dies once, before it registers or with its first event."""
    words = "-e", f"{moment}={once(tmp_path, 'os._exit(1)')}"
    settings = {"LAMBDA_RUNTIME_API_DAEMON": real_daemon(), "AMQP_URI": "", **FOUR_SECONDS}
    with start(make_scripted(copy), *words, **settings) as it:

        def answer():
            with contextlib.suppress(OSError):  # the invocation that started it gets no answer
                return it.invoke(function=NAME, timeout=5)

        wait_until(lambda: answer() == HELLO and it.received)


class Backlog:
    """A hundred invocations in a queue; each takes a moment, and its answer names the copy."""

    def __init__(self, channel, queue):
        self.channel = channel
        self.answers = channel.queue_declare("", exclusive=True).method.queue
        # sleep() returns None, so the value is that of the variable.
        event = b'{"do": "time.sleep(0.05) or os.environ[\'COPY\']"}'
        for number in range(100):
            properties = pika.BasicProperties(reply_to=self.answers, correlation_id=str(number))
            channel.basic_publish("", queue, event, properties)

    def copies_that_answer(self, after_twenty):
        """Waits for all answers, and calls after_twenty() when there are twenty."""
        copies = {}
        messages = self.channel.consume(self.answers, auto_ack=True, inactivity_timeout=60)
        for method, properties, answer in messages:
            assert method, f"{len(copies)} of 100 answered"
            copies[properties.correlation_id] = json.loads(answer)
            if len(copies) == 20:
                after_twenty()
            if len(copies) == 100:
                return {*copies.values()}


def test_killing_one_of_three_runs_loses_no_message(start, rabbitmq, evaluating):
    """RabbitMQ gives what the killed one had taken to the others."""
    settings = BROKER_CREDENTIALS | {"LAMBDA_RUNTIME_API_DAEMON": real_daemon()}
    settings |= {"AMQP_URI": f"amqp://{rabbitmq}", "AWS_LAMBDA_FUNCTION_TIMEOUT": "60"}
    name = f"killed{start.option}"
    with connect(rabbitmq) as connection, contextlib.ExitStack() as stack:
        words = "-e", f"AWS_LAMBDA_FUNCTION_NAME={name}"
        runs = [
            stack.enter_context(start(evaluating, *words, "-e", f"COPY={number}", **settings))
            for number in COPIES
        ]
        wait_until(lambda: consumers(rabbitmq, name) == 3)
        backlog = Backlog(connection.channel(), name)
        assert backlog.copies_that_answer(after_twenty=runs[1].kill_sample) == {*COPIES}


@pytest.fixture(scope="module")
def kubernetes():
    """The documents of the example: the Deployment and the NetworkPolicy."""
    return yaml_documents(EXAMPLES / "kubernetes.yaml")


@pytest.mark.slow
def test_kubernetes_stops_one_of_three_copies_without_losing_a_message_or_the_shutdown(
    engine, rabbitmq, evaluating, kubernetes
):
    """Docker plays Kubernetes: it starts and stops containers with what the example says."""
    deployment, _ = kubernetes
    pod = deployment["spec"]["template"]["spec"]
    entrypoint, *words = pod["containers"][0]["command"]
    settings = BROKER_CREDENTIALS | {
        "AWS_LAMBDA_FUNCTION_NAME": "stopped",
        "AMQP_URI": f"amqp://{rabbitmq}",
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "60",
        "AT_SHUTDOWN": "time.sleep(1); log('Shut down')",
    }
    options = [f"--env={key}={value}" for key, value in settings.items()]
    options += [f"--entrypoint={entrypoint}", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL"]
    options += [f"--volume={real_daemon()}:/usr/local/bin/aws-lambda-rie"]
    options.append(build(make_scripted(evaluating), "copies", first_base_image()))
    containers = []
    with connect(rabbitmq) as connection, contextlib.ExitStack() as stack:
        for number in COPIES:
            # Kubernetes gives sh no other arguments either.
            started = "docker", "run", "--detach", f"--env=COPY={number}"
            containers.append(run(*started, *options, *words).stdout.strip())
            stack.callback(run, "docker", "rm", "--force", containers[-1])
        wait_until(lambda: consumers(rabbitmq, "stopped") == 3)
        seconds = str(pod["terminationGracePeriodSeconds"])
        stop = "docker", "stop", "--time", seconds, containers[1]
        backlog = Backlog(connection.channel(), "stopped")
        assert backlog.copies_that_answer(after_twenty=lambda: run(*stop)) == {*COPIES}
        assert f"[{NAME}] Shut down\n" in run("docker", "logs", containers[1]).stdout
        # sh has ended the container, not Kubernetes.
        code = run("docker", "inspect", "--format", "{{.State.ExitCode}}", containers[1]).stdout
        assert int(code) == 128 + signal.SIGTERM


def compose(*arguments, **environment):
    """Runs Docker Compose, version 2 or 1, in the sample's folder."""
    command = ["docker", "compose"]
    if run(*command, "version").returncode != 0:
        command = [tool("docker-compose")]
    environment = os.environ | {"BASE_IMAGE": first_base_image()} | environment
    return run(*command, *arguments, env=environment, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing_one", "said"),
    [
        pytest.param("AMQP_PASSWORD", "choose a password", id="the password"),
        pytest.param("LAMBDA_RUNTIME_API_DAEMON", "its absolute path", id="the Daemon"),
    ],
)
def test_compose_asks_for_what_it_cannot_know(missing_one, said):
    environment = {"AMQP_PASSWORD": "any", "LAMBDA_RUNTIME_API_DAEMON": "/any", missing_one: ""}
    configured = compose("--file", EXAMPLES / "compose.yaml", "config", **environment)
    assert configured.returncode != 0
    assert said in configured.stderr


@pytest.mark.slow
def test_compose_waits_for_a_broker_that_the_daemon_can_use():
    (described,) = yaml_documents(EXAMPLES / "compose.yaml")
    function, broker = described["services"]["function"], described["services"]["rabbitmq"]
    assert function["depends_on"]["rabbitmq"]["condition"] == "service_healthy"
    # RabbitMQ's own commands could write its cookie before the server does.
    assert "rabbitmq" not in str(broker["healthcheck"]["test"])
    major, minor = re.fullmatch(r"rabbitmq:(\d+)\.(\d+)", broker["image"]).groups()
    assert (int(major), int(minor)) < (4, 3)  # which refuses the Daemon's queue


@pytest.mark.slow
def test_compose_confines_the_function_as_the_run_script_does_and_connects_it(
    engine, rabbitmq_image, stand_in, tmp_path
):
    for port in 5672, 8080:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            pytest.skip(f"port {port} is in use")
    override = tmp_path / "override.yaml"
    override.write_text(f"services: {{rabbitmq: {{image: '{rabbitmq_image}'}}}}\n")
    project = "--project-name", f"sample-test-{os.getpid()}"
    files = "--file", EXAMPLES / "compose.yaml", "--file", override
    environment = {"AMQP_PASSWORD": PASSWORD, "LAMBDA_RUNTIME_API_DAEMON": stand_in}

    def inspect(service):
        name = compose(*project, *files, "ps", "--quiet", service, **environment).stdout.strip()
        return json.loads(run("docker", "inspect", name).stdout)[0]

    try:
        up = compose(*project, *files, "up", "--build", "--detach", **environment)
        assert up.returncode == 0, up.stdout + up.stderr
        wait_until(lambda: inspect("function")["State"]["Health"]["Status"] == "healthy")
        url = f"http://127.0.0.1:8080/2015-03-31/functions/{NAME}/invocations"
        told = json.loads(post(url))["environ"]
        expected = {
            "AWS_LAMBDA_FUNCTION_NAME": NAME,
            "AWS_LAMBDA_FUNCTION_TIMEOUT": "10",
            "AMQP_URI": f"amqp://rabbitmq:5672?{AMQP_PARAMETERS}",
            **BROKER_CREDENTIALS,
        }
        assert {name: told.get(name) for name in expected} == expected
        with connect("127.0.0.1"):  # the broker, with these credentials
            pass
        function, broker = inspect("function"), inspect("rabbitmq")
    finally:
        compose(*project, *files, "down", "--volumes", "--rmi", "local", **environment)
    assert_confined_as_on_lambda(function)
    assert function["Config"].get("StopSignal", "SIGTERM") == "SIGTERM"
    (mount,) = function["Mounts"]
    assert mount["Destination"] == "/usr/local/bin/aws-lambda-rie"
    assert not mount["RW"]
    for container, port in (function, "8080"), (broker, "5672"):
        bindings = container["HostConfig"]["PortBindings"]
        assert bindings[f"{port}/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": port}]
        assert container["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    # The function has started after the broker, which has passed a health check.
    checks = broker["State"]["Health"]["Log"]
    assert [check for check in checks if check["ExitCode"] == 0]
    assert function["State"]["StartedAt"] > broker["State"]["StartedAt"]


@pytest.mark.slow
def test_kubernetes_runs_three_copies_that_one_label_connects_with_their_policy(kubernetes):
    deployment, policy = kubernetes
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels


@pytest.mark.slow
def test_kubernetes_confines_each_container(kubernetes):
    deployment, _ = kubernetes
    pod = deployment["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 60999,
        "runAsGroup": 60999,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    (daemon,), (function,) = pod["initContainers"], pod["containers"]
    for container in daemon, function:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"]["cpu"] == "100m"
        assert container["resources"]["limits"] == {
            "cpu": "1",
            "memory": "256Mi",
            "ephemeral-storage": "640Mi",
        }


@pytest.mark.slow
def test_kubernetes_tells_the_function_its_name_and_its_broker(kubernetes):
    deployment, _ = kubernetes
    (function,) = deployment["spec"]["template"]["spec"]["containers"]
    told = {each["name"]: each.get("value", each.get("valueFrom")) for each in function["env"]}
    assert told == {
        "AWS_LAMBDA_FUNCTION_NAME": NAME,
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "10",
        "MAX_CONCURRENCY": "1",
        "AMQP_URI": f"amqp://rabbitmq:5672?{AMQP_PARAMETERS}",
        "AMQP_USERNAME": {"secretKeyRef": {"name": "rabbitmq", "key": "username"}},
        "AMQP_PASSWORD": {"secretKeyRef": {"name": "rabbitmq", "key": "password"}},
    }


@pytest.mark.slow
def test_kubernetes_puts_the_daemon_in_the_emulators_place_and_probes_its_port(kubernetes):
    """An init container, the Daemon itself, copies the Daemon to its /tmp, which is a volume."""
    deployment, _ = kubernetes
    pod = deployment["spec"]["template"]["spec"]
    (daemon,), (function,) = pod["initContainers"], pod["containers"]
    assert daemon["env"] == [{"name": "KUBERNETES_INIT_CONTAINER", "value": "true"}]
    assert daemon["volumeMounts"] == [{"name": "daemon", "mountPath": "/tmp"}]
    assert function["volumeMounts"] == [
        {
            "name": "daemon",
            "mountPath": "/usr/local/bin/aws-lambda-rie",
            "subPath": "lambda-runtime-api-daemon",
            "readOnly": True,
        },
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    assert pod["volumes"] == [
        {"name": "daemon", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "512Mi"}},
    ]
    assert function["ports"] == [{"containerPort": 8080}]
    assert function["readinessProbe"] == {"tcpSocket": {"port": 8080}}
    assert function["livenessProbe"] == {"tcpSocket": {"port": 8080}}


@pytest.mark.slow
def test_kubernetes_lets_only_pods_with_a_label_invoke_and_the_function_reach_broker_and_dns(
    kubernetes,
):
    _, policy = kubernetes
    assert {*policy["spec"]["policyTypes"]} == {"Ingress", "Egress"}
    assert policy["spec"]["ingress"] == [
        {
            "from": [{"podSelector": {"matchLabels": {"invokes": NAME}}}],
            "ports": [{"port": 8080}],
        }
    ]
    broker, dns = policy["spec"]["egress"]
    assert broker == {
        "to": [{"podSelector": {"matchLabels": {"app": "rabbitmq"}}}],
        "ports": [{"port": 5672}],
    }
    assert dns["to"] == [{"namespaceSelector": {}}]
    ports = {(each["port"], each["protocol"]) for each in dns["ports"]}
    assert ports == {(53, "UDP"), (53, "TCP"), (5353, "UDP"), (5353, "TCP")}


class QueuedFunction:
    """A function that takes its invocations from a queue. The test itself is the function."""

    def __init__(self, channel, pool):
        self.channel = channel
        self.queue = channel.queue_declare("", exclusive=True).method.queue
        self.pool = pool

    def invoke_in_background(self, invoke, *arguments):
        """Calls invoke(*arguments) in a thread, because the test has to answer meanwhile."""
        return self.pool.submit(invoke, *arguments)

    def wait_for_request(self):
        """Returns the properties and the body (bytes) of the next request."""

        def request():
            method, properties, body = self.channel.basic_get(self.queue, auto_ack=True)
            return (properties, body) if method else None

        return wait_until(request)

    def answer(self, request, body):
        """Sends an answer to another request first, then this body to the request (properties)."""
        for correlation_id, text in ("of another", b"wrong"), (request.correlation_id, body):
            properties = pika.BasicProperties(correlation_id=correlation_id)
            self.channel.basic_publish("", request.reply_to, text, properties)


@pytest.fixture
def function(rabbitmq):
    """A function that the test plays, behind a queue of the broker."""
    with connect(rabbitmq) as connection, ThreadPoolExecutor() as pool:
        yield QueuedFunction(connection.channel(), pool)


@pytest.mark.parametrize(
    ("arguments", "event", "expiration"),
    [
        pytest.param([], b"{}", "30000", id="by default"),
        pytest.param(["--timeout", "5", "[1]"], b"[1]", "5000", id="with options"),
    ],
)
def test_the_client_prints_the_answer_to_its_own_request(
    rabbitmq, function, arguments, event, expiration
):
    """It prints the bytes as they are, even if they are not UTF-8."""
    ran = function.invoke_in_background(invoke_by_amqp, rabbitmq, function.queue, *arguments)
    request, body = function.wait_for_request()
    assert request.reply_to.startswith("amq.gen-")  # a name that no other client has
    assert (body, request.content_type) == (event, "application/json")
    assert request.expiration == expiration
    answer = b"the answer: \xc3\xbc \xff"
    function.answer(request, answer)
    assert (ran.result().returncode, ran.result().stdout) == (0, f"{os.fsdecode(answer)}\n")


def test_one_channel_serves_several_invocations_and_leaves_no_queue(rabbitmq, function):
    with connect(rabbitmq) as connection:
        channel = connection.channel()
        for event in b"1", b"2":
            answer = function.invoke_in_background(client.invoke, channel, function.queue, event)
            request, _ = function.wait_for_request()
            function.answer(request, b"answer to " + event)
            assert answer.result() == b"answer to " + event
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
                connection.channel().queue_declare(request.reply_to, passive=True)


def test_nobody_else_can_read_the_answers_or_extend_the_wait(rabbitmq, function):
    """Wrong answers keep arriving; the client gives up all the same."""
    ran = function.invoke_in_background(invoke_by_amqp, rabbitmq, function.queue, "--timeout", "1")
    request, _ = function.wait_for_request()
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="RESOURCE_LOCKED"):
        function.channel.connection.channel().basic_get(request.reply_to)

    def has_ended_despite_another_wrong_answer():
        function.channel.basic_publish("", request.reply_to, b"wrong")
        return ran.done()

    wait_until(has_ended_despite_another_wrong_answer)
    assert ran.result().returncode == 1
    assert ran.result().stderr == f"no answer from {function.queue} within 1.0 s\n"


@pytest.mark.parametrize("seconds", ["0", "-1", "1e300", "nan", "soon"])
def test_the_client_refuses_a_time_limit_that_it_cannot_keep(seconds):
    ran = run(sys.executable, client.__file__, "function", "--timeout", seconds)
    assert ran.returncode == 2
    assert "--timeout" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "parameters",
    [
        pytest.param("", id="one attempt"),
        pytest.param(f"?{AMQP_PARAMETERS}", id="a million attempts"),
    ],
)
def test_the_client_gives_up_in_time_on_a_silent_broker(parameters):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts, but says nothing
        uri = f"amqp://127.0.0.1:{server.getsockname()[1]}{parameters}"
        command = sys.executable, client.__file__, "function", "--timeout", "1.5"
        begin = time.monotonic()
        ran = run(*command, env=os.environ | {"AMQP_URI": uri}, timeout=60)
    assert (ran.returncode, ran.stderr) == (1, "no answer from function within 1.5 s\n")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        pytest.param(
            "amqp://lambda:secret%20word@{broker}",
            "nothing serves the function no-function",
            id="no such queue",
        ),
        pytest.param(
            "amqp://user:secret@localhost:{port}",
            "no RabbitMQ at localhost:{port}, or access denied",
            id="no broker",
        ),
        pytest.param(
            f"amqp://user:secret@localhost:{{port}}?{AMQP_PARAMETERS}",
            "no RabbitMQ at localhost:{port}, or access denied",
            id="no broker, a million attempts",
        ),
        pytest.param(
            "amqp://user:secret@no-such-host.invalid",
            "no RabbitMQ at no-such-host.invalid:5672, or access denied",
            id="no such host",
        ),
        pytest.param("user:secret@localhost", "AMQP_URI takes amqp://", id="no scheme"),
        pytest.param("/lambda", "AMQP_URI takes amqp://", id="a path alone"),
        pytest.param(
            "amqp://user:secret@localhost:port", "AMQP_URI takes amqp://", id="not a port"
        ),
    ],
)
def test_the_client_says_in_one_line_why_it_cannot_invoke(rabbitmq, uri, said):
    places = {"broker": rabbitmq, "port": free_port()}
    environment = os.environ | {"AMQP_URI": uri.format(**places)}
    ran = run(sys.executable, client.__file__, "no-function", env=environment)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.startswith(said.format(**places))
    assert "secret" not in ran.stderr
