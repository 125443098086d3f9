"""lambda_function.py: the answer of the handler."""

import sys

from helpers import HELLO, ROOT


def test_the_handler_says_hello(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import lambda_function

    assert lambda_function.lambda_handler({"key": "value"}, None) == HELLO
