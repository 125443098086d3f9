"""The commands for AWS in the documentation, with the real AWS CLI and a server for its requests."""

import http.server
import json
import os
import re
import shlex
import threading
import urllib.parse

import pytest
from helpers import AWS_CLI, CREDENTIALS, HELLO, NAME, RECEIVED, ROOT, run, tool
from test_docs import code_blocks

pytestmark = pytest.mark.slow
ACCOUNT = "123456789012"


class AwsApi(http.server.BaseHTTPRequestHandler):
    """Answers what the documentation's commands ask of STS, ECR, IAM, Lambda and CloudWatch Logs, and remembers it."""

    role = f"arn:aws:iam::{ACCOUNT}:role/{NAME}"
    answers = {  # noqa: RUF012
        "GetCallerIdentity": f"<R><GetCallerIdentityResult><Account>{ACCOUNT}</Account></GetCallerIdentityResult></R>",
        "CreateRole": f"<R><CreateRoleResult><Role><Arn>{role}</Arn></Role></CreateRoleResult></R>",
        "AttachRolePolicy": "<R></R>",
        "CreateRepository": {"repository": {}},
        "GetAuthorizationToken": {"authorizationData": [{"authorizationToken": "QVdTOnBhc3N3b3Jk"}]},
        f"PUT /2015-03-31/functions/{NAME}/code": {},
        f"DELETE /2015-03-31/functions/{NAME}": "",
        "DeleteRepository": {},
        "DetachRolePolicy": "<R></R>",
        "DeleteRole": "<R></R>",
        "DeleteLogGroup": {},
        "POST /2015-03-31/functions": {"FunctionName": NAME, "State": "Pending"},
        f"GET /2015-03-31/functions/{NAME}": {"Configuration": {"State": "Active", "LastUpdateStatus": "Successful"}},
        f"POST /2015-03-31/functions/{NAME}/invocations": HELLO,
        "FilterLogEvents": {"events": [{"message": f"[{NAME}] {RECEIVED}"}]},
        f"POST /2018-10-31/layers/{NAME}/versions": {"LayerVersionArn": "arn:layer:1"},
        "PUT /2015-03-31/functions/my-function/configuration": {},
        "ListStackResources": "<R><ListStackResourcesResult><StackResourceSummaries><member>"
        f"<LogicalResourceId>HelloFunction</LogicalResourceId><PhysicalResourceId>{NAME}</PhysicalResourceId>"
        "<ResourceType>AWS::Lambda::Function</ResourceType><ResourceStatus>CREATE_COMPLETE</ResourceStatus>"
        "</member></StackResourceSummaries></ListStackResourcesResult></R>",
    }

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        form = dict(urllib.parse.parse_qsl(body))
        target = self.headers.get("X-Amz-Target")
        asked = target.split(".")[-1] if target else form.get("Action", f"{self.command} {self.path}")
        self.server.asked.append((asked, form if "Action" in form else json.loads(body) if body else None))
        answer = self.answers.get(asked)
        self.send_response(404 if answer is None else 200)
        self.end_headers()
        self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

    do_GET = do_PUT = do_DELETE = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def aws_shell(tmp_path):
    """Runs a code block of the docs with the real AWS CLI, a server to ask, and a docker that takes notes."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in {
        "aws": shlex.join(["exec", *map(str, AWS_CLI)]) + ' "$@"',
        "docker": f'echo "$@" >>"{tmp_path}/docker"; [ "$1" != login ] || cat >>"{tmp_path}/docker"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AwsApi)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")} | CREDENTIALS
    environment |= {
        "PATH": f"{commands}:{os.environ['PATH']}:{ROOT / '.venv' / 'sam' / 'bin'}",
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_REGION": "eu-central-1",
        "SAM_CLI_TELEMETRY": "0",
    }

    def start(block, cwd):
        ran = run("bash", "-euo", "pipefail", "-c", block, env=environment, cwd=cwd)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        docker = tmp_path / "docker"
        return dict(server.asked), docker.read_text() if docker.exists() else "", ran.stdout

    yield start
    server.shutdown()


def test_the_commands_create_and_invoke_the_function(aws_shell, sample):
    asked, docker, stdout = aws_shell(code_blocks("docs/deploying.md", "With the AWS CLI")[0], sample)
    image = f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com/{NAME}"
    assert asked["CreateRepository"]["repositoryName"] == NAME
    assert "login --username AWS --password-stdin" in docker
    assert "password" in docker.splitlines()
    assert re.search(rf"^build .*--target lambda .*--tag {image} \.$", docker, re.MULTILINE)
    assert f"push {image}" in docker
    assert json.loads(asked["CreateRole"]["AssumeRolePolicyDocument"])["Statement"] == [
        {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"}
    ]
    assert asked["AttachRolePolicy"]["PolicyArn"].endswith("/AWSLambdaBasicExecutionRole")
    created = asked["POST /2015-03-31/functions"]
    assert created["Code"] == {"ImageUri": f"{image}:latest"}
    assert (created["PackageType"], created["Architectures"]) == ("Image", ["x86_64"])
    assert created["Role"] == AwsApi.role
    assert json.dumps(HELLO) in stdout
    assert asked["FilterLogEvents"]["logGroupName"] == f"/aws/lambda/{NAME}"
    assert f"[{NAME}] {RECEIVED}" in stdout


def test_sam_shows_the_logs_of_the_stack(aws_shell, sample):
    tool("sam")
    logs, *_ = code_blocks("docs/deploying.md", "With AWS SAM")[0].splitlines()
    asked, _, stdout = aws_shell(logs, sample)
    assert asked["ListStackResources"]["StackName"] == NAME
    assert f"[{NAME}] {RECEIVED}" in stdout


def test_the_commands_update_the_function_and_remove_all_that_was_created(aws_shell, sample):
    asked, _, _ = aws_shell("".join(code_blocks("docs/deploying.md", "With the AWS CLI")), sample)
    updated = asked[f"PUT /2015-03-31/functions/{NAME}/code"]
    assert updated["ImageUri"] == asked["POST /2015-03-31/functions"]["Code"]["ImageUri"]
    assert f"DELETE /2015-03-31/functions/{NAME}" in asked
    assert asked["DeleteRepository"] == {"repositoryName": NAME, "force": True}
    assert asked["DetachRolePolicy"]["PolicyArn"] == asked["AttachRolePolicy"]["PolicyArn"]
    assert asked["DeleteRole"]["RoleName"] == asked["CreateRole"]["RoleName"]
    assert asked["DeleteLogGroup"]["logGroupName"] == asked["FilterLogEvents"]["logGroupName"]


def test_the_commands_publish_and_add_the_layer(aws_shell, sample):
    asked, _, _ = aws_shell(code_blocks("docs/deploying.md", "As a layer")[0], sample)
    published = asked[f"POST /2018-10-31/layers/{NAME}/versions"]
    assert published["Content"]["ZipFile"]
    assert asked["PUT /2015-03-31/functions/my-function/configuration"] == {"Layers": ["arn:layer:1"]}
