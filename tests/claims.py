"""What a paper's ablation claims, at a scale that two cores can train: its rows on the synthetic scenes, several seeds.

    python tests/claims.py --model crobim_u                     the rows of its main table, seeds 0 to 2, then the table
    python tests/claims.py --model crobim_u --list              the commands still to run, then the table so far
    python tests/claims.py --model prompt_ris --rows ICL/without ICL/with --epochs 20 --jobs 2

Each run is one train.py command, whose result is kept as a line of tests/claims.jsonl and whose folder goes. What is
there under the same settings and scenes is not run again, so the table grows run by run.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

# Table of the paper, and epochs that take a quiet machine of two cores about five minutes.
MAIN = {"crobim_u": ("V", 10), "icipnet": ("III", 12), "rsrefseg2": ("X", 20), "rs2sam2": ("4", 11),
        "prompt_ris": ("3", 17)}
FILE = ROOT / "tests/claims.jsonl"
COMMAND = (sys.executable, str(ROOT / "train.py"))
DRAWS = 10_000
RUNNING = []                            # processes of train.py, to be ended with this one


def arguments(argv=None):
    parser = evaluate.Options(description=__doc__.split("\n\n")[0], formatter_class=evaluate.Defaults)
    number = {"type": evaluate.at_least(1), "metavar": "N"}
    parser.add_argument("--model", required=True, choices=models.PAPERS, help="the paper")
    parser.add_argument("--rows", nargs="+", metavar="TABLE/ROW",
                        help="rows of train.py --list-ablations (default: those of the paper's main table)")
    parser.add_argument("--seeds", **number, default=3, help="seeds 0 to N - 1")
    parser.add_argument("--epochs", **number, help="of each run (default: what takes two cores about five minutes)")
    parser.add_argument("--jobs", **number, default=1, help="runs at once, from two on of one thread each")
    parser.add_argument("--limit", type=evaluate.at_least(0), metavar="N", default=0, help="as for train.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="as for train.py")
    parser.add_argument("--list", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    (table, epochs), paper = MAIN[args.model], models.paper(args.model)
    args.epochs = args.epochs or epochs
    args.rows = args.rows or [f"{table}/{row}" for row in paper.ABLATIONS[table] if figure(paper, f"{table}/{row}")]
    there = [f"{table}/{row}" for table, rows in paper.ABLATIONS.items() for row in rows]
    if absent := [row for row in args.rows if row not in there]:
        raise ValueError(f"--rows {absent[0]}: {args.model} has no such row; there are {', '.join(there)}")
    return args


def figure(paper, row):
    """What the paper reports for TABLE/ROW, empty for a row that is ours."""
    table, name = row.split("/", 1)
    return getattr(paper, "FIGURES", {}).get(table, {}).get(name, "")


# ---------------------------------------------------------------------------------------------------------- the runs


def command(args, row, seed):
    """What a user would type for this run, but for the folder."""
    words = ["--model", args.model, "--dataset", "synthetic", "--preset", "tiny", "--ablation", row, "--seed", seed,
             "--epochs", args.epochs, "--precision", "fp32"]
    words += (["--limit", args.limit] if args.limit else []) + (["--set", *args.set] if args.set else [])
    return [str(word) for word in words]


def protocol(args, row):
    """All that a result depends on beside code and seed, as plain values."""
    config, recipe, _ = train.settle(train.arguments(command(args, row, 0)))
    return {"config": dataclasses.asdict(config), "recipe": recipe, "limit": args.limit, "scenes": scenes(args.limit)}


@functools.cache
def scenes(limit):
    """A name for what the generator draws: it changes with a sentence, and with pixels or masks of a first scene."""
    name = hashlib.sha256(repr(data.SCENES).encode())
    for split in data.SCENES:
        samples = data.read("synthetic", "", split, limit=limit)
        picture, masks = data.render(data.scene(samples[0].image))
        name.update(repr([(sample.id, sample.expression) for sample in samples]).encode())
        name.update(np.concatenate([np.ravel(picture), np.ravel(masks)]).astype(np.uint8).tobytes())
    return name.hexdigest()[:12]


def is_of(line, wanted, model):
    """Whether a kept run was made as `wanted` says; fields that have come since count as what they then were."""
    if (line["model"], line["limit"], line["scenes"]) != (model, wanted["limit"], wanted["scenes"]):
        return False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            pairs = [models.settings_from(model, one["config"], one["recipe"]) for one in (line, wanted)]
    except ValueError:                  # it has a field that is gone
        return False
    return pairs[0] == pairs[1]


def trained(args, row, seed, wanted):
    """Train and score one row in a folder of its own -> the line to keep."""
    words, environment, begun = command(args, row, seed), dict(os.environ), time.monotonic()
    if args.jobs > 1:
        words += ["--workers", "0"]
        environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([*COMMAND, *words, "--output", folder], cwd=ROOT, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        RUNNING.append(process)
        said = process.communicate()[1]
        if process.returncode:
            last = said.replace("\r", "\n").strip().split("\n")[-1]
            raise ValueError(f"{row}, seed {seed}: train.py ended with {process.returncode}: {last:.300}")
        scored, control = (Path(folder, name, "metrics.json") for name in ("test", "test-shuffled"))
        summary = json.loads(scored.read_text())
        return {"model": args.model, "row": row, "seed": seed, "seconds": round(time.monotonic() - begun),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "mIoU": summary["mIoU"], "oIoU": summary["oIoU"],
                "control": json.loads(control.read_text())["mIoU"] if control.exists() else None,
                "diagnostics": {name: figure["mean"] for name, figure in summary["diagnostics"].items()},
                **wanted, "counts": packed(metrics.read_records(scored.parent))}


def packed(records):
    """Picture, intersection and union of each sample, as text for `unpacked`."""
    pictures = list(dict.fromkeys(record["image"] for record in records))
    columns = [[pictures.index(record["image"]) for record in records],
               *([record[name] for record in records] for name in ("intersection", "union"))]
    return base64.b85encode(zlib.compress(json.dumps(columns).encode(), 9)).decode()


def unpacked(line):
    """(pictures, intersections, unions) of a kept line, each (N,) int."""
    return np.array(json.loads(zlib.decompress(base64.b85decode(line["counts"]))))


def kept():
    """The lines of FILE."""
    lines = []
    try:
        for text in FILE.read_text().splitlines() if FILE.exists() else ():
            lines.append(json.loads(text))
    except json.JSONDecodeError:
        raise ValueError(f"{FILE}, line {len(lines) + 1}: no JSON; delete it, and its run is repeated") from None
    return lines


def chosen(args, wanted):
    """{row: {seed: line}} of what is kept of the wanted rows, {row: protocol}."""
    lines = [line for line in kept() if line["seed"] < args.seeds]
    return {row: {line["seed"]: line for line in lines if is_of(line, one, args.model)} for row, one in wanted.items()}


def run(args, missing):
    """Train what is missing, {(row, seed): protocol}, and keep each result at once; a failure is raised at the end."""
    failures = []
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(trained, args, *one, wanted) for one, wanted in missing.items()]
        try:
            for future in tqdm(as_completed(futures), args.model, len(futures)):
                if future.exception():
                    failures.append(future.exception())
                else:
                    with open(FILE, "a") as file:
                        file.write(json.dumps(future.result()) + "\n")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                process.terminate()
            raise
    if failures:
        raise failures[0]


# --------------------------------------------------------------------------------------------------------- the table


def difference(before, after):
    """mIoU of `after` less that of `before`, {seed: line} each, over the seeds of both -> (seeds, mean, low, high).

    The interval takes pictures from a bootstrap and seeds from Student's t with as many degrees of freedom as there are
    seeds, less one: of three values a resampling finds hardly more than their range. One seed: pictures alone.
    """
    seeds = sorted(before.keys() & after.keys())
    runs = [[unpacked(lines[seed]) for seed in seeds] for lines in (before, after)]
    ious = [np.array([intersections / np.maximum(unions, 1) for _, intersections, unions in one]) for one in runs]
    gains = 100 * (ious[1] - ious[0])                                                                   # (seeds,N)
    *sums, n = metrics.resampled(gains, runs[0][0][0], DRAWS, seed=0)
    draws, by_seed = np.mean(sums, axis=0) / n, gains.mean(1)
    if len(seeds) > 1:
        error = by_seed.std(ddof=1) / len(seeds) ** 0.5
        draws = draws + error * np.random.default_rng(1).standard_t(len(seeds) - 1, DRAWS)
    return len(seeds), by_seed.mean(), *np.quantile(draws, metrics.INTERVAL)


def table(args, rows):
    """The printed table of {row: {seed: line}}."""
    paper, width, wide, before = models.paper(args.model), max(map(len, rows)), 7 * max(2, args.seeds), {}
    devices = sorted({line.get("device", "cpu") for runs in rows.values() for line in runs.values()})
    lines = [", ".join([f"{args.model}, tiny preset on synthetic scenes, {args.epochs} epochs, test split", *args.set,
                        *devices]),
             f"{'row':<{width}}{'mIoU':>9}{'oIoU':>9}{'control':>9}  {'of each seed':<{wide}}"
             f"  {'less the row before (95 %)':<34}  the paper"]
    for row, runs in rows.items():
        text = f"{row:<{width}}"
        for name in ("mIoU", "oIoU", "control"):
            values = [line[name] for line in runs.values() if line[name] is not None]
            text += f"{np.mean(values):9.2f}" if values else f"{'none' if runs else 'not run':>9}"
        each, gain = "".join(f"{runs[seed]['mIoU']:<7.2f}" for seed in sorted(runs)), ""
        if before.keys() & runs.keys():
            n, mean, low, high = difference(before, runs)
            gain = f"{mean:+.2f}  {low:+.2f} .. {high:+.2f}, {n} seed{'s' if n > 1 else ''}"
        lines.append(f"{text}  {each:<{wide}}  {gain:<34}  {figure(paper, row)}".rstrip())
        before = runs
    return "\n".join(lines)


def main(argv=None):
    args = arguments(argv)
    wanted = {row: protocol(args, row) for row in args.rows}
    first = {str(one): row for row, one in reversed(wanted.items())}                # rows of the same settings are one
    missing = {(row, seed): wanted[row] for row, runs in chosen(args, wanted).items() for seed in range(args.seeds)
               if seed not in runs and first[str(wanted[row])] == row}
    if args.list:
        print("".join(shlex.join(["python", "train.py", *command(args, *one)]) + "\n" for one in missing), end="")
    elif missing:
        run(args, missing)
    print(table(args, chosen(args, wanted)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with evaluate.one_line_errors():
        main()
