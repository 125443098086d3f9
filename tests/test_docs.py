"""The README and the pages behind it keep what they promise."""

import os
import re
import sys

import pytest
from machine import ROOT, run
from pages import PAGES, rows
from sample import NAME


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall("(?m)^#+ (.+)$", page.read_text())
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_leads_somewhere(page):
    for link in re.findall(r"\]\((?!https://)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_row_of_the_failures_is_a_test_of_that_name_and_the_other_way_round():
    situations = [row[0] for row in rows(PAGES["docs/failure-handling.md"])]
    tests = re.findall(r"(?m)^def test_(\w+)", (ROOT / "tests" / "test_failure_handling.py").read_text())
    assert [re.sub(r"\W+", "_", situation.lower()).strip("_") for situation in situations] == tests


def test_the_figures_of_the_readme_are_those_of_the_benchmark():
    headings = re.search(r"(?m)^\| \| (.+) \|$", PAGES["docs/cost.md"]).group(1).split(" | ")
    columns = [headings.index(each) for each in ("no extension", "AWS's python-example-extension", "this extension")]
    measured = {name: [cell.split()[0] for cell in cells] for name, *cells in rows(PAGES["docs/cost.md"])}
    table = PAGES["README.md"].partition("## Run it")[0]
    for name, *cells in rows(table[table.index("| | no extension |") :]):
        assert cells == [measured[name][column] for column in columns], name


def test_every_variable_of_the_script_is_in_a_table_and_the_other_way_round():
    read = set(re.findall(r"\b((?:AWS_LAMBDA|LAMBDA|AMQP|BASE|MAX)_\w+)", (ROOT / f"{NAME}.sh").read_text()))
    tables = [*rows(PAGES["docs/running-locally.md"]), *rows(PAGES["docs/daemon-and-amqp.md"])]
    told = {name for row in tables for name in re.findall(r"^`([A-Z_]+)`(?:, `([A-Z_]+)`)?", row[0]) for name in name}
    assert told - {""} == read - {"AWS_LAMBDA_FUNCTION_NAME", "LAMBDA_TASK_ROOT"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="the benchmark needs Linux and root")
def test_one_round_measures_each_figure_of_the_docs():
    ran = run(ROOT / "benchmark" / "benchmark.py", "--rounds", "1", "--invocations", "20")
    assert ran.returncode == 0, ran.stderr
    assert "| | no extension | unpooled.py | this extension | http_client.py |\n" in ran.stdout
    measured, documented = rows(ran.stdout), rows((ROOT / "docs" / "cost.md").read_text())
    assert [name for name, *_ in measured] == [name for name, *_ in documented if "the Daemon" not in name]
    assert all(cells[2] != "–" for _, *cells in measured)
    assert [cell.split()[0] for cell in measured[-1][2:]] == ["1,002", "2", "1"]
