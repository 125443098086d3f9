"""The run script without Docker: what it installs, how it recovers, and how it isolates a run."""

import http.server
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
from helpers import (
    HELLO,
    NAME,
    ROOT,
    copy_sample,
    free_port,
    need_namespaces,
    processes_of,
    run,
    running,
    tool,
    wait_until,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
THEIRS = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/"}  # what a user finds whom root became


@pytest.fixture
def fresh(folder):
    """A copy of the sample that was never run."""
    need_namespaces()
    return copy_sample(folder / uuid.uuid4().hex)


def command_for(sample, port=None):
    return [sample / f"{NAME}.sh", "--no-docker", "-p", str(port or free_port())]


def start(sample, *prefix, **environment):
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [*prefix, *command_for(sample)], env=os.environ | environment, cwd=sample, start_new_session=True, **output
    )


def output_of_failure(sample, *prefix, **environment):
    process = start(sample, *prefix, **environment)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert not list(sample.glob(".run/*"))
    return output


def answer(sample):
    """Runs the sample and returns what it answers, and what it printed."""
    with running(sample, "--no-docker") as started:
        return json.loads(started.invoke()), started.output


def write_handler(copy, body):
    (copy / "lambda_function.py").write_text(f"import os, sys\ndef lambda_handler(event, context):\n    {body}\n")


# --- Installing ---


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.2, 1.5])
def test_an_interrupted_installation_leaves_nothing_running_and_the_next_run_works(fresh, signum, seconds):
    process = start(fresh)
    wait_until(lambda: list(fresh.glob(".run/run.*")))
    time.sleep(seconds)
    os.killpg(process.pid, signum)
    process.wait()
    wait_until(lambda: not processes_of(fresh), 2)
    assert answer(fresh)[0] == HELLO
    assert len(list(fresh.glob(".run/*"))) == 1


@pytest.mark.slow
def test_of_two_first_runs_at_once_one_installs_for_both(fresh):
    with running(fresh, "--no-docker", wait=False) as one, running(fresh, "--no-docker") as other:
        one.wait_until_ready()
        assert (one.output + other.output).count("installing the dependencies") == 1
        assert json.loads(one.invoke()) == json.loads(other.invoke()) == HELLO
    assert len(list(fresh.glob(".run/*"))) == 1


@pytest.fixture
def untrusted_index(tmp_path):
    """The URL of a package index whose certificate nobody trusts."""
    subject = "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"
    files = "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"
    made = run(tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files)
    assert made.returncode == 0, made.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_port}/simple"
    server.shutdown()


NO_LINKS = {"PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_RETRIES": "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("index", "words"),
    [("http://127.0.0.1:1/simple", "Connection refused"), ("untrusted", "CERTIFICATE_VERIFY_FAILED")],
)
def test_without_a_usable_index_pip_says_why_and_the_next_run_works(fresh, untrusted_index, index, words):
    index = untrusted_index if index == "untrusted" else index
    output = output_of_failure(fresh, **NO_LINKS, PIP_INDEX_URL=index)
    assert words in output
    assert output.splitlines()[-1] == f"{NAME}: pip failed; see its words above"
    assert answer(fresh)[0] == HELLO


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "replacement", "words"),
    [
        ("sha256:....", "sha256:0000", "DO NOT MATCH THE HASHES"),
        (r" \\\n +--hash=\S+", "", "Hashes are required in --require-hashes mode"),
    ],
)
def test_only_what_the_lock_files_pin_is_installed(fresh, pattern, replacement, words):
    lock_file = fresh / NAME / "requirements.txt"
    lock_file.write_text(re.sub(pattern, replacement, lock_file.read_text()))
    output = output_of_failure(fresh)
    assert words in output
    assert output.splitlines()[-1] == f"{NAME}: pip failed; see its words above"


@pytest.mark.slow
def test_on_a_full_disk_it_says_so_and_the_next_run_works(fresh):
    (fresh / ".run").mkdir()
    full = 'mount -t tmpfs -o size=2m none .run && exec "$@"'
    for options in [], ["--map-root-user"]:
        prefix = ["unshare", "--mount", *options, "sh", "-c", full, "sh"]
        if run(*prefix, "true", cwd=fresh).returncode == 0:
            break
    else:
        pytest.skip("this user cannot mount a small file system on this machine")
    assert "No space left on device" in output_of_failure(fresh, *prefix)
    assert answer(fresh)[0] == HELLO


