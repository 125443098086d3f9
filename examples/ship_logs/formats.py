# SPDX-License-Identifier: MIT-0
"""Formats for batches.py. Name one of them in extension.py: batches = Batches(formats.loki)

Each function takes records, as JSON texts, and COLLECTOR_TOKEN, which can be empty. It returns the
body and the headers of a request. The records need a "time" and a "record", as Lambda's have them.
"""

import datetime
import gzip
import json
import os

JSON = {"Content-Type": "application/json"}


def loki(texts: list[str], token: str) -> tuple[bytes, dict[str, str]]:
    """For Grafana Loki, with gzip: a line of the log is a record in JSON.

    COLLECTOR_URL ends in /loki/api/v1/push:
    https://grafana.com/docs/loki/latest/reference/loki-http-api/#ingest-logs
    """
    values = [[nanoseconds(json.loads(text)), text] for text in texts]
    labels = {"service_name": os.environ["AWS_LAMBDA_FUNCTION_NAME"]}
    body = json.dumps({"streams": [{"stream": labels, "values": values}]})
    headers = {**JSON, "Content-Encoding": "gzip", **authorization("Bearer", token)}
    return gzip.compress(body.encode()), headers


def elasticsearch(texts: list[str], token: str) -> tuple[bytes, dict[str, str]]:
    """For Elasticsearch, where the token is an API key: the message is what was logged.

    COLLECTOR_URL ends in the name of a data stream, followed by /_bulk. Elasticsearch returns 200
    even if it rejects a document, which is then lost without a line in the log:
    https://www.elastic.co/docs/api/doc/elasticsearch/operation/operation-bulk
    """
    lines = []
    for text in texts:
        record = json.loads(text)
        document = {"@timestamp": record["time"], "message": message_of(record)}
        document["labels"] = labels_of(record)
        lines += ['{"create": {}}', json.dumps(document)]
    headers = {"Content-Type": "application/x-ndjson", **authorization("ApiKey", token)}
    return "".join(f"{line}\n" for line in lines).encode(), headers


def otlp(texts: list[str], token: str) -> tuple[bytes, dict[str, str]]:
    """For OpenTelemetry, OTLP/HTTP with JSON: the body is what was logged.

    COLLECTOR_URL ends in /v1/logs: https://opentelemetry.io/docs/specs/otlp/#otlphttp-request
    """
    records = [json.loads(text) for text in texts]
    log_records = [
        {
            "timeUnixNano": nanoseconds(record),
            "body": {"stringValue": message_of(record)},
            "attributes": attributes(labels_of(record)),
        }
        for record in records
    ]
    resource = {"service.name": os.environ["AWS_LAMBDA_FUNCTION_NAME"]}
    logs = {
        "resource": {"attributes": attributes(resource)},
        "scopeLogs": [{"logRecords": log_records}],
    }
    return json.dumps({"resourceLogs": [logs]}).encode(), {**JSON, **authorization("Bearer", token)}


def message_of(record):
    """Returns what was logged, as text: a function can log JSON, and Lambda itself does."""
    content = record["record"]
    return content if isinstance(content, str) else json.dumps(content)


def labels_of(record):
    """Returns where a record comes from: a dict of strings."""
    names = "type", "function", "version", "requestId"
    return {name: record[name] for name in names if record.get(name)}


def attributes(texts):
    """Returns a dict of strings as OTLP wants it."""
    return [{"key": key, "value": {"stringValue": text}} for key, text in texts.items()]


def nanoseconds(record):
    """Returns the time of a record in Unix time, as text."""
    moment = datetime.datetime.fromisoformat(record["time"].replace("Z", "+00:00"))
    return str(round(moment.timestamp() * 1000) * 1_000_000)


def authorization(scheme, token):
    """Returns the header that carries the token, if there is one."""
    return {"Authorization": f"{scheme} {token}"} if token else {}
