"""What the image contains, and how it builds and runs."""

import http.server
import json
import re
import ssl
import threading
import uuid

import pytest
from helpers import (
    HELLO,
    NAME,
    RECEIVED,
    TEST_IMAGE,
    build,
    container,
    copy_sample,
    docker_with,
    remove_hashes,
    run,
    running,
    tool,
    wait_until,
)
from test_docs import code_blocks

(COPY,) = code_blocks("docs/deploying.md", "Into your own image", "dockerfile")


def inside(image, script, *options):
    """Runs a shell script in the image and returns what it prints."""
    command = ["docker", "run", "--rm", *options, "--entrypoint", "sh", image, "-c", script]
    ran = run(*command)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_opt_holds_the_launcher_the_extension_and_no_stray_file(copy, base_image):
    strays = ".DS_Store", f"{NAME}~", f".{NAME}.swp", "notes.txt"
    for path in (copy / place / stray for place in ("extensions", NAME) for stray in strays):
        path.write_text("stray")
        path.chmod(0o755)
    image = build(copy, f"{TEST_IMAGE}:stray", base_image)
    assert inside(image, "ls -A /opt /opt/extensions").split() == [
        "/opt:", "extensions", NAME, "/opt/extensions:", NAME
    ]  # fmt: skip
    assert not {*strays, "requirements.txt"} & {*inside(image, f"ls -A /opt/{NAME}").split()}


def test_hidden_files_stay_out_of_the_image(base_image, copy):
    dockerfile = copy / "Dockerfile"
    dockerfile.write_text(re.sub(r"(COPY \*\.py (.*)\n)", r"\1COPY data \2data/\n", dockerfile.read_text()))
    for name in "shown", ".env", ".aws/credentials", "in/.env":
        (copy / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / "data" / name).write_text("text")
    (copy / "lambda_function.py").write_text(
        "import os\ndef lambda_handler(event, context):\n    return [files for _, _, files in os.walk('data')]\n"
    )
    with running(copy, "--docker", BASE_IMAGE=base_image) as started:
        assert json.loads(started.invoke()) == [["shown"], []]


def test_modes_owners_and_line_endings_are_right_whatever_they_were_in_the_checkout(tmp_path, base_image):
    copy = copy_sample(tmp_path / "copy")
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        if path.is_file() and b"\r\n" not in (text := path.read_bytes()):
            path.write_bytes(text.replace(b"\n", b"\r\n"))
    image = build(copy, f"{TEST_IMAGE}:checkout", base_image)
    executables = f"/lambda-entrypoint.sh /opt/extensions/{NAME} /usr/local/bin/aws-lambda-rie /var/runtime/bootstrap"
    assert inside(image, f"stat -Lc '%a %U' {executables}").splitlines() == ["755 root"] * 4
    assert inside(image, "find /opt /var/task /var/runtime ! -user root -o -perm /022 ! -type l") == ""
    with container(image, "--user", "12345:12345") as (name, answer):
        assert json.loads(answer) == HELLO
        wait_until(lambda: RECEIVED in run("docker", "logs", name).stdout)


@pytest.fixture
def https_server(tmp_path):
    """The port of an HTTPS server on loopback; its certificate, its own authority, is in the folder."""
    options = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    extensions = "-addext", "subjectAltName=DNS:localhost", "-addext", "keyUsage=digitalSignature,keyCertSign"
    files = "-keyout", tmp_path / "key.pem", "-out", tmp_path / "company.crt"
    made = run(tool("openssl"), *options, *extensions, *files)
    assert made.returncode == 0, made.stderr
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "company.crt", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_it_trusts_the_certificate_authorities_of_its_base(sample, base_image, https_server, tmp_path):
    (tmp_path / "Dockerfile").write_text(f"FROM {base_image}\nCOPY company.crt /usr/local/share/ca-certificates/\n")
    with_authority = build(tmp_path, f"{TEST_IMAGE}:authority-base", base_image)
    image = build(sample, f"{TEST_IMAGE}:authority", with_authority, "--target", "python")
    get = f"from urllib.request import urlopen; print(urlopen('https://localhost:{https_server}').status)"
    assert inside(image, f'python3 -c "{get}"', "--network", "host") == "200\n"


def test_pip_and_build_tools_stay_out(image):
    assert inside(image, "command -v pip pip3 gcc cc make || true") == ""
    assert inside(image, "python3 -c 'import pip' 2>&1 || true").rstrip().endswith("No module named 'pip'")
    assert inside(image, "ls /var/lib/apt/lists /var/cache/apt") == "/var/cache/apt:\n\n/var/lib/apt/lists:\n"


