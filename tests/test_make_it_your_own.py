"""The README's "Make it your own": another name, by renaming files and one line of the Dockerfile."""

import json

from helpers import HELLO, NAME, RECEIVED, rename, running, wait_until

THEIRS = "my-extension"


def test_renamed_files_and_one_line_make_it_another_extension(way, copy):
    option, environment = way
    rename(copy, THEIRS)
    extension = copy / THEIRS / "extension.py"
    extension.write_text(extension.read_text().replace(RECEIVED, "My own code got"))
    with running(copy, option, script=f"{THEIRS}.sh", **environment) as started:
        assert json.loads(started.invoke()) == HELLO
        wait_until(lambda: f"[{THEIRS}] My own code got: " in started.output)
        assert NAME not in started.output
