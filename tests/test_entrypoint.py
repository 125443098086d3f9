"""The choices of lambda-entrypoint.sh, with commands that print their arguments."""

import pytest
from machine import ROOT, path_with, run

HANDLER = "lambda_function.lambda_handler"
RIE = "aws-lambda-rie"
RUNTIME = f"python3 -m awslambdaric {HANDLER}"
WRAPPER = f"wrapper of {HANDLER}"
OTHER = "python3 -m awslambdaric other.handler"
ON_LAMBDA = {"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"}
WRAPPED = {"AWS_LAMBDA_EXEC_WRAPPER": "wrapper"}  # found in PATH
# Each prints its command, and starts what it is given.
COMMANDS = {
    "python3": 'echo python3 "$@"',
    RIE: f'echo {RIE}; AWS_LAMBDA_RUNTIME_API=localhost exec "$@"',
    "wrapper": 'echo "wrapper of $_HANDLER"; _HANDLER=other.handler exec "$@"',
}


def start(folder, arguments, environment):
    """Runs the entrypoint in a folder, with these commands."""
    environment = {"PATH": path_with(folder, COMMANDS)} | environment
    return run(ROOT / "lambda-entrypoint.sh", *arguments, env=environment, cwd=folder)


@pytest.mark.parametrize(
    ("arguments", "environment", "started"),
    [
        pytest.param([HANDLER], {}, [RIE, RUNTIME], id="here"),
        pytest.param([HANDLER], ON_LAMBDA, [RUNTIME], id="on Lambda"),
        pytest.param([HANDLER], {"_HANDLER": "other"}, [RIE, RUNTIME], id="argument and _HANDLER"),
        pytest.param([], {"_HANDLER": HANDLER}, [RIE, RUNTIME], id="_HANDLER alone"),
        pytest.param([HANDLER], WRAPPED, [RIE, WRAPPER, OTHER], id="a wrapper"),
        pytest.param([HANDLER], WRAPPED | ON_LAMBDA, [WRAPPER, OTHER], id="a wrapper on Lambda"),
    ],
)
def test_starts_emulator_wrapper_and_runtime(tmp_path, arguments, environment, started):
    assert start(tmp_path, arguments, environment).stdout.splitlines() == started


@pytest.mark.parametrize("path", ["", "/nowhere"], ids=["empty", "without Python"])
def test_finds_python_without_the_functions_path(tmp_path, path):
    """This machine's Python says that there is no runtime here."""
    ran = start(tmp_path, [HANDLER], ON_LAMBDA | {"PATH": path})
    assert "No module named awslambdaric" in ran.stderr


def test_prefers_the_python_of_the_functions_path(tmp_path):
    """It can be relative to the function's folder."""
    (tmp_path / "own").mkdir()
    path_with(tmp_path / "own", {"python3": "pwd"})
    environment = ON_LAMBDA | {"PATH": "own:/usr/bin", "LAMBDA_TASK_ROOT": str(tmp_path)}
    ran = run(ROOT / "lambda-entrypoint.sh", HANDLER, env=environment, cwd="/")
    assert ran.stdout == f"{tmp_path}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="none"),
        pytest.param([""], id="an empty one"),
        pytest.param([HANDLER, "more"], id="two arguments"),
    ],
)
def test_without_one_handler_it_explains_and_exits_with_142(tmp_path, arguments):
    """AWS's base images exit with this status, too."""
    ran = start(tmp_path, arguments, {"_HANDLER": ""})
    assert (ran.returncode, ran.stdout) == (142, "")
    assert "HANDLER" in ran.stderr
    assert ran.stderr.count("\n") == 1
