"""The README and the pages behind it keep what they promise."""

import os
import re
import sys

import pytest
from engine import DEFAULT_BASE_IMAGE
from machine import ROOT, path_with, run
from pages import PAGES, code_blocks, rows
from sample import NAME, RECEIVED


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    # ../../actions is GitHub's, beside the files.
    links = re.findall(r"\]\((?!https://|#|\.\./\.\./actions/)([^)#]+)", PAGES[page])
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_running_locally_shows_the_scripts_options():
    options = run(ROOT / f"{NAME}.sh", "--help").stdout.splitlines()[0].partition(".sh ")[2]
    assert f".sh {options}\n" in PAGES["docs/running-locally.md"]


def test_running_locally_names_the_default_base_image():
    defaults = {row[0]: row[-1] for row in rows(PAGES["docs/running-locally.md"])}
    assert defaults["`BASE_IMAGE`"] == DEFAULT_BASE_IMAGE


@pytest.mark.usefixtures("installed_sample")
def test_process_can_be_called_alone(copy):
    """The page's command opens a debugger, which is told to continue."""
    (code,) = code_blocks("docs/running-locally.md", "Debugging")
    called = run("sh", "-c", code, input="continue\n", cwd=copy)
    assert called.returncode == 0, called.stderr
    assert f'[{NAME}] {RECEIVED}: {{"eventType": "INVOKE"}}\n' in called.stdout


needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="the benchmark needs Linux and root"
)
BENCHMARK = ROOT / "benchmark" / "benchmark.py"


@pytest.mark.slow
@needs_root
def test_one_round_of_the_benchmark_prints_the_pages_table():
    """Without AWS's samples, their columns are missing."""
    ran = run(BENCHMARK, "--rounds", "1", "--invocations", "20", "--events", "1000")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("| | no extension | this extension | http.client alone |\n")
    figures = rows(ran.stdout)
    page = rows(PAGES["docs/cost.md"])
    assert [row[0].partition(" for ")[0] for row in figures] == [
        row[0].partition(" for ")[0] for row in page[: len(figures)]
    ]
    assert figures[-1] == ["TCP connections for 1,000 events", "–", "2", "1"]


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize(
    ("extensions", "reason"),
    [
        ({}, "/extensions must hold one file, an extension"),
        (
            {"ends": "echo no such module; exit 3"},
            "no such module\n\nThe measurement failed: the extension exited",
        ),
    ],
    ids=["not built", "ends at once"],
)
def test_the_benchmark_says_why_it_cannot_measure_an_extension(tmp_path, extensions, reason):
    (tmp_path / "extensions").mkdir()
    path_with(tmp_path / "extensions", extensions)
    ran = run(BENCHMARK, "--rounds", "1", "--invocations", "1", tmp_path)
    assert ran.returncode != 0
    assert reason in ran.stderr
    assert "Traceback" not in ran.stderr
