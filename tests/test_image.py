"""The image: what it contains, how it builds and runs, and the stage for another image."""

import os
import re
import uuid

import pytest
from engine import BASE_IMAGES, assert_runs, build
from fake_lambda import ScriptedServer, answer
from machine import PROGRAMS, path_with, run, skip_except_on_ci
from pages import PAGES, code_blocks
from sample import NAME, replace

ARM64_BASE_IMAGE = os.environ.get("ARM64_BASE_IMAGE", f"arm64v8/{BASE_IMAGES[0]}")


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
    """Windows line endings, and files that nobody else may read, as under a strict umask."""
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["any", "AWS's"])
def test_documented_stage_works_in_another_image(copy, base_image, image, layout):
    """The checkout is from Windows, and has stray files that would fail init."""
    launcher = copy / "extensions" / NAME
    launcher.write_bytes(launcher.read_bytes().replace(b"\n", b"\r\n"))
    for stray in launcher.with_name(".DS_Store"), launcher.with_name(f"{NAME}~"):
        stray.write_text("text")
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    stage, lines = code_blocks("docs/deploying.md", "Into your own image", "dockerfile")
    base, own_image = base_image, image
    _, install_python, *stage = stage.splitlines()
    if layout == "AWS's":  # the page leaves out the second line
        file = "--file", PROGRAMS / "aws_like.Dockerfile", f"--build-arg=SAMPLE_IMAGE={image}"
        base = own_image = build(PROGRAMS, "aws-like", base_image, *file)
        install_python = ""
    stage = "\n".join([f"FROM {base} AS extension", install_python, *stage])
    last_stage = f"FROM {own_image}\nUSER root\nRUN rm -rf /opt/*\n{lines}\nUSER 12345\n"
    (copy / "Dockerfile").write_text(f"{stage}\n{last_stage}")
    (copy / ".dockerignore").unlink()
    own_image = build(copy, "own", base_image)
    assert run_inside(own_image, "ls -A /opt/extensions") == f"{NAME}\n"
    assert_runs(own_image)


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
    def install_times_after_an_edit():
        for code in "lambda_function.py", f"{NAME}/extension.py":
            with (copy / code).open("a") as file:
                file.write(f"# {uuid.uuid4()}\n")  # unknown to the engine's cache
        image = build(copy, "edited", base_image)
        packages = f"/opt/{NAME}/requests/api.py /var/task/awslambdaric/bootstrap.py"
        return run_inside(image, f"stat -c %Y {packages} /usr/local/bin/aws-lambda-rie")

    assert install_times_after_an_edit() == install_times_after_an_edit()


def test_lock_files_without_hashes_are_rejected(copy, base_image):
    (copy / "requirements.txt").write_text("simplejson==3.20.2\n")
    assert_build_fails(copy, base_image, "Hashes are required in --require-hashes mode")


@pytest.mark.slow
def test_the_base_image_can_set_the_package_index(copy, tmp_path, base_image):
    """Here, the index has no package."""
    with ScriptedServer({"": [answer(404)]}) as index:
        setting = f"ENV PIP_INDEX_URL=http://{index.address}/"
        (tmp_path / "Dockerfile").write_text(f"FROM {base_image}\n{setting}\n")
        company_base = build(tmp_path, "company", base_image)
        assert_build_fails(copy, company_base, "No matching distribution found", "--network=host")
        assert {request.path for request in index.requests} == {"/awslambdaric/"}
