"""The fixtures: copies of the sample, the ways to run it, and what it runs in."""

import contextlib
import functools
import os
import re
import shutil
import signal
import tempfile
import uuid
from pathlib import Path

import pika
import pytest
from batching import batching_variant
from engine import BASE_IMAGES, TEST_IMAGE, build, first_base_image, pulled
from extension_process import variant
from installation import installation, link_installation
from machine import PROGRAMS, ROOT, run, skip_except_on_ci, tool, wait_until
from rabbitmq import PASSWORD, USERNAME, connect
from running import WayToRun
from sample import NAME, copy_sample, make_evaluating, make_scripted

# A process that runs in the background, or under nohup, ignores these signals, and so would all
# that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Nothing compiles the sample's sources where they are.
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


@pytest.fixture(scope="session")
def folder():
    """A temporary folder that any user can read, with a name as users' folders have."""
    path = Path(tempfile.mkdtemp(prefix="it's 100 % mine, a=b "))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def sample(folder):
    """A copy of the sample, as a new user has it."""
    return copy_sample(folder / "sample")


@pytest.fixture
def copy(folder, sample):
    """A copy of the sample for a test to change, after its first run if there was one."""
    return copy_sample(folder / uuid.uuid4().hex, sample)


@pytest.fixture
def evaluating(copy):
    """A copy of the sample whose function evaluates what its event says under "do"."""
    return make_evaluating(copy)


@pytest.fixture
def scripted_copy(copy):
    """A copy of the sample whose extension runs the code in its environment variables AT_…"""
    return make_scripted(copy)


@pytest.fixture(scope="session")
def engine():
    """Skips the test unless a Docker engine answers."""
    if run(tool("docker"), "version").returncode != 0:
        skip_except_on_ci("no Docker engine on this machine")
    yield
    images = run("docker", "images", "--format", "{{.Repository}}:{{.Tag}}", TEST_IMAGE)
    run("docker", "image", "rm", "--force", *images.stdout.split())


@pytest.fixture(scope="session", params=BASE_IMAGES)
def base_image(request, engine):
    """The name of a base image, pulled if necessary."""
    return pulled(request.param)


@pytest.fixture(scope="session")
def image(sample, base_image):
    """The image, built on that base."""
    return build(sample, re.sub(r"\W", "-", base_image), base_image)


@pytest.fixture(scope="session", params=["no-docker", "docker"])
def start(request):
    """Runs the sample, without Docker and in Docker: `with start(copy) as process`."""
    if request.param == "docker":
        request.getfixturevalue("engine")
        return WayToRun("--docker", "host.docker.internal", BASE_IMAGE=first_base_image())
    request.getfixturevalue("installed_sample")
    return WayToRun("--no-docker", "localhost")


@pytest.fixture(scope="session")
def installed_sample(sample):
    """The copy of the sample, which finds what a run without Docker has installed."""
    link_installation(sample)
    return sample


@pytest.fixture(scope="session")
def stand_in(folder):
    """The path of a stand-in for the Daemon that any user may start."""
    path = Path(shutil.copy(PROGRAMS / "stand_in_daemon.py", folder / "stand-in daemon"))
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="session")
def extension(folder):
    """The main.py of the extension, with its dependencies, in a folder of its name."""
    target = Path(shutil.copytree(installation() / "extension", folder / NAME))
    for source in (ROOT / NAME).glob("*.py"):
        shutil.copy(source, target)
    return target / "main.py"


@pytest.fixture(scope="session")
def scripted(extension, folder):
    """The main.py of an extension that runs the code that it is given: scripted_extension.py."""
    code = (PROGRAMS / "scripted_extension.py").read_text()
    return variant(extension, folder / "scripted", {"extension.py": code})


@pytest.fixture
def batching_with(extension, tmp_path):
    """Makes an extension of some code and batches.py: batching_with(code, BATCH_RECORDS=10)."""
    return functools.partial(batching_variant, extension, tmp_path)


@pytest.fixture(scope="session")
def rabbitmq_image(engine):
    """The image of examples/compose.yaml, or without a registry, one with Debian's RabbitMQ."""
    (image,) = re.findall(r"image: (rabbitmq\S+)", (ROOT / "examples" / "compose.yaml").read_text())
    commands = ["image", "inspect"], ["pull"]
    if any(run("docker", *command, image).returncode == 0 for command in commands):
        return image
    # Under a name of its own, so that nobody takes it for the official one.
    dockerfile = "--file", PROGRAMS / "rabbitmq.Dockerfile"
    return build(ROOT, "kept", first_base_image(), *dockerfile, name="sample-test-rabbitmq")


@pytest.fixture(scope="session")
def rabbitmq(rabbitmq_image):
    """The address of the broker for this machine and for containers."""
    user = f"--env=RABBITMQ_DEFAULT_USER={USERNAME}", f"--env=RABBITMQ_DEFAULT_PASS={PASSWORD}"
    container = run("docker", "run", "--rm", "--detach", *user, rabbitmq_image).stdout.strip()
    address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    host = run("docker", "inspect", "--format", address, container).stdout.strip()

    def is_up():
        with contextlib.suppress(pika.exceptions.AMQPError), connect(host):
            return True

    wait_until(is_up)
    yield host
    run("docker", "kill", container)
