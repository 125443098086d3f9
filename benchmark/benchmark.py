#!/usr/bin/env python3
"""Measures what an extension costs those who wait for a function, and those who pay for it.

Everything is measured in turn, round by round, in environment.py: no extension, this one, the
least that Python can do (http_client.py), and others. It needs Linux and, for mounts and CPU
limits, root.
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import ROOT, Environment

NAME = next(ROOT.glob("*/extension.py")).parent.name
NONE = "no extension"
WARM_CHARGE = "warm charge, ms"

# What Lambda gives a function of 256 MB:
# https://docs.aws.amazon.com/lambda/latest/dg/configuration-memory.html (1,769 MB are one core)
CORES = 0.15

# The functions that are measured, and their variables for function.py. One answers at once; one
# imports something in its first invocation, which takes 40 ms of CPU time; one takes 250 ms to
# start.
FUNCTIONS = {
    "quick function": {},
    "late imports": {"FIRST_INVOCATION_MS": "40"},
    "slow start": {"START_MS": "250"},
}

# How environments start, and how many cores they have during init. Lambda does not limit the init
# phase of an environment that it starts for an invocation:
# https://github.com/DataDog/datadog-lambda-extension/issues/700
ON_DEMAND = "On demand"
PROVISIONED = "Provisioned concurrency"
CORES_IN_INIT = {ON_DEMAND: 2, PROVISIONED: CORES}

# How long an environment is idle before an invocation that it was not started for, in seconds.
PAUSE = 0.1


def measure_start(environment, how):
    """Starts an environment and invokes the function twice; returns milliseconds by name."""
    environment.cpu.set(CORES_IN_INIT[how])
    init = environment.init()
    environment.cpu.set(CORES)
    if how == PROVISIONED:
        time.sleep(PAUSE)
    first_answer, first_charge = environment.invoke()
    time.sleep(PAUSE)
    second_answer, second_charge = environment.invoke()
    return {
        "init": init,
        "first answer": first_answer,
        "first charge": first_charge,
        "second answer": second_answer,
        "second charge": second_charge,
        "init and first answer": init + first_answer,
    }


def measure_warm(environment, invocations):
    """Invokes a function often, with the cores of an unlimited init; returns figures by name."""
    environment.cpu.set(CORES_IN_INIT[ON_DEMAND])
    environment.init()
    for _ in range(50):
        environment.invoke()
    process = environment.processes.get("the extension")
    cpu_before = process and cpu_microseconds(process.pid)
    answers, charges = zip(*[environment.invoke() for _ in range(invocations)], strict=True)
    figures = {
        "warm answer, ms": statistics.median(answers),
        WARM_CHARGE: statistics.median(charges),
    }
    if process:
        cpu = cpu_microseconds(process.pid) - cpu_before
        figures["CPU per event, µs"] = cpu / invocations
        figures["RSS, MiB"] = resident_mebibytes(process.pid)
    return figures


def cpu_microseconds(pid):
    """Returns the CPU time that the threads of a process have taken."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e3


def resident_mebibytes(pid):
    """Returns how much memory a process has."""
    (kibibytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kibibytes) / 1024


