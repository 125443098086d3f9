"""What the tests stand on: copies of the sample, ways to run it, and the tools that a machine may lack."""

import contextlib
import functools
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
import urllib.request
from pathlib import Path

import boto3
import pytest

ROOT = Path(__file__).parent.parent
VENV = Path(sys.executable).parent
NAME = next(ROOT.glob("*/extension.py")).parent.name
HELLO = {"statusCode": 200, "body": '"Hello from Lambda!"'}
DEFAULT_BASE_IMAGE = re.search(r"^ARG BASE_IMAGE=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE).group(1)
# On CI more than one, such as "debian:bookworm debian:trixie".
BASE_IMAGES = os.environ.get("BASE_IMAGES", os.environ.get("BASE_IMAGE", DEFAULT_BASE_IMAGE)).split()
# What the AWS CLI and the SDKs want even for localhost.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "eu-central-1"}
# The tests of the Daemon use it; to all others it must not be there.
DAEMON = os.environ.pop("LAMBDA_RUNTIME_API_DAEMON", None)


def missing(what):
    """Skips the test because this machine lacks something; on CI, where it has to be there, fails it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, which CI has to have")
    pytest.skip(what)


def tool(name):
    """The path of a command that not every machine has."""
    path = f"{VENV}:{os.environ['PATH']}:{ROOT / '.venv' / 'sam' / 'bin'}"
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
    """A free port that no outgoing connection of this machine will take before it is used: below the ephemeral ones."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def copy_sample(folder):
    """Copies the sample, with its uncommitted changes, as git would check it out."""
    ignore = shutil.ignore_patterns(".git", ".venv", ".run", "__pycache__", "*.pyc")
    return Path(shutil.copytree(ROOT, folder, ignore=ignore))


def copy_misbehaving_sample(folder):
    """Copies the sample with a function that does to its environment what the event says."""
    copy = copy_sample(folder)
    shutil.copy(ROOT / "tests" / "misbehaving_function.py", copy / "lambda_function.py")
    return copy


@pytest.fixture(scope="session")
def folder():
    """A temporary folder that any user can read; with a space in its name, as users' folders have."""
    path = Path(tempfile.mkdtemp(prefix="sample test "))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def sample(folder):
    """A copy of the sample, as a new user has it."""
    return copy_sample(folder / "sample")


@pytest.fixture(scope="session")
def installed_sample(sample):
    """That copy, after its first run without Docker."""
    with running(sample, "--no-docker"):
        pass
    return sample


@pytest.fixture(scope="session")
def extension(folder):
    """The extension with its dependencies, in a folder of its name."""
    target = folder / NAME
    requirements = ROOT / NAME / "requirements.txt"
    installed = run("python3", "-m", "pip", "install", "--quiet", "--target", target, "-r", requirements)
    assert installed.returncode == 0, installed.stderr
    for source in (ROOT / NAME).glob("*.py"):
        (target / source.name).write_bytes(source.read_bytes())
    return target / "extension.py"


@pytest.fixture(scope="session")
def engine():
    """Makes sure that a Docker engine answers."""
    if run(tool("docker"), "version").returncode != 0:
        missing("no Docker engine on this machine")
    yield
    images = run(
        "docker", "images", "--filter", f"reference={NAME}-test", "--format", "{{.Repository}}:{{.Tag}}"
    ).stdout
    if images:
        run("docker", "image", "rm", "--force", *images.split())


def first_base_image():
    """The base image that the run script is tested with."""
    return available(BASE_IMAGES[0])


def available(image):
    """The image's name, once it is sure that the image is here or could be pulled."""
    if run("docker", "image", "inspect", image).returncode != 0 and run("docker", "pull", image).returncode != 0:
        missing(f"no base image {image}")
    return image


@pytest.fixture(scope="session", params=BASE_IMAGES)
def base_image(request, engine):
    """The name of a base image that is here or could be pulled."""
    return available(request.param)


@pytest.fixture(scope="session")
def image(sample, base_image):
    """The image, built on that base, as a tag."""
    return build(sample, f"{NAME}-test:{base_image.replace(':', '-').replace('/', '-')}", base_image)


def build(sample, tag, base_image, *options, **environment):
    """Builds the image from a copy of the sample with the engine's own builder, and returns the tag."""
    command = ["docker", "build", "--tag", tag, "--build-arg", f"BASE_IMAGE={base_image}", *options, sample]
    built = run(*command, env=os.environ | environment)
    assert built.returncode == 0, built.stdout + built.stderr
    return tag


class Running:
    """The sample while it runs: where it listens, and what it has printed so far."""

    def __init__(self, process, log, port, host="127.0.0.1"):
        self.process, self.log, self.port = process, log, port
        self.endpoint = f"http://{host}:{port}"

    @property
    def output(self):
        return self.log.read_text()

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
        """Waits for the ready line, which a first run takes a while to print."""
        wait_until(lambda: "ready;" in self.output or self.process.poll() is not None, 300)
        assert self.process.poll() is None, self.output

    @property
    def received(self):
        """The request ids of the INVOKE events that the extension has logged so far."""
        pattern = r'^\[\S+\] Received event: .*"INVOKE".*"requestId": "([^"]+)"'
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
        if signum == signal.SIGINT:
            os.killpg(self.process.pid, signum)
        else:
            self.process.send_signal(signum)
        return self.process.wait(20), time.monotonic() - start


@contextlib.contextmanager
def running(sample, *arguments, script=f"{NAME}.sh", user=None, host="127.0.0.1", wait=True, **environment):
    """Runs the sample's run script until the ready line, in a session of its own, then lets the caller use it."""
    if "--docker" not in arguments:
        need_namespaces()
    port = free_port()
    environment = os.environ | environment
    publish = str(port) if host == "127.0.0.1" else f"{host}:{port}"
    with tempfile.NamedTemporaryFile(prefix="log-") as log:
        process = subprocess.Popen(
            [sample / script, "-p", publish, *arguments],
            cwd="/",
            env=environment,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        sample_run = Running(process, Path(log.name), port, host)
        try:
            if wait:
                sample_run.wait_until_ready()
            yield sample_run
        finally:
            if process.poll() is None:
                sample_run.stop()
            sys.stdout.write(sample_run.output)


@pytest.fixture(scope="session", params=["no-docker", "docker"])
def way(request):
    """Both ways to run the sample: the option of the run script, and its environment."""
    if request.param == "docker":
        request.getfixturevalue("engine")
        return "--docker", {"BASE_IMAGE": first_base_image()}
    if sys.platform != "linux":
        pytest.skip("running without Docker needs Linux")
    return "--no-docker", {}


@pytest.fixture(scope="session")
def sample_run(way, sample):
    """The sample, running, for tests that only invoke it."""
    option, environment = way
    with running(sample, option, **environment) as started:
        yield started
