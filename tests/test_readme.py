"""The README keeps what it promises."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^##+ {title}\n(.*?)(?=^##+ |\Z)", README, re.MULTILINE | re.DOTALL).group(1)


def test_every_row_of_what_it_withstands_is_a_test_of_that_name_and_the_other_way_round():
    rows = re.findall(r"^\| (.+?) \|", section("What it withstands"), re.MULTILINE)[1:]
    tests = re.findall(r"^def test_(\w+)", (ROOT / "tests" / "test_withstands.py").read_text(), re.MULTILINE)
    assert [re.sub(r"\W+", "_", row.lower()).strip("_") for row in rows] == tests
