"""The running sample, with and without Docker: every way to invoke it, and what a function can do to it."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import time
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


@pytest.fixture(scope="module")
def misbehaving_sample(way, folder, sample):
    """A copy of the sample whose function does what the event says."""
    return copy_misbehaving_sample(folder / f"misbehaving{way[0]}", sample)


@pytest.fixture(scope="module")
def misbehaving_run(way, misbehaving_sample):
    """That copy, running, with a short function timeout."""
    option, environment = way
    environment = environment | {"AWS_LAMBDA_FUNCTION_TIMEOUT": str(TIMEOUT)}
    with running(misbehaving_sample, option, "-e", "GREETING=good morning", "-e", "NOT_SET", **environment) as started:
        yield started


def continues(sample_run):
    """Asserts that the next invocation is answered, and that the extension logs it."""
    with sample_run.receives():
        assert json.loads(sample_run.invoke_again(b'{"still": "here"}')) == {"still": "here"}


def test_curl_gets_hello_from_lambda(sample_run):
    url = f"{sample_run.endpoint}/2015-03-31/functions/function/invocations"
    answer = run(tool("curl"), "-XPOST", url, "-d", '{"key": "value"}')
    assert json.loads(answer.stdout) == HELLO


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_the_aws_cli_gets_hello_from_lambda(sample_run, tmp_path, version):
    commands = [AWS_CLI] if version == 1 else [[f"{path}/aws"] for path in os.environ["PATH"].split(":")]
    for command in commands:
        if os.access(command[0], os.X_OK) and f"aws-cli/{version}" in run(*command, "--version").stdout:
            break
    else:
        missing(f"no AWS CLI version {version} on this machine")
    options = ["--cli-binary-format", "raw-in-base64-out"] if version == 2 else []
    options += ["--function-name", "function", "--payload", '{"key": "value"}', "--endpoint-url", sample_run.endpoint]
    answer = tmp_path / "answer.json"
    invoked = run(*command, "lambda", "invoke", *options, answer, env=os.environ | CREDENTIALS)
    assert invoked.returncode == 0, invoked.stderr
    assert json.loads(answer.read_text()) == HELLO


def test_boto3_gets_hello_from_lambda(sample_run):
    assert sample_run.boto3_answer() == HELLO


def test_the_extension_logs_the_request_id_of_each_invocation(sample_run):
    with sample_run.receives(3):
        for _ in range(3):
            sample_run.invoke()
    started = re.findall(r"^START RequestId: (\S+)", sample_run.output, re.MULTILINE)
    assert sample_run.received[-3:] == started[-3:]


def test_a_hundred_invocations_in_a_row_are_answered_and_logged(sample_run):
    with sample_run.receives(100):
        assert all(json.loads(sample_run.invoke()) == HELLO for _ in range(100))
    assert sample_run.output.count("Registered with ID") == 1


def test_one_process_is_the_extension_and_its_launcher_is_gone(way, sample, sample_run):
    sample_run.invoke()
    assert f"[{NAME}] Launching extension\n" in sample_run.output
    if way[0] == "--docker":
        processes = run("docker", "top", sample_run.container, "-eo", "pid,args").stdout.splitlines()
        commands = [line.split(None, 1)[1] for line in processes]
    else:
        commands = processes_of(sample)
    (extension,) = [command for command in commands if re.search(rf" /opt/(extensions/)?{NAME}", command)]
    assert re.fullmatch(rf"\S*python3 -\S.* /opt/{NAME}/extension.py", extension)


def test_a_payload_of_five_megabytes_goes_through(misbehaving_run):
    payload = json.dumps({"data": "x" * 5_000_000}).encode()
    assert json.loads(misbehaving_run.invoke(payload)) == json.loads(payload)
    continues(misbehaving_run)


def test_a_handler_that_raises_is_answered_with_its_error(misbehaving_run):
    error = json.loads(misbehaving_run.invoke(b'{"raise": "no"}'))
    assert (error["errorType"], error["errorMessage"]) == ("ValueError", "no")
    continues(misbehaving_run)


def test_a_body_that_is_not_json_is_answered_with_an_error(misbehaving_run):
    error = json.loads(misbehaving_run.invoke(b"{not json"))
    assert error["errorType"] == "Runtime.UnmarshalError"
    continues(misbehaving_run)


def test_after_a_timeout_function_and_extension_restart(misbehaving_run):
    continues(misbehaving_run)
    registered = misbehaving_run.output.count("Registered with ID")
    answer = misbehaving_run.invoke(b'{"sleep": 60}')
    assert answer.decode() == f"Task timed out after {TIMEOUT}.00 seconds"
    continues(misbehaving_run)
    assert '"eventType": "SHUTDOWN"' in misbehaving_run.output
    assert '"shutdownReason": "Timeout"' in misbehaving_run.output
    assert misbehaving_run.output.count("Registered with ID") > registered


def test_after_the_function_dies_function_and_extension_restart(misbehaving_run):
    continues(misbehaving_run)
    registered = misbehaving_run.output.count("Registered with ID")
    error = json.loads(misbehaving_run.invoke(b'{"exit": 3}'))
    assert error["errorType"] == "Runtime.ExitError"
    continues(misbehaving_run)
    assert '"shutdownReason": "ReleaseFail"' in misbehaving_run.output
    assert misbehaving_run.output.count("Registered with ID") > registered


def test_the_function_gets_the_variables_given_with_e_and_nothing_else_of_the_shell(misbehaving_run):
    environ = json.loads(misbehaving_run.invoke(b'{"environ": true}'))
    assert environ["GREETING"] == "good morning"
    assert environ["AWS_LAMBDA_FUNCTION_NAME"] == NAME
    assert environ["AWS_LAMBDA_FUNCTION_TIMEOUT"] == str(TIMEOUT)
    assert not {"NOT_SET", "HOST", "PORT", "RUNTIME_API_PORT", "BASE_IMAGE", "PYTEST_CURRENT_TEST"} & environ.keys()


def test_four_invocations_run_at_the_same_time_on_managed_instances(way, misbehaving_sample):
    option, environment = way
    if option == "--no-docker":
        pytest.skip("the emulator's mode for Lambda Managed Instances needs Docker")
    with running(misbehaving_sample, option, "-e", "AWS_LAMBDA_MAX_CONCURRENCY=4", **environment) as started:

        def five_at_once():
            with ThreadPoolExecutor(5) as pool:
                answers = []
                for seconds in 2, 2, 2, 2, 0:
                    time.sleep(0.1)
                    payload, headers = json.dumps({"sleep": seconds}).encode(), {"Content-Type": "application/json"}
                    answers.append(pool.submit(started.invoke, payload, **headers))
            return [json.loads(answer.result() or b"null") for answer in answers]

        expected = [{"sleep": 2}] * 4 + [{"errorType": "Runtime.Unavailable"}]
        wait_until(lambda: five_at_once() == expected, 60)  # the first ones meet workers that are not ready
        started.stop()
        assert "-H 'Content-Type: application/json'" in started.output
        assert '"INVOKE"' not in started.output
        assert '"eventType": "SHUTDOWN"' in started.output


def test_a_second_invocation_at_a_time_ends_the_emulator_and_the_run(way, misbehaving_sample):
    option, environment = way
    with running(misbehaving_sample, option, **environment) as started, ThreadPoolExecutor() as pool:
        pool.submit(started.invoke, b'{"sleep": 5}')
        wait_until(lambda: started.received)
        with contextlib.suppress(OSError, http.client.HTTPException):
            started.invoke()
        assert started.process.wait(20) == 1
        assert started.output.splitlines()[-1].endswith("ended with status 2; see its output above")


@pytest.mark.parametrize(
    ("failure", "status", "answer"),
    [
        ("raise ValueError", 502, json.dumps(HELLO).encode()),
        ("signal.pause()", 200, f"Task timed out after {TIMEOUT}.00 seconds".encode()),
    ],
    ids=["exits", "hangs"],
)
def test_an_extension_that_fails_fails_its_invocation_and_is_started_again(way, copy, failure, status, answer):
    option, environment = way
    extension = copy / NAME / "extension.py"
    logging = f'log(f"{RECEIVED}'
    with once(failure) as line:
        source = extension.read_text().replace(logging, f"{line}    {logging}")
        extension.write_text(f"import os, signal\n{source}")
        with running(copy, option, AWS_LAMBDA_FUNCTION_TIMEOUT=str(TIMEOUT), **environment) as started:
            url = f"{started.endpoint}/2015-03-31/functions/function/invocations"
            invoked = run("curl", "-sS", "-w", " %{http_code}", "-d", "{}", url)
            assert invoked.stdout.encode() == answer + f" {status}".encode()
            assert json.loads(started.invoke_again()) == HELLO
            assert started.output.count("Registered with ID") > 1


def test_docker_stop_ends_it_within_two_seconds(sample, engine):
    with running(sample, "--docker", BASE_IMAGE=first_base_image()) as started:
        container = started.container
        started.invoke()
        start = time.monotonic()
        subprocess.run(["docker", "stop", container], check=True, stdout=subprocess.DEVNULL)
        assert time.monotonic() - start < 2
        assert started.process.wait(5) == 0
