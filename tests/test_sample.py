"""The sample, in Docker and without: ways to invoke it, and what can happen to it."""

import contextlib
import http.client
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from machine import AWS_CREDENTIALS, path_with, processes_of, run, tool, wait_until
from pages import code_blocks
from sample import HELLO, NAME, make_scripted

TIMEOUT = 5  # enough for a cold start on a busy machine


@pytest.fixture(scope="module")
def shared(start, sample):
    """The sample, running, for tests that only invoke it."""
    with start(sample) as process:
        yield process


def curl(process):
    """Runs the command that the run says to try; returns what it prints, and the status."""
    command = re.search("curl .*", process.output).group().replace("curl", tool("curl"), 1)
    answer, _, status = run("sh", "-c", f"{command} -w ' %{{http_code}}'").stdout.rpartition(" ")
    return answer, int(status)


def invoke_again(process, event=None):
    """Invokes after a failure, until AWS's emulator no longer cancels the invocation.

    The emulator cleans up late.
    """

    def answer():
        got = process.invoke(event)
        return None if "ErrGateCanceled" in str(got) else got

    return wait_until(answer)


def test_curl_gets_hello_from_lambda(shared):
    assert curl(shared) == (json.dumps(HELLO), 200)


def shown_way_to_invoke(process, page, title, language):
    """The last block of code below a heading of a page, for that run."""
    *_, code = code_blocks(page, title, language)
    assert "http://localhost:8080" in code
    return code.replace("http://localhost:8080", process.endpoint)


@pytest.mark.slow
def test_the_aws_cli_gets_hello_from_lambda(shared, tmp_path):
    code = shown_way_to_invoke(shared, "README.md", "Run it", "sh")
    if "aws-cli/1" in run(tool("aws"), "--version").stdout:
        code = code.replace("--cli-binary-format raw-in-base64-out ", "")
    path = path_with(tmp_path, {"aws": f'exec "{tool("aws")}" "$@"'})
    invoked = run("sh", "-c", code, cwd=tmp_path, env=os.environ | {"PATH": path})
    assert json.loads((tmp_path / "response.json").read_text()) == HELLO, invoked.stderr


@pytest.mark.slow
def test_boto3_gets_hello_from_lambda(shared):
    page = "docs/running-locally.md", "Invoke it from Python", "python"
    code = shown_way_to_invoke(shared, *page)
    invoked = run(tool("python3"), "-c", code, env=os.environ | AWS_CREDENTIALS)
    assert invoked.stdout == f"{json.dumps(HELLO).encode()}\n", invoked.stderr


def test_one_extension_logs_each_of_a_hundred_invocations(start, sample, shared):
    assert all(shared.invoke() == HELLO for _ in range(100))
    wait_until(lambda: len(shared.received) >= 100)
    wait_until(lambda: shared.received == re.findall(r"(?m)^START RequestId: (\S+)", shared.output))
    assert shared.output.count("Launching extension") == 1
    assert shared.output.count("Registered with ID") == 1
    if start.option == "--docker":
        commands = run("docker", "top", shared.container, "-eo", "pid,args").stdout.splitlines()
    else:
        commands = processes_of(sample).values()
    (extension,) = [each for each in commands if re.search(rf" /opt/(extensions/)?{NAME}", each)]
    # The launcher has become the extension.
    assert re.search(rf"python3 -\S.* /opt/{NAME}/main.py$", extension)


@pytest.mark.parametrize(
    ("do", "answer", "reason"),
    [
        ("time.sleep(60)", f"Task timed out after {TIMEOUT}.00 seconds", "Timeout"),
        ("os._exit(3)", "Runtime.ExitError", "ReleaseFail"),
    ],
    ids=["times out", "dies"],
)
def test_restarts_after_a_function_times_out_or_dies(start, evaluating, do, answer, reason):
    with start(evaluating, AWS_LAMBDA_FUNCTION_TIMEOUT=str(TIMEOUT)) as process:
        # An exception is no reason to start it again.
        assert process.invoke({"do": "1 / 0"})["errorType"] == "ZeroDivisionError"
        assert answer in str(process.invoke({"do": do}))
        assert invoke_again(process, {"still": "here"}) == {"still": "here"}
        # In Docker, the log may arrive after the response.
        wait_until(lambda: process.output.count("Registered with ID") == 2)
        wait_until(lambda: '"INVOKE"' in process.output.split("Registered with ID")[2])
        assert f'"shutdownReason": "{reason}"' in process.output


@pytest.mark.parametrize(
    ("failure", "answer"),
    [
        # It fails after the function has answered; otherwise there would be no answer.
        ("time.sleep(1); sys.exit()", (json.dumps(HELLO), 502)),
        ("time.sleep(60)", (f"Task timed out after {TIMEOUT}.00 seconds", 200)),
    ],
    ids=["fails", "hangs"],
)
def test_restarts_after_an_extension_fails_or_hangs(
    start, scripted_copy, tmp_path, failure, answer
):
    words = "-e", f"AT_INVOKE=if is_first_time('{tmp_path}/done'): {failure}"
    with start(scripted_copy, *words, AWS_LAMBDA_FUNCTION_TIMEOUT=str(TIMEOUT)) as process:
        assert curl(process) == answer
        assert invoke_again(process) == HELLO
        wait_until(lambda: process.output.count("Registered with ID") > 1)


def test_concurrent_invocation_crashes_the_emulator(start, evaluating):
    """This ends the run, with the emulator's own status and traceback."""
    with start(evaluating) as process, ThreadPoolExecutor() as pool:
        pool.submit(process.invoke, {"do": "time.sleep(5)"})
        wait_until(lambda: process.received)
        with contextlib.suppress(OSError, http.client.HTTPException):
            process.invoke()
        assert process.wait(60) == 2
        assert "\ngoroutine " in process.output


def test_function_can_import_modules(start, evaluating):
    (evaluating / "own.py").write_text("VALUE = 42\n")
    with start(evaluating) as process:
        assert process.invoke({"do": "__import__('own').VALUE"}) == 42


def test_function_reads_what_init_wrote(start, evaluating):
    secret = "/tmp/secret-of-the-test"
    fetch = f"open({secret!r}, 'w').write('fetched')"
    with start(make_scripted(evaluating), "-e", f"AT_INIT={fetch}") as process:
        what = f"open({secret!r}).read(), os.remove({secret!r})"
        assert process.invoke({"do": what}) == ["fetched", None]
