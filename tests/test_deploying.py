"""The commands and the template of docs/deploying.md, with the real AWS CLI and SAM CLI."""

import http.server
import json
import os
import re
import threading
import urllib.parse

import pytest
from engine import DEFAULT_BASE_IMAGE, first_base_image
from machine import AWS_CREDENTIALS, ROOT, path_with, run, tool, yaml_documents
from pages import code_blocks
from sample import HELLO, NAME, RECEIVED, replace

pytestmark = pytest.mark.slow
ID = "123456789012"
IMAGE = f"{ID}.dkr.ecr.eu-central-1.amazonaws.com/{NAME}"
ROLE = f"arn:aws:iam::{ID}:role/{NAME}"
IDENTITY = f"<GetCallerIdentityResult><Account>{ID}</Account></GetCallerIdentityResult>"
TOKEN = {"authorizationToken": "QVdTOnBhc3N3b3Jk"}
READY = {"State": "Active", "LastUpdateStatus": "Successful"}
ANSWERS = {
    "Action=": f"<R>{IDENTITY}<CreateRoleResult/></R>",
    "GetAuthorizationToken": json.dumps({"authorizationData": [TOKEN]}),
    f"GET /2015-03-31/functions/{NAME}": json.dumps({"Configuration": READY}),
    "/invocations": json.dumps(HELLO),
    "FilterLogEvents": json.dumps({"events": [{"message": f"[{NAME}] {RECEIVED}"}]}),
    "/versions": '{"LayerVersionArn": "arn:layer:1"}',
}


class AwsApi(http.server.BaseHTTPRequestHandler):
    """Answers what the commands ask of STS, ECR, IAM, Lambda and CloudWatch Logs.

    It remembers each request as a line.
    """

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = urllib.parse.unquote_plus(content.decode())
        asked = f"{self.command} {self.path} {self.headers.get('X-Amz-Target')} {body}"
        self.server.asked.append(asked)
        self.send_response(200)
        self.end_headers()
        answers = (answer for word, answer in ANSWERS.items() if word in asked)
        self.wfile.write(next(answers, "{}").encode())

    do_GET = do_PUT = do_DELETE = do_POST


@pytest.mark.parametrize("shell", ["bash -i", "zsh -f -i"])
def test_every_command_of_the_page_works(tmp_path, copy, shell):
    """They work when pasted into bash or zsh, where zsh knows no comments, but more modifiers."""
    program, *options = shell.split()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AwsApi)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # AWS_ENDPOINT_URL needs a newer AWS CLI than Debian 12 has.
    aws = f'exec "{tool("aws")}" --endpoint-url http://127.0.0.1:{server.server_port} "$@"'
    docker = f'echo docker "$@" $([ "$1" != login ] || cat) >>"{tmp_path}/docker.log"'
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = pip | AWS_CREDENTIALS | {"HOME": str(tmp_path), "AWS_PAGER": ""}
    environment["PATH"] = path_with(tmp_path, {"aws": aws, "docker": docker, "sleep": ":"})
    commands = code_blocks("docs/deploying.md", "With the AWS CLI")
    commands += code_blocks("docs/deploying.md", "As a layer")[:1]
    pasted = {"input": "".join(commands), "env": environment, "cwd": copy}
    ran = run(tool(program), *options, **pasted)
    server.shutdown()
    assert "not found" not in ran.stderr and "rror" not in ran.stderr
    log = (tmp_path / "docker.log").read_text().splitlines()
    requests = iter([*log, *server.asked, ran.stdout])
    for expected in (
        "docker login --username AWS --password-stdin .* password$",
        f"docker build .*--target lambda --tag {IMAGE} .$",
        f"docker push {IMAGE}$",
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
        re.escape(json.dumps(HELLO)),
    ):
        assert any(re.search(expected, request, re.DOTALL) for request in requests), expected


def test_sam_builds_the_stage_without_the_emulator_invokes_it_and_shows_the_extension(copy, engine):
    replace(copy / "Dockerfile", DEFAULT_BASE_IMAGE, first_base_image())
    environment = os.environ | AWS_CREDENTIALS | {"SAM_CLI_TELEMETRY": "0", "HOME": str(copy)}
    options = {"cwd": copy, "env": environment}
    built = run(tool("sam"), "build", **options)
    assert built.returncode == 0, built.stderr
    ls = "docker", "run", "--rm", "--entrypoint", "ls"
    listing = run(*ls, f"hellofunction:{NAME}", "/usr/local/bin")
    assert (listing.returncode, "aws-lambda-rie" in listing.stdout) == (0, False)
    invoke = tool("sam"), "local", "invoke", "--event", "-"
    invoked = run(*invoke, input='{"key": "value"}', **options)
    assert json.loads(invoked.stdout.splitlines()[-1]) == HELLO, invoked.stderr
    assert f"[{NAME}] {RECEIVED}: " in invoked.stdout + invoked.stderr
    images = run("docker", "images", "--quiet", "hellofunction").stdout.split()
    run("docker", "rmi", "--force", *images)


def test_the_template_lets_the_function_start_and_choose_its_cpu():
    (template,) = yaml_documents(ROOT / "template.yaml")
    function = template["Resources"]["HelloFunction"]["Properties"]
    assert function["Timeout"] >= 10
    assert function["MemorySize"] == 256
    assert function["Architectures"] == ["Ref Architecture"]
    assert template["Parameters"]["Architecture"]["Default"] == "x86_64"
