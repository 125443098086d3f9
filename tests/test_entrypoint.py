"""The choices of lambda-entrypoint.sh, with commands that print their arguments."""

import pytest
from machine import ROOT, run
from sample import replace

HANDLER = "lambda_function.lambda_handler"
RIE = "aws-lambda-rie"
RUNTIME = f"python3 -m awslambdaric {HANDLER}"
OTHER = "python3 -m awslambdaric other.handler"
ON_LAMBDA = {"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001"}
WRAPPED = {"AWS_LAMBDA_EXEC_WRAPPER": "wrapper"}  # found in PATH


@pytest.fixture
def entrypoint(tmp_path):
    """Runs the entrypoint with these arguments and this environment."""
    for name, script in {
        "python3": '#!/bin/sh\necho python3 "$@"\n',
        RIE: f'#!/bin/sh\necho {RIE}\nAWS_LAMBDA_RUNTIME_API=localhost exec "$@"\n',
        "wrapper": '#!/bin/sh\n_HANDLER=other.handler exec "$@"\n',
        "lambda-entrypoint.sh": (ROOT / "lambda-entrypoint.sh").read_text(),
    }.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    replace(tmp_path / "lambda-entrypoint.sh", "/usr/local/bin", str(tmp_path))
    own = tmp_path / "own"
    own.mkdir()
    (own / "python3").write_text('#!/bin/sh\necho own python3 "$@"\n')
    (own / "python3").chmod(0o755)

    def start(arguments, more):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | more
        environment["PATH"] = environment["PATH"].replace("{own}", str(own))
        return run(tmp_path / "lambda-entrypoint.sh", *arguments, env=environment)

    return start


@pytest.mark.parametrize(
    ("arguments", "environment", "started"),
    [
        ([HANDLER], {}, [RIE, RUNTIME]),
        ([HANDLER], ON_LAMBDA, [RUNTIME]),
        ([HANDLER], {"_HANDLER": "other.handler"}, [RIE, RUNTIME]),
        ([], {"_HANDLER": HANDLER}, [RIE, RUNTIME]),
        ([HANDLER], WRAPPED, [RIE, OTHER]),
        ([HANDLER], WRAPPED | ON_LAMBDA, [OTHER]),
        ([HANDLER], ON_LAMBDA | {"PATH": "/var/task/bin"}, [RUNTIME]),
        ([HANDLER], ON_LAMBDA | {"PATH": ""}, [RUNTIME]),
        ([HANDLER], ON_LAMBDA | {"PATH": "{own}:/usr/bin"}, [f"own {RUNTIME}"]),
    ],
)
def test_starts_the_emulator_except_on_lambda_then_a_wrapper_then_the_runtime(
    entrypoint, arguments, environment, started
):
    assert entrypoint(arguments, environment).stdout.splitlines() == started


@pytest.mark.parametrize("arguments", [[], [""], [HANDLER, "more"]])
def test_exits_142_and_says_why_without_a_handler_or_with_more_arguments(entrypoint, arguments):
    ran = entrypoint(arguments, {"_HANDLER": ""})
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (142, "", 1)
    assert "HANDLER" in ran.stderr
