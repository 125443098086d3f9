"""The README's "Make it your own": another name, by renaming files and one line of the Dockerfile."""

import json
import re

from helpers import HELLO, NAME, RECEIVED, rename, run, running, wait_until

THEIRS = "my-extension"


def test_renamed_files_and_one_line_make_it_another_extension(way, copy):
    option, environment = way
    rename(copy, THEIRS)
    extension = copy / THEIRS / "extension.py"
    source = extension.read_text()
    assert source.count(RECEIVED) == 1
    extension.write_text(source.replace(RECEIVED, "My own code got"))

    with running(copy, option, script=f"{THEIRS}.sh", **environment) as started:
        assert json.loads(started.invoke()) == HELLO
        wait_until(lambda: f"[{THEIRS}] My own code got: " in started.output)
        assert f"[{THEIRS}] Registered with ID: " in started.output
        assert re.search(rf"External agent {THEIRS} \(\S+\) registered", started.output)
        assert NAME not in started.output
        if option == "--no-docker":
            assert "installing" in started.output  # nothing of the old name is used
        else:
            image = run("docker", "ps", "--filter", f"publish={started.port}", "--format", "{{.Image}}").stdout.strip()
            tags = json.loads(run("docker", "image", "inspect", "--format", "{{json .RepoTags}}", image).stdout)
            assert f"{THEIRS}:latest" in tags
