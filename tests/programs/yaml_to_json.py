"""Prints the documents of a YAML file as a list in JSON. It needs PyYAML, which .venv/tools has."""

import json
import sys
from pathlib import Path

import yaml

print(json.dumps([*yaml.safe_load_all(Path(sys.argv[1]).read_text())]))
