"""The running sample, with and without Docker: every way to invoke it, and what a function can do to it."""

import contextlib
import http.client
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import (
    AWS_CLI,
    CREDENTIALS,
    HELLO,
    NAME,
    RECEIVED,
    copy_misbehaving_sample,
    first_base_image,
    missing,
    once,
    processes_of,
    run,
    running,
    tool,
    wait_until,
)

TIMEOUT = 5  # enough for a cold start on a busy machine


@pytest.fixture
def misbehaving_sample(tmp_path, sample):
    """A copy of the sample whose function does what the event says."""
    return copy_misbehaving_sample(tmp_path / "sample", sample)


def curl(sample_run):
    """What the README's command prints, and the status of the answer."""
    url = f"{sample_run.endpoint}/2015-03-31/functions/function/invocations"
    answer, _, status = run(tool("curl"), "-w", " %{http_code}", "-XPOST", url, "-d", "{}").stdout.rpartition(" ")
    return answer, int(status)


def test_curl_gets_hello_from_lambda(sample_run):
    assert curl(sample_run) == (json.dumps(HELLO), 200)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_the_aws_cli_gets_hello_from_lambda(sample_run, tmp_path, version):
    # Version 2 has no package on PyPI: it is the distribution's, or AWS's installer has put it there.
    command = AWS_CLI if version == 1 else (shutil.which("aws", path="/usr/local/bin:/usr/bin"),)
    if not command[0] or f"aws-cli/{version}" not in run(*command, "--version").stdout:
        missing(f"no AWS CLI version {version} on this machine")
    options = ["--cli-binary-format", "raw-in-base64-out"] if version == 2 else []
    options += ["--function-name", "function", "--payload", '{"key": "value"}', "--endpoint-url", sample_run.endpoint]
    answer = tmp_path / "answer.json"
    invoked = run(*command, "lambda", "invoke", *options, answer, env=os.environ | CREDENTIALS)
    assert invoked.returncode == 0, invoked.stderr
    assert json.loads(answer.read_text()) == HELLO


def test_boto3_gets_hello_from_lambda(sample_run):
    assert sample_run.boto3_answer() == HELLO


def test_one_extension_logs_each_of_a_hundred_invocations(way, sample, sample_run):
    with sample_run.receives(100):
        assert all(json.loads(sample_run.invoke()) == HELLO for _ in range(100))
    started = re.findall(r"^START RequestId: (\S+)", sample_run.output, re.MULTILINE)
    assert sample_run.received[-100:] == started[-100:]
    assert sample_run.output.count("Registered with ID") == 1
    if way[0] == "--docker":
        commands = run("docker", "top", sample_run.container, "-eo", "pid,args").stdout.splitlines()
    else:
        commands = processes_of(sample)
    (extension,) = [command for command in commands if re.search(rf" /opt/(extensions/)?{NAME}", command)]
    assert re.search(rf"python3 -\S.* /opt/{NAME}/extension.py$", extension)  # the launcher has become it


@pytest.mark.parametrize(
    ("payload", "answer", "reason"),
    [
        (b'{"sleep": 60}', f"Task timed out after {TIMEOUT}.00 seconds", "Timeout"),
        (b'{"exit": 3}', "Runtime.ExitError", "ReleaseFail"),
    ],
)
def test_a_function_that_takes_too_long_or_dies_restarts_with_the_extension(
    way, misbehaving_sample, payload, answer, reason
):
    option, environment = way
    with running(misbehaving_sample, option, AWS_LAMBDA_FUNCTION_TIMEOUT=str(TIMEOUT), **environment) as started:
        assert json.loads(started.invoke(b'{"raise": "no"}'))["errorType"] == "ValueError"  # not a reason to restart
        assert answer in started.invoke(payload).decode()
        assert json.loads(started.invoke_again(b'{"still": "here"}')) == {"still": "here"}
        assert f'"shutdownReason": "{reason}"' in started.output
        wait_until(lambda: len(started.received) == 3)
        assert started.output.count("Registered with ID") == 2


@pytest.mark.parametrize(
    ("failure", "answer"),
    [
        ("raise ValueError", (json.dumps(HELLO), 502)),
        ("signal.pause()", (f"Task timed out after {TIMEOUT}.00 seconds", 200)),
    ],
    ids=["fails", "hangs"],
)
def test_an_extension_that_fails_or_hangs_fails_its_invocation_and_is_started_again(way, copy, failure, answer):
    option, environment = way
    extension = copy / NAME / "extension.py"
    logging = f'log(f"{RECEIVED}'
    with once(failure) as line:
        source = extension.read_text().replace(logging, f"{line}    {logging}")
        extension.write_text(f"import os, signal\n{source}")
        with running(copy, option, AWS_LAMBDA_FUNCTION_TIMEOUT=str(TIMEOUT), **environment) as started:
            assert curl(started) == answer
            assert json.loads(started.invoke_again()) == HELLO
            assert started.output.count("Registered with ID") > 1


def test_a_second_invocation_at_a_time_ends_the_emulator_and_the_run(way, misbehaving_sample):
    option, environment = way
    with running(misbehaving_sample, option, **environment) as started, ThreadPoolExecutor() as pool:
        pool.submit(started.invoke, b'{"sleep": 5}')
        wait_until(lambda: started.received)
        with contextlib.suppress(OSError, http.client.HTTPException):
            started.invoke()
        assert started.process.wait(20) == 1
        what = "the container" if option == "--docker" else "aws-lambda-rie"
        assert started.output.endswith(f"{NAME}: {what} ended with status 2; see its output above\n")


def test_lambda_managed_instances_run_four_invocations_at_the_same_time(misbehaving_sample, engine):
    environment = {"AWS_LAMBDA_MAX_CONCURRENCY": "4", "BASE_IMAGE": first_base_image()}
    with running(misbehaving_sample, "--docker", **environment) as started, ThreadPoolExecutor(4) as pool:

        def invoke(payload):
            return started.invoke(payload, **{"Content-Type": "application/json"})

        payloads = [b'{"sleep": 2}'] * 4
        wait_until(lambda: list(pool.map(invoke, payloads)) == payloads, 60)  # the first ones meet unready workers
        started.stop()
        assert "-H 'Content-Type: application/json'" in started.output
        assert '"INVOKE"' not in started.output
        assert '"eventType": "SHUTDOWN"' in started.output
