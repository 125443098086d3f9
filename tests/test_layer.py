"""scripts/build-layer: the extension as a Lambda layer."""

import calendar
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import zipfile
from pathlib import Path

import pytest
from helpers import HELLO, NAME, ROOT, Running, copy_sample, free_port, listens, remove_hashes, rename, run, wait_until

RENAMED = "renamed-extension"


@pytest.fixture(scope="module")
def layer(folder):
    """The layer of a renamed copy, made in one time zone and unpacked in another, with the zip's modes and times."""
    sample = copy_sample(folder / "renamed")
    rename(sample, RENAMED)
    (sample / "layer.zip").write_text("the last one")
    target, temporary = folder / "layer", folder / "layer's temporary files"
    temporary.mkdir()
    environment = os.environ | {"TZ": "JST-9", "TMPDIR": str(temporary)}
    environment |= {"PIP_PREFIX": str(temporary), "PIP_USER": "1", "PIP_REQUIRE_VIRTUALENV": "1"}  # means nothing here
    made = run(sample / "scripts" / "build-layer", env=environment, umask=0o077)
    assert made.stdout == f"layer.zip: /opt/extensions/{RENAMED} and /opt/{RENAMED}\n", made.stderr
    assert not list(temporary.iterdir())
    with zipfile.ZipFile(sample / "layer.zip") as archive:
        for entry in archive.infolist():
            path = Path(archive.extract(entry, target))
            path.chmod(stat.S_IMODE(entry.external_attr >> 16))
            os.utime(path, (calendar.timegm(entry.date_time),) * 2)
    return target


def test_the_layer_holds_the_extension_and_its_launcher(layer):
    assert sorted(path.name for path in layer.iterdir()) == ["extensions", RENAMED]
    assert [path.name for path in (layer / "extensions").iterdir()] == [RENAMED]
    assert os.access(layer / "extensions" / RENAMED, os.X_OK)
    assert (layer / RENAMED / "requests" / "__init__.py").exists()


def test_any_user_can_read_the_layer(layer):
    for path in layer.rglob("*"):
        needed = 0o555 if path.is_dir() or path.parent.name == "extensions" else 0o444
        assert path.stat().st_mode & needed == needed


def test_the_layer_contains_bytecode_that_ignores_file_times(layer):
    sources = list(layer.rglob("*.py"))
    assert len(sources) > 50
    for source in sources:
        header = Path(importlib.util.cache_from_source(source)).read_bytes()[:16]
        unchecked = (0b01).to_bytes(4, "little")
        assert header == importlib.util.MAGIC_NUMBER + unchecked + importlib.util.source_hash(source.read_bytes())


def test_the_layer_takes_pure_wheels_although_the_lock_file_offers_compiled_ones(layer):
    assert list(layer.rglob("charset_normalizer/*.py"))
    assert not [*layer.rglob("*.so"), *layer.rglob("*.pyd")]
    assert re.search(
        r"^charset-normalizer==.*(\n +--hash=.*){3}", (ROOT / NAME / "requirements.txt").read_text(), re.MULTILINE
    )


def test_the_layer_refuses_a_lock_file_without_hashes(tmp_path):
    copy = copy_sample(tmp_path / "copy")
    remove_hashes(copy / NAME / "requirements.txt")
    made = run(copy / "scripts" / "build-layer")
    assert made.returncode != 0
    assert "Hashes are required in --require-hashes mode" in made.stderr


def test_the_layer_runs_at_opt_beside_a_function_that_is_not_in_its_image(layer, installed_sample, tmp_path):
    for options in [], ["--map-root-user"]:
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *options, "sh", "-c"]
        mount = 'mount -t overlay -o "lowerdir=$0:/opt" overlay /opt'
        if run(*isolated, mount, "layer", cwd=layer.parent).returncode == 0:
            break
    else:
        pytest.skip("no mount namespaces for this user on this machine")
    installed = next(installed_sample.glob(f".run/{NAME}-*"))
    task = shutil.copytree(next(installed.glob("python/lib/python*/site-packages")), tmp_path / "task")
    shutil.copy(ROOT / "lambda_function.py", task)
    port, log = free_port(), tmp_path / "log"
    command = [*isolated, f'{mount} && cd "{task}" && exec "$@"', "layer", installed / "aws-lambda-rie"]
    command += ["--runtime-interface-emulator-address", f"127.0.0.1:{port}"]
    command += ["--runtime-api-address", f"127.0.0.1:{free_port()}"]
    command += ["python3", "-m", "awslambdaric", "lambda_function.lambda_handler"]
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=layer.parent, stdout=output, stderr=output)
    try:
        started = Running(process, [log], port)
        wait_until(lambda: listens(port))
        with started.receives():
            assert json.loads(started.invoke()) == HELLO
    finally:
        process.kill()
        process.wait()
