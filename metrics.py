"""Scores: intersection and union per expression, and everything that is computed from them.

    scores.add(numbers, *intersection_union(prediction, masks))          every batch, on every process
    lines = records(samples, scores.merged(expected=len(samples)))       the lines of per_sample.jsonl
    print(table(summarize(lines), {"split": "val", "protocol": "original", "threshold": "logits > 0"}))
    python metrics.py RUN_A RUN_B                                        is run B better than run A, sample by sample?

oIoU (elsewhere cIoU) and mIoU (elsewhere gIoU) are CroBIM-U's Eqs. (19) and (20); Pr@X is the share of samples with
IoU >= X. Where prediction and truth are both empty, the union is empty and the policy decides: `zero` counts the
sample as IoU 0, `one` as IoU 1, `skip` leaves it out. All are percentages but a record's `iou`, which is in 0..1.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

THRESHOLDS, INTERVAL = (0.5, 0.6, 0.7, 0.8, 0.9), (0.025, 0.975)
EMPTY = {"zero": 0.0, "one": 1.0, "skip": math.nan}
FIELDS = ("id", "image", "expression", "instance", "category", "category_source", "intersection", "union", "iou")
OPTIONAL = ("truth", "failure", "kind")        # a record may have these too; all other fields are diagnostics
FAILURES = ("none", "nothing", "wrong", "spill", "boundary")

# -------------------------------------------------------------------------------------------- counting, on the device


def intersection_union(prediction, masks):
    """bool (M,...,H,W) twice -> intersection (M,), union (M,): int64 pixel counts, on the same device."""
    if prediction.shape != masks.shape or prediction.dtype != torch.bool or masks.dtype != torch.bool:
        raise ValueError(f"prediction and masks must be bool and of one shape, got {prediction.dtype} "
                         f"{tuple(prediction.shape)} and {masks.dtype} {tuple(masks.shape)}")
    return (prediction & masks).flatten(1).sum(1), (prediction | masks).flatten(1).sum(1)


class Scores:
    """Collects counts and diagnostics per sample on the device; nothing waits for it before `merged`."""

    def __init__(self):
        self.parts = []

    def add(self, numbers, intersection, union, **diagnostics):
        """One batch: `numbers` (M,) int64, the samples' places in the evaluated list; every other value is (M,) too."""
        part = {"number": numbers, "intersection": intersection, "union": union, **diagnostics}
        shapes = {name: tuple(value.shape) for name, value in part.items()}
        taken = {"number", *FIELDS, *OPTIONAL[1:]} & diagnostics.keys()
        if set(shapes.values()) != {(len(numbers),)} or taken or part.keys() != (self.parts or [part])[0].keys():
            raise ValueError(f"scores take one value per sample, the same diagnostics in every batch, none named like "
                             f"a field of a record; got {shapes} after {[*(self.parts or [{}])[0]]}")
        self.parts.append({name: value.detach().double() if value.is_floating_point() else value.long()
                           for name, value in part.items()})

    def merged(self, expected=None):
        """Each sample once, in order, from all processes: {"number", "intersection", "union", diagnostics: (N,)}.

        Collective: every process calls it and gets the same. expected: the length of the evaluated list.
        """
        local = {name: torch.cat([part[name] for part in self.parts]).cpu().numpy() for name in (self.parts or [()])[0]}
        gathered = [local]
        if dist.is_available() and dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, local)
        gathered = [part for part in gathered if part]
        if not gathered:
            raise ValueError("no sample was scored on any process; is the split empty?")
        numbers, first = np.unique(np.concatenate([part["number"] for part in gathered]), return_index=True)
        if expected is not None and not np.array_equal(numbers, np.arange(expected)):
            wrong = np.setxor1d(numbers, np.arange(expected)).tolist()
            raise ValueError(f"expected scores of samples 0 to {expected - 1}, got {len(numbers)}; missing or unknown: "
                             f"{len(wrong)} (numbers {wrong[:5]})")
        return {name: np.concatenate([part[name] for part in gathered])[first] for name in gathered[0]}