def test_without_pip_it_says_so(fresh, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    output = output_of_failure(fresh, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert "No module named pip" in output
    assert output.splitlines()[-1] == f"{NAME}: pip failed; see its words above"


@pytest.mark.slow
def test_settings_of_pip_that_choose_another_place_or_kind_do_not_matter(fresh, tmp_path):
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n[global]\nrequire-virtualenv = true\n")
    settings = {"PREFIX": str(tmp_path / "prefix"), "TARGET": str(tmp_path / "target"), "USER": "1"}
    settings |= {"REQUIRE_VIRTUALENV": "1", "NO_BINARY": ":all:"}
    environment = {f"PIP_{name}": value for name, value in settings.items()}
    if "PIP_CONFIG_FILE" not in os.environ:
        environment["PIP_CONFIG_FILE"] = str(tmp_path / "pip.conf")
    with running(fresh, "--no-docker", **environment) as started:
        assert json.loads(started.invoke()) == HELLO
    assert [path.name for path in tmp_path.iterdir()] == ["pip.conf"]


@pytest.mark.slow
def test_changed_pins_are_installed_and_others_are_not_again(fresh):
    assert answer(fresh)[0] == HELLO
    assert "installing" not in answer(fresh)[1]
    with (fresh / NAME / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert "installing" in answer(fresh)[1]


@pytest.mark.slow
def test_writes_nothing_outside_its_ignored_folder_which_nobody_else_can_read(fresh, tmp_path):
    def tree(folder):
        return {path for path in folder.rglob("*") if ".run" not in path.parts}

    before = tree(fresh)
    for name in "home", "tmp":
        (tmp_path / name).mkdir()
    # pip asks rustc for its version, and rustup then writes its settings.
    path = ":".join(folder for folder in os.environ["PATH"].split(":") if not os.path.exists(f"{folder}/rustc"))
    with running(fresh, "--no-docker", HOME=f"{tmp_path}/home", TMPDIR=f"{tmp_path}/tmp", PATH=path) as started:
        started.invoke()
        assert not os.path.exists(f"/opt/{NAME}")
        assert (fresh / ".run").stat().st_mode & 0o777 == 0o700
    assert tree(tmp_path) == {tmp_path / "home", tmp_path / "tmp"}
    assert tree(fresh) == before
    assert "/.run/" in (ROOT / ".gitignore").read_text().splitlines()


@as_root
def test_a_folder_it_cannot_write_to_fails_and_loses_nothing(fresh):
    (fresh / ".run").mkdir()
    (fresh / ".run" / "theirs").touch()
    ran = run("setpriv", "--reuid", "12345", "--clear-groups", *command_for(fresh), env=THEIRS, cwd="/")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "cannot change permissions of" in ran.stderr
    assert [path.name for path in (fresh / ".run").iterdir()] == ["theirs"]


# --- Running ---


@as_root
@pytest.mark.slow
def test_works_as_an_ordinary_user(fresh):
    for path in [fresh, *fresh.rglob("*")]:
        os.chown(path, 12345, 12345)
    with running(fresh, "--no-docker", user=12345, **THEIRS) as started:
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
        assert started.stop()[0] == 0
    assert not processes_of(fresh)

    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) > 1:
        ran = run("setpriv", "--reuid", "12345", "--clear-groups", *command_for(fresh, 1), env=THEIRS, cwd="/")
        assert ran.returncode == 1
        assert "listen tcp 127.0.0.1:1: bind: permission denied" in ran.stdout + ran.stderr
        assert ran.stderr.splitlines()[-1] == f"{NAME}: aws-lambda-rie ended with status 2; see its output above"


@pytest.mark.usefixtures("installed_sample")
@pytest.mark.parametrize(
    ("what", "handler"),
    [
        ("the other processes of the machine", "[name for name in os.listdir('/proc') if name == '{pid}']"),
        ("the packages of the machine", "[path for path in sys.path if 'packages' in path and '.run' not in path]"),
    ],
)
def test_the_function_does_not_see(copy, what, handler):
    write_handler(copy, f"return {handler.format(pid=os.getpid())}")
    assert answer(copy)[0] == []


@pytest.mark.usefixtures("installed_sample")
def test_the_function_sees_the_machines_own_opt_as_well(copy):
    write_handler(copy, "return os.listdir('/opt') + os.listdir('/opt/extensions')")
    seen = answer(copy)[0]
    assert {NAME, "extensions", *os.listdir("/opt")} <= set(seen)


@pytest.mark.usefixtures("installed_sample")
def test_the_function_has_the_handler_that_the_dockerfile_names_and_the_folders_beside_it(copy):
    dockerfile = (copy / "Dockerfile").read_text()
    (copy / "Dockerfile").write_text(re.sub("(?m)^CMD .*", 'CMD [ "other.handler" ] ', dockerfile))
    (copy / "texts").mkdir()
    (copy / "texts" / "greeting").write_text("good morning")
    (copy / "other.py").write_text("def handler(event, context):\n    return open('texts/greeting').read()\n")
    assert answer(copy)[0] == "good morning"


def test_lambda_managed_instances_need_docker(sample):
    ran = run(*command_for(sample), "-e", "AWS_LAMBDA_MAX_CONCURRENCY=2")
    assert (ran.returncode, ran.stderr) == (1, f"{NAME}: AWS_LAMBDA_MAX_CONCURRENCY needs Docker\n")


@pytest.mark.skipif(not os.access("/opt", os.W_OK), reason="this user cannot write to /opt")
def test_a_checkout_in_opt_works(installed_sample):
    with tempfile.TemporaryDirectory(dir="/opt") as opt:
        assert answer(copy_sample(Path(opt) / "sample", installed_sample))[0] == HELLO
    assert not os.path.lexists(f"/opt/{NAME}")
