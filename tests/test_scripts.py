"""scripts/rename, scripts/build-layer and scripts/update-pins."""

import importlib.util
import os
import re
import stat
import zipfile
from pathlib import Path

import pytest
from engine import assert_runs
from machine import TOOLS, path_with, run, tool, wait_until
from sample import HELLO, NAME, copy_sample, rename

RENAMED = "renamed-extension"


def texts(folder):
    """The contents of a copy's files, except for those that keep the names they have."""
    kept = "cost.md", "CHANGELOG.md", "LICENSE"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in kept]
    hidden = "tests", ".run", ".git"
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in files
        if path.relative_to(folder).parts[0] not in hidden
    }


def test_rename_changes_every_mention_except_of_awss_example(copy):
    rename(copy, RENAMED)
    for name, text in texts(copy).items():
        assert NAME not in name
        for line in text.splitlines():
            assert NAME not in re.sub(
                rf"https://\S*{NAME}|AWS.s {NAME}|-extensions/{NAME}", "", line
            )
    assert f"Copyright the {NAME} contributors" in (copy / "LICENSE").read_text()


def test_rename_leaves_git_and_what_is_installed_alone(copy):
    """A change to an object of git would break the repository."""
    files = copy / ".git" / "objects" / "object", copy / ".venv" / "script"
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text(NAME)
    rename(copy, RENAMED)
    assert {file.read_text() for file in files} == {NAME}


def test_renaming_twice_changes_nothing_else(folder, copy):
    once = copy_sample(folder / f"{copy.name}-once", copy)
    notes = "log-shipper shippers {0}s {0}-tools https://example.com/{0} {1}-PID [{1}]\n"
    for sample in copy, once:
        (sample / "notes.txt").write_text(notes.format(NAME, NAME))
    rename(copy, "shipper")
    rename(copy, RENAMED)
    rename(once, RENAMED)
    assert texts(copy) == texts(once)
    assert (copy / "notes.txt").read_text() == notes.format(NAME, RENAMED)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Capital", "must be lower-case letters, digits and hyphens"),
        ("my_extension", "must be lower-case letters, digits and hyphens"),
        ("", "must be lower-case letters, digits and hyphens"),
        ("tests", "tests exists already"),
        ("logs", "uses the word 'logs'; choose another, such as logs-extension"),
    ],
    ids=["upper case", "underscore", "empty", "a folder", "a word of the text"],
)
def test_rename_refuses_a_name_with_one_line(copy, name, reason):
    before = texts(copy)
    renamed = run(copy / "scripts" / "rename", name)
    assert (renamed.returncode, renamed.stdout) == (1, "")
    assert re.fullmatch(rf"scripts/rename: .*{reason}.*\n", renamed.stderr)
    assert texts(copy) == before


@pytest.mark.parametrize("script", ["rename", "build-layer"])
def test_scripts_refuse_to_choose_between_two_extensions(copy, script):
    (copy / "another").mkdir()
    (copy / "another" / "extension.py").touch()
    refused = run(copy / "scripts" / script, RENAMED)
    assert refused.returncode == 1
    reason = f"may have an extension.py, not: another/extension.py {NAME}/extension.py"
    assert refused.stderr == f"scripts/{script}: only one folder {reason}\n"


@pytest.mark.usefixtures("installed_sample")
def test_a_renamed_copy_with_its_own_code_runs(start, copy):
    rename(copy, RENAMED)
    code = 'from lifecycle import log\n\ndef process(event): log(f"My own code got: {event}")\n'
    (copy / RENAMED / "extension.py").write_text(code)
    with start(copy, command=[copy / f"{RENAMED}.sh"]) as process:
        assert process.invoke() == HELLO
        wait_until(lambda: f"[{RENAMED}] My own code got: " in process.output)
        assert NAME not in process.output


