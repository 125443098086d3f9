"""The benchmark runs, and finds what it claims."""

import os
import sys

import pytest
from helpers import ROOT, first_number, rows, run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="the benchmark needs Linux and root")
def test_a_short_benchmark_prints_the_table_of_the_docs():
    ran = run(ROOT / "benchmark" / "run.sh", "--rounds", "1", "--invocations", "100")
    assert ran.returncode == 0, ran.stderr
    measured, documented = rows(ran.stdout), rows((ROOT / "docs" / "cost.md").read_text())
    assert [name for name, *_ in measured] == [name for name, *_ in documented]
    (name, _, *connections) = measured[-1]
    assert name == "TCP connections per 1,000 events"
    assert [first_number(cell) for cell in connections] == [1002, 1, 2, 1]
