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
from engine import build, first_base_image
from machine import ROOT, free_port, post, real_daemon, run, tool, wait_until, yaml_documents
from rabbitmq import PASSWORD, USERNAME, connect, invoke_by_amqp
from sample import HELLO, NAME, copy_sample, make_evaluating, make_obedient, once

BROKER_CREDENTIALS = {"AMQP_USERNAME": USERNAME, "AMQP_PASSWORD": PASSWORD}
FOUR_SECONDS = {"AWS_LAMBDA_FUNCTION_TIMEOUT": "4"}


@pytest.mark.parametrize("daemon", ["/nothing", "/tmp", "/etc/passwd"])
def test_a_daemon_that_cannot_run_fails_with_one_line(sample, daemon):
    ran = run(sample / f"{NAME}.sh", env=os.environ | {"LAMBDA_RUNTIME_API_DAEMON": daemon})
    line = f"{NAME}: LAMBDA_RUNTIME_API_DAEMON: {daemon} is not an executable file\n"
    assert (ran.returncode, ran.stderr) == (1, line)


def test_the_daemon_replaces_the_emulator_on_loopback_and_its_path_may_be_relative(
    start, sample, stand_in
):
    folder, relative = os.path.split(stand_in)
    settings = {"LAMBDA_RUNTIME_API_DAEMON": relative, "AWS_LAMBDA_MAX_CONCURRENCY": "4"}
    with start(sample, cwd=folder, **settings, **FOUR_SECONDS) as it:
        told = it.invoke(function=NAME)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", it.port))
        url = f"http://127.0.0.1:{it.port}/2015-03-31/functions/{NAME}/invocations"
        assert f"    curl -XPOST {url} -d " in it.output
    assert told["argv"][-1] == "lambda_function.lambda_handler"
    assert not [argument for argument in told["argv"] if argument.startswith("--")]
    options = "connection_attempts=1000000&retry_delay=10&heartbeat=10"
    variables = {"AWS_LAMBDA_FUNCTION_NAME": NAME, "MAX_CONCURRENCY": "1", **FOUR_SECONDS}
    variables["AMQP_URI"] = f"amqp://{start.host_name}:5672?{options}"
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


def test_the_daemon_answers_errors_and_continues(invoke):
    assert invoke({"do": "1 / 0"})["errorMessage"] == "division by zero"
    for do in "time.sleep(6)", "os._exit(3)":
        assert "Task timed out after 4" in invoke({"do": do})["errorMessage"]
        wait_until(lambda: invoke({"still": "here"}) == {"still": "here"})


def test_without_a_broker_http_works_concurrently_until_the_run_ends_with_a_shutdown(
    start, evaluating
):
    settings = {
        "LAMBDA_RUNTIME_API_DAEMON": real_daemon(),
        "MAX_CONCURRENCY": "2",
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "60",
    }
    with ThreadPoolExecutor() as pool, start(evaluating, **settings) as it:
        pool.submit(it.invoke, {"do": "time.sleep(40)"}, NAME)
        wait_until(lambda: it.received)
        assert it.invoke({"key": 1}, NAME) == {"key": 1}
        wait_until(lambda: "retry=2" in it.output, 30)
        assert it.invoke({"key": 2}, NAME) == {"key": 2}
        it.assert_signal_ends_it()


@pytest.mark.parametrize("when", ["at its start", "with an event"])
def test_an_extension_that_dies_is_started_again(start, copy, tmp_path, when):
    dies = once(tmp_path, "os._exit(1)")
    extension = make_obedient(copy) / NAME / "extension.py"
    words = []
    if when == "at its start":
        extension.write_text(dies + extension.read_text())
    else:
        words = ["-e", f"AT_INVOKE={dies}"]
    daemon = real_daemon()
    with start(copy, *words, LAMBDA_RUNTIME_API_DAEMON=daemon, AMQP_URI="", **FOUR_SECONDS) as it:

        def answer():
            with contextlib.suppress(OSError):  # the invocation that started it gets no answer
                return it.invoke(function=NAME, timeout=5)

        wait_until(lambda: answer() == HELLO and it.received, 60)


