"""scripts/run_without_docker.py: what it installs, and how it isolates a run."""

import json
import os
import re
import stat
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import HELLO, NAME, copy_sample, free_port, install_elsewhere, remove_hashes, run, running

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux"),
    pytest.mark.usefixtures("installed_sample"),
]


def write_handler(copy, body):
    (copy / "lambda_function.py").write_text(f"import os, sys\ndef lambda_handler(event, context):\n    {body}\n")


def answer(copy):
    with running(copy, "--no-docker") as started:
        assert "installing" not in started.output
        return json.loads(started.invoke())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_function_that_writes_to_its_dependencies_spoils_only_its_own_run(copy):
    installed = next(copy.glob(f".run/{NAME}-*"))
    before = contents(installed)
    write_handler(copy, "return open(os.path.join(os.getcwd(), 'awslambdaric', '__init__.py'), 'w').write('raise 1')")
    assert answer(copy) == len("raise 1")
    assert contents(installed) == before
    write_handler(copy, "return 'fine'")
    assert answer(copy) == "fine"


def test_nobody_else_can_read_what_a_run_copies(copy):
    (copy / "lambda_function.py").chmod(0o600)
    with running(copy, "--no-docker") as started:
        assert json.loads(started.invoke()) == HELLO
        assert len(list((copy / ".run").iterdir())) == 2
        for path in (copy / ".run").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_run_sees_only_its_own_processes(copy):
    write_handler(copy, "return [process for process in os.listdir('/proc') if process.isdigit()]")
    processes = answer(copy)
    assert str(os.getpid()) not in processes
    assert "1" in processes
    assert len(processes) < 10


def test_only_what_the_image_contains_is_installed(copy):
    (installed,) = copy.glob(".run/*")
    assert {path.name for path in installed.iterdir()} == {"aws-lambda-rie", "opt", "python", "var"}


def test_another_version_of_python_gets_its_own_installation(copy):
    no_index = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    ran = install_elsewhere(copy, "python_version", "3.99.0", **no_index)
    assert ran.returncode == 1
    assert "installing the dependencies" in ran.stderr


def test_the_function_does_not_see_the_packages_of_this_machine(copy):
    write_handler(copy, "return [path for path in sys.path if path.endswith('-packages') and os.path.exists(path)]")
    assert answer(copy) == []


def test_the_function_has_the_handler_and_the_folders_that_the_dockerfile_names(copy):
    dockerfile = (copy / "Dockerfile").read_text()
    dockerfile = dockerfile.replace('CMD ["lambda_function.lambda_handler"]', 'CMD [ "other.handler" ]')
    dockerfile = re.sub(r"(COPY \*\.py .*\n)", r"\1COPY texts .${LAMBDA_TASK_ROOT}/texts/\n", dockerfile)
    (copy / "Dockerfile").write_text(dockerfile)
    (copy / "texts" / "in").mkdir(parents=True)
    (copy / "texts" / "in" / "greeting").write_text("good morning")
    (copy / "other.py").write_text("def handler(event, context):\n    return open('texts/in/greeting').read()\n")
    assert answer(copy) == "good morning"


@pytest.mark.slow
def test_settings_of_pip_that_choose_another_place_or_kind_do_not_matter(folder, tmp_path):
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n[global]\nrequire-virtualenv = true\n")
    settings = {"PREFIX": str(tmp_path / "prefix"), "TARGET": str(tmp_path / "target"), "USER": "1"}
    settings |= {"REQUIRE_VIRTUALENV": "1", "NO_BINARY": ":all:"}
    environment = {f"PIP_{name}": value for name, value in settings.items()}
    if "PIP_CONFIG_FILE" not in os.environ:
        environment["PIP_CONFIG_FILE"] = str(tmp_path / "pip.conf")
    with running(copy_sample(folder / "pip settings"), "--no-docker", **environment) as started:
        assert json.loads(started.invoke()) == HELLO
    assert [path.name for path in tmp_path.iterdir()] == ["pip.conf"]


@pytest.mark.slow
def test_a_wheel_with_another_hash_fails_with_one_line_that_says_so(folder):
    copy = copy_sample(folder / "another wheel")
    lock_file = copy / NAME / "requirements.txt"
    lock_file.write_text(re.sub("sha256:....", "sha256:0000", lock_file.read_text()))
    ran = run(copy / f"{NAME}.sh", "--no-docker", "-p", str(free_port()))
    assert ran.returncode == 1
    reason = "a wheel does not match its pinned hash; check your package index, or proxy"
    assert ran.stderr.splitlines()[-1] == f"{NAME}: the dependencies cannot be installed: {reason}"
    assert list((copy / ".run").iterdir()) == []


def test_a_lock_file_without_hashes_is_refused(copy):
    remove_hashes(copy / "requirements.txt")
    ran = run(copy / f"{NAME}.sh", "--no-docker", "-p", str(free_port()))
    assert ran.returncode == 1
    assert "Hashes are required in --require-hashes mode" in ran.stderr


@pytest.mark.skipif(not os.access("/opt", os.W_OK), reason="this user cannot write to /opt")
def test_a_checkout_in_opt_works(installed_sample):
    with tempfile.TemporaryDirectory(dir="/opt") as opt:
        copy = copy_sample(Path(opt) / "sample", installed_sample)
        assert answer(copy) == HELLO


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not listen on port 1")
def test_a_privileged_port_fails_with_one_line(sample):
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        pytest.skip("every user may listen on every port of this machine")
    environment = os.environ | {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    ran = run(sample / f"{NAME}.sh", "--no-docker", "-p", "1", user=12345, group=12345, env=environment, cwd="/")
    assert ran.returncode == 1
    assert ran.stderr == f"{NAME}: cannot listen on 127.0.0.1:1: Permission denied; choose another with -p\n"
