"""examples/ship_logs/formats.py, which the documentation of each collector defines."""

import gzip
import json
import time

import formats
import pytest
from fake_collector import TOKEN
from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2

# A line, an object, as functions and Lambda itself log them, and what was no JSON.
RECORDS = [
    {"time": "2026-11-27T12:00:00.123Z", "type": kind, "record": record, **labels}
    for labels in [{"function": "f", "requestId": None}]  # before the first invocation
    for kind, record in [("function", "a line"), ("function", {"level": "INFO"}), ("x", "no JSON")]
]
TEXTS = [json.dumps(record) for record in RECORDS]
MESSAGES = ["a line", '{"level": "INFO"}', "no JSON"]
NANOSECONDS = 1_795_780_800_123_000_000


@pytest.fixture(autouse=True)
def function_in_tokyo(monkeypatch):
    """The function's name, and a time zone; times are in UTC regardless."""
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "f")
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    yield
    monkeypatch.delenv("TZ")
    time.tzset()


def test_loki_gets_records_as_lines():
    """https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs"""
    body, headers = formats.loki(TEXTS, TOKEN)
    (stream,) = json.loads(gzip.decompress(body))["streams"]
    assert headers["Content-Encoding"] == "gzip"
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert stream["stream"] == {"service_name": "f"}
    assert stream["values"] == [[str(NANOSECONDS), text] for text in TEXTS]


def test_elasticsearch_gets_one_document_per_record():
    """https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-bulk"""
    body, headers = formats.elasticsearch(TEXTS, TOKEN)
    *lines, end = body.decode().split("\n")
    assert headers == {"Content-Type": "application/x-ndjson", "Authorization": f"ApiKey {TOKEN}"}
    assert end == ""
    assert [json.loads(action) for action in lines[::2]] == [{"create": {}}] * 3
    documents = [json.loads(document) for document in lines[1::2]]
    assert [document["message"] for document in documents] == MESSAGES
    assert {document["@timestamp"] for document in documents} == {RECORDS[0]["time"]}
    assert documents[0]["labels"] == {"type": "function", "function": "f"}


def test_otlp_is_what_the_official_classes_read():
    body, headers = formats.otlp(TEXTS, "")
    request = logs_service_pb2.ExportLogsServiceRequest()
    json_format.Parse(body, request)  # raises an error for an unknown field or a wrong type
    (resource_logs,) = request.resource_logs
    (name,) = resource_logs.resource.attributes
    assert headers == {"Content-Type": "application/json"}
    assert (name.key, name.value.string_value) == ("service.name", "f")
    (scope_logs,) = resource_logs.scope_logs
    records = scope_logs.log_records
    assert [record.body.string_value for record in records] == MESSAGES
    assert {record.time_unix_nano for record in records} == {NANOSECONDS}
    labels = {each.key: each.value.string_value for each in records[0].attributes}
    assert labels == {"type": "function", "function": "f"}
