"""The commands and the template of docs/deploying.md, with the real AWS CLI and SAM CLI."""

import http.server
import json
import os
import re
import threading
import urllib.parse
import uuid

import pytest
from engine import DEFAULT_BASE_IMAGE, first_base_image
from machine import AWS_CREDENTIALS, ROOT, path_with, run, tool, yaml_documents
from pages import code_blocks
from sample import HELLO, NAME, RECEIVED, rename, replace

pytestmark = pytest.mark.slow
ID = "123456789012"
IMAGE = f"{ID}.dkr.ecr.eu-central-1.amazonaws.com/{NAME}"
ROLE = f"arn:aws:iam::{ID}:role/{NAME}"
IDENTITY = f"<GetCallerIdentityResult><Account>{ID}</Account></GetCallerIdentityResult>"
TOKEN = {"authorizationToken": "QVdTOnBhc3N3b3Jk"}
READY = {"State": "Active", "LastUpdateStatus": "Successful"}
# {words of a request: what AWS answers}; the first that fits counts.
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


def assert_in_order(patterns, lines):
    """Asserts that a line matches each pattern, further down than the one before."""
    remaining = iter(lines)
    for pattern in patterns:
        # any() takes lines off the iterator, so the next pattern is looked for below this one.
        assert any(re.search(pattern, line, re.DOTALL) for line in remaining), pattern


@pytest.mark.parametrize("shell", ["bash -i", "zsh -f -i"])
def test_every_command_of_the_page_works(tmp_path, copy, shell):
    """Pasted into bash, or into zsh, where # begins no comment and :l changes a variable."""
    program, *options = shell.split()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AwsApi)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # AWS_ENDPOINT_URL needs a newer AWS CLI than Debian 12 has.
    aws = f'exec "{tool("aws")}" --endpoint-url http://127.0.0.1:{server.server_port} "$@"'
    # Logs each command and, at a login, the password that it is given.
    docker = f'echo docker "$@" $([ "$1" != login ] || cat) >>"{tmp_path}/docker.log"'
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = pip | AWS_CREDENTIALS | {"HOME": str(tmp_path), "AWS_PAGER": ""}
    environment["PATH"] = path_with(tmp_path, {"aws": aws, "docker": docker, "sleep": ":"})
    commands = code_blocks("docs/deploying.md", "With the AWS CLI")
    commands += code_blocks("docs/deploying.md", "As a layer")[:1]
    pasted = {"input": "".join(commands), "env": environment, "cwd": copy}
    ran = run(tool(program), *options, **pasted)
    server.shutdown()
    assert "not found" not in ran.stderr
    assert "rror" not in ran.stderr
    log = (tmp_path / "docker.log").read_text().splitlines()
    expected = (
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
    )
    assert_in_order(expected, [*log, *server.asked, ran.stdout])


@pytest.fixture
def images_of_sam(engine):
    """Removes, in the end, the images that SAM has built."""
    yield
    images = run("docker", "images", "--quiet", "hellofunction").stdout.split()
    run("docker", "rmi", "--force", *images)


@pytest.mark.usefixtures("images_of_sam")
def test_sam_builds_an_image_without_the_emulator_and_invokes_it(copy):
    """What SAM prints shows that the extension runs, too.

    The copy has a name of its own, which is also the tag of its image.
    """
    name = f"sam-test-{uuid.uuid4().hex[:8]}"
    rename(copy, name)
    replace(copy / "Dockerfile", DEFAULT_BASE_IMAGE, first_base_image())
    environment = os.environ | AWS_CREDENTIALS | {"SAM_CLI_TELEMETRY": "0", "HOME": str(copy)}
    options = {"cwd": copy, "env": environment}
    built = run(tool("sam"), "build", **options)
    assert built.returncode == 0, built.stderr
    ls = "docker", "run", "--rm", "--entrypoint", "ls"
    listing = run(*ls, f"hellofunction:{name}", "/usr/local/bin")
    assert listing.returncode == 0, listing.stderr
    assert "aws-lambda-rie" not in listing.stdout
    invoke = tool("sam"), "local", "invoke", "--event", "-"
    invoked = run(*invoke, input='{"key": "value"}', **options)
    assert json.loads(invoked.stdout.splitlines()[-1]) == HELLO, invoked.stderr
    assert f"[{name}] {RECEIVED}: " in invoked.stdout + invoked.stderr


def test_the_template_gives_init_its_ten_seconds_and_a_choice_of_cpu():
    """The figures of the README are for 256 MB. docs/deploying.md chooses arm64."""
    (template,) = yaml_documents(ROOT / "template.yaml")
    function = template["Resources"]["HelloFunction"]["Properties"]
    assert function["Timeout"] >= 10
    assert function["MemorySize"] == 256
    assert function["Architectures"] == ["Ref Architecture"]
    architecture = template["Parameters"]["Architecture"]
    assert architecture["Default"] == "x86_64"
    assert {*architecture["AllowedValues"]} == {"x86_64", "arm64"}
