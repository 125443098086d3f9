"""The README's "Make it your own": another name, and other code, by renaming files and one line of the Dockerfile."""

import json
import re

from conftest import HELLO, NAME, copy_sample, run, running, wait_until

THEIRS = "my-extension"


def test_renamed_files_and_one_line_make_it_another_extension(way, folder):
    option, environment = way
    copy = copy_sample(folder / f"renamed{option}")
    for path in NAME, f"extensions/{NAME}", f"{NAME}.sh":
        (copy / path).rename(copy / path.replace(NAME, THEIRS))
    dockerfile = (copy / "Dockerfile").read_text()
    assert dockerfile.count(NAME) == 1
    assert NAME in dockerfile.splitlines()[2]
    (copy / "Dockerfile").write_text(dockerfile.replace(NAME, THEIRS))

    extension = copy / THEIRS / "extension.py"
    source = extension.read_text()
    assert source.count("Received event") == 1
    extension.write_text(source.replace("Received event", "My own code got"))

    with running(copy, option, script=f"{THEIRS}.sh", **environment) as started:
        assert json.loads(started.invoke()) == HELLO
        wait_until(lambda: f"[{THEIRS}] My own code got: " in started.output)
        assert f"[{THEIRS}] Registered with ID: " in started.output
        assert re.search(rf"External agent {THEIRS} \(\S+\) registered", started.output)
        assert NAME not in started.output
        if option == "--docker":
            image = run("docker", "ps", "--filter", f"publish={started.port}", "--format", "{{.Image}}").stdout.strip()
            assert image == THEIRS


def test_the_layer_of_a_renamed_extension_has_its_name(folder):
    copy = copy_sample(folder / "renamed layer")
    for path in NAME, f"extensions/{NAME}":
        (copy / path).rename(copy / path.replace(NAME, THEIRS))
    made = run(copy / "layer.sh")
    assert made.stdout == f"layer.zip: /opt/extensions/{THEIRS} and /opt/{THEIRS}\n", made.stderr
