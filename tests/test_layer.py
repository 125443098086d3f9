"""scripts/build-layer: the extension as a Lambda layer."""

import importlib.util
import json
import stat
import zipfile
from pathlib import Path

import pytest
from engine import container
from machine import run, wait_until
from sample import HELLO, RECEIVED, copy_sample, rename

RENAMED = "renamed-extension"


@pytest.fixture(scope="session")
def layer(folder):
    """The layer of a renamed copy, made by a user whose files nobody else can read, and unpacked."""
    sample, target = folder / "renamed", folder / "layer"
    rename(copy_sample(sample), RENAMED)
    made = run(sample / "scripts" / "build-layer", umask=0o077)
    assert made.stdout == f"layer.zip: /opt/extensions/{RENAMED} and /opt/{RENAMED}\n", made.stderr
    with zipfile.ZipFile(sample / "layer.zip") as archive:
        for entry in archive.infolist():
            Path(archive.extract(entry, target)).chmod(stat.S_IMODE(entry.external_attr >> 16))
    return target


def test_the_layer_holds_the_extension_and_its_launcher_for_any_cpu_with_bytecode_that_ignores_file_times(layer):
    assert {path.relative_to(layer).as_posix() for path in layer.glob("extensions/*")} == {f"extensions/{RENAMED}"}
    assert {path.name for path in layer.iterdir()} == {"extensions", RENAMED}
    assert not [*layer.rglob("*.so")]
    for source in layer.rglob("*.py"):
        unchecked_hash = (0b01).to_bytes(4, "little") + importlib.util.source_hash(source.read_bytes())
        compiled = Path(importlib.util.cache_from_source(source)).read_bytes()
        assert compiled.startswith(importlib.util.MAGIC_NUMBER + unchecked_hash)


def test_the_layer_runs_as_any_user_beside_a_function(layer, image):
    with container(image, "--volume", f"{layer}:/opt:ro") as (name, answer):
        assert json.loads(answer) == HELLO
        wait_until(lambda: f"[{RENAMED}] {RECEIVED}" in run("docker", "logs", name).stdout)
