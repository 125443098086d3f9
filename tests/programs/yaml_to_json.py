"""Prints the documents of a YAML file as a list in JSON. It needs PyYAML, which .venv/tools has."""

import json
import sys
from pathlib import Path

import yaml

# CloudFormation's short form: !Ref NAME becomes "Ref NAME".
yaml.SafeLoader.add_constructor("!Ref", lambda _, node: f"Ref {node.value}")
print(json.dumps([*yaml.safe_load_all(Path(sys.argv[1]).read_text())]))