def unpack(archive, folder):
    """Unpacks layer.zip as Lambda does, with the permissions that it names."""
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            Path(opened.extract(entry, folder)).chmod(stat.S_IMODE(entry.external_attr >> 16))
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def layer(folder):
    """The layer of a renamed copy with Windows line endings and no execute bits; unpacked.

    Nobody but the user who makes it can read the user's files.
    """
    sample = copy_sample(folder / "renamed")
    rename(sample, RENAMED)
    launcher = sample / "extensions" / RENAMED
    launcher.write_bytes(launcher.read_bytes().replace(b"\n", b"\r\n"))
    for path in sample.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    made = run("bash", sample / "scripts" / "build-layer", umask=0o077)
    assert made.stdout == f"layer.zip: /opt/extensions/{RENAMED} and /opt/{RENAMED}\n", made.stderr
    return unpack(sample / "layer.zip", folder / "layer")


def test_the_layer_is_pure_python_and_compiled(layer):
    """Unchecked bytecode stays valid regardless of file timestamps (PEP 552)."""
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
    """Neither file times nor the order of files in a folder make a difference."""
    again = copy_sample(folder / "again", folder / "renamed")
    for file in again.rglob("*.py"):
        os.utime(file)
    assert run("bash", again / "scripts" / "build-layer").returncode == 0
    assert (again / "layer.zip").read_bytes() == (folder / "renamed" / "layer.zip").read_bytes()


def test_the_layer_runs_as_any_user_beside_a_function(image, layer):
    assert_runs(image, "--volume", f"{layer}:/opt:ro", extension=RENAMED)


def test_a_layer_with_compiled_code_is_refused_and_none_is_left(copy, tmp_path):
    pins = (copy / "requirements.txt").read_text()
    (compiled,) = re.findall(r"(?m)^awslambdaric==(?:.*\\\n)+.*\n", pins)
    with (copy / NAME / "requirements.txt").open("a") as file:
        file.write(compiled)
    (copy / "layer.zip").write_text("of an earlier build")
    made = run(copy / "scripts" / "build-layer", env=os.environ | {"TMPDIR": str(tmp_path)})
    assert made.returncode == 1
    assert "No matching distribution found for awslambdaric" in made.stderr
    assert made.stderr.endswith("a layer can only contain pure Python packages\n")
    assert os.listdir(tmp_path) == []
    assert not (copy / "layer.zip").exists()


@pytest.mark.parametrize("files", [[], ["requirements.in", f"{NAME}/requirements.in"]])
def test_update_pins_writes_the_named_lock_files_or_all(copy, tmp_path, files):
    """Here uv only logs its arguments, the last of which is the file to read."""
    log = tmp_path / "uv.log"
    path = path_with(tmp_path, {"uv": f'echo "$*" >>"{log}"'})
    ran = run(copy / "scripts" / "update-pins", *files, env=os.environ | {"PATH": path})
    assert ran.returncode == 0, ran.stderr
    read = [line.split()[-1] for line in log.read_text().splitlines()]
    every = [path.relative_to(copy).as_posix() for path in copy.rglob("requirements*.in")]
    assert sorted(read) == sorted(files or every)


@pytest.mark.slow
@pytest.mark.parametrize(("package", "status"), [("tomli", 0), ("python-ldap", 1)])
def test_update_pins_adds_packages_that_have_wheels(copy, package, status):
    """It leaves the other pins alone. python-ldap has no wheels."""
    tool("uv")
    lock_file = copy / NAME / "requirements.txt"
    before = lock_file.read_text().splitlines()
    with lock_file.with_suffix(".in").open("a") as file:
        file.write(f"{package}\n")
    environment = os.environ | {"PATH": f"{TOOLS}:{os.environ['PATH']}"}
    update = copy / "scripts" / "update-pins", f"{NAME}/requirements.in"
    assert run(*update, env=environment).returncode == status
    after = lock_file.read_text().splitlines()
    assert {*before} <= {*after}
    assert bool([line for line in after if line.startswith(f"{package}==")]) == (status == 0)
