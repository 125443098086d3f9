"""The commands of docs/deploying.md, with the real AWS CLI and SAM CLI."""

import contextlib
import json
import os
import re
import shlex
import uuid

import pytest
from engine import DEFAULT_BASE_IMAGE, first_base_image
from machine import (
    AWS_CREDENTIALS,
    PROGRAMS,
    LoggedProcess,
    free_port,
    path_with,
    post,
    run,
    tool,
    wait_until,
)
from pages import code_blocks
from sample import HELLO, NAME, RECEIVED, rename, replace

pytestmark = pytest.mark.slow
PAGE = "docs/deploying.md"
# What docker is told, in this order.
DOCKER = (
    r"login --username AWS --password-stdin (\d+\.dkr\.ecr\.eu-central-1\.amazonaws\.com) \S+\n"
    rf"build .*--target lambda --tag \1/{NAME} \.\n"
    rf"push \1/{NAME}\n"
)


@pytest.fixture
def aws():
    """Moto, which stands in for AWS. Returns the beginning of a command of the AWS CLI."""
    port = free_port()
    command = tool("moto_server"), "--host", "127.0.0.1", "--port", port
    settings = {"MOTO_LAMBDA_STUB_ECR": "true", "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
    with LoggedProcess(command, env=os.environ | settings):

        def is_up():
            with contextlib.suppress(OSError):
                # An invocation is to run nothing.
                no_docker = b'{"lambda": {"use_docker": false}}'
                return post(f"http://127.0.0.1:{port}/moto-api/config", no_docker)

        wait_until(is_up)
        # AWS_ENDPOINT_URL needs a newer AWS CLI than Debian 12 has.
        yield [tool("aws"), "--endpoint-url", f"http://127.0.0.1:{port}"]


@pytest.mark.parametrize("shell", ["bash -i", "zsh -f -i"])
def test_every_aws_cli_command_works_when_pasted(tmp_path, copy, aws, shell):
    """In zsh, # begins no comment, and :l changes a variable."""
    log = tmp_path / "docker.log"
    programs = {
        "aws": f'exec {shlex.join(aws)} "$@"',
        # At a login, it also logs the password that it is given.
        "docker": f'echo "$@" $([ "$1" != login ] || cat) >>"{log}"',
        "sleep": ":",
    }
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment |= AWS_CREDENTIALS | {"HOME": str(tmp_path), "AWS_PAGER": ""}
    environment["PATH"] = path_with(tmp_path, programs)
    prepared = run(PROGRAMS / "prepare_aws.sh", NAME, RECEIVED, env=environment, cwd=copy)
    assert prepared.returncode == 0, prepared.stderr
    blocks = [*code_blocks(PAGE, "With the AWS CLI"), *code_blocks(PAGE, "As a layer")]
    program, *options = shell.split()
    pasted = run(tool(program), *options, input="".join(blocks), env=environment, cwd=copy)
    assert not re.search("not found|[Ee]rror", pasted.stderr)
    assert f"[{NAME}] {RECEIVED}\n" in pasted.stdout
    assert re.fullmatch(DOCKER, log.read_text())
    functions = run(*aws, "lambda", "list-functions", env=os.environ | AWS_CREDENTIALS)
    (left,) = json.loads(functions.stdout)["Functions"]
    assert f":layer:{NAME}:1" in left["Layers"][0]["Arn"]


@pytest.fixture
def sam(copy, tmp_path):
    """Runs the SAM CLI on a copy with a name of its own; removes the images that it has built."""
    # The name is also the tag of the image.
    rename(copy, f"sam-test-{uuid.uuid4().hex[:8]}")
    replace(copy / "Dockerfile", DEFAULT_BASE_IMAGE, first_base_image())
    environment = os.environ | AWS_CREDENTIALS | {"SAM_CLI_TELEMETRY": "0", "HOME": str(copy)}

    def run_sam(command):
        path = path_with(tmp_path, {"sam": f'exec "{tool("sam")}" "$@"'})
        ran = run("sh", "-c", command, cwd=copy, env=environment | {"PATH": path})
        assert ran.returncode == 0, ran.stderr
        return ran.stdout + ran.stderr

    yield run_sam
    images = run("docker", "images", "--quiet", "hellofunction").stdout.split()
    run("docker", "rmi", "--force", *images)


@pytest.mark.usefixtures("engine")
def test_sam_builds_and_invokes_an_image_without_the_emulator(copy, sam):
    """The page's command sends a SHUTDOWN event as well."""
    sam("sam build")
    (name,) = [path.parent.name for path in copy.glob("*/extension.py")]
    ls = "docker", "run", "--rm", "--entrypoint", "ls"
    assert "rie" not in run(*ls, f"hellofunction:{name}", "/usr/local/bin").stdout
    (invoke,) = code_blocks(PAGE, "With AWS SAM")
    output = sam(invoke)
    assert json.dumps(HELLO) in output
    assert f'[{name}] {RECEIVED}: {{"eventType": "INVOKE"' in output
    assert f'[{name}] {RECEIVED}: {{"eventType": "SHUTDOWN"' in output
    assert '"shutdownReason": "SandboxTerminated"' in output
