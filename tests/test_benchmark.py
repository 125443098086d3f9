"""The benchmark runs, and finds what it claims."""

import os
import sys

import pytest
from machine import ROOT, run
from pages import rows


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
