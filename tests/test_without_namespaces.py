"""Running without Docker where namespaces are refused, as in a plain container: by links into /opt."""

import contextlib
import json
import subprocess

import pytest
from helpers import HELLO, NAME, TEST_IMAGE, Running, build, copy_sample, first_base_image, free_port, run, wait_until

LINKS = ["extensions", NAME]


class PlainContainer:
    """A container, which refuses namespaces, with Python, pip and a copy of the sample."""

    def __init__(self, name, port, log):
        self.name, self.port, self.log = name, port, log

    def command(self, *command, **options):
        return ["docker", "exec", *options.get("options", ()), self.name, *command]

    def ran(self, *command):
        """The output of a command in the container, as words."""
        return run(*self.command(*command)).stdout.split()

    @contextlib.contextmanager
    def running(self):
        """Runs the sample; at the end the caller has killed it."""
        script = f'echo $$ >/tmp/pid && exec /tmp/sample/{NAME}.sh -p 0.0.0.0:8080 "$@"'
        with self.log.open("w") as log:
            process = subprocess.Popen(self.command("bash", "-c", script, "bash"), stdout=log, stderr=log)
        started = Running(process, [self.log], self.port)
        started.wait_until_ready()
        yield started

    def kill(self, signal):
        run(*self.command("bash", "-c", f"kill -{signal} $(cat /tmp/pid)"))

    def runs(self):
        """Whether something of the sample runs."""
        commands = run("docker", "top", self.name, "-eo", "args").stdout
        return any(name in commands for name in ("awslambdaric", "extension.py", "aws-lambda-rie"))


@pytest.fixture(scope="module")
def image(folder, engine):
    sample = copy_sample(folder / "plain")
    return build(sample, f"{TEST_IMAGE}:plain", first_base_image(), "--target", "dependencies"), sample


@pytest.fixture
def plain_container(image, tmp_path):
    image, sample = image
    port = free_port()
    options = ["--volume", f"{sample}:/mounted:ro", "--publish", f"127.0.0.1:{port}:8080"]
    name = run("docker", "run", "--rm", "--detach", "--init", *options, image, "sleep", "600").stdout.strip()
    container = PlainContainer(name, port, tmp_path / "log")
    container.ran("cp", "-r", "/mounted", "/tmp/sample")
    yield container
    run("docker", "kill", name)


def test_it_links_into_opt_for_the_duration_of_the_run(plain_container):
    with plain_container.running() as started:
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
        assert f"{NAME}: no namespaces here: linking into /opt for the duration of the run\n" in started.output
        assert plain_container.ran("ls", "/opt") == LINKS
        plain_container.kill("TERM")
        assert started.process.wait(5) == 0
        assert '"eventType": "SHUTDOWN"' in started.output
    assert plain_container.ran("ls", "/opt") == []
    assert not plain_container.runs()


def test_after_a_killed_run_nothing_runs_and_the_next_run_takes_its_place(plain_container):
    with plain_container.running() as started:
        assert json.loads(started.invoke()) == HELLO
        plain_container.kill("KILL")
        wait_until(lambda: not plain_container.runs())
        assert plain_container.ran("ls", "/opt") == LINKS
    with plain_container.running() as started:
        assert json.loads(started.invoke()) == HELLO
        assert len(plain_container.ran("bash", "-c", "ls -d /tmp/sample/.run/run.*")) == 1


def test_it_does_not_replace_what_is_in_opt(plain_container):
    plain_container.ran("mkdir", "/opt/extensions")
    ran = run(*plain_container.command(f"/tmp/sample/{NAME}.sh"))
    assert "/opt/extensions" in ran.stderr.splitlines()[-2]
    advice = "end the run that uses it, or use --docker, or root"
    assert ran.stderr.splitlines()[-1] == f"{NAME}: cannot link into /opt; {advice}"
    assert ran.returncode == 1
    assert plain_container.ran("ls", "/opt") == ["extensions"]


def test_where_opt_is_refused_too_it_says_so(plain_container):
    plain_container.ran("chown", "-R", "12345", "/tmp/sample")
    ran = run(*plain_container.command(f"/tmp/sample/{NAME}.sh", options=["--user", "12345"]))
    assert ran.stderr.splitlines()[-1].startswith(f"{NAME}: cannot link into /opt; ")
    assert ran.returncode == 1
