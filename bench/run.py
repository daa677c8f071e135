"""Run the benchmarks and write their figures into bench/RESULTS.md.

    uv run bench/run.py [--runs N] [--only PART] [--release VERSION] [--quick]

Measures the processes of the default service, tasks, beat, digests, and the first command, in about
half an hour; nothing else should run on the machine. Each figure is the median of N runs, 5 unless
given; what is compared alternates in the same run. The processes are compared with those of release
1.0.0, or another one. `--quick` measures less of each and prints the tables only.
Needs PostgreSQL (127.0.0.1:5432, user postgres, trust), RabbitMQ (127.0.0.1:5672, guest), Redis
(127.0.0.1:6379) and wrk.
"""

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import beat
import compare
import digest
import first
import smtp
import tasks

RESULTS = Path(__file__).with_name("RESULTS.md")

#: The part of RESULTS.md that this script writes
START, END = "<!-- figures: bench/run.py -->", "<!-- end of figures -->"

#: The parts, each with a heading there
PARTS = ["processes", "tasks", "beat", "digests", "first"]

#: The release whose processes are measured beside those of now, unless another one is given
FIRST_RELEASE = "1.0.0"

#: How many tasks, digests and recipients are measured: as a rule, and with --quick
SIZES = {
    "tasks": (4_000, 1_000),
    "dispatches": (200, 20),
    "digests": (10_000, 300),
    "recipients": ([1_000, 10_000, 100_000], [1_000]),
}


def main():
    """Measure, and write or print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="of each measurement, default 5")
    parser.add_argument(
        "--only", metavar="PART", choices=PARTS, help=f"measure one of {', '.join(PARTS)} again"
    )
    parser.add_argument(
        "--release", metavar="VERSION", default=FIRST_RELEASE, help="default 1.0.0; for processes"
    )
    parser.add_argument("--quick", action="store_true", help="measure less, and print only")
    options = parser.parse_args()
    if not shutil.which("wrk"):
        parser.error("wrk is missing: install it with the package manager of the system")
    sizes = {name: pair[options.quick] for name, pair in SIZES.items()}
    before, _, rest = RESULTS.read_text().partition(START)
    figures, _, after = rest.partition(END)
    # The machine is described before the first heading.
    parts = dict(
        zip(["machine", *PARTS], re.split(r"^(?=### )", figures, flags=re.M), strict=False)
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=digest.ROOT, capture_output=True, text=True
    ).stdout.strip()
    measurements = {
        "machine": lambda: [describe_machine(options.runs)],
        "processes": lambda: measure_processes(options.release, options.runs),
        "tasks": lambda: [measure_tasks(sizes["tasks"], options.runs)],
        "beat": lambda: [measure_beat(sizes["dispatches"])],
        "digests": lambda: measure_digests(sizes["digests"], sizes["recipients"], options.runs),
        "first": lambda: [
            "### First command, warm cache, no network",
            first.measure(first.LAST_RELEASE, options.runs),
        ],
    }
    for part, measure in measurements.items():
        if options.only in (None, part):
            parts[part] = "\n\n".join(measure())
            if part != "machine":
                parts[part] += f"\n\nMeasured on {datetime.date.today()} at commit {commit}."
    text = "\n\n".join(parts[part].strip() for part in measurements if part in parts)
    if options.quick:
        print(text)
    else:
        RESULTS.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")


def describe_machine(runs):
    """Return what the figures were measured on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20
    with compare.database() as name:
        import psycopg

        with psycopg.connect(f"{digest.SERVER}/{name}") as connection:
            postgresql = connection.info.server_version // 10_000
    import amqp

    with amqp.Connection("127.0.0.1:5672") as connection:
        rabbitmq = connection.server_properties["version"]
    with digest.generate_service() as service:
        python = f"{service.project}/.venv/bin/python"
        code = "import platform, django, celery; print(platform.python_version(), django.__version__, celery.__version__)"
        versions = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    version, django, celery = versions.stdout.split()
    return (
        f"Measured on {os.cpu_count()} cores "
        f"({model[1] if model else platform.machine()}), {memory:.0f} GiB; Python {version}, "
        f"Django {django}, Celery {celery}; PostgreSQL {postgresql}, RabbitMQ {rabbitmq} and the "
        f"load on the same machine. Medians of {runs} runs."
    )


