"""The benchmark runs, and finds what it claims."""

import os
import sys

import pytest
from helpers import ROOT, run


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="the benchmark needs Linux and root")
def test_a_short_benchmark_prints_the_table_of_the_docs():
    ran = run(ROOT / "benchmark" / "run.sh", "--rounds", "1", "--invocations", "100")
    assert ran.returncode == 0, ran.stderr
    documented = (ROOT / "docs" / "cost.md").read_text()

    def names(text):
        return [line.split("|")[1] for line in text.splitlines() if line.startswith("| ")]

    assert names(ran.stdout) == names(documented)
    connections = next(line for line in ran.stdout.splitlines() if line.startswith("| TCP connections"))
    *_, unpooled, pooled, this, floor, _ = connections.split("|")
    assert [int(cell.split()[0].replace(",", "")) for cell in (unpooled, pooled, this, floor)] == [1002, 1, 2, 1]