# -------------------------------------------------------------------------------------------------- records, summary


def failure(iou, intersection, union, truth):
    """Why a sample failed, from the areas alone: the first of FAILURES that holds; None for a sample that is left out.

    none: an IoU of at least 0.5. nothing: the mask is empty. wrong: less than a tenth of the mask lies on the truth.
    spill: the mask is more than twice the truth. boundary: the rest.
    """
    mask = union - truth + intersection
    tests = (iou >= 0.5, mask == 0, 10 * intersection < mask, mask > 2 * truth, True)
    return None if math.isnan(iou) else next(name for name, holds in zip(FAILURES, tests, strict=True) if holds)


def records(samples, merged, empty="zero"):
    """The lines of per_sample.jsonl. A left-out `iou` and a non-finite diagnostic are None: JSON has no NaN.

    `image` is the picture, under whatever names it stands; `truth`, where `merged` has it, the pixels of the true mask.
    """
    diagnostics = [name for name in merged if name not in ("number", "intersection", "union", "truth")]
    lines = []
    for row, number in enumerate(merged["number"].tolist()):
        sample, intersection, union = samples[number], int(merged["intersection"][row]), int(merged["union"][row])
        values = {"iou": intersection / union if union else EMPTY[empty],
                  **{name: merged[name][row].item() for name in diagnostics}}
        lines.append({"id": sample.id, "image": sample.picture, "expression": sample.expression,
                      "instance": sample.instance, "category": sample.category,
                      "category_source": sample.category_source, "intersection": intersection, "union": union,
                      **{name: value if math.isfinite(value) else None for name, value in values.items()}})
        if "truth" in merged:
            truth = int(merged["truth"][row])
            lines[-1] |= {"truth": truth, "failure": failure(values["iou"], intersection, union, truth)}
        if sample.kind:
            lines[-1]["kind"] = sample.kind
    return lines


def read_records(path):
    """The records in a per_sample.jsonl, in that of a scored split's folder, or in that of a run's test split."""
    path, lines = Path(path), []
    if path.is_dir():
        places = [path / "per_sample.jsonl", path / "test" / "per_sample.jsonl"]
        if not any(place.is_file() for place in places):
            scored = ", ".join(sorted(str(file.parent) for file in path.glob("*/per_sample.jsonl")))
            raise FileNotFoundError(f"no {' or '.join(map(str, places))}; there are: {scored or 'no scores'}")
        path = places[0] if places[0].is_file() else places[1]
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n"), 1):
        try:
            lines.append(json.loads(text))
            absent = set(FIELDS) - set(lines[-1])
        except (json.JSONDecodeError, TypeError):
            absent = FIELDS
        if absent:
            raise ValueError(f"{path}, line {number}: expected a record of per_sample.jsonl, no field {sorted(absent)}")
    return lines


