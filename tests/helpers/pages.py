"""The README and the pages behind it."""

import re

from machine import ROOT

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for pattern in ("*.md", "docs/*.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
}


def code_blocks(page, title, language="sh"):
    """The blocks of code below a heading of a page, down to the next one."""
    section = re.search(rf"(?ms)^##+ {title}\n(.*?)(?=^##+ |\Z)", PAGES[page]).group(1)
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", section)


def rows(text):
    """The rows of the tables in a text, without their headings, as lists of cells."""
    lines = re.findall(r"(?m)^\|(.+)\|$(?!\n\|---)", text)
    return [
        [cell.strip() for cell in line.split("|")] for line in lines if not line.startswith("---")
    ]
