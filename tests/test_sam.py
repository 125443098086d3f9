"""The template, and the image, with the real AWS SAM CLI."""

import json
import os
import re
import signal
import subprocess

import pytest
from helpers import (
    AWS_CLI,
    CREDENTIALS,
    DEFAULT_BASE_IMAGE,
    HELLO,
    NAME,
    RECEIVED,
    ROOT,
    copy_sample,
    first_base_image,
    free_port,
    listens,
    run,
    tool,
    wait_until,
)
from test_docs import code_blocks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "variables", ["", *code_blocks("docs/deploying.md", "With AWS SAM", "yaml")], ids=["", "variables"]
)
def test_cfn_lint_finds_nothing_in_the_template(variables, tmp_path):
    template = (ROOT / "template.yaml").read_text()
    properties = "    Properties:\n"
    assert template.count(properties) == 1
    (tmp_path / "template.yaml").write_text(template.replace(properties, properties + variables))
    linted = run(tool("cfn-lint"), tmp_path / "template.yaml")
    assert linted.returncode == 0, linted.stdout


@pytest.fixture(scope="module")
def sam(folder, engine):
    """Runs a sam command on a copy of the sample, built."""
    command = tool("sam")
    sample = copy_sample(folder / "sam")
    stand_in = run("docker", "image", "inspect", DEFAULT_BASE_IMAGE).returncode != 0
    if stand_in:
        run("docker", "tag", first_base_image(), DEFAULT_BASE_IMAGE)
    environment = os.environ | CREDENTIALS | {"SAM_CLI_TELEMETRY": "0", "HOME": str(folder)}

    def start(*arguments, start=run, **options):
        return start(command, *arguments, cwd=sample, env=environment, **options)

    try:
        built = start("build")
        assert built.returncode == 0, built.stderr
        yield start
    finally:
        if stand_in:
            run("docker", "rmi", DEFAULT_BASE_IMAGE)
        images = run("docker", "images", "--quiet", "--filter", "reference=hellofunction").stdout.split()
        run("docker", "rmi", "--force", *images)


def test_sam_builds_the_stage_without_the_emulator(sam):
    ran = run("docker", "run", "--rm", "--entrypoint", "ls", "hellofunction:latest", "/usr/local/bin")
    assert ran.returncode == 0
    assert "aws-lambda-rie" not in ran.stdout


def test_sam_local_invoke_answers_and_shows_the_extension(sam):
    invoked = sam("local", "invoke", "--event", "-", input='{"key": "value"}')
    assert json.loads(invoked.stdout.splitlines()[-1]) == HELLO, invoked.stderr
    assert re.search(rf"^\[{NAME}\] {RECEIVED}: .*INVOKE", invoked.stdout + invoked.stderr, re.MULTILINE)


def test_sam_local_start_lambda_serves_the_aws_cli(sam, tmp_path):
    port = free_port()

    def start(*command, **options):
        return subprocess.Popen(command, **options)

    with (tmp_path / "log").open("w") as log:
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        process = sam("local", "start-lambda", "--port", str(port), start=start, **options)
        try:
            wait_until(lambda: listens(port), 60)
            command = [*AWS_CLI, "lambda", "invoke", "--function-name", "HelloFunction"]
            endpoint = ["--endpoint-url", f"http://127.0.0.1:{port}"]
            invoked = run(*command, *endpoint, tmp_path / "answer.json", env=os.environ | CREDENTIALS)
            assert invoked.returncode == 0, invoked.stderr
            assert json.loads((tmp_path / "answer.json").read_text()) == HELLO
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
    assert f"[{NAME}] {RECEIVED}:" in (tmp_path / "log").read_text()
