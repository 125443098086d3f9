"""The sample in Docker and without.

Every way to invoke it, what a function can do to it, and another name for it.
"""

import contextlib
import http.client
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from machine import AWS_CREDENTIALS, path_with, processes_of, run, tool, wait_until
from pages import code_blocks
from sample import HELLO, NAME, make_scripted, once, rename

TIMEOUT = 5  # enough for a cold start on a busy machine


@pytest.fixture(scope="module")
def shared(start, sample):
    """The sample, running, for tests that only invoke it."""
    with start(sample) as it:
        yield it


def curl(it):
    """Runs the command that the run says to try; returns what it prints, and the status."""
    command = re.search("curl .*", it.output).group().replace("curl", tool("curl"), 1)
    answer, _, status = run("sh", "-c", f"{command} -w ' %{{http_code}}'").stdout.rpartition(" ")
    return answer, int(status)


def invoke_again(it, event=None):
    """Invokes after a failure, until AWS's emulator no longer cancels the invocation.

    The emulator cleans up late.
    """

    def answer():
        got = it.invoke(event)
        return None if "ErrGateCanceled" in str(got) else got

    return wait_until(answer)


def test_curl_gets_hello_from_lambda(shared):
    assert curl(shared) == (json.dumps(HELLO), 200)


def shown_way_to_invoke(it, language):
    """The code that the page shows for it, with this run's port."""
    title = "Invoke it with the AWS CLI or an SDK"
    (code,) = code_blocks("docs/running-locally.md", title, language)
    return code.replace("http://localhost:8080", it.endpoint)


@pytest.mark.slow
def test_the_aws_cli_gets_hello_from_lambda(shared, tmp_path):
    code = shown_way_to_invoke(shared, "sh")
    if "aws-cli/1" in run(tool("aws"), "--version").stdout:
        code = code.replace("--cli-binary-format raw-in-base64-out ", "")
    path = path_with(tmp_path, {"aws": f'exec "{tool("aws")}" "$@"'})
    invoked = run("sh", "-c", code, cwd=tmp_path, env=os.environ | {"PATH": path})
    assert invoked.stdout.endswith(json.dumps(HELLO)), invoked.stderr


@pytest.mark.slow
def test_boto3_gets_hello_from_lambda(shared):
    program = tool("python3"), "-c", shown_way_to_invoke(shared, "python")
    invoked = run(*program, env=os.environ | AWS_CREDENTIALS)
    assert invoked.stdout == f"{json.dumps(HELLO).encode()}\n", invoked.stderr


def test_one_extension_logs_each_of_a_hundred_invocations(start, sample, shared):
    assert all(shared.invoke() == HELLO for _ in range(100))
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
)
def test_a_function_that_times_out_or_dies_is_started_again_with_its_extension(
    start, evaluating, do, answer, reason
):
    with start(evaluating, AWS_LAMBDA_FUNCTION_TIMEOUT=str(TIMEOUT)) as it:
        # An exception is no reason to start it again.
        assert it.invoke({"do": "1 / 0"})["errorType"] == "ZeroDivisionError"
        assert answer in str(it.invoke({"do": do}))
        assert invoke_again(it, {"still": "here"}) == {"still": "here"}
        assert f'"shutdownReason": "{reason}"' in it.output
        assert it.output.count("Registered with ID") == 2
        wait_until(lambda: '"INVOKE"' in it.output.split("Registered with ID")[2])


@pytest.mark.parametrize(
    ("failure", "answer"),
    [
        # It fails after the function has answered; otherwise there would be no answer.
        ("time.sleep(1); sys.exit()", (json.dumps(HELLO), 502)),
        ("time.sleep(60)", (f"Task timed out after {TIMEOUT}.00 seconds", 200)),
    ],
)
def test_an_extension_that_fails_or_hangs_fails_its_invocation_and_starts_again(
    start, copy, tmp_path, failure, answer
):
    words = "-e", f"AT_INVOKE={once(tmp_path, failure)}"
    with start(make_scripted(copy), *words, AWS_LAMBDA_FUNCTION_TIMEOUT=str(TIMEOUT)) as it:
        assert curl(it) == answer
        assert invoke_again(it) == HELLO
        assert it.output.count("Registered with ID") > 1


def test_concurrent_invocation_crashes_the_emulator(start, evaluating):
    """This ends the run, with the emulator's own status and traceback."""
    with start(evaluating) as process, ThreadPoolExecutor() as pool:
        pool.submit(process.invoke, {"do": "time.sleep(5)"})
        wait_until(lambda: process.received)
        with contextlib.suppress(OSError, http.client.HTTPException):
            process.invoke()
        assert process.wait(60) == 2
        assert "\ngoroutine " in process.output


def test_the_function_may_have_more_modules_and_finds_what_init_has_fetched(start, evaluating):
    """Two promises of the README, in one run, because a run takes a while."""
    (evaluating / "own.py").write_text("VALUE = 42\n")
    secret = "/tmp/secret-of-the-test"
    fetch = f"open({secret!r}, 'w').write('fetched')"
    with start(make_scripted(evaluating), "-e", f"AT_INIT={fetch}") as it:
        what = f"open({secret!r}).read(), __import__('own').VALUE, os.remove({secret!r})"
        assert it.invoke({"do": what}) == ["fetched", 42, None]


def test_rename_changes_every_mention_except_of_awss_example_and_leaves_git_alone(copy):
    git = "git", "-C", copy, "-c", "user.name=any", "-c", "user.email=any"
    for command in ["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", NAME]:
        assert run(*git, *command).returncode == 0
    assert run(*git, "remote", "add", "origin", f"git@example.com:me/{NAME}.git").returncode == 0
    unchanged = copy / "CHANGELOG.md", copy / ".git" / "config", copy / ".git" / "logs" / "HEAD"
    before = [file.read_text() for file in unchanged]
    assert all(NAME in text for text in before)
    rename(copy, "my-own-extension")
    assert [file.read_text() for file in unchanged] == before
    assert run(*git, "fsck").returncode == 0
    named = run(*git, "grep", "-h", NAME, "--", ":!docs/cost.md", ":!CHANGELOG.md", ":!LICENSE")
    lines = named.stdout.splitlines()
    assert lines
    for line in lines:
        assert re.search(rf"https://\S*{NAME}|AWS.s {NAME}|aws-lambda-extensions/{NAME}", line)
    assert f"AWS's {NAME}" in named.stdout


@pytest.mark.parametrize(
    ("name", "status"),
    [
        pytest.param("Capital", 2, id="a capital letter"),
        pytest.param("with space", 2, id="a space"),
        pytest.param("my_extension", 2, id="an underscore, which Kubernetes does not take"),
        pytest.param("my.extension", 2, id="a dot, which Lambda does not take"),
        pytest.param("tests", 1, id="a name that is taken"),
    ],
)
def test_rename_refuses_a_name(copy, name, status):
    assert run(copy / "scripts" / "rename", name).returncode == status


@pytest.mark.usefixtures("shares_installed")
def test_a_renamed_copy_with_code_of_its_own_is_another_extension(start, copy):
    rename(copy, "my-own-extension")
    code = 'from lifecycle import log\n\ndef process(event): log(f"My own code got: {event}")\n'
    (copy / "my-own-extension" / "extension.py").write_text(code)
    with start(copy, script="my-own-extension.sh") as it:
        assert it.invoke() == HELLO
        wait_until(lambda: "[my-own-extension] My own code got: " in it.output)
        assert NAME not in it.output
