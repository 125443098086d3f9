"""The image: what it contains, how it builds and runs, and the stage for another image."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path

import pytest
from engine import BASE_IMAGES, build
from fake_lambda import ScriptedServer, answer
from machine import free_port, path_with, post, run, skip_except_on_ci, wait_until
from pages import PAGES, code_blocks
from sample import HELLO, NAME, RECEIVED, remove_hashes, replace

ARM64_BASE_IMAGE = os.environ.get("ARM64_BASE_IMAGE", f"arm64v8/{BASE_IMAGES[0]}")
PAGE = PAGES["docs/deploying.md"]


def run_inside(image, script):
    """Runs a shell script in the image, as root, and returns what it prints."""
    ran = run("docker", "run", "--rm", "--user", "root", "--entrypoint", "sh", image, "-c", script)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def assert_build_fails(folder, base_image, reason, *options):
    """Asserts that no image can be built, and that the output has this reason."""
    argument = f"--build-arg=BASE_IMAGE={base_image}"
    built = run("docker", "build", argument, *options, folder)
    assert built.returncode != 0
    assert reason in built.stdout + built.stderr


def assert_runs(image, *options, extension=NAME):
    """Asserts that a container answers, and that the extension logs the event."""
    port = free_port()
    start = "docker", "run", "--rm", "--detach", f"--publish=127.0.0.1:{port}:8080"
    name = run(*start, *options, image).stdout.strip()
    url = f"http://127.0.0.1:{port}/2015-03-31/functions/function/invocations"

    def invoke():
        with contextlib.suppress(OSError):
            return post(url, timeout=60)

    try:
        assert json.loads(wait_until(invoke)) == HELLO
        wait_until(lambda: f"[{extension}] {RECEIVED}" in run("docker", "logs", name).stdout)
    finally:
        run("docker", "kill", name)


@pytest.mark.slow
@pytest.mark.usefixtures("engine")
def test_builds_and_runs_on_arm64(sample):
    """This comes first in the file, because it takes longer than all other tests."""
    on_arm64 = "--platform", "linux/arm64"
    cpu = run("docker", "run", "--rm", *on_arm64, ARM64_BASE_IMAGE, "uname", "-m").stdout
    if cpu != "aarch64\n":
        skip_except_on_ci("no base image for arm64, or no emulation")
    # Emulation takes minutes, and other builds do not need what this one leaves in the cache.
    image = build(sample, "arm64", ARM64_BASE_IMAGE, *on_arm64, lock="arm64")
    assert_runs(image, *on_arm64)


def test_stray_and_hidden_files_stay_out(copy, base_image):
    with (copy / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("COPY data ${LAMBDA_TASK_ROOT}/data/\n")
    strays = (
        f"{NAME}/.DS_Store",
        f"{NAME}/{NAME}~",
        f"{NAME}/notes.txt",
        f"extensions/{NAME}~",
        f"extensions/.{NAME}.swp",
        "data/in/.env",
        "data/.aws/credentials",
    )
    for name in *strays, "data/shown":
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    image = build(copy, "strays", base_image)
    find = "cd /opt && find -maxdepth 2 -type f && find /var/task/data -type f"
    files = run_inside(image, find).split()
    code = [f"./{NAME}/{path.name}" for path in copy.glob(f"{NAME}/*.py")]
    assert sorted(files) == sorted(["/var/task/data/shown", f"./extensions/{NAME}", *code])


def test_any_user_can_run_an_image_from_any_checkout(copy, base_image):
    """Windows line ends, and files that nobody else may read, as under a strict umask."""
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
        if path.is_file() and b"\r\n" not in (text := path.read_bytes()):
            path.write_bytes(text.replace(b"\n", b"\r\n"))
    image = build(copy, "checkout", base_image)
    find = "find /opt /var/task /var/runtime ! -user root -o -perm /022 ! -type l"
    assert run_inside(image, find) == ""
    assert run_inside(image, "stat -Lc %a /var/runtime/bootstrap") == "755\n"
    options = "--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--workdir=/tmp"
    assert_runs(image, *options, "--user", "12345:54321")


@pytest.mark.parametrize("path", ["/var/task/bin", ""])
def test_extension_starts_if_the_PATH_lacks_python(image, path):
    """Lambda starts it with the function's variables. Here it starts alone, and misses Lambda."""
    launcher = f"--entrypoint=/opt/extensions/{NAME}"
    ran = run("docker", "run", "--rm", f"--env=PATH={path}", launcher, image)
    assert "AWS_LAMBDA_RUNTIME_API is not set" in ran.stderr


