"""Interrupted and failed first runs without Docker: the next run recovers."""

import http.server
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time

import pytest
from helpers import HELLO, NAME, copy_sample, free_port, need_namespaces, run, running, tool, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="running without Docker needs Linux"),
]

CANNOT = f"{NAME}: the dependencies cannot be installed"


@pytest.fixture
def fresh(folder, request):
    """A copy of the sample that was never run."""
    need_namespaces()
    return copy_sample(folder / request.node.name)


def start(fresh, *prefix, **environment):
    return subprocess.Popen(
        [*prefix, fresh / f"{NAME}.sh", "--no-docker", "-p", str(free_port())],
        env=os.environ | environment,
        cwd=fresh,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def says_hello(fresh):
    """Asserts that the next run works; returns its output."""
    with running(fresh, "--no-docker") as started:
        assert json.loads(started.invoke()) == HELLO
        return started.output


def half_made(fresh):
    """What an installation has left in .run besides complete sets of dependencies."""
    return [path for path in fresh.glob(".run/*") if not (path / "aws-lambda-rie").exists()]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("seconds", [0.2, 1.5])
def test_an_interrupted_installation_does_not_disturb_the_next_run(fresh, signum, seconds):
    process = start(fresh)
    wait_until(lambda: list(fresh.glob(".run/run.*")))
    time.sleep(seconds)
    os.killpg(process.pid, signum)
    assert "ready" not in process.communicate(timeout=60)[0]
    says_hello(fresh)
    if signum != signal.SIGKILL:  # after which nobody could clean up
        assert not half_made(fresh)


def test_two_first_runs_at_once_both_work(fresh):
    with running(fresh, "--no-docker", wait=False) as one, running(fresh, "--no-docker") as other:
        one.wait_until_ready()
        assert "installing" in one.output
        assert "installing" in other.output
        assert json.loads(one.invoke()) == json.loads(other.invoke()) == HELLO
    says_hello(fresh)
    assert len(list(fresh.glob(".run/*"))) == 1


def test_without_network_it_fails_with_one_line_and_the_next_run_works(fresh):
    nowhere = "http://127.0.0.1:1/simple"
    process = start(fresh, PIP_INDEX_URL=nowhere, PIP_EXTRA_INDEX_URL=nowhere, PIP_CONFIG_FILE=os.devnull)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.splitlines()[-1] == f"{CANNOT}: pip cannot reach its package index; is there a network?"
    assert not half_made(fresh)
    says_hello(fresh)


def test_an_untrusted_certificate_fails_with_one_line(fresh, tmp_path):
    subject = "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"
    files = "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"
    made = run(tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files)
    assert made.returncode == 0, made.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = {"PIP_INDEX_URL": f"https://localhost:{server.server_port}/simple", "PIP_CONFIG_FILE": os.devnull}
    process = start(fresh, **index, PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", PIP_RETRIES="1")
    output, _ = process.communicate(timeout=120)
    server.shutdown()
    assert process.returncode == 1
    assert output.splitlines()[-1] == f"{CANNOT}: pip does not trust the certificate of its package index; set PIP_CERT"


def test_on_a_full_disk_it_fails_with_one_line_and_the_next_run_works(fresh):
    (fresh / ".run").mkdir()
    full = 'mount -t tmpfs -o size=2m none .run && exec "$@"'
    for options in [], ["--map-root-user"]:
        prefix = ["unshare", "--mount", *options, "sh", "-c", full, "sh"]
        if run(*prefix, "true", cwd=fresh).returncode == 0:
            break
    else:
        pytest.skip("this user cannot mount a small file system on this machine")
    process = start(fresh, *prefix)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.splitlines()[-1] == f"{CANNOT}: No space left on device"
    says_hello(fresh)


def test_changed_requirements_are_noticed(fresh):
    says_hello(fresh)
    assert "installing" not in says_hello(fresh)
    with (fresh / NAME / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert "installing" in says_hello(fresh)