def install(folder, sources):
    """Makes what environments run: returns {extension: folder for /opt} and the task folder."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    task = folder / "task"
    packages = folder / "packages"
    for lock_file, target in (
        (ROOT / "requirements.txt", task),
        (ROOT / NAME / "requirements.txt", packages),
    ):
        subprocess.run([*pip, "--requirement", lock_file, "--target", target], check=True)
    shutil.copy(ROOT / "benchmark" / "function.py", task / "lambda_function.py")

    opts = {}
    for number, (name, source) in enumerate(sources.items()):
        opts[name] = opt = folder / str(number)
        if source is None:
            (opt / "extensions").mkdir(parents=True)
        elif source.is_dir():
            shutil.copytree(source, opt)
        else:
            shutil.copytree(packages, opt / NAME)
            shutil.copytree(ROOT / NAME, opt / NAME, dirs_exist_ok=True)
            shutil.copy(source, opt / NAME / "main.py")
            shutil.copytree(ROOT / "extensions", opt / "extensions")
    # The image has bytecode, too.
    subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)
    return opts, task


def table(results, reference):
    """Returns results, {extension: {figure: [value]}}, as a table in Markdown.

    A cell is median [lowest–highest] ×ratio to the reference.
    """
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    for figure, reference_values in results[reference].items():
        cells = [figure]
        for name, figures in results.items():
            cell = "–"
            if figure in figures:
                values = figures[figure]
                cell = shown(statistics.median(values))
                if len(values) > 1:
                    cell += f" [{shown(min(values))}–{shown(max(values))}]"
                if name not in (NONE, reference):
                    ratio = statistics.median(values) / statistics.median(reference_values)
                    cell += f" ×{ratio:.2f}"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value):
    """Returns a number as text, with as many digits as mean something."""
    is_exact = isinstance(value, int)
    return f"{value:,.0f}" if is_exact or abs(value) >= 10 else f"{value:.2f}"


def opt_folder(text):
    """Checks an argument that must be a folder for /opt; returns its path."""
    folder = Path(text)
    extensions = list(folder.glob("extensions/*"))
    if len(extensions) != 1:
        raise argparse.ArgumentTypeError(f"{text}/extensions must hold one file, an extension")
    if not os.access(extensions[0], os.X_OK):
        raise argparse.ArgumentTypeError(f"{extensions[0]} is not executable; try chmod +x")
    return folder


def parse_arguments():
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--aws",
        nargs="+",
        type=opt_folder,
        default=[],
        metavar="FOLDER",
        help="other extensions, such as AWS's samples: for each a folder as /opt is to have it,"
        " ready to run; ratios are to the first of them (default: to unpooled.py)",
    )
    for option, default, meaning in (
        ("--rounds", 9, "rounds, each of which measures everything once"),
        ("--invocations", 1000, "invocations of a warm function, in a round"),
        ("--events", 1000, "events for which TCP connections are counted"),
    ):
        help_text = f"{meaning} (default: {default})"
        parser.add_argument(option, type=int, default=default, help=help_text)
    options = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0:
        parser.error("it needs Linux, and root for mounts and CPU limits")
    return options


def main():
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is cleaned up

    sources: dict[str, Path | None] = {NONE: None}
    for opt in options.aws:
        (extension,) = opt.glob("extensions/*")
        sources[f"AWS's {extension.name}"] = opt
    if not options.aws:
        sources["unpooled.py"] = ROOT / "benchmark" / "unpooled.py"
    _, reference, *_ = sources
    sources["this extension"] = ROOT / NAME / "main.py"
    sources["http_client.py"] = ROOT / "benchmark" / "http_client.py"

    with tempfile.TemporaryDirectory() as folder:
        opts, task = install(Path(folder), sources)
        results = measure_rounds(opts, task, options)

    print(f"Median of {options.rounds} rounds [lowest–highest] ×ratio to {reference}.")
    for title, figures in results.items():
        print(f"\n## {title}\n\n{table(figures, reference)}")


def measure_rounds(opts, task, options):
    """Measures everything, round by round; returns {title: {extension: {figure: [value]}}}."""
    results = {title: {name: {} for name in opts} for title in (*CORES_IN_INIT, "Warm")}

    def add(title, name, figure, value):
        results[title][name].setdefault(figure, []).append(value)

    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for how, (function, settings) in itertools.product(CORES_IN_INIT, FUNCTIONS.items()):
            for name, opt in opts.items():
                with Environment(opt, task, settings) as environment:
                    figures = measure_start(environment, how)
                for figure, value in figures.items():
                    add(how, name, f"{function}: {figure}, ms", value)
        for name, opt in opts.items():
            with Environment(opt, task, {}) as environment:
                figures = measure_warm(environment, options.invocations)
            for figure, value in figures.items():
                add("Warm", name, figure, value)
            if name != NONE:
                without = results["Warm"][NONE][WARM_CHARGE][-1]
                add("Warm", name, f"added to a {WARM_CHARGE}", figures[WARM_CHARGE] - without)
    for name, opt in opts.items():
        if name != NONE:
            with Environment(opt, task, {}) as environment:
                connections = environment.count_connections(options.events)
            add("Warm", name, f"TCP connections for {options.events:,} events", connections)
    return results


if __name__ == "__main__":
    main()
