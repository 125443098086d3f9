"""The choices of lambda-entrypoint.sh, with commands that print their arguments."""

import pytest
from machine import ROOT, run
from sample import replace

HANDLER = "lambda_function.lambda_handler"
RIE = "aws-lambda-rie"
RUNTIME = f"python3 -m awslambdaric {HANDLER}"
WRAPPER = f"wrapper of {HANDLER}"
OTHER = "python3 -m awslambdaric other.handler"
ON_LAMBDA = {"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"}
WRAPPED = {"AWS_LAMBDA_EXEC_WRAPPER": "wrapper"}  # found in PATH


@pytest.fixture
def entrypoint(tmp_path):
    """Runs the entrypoint with these arguments and more environment: entrypoint([HANDLER], {}).

    Each stand-in prints its command, and starts what it is given.
    """
    (tmp_path / "own").mkdir()
    for name, script in {
        "python3": '#!/bin/sh\necho python3 "$@"\n',
        "own/python3": '#!/bin/sh\necho own python3 "$@"\n',
        RIE: f'#!/bin/sh\necho {RIE}\nAWS_LAMBDA_RUNTIME_API=localhost exec "$@"\n',
        "wrapper": '#!/bin/sh\necho "wrapper of $_HANDLER"\n_HANDLER=other.handler exec "$@"\n',
        "lambda-entrypoint.sh": (ROOT / "lambda-entrypoint.sh").read_text(),
    }.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    replace(tmp_path / "lambda-entrypoint.sh", "/usr/local/bin", str(tmp_path))

    def start(arguments, environment):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | environment
        return run(tmp_path / "lambda-entrypoint.sh", *arguments, env=environment, cwd=tmp_path)

    return start


@pytest.mark.parametrize(
    ("arguments", "environment", "started"),
    [
        pytest.param([HANDLER], {}, [RIE, RUNTIME], id="here"),
        pytest.param([HANDLER], ON_LAMBDA, [RUNTIME], id="on Lambda"),
        pytest.param(
            [HANDLER],
            {"_HANDLER": "other.handler"},
            [RIE, RUNTIME],
            id="the argument counts more than _HANDLER",
        ),
        pytest.param([], {"_HANDLER": HANDLER}, [RIE, RUNTIME], id="_HANDLER alone"),
        pytest.param([HANDLER], WRAPPED, [RIE, WRAPPER, OTHER], id="with a wrapper"),
        pytest.param(
            [HANDLER],
            WRAPPED | ON_LAMBDA,
            [WRAPPER, OTHER],
            id="with a wrapper on Lambda",
        ),
        pytest.param(
            [HANDLER],
            ON_LAMBDA | {"PATH": "/var/task/bin"},
            [RUNTIME],
            id="PATH without Python",
        ),
        pytest.param([HANDLER], ON_LAMBDA | {"PATH": ""}, [RUNTIME], id="PATH empty"),
        pytest.param(
            [HANDLER],
            ON_LAMBDA | {"PATH": "own:/usr/bin"},
            [f"own {RUNTIME}"],
            id="PATH with a Python of the function's",
        ),
    ],
)
def test_starts_emulator_wrapper_and_runtime_as_needed(entrypoint, arguments, environment, started):
    assert entrypoint(arguments, environment).stdout.splitlines() == started


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param([], id="none"),
        pytest.param([""], id="an empty one"),
        pytest.param([HANDLER, "more"], id="two arguments"),
    ],
)
def test_without_one_handler_it_explains_and_exits_with_142(entrypoint, arguments):
    """AWS's base images exit with this status, too."""
    ran = entrypoint(arguments, {"_HANDLER": ""})
    assert (ran.returncode, ran.stdout) == (142, "")
    assert "HANDLER" in ran.stderr
    assert ran.stderr.count("\n") == 1
