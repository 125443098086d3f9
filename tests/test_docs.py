"""The README and the pages behind it keep what they promise."""

import os
import re
import sys

import pytest
from machine import ROOT, run
from pages import PAGES, rows
from sample import NAME


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https://|#)([^)#]+)", PAGES[page])
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


def test_every_row_of_the_failures_is_a_test_of_that_name_and_the_other_way_round():
    situations = [row[0] for row in rows(PAGES["docs/failure-handling.md"])]
    text = (ROOT / "tests" / "test_failure_handling.py").read_text()
    tests = re.findall(r"(?m)^def test_(\w+)", text)
    assert [re.sub(r"\W+", "_", situation.lower()).strip("_") for situation in situations] == tests


def test_the_figures_of_the_readme_are_those_of_the_benchmark():
    headings = re.search(r"(?m)^\| \| (.+) \|$", PAGES["docs/cost.md"]).group(1).split(" | ")
    shown = "no extension", "AWS's python-example-extension", "this extension"
    columns = [headings.index(each) for each in shown]
    table = rows(PAGES["docs/cost.md"])
    measured = {name: [cell.split()[0] for cell in cells] for name, *cells in table}
    table = PAGES["README.md"].partition("## Run it")[0]
    for name, *cells in rows(table[table.index("| | no extension |") :]):
        assert cells == [measured[name][column] for column in columns], name


def test_the_options_are_those_of_the_script():
    options = run(ROOT / f"{NAME}.sh", "--help").stdout.splitlines()[0].partition(".sh ")[2]
    assert f".sh {options}\n" in PAGES["docs/running-locally.md"]


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="the benchmark needs Linux and root"
)
def test_one_round_measures_each_figure_of_the_docs():
    ran = run(ROOT / "benchmark" / "benchmark.py", "--rounds", "1", "--invocations", "20")
    assert ran.returncode == 0, ran.stderr
    assert "| | no extension | unpooled.py | this extension | http_client.py |\n" in ran.stdout
    measured, documented = rows(ran.stdout), rows((ROOT / "docs" / "cost.md").read_text())
    names = [name for name, *_ in documented if "the Daemon" not in name]
    assert [name for name, *_ in measured] == names
    assert all(cells[2] != "–" for _, *cells in measured)
    assert [cell.split()[0] for cell in measured[-1][2:]] == ["1,002", "2", "1"]
