"""The image and the layer: what they contain, how they build and run."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import uuid
import zipfile
from pathlib import Path

import pytest
from engine import BASE_IMAGES, build
from fake_lambda import ScriptedServer, answer
from machine import (
    TOOLS,
    free_port,
    path_with,
    post,
    run,
    skip_except_on_ci,
    tool,
    wait_until,
)
from pages import PAGES, code_blocks
from sample import HELLO, NAME, RECEIVED, copy_sample, remove_hashes, rename, replace

ARM64_BASE_IMAGE = os.environ.get("ARM64_BASE_IMAGE", f"arm64v8/{BASE_IMAGES[0]}")
STAGE, COPY = code_blocks("docs/deploying.md", "Into your own image", "dockerfile")
RENAMED = "renamed-extension"


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
def test_it_builds_and_runs_on_arm64(sample):
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


def test_any_user_can_run_it_whatever_the_checkout_looks_like(copy, base_image):
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
def test_the_extension_starts_although_the_functions_path_lacks_python(image, path):
    """Lambda starts it with the function's variables. Here it starts alone, and misses Lambda."""
    launcher = f"--entrypoint=/opt/extensions/{NAME}"
    ran = run("docker", "run", "--rm", f"--env=PATH={path}", launcher, image)
    assert "AWS_LAMBDA_RUNTIME_API is not set" in ran.stderr


def test_the_extension_finds_the_python_of_awss_images(image, tmp_path):
    """It is in /var/lang/bin. Here a stand-in is there, which says what it is to run."""
    path_with(tmp_path, {"python3": 'echo "$@"'})
    tmp_path.chmod(0o755)
    options = f"--volume={tmp_path}:/var/lang/bin:ro", "--env=PATH=/nowhere"
    launcher = f"--entrypoint=/opt/extensions/{NAME}"
    ran = run("docker", "run", "--rm", *options, launcher, image)
    assert ran.stdout.endswith(f"-u /opt/{NAME}/main.py\n")


def test_it_trusts_certificate_authorities(image):
    count = "import ssl; print(len(ssl.create_default_context().get_ca_certs()))"
    assert int(run_inside(image, f'python3 -c "{count}"')) > 100


def test_it_adds_at_most_62_mb_to_its_base(base_image, image):
    # Of the files, because what an engine calls the size of an image depends on how it stores it.
    du = "du -sx --apparent-size --block-size=1 /"
    size, base_size = (int(run_inside(each, du).split()[0]) for each in (image, base_image))
    assert size - base_size <= 62_000_000


def test_dependencies_stay_separate_and_pip_stays_out(image):
    names = "-name requests -o -name awslambdaric -o -name pip -o -path '/var/lib/apt/lists/*'"
    found = run_inside(image, f"find / -xdev {names}").split()
    assert sorted(found) == [f"/opt/{NAME}/requests", "/var/task/awslambdaric"]


def test_nothing_is_compiled_at_run_time_whatever_the_file_times(image):
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
def test_the_pages_stage_brings_the_extension_into_another_image(copy, base_image, image):
    """docs/deploying.md shows the stage, and the line for the last one."""
    for path in copy.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    stage = STAGE.replace("debian:bookworm", base_image)
    last = f"FROM {image}\nUSER root\nRUN rm -r /opt/*\n{COPY}USER 12345\n"
    (copy / "Dockerfile").write_text(f"{stage}\n{last}")
    (copy / ".dockerignore").unlink()
    assert_runs(build(copy, "own", base_image))


@pytest.mark.slow
def test_the_function_may_be_a_package(copy, base_image):
    """The README shows the line of the Dockerfile."""
    (copy / "app").mkdir()
    (copy / "lambda_function.py").rename(copy / "app" / "main.py")
    (line,) = re.findall(r"`(COPY app \S+)`", PAGES["README.md"])
    replace(copy / "Dockerfile", "COPY *.py .${LAMBDA_TASK_ROOT}/", line)
    replace(copy / "Dockerfile", "lambda_function.lambda_handler", "app.main.lambda_handler")
    assert_runs(build(copy, "package", base_image))


def test_editing_code_does_not_reinstall_the_dependencies(copy, base_image):
    def install_times():
        image = build(copy, "edited", base_image)
        packages = f"/opt/{NAME}/requests/api.py /var/task/awslambdaric/bootstrap.py"
        return run_inside(image, f"stat -c %Y {packages} /usr/local/bin/aws-lambda-rie")

    before = install_times()
    for code in "lambda_function.py", f"{NAME}/extension.py":
        with (copy / code).open("a") as file:
            file.write(f"# {uuid.uuid4()}\n")  # unknown to the cache, also when the test runs again
    assert install_times() == before


def test_a_lock_file_without_hashes_is_refused(copy, base_image):
    remove_hashes(copy / "requirements.txt")
    assert_build_fails(copy, base_image, "Hashes are required in --require-hashes mode")