def test_finds_python_in_aws_base_images(image, tmp_path):
    """It is in /var/lang/bin. Here a stand-in is there, which says what it is to run."""
    path_with(tmp_path, {"python3": 'echo "$@"'})
    tmp_path.chmod(0o755)
    options = f"--volume={tmp_path}:/var/lang/bin:ro", "--env=PATH=/nowhere"
    launcher = f"--entrypoint=/opt/extensions/{NAME}"
    ran = run("docker", "run", "--rm", *options, launcher, image)
    assert ran.stdout.endswith(f"-u /opt/{NAME}/main.py\n")


def test_has_ca_certificates(image):
    count = "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"
    assert int(run_inside(image, f'python3 -c "{count}"')) > 100


def test_adds_at_most_62_mb_to_its_base_image(base_image, image):
    # Of the files, because what an engine calls the size of an image depends on how it stores it.
    du = "du -sx --apparent-size --block-size=1 /"
    size, base_size = (int(run_inside(each, du).split()[0]) for each in (image, base_image))
    assert size - base_size <= 62_000_000


def test_dependencies_are_separate_and_pip_is_left_out(image):
    names = "-name requests -o -name awslambdaric -o -name pip -o -path '/var/lib/apt/lists/*'"
    found = run_inside(image, f"find / -xdev {names}").split()
    assert sorted(found) == [f"/opt/{NAME}/requests", "/var/task/awslambdaric"]


def test_nothing_is_compiled_at_run_time(image):
    """python3 -v says of each module whether it was read from bytecode, or compiled."""
    touch = "find /opt /var/task -name '*.py' -exec touch {} +"
    extension = f"cd /opt/{NAME} && python3 -v -E -S -c 'import main, extension, requests'"
    modules = "awslambdaric.__main__, awslambdaric.bootstrap, lambda_function"
    function = f"cd /var/task && python3 -v -c 'import {modules}'"
    for imports in extension, function:
        trace = run_inside(image, f"{touch}; ({imports}) 2>&1")
        assert "matches /" in trace
        assert not re.findall(r"(?m)^# code object from (?!'?/\S+\.pyc)\S+", trace)


# An image laid out like AWS's own, public.ecr.aws/lambda/python, with a function and the emulator.
AWS_LAYOUT = """
ARG BASE_IMAGE
FROM ${{BASE_IMAGE}}
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3-venv \\
    && python3 -m venv --copies /var/lang && rm /usr/bin/python3*
COPY --from={image} /var/task /var/task
COPY --from={image} /lambda-entrypoint.sh /
COPY --from={image} /usr/local/bin/aws-lambda-rie /usr/local/bin/
ENV LAMBDA_TASK_ROOT=/var/task PATH=/var/lang/bin:/usr/local/bin:/usr/bin:/bin
WORKDIR /var/task
ENTRYPOINT ["/lambda-entrypoint.sh"]
CMD ["lambda_function.lambda_handler"]
"""


@pytest.fixture(params=["any", "AWS's"])
def documented_stage(request, tmp_path, base_image, image):
    """The page's stage, for any base image or for AWS's, and the base image of the last stage."""
    stage, _ = code_blocks("docs/deploying.md", "Into your own image", "dockerfile")
    if request.param == "any":
        return stage.replace("debian:bookworm", base_image), image
    (tmp_path / "Dockerfile").write_text(AWS_LAYOUT.format(image=image))
    aws_like = build(tmp_path, "aws-like", base_image)
    (aws_line,) = re.findall(r"(?s)`(FROM public\S+ AS extension)` in place of the first two", PAGE)
    first_two = "".join(stage.splitlines(keepends=True)[:2])
    line = re.sub(r"public\S+", aws_like, aws_line)
    return stage.replace(first_two, f"{line}\n"), aws_like