class Queue:
    """A hundred invocations of a function that waits a little and names its copy."""

    def __init__(self, channel, name):
        self.channel = channel
        self.answers = channel.queue_declare("", exclusive=True).method.queue
        event = b'{"do": "time.sleep(0.05) or os.environ[\'COPY\']"}'
        for number in range(100):
            properties = pika.BasicProperties(reply_to=self.answers, correlation_id=str(number))
            channel.basic_publish("", name, event, properties)

    def answered(self, after_twenty):
        """Waits for all answers; after the first twenty calls a function. Returns who answered."""
        answered = {}
        messages = self.channel.consume(self.answers, auto_ack=True, inactivity_timeout=60)
        for method, properties, answer in messages:
            assert method, f"{len(answered)} of 100 answered"
            answered[properties.correlation_id] = json.loads(answer)
            if len(answered) == 20:
                after_twenty()
            if len(answered) == 100:
                return {*answered.values()}


def test_killing_one_of_three_runs_loses_no_message(start, rabbitmq, evaluating):
    settings = BROKER_CREDENTIALS | {"LAMBDA_RUNTIME_API_DAEMON": real_daemon()}
    settings |= {"AMQP_URI": f"amqp://{rabbitmq}", "AWS_LAMBDA_FUNCTION_TIMEOUT": "60"}
    name = f"killed{start.option}"
    with connect(rabbitmq) as connection, contextlib.ExitStack() as stack:
        words = "-e", f"AWS_LAMBDA_FUNCTION_NAME={name}"
        copies = [
            stack.enter_context(start(evaluating, *words, "-e", f"COPY={number}", **settings))
            for number in "123"
        ]
        wait_until(lambda: consumers(rabbitmq, name) == 3)
        assert Queue(connection.channel(), name).answered(copies[1].kill) == {*"123"}


