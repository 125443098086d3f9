"""The choices of lambda-entrypoint.sh, with a python3 and an emulator that print their arguments."""

import pytest
from helpers import ROOT, run

HANDLER = "lambda_function.lambda_handler"


@pytest.fixture
def entrypoint(tmp_path):
    """Runs the entrypoint with these arguments and this environment."""
    for command in "python3", "aws-lambda-rie":
        path = tmp_path / command
        path.write_text('#!/bin/sh\necho "${0##*/}" "$@"\n')
        path.chmod(0o755)
    text = (ROOT / "lambda-entrypoint.sh").read_text()
    copy = tmp_path / "lambda-entrypoint.sh"
    copy.write_text(text.replace("/usr/local/bin/aws-lambda-rie", str(tmp_path / "aws-lambda-rie")))
    copy.chmod(0o755)

    def start(*arguments, **environment):
        return run(copy, *arguments, env={"PATH": f"{tmp_path}:/usr/bin:/bin"} | environment)

    return start


def test_starts_the_emulator_with_the_runtime_interface_client_as_its_child(entrypoint):
    assert entrypoint(HANDLER).stdout == f"aws-lambda-rie python3 -m awslambdaric {HANDLER}\n"


def test_starts_the_runtime_interface_client_alone_with_a_runtime_api(entrypoint):
    started = entrypoint(HANDLER, AWS_LAMBDA_RUNTIME_API="127.0.0.1:9001")
    assert started.stdout == f"python3 -m awslambdaric {HANDLER}\n"


def test_takes_the_handler_from_its_argument_before_the_environment(entrypoint):
    assert entrypoint(HANDLER, _HANDLER="other.handler").stdout.endswith(f" {HANDLER}\n")


def test_takes_the_handler_from_the_environment_without_an_argument(entrypoint):
    assert entrypoint(_HANDLER=HANDLER).stdout.endswith(f" {HANDLER}\n")


def test_starts_a_wrapper_which_may_change_the_handler_before_the_runtime_interface_client(entrypoint, tmp_path):
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\nexport _HANDLER=other.handler\nexec "$@"\n')
    wrapper.chmod(0o755)
    environment = {"AWS_LAMBDA_EXEC_WRAPPER": str(wrapper)}
    assert entrypoint(HANDLER, **environment).stdout.startswith(f"aws-lambda-rie {wrapper} ")
    started = entrypoint(HANDLER, AWS_LAMBDA_RUNTIME_API="127.0.0.1:9001", **environment)
    assert started.stdout == "python3 -m awslambdaric other.handler\n"


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        ((), {}),
        (("",), {}),
        ((), {"_HANDLER": ""}),
        ((HANDLER, "more"), {}),
        ((HANDLER, "more"), {"_HANDLER": HANDLER}),
    ],
)
def test_exits_142_and_says_why_without_a_handler_or_with_more_arguments(entrypoint, arguments, environment):
    started = entrypoint(*arguments, **environment)
    assert started.returncode == 142
    assert started.stdout == ""
    assert started.stderr.count("\n") == 1
    assert "HANDLER" in started.stderr


def test_without_a_handler_the_image_exits_142(image):
    assert run("docker", "run", "--rm", image, "").returncode == 142
    assert run("docker", "run", "--rm", image, HANDLER, "more").returncode == 142
