"""Ways to AWS: the SAM template, the commands of the README, the layer, and the Kubernetes manifest beside them."""

import calendar
import contextlib
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from pathlib import Path

import pytest
from conftest import (
    CREDENTIALS,
    DEFAULT_BASE_IMAGE,
    HELLO,
    NAME,
    ROOT,
    Running,
    copy_sample,
    first_base_image,
    free_port,
    run,
    tool,
    wait_until,
)
from test_readme import README, section

ACCOUNT = "123456789012"


# --- AWS SAM ---


def test_cfn_lint_finds_nothing_in_the_template():
    linted = run(tool("cfn-lint"), ROOT / "template.yaml")
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
    assert re.search(rf"^\[{NAME}\] Received event: .*INVOKE", invoked.stdout + invoked.stderr, re.MULTILINE)


def test_sam_local_start_lambda_serves_the_aws_cli(sam, tmp_path):
    port = free_port()

    def start(*command, **options):
        return subprocess.Popen(command, **options)

    with (tmp_path / "log").open("w") as log:
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        process = sam("local", "start-lambda", "--port", str(port), start=start, **options)
        try:

            def listens():
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    return True

            wait_until(listens, 60)
            command = [sys.executable, "-m", "awscli", "lambda", "invoke", "--function-name", "HelloFunction"]
            endpoint = ["--endpoint-url", f"http://127.0.0.1:{port}"]
            invoked = run(*command, *endpoint, tmp_path / "answer.json", env=os.environ | CREDENTIALS)
            assert invoked.returncode == 0, invoked.stderr
            assert json.loads((tmp_path / "answer.json").read_text()) == HELLO
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(60)
    assert f"[{NAME}] Received event:" in (tmp_path / "log").read_text()


# --- The AWS CLI ---