def measure_processes(release, runs):
    """Yield the tables of the processes, beside those of a release."""
    with (
        compare.generated_project() as ours,
        compare.generated_project(release) as other,
        compare.bare_project(ours.python) as bare,
    ):
        requests = next(name for name in compare.MEASUREMENTS if name.startswith("requests"))
        everything = set(compare.MEASUREMENTS)
        names = {ours.name: everything, other.name: everything, bare.name: {requests}}
        medians = compare.compare([ours, other, bare], names, runs)
    yield "### Processes of the default service"
    yield compare.format_table(medians, ours.name, other.name)
    ratio = medians[requests, ours.name] / medians[requests, bare.name]
    yield (
        f"Django alone, one view and no middleware, with the same gunicorn: "
        f"{medians[requests, bare.name]:.0f} requests per second. The service reaches {ratio:.2f} "
        f"of it through all middleware, with a line in the log for each request."
    )


def measure_tasks(count, runs):
    """Return the table of the tasks."""
    end_to_end, record, workers = tasks.compare(count, runs)
    lines = ["### Tasks through RabbitMQ", "", "| end to end | tasks/s | times Celery alone |"]
    lines.append("|---|---|---|")
    for name, (rate, ratio) in end_to_end.items():
        lines.append(f"| {name} | {rate:.0f} | {ratio:.2f} |")
    lines.append("")
    lines.append(
        f"A worker with the record of runs: {record['with']:.0f} tasks/s; without: "
        f"{record['without']:.0f}, {record['ratio']:.1%} (median of {record['turns']} pairs of turns)."
    )
    lines += ["", "| processes of a worker | tasks/s | times one |", "|---|---|---|"]
    for processes, rate in workers.items():
        lines.append(f"| {processes} | {rate:.0f} | {rate / workers[1]:.2f} |")
    return "\n".join(lines)


def measure_beat(count):
    """Return the sentence about beat."""
    times = beat.measure(count)
    return (
        f"### Beat\n\n{len(times)} dispatches of 20 schedules: half within "
        f"{beat.get_percentile(times, 50):.2f} s of the time they were due, 99 % within "
        f"{beat.get_percentile(times, 99):.2f} s, the latest after {max(times):.2f} s."
    )


def measure_digests(size, recipients, runs):
    """Yield the tables of the digests."""
    earlier_service = digest.generate_service(smtp.ONE_AT_A_TIME)
    with earlier_service as earlier, digest.generate_service() as service:
        small = max(size // 10, 1)
        variants = {
            f"release {smtp.ONE_AT_A_TIME}, one process": (earlier, small, 1, 1),
            "one connection, one process": (service, small, 1, 1),
            "eight connections, one process": (service, size, 8, 1),
            "eight connections, two processes": (service, size * 2 // 5, 8, 2),
            "eight connections, four processes": (service, size * 2 // 5, 8, 4),
        }
        rates = smtp.compare(variants, runs)
        lines = [
            "### Digests",
            "",
            "Through an SMTP server that takes 10 ms, each e-mail once, beside the last release that "
            "sends one e-mail at a time:",
            "",
        ]
        lines += [
            "| a worker with | digests | digests/s | times that release |",
            "|---|---|---|---|",
        ]
        for name, variant in variants.items():
            ratio = rates[name] / next(iter(rates.values()))
            lines.append(f"| {name} | {variant[1]:,} | {rates[name]:.0f} | {ratio:.1f} |")
        yield "\n".join(lines)
        lines = ["In one process, without a mail server:", ""]
        lines += [
            "| recipients | recipients/s | peak MiB | queries per 1,000 |",
            "|---|---|---|---|",
        ]
        for count in recipients:
            result = digest.run(service, "chunks", count)
            values = "{rate:.0f} | {memory:.1f} | {queries:.0f}".format(**result)
            lines.append(f"| {count:,} | {values} |")
        yield "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
