"""Extensions that send batches, and what they log."""

import json
import re

from extension_process import variant
from machine import PROGRAMS, ROOT
from sample import NAME

EXAMPLE = ROOT / "examples" / "ship_logs"
NOWHERE = "http://127.0.0.1:1/"  # a collector that does not exist


def batching_variant(extension, folder, code, speed=1, format_name=None, **settings):
    """The main.py of a copy with batches.py and that code, adjusted as adjusted_extension.py says.

    The settings are for batches.py.
    """
    adjustments = {"speed": speed, "format_name": format_name, **settings}
    files = {
        "batches.py": (EXAMPLE / "batches.py").read_text(),
        "formats.py": (EXAMPLE / "formats.py").read_text(),
        "extension.py": (PROGRAMS / "adjusted_extension.py").read_text(),
        "example.py": code,
        "adjustments.json": json.dumps(adjustments),
    }
    return variant(extension, folder, files)


def counted(log, what):
    """The sum of the numbers of records in lines of a log, such as "Records dropped: 5 (…)"."""
    return sum(map(int, re.findall(rf"(?m)^\[{NAME}\] Records {what}: (\d+)", log)))
