#!/usr/bin/env python3
"""Measures what an extension costs: this one, others, the least that Python can do, and none.

They take turns. It needs Linux, root for mounts and a cgroup, and what the run script needs.
LAMBDA_RUNTIME_API_DAEMON, the path of the Lambda Runtime API Daemon, adds the first answer under
it: like Lambda it answers when the function is done, while AWS's emulator waits for the extension,
too.
"""

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sandbox import NAME, ROOT, cpu_limit, in_opt, installed, running, stage

sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from extensions_api_server import SHUTDOWN, ExtensionsApiServer, invoke

NONE, WARM = "no extension", "warm invocation, ms"
CORES = 0.15  # what Lambda gives a function of 256 MB


def milliseconds(connection):
    """Invokes the function; returns the time until its answer."""
    start = time.perf_counter()
    connection.request("POST", "/2015-03-31/functions/function/invocations", b"{}")
    answer = connection.getresponse().read()
    assert b"Hello from Lambda!" in answer, answer
    return (time.perf_counter() - start) * 1e3


def extension_process(api):
    """The extension that uses that Runtime API, as its folder in /proc, or None."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (process / "environ").read_text().split("\0")
            command = (process / "cmdline").read_text().split("\0")
            is_extension = any(word.startswith("/opt/") for word in command)
            if is_extension and f"AWS_LAMBDA_RUNTIME_API={api}" in variables:
                return process


def cpu_microseconds(process):
    threads = process.glob("task/*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e3


def measure(opt, emulator, environment, limit, invocations):
    """Starts the extension in a folder for /opt in each way; returns its figures by name."""
    figures, daemon = {}, os.environ.get("LAMBDA_RUNTIME_API_DAEMON")
    for cgroup, where in (None, ""), (limit, f" with {CORES} of a core"):
        with running(emulator, opt, environment, cgroup) as (connection, api, log):
            first = milliseconds(connection)
            init = re.search(r"INIT REPORT\(durationMs: ([\d.]+)", log.read_text())[1]
            figures[f"init{where}, ms"] = float(init)
            figures[f"first answer{where}, ms"] = first
            if not cgroup:
                for _ in range(50):
                    milliseconds(connection)
                process = extension_process(api)
                before = process and cpu_microseconds(process)
                times = [milliseconds(connection) for _ in range(invocations)]
                figures[WARM] = statistics.median(times)
                if process:
                    used = cpu_microseconds(process) - before
                    figures["CPU per event, µs"] = used / invocations
                    kibibytes = re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text())[1]
                    figures["RSS, MiB"] = int(kibibytes) / 1024
        if daemon:
            with running(Path(daemon).resolve(), opt, environment, cgroup) as (connection, *_):
                figures[f"first answer under the Daemon{where}, ms"] = milliseconds(connection)
    return figures


def count_connections(opt, environment, events):
    """The TCP connections that the extension in a folder for /opt opens for that many events."""
    with ExtensionsApiServer([*[invoke()] * events, SHUTDOWN]) as api:
        command = in_opt(opt, f"/opt/extensions/{next(opt.glob('extensions/*')).name}")
        environment = environment | {"AWS_LAMBDA_RUNTIME_API": api.address}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return api.connections


def table(results, reference):
    """Results, {extension: [{figure: value}]}, in Markdown.

    A cell is: median [lowest–highest] ×ratio to the reference.
    """
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for figure in results[reference][0]:
        digits, cells, base = 2 if "invocation" in figure else 0, [figure], None
        for name, rounds in results.items():
            values = [figures[figure] for figures in rounds if figure in figures]
            median = statistics.median(values or [0])
            base = median if name == reference else base
            cell = f"{median:,.{digits}f}" if values else "–"
            if len(values) > 1:
                cell += f" [{min(values):,.{digits}f}–{max(values):,.{digits}f}]"
            cells.append(cell if base in (None, median) else f"{cell} ×{median / base:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    aws = (
        "extensions of AWS's, folders as for /opt; "
        "ratios are to the first (default: to unpooled.py)"
    )
    parser.add_argument("--aws", nargs="+", type=Path, default=[], metavar="PATH", help=aws)
    rounds = "in which each is measured (default: 9)"
    parser.add_argument("--rounds", type=int, default=9, help=rounds)
    invocations = "of a warm function, in a round (default: 1000)"
    parser.add_argument("--invocations", type=int, default=1000, help=invocations)
    events = "for which to count TCP connections (default: 1000)"
    parser.add_argument("--events", type=int, default=1000, help=events)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    sources = {NONE: None}
    for opt in options.aws:
        sources[f"AWS's {next(opt.glob('extensions/*')).name}"] = opt
    if not options.aws:
        sources["unpooled.py"] = ROOT / "benchmark/unpooled.py"
    _, reference, *_ = sources
    sources |= {
        "this extension": ROOT / NAME / "extension.py",
        "http_client.py": ROOT / "benchmark/http_client.py",
    }
    emulator, packages, environment = installed()
    results = {name: [] for name in sources}
    with tempfile.TemporaryDirectory() as folder, cpu_limit(CORES) as limit:
        opts = {name: Path(folder) / name / "opt" for name in sources}
        for name, opt in opts.items():
            stage(opt, sources[name], packages, environment)
        for number in range(options.rounds):
            for name, opt in opts.items():
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                figures = measure(opt, emulator, environment, limit, options.invocations)
                results[name].append(figures)
                if name != NONE:
                    added = figures[WARM] - results[NONE][-1][WARM]
                    figures["added to a warm invocation, ms"] = added
        for name, rounds in list(results.items())[1:]:
            connections = count_connections(opts[name], environment, options.events)
            rounds[0][f"TCP connections for {options.events:,} events"] = connections
    print(f"Median of {options.rounds} rounds [lowest–highest] ×ratio to {reference}\n")
    print(table(results, reference))


if __name__ == "__main__":
    main()
