"""The README and the pages behind it keep what they promise."""

import os
import re
import sys

import pytest
from cache import CACHE
from engine import DEFAULT_BASE_IMAGE
from machine import ROOT, run
from pages import PAGES, code_blocks, rows
from sample import NAME, RECEIVED, replace


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    # ../../actions is GitHub's, beside the files.
    links = re.findall(r"\]\((?!https://|#|\.\./\.\./actions/)([^)#]+)", PAGES[page])
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_the_figures_of_the_readme_are_those_of_the_benchmark():
    """The README repeats figures of docs/cost.md, which the benchmark has printed."""
    page = PAGES["docs/cost.md"]
    headings = re.search(r"(?m)^\| \| (no extension.+) \|$", page).group(1).split(" | ")
    shown = (
        "no extension",
        "AWS's python-example-extension",
        "this extension",
        "AWS's go-example-extension",
    )
    columns = [headings.index(name) for name in shown]
    measured = {}
    for name, *cells in rows(page):  # if two rows have a name, the first counts: on demand
        measured.setdefault(name, [cell.split()[0] for cell in cells])
    # The only table of the README with this many columns.
    figures = [row for row in rows(PAGES["README.md"]) if len(row) == 1 + len(columns)]
    assert len(figures) > 3
    for name, *cells in figures:
        assert cells == [measured[name][column] for column in columns], name


def test_running_locally_shows_the_run_scripts_options():
    options = run(ROOT / f"{NAME}.sh", "--help").stdout.splitlines()[0].partition(".sh ")[2]
    assert f".sh {options}\n" in PAGES["docs/running-locally.md"]


def test_running_locally_names_the_default_base_image():
    defaults = {row[0]: row[-1] for row in rows(PAGES["docs/running-locally.md"])}
    assert defaults["`BASE_IMAGE`"] == DEFAULT_BASE_IMAGE


@pytest.mark.usefixtures("installed_sample")
def test_process_can_be_called_alone_as_the_page_about_debugging_says(copy):
    """The page's command opens a debugger, which is told to continue."""
    (code,) = code_blocks("docs/debugging.md", "Call your code alone")
    called = run("sh", "-c", code, input="continue\n", cwd=copy)
    assert called.returncode == 0, called.stderr
    assert f'[{NAME}] {RECEIVED}: {{"eventType": "INVOKE"}}\n' in called.stdout


@pytest.mark.slow
def test_the_tests_pass_after_the_edits_that_contributing_allows(copy):
    """Another answer of the function, and other words in the log, of which the tests are told."""
    replace(copy / "lambda_function.py", "Hello from Lambda!", "Goodbye!")
    replace(copy / NAME / "extension.py", RECEIVED, "It happened")
    told = copy / "tests" / "helpers" / "sample.py"
    replace(told, "Hello from Lambda!", "Goodbye!")
    replace(told, RECEIVED, "It happened")
    (copy / ".venv").mkdir()
    (copy / ".venv" / "cache").symlink_to(CACHE)
    files = "tests/test_extension.py", "tests/test_failure_handling.py", "tests/test_sample.py"
    # One way to run it is enough.
    environment = os.environ | {"DOCKER_HOST": "tcp://127.0.0.1:1", "CI": ""}
    ran = run(sys.executable, "-m", "pytest", "-m", "not slow", *files, cwd=copy, env=environment)
    assert ran.returncode == 0, ran.stdout


needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="the benchmark needs Linux and root"
)
BENCHMARK = ROOT / "benchmark" / "benchmark.py"


def names_of_figures(text):
    """The names of the figures in a text, without the number of events, which is an option."""
    return [re.sub(r"[\d,]+ events", "events", name) for name, *_ in rows(text)]


@pytest.mark.slow
@needs_root
def test_one_round_measures_each_figure_of_the_docs():
    """Without AWS's examples, the column that they would have is that of unpooled.py."""
    ran = run(BENCHMARK, "--rounds", "1", "--invocations", "20", "--events", "1000")
    assert ran.returncode == 0, ran.stderr
    assert "| | no extension | unpooled.py | this extension | http_client.py |\n" in ran.stdout
    assert names_of_figures(ran.stdout) == names_of_figures(PAGES["docs/cost.md"])
    measured = rows(ran.stdout)
    assert all(cells[2] != "–" for _, *cells in measured)
    _, _, unpooled, this_extension, http_client = measured[-1]
    connections = [cell.split()[0] for cell in (unpooled, this_extension, http_client)]
    assert connections == ["1,002", "2", "1"]


EXITS = "#!/bin/sh\necho 'no such module'\nexit 3\n"
NOT_ONE = "/extensions must hold one file, an extension"


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize(
    ("files", "mode", "reason"),
    [
        pytest.param({}, 0o755, NOT_ONE, id="no extension"),
        pytest.param({"one": EXITS, "two": EXITS}, 0o755, NOT_ONE, id="two extensions"),
        pytest.param(
            {"one": EXITS},
            0o644,
            "/extensions/one is not executable; try chmod +x",
            id="not executable",
        ),
        pytest.param(
            {"one": EXITS},
            0o755,
            "no such module\n\nThe measurement failed: the extension ended",
            id="ends at once",
        ),
    ],
)
def test_the_benchmark_says_why_it_cannot_measure_an_extension(tmp_path, files, mode, reason):
    for name, text in files.items():
        (tmp_path / "extensions").mkdir(exist_ok=True)
        (tmp_path / "extensions" / name).write_text(text)
        (tmp_path / "extensions" / name).chmod(mode)
    ran = run(BENCHMARK, "--rounds", "1", "--invocations", "1", "--aws", tmp_path)
    assert ran.returncode != 0
    assert reason in ran.stderr
    assert "Traceback" not in ran.stderr
