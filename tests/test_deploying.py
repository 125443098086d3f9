"""The commands of docs/deploying.md, with the real AWS CLI and SAM CLI."""

import http.server
import json
import os
import re
import threading
import urllib.parse
import uuid

import pytest
from engine import DEFAULT_BASE_IMAGE, first_base_image
from machine import AWS_CREDENTIALS, path_with, run, tool
from pages import code_blocks
from sample import HELLO, NAME, RECEIVED, rename, replace

pytestmark = pytest.mark.slow
PAGE = "docs/deploying.md"
ID = "123456789012"
IMAGE = f"{ID}.dkr.ecr.eu-central-1.amazonaws.com/{NAME}"
ROLE = f"arn:aws:iam::{ID}:role/{NAME}"
IDENTITY = f"<GetCallerIdentityResult><Account>{ID}</Account></GetCallerIdentityResult>"
TOKEN = {"authorizationToken": "QVdTOnBhc3N3b3Jk"}
READY = {"State": "Active", "LastUpdateStatus": "Successful"}
# {part of a request: AWS's response}; the first that fits counts.
RESPONSES = {
    "Action=": f"<R>{IDENTITY}<CreateRoleResult/></R>",
    "GetAuthorizationToken": json.dumps({"authorizationData": [TOKEN]}),
    f"GET /2015-03-31/functions/{NAME}": json.dumps({"Configuration": READY}),
    "/invocations": json.dumps(HELLO),
    "FilterLogEvents": json.dumps({"events": [{"message": f"[{NAME}] {RECEIVED}"}]}),
    "/versions": '{"LayerVersionArn": "arn:layer:1"}',
}
# What the commands do, in this order, as docker's arguments and as requests to AWS.
DOCKER = (
    "login --username AWS --password-stdin .* password$",
    f"build .*--target lambda --tag {IMAGE} .$",
    f"push {IMAGE}$",
)
REQUESTS = (
    f"CreateRepository .*{NAME}",
    f"=CreateRole.*RoleName={NAME}&.*lambda.amazonaws.com",
    "=AttachRolePolicy.*/AWSLambdaBasicExecutionRole",
    f'POST .*"{ROLE}".*"ImageUri": "{IMAGE}:latest".*x86_64',
    f"GET .*/{NAME}",
    f"POST .*/{NAME}/invocations",
    f"FilterLogEvents .*/aws/lambda/{NAME}",
    f'PUT .*/{NAME}/code .*"ImageUri": "{IMAGE}:latest"',
    f"GET .*/{NAME}",
    f"DELETE .*/{NAME}",
    f"DeleteRepository .*{NAME}",
    "=DetachRolePolicy.*/AWSLambdaBasicExecutionRole",
    f"=DeleteRole&.*RoleName={NAME}",
    f"DeleteLogGroup .*/aws/lambda/{NAME}",
    f'POST .*/layers/{NAME}/versions .*"ZipFile": "..',
    r'PUT .*/my-function/.*"Layers": \["arn:layer:1"\]',
)


class AwsApi(http.server.BaseHTTPRequestHandler):
    """Stands in for STS, ECR, IAM, Lambda and CloudWatch Logs, and keeps each request as a line."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = urllib.parse.unquote_plus(content.decode())
        request = f"{self.command} {self.path} {self.headers.get('X-Amz-Target')} {body}"
        self.server.received.append(request)
        self.send_response(200)
        self.end_headers()
        responses = (response for part, response in RESPONSES.items() if part in request)
        self.wfile.write(next(responses, "{}").encode())

    do_GET = do_PUT = do_DELETE = do_POST


@pytest.fixture
def aws():
    """A stand-in for AWS, with the requests that it has received."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), AwsApi) as server:
        server.received = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def assert_in_order(patterns, lines):
    """Asserts that a line matches each pattern, further down than the one before."""
    remaining = iter(lines)
    for pattern in patterns:
        # any() takes lines off the iterator, so the next pattern is looked for below this one.
        assert any(re.search(pattern, line, re.DOTALL) for line in remaining), pattern


@pytest.mark.parametrize("shell", ["bash -i", "zsh -f -i"])
def test_every_aws_cli_command_works_when_pasted(tmp_path, copy, aws, shell):
    """In zsh, # begins no comment, and :l changes a variable."""
    log = tmp_path / "docker.log"
    programs = {
        # AWS_ENDPOINT_URL needs a newer AWS CLI than Debian 12 has.
        "aws": f'exec "{tool("aws")}" --endpoint-url http://127.0.0.1:{aws.server_port} "$@"',
        # At a login, it also logs the password that it is given.
        "docker": f'echo "$@" $([ "$1" != login ] || cat) >>"{log}"',
        "sleep": ":",
    }
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment |= AWS_CREDENTIALS | {"HOME": str(tmp_path), "AWS_PAGER": ""}
    environment["PATH"] = path_with(tmp_path, programs)
    blocks = [*code_blocks(PAGE, "With the AWS CLI"), *code_blocks(PAGE, "As a layer")]
    program, *options = shell.split()
    pasted = run(tool(program), *options, input="".join(blocks), env=environment, cwd=copy)
    assert not re.search("not found|[Ee]rror", pasted.stderr)
    assert_in_order(DOCKER, log.read_text().splitlines())
    assert_in_order(REQUESTS, aws.received)
    assert json.dumps(HELLO) in pasted.stdout


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