@pytest.mark.slow
def test_documented_stage_works_in_another_image(copy, base_image, documented_stage):
    """The checkout is from Windows, and has stray files that would fail init."""
    stage, last = documented_stage
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    launcher = copy / "extensions" / NAME
    launcher.write_bytes(launcher.read_bytes().replace(b"\n", b"\r\n"))
    strays = launcher.with_name(".DS_Store"), launcher.with_name(f"{NAME}~"), copy / NAME / ".env"
    for stray in strays:
        stray.write_text("text")
    _, lines = code_blocks("docs/deploying.md", "Into your own image", "dockerfile")
    user = f"USER root\nRUN rm -rf /opt/*\n{lines}\nUSER 12345\n"
    (copy / "Dockerfile").write_text(f"{stage}\nFROM {last}\n{user}")
    (copy / ".dockerignore").unlink()
    image = build(copy, "own", base_image)
    assert run_inside(image, "ls -A /opt/extensions") == f"{NAME}\n"
    assert not run_inside(image, f"find /opt/{NAME} -maxdepth 1 -name .env")
    assert_runs(image)


@pytest.mark.slow
def test_the_function_can_be_a_package(copy, base_image):
    """The README shows the line of the Dockerfile."""
    (copy / "app").mkdir()
    (copy / "lambda_function.py").rename(copy / "app" / "main.py")
    (line,) = re.findall(r"`(COPY app \S+)`", PAGES["README.md"])
    replace(copy / "Dockerfile", "COPY *.py .${LAMBDA_TASK_ROOT}/", line)
    replace(copy / "Dockerfile", "lambda_function.lambda_handler", "app.main.lambda_handler")
    assert_runs(build(copy, "package", base_image))


def test_editing_code_does_not_reinstall_dependencies(copy, base_image):
    def install_times():
        image = build(copy, "edited", base_image)
        packages = f"/opt/{NAME}/requests/api.py /var/task/awslambdaric/bootstrap.py"
        return run_inside(image, f"stat -c %Y {packages} /usr/local/bin/aws-lambda-rie")

    before = install_times()
    for code in "lambda_function.py", f"{NAME}/extension.py":
        with (copy / code).open("a") as file:
            file.write(f"# {uuid.uuid4()}\n")  # unknown to the cache, also when the test runs again
    assert install_times() == before


def test_lock_files_without_hashes_are_rejected(copy, base_image):
    remove_hashes(copy / "requirements.txt")
    assert_build_fails(copy, base_image, "Hashes are required in --require-hashes mode")


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "ENV PIP_INDEX_URL=http://{}/",
        r"RUN printf '[global]\nindex-url = http://{}/' >/etc/pip.conf",
    ],
)
def test_the_base_image_can_set_the_package_index(copy, tmp_path, base_image, setting):
    """Here, the index has no package."""
    with ScriptedServer({"": [answer(404)]}) as index:
        base = f"ARG BASE_IMAGE\nFROM ${{BASE_IMAGE}}\n{setting.format(index.address)}\n"
        (tmp_path / "Dockerfile").write_text(base)
        company_base = build(tmp_path, "company", base_image)
        assert_build_fails(copy, company_base, "No matching distribution found", "--network=host")
        assert {request.path for request in index.requests} == {"/awslambdaric/"}


@pytest.fixture
def source_distribution(tmp_path):
    """A package without a wheel, any 1, in tmp_path. Returns its requirement, with a hash."""
    source = tmp_path / "any-1"
    source.mkdir()
    (source / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: any\nVersion: 1\n")
    archive = shutil.make_archive(str(source), "gztar", tmp_path, "any-1")
    digest = hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    return f"any==1 --hash=sha256:{digest}\n"


def test_only_wheels_are_installed(copy, base_image, tmp_path, source_distribution):
    archive = (tmp_path / "any-1.tar.gz").read_bytes()
    page = answer(200, b'<a href="any-1.tar.gz">any-1.tar.gz</a>', Content_Type="text/html")
    with ScriptedServer({"/any-1.tar.gz": [answer(200, archive)], "": [page]}) as server:
        links = f"--no-index --find-links http://{server.address}/\n"
        (copy / "requirements.txt").write_text(f"--only-binary :all:\n{links}{source_distribution}")
        reason = "No matching distribution found for any==1"
        assert_build_fails(copy, base_image, reason, "--network=host")