def summarize(records, empty="zero", bootstrap=1000, seed=0):
    """Every score of a split, from the records alone. bootstrap: resamples behind the 95 % intervals, 0 for none."""
    lines, columns = _columns(empty, records)
    images = _groups(lines, "image")
    summary = {"samples": len(lines), "images": int(images.max()) + 1, "empty": empty,
               "empty_unions": sum(line["union"] == 0 for line in records), **_scores(columns, empty),
               "ImgAcc": _mean_of_means(columns[2], images),
               "InstAcc": _mean_of_means(columns[2], _groups(lines, "image", "instance")),
               **{part: {} for part in ("intervals", "categories", "mean_over_categories", "kinds", "diagnostics")}}
    if bootstrap:
        intersection, union, iou, n = resampled(columns, images, bootstrap, seed)
        draws = {"oIoU": _ratio(intersection, union, empty), "mIoU": iou / n}
        summary["intervals"] = {key: np.quantile(100 * draws[key], INTERVAL).tolist() for key in draws}
    categories = np.array([line["category"] or "" for line in lines])
    for category in np.unique(categories[categories != ""]).tolist():
        scores = _scores(columns[:, categories == category], empty)
        summary["categories"][category] = {"n": int((categories == category).sum()),
                                           **{key: scores[key] for key in ("oIoU", "mIoU", "Pr@0.5")}}
    if rows := summary["categories"].values():
        summary["mean_over_categories"] = {
            "categories": len(rows), "n": sum(row["n"] for row in rows),
            "parsed": sum(line["category_source"] == "parsed" for line in lines),
            **{key: float(np.mean([row[key] for row in rows])) for key in ("oIoU", "mIoU", "Pr@0.5")}}
    failures = [line["failure"] for line in lines if line.get("failure")]
    summary["failures"] = {name: 100 * failures.count(name) / len(failures) for name in FAILURES if failures}
    for kind in sorted({line["kind"] for line in lines if line.get("kind")}):
        here = [number for number, line in enumerate(lines) if line.get("kind") == kind]
        summary["kinds"][kind] = {"n": len(here), "mIoU": 100 * float(columns[2, here].mean()),
                                  "on_distractor": _mean(lines[k].get("on_distractor") for k in here)["mean"]}
    for name in dict.fromkeys(name for line in records for name in line if name not in FIELDS + OPTIONAL):
        summary["diagnostics"][name] = _mean(line.get(name) for line in records)
    return summary


def _mean(values):
    """Mean of those that are numbers, None where none is, and their number."""
    values = np.array(list(values), dtype=np.float64)                                       # None becomes NaN
    values = values[~np.isnan(values)]
    return {"mean": float(values.mean()) if len(values) else None, "n": len(values)}


def compare(records_a, records_b, empty="zero", bootstrap=1000, seed=0):
    """Two runs on the same samples, paired by id: scores, difference B - A with its 95 % interval, share of wins."""
    a, b = ({line["id"]: line for line in lines} for lines in (records_a, records_b))
    if a.keys() != b.keys() or not len(a) == len(records_a) == len(records_b):
        raise ValueError(f"A ({len(records_a)} records, {len(a)} ids) and B ({len(records_b)}, {len(b)}) must hold the "
                         f"same ids, each once; not in both: {sorted(a.keys() ^ b.keys())[:3]}; score the same split")
    lines, columns = _columns(empty, records_a, [b[key] for key in a])
    for key, one in a.items():
        if "truth" in one and one["truth"] != b[key].get("truth", one["truth"]):
            raise ValueError(f"the object of sample {key} has {one['truth']} pixels in A, {b[key]['truth']} in B: they "
                             "were scored at different sizes; score both by one --protocol")
    images = _groups(lines, "image")
    result = {"samples": len(lines), "empty": empty, **_paired(columns, images, empty, bootstrap, seed), "parts": {}}
    winner = np.sign(columns[5] - columns[2])
    result["wins"] = {name: 100 * float((winner == sign).mean()) for name, sign in (("A", -1), ("B", 1), ("equal", 0))}
    parted = {"words": [len(line["expression"].split()) for line in lines]}
    for truths in ([line.get("truth") for line in lines], [b[line["id"]].get("truth") for line in lines]):
        if None not in truths:
            parted["pixels of the object"] = truths
    for what, values in parted.items():
        for label, part in _thirds(np.array(values)):
            result["parts"][f"{label} {what}"] = {
                "samples": int(part.sum()),
                **_paired(columns[:, part], np.unique(images[part], return_inverse=True)[1], empty, bootstrap, seed)}
    return result


def _paired(columns, images, empty, bootstrap, seed):
    """{score: A, B, difference, its interval} of the paired columns (6,N)."""
    draws, result = resampled(columns, images, bootstrap, seed), {}
    differences = {"oIoU": _ratio(draws[3], draws[4], empty) - _ratio(draws[0], draws[1], empty),
                   "mIoU": (draws[5] - draws[2]) / draws[6]}
    for key, values in differences.items():
        score_a, score_b = _scores(columns[:3], empty)[key], _scores(columns[3:], empty)[key]
        result[key] = {"A": score_a, "B": score_b, "difference": score_b - score_a,
                       "interval": np.quantile(100 * values, INTERVAL).tolist()}
    return result


