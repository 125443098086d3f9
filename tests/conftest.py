"""The fixtures that more than one file of tests uses."""

import collections
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pika
import pytest
from helpers import (
    AMQP_PASSWORD,
    AMQP_USERNAME,
    BASE_IMAGES,
    NAME,
    ROOT,
    TEST_IMAGE,
    available,
    build,
    connect,
    copy_sample,
    docker_gateway,
    first_base_image,
    free_port,
    missing,
    run,
    running,
    tool,
    wait_until,
)

# A process in the background ignores these signals, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs every attempt to connect


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that take long or need heavy tools")


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="take long or need heavy tools: ./tests/run.sh --all runs them")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            item.add_marker(slow)


def pytest_terminal_summary(terminalreporter):
    """Says in one line which tests were skipped."""
    skipped = terminalreporter.getreports("skipped")
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.write_line("Skipped: " + "; ".join(f"{count} ({why})" for why, count in reasons.most_common()))


@pytest.fixture(scope="session", autouse=True)
def no_daemon():
    """Lets only the tests of the Daemon use it. The workers of pytest-xdist inherit the variable before."""
    os.environ.pop("LAMBDA_RUNTIME_API_DAEMON", None)


@pytest.fixture(scope="session")
def folder():
    """A temporary folder that any user can read, with a name as users' folders have."""
    path = Path(tempfile.mkdtemp(prefix="it's 100 % mine "))
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


@pytest.fixture
def copy(folder, sample):
    """A copy of the sample for a test to change, after its first run if there was one."""
    return copy_sample(folder / uuid.uuid4().hex, sample)


@pytest.fixture(scope="session")
def extension(folder):
    """The extension with its dependencies, in a folder of its name."""
    target = folder / NAME
    requirements = ROOT / NAME / "requirements.txt"
    installed = run("python3", "-m", "pip", "install", "--quiet", "--target", target, "-r", requirements)
    assert installed.returncode == 0, installed.stderr
    for source in (ROOT / NAME).glob("*.py"):
        shutil.copy(source, target)
    return target / "extension.py"


@pytest.fixture(scope="session")
def obedient(extension, folder):
    """The same, but it does what its events say."""
    target = folder / "obedient" / NAME
    shutil.copytree(extension.parent, target)
    return shutil.copy(ROOT / "tests" / "obedient_extension.py", target / "extension.py")


@pytest.fixture(scope="session")
def engine():
    """Skips the test unless a Docker engine answers."""
    if run(tool("docker"), "version").returncode != 0:
        missing("no Docker engine on this machine")
    yield
    images = run("docker", "images", "--format", "{{.Repository}}:{{.Tag}}", TEST_IMAGE).stdout
    if images:
        run("docker", "image", "rm", "--force", *images.split())


@pytest.fixture(scope="session", params=BASE_IMAGES)
def base_image(request, engine):
    """The name of a base image, pulled if necessary."""
    return available(request.param)


@pytest.fixture(scope="session")
def image(sample, base_image):
    """The image, built on that base, as a tag."""
    return build(sample, f"{TEST_IMAGE}:{base_image.replace(':', '-').replace('/', '-')}", base_image)


@pytest.fixture(scope="session", params=["no-docker", "docker"])
def way(request):
    """Both ways to run the sample: the option of the run script, and its environment."""
    if request.param == "docker":
        request.getfixturevalue("engine")
        return "--docker", {"BASE_IMAGE": first_base_image()}
    if sys.platform != "linux":
        pytest.skip("running without Docker needs Linux")
    request.getfixturevalue("installed_sample")
    return "--no-docker", {}


@pytest.fixture(scope="session")
def sample_run(way, sample):
    """The sample, running, for tests that only invoke it."""
    option, environment = way
    with running(sample, option, **environment) as started:
        yield started


@pytest.fixture(scope="session")
def stand_in(folder):
    """The path of a stand-in for the Daemon that any user may start."""
    path = Path(shutil.copy(ROOT / "tests" / "stand_in_daemon.py", folder / "stand-in daemon"))
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory):
    """A RabbitMQ for the tests, reachable from this machine and its containers; yields its port."""
    server = "/usr/lib/rabbitmq/bin/rabbitmq-server"
    if not os.path.exists(server):
        missing("no RabbitMQ on this machine")
    folder, port, epmd_port = tmp_path_factory.mktemp("rabbitmq"), free_port(), free_port()
    addresses = ["127.0.0.1", *docker_gateway()]
    listeners = [f"listeners.tcp.{number} = {address}:{port}" for number, address in enumerate(addresses, 1)]
    (folder / "rabbitmq.conf").write_text("\n".join([*listeners, f"load_definitions = {folder}/definitions.json", ""]))
    allow = {"vhost": "/", "configure": ".*", "write": ".*", "read": ".*"}
    users = {"guest": "guest", AMQP_USERNAME: AMQP_PASSWORD}
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