@pytest.fixture(scope="session")
def layer(folder):
    """The layer of a renamed copy, made by a user whose files nobody else can read; unpacked."""
    sample, target = folder / "renamed", folder / "layer"
    rename(copy_sample(sample), RENAMED)
    made = run(sample / "scripts" / "build-layer", umask=0o077)
    assert made.stdout == f"layer.zip: /opt/extensions/{RENAMED} and /opt/{RENAMED}\n", made.stderr
    with zipfile.ZipFile(sample / "layer.zip") as archive:
        for entry in archive.infolist():
            Path(archive.extract(entry, target)).chmod(stat.S_IMODE(entry.external_attr >> 16))
    return target


def test_the_layer_fits_any_cpu_and_is_compiled(layer):
    """Unchecked bytecode is valid whatever the times of the files are (PEP 552)."""
    assert {path.name for path in layer.glob("extensions/*")} == {RENAMED}
    assert {path.name for path in layer.iterdir()} == {"extensions", RENAMED}
    assert not [*layer.rglob("*.so")]
    for source in layer.rglob("*.py"):
        source_hash = importlib.util.source_hash(source.read_bytes())
        unchecked_hash = (0b01).to_bytes(4, "little") + source_hash
        compiled = Path(importlib.util.cache_from_source(source)).read_bytes()
        assert compiled.startswith(importlib.util.MAGIC_NUMBER + unchecked_hash)


@pytest.mark.slow
def test_the_same_input_makes_the_same_layer(folder, layer):
    """Other file times make no difference."""
    archive = folder / "renamed" / "layer.zip"
    before = archive.read_bytes()
    for file in archive.parent.rglob("*.py"):
        os.utime(file)
    assert run(archive.parent / "scripts" / "build-layer").returncode == 0
    assert archive.read_bytes() == before


def test_the_layer_runs_as_any_user_beside_a_function(image, layer):
    assert_runs(image, "--volume", f"{layer}:/opt:ro", extension=RENAMED)


def test_when_pip_fails_no_layer_is_left_not_even_an_old_one(copy, tmp_path):
    (copy / "layer.zip").write_text("of an earlier build")
    remove_hashes(copy / NAME / "requirements.txt")
    made = run(copy / "scripts" / "build-layer", env=os.environ | {"TMPDIR": str(tmp_path)})
    assert made.returncode == 1
    assert os.listdir(tmp_path) == []
    assert not (copy / "layer.zip").exists()


def test_build_layer_refuses_a_dependency_that_is_not_pure_python(copy):
    pins = (copy / "requirements.txt").read_text()
    (compiled,) = re.findall(r"(?m)^awslambdaric==(?:.*\\\n)+.*\n", pins)
    with (copy / NAME / "requirements.txt").open("a") as file:
        file.write(compiled)
    made = run(copy / "scripts" / "build-layer")
    assert made.returncode == 1
    assert "No matching distribution found for awslambdaric" in made.stderr


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


def test_only_wheels_get_into_the_image(copy, base_image, tmp_path, source_distribution):
    archive = (tmp_path / "any-1.tar.gz").read_bytes()
    page = answer(200, b'<a href="any-1.tar.gz">any-1.tar.gz</a>', Content_Type="text/html")
    with ScriptedServer({"/any-1.tar.gz": [answer(200, archive)], "": [page]}) as server:
        links = f"--no-index --find-links http://{server.address}/\n"
        (copy / "requirements.txt").write_text(f"--only-binary :all:\n{links}{source_distribution}")
        reason = "No matching distribution found for any==1"
        assert_build_fails(copy, base_image, reason, "--network=host")


def test_without_a_file_update_pins_writes_every_lock_file(copy, tmp_path):
    """Here uv only logs what it is given, which ends with the file to read."""
    log = tmp_path / "uv.log"
    path = path_with(tmp_path, {"uv": f'echo "$*" >>"{log}"'})
    ran = run(copy / "scripts" / "update-pins", env=os.environ | {"PATH": path})
    assert ran.returncode == 0, ran.stderr
    read = [line.split()[-1] for line in log.read_text().splitlines()]
    sources = [path.relative_to(copy).as_posix() for path in copy.rglob("requirements*.in")]
    assert sorted(read) == sorted(sources)


@pytest.mark.slow
def test_update_pins_adds_a_package_leaves_other_pins_alone_and_refuses_one_without_wheels(copy):
    tool("uv")
    requirements = copy / NAME / "requirements.in"
    lock_file = copy / NAME / "requirements.txt"
    before = lock_file.read_text().splitlines()
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
    update = copy / "scripts" / "update-pins", f"{NAME}/requirements.in"
    for package, status in ("tomli", 0), ("python-ldap", 1):
        with requirements.open("a") as file:
            file.write(f"{package}\n")
        assert run(*update, env=environment).returncode == status
        after = lock_file.read_text().splitlines()
        assert {*before} <= {*after}
        assert [line for line in after if line.startswith("tomli==")]