def _thirds(values):
    """[(label, (N,) bool)] of the lowest, middle and highest third of whole numbers; equal ones stay together."""
    low, high = np.sort(values)[[(len(values) - 1) // 3, 2 * (len(values) - 1) // 3]]
    parts = [(f"up to {low}", values <= low), (f"{low + 1} to {high}", (values > low) & (values <= high)),
             (f"above {high}", values > high)]
    return [(label, part) for label, part in parts if part.any()]


def _columns(empty, *runs):
    """-> the first run's lines that count, and (3 * runs, N) float64: intersection, union and IoU of each run."""
    if empty not in EMPTY:
        raise ValueError(f"the empty-union policy must be one of {', '.join(EMPTY)}, got {empty!r}")
    columns = []
    for lines in runs:
        intersection, union = (np.array([line[key] for line in lines], float) for key in ("intersection", "union"))
        columns += [intersection, union, _ratio(intersection, union, empty)]
    scored = ~np.isnan(columns).any(axis=0)
    if not scored.any():
        raise ValueError(f"nothing to score: of {len(scored)} records none counts under the empty-union policy "
                         f"`{empty}`; is the split, or its per_sample.jsonl, empty?")
    return [line for line, keep in zip(runs[0], scored, strict=True) if keep], np.array(columns)[:, scored]


def _ratio(intersection, union, empty):
    return np.where(union > 0, intersection / np.maximum(union, 1), EMPTY[empty])


def _scores(columns, empty):
    intersection, union, iou = columns
    oiou = _ratio(intersection.sum(), union.sum(), empty)  # CroBIM-U Eq. (19)  # RSRefSeg 2 Eq. (13), cIoU
    miou = iou.mean()  # CroBIM-U Eq. (20)  # RSRefSeg 2 Eq. (13), gIoU
    # In float64, 7 / 10 and 0.7 are the same number, so a sample exactly at a threshold counts.
    return {"oIoU": 100 * float(oiou), "mIoU": 100 * float(miou),
            **{f"Pr@{threshold}": 100 * float((iou >= threshold).mean()) for threshold in THRESHOLDS}}


def _groups(lines, *fields):
    """(N,) number of the group of each line: lines that agree in all fields."""
    seen = {}
    return np.array([seen.setdefault(tuple(line[field] for field in fields), len(seen)) for line in lines])


def _mean_of_means(iou, groups):
    return 100 * float((np.bincount(groups, weights=iou) / np.bincount(groups)).mean())


def resampled(columns, groups, bootstrap, seed):
    """Sums of K columns (N,), and N itself, over G groups drawn with replacement out of G -> (K + 1, bootstrap).

    The groups are the images: expressions of one image rise and fall together, so they are drawn together.
    """
    sums = np.array([np.bincount(groups, weights=column) for column in [*columns, np.ones(len(groups))]])   # (K+1,G)
    rng, G = np.random.default_rng(seed), sums.shape[1]
    times = (np.bincount(rng.integers(G, size=G), minlength=G) for _ in range(bootstrap))
    return np.stack([(sums * drawn).sum(1) for drawn in times], axis=1)


# ---------------------------------------------------------------------------------------------- printing, command line


def table(summary, title_fields):
    """The printed table. title_fields says what was scored: split, protocol and threshold at least."""
    if absent := {"split", "protocol", "threshold"} - title_fields.keys():
        raise ValueError(f"a table says what it scored; title_fields lacks {sorted(absent)}")
    title = [f"{name} {value}" for name, value in title_fields.items() if name != "empty" and value not in ("", None)]
    title += [f"samples {summary['samples']}", f"empty union: {summary['empty']} ({summary['empty_unions']} found)",
              "Pr@X: IoU >= X"]
    names = {key: key for key in summary if key.startswith("Pr@")}
    names |= {"oIoU": "oIoU (cIoU)", "mIoU": "mIoU (gIoU)", "ImgAcc": "ImgAcc", "InstAcc": "InstAcc"}
    lines = [" · ".join(title), "".join(f"{name:>{len(name) + 2}}" for name in names.values()),
             "".join(f"{summary[key]:{len(name) + 2}.2f}" for key, name in names.items())]
    lines += [f"{key} 95 % interval {low:.2f} .. {high:.2f} (bootstrap over {summary['images']} images)"
              for key, (low, high) in summary["intervals"].items()]
    if summary["categories"]:
        mean, label = summary["mean_over_categories"], f"mean over {len(summary['categories'])} categories"
        lines.append(f"{'category':<24}{'n':>7}{'oIoU':>8}{'mIoU':>8}{'Pr@0.5':>8}")
        lines += [f"{name:<24}{row['n']:7}{row['oIoU']:8.2f}{row['mIoU']:8.2f}{row['Pr@0.5']:8.2f}"
                  for name, row in {**summary["categories"], label: mean}.items()]
        lines += [f"({mean['parsed']} of {mean['n']} categories parsed from the expression)"] if mean["parsed"] else []
    if shares := [f"{name} {share:.2f}" for name, share in summary["failures"].items()]:
        lines.append(f"failures, % of the samples: {', '.join(shares)}")
    if summary["kinds"]:
        lines.append(f"{'kind of sentence':<24}{'n':>7}{'mIoU':>8}  mask on another object of the category")
        lines += [f"{kind:<24}{row['n']:7}{row['mIoU']:8.2f}"
                  + ("" if row["on_distractor"] is None else f"  {row['on_distractor']:.1%}")
                  for kind, row in summary["kinds"].items()]
    lines += [f"{name} {math.nan if row['mean'] is None else row['mean']:.4f} (mean over {row['n']} samples)"
              for name, row in summary["diagnostics"].items()]
    return "\n".join(lines)


def rows(summaries):
    """One row per split, as the papers' main tables have it: {split: summary} -> text."""
    names = [key for key in next(iter(summaries.values())) if key.startswith("Pr@")]
    names += ["oIoU", "mIoU", "ImgAcc", "InstAcc"]
    lines = [f"{'split':<16}{'samples':>9}" + "".join(f"{name:>9}" for name in names)]
    return "\n".join(lines + [f"{split:<16}{summary['samples']:9}" + "".join(f"{summary[key]:9.2f}" for key in names)
                              for split, summary in summaries.items()])


def main():
    parser = argparse.ArgumentParser(description="Compare two runs on the same samples, paired by id.")
    parser.add_argument("a", metavar="A", help="a run (its test split), a scored split's folder or a per_sample.jsonl")
    parser.add_argument("b", metavar="B", help="the same of another run")
    parser.add_argument("--empty", choices=EMPTY, default="zero", help="an empty union counts as (default: zero)")
    args = parser.parse_args()
    try:
        result = compare(read_records(args.a), read_records(args.b), args.empty)
    except (OSError, ValueError) as error:
        sys.exit(f"metrics.py: {error}")
    print(f"{result['samples']} samples, empty union: {args.empty}\n{'':4}{'A':>8}{'B':>8}{'B - A':>9}  95 % interval")
    row = "{}{A:8.2f}{B:8.2f}{difference:+9.2f}  {interval[0]:+.2f} .. {interval[1]:+.2f}"
    print(*(row.format(key, **result[key]) for key in ("oIoU", "mIoU")), sep="\n")
    for name, part in result["parts"].items():
        print(row.format("mIoU", **part["mIoU"]), f"  {part['samples']} samples, {name}")
    print("IoU higher in B: {B:.2f} % of the samples, in A: {A:.2f} %, equal: {equal:.2f} %".format(**result["wins"]))


if __name__ == "__main__":
    main()