@pytest.mark.slow
def test_kubernetes_stops_one_of_three_copies_without_losing_a_message_or_the_shutdown(
    engine, rabbitmq, evaluating
):
    deployment, _ = yaml_documents(ROOT / "examples" / "kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    entrypoint, *words = pod["containers"][0]["command"]
    settings = BROKER_CREDENTIALS | {
        "AWS_LAMBDA_FUNCTION_NAME": "stopped",
        "AMQP_URI": f"amqp://{rabbitmq}",
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "60",
    }
    options = [f"--env={key}={value}" for key, value in settings.items()]
    options += [f"--entrypoint={entrypoint}", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL"]
    options += [f"--volume={real_daemon()}:/usr/local/bin/aws-lambda-rie"]
    options.append(build(evaluating, "copies", first_base_image()))
    containers = []
    with connect(rabbitmq) as connection, contextlib.ExitStack() as stack:
        for number in "123":
            # Kubernetes gives sh no other arguments either.
            started = "docker", "run", "--detach", f"--env=COPY={number}"
            containers.append(run(*started, *options, *words).stdout.strip())
            stack.callback(run, "docker", "rm", "--force", containers[-1])
        wait_until(lambda: consumers(rabbitmq, "stopped") == 3)
        seconds = str(pod["terminationGracePeriodSeconds"])
        stop = "docker", "stop", "--time", seconds, containers[1]
        who = Queue(connection.channel(), "stopped").answered(lambda: run(*stop))
        assert who == {*"123"}
        assert '"eventType": "SHUTDOWN"' in run("docker", "logs", containers[1]).stdout
        # sh has ended the container, not Kubernetes.
        code = run("docker", "inspect", "--format", "{{.State.ExitCode}}", containers[1]).stdout
        assert int(code) == 128 + signal.SIGTERM


EXAMPLES = ROOT / "examples"
# How the Daemon stays connected, as the run script says it.
PARAMETERS = re.search(r'parameters="(.*)"', (ROOT / f"{NAME}.sh").read_text()).group(1)


def compose(*arguments, **environment):
    """Runs Docker Compose, version 2 or 1, with the example and a broker that needs no registry."""
    command = ["docker", "compose"]
    if run(*command, "version").returncode != 0:
        command = [tool("docker-compose")]
    environment = os.environ | {"BASE_IMAGE": first_base_image()} | environment
    return run(*command, *arguments, env=environment, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing_one", "said"),
    [("AMQP_PASSWORD", "choose a password"), ("LAMBDA_RUNTIME_API_DAEMON", "its absolute path")],
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
    version = re.fullmatch(r"rabbitmq:(\d+)\.(\d+)", broker["image"]).groups()
    assert (*map(int, version),) < (4, 3)  # which refuses the Daemon's queue


@pytest.mark.slow
def test_compose_confines_the_function_as_the_run_script_does_and_connects_it(
    engine, rabbitmq_image, stand_in, tmp_path
):
    for port in 5672, 8080:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            pytest.skip(f"port {port} is in use")
    broker = tmp_path / "broker.yaml"
    broker.write_text(f"services: {{rabbitmq: {{image: '{rabbitmq_image}'}}}}\n")
    project = "--project-name", f"sample-test-{os.getpid()}"
    files = "--file", EXAMPLES / "compose.yaml", "--file", broker
    environment = {"AMQP_PASSWORD": PASSWORD, "LAMBDA_RUNTIME_API_DAEMON": stand_in}

    def inspect(service):
        name = compose(*project, *files, "ps", "--quiet", service, **environment).stdout.strip()
        return json.loads(run("docker", "inspect", name).stdout)[0]

    try:
        up = compose(*project, *files, "up", "--build", "--detach", **environment)
        assert up.returncode == 0, up.stdout + up.stderr
        wait_until(lambda: inspect("function")["State"]["Health"]["Status"] == "healthy", 60)
        url = f"http://127.0.0.1:8080/2015-03-31/functions/{NAME}/invocations"
        told = json.loads(post(url))["environ"]
        expected = {
            "AWS_LAMBDA_FUNCTION_NAME": NAME,
            "AWS_LAMBDA_FUNCTION_TIMEOUT": "10",
            "AMQP_URI": f"amqp://rabbitmq:5672?{PARAMETERS}",
            **BROKER_CREDENTIALS,
        }
        assert {name: told.get(name) for name in expected} == expected
        with connect("127.0.0.1"):  # the broker, with these credentials
            pass
        function, broker = inspect("function"), inspect("rabbitmq")
    finally:
        compose(*project, *files, "down", "--volumes", "--rmi", "local", **environment)
    host = function["HostConfig"]
    assert function["Config"]["User"] == "60999:60999"
    assert function["Config"].get("StopSignal", "SIGTERM") == "SIGTERM"
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["IpcMode"]) == (True, ["ALL"], "none")
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert (host["Memory"], host["PidsLimit"]) == (256 * 1024 * 1024, 1024)
    assert host["Ulimits"] == [{"Name": "nofile", "Hard": 1024, "Soft": 1024}]
    assert host["Tmpfs"] == {"/tmp": "exec,size=512m"}
    (mount,) = function["Mounts"]
    assert (mount["Destination"], mount["RW"]) == ("/usr/local/bin/aws-lambda-rie", False)
    for container, port in (function, "8080"), (broker, "5672"):
        bindings = container["HostConfig"]["PortBindings"]
        assert bindings[f"{port}/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": port}]
        assert container["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    answered = [check for check in broker["State"]["Health"]["Log"] if check["ExitCode"] == 0]
    assert function["State"]["StartedAt"] > broker["State"]["StartedAt"]
    assert answered


@pytest.mark.slow
def test_kubernetes_confines_each_container_and_names_what_belongs_together():
    deployment, policy = yaml_documents(EXAMPLES / "kubernetes.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    pod = deployment["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    user = {"runAsNonRoot": True, "runAsUser": 60999, "runAsGroup": 60999}
    assert pod["securityContext"] == user | {"seccompProfile": {"type": "RuntimeDefault"}}
    (daemon,), (function,) = pod["initContainers"], pod["containers"]
    for container in daemon, function:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"] == {
            "cpu": "1",
            "memory": "256Mi",
            "ephemeral-storage": "640Mi",
        }
        assert container["resources"]["requests"]["cpu"] == "100m"
    assert daemon["env"] == [{"name": "KUBERNETES_INIT_CONTAINER", "value": "true"}]
    secret = {
        f"AMQP_{key.upper()}": {"secretKeyRef": {"name": "rabbitmq", "key": key}}
        for key in ("username", "password")
    }
    assert {each["name"]: each.get("value", each.get("valueFrom")) for each in function["env"]} == {
        "AWS_LAMBDA_FUNCTION_NAME": NAME,
        "AWS_LAMBDA_FUNCTION_TIMEOUT": "10",
        "MAX_CONCURRENCY": "1",
        "AMQP_URI": f"amqp://rabbitmq:5672?{PARAMETERS}",
        **secret,
    }
    listens = {"tcpSocket": {"port": 8080}}
    assert function["ports"] == [{"containerPort": 8080}]
    assert function["readinessProbe"] == function["livenessProbe"] == listens
    # The Daemon copies itself to /tmp, on the volume from which it takes the emulator's place.
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


@pytest.mark.slow
def test_kubernetes_lets_only_pods_with_a_label_invoke_and_the_function_reach_broker_and_dns():
    _, policy = yaml_documents(EXAMPLES / "kubernetes.yaml")
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
    assert ports == {(port, protocol) for port in (53, 5353) for protocol in ("UDP", "TCP")}


class Function:
    """A function behind a queue; the test plays the function."""

    def __init__(self, channel, pool):
        self.channel, self.queue = channel, channel.queue_declare("", exclusive=True).method.queue
        self.submit = pool.submit  # calls, in a thread, what invokes the function

    def request(self):
        """Waits for a request; returns its properties and its body (bytes)."""

        def get():
            return [*filter(None, self.channel.basic_get(self.queue, auto_ack=True))]

        return wait_until(get)[1:]

    def answer(self, request, body):
        """Sends the answer to another request first, then the answer to this one (properties)."""
        for correlation_id, text in ("of another", b"wrong"), (request.correlation_id, body):
            properties = pika.BasicProperties(correlation_id=correlation_id)
            self.channel.basic_publish("", request.reply_to, text, properties)


@pytest.fixture
def function(rabbitmq):
    with connect(rabbitmq) as connection, ThreadPoolExecutor() as pool:
        yield Function(connection.channel(), pool)


@pytest.mark.parametrize(
    ("arguments", "event", "expiration"),
    [([], b"{}", "30000"), (["--timeout", "5", "[1]"], b"[1]", "5000")],
)
def test_the_client_prints_its_own_answer(rabbitmq, function, arguments, event, expiration):
    ran = function.submit(invoke_by_amqp, rabbitmq, function.queue, *arguments)
    request, body = function.request()
    assert request.reply_to.startswith("amq.gen-")  # a name that no other client has
    assert (body, request.content_type) == (event, "application/json")
    assert request.expiration == expiration
    function.answer(request, "die Antwort: ü".encode())
    assert (ran.result().returncode, ran.result().stdout) == (0, "die Antwort: ü\n")


def test_one_channel_serves_several_invocations_and_leaves_no_queue(rabbitmq, function):
    with connect(rabbitmq) as connection:
        channel = connection.channel()
        for event in b"1", b"2":
            answer = function.submit(client.invoke, channel, function.queue, event)
            request, _ = function.request()
            function.answer(request, b"answer to " + event)
            assert answer.result() == b"answer to " + event
            with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
                connection.channel().queue_declare(request.reply_to, passive=True)


def test_nobody_else_can_read_the_answers_or_extend_the_wait(rabbitmq, function):
    ran = function.submit(invoke_by_amqp, rabbitmq, function.queue, "--timeout", "1")
    request, _ = function.request()
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="RESOURCE_LOCKED"):
        function.channel.connection.channel().basic_get(request.reply_to)
    for _ in range(30):
        function.channel.basic_publish("", request.reply_to, b"wrong")
        time.sleep(0.1)
    assert ran.result(0).returncode == 1
    assert ran.result().stderr == f"no answer from {function.queue} within 1.0 s\n"


@pytest.mark.parametrize("seconds", ["0", "-1", "1e300", "nan", "soon"])
def test_the_client_takes_only_a_time_limit_that_it_can_keep(seconds):
    ran = run(sys.executable, client.__file__, "function", "--timeout", seconds)
    assert (ran.returncode, "--timeout" in ran.stderr, "Traceback" in ran.stderr) == (
        2,
        True,
        False,
    )


@pytest.mark.parametrize("parameters", ["", "?connection_attempts=1000000&retry_delay=10"])
def test_the_client_waits_no_longer_than_it_is_told_for_a_broker_that_does_not_answer(parameters):
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
        ("amqp://lambda:secret%20word@{broker}", "nothing serves the function no-function"),
        (
            "amqp://user:secret@localhost:{port}",
            "no RabbitMQ at localhost:{port}, or access denied",
        ),
        (
            "amqp://user:secret@localhost:{port}?connection_attempts=1000000&retry_delay=10",
            "no RabbitMQ at localhost:{port}, or access denied",
        ),
        (
            "amqp://user:secret@no-such-host.invalid",
            "no RabbitMQ at no-such-host.invalid:5672, or access denied",
        ),
        ("user:secret@localhost", "AMQP_URI takes amqp://"),
        ("amqp://user:secret@localhost:port", "AMQP_URI takes amqp://"),
    ],
)
def test_the_client_says_in_one_line_why_it_cannot_invoke(rabbitmq, uri, said):
    places = {"broker": rabbitmq, "port": free_port()}
    environment = os.environ | {"AMQP_URI": uri.format(**places)}
    ran = run(sys.executable, client.__file__, "no-function", env=environment)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert ran.stderr.startswith(said.format(**places))
    assert "secret" not in ran.stderr