class AwsApi(http.server.BaseHTTPRequestHandler):
    """Answers what the README's commands ask of STS, ECR, IAM, Lambda and CloudWatch Logs, and remembers it."""

    role = f"arn:aws:iam::{ACCOUNT}:role/{NAME}"
    answers = {  # noqa: RUF012
        "GetCallerIdentity": f"<R><GetCallerIdentityResult><Account>{ACCOUNT}</Account></GetCallerIdentityResult></R>",
        "CreateRole": f"<R><CreateRoleResult><Role><Arn>{role}</Arn></Role></CreateRoleResult></R>",
        "AttachRolePolicy": "<R></R>",
        "CreateRepository": {"repository": {}},
        "GetAuthorizationToken": {"authorizationData": [{"authorizationToken": "QVdTOnBhc3N3b3Jk"}]},
        "POST /2015-03-31/functions": {"FunctionName": NAME, "State": "Pending"},
        f"GET /2015-03-31/functions/{NAME}": {"Configuration": {"State": "Active"}},
        f"POST /2015-03-31/functions/{NAME}/invocations": HELLO,
        "FilterLogEvents": {"events": [{"message": f"[{NAME}] Received event"}]},
        f"POST /2018-10-31/layers/{NAME}/versions": {"LayerVersionArn": "arn:layer:1"},
        "PUT /2015-03-31/functions/my-function/configuration": {},
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

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


@pytest.fixture
def aws_shell(tmp_path):
    """Runs a code block of the README with the real AWS CLI, a server for its requests and a docker that only notes."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, script in {
        "aws": f'exec "{sys.executable}" -m awscli "$@"',
        "docker": f'echo "$@" >>"{tmp_path}/docker"; [ "$1" != login ] || cat >>"{tmp_path}/docker"',
    }.items():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(0o755)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), AwsApi)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")} | CREDENTIALS
    environment |= {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_REGION": "eu-central-1",
    }

    def start(block, cwd):
        ran = run("bash", "-euo", "pipefail", "-c", block, env=environment, cwd=cwd)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        docker = tmp_path / "docker"
        return dict(server.asked), docker.read_text() if docker.exists() else "", ran.stdout

    yield start
    server.shutdown()


def code_blocks(title):
    return re.findall(r"^```sh\n(.*?)^```", section(title), re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_readme_create_and_invoke_the_function(aws_shell, sample):
    asked, docker, stdout = aws_shell(code_blocks("On AWS Lambda")[1], sample)
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
    assert f"[{NAME}] Received event" in stdout


def test_the_commands_of_the_readme_publish_and_add_the_layer(aws_shell, sample):
    asked, _, _ = aws_shell(code_blocks("As a layer")[0], sample)
    published = asked[f"POST /2018-10-31/layers/{NAME}/versions"]
    assert published["Content"]["ZipFile"]
    assert asked["PUT /2015-03-31/functions/my-function/configuration"] == {"Layers": ["arn:layer:1"]}


# --- The layer ---


@pytest.fixture(scope="module")
def layer(sample, folder):
    """The layer, made in one time zone and unpacked in another, with the modes and times that the zip has."""
    target = folder / "layer"
    made = run(sample / "layer.sh", env=os.environ | {"TZ": "JST-9"})
    assert made.returncode == 0, made.stderr
    with zipfile.ZipFile(sample / "layer.zip") as archive:
        for entry in archive.infolist():
            path = Path(archive.extract(entry, target))
            path.chmod(stat.S_IMODE(entry.external_attr >> 16))
            os.utime(path, (calendar.timegm(entry.date_time),) * 2)
    (sample / "layer.zip").unlink()
    return target


def test_the_layer_holds_the_extension_and_its_launcher(layer):
    assert sorted(path.name for path in layer.iterdir()) == ["extensions", NAME]
    assert [path.name for path in (layer / "extensions").iterdir()] == [NAME]
    assert os.access(layer / "extensions" / NAME, os.X_OK)
    assert (layer / NAME / "requests" / "__init__.py").exists()


def test_the_layer_contains_bytecode_that_needs_no_check_of_times(layer):
    sources = list(layer.rglob("*.py"))
    assert len(sources) > 50
    for source in sources:
        header = Path(importlib.util.cache_from_source(source)).read_bytes()[:16]
        unchecked = (0b01).to_bytes(4, "little")
        assert header == importlib.util.MAGIC_NUMBER + unchecked + importlib.util.source_hash(source.read_bytes())


def test_the_layer_takes_pure_wheels_although_the_lock_file_offers_compiled_ones(layer):
    assert list(layer.rglob("charset_normalizer/*.py"))
    assert not [*layer.rglob("*.so"), *layer.rglob("*.pyd")]
    assert re.search(
        r"^charset-normalizer==.*(\n +--hash=.*){3}", (ROOT / NAME / "requirements.txt").read_text(), re.MULTILINE
    )


def test_the_layer_runs_at_opt_beside_a_function_that_is_not_in_its_image(layer, installed_sample, tmp_path):
    for options in [], ["--map-root-user"]:
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *options, "sh", "-c"]
        mount = 'mount -t overlay -o "lowerdir=$0:/opt" overlay /opt'
        if run(*isolated, mount, "layer", cwd=layer.parent).returncode == 0:
            break
    else:
        pytest.skip("no mount namespaces for this user on this machine")
    installed = next(installed_sample.glob(f".run/{NAME}-*"))
    task = shutil.copytree(installed / "var" / "task", tmp_path / "task")
    shutil.copy(ROOT / "lambda_function.py", task)
    port, log = free_port(), tmp_path / "log"
    command = [*isolated, f'{mount} && cd "{task}" && exec "$@"', "layer", installed / "aws-lambda-rie"]
    command += ["--runtime-interface-emulator-address", f"127.0.0.1:{port}"]
    command += ["--runtime-api-address", f"127.0.0.1:{free_port()}"]
    command += ["python3", "-m", "awslambdaric", "lambda_function.lambda_handler"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=layer.parent, stdout=output, stderr=output)
    try:
        started = Running(process, log, port)
        wait_until(lambda: "exec 'python3'" in started.output)
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
    finally:
        process.kill()
        process.wait()


# --- Kubernetes ---


def test_the_kubernetes_manifest_is_valid():
    validated = run(tool("kubernetes-validate"), "--strict", ROOT / "examples" / "kubernetes.yaml")
    assert validated.returncode == 0, validated.stdout + validated.stderr


def test_the_readme_names_every_example():
    assert all(f"examples/{path.name}" in README for path in (ROOT / "examples").iterdir())
