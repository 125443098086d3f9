"""The commands and the template of docs/deploying.md, with the real AWS CLI and SAM CLI."""

import http.server
import json
import os
import re
import threading
import urllib.parse

import pytest
from engine import DEFAULT_BASE_IMAGE, first_base_image
from machine import CREDENTIALS, run, tool
from pages import code_blocks
from sample import HELLO, NAME, RECEIVED, replace

pytestmark = pytest.mark.slow
ACCOUNT = "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/{NAME}"
FUNCTIONS = "/2015-03-31/functions"
ANSWERS = {
    "GetCallerIdentity": f"<GetCallerIdentityResult><Account>{ACCOUNT}</Account></GetCallerIdentityResult>",
    "CreateRole": f"<CreateRoleResult><Role><Arn>{ROLE}</Arn></Role></CreateRoleResult>",
    "GetAuthorizationToken": {"authorizationData": [{"authorizationToken": "QVdTOnBhc3N3b3Jk"}]},
    f"GET {FUNCTIONS}/{NAME}": {"Configuration": {"State": "Active", "LastUpdateStatus": "Successful"}},
    f"POST {FUNCTIONS}/{NAME}/invocations": HELLO,
    "FilterLogEvents": {"events": [{"message": f"[{NAME}] {RECEIVED}"}]},
    f"POST /2018-10-31/layers/{NAME}/versions": {"LayerVersionArn": "arn:layer:1"},
}


class AwsApi(http.server.BaseHTTPRequestHandler):
    """Answers what the documentation's commands ask of STS, ECR, IAM, Lambda and CloudWatch Logs, and remembers it."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        form = dict(urllib.parse.parse_qsl(body))
        target = self.headers.get("X-Amz-Target")
        asked = target.split(".")[-1] if target else form.get("Action", f"{self.command} {self.path}")
        self.server.asked[asked] = form if "Action" in form else json.loads(body or "null")
        answer = ANSWERS.get(asked, "" if "Action" in form else {})
        self.send_response(200)
        self.end_headers()
        self.wfile.write((f"<R>{answer}</R>" if isinstance(answer, str) else json.dumps(answer)).encode())

    do_GET = do_PUT = do_DELETE = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def aws_shell(tmp_path, sample):
    """Runs commands of the docs with the real AWS CLI; returns what they asked of AWS and of docker, and printed."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AwsApi)
    server.asked = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # AWS_ENDPOINT_URL needs a newer AWS CLI than Debian 12 has.
    for name, script in {
        "aws": f'exec "{tool("aws")}" --endpoint-url http://127.0.0.1:{server.server_port} "$@"',
        "docker": f'echo "$@" >>"{tmp_path}/log"; [ "$1" != login ] || cat >>"{tmp_path}/log"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "log").touch()
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")} | CREDENTIALS
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "AWS_PAGER": ""}

    def start(commands):
        ran = run("bash", "-euo", "pipefail", "-c", commands, env=environment, cwd=sample)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return server.asked, (tmp_path / "log").read_text(), ran.stdout

    yield start
    server.shutdown()


def test_the_commands_create_invoke_update_and_remove_the_function(aws_shell):
    asked, docker, stdout = aws_shell("".join(code_blocks("docs/deploying.md", "With the AWS CLI")))
    image = f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com/{NAME}"
    login, password, build, push = docker.splitlines()
    assert (login.split()[:4], password) == (["login", "--username", "AWS", "--password-stdin"], "password")
    assert re.fullmatch(rf"build .*--target lambda --tag {image} \.", build)
    assert push == f"push {image}"
    (statement,) = json.loads(asked["CreateRole"]["AssumeRolePolicyDocument"])["Statement"]
    assert statement["Principal"] == {"Service": "lambda.amazonaws.com"}
    assert asked["AttachRolePolicy"]["PolicyArn"].endswith("/AWSLambdaBasicExecutionRole")
    created = asked[f"POST {FUNCTIONS}"]
    assert (created["PackageType"], created["Code"]) == ("Image", {"ImageUri": f"{image}:latest"})
    assert (created["Role"], created["Architectures"]) == (ROLE, ["x86_64"])
    assert json.dumps(HELLO) in stdout
    assert f"[{NAME}] {RECEIVED}" in stdout
    assert asked[f"PUT {FUNCTIONS}/{NAME}/code"]["ImageUri"] == f"{image}:latest"
    assert f"DELETE {FUNCTIONS}/{NAME}" in asked
    assert asked["DeleteRepository"]["repositoryName"] == asked["CreateRepository"]["repositoryName"] == NAME
    assert asked["DetachRolePolicy"]["PolicyArn"] == asked["AttachRolePolicy"]["PolicyArn"]
    assert asked["DeleteRole"]["RoleName"] == asked["CreateRole"]["RoleName"] == NAME
    assert asked["DeleteLogGroup"]["logGroupName"] == asked["FilterLogEvents"]["logGroupName"] == f"/aws/lambda/{NAME}"


def test_the_commands_publish_and_add_the_layer(aws_shell):
    asked, _, _ = aws_shell(code_blocks("docs/deploying.md", "As a layer")[0])
    assert asked[f"POST /2018-10-31/layers/{NAME}/versions"]["Content"]["ZipFile"]
    assert asked[f"PUT {FUNCTIONS}/my-function/configuration"] == {"Layers": ["arn:layer:1"]}


def test_sam_builds_the_stage_without_the_emulator_invokes_it_and_shows_the_extension(copy, engine):
    replace(copy / "Dockerfile", DEFAULT_BASE_IMAGE, first_base_image())
    options = {"cwd": copy, "env": os.environ | CREDENTIALS | {"SAM_CLI_TELEMETRY": "0", "HOME": str(copy)}}
    built = run(tool("sam"), "build", **options)
    assert built.returncode == 0, built.stderr
    try:
        listing = run("docker", "run", "--rm", "--entrypoint", "ls", "hellofunction:latest", "/usr/local/bin")
        assert (listing.returncode, "aws-lambda-rie" in listing.stdout) == (0, False)
        invoked = run(tool("sam"), "local", "invoke", "--event", "-", input='{"key": "value"}', **options)
        assert json.loads(invoked.stdout.splitlines()[-1]) == HELLO, invoked.stderr
        assert f"[{NAME}] {RECEIVED}: " in invoked.stdout + invoked.stderr
    finally:
        images = run("docker", "images", "--quiet", "--filter", "reference=hellofunction").stdout.split()
        run("docker", "rmi", "--force", *images)