def test_the_dependencies_of_function_and_extension_stay_separate(image):
    search = "cd /; python3 -E -c 'import sys; sys.path[0] = \"{}\"; import {}' 2>&1 || true"
    assert "No module named 'requests'" in inside(image, search.format("/var/task", "requests"))
    assert "No module named 'awslambdaric'" in inside(image, search.format(f"/opt/{NAME}", "awslambdaric"))


def test_nothing_is_compiled_at_run_time_whatever_the_file_times(image):
    touch = "find /opt /var/task -name '*.py' -exec touch {} + && "
    modules = "lifecycle, requests, http.client"
    extension = f"cd /; python3 -v -E -S -c 'import sys; sys.path[0] = \"/opt/{NAME}\"; import {modules}' 2>&1"
    function = "python3 -v -c 'import awslambdaric.__main__, awslambdaric.bootstrap, lambda_function' 2>&1"
    for imports in extension, function:
        trace = inside(image, touch + imports, "--user", "root")
        assert "matches /" in trace
        assert not re.findall(r"^# code object from (?!'?/\S+\.pyc)\S+", trace, re.MULTILINE)


def test_it_adds_at_most_62_mb_to_its_base(base_image, image):
    def size(name):
        return int(run("docker", "image", "inspect", "--format", "{{.Size}}", name).stdout)

    assert size(image) - size(base_image) <= 62_000_000


def test_stage_lambda_is_the_same_without_the_emulator(sample, base_image, image):
    on_lambda = build(sample, f"{TEST_IMAGE}:lambda", base_image, "--target", "lambda")
    listing = "find / -xdev -type f -not -path '/proc/*' -not -path '/sys/*' -not -path '/etc/*' | sort"
    emulator = set(inside(image, listing).splitlines()) - set(inside(on_lambda, listing).splitlines())
    assert emulator == {"/usr/local/bin/aws-lambda-rie"}
    inspect = ["docker", "image", "inspect", "--format", "{{json .Config.Entrypoint}} {{json .Config.Cmd}}"]
    assert run(*inspect, on_lambda).stdout == run(*inspect, image).stdout


def test_the_extension_runs_in_another_image(image, tmp_path):
    copy = COPY.replace(f"--from={NAME}", f"--from={image}")
    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nUSER root\nRUN rm -r /opt/*\n{copy}USER 12345\n")
    with container(build(tmp_path, f"{TEST_IMAGE}:own", image)) as (name, answer):
        assert json.loads(answer) == HELLO
        wait_until(lambda: RECEIVED in run("docker", "logs", name).stdout)


@pytest.mark.parametrize("user", ["0:0", "1000:1000", "12345:54321"])
def test_runs_as_any_user_in_any_directory_read_only_and_without_capabilities(image, user):
    options = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", user]
    with container(image, *options, "--workdir", "/tmp") as (name, answer):
        assert json.loads(answer) == HELLO
        wait_until(lambda: RECEIVED in run("docker", "logs", name).stdout)


@pytest.mark.parametrize("buildkit", ["0", "1"], ids=["the classic builder", "BuildKit"])
def test_an_edit_of_one_line_of_code_builds_no_dependency_again(copy, base_image, buildkit):
    for edited in None, "lambda_function.py", f"{NAME}/extension.py":
        if edited:
            with open(copy / edited, "a") as file:
                file.write(f"# {uuid.uuid4()}\n")  # unknown to the cache, also when the test runs again
        options = ["--progress", "plain"] if buildkit == "1" else []
        built = docker_with(buildkit, "build", *options, "--build-arg", f"BASE_IMAGE={base_image}", copy)
        assert built.returncode == 0, built.stderr
    if buildkit == "1":
        steps = dict(re.findall(r"^#(\d+) \[.*\] (RUN .*)$", built.stderr, re.MULTILINE))
        cached = re.findall(r"^#(\d+) CACHED$", built.stderr, re.MULTILINE)
        again = [command for step, command in steps.items() if step not in cached]
    else:
        again = re.findall(r"^Step \S+ : (RUN .*)\n(?! ---> Using cache)", built.stdout, re.MULTILINE)
    assert len(again) == 1
    assert again[0].startswith("RUN chmod")


def test_a_lock_file_without_hashes_is_refused(copy, base_image):
    remove_hashes(copy / "requirements.txt")
    built = run("docker", "build", "--build-arg", f"BASE_IMAGE={base_image}", copy)
    assert built.returncode != 0
    assert "Hashes are required in --require-hashes mode" in built.stdout + built.stderr


def test_the_classic_builder_skips_the_emulator_for_aws(sample, base_image):
    built = docker_with("0", "build", "--target", "lambda", "--build-arg", f"BASE_IMAGE={base_image}", sample)
    assert built.returncode == 0, built.stderr
    assert "RUN pip3 install" in built.stdout
    assert "requirements-rie" not in built.stdout
