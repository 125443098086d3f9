"""What the tests share: copies of the sample, ways to run it, and the tools that a machine may lack."""

import contextlib
import functools
import http.client
import ipaddress
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import boto3
import pika
import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / ".venv" / "tools" / "bin"
AWS_CLI = TOOLS / "python3", "-m", "awscli"  # not by its script, which fails in a folder with a space
NAME = next(ROOT.glob("*/extension.py")).parent.name
HELLO = {"statusCode": 200, "body": '"Hello from Lambda!"'}  # what the function answers
RECEIVED = "Received event"  # what process(event) logs
DEFAULT_BASE_IMAGE = re.search(r"^ARG BASE_IMAGE=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE).group(1)
# On CI more than one, such as "debian:bookworm debian:trixie".
BASE_IMAGES = os.environ.get("BASE_IMAGES", os.environ.get("BASE_IMAGE", DEFAULT_BASE_IMAGE)).split()
TEST_IMAGE = f"{NAME}-test-{os.getpid()}"  # the name of the images that this process builds
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # the number of this process
# The AWS CLI and the SDKs require these even for localhost.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "eu-central-1"}
AMQP_USERNAME, AMQP_PASSWORD = "lambda", "secret word"  # of a user that RabbitMQ accepts from anywhere
DAEMON = os.environ.get("LAMBDA_RUNTIME_API_DAEMON")


def missing(what):
    """Skips the test because this machine lacks something; on CI, fails it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, which CI must have")
    pytest.skip(what)


def real_daemon():
    """The path of the Lambda Runtime API Daemon, which has no package; skips the test if it is not named."""
    return DAEMON or pytest.skip("no Daemon: LAMBDA_RUNTIME_API_DAEMON=its path ./tests/run.sh --all -k daemon")


def tool(name):
    """The path of a command that not every machine has."""
    path = f"{TOOLS}:{os.environ['PATH']}:{ROOT / '.venv' / 'sam' / 'bin'}"
    return shutil.which(name, path=path) or missing(f"no {name} on this machine")


def run(*command, **options):
    """Runs a command to its end and returns its CompletedProcess, with the output as text."""
    return subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, **options)


@functools.cache
def need_namespaces():
    """Skips the test where namespaces are refused: without them two runs would get in each other's way in /opt."""
    unshare = "unshare", "--mount", "--pid", "--fork"
    if shutil.which("unshare") and not any(run(*unshare, *more, "true").returncode == 0 for more in ([], ["-r"])):
        pytest.skip("this machine, or this container, refuses namespaces")


def wait_until(condition, seconds=20):
    """Waits until condition() is true, and returns what it returned."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not true within {seconds} s"
        time.sleep(0.02)
    return result


def free_port():
    """A free port that no outgoing connection takes before it is used, nor another worker."""
    while True:
        port = 10_000 + 10 * random.randrange(2_000) + WORKER  # below the ephemeral ones
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def processes_of(sample):
    """The command lines of the processes that run in, from, or for that copy of the sample."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = process.joinpath("cmdline").read_text().replace("\0", " ").strip()
            if str(sample) in command + os.readlink(process / "cwd") + process.joinpath("environ").read_text():
                found.append(command)
    return found


def rows(text):
    """The rows of the tables in a text, without their headings, as lists of cells."""
    lines = re.findall(r"(?m)^\|(.+)\|$(?!\n\|---)", text)
    return [[cell.strip() for cell in line.split("|")] for line in lines if not line.startswith("---")]


def first_number(cell):
    """The number with which a cell of the benchmark's table starts."""
    return float(cell.split()[0].replace(",", ""))


def copy_sample(folder, sample=ROOT):
    """Copies the sample as git would check it out, with its uncommitted changes; copies share what a run installed."""
    ignore = shutil.ignore_patterns(".git", ".venv", ".run", "__pycache__", "*.pyc")
    copy = Path(shutil.copytree(sample, folder, ignore=ignore))
    if sample != ROOT:
        (copy / ".run").mkdir()
        for installed in sample.glob(f".run/{NAME}-*"):
            (copy / ".run" / installed.name).symlink_to(installed)
    return copy


@contextlib.contextmanager
def once(statement):
    """A line of Python that executes the statement the first time only; it needs os."""
    done = f"/tmp/{NAME}-{uuid.uuid4()}"  # in the container's /tmp, or this machine's
    try:
        yield f"if not os.path.exists({done!r}): os.mkdir({done!r}); {statement}\n"
    finally:
        shutil.rmtree(done, ignore_errors=True)


def remove_hashes(lock_file):
    """Rewrites a lock file without its hashes."""
    lock_file.write_text(re.sub(r" \\\n +--hash=\S+", "", lock_file.read_text()))


def rename(sample, name):
    """Renames a copy as the README says."""
    for path in NAME, f"extensions/{NAME}", f"{NAME}.sh":
        (sample / path).rename(sample / path.replace(NAME, name))
    dockerfile = (sample / "Dockerfile").read_text().splitlines()
    dockerfile[2] = dockerfile[2].replace(NAME, name)  # the third line, and no other
    (sample / "Dockerfile").write_text("\n".join([*dockerfile, ""]))


def copy_misbehaving_sample(folder, sample):
    """Copies the sample with a function that does to its environment what the event says."""
    copy = copy_sample(folder, sample)
    shutil.copy(ROOT / "tests" / "misbehaving_function.py", copy / "lambda_function.py")
    return copy


def first_base_image():
    """The base image for tests of the run script."""
    return available(BASE_IMAGES[0])


def available(image):
    """The image's name, after pulling the image if necessary."""
    if run("docker", "image", "inspect", image).returncode != 0 and run("docker", "pull", image).returncode != 0:
        missing(f"no base image {image}")
    return image


def build(sample, tag, base_image, *options, **environment):
    """Builds the image from a copy of the sample with the engine's own builder, and returns the tag."""
    command = ["docker", "build", "--tag", tag, "--build-arg", f"BASE_IMAGE={base_image}", *options, sample]
    built = run(*command, env=os.environ | environment)
    assert built.returncode == 0, built.stdout + built.stderr
    return tag


class Running:
    """The sample while it runs: where it listens, and what it has printed so far."""

    def __init__(self, process, logs, port, host="127.0.0.1"):
        self.process, self.logs, self.port = process, logs, port
        self.endpoint = f"http://{host}:{port}"

    @property
    def output(self):
        return "".join(log.read_text() for log in self.logs)

    def invoke(self, payload=b"{}", function="function", timeout=30, **headers):
        """Posts the payload (bytes) to the function and returns the body of the answer (bytes)."""
        request = urllib.request.Request(
            f"{self.endpoint}/2015-03-31/functions/{function}/invocations", payload, headers
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            return error.read()

    def invoke_again(self, payload=b"{}"):
        """Invokes after a failure, until AWS's emulator, cleaning up late, no longer cancels the invocation."""

        def answer():
            body = self.invoke(payload)
            return body if b"ErrGateCanceled" not in body else None

        return wait_until(answer)

    def boto3_answer(self, function="function"):
        """Invokes the function with the AWS SDK and returns its answer, from JSON."""
        client = boto3.client(
            "lambda",
            endpoint_url=self.endpoint,
            region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )
        answer = client.invoke(FunctionName=function, Payload=json.dumps({"key": "value"}))
        assert answer["StatusCode"] == 200
        return json.load(answer["Payload"])

    def wait_until_ready(self):
        """Waits until the endpoint answers, which takes a while in a first run."""

        def answers():
            assert self.process.poll() is None, self.output
            try:
                return urllib.request.urlopen(self.endpoint, timeout=5)
            except urllib.error.HTTPError:
                return True
            except (OSError, http.client.HTTPException):
                return False

        wait_until(answers, 600)

    @property
    def container(self):
        """The ID of the container, or an empty string without one."""
        return run("docker", "ps", "-q", "--filter", f"publish={self.port}").stdout.strip()

    @property
    def received(self):
        """The request IDs of the INVOKE events that the extension has logged so far."""
        pattern = rf'^\[\S+\] {RECEIVED}: .*"INVOKE".*"requestId": "([^"]+)"'
        return re.findall(pattern, self.output, re.MULTILINE)

    @contextlib.contextmanager
    def receives(self, count=1):
        """Waits, at the end, until the extension has logged that many INVOKE events since the start."""
        before = len(self.received)
        yield
        wait_until(lambda: len(self.received) >= before + count)

    def stop(self, signum=signal.SIGTERM):
        """Ends the run as a terminal or a supervisor would; returns exit status and seconds taken."""
        start = time.monotonic()
        if signum == signal.SIGTERM:
            self.process.send_signal(signum)
        else:
            os.killpg(self.process.pid, signum)
        return self.process.wait(60), time.monotonic() - start


@contextlib.contextmanager
def running(sample, *arguments, script=f"{NAME}.sh", user=None, host="127.0.0.1", wait=True, **environment):
    """Runs the sample's run script until it answers, in a session of its own, then lets the caller use it."""
    if "--docker" not in arguments:
        need_namespaces()
    port = free_port()
    environment = os.environ | environment
    publish = str(port) if host == "127.0.0.1" else f"{host}:{port}"
    # Two files, because Docker mixes lines of standard output and error.
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        process = subprocess.Popen(
            [sample / script, "-p", publish, *arguments],
            cwd="/",
            env=environment,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        sample_run = Running(process, [Path(stdout.name), Path(stderr.name)], port, host)
        try:
            if wait:
                sample_run.wait_until_ready()
            yield sample_run
        finally:
            if process.poll() is None:
                sample_run.stop()
            sys.stdout.write(sample_run.output)


@contextlib.contextmanager
def container(image, *options):
    """Runs the image as a container with those options of docker run, and invokes it; gives its name and the answer."""
    port = free_port()
    command = ["docker", "run", "--rm", "--detach", *options, "--publish", f"127.0.0.1:{port}:8080", image]
    name = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    url = f"http://127.0.0.1:{port}/2015-03-31/functions/function/invocations"

    def invoke():
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return urllib.request.urlopen(url, b"{}", timeout=60).read()

    try:
        yield name, wait_until(invoke, 60)
    finally:
        run("docker", "kill", name)


def connect(port):
    """A connection to the tests' RabbitMQ, as user guest."""
    return pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))


def amqp_invoke(port, *arguments):
    """Runs the example client."""
    uri = f"amqp://{AMQP_USERNAME}:{AMQP_PASSWORD.replace(' ', '%20')}@localhost:{port}"
    return run(sys.executable, ROOT / "examples" / "amqp_invoke.py", *arguments, env=os.environ | {"AMQP_URI": uri})


def docker_gateway():
    """The address at which containers reach this machine, in a list, which is empty without an engine."""
    inspected = run("docker", "network", "inspect", "bridge").stdout if shutil.which("docker") else ""
    for network in json.loads(inspected or "[]"):
        # Some engines do not name the gateway: it is the first address.
        configuration = network["IPAM"]["Config"][0]
        return [configuration.get("Gateway") or str(ipaddress.ip_network(configuration["Subnet"])[1])]
    return []
