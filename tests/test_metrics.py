"""metrics.py on 4x4 masks with answers worked out by hand, against plain loops, and over two processes."""

import json
import math
import multiprocessing
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import metrics
from metrics import Scores, compare, intersection_union, read_records, records, rows, summarize, table


def mask(*rows):
    return torch.tensor([[character == "#" for character in row] for row in rows])


NONE = mask("....", "....", "....", "....")
BLOCK = mask("##..", "##..", "....", "....")
ROW = mask("####", "....", "....", "....")
CORNER = mask("....", "....", "....", "...#")

# prediction, truth, intersection, union
CASES = [(BLOCK, BLOCK, 4, 4), (ROW, BLOCK, 2, 6), (CORNER, BLOCK, 0, 5), (NONE, BLOCK, 0, 4), (ROW, NONE, 0, 4),
         (NONE, NONE, 0, 0), (~BLOCK, ROW, 2, 14), (~NONE, CORNER, 1, 16)]


def line(number, intersection, union, *, image=None, instance="0", category=None, source="file", **diagnostics):
    return {"id": f"s{number}", "image": f"i{number if image is None else image}", "expression": f"expression {number}",
            "instance": instance, "category": category, "category_source": source if category else None,
            "intersection": intersection, "union": union, "iou": intersection / union if union else 0.0, **diagnostics}


def lines_of(pairs, **fields):
    return [line(number, *pair, **fields) for number, pair in enumerate(pairs)]


def random_lines(n, images, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    union = rng.integers(1, 5000, n)
    share = np.clip(rng.beta(2, 1, n) + shift, 0, 1)
    return [line(k, int(union[k] * share[k]), int(union[k]), image=k * images // n, category=f"c{k % 3}")
            for k in range(n)]


def samples_of(n):
    return [SimpleNamespace(id=f"s{k}", picture=f"i{k // 3}", expression=f"expression {k}", instance=f"o{k // 2}",
                            category=("ship", "road", None)[k % 3], category_source=("file", "parsed", None)[k % 3],
                            kind=None)
            for k in range(n)]


# ------------------------------------------------------------------------------------------------------------ counting


def test_intersection_union_by_hand():
    predictions, truths = torch.stack([case[0] for case in CASES]), torch.stack([case[1] for case in CASES])
    for shape in ((8, 4, 4), (8, 1, 4, 4)):
        intersection, union = intersection_union(predictions.view(shape), truths.view(shape))
        assert intersection.tolist() == [case[2] for case in CASES]
        assert union.tolist() == [case[3] for case in CASES]
        assert intersection.dtype == union.dtype == torch.int64


def test_intersection_union_refuses_what_would_broadcast_or_is_not_a_mask():
    with pytest.raises(ValueError, match="one shape"):
        intersection_union(BLOCK.expand(2, 4, 4), BLOCK.expand(2, 1, 4, 4))
    with pytest.raises(ValueError, match="bool"):
        intersection_union(BLOCK[None].float(), BLOCK[None])


def test_scores_come_back_by_sample_number_each_once():
    scores = Scores()
    spread = torch.tensor([0.25, math.nan], dtype=torch.bfloat16, requires_grad=True)
    scores.add(torch.tensor([4, 0]), torch.tensor([40, 0]), torch.tensor([400, 5]), spread=spread)
    scores.add(torch.tensor([2, 1, 0]), torch.tensor([20, 10, 0]), torch.tensor([200, 100, 5]),
               spread=0 * spread[[0] * 3])
    scores.add(torch.tensor([3]), torch.tensor([30]), torch.tensor([300]), spread=4 * spread[:1])
    merged = scores.merged(expected=5)
    assert merged["number"].tolist() == [0, 1, 2, 3, 4]
    assert merged["intersection"].tolist() == [0, 10, 20, 30, 40]
    assert merged["union"].tolist() == [5, 100, 200, 300, 400]
    np.testing.assert_array_equal(merged["spread"], [math.nan, 0, 0, 1, 0.25])
    flags = Scores()
    flags.add(torch.arange(2), *torch.ones(2, 2, dtype=torch.int64), wrong=torch.tensor([True, False]))
    assert flags.merged()["wrong"].tolist() == [1, 0]


def test_scores_refuse_missing_samples_and_mixed_columns():
    scores, one = Scores(), torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="no sample was scored"):
        scores.merged()
    scores.add(torch.tensor([0, 2]), *torch.ones(2, 2, dtype=torch.int64), spread=torch.zeros(2))
    assert scores.merged()["number"].tolist() == [0, 2]
    with pytest.raises(ValueError, match=r"missing or unknown: 2 \(numbers \[1, 3\]\)"):
        scores.merged(expected=4)
    with pytest.raises(ValueError, match=r"missing or unknown: 2 \(numbers \[1, 2\]\)"):
        scores.merged(expected=2)
    for wrong in ({}, {"spread": torch.zeros(2)}, {"spread": torch.zeros(1), "other": torch.zeros(1)}):
        with pytest.raises(ValueError, match="one value per sample"):
            scores.add(one, one, one, **wrong)
    for name in ("number", "id", "iou", "failure", "kind"):
        with pytest.raises(ValueError, match="named like a field"):
            Scores().add(one, one, one, **{name: torch.zeros(1)})


def test_records_hold_what_the_numbers_are_made_of():
    samples = samples_of(3)
    merged = {"number": np.array([0, 2]), "intersection": np.array([3, 0]), "union": np.array([4, 0]),
              "spread": np.array([0.5, math.nan]), "slope": np.array([-math.inf, -1.0])}
    first, second = records(samples, merged)
    assert list(first) == [*metrics.FIELDS, "spread", "slope"]
    assert first == {"id": "s0", "image": "i0", "expression": "expression 0", "instance": "o0", "category": "ship",
                     "category_source": "file", "intersection": 3, "union": 4, "iou": 0.75, "spread": 0.5,
                     "slope": None}
    assert (second["id"], second["iou"], second["spread"], second["category"]) == ("s2", 0.0, None, None)
    assert [type(first[name]) for name in ("intersection", "union", "iou")] == [int, int, float]
    assert records(samples, merged, empty="one")[1]["iou"] == 1.0
    assert records(samples, merged, empty="skip")[1]["iou"] is None
    json.dumps([first, second], allow_nan=False)


# ------------------------------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("empty", ["zero", "one", "skip"])
def test_eq19_overall_iou_by_loops(empty):
    pairs = [case[2:] for case in CASES]
    intersections = unions = 0
    for intersection, union in pairs:
        intersections += intersection
        unions += union
    assert (intersections, unions) == (9, 53)
    assert summarize(lines_of(pairs), empty=empty)["oIoU"] == pytest.approx(100 * 9 / 53, rel=1e-12)


@pytest.mark.parametrize(("empty", "value", "n"), [("zero", 0.0, 8), ("one", 1.0, 8), ("skip", 0.0, 7)])
def test_eq20_mean_iou_by_loops(empty, value, n):
    total = 0.0
    for _, _, intersection, union in CASES:
        total += intersection / union if union else value
    summary = summarize(lines_of(case[2:] for case in CASES), empty=empty)
    assert summary["mIoU"] == pytest.approx(100 * total / n, rel=1e-12)
    assert (summary["samples"], summary["empty"], summary["empty_unions"]) == (n, empty, 1)
    assert total == pytest.approx(1 + 1 / 3 + 1 / 7 + 1 / 16 + value)


def test_large_objects_rule_the_overall_iou_and_not_the_mean():
    summary = summarize(lines_of([(90, 100), (0, 1)]))
    assert summary["oIoU"] == pytest.approx(100 * 90 / 101)
    assert summary["mIoU"] == pytest.approx(45)


def test_precision_counts_a_sample_exactly_at_the_threshold():
    pairs = [(k * step, 10 * step) for k in (5, 6, 7, 8, 9) for step in (1, 3, 7, 11, 1001, 104_857)]
    below = [(k * step - 1, 10 * step) for k in (5, 6, 7, 8, 9) for step in (1, 3, 104_857)]
    summary = summarize(lines_of(pairs), bootstrap=0)
    assert [summary[f"Pr@0.{k}"] for k in (5, 6, 7, 8, 9)] == pytest.approx([100, 80, 60, 40, 20], rel=1e-12)
    for (intersection, union), k in zip(below, np.repeat((5, 6, 7, 8, 9), 3), strict=True):
        assert summarize(lines_of([(intersection, union)]), bootstrap=0)[f"Pr@0.{k}"] == 0.0


def test_policies_for_an_empty_union():
    pairs = [(0, 0), (3, 4)]
    found = {empty: summarize(lines_of(pairs), empty=empty) for empty in ("zero", "one", "skip")}
    assert [found[empty]["mIoU"] for empty in found] == [37.5, 87.5, 75.0]
    assert [found[empty]["oIoU"] for empty in found] == [75.0, 75.0, 75.0]
    assert [found[empty]["Pr@0.9"] for empty in found] == [0.0, 50.0, 0.0]
    assert [found[empty]["samples"] for empty in found] == [2, 2, 1]
    assert summarize(lines_of([(1, 1), (0, 1)]))["mIoU"] == 50.0            # the smallest union that is none
    assert summarize(lines_of([(0, 0)]), empty="zero")["oIoU"] == 0.0
    assert summarize(lines_of([(0, 0)]), empty="one")["oIoU"] == 100.0
    assert summarize(lines_of([(0, 0), (0, 0)]), empty="one")["intervals"]["oIoU"] == [100.0, 100.0]


@pytest.mark.parametrize(("lines", "empty", "message"), [
    ([], "zero", "nothing to score: of 0 records"), ([line(0, 0, 0)], "skip", "of 1 records none"),
    ([line(0, 1, 2)], "nan", "zero, one, skip, got 'nan'")])
def test_nothing_to_score_is_said(lines, empty, message):
    with pytest.raises(ValueError, match=message):
        summarize(lines, empty=empty)


def test_images_and_instances_weigh_alike():
    """Image a: instance 1 with IoU 1 and .5, instance 2 with 0; image b: instance 1 with IoU .2."""
    lines = [line(0, 4, 4, image="a", instance="1"), line(1, 2, 4, image="a", instance="1"),
             line(2, 0, 4, image="a", instance="2"), line(3, 1, 5, image="b", instance="1")]
    summary = summarize(lines)
    assert summary["mIoU"] == pytest.approx(42.5)
    assert summary["ImgAcc"] == pytest.approx(100 * (0.5 + 0.2) / 2)
    assert summary["InstAcc"] == pytest.approx(100 * (0.75 + 0 + 0.2) / 3)
    assert summary["images"] == 2


def test_categories_and_their_mean():
    lines = [line(0, 3, 4, category="ship"), line(1, 1, 4, category="ship"), line(3, 0, 10),
             line(2, 9, 10, category="road", source="parsed"), line(4, 0, 0, category="pier")]
    summary = summarize(lines)
    assert summary["categories"] == {"pier": {"n": 1, "oIoU": 0.0, "mIoU": 0.0, "Pr@0.5": 0.0},
                                     "road": {"n": 1, "oIoU": 90.0, "mIoU": 90.0, "Pr@0.5": 100.0},
                                     "ship": {"n": 2, "oIoU": 50.0, "mIoU": 50.0, "Pr@0.5": 50.0}}
    mean = summary["mean_over_categories"]
    assert (mean["categories"], mean["n"], mean["parsed"]) == (3, 4, 1)
    assert (mean["oIoU"], mean["mIoU"], mean["Pr@0.5"]) == pytest.approx((140 / 3, 140 / 3, 50))
    assert summary["mIoU"] == pytest.approx(100 * (0.75 + 0.25 + 0.9) / 5)
    assert summarize(lines, empty="skip")["mean_over_categories"]["mIoU"] == pytest.approx(70)
    assert summarize(lines[2:3])["categories"] == summarize(lines[2:3])["mean_over_categories"] == {}


def test_diagnostics_leave_out_what_is_not_a_number():
    lines = [line(0, 1, 2, spread=0.5, never=None), line(1, 1, 2, spread=math.nan), line(2, 1, 2, spread=None),
             line(3, 0, 0, spread=2.0), line(4, 1, 2)]
    assert summarize(lines)["diagnostics"] == {"spread": {"mean": 1.25, "n": 2}, "never": {"mean": None, "n": 0}}


@pytest.mark.parametrize(("intersection", "mask", "truth", "kind"), [
    (10, 15, 15, "none"), (10, 16, 15, "boundary"),         # IoU 10/20 and 10/21
    (0, 0, 9, "nothing"), (0, 0, 0, "nothing"),
    (9, 91, 40, "wrong"), (9, 90, 46, "boundary"), (10, 100, 40, "spill"), (0, 5, 0, "wrong"),
    (30, 80, 40, "boundary"), (30, 81, 40, "spill"), (4, 4, 40, "boundary"), (0, 1, 40, "wrong")])
def test_failures_by_hand(intersection, mask, truth, kind):
    union = mask + truth - intersection
    assert metrics.failure(intersection / union if union else 0.0, intersection, union, truth) == kind


def test_failures_follow_the_policy_for_an_empty_union():
    merged = {"number": np.array([0]), "intersection": np.array([0]), "union": np.array([0]), "truth": np.array([0])}
    found = {empty: records(samples_of(1), merged, empty)[0]["failure"] for empty in metrics.EMPTY}
    assert found == {"zero": "nothing", "one": "none", "skip": None}


def test_optional_fields_have_rows_of_their_own_and_are_no_diagnostics():
    kinds, failures = ("size", "place", "size", "size"), ("none", "wrong", "wrong", "boundary")
    lines = [line(k, k, 4, kind=kind, failure=failure, truth=4, on_distractor=mistaken)
             for k, (kind, failure, mistaken) in enumerate(zip(kinds, failures, (1.0, None, 0.0, None), strict=True))]
    summary = summarize(lines)
    assert summary["failures"] == {"none": 25.0, "nothing": 0.0, "wrong": 50.0, "spill": 0.0, "boundary": 25.0}
    assert summary["kinds"] == {"place": {"n": 1, "mIoU": 25.0, "on_distractor": None},
                                "size": {"n": 3, "mIoU": pytest.approx(100 * (0 + 0.5 + 0.75) / 3),
                                         "on_distractor": 0.5}}
    assert summary["diagnostics"] == {"on_distractor": {"mean": 0.5, "n": 2}}
    printed = table(summary, {"split": "val", "protocol": "resized", "threshold": "logits > 0"}).splitlines()
    shares = "none 25.00, nothing 0.00, wrong 50.00, spill 0.00, boundary 25.00"
    assert printed[-5:] == [f"failures, % of the samples: {shares}",
                            "kind of sentence              n    mIoU  mask on another object of the category",
                            "place                         1   25.00", "size                          3   41.67  50.0%",
                            "on_distractor 0.5000 (mean over 2 samples)"]
    assert summarize(lines_of([(1, 2)]))["failures"] == summarize(lines_of([(1, 2)]))["kinds"] == {}
    mixed = [line(k, 1, 2, kind=kind) for k, kind in enumerate("fdbhcaegi")]
    assert "".join(summarize(mixed, bootstrap=0)["kinds"]) == "abcdefghi"
    merged = {"number": np.array([0]), "intersection": np.array([3]), "union": np.array([4]), "truth": np.array([4])}
    sample = SimpleNamespace(**{**vars(samples_of(1)[0]), "kind": "nearest"})
    [row] = records([sample], merged)
    assert (row["truth"], row["failure"], row["kind"], row["image"]) == (4, "none", "nearest", "i0")
    one = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="named like a field"):
        Scores().add(one, one, one, failure=torch.zeros(1))


# ------------------------------------------------------------------------------------------------------------ intervals


def resamples(*runs, draws=1000, seed=0):
    """The lines of the runs over as many images as there are, drawn with replacement, each with all its expressions."""
    places = {}
    for place, row in enumerate(runs[0]):
        places.setdefault(row["image"], []).append(place)
    images, rng = list(places.values()), np.random.default_rng(seed)
    for _ in range(draws):
        drawn = [place for image in rng.integers(len(images), size=len(images)) for place in images[image]]
        yield [[run[place] for place in drawn] for run in runs]


def plain_scores(lines, empty):
    intersections, unions = ([row[name] for row in lines] for name in ("intersection", "union"))
    return {"oIoU": 100 * sum(intersections) / sum(unions),
            "mIoU": 100 * np.mean([i / u if u else empty for i, u in zip(intersections, unions, strict=True)])}


@pytest.mark.parametrize(("empty", "value"), [("zero", 0), ("one", 1)])
def test_intervals_are_the_middle_95_percent_of_resampled_images(empty, value):
    a, b = random_lines(40, 15), random_lines(40, 15, seed=1)
    for row in (a[3], a[20], b[3]):
        row |= {"intersection": 0, "union": 0}
    drawn = [[plain_scores(lines, value) for lines in runs] for runs in resamples(a, b)]
    single, paired = summarize(a, empty=empty)["intervals"], compare(a, b, empty=empty)
    for key in ("oIoU", "mIoU"):
        assert single[key] == pytest.approx(np.quantile([of_a[key] for of_a, _ in drawn], (0.025, 0.975)))
        difference = [of_b[key] - of_a[key] for of_a, of_b in drawn]
        assert paired[key]["interval"] == pytest.approx(np.quantile(difference, (0.025, 0.975)))
    fewer = [plain_scores(lines, value)["mIoU"] for lines, in resamples(a, draws=50, seed=7)]
    assert summarize(a, empty, 50, 7)["intervals"]["mIoU"] == pytest.approx(np.quantile(fewer, (0.025, 0.975)))
    assert compare(a, b, empty, 50, 7)["mIoU"]["interval"] == pytest.approx(np.quantile(
        [plain_scores(of_b, value)["mIoU"] - plain_scores(of_a, value)["mIoU"]
         for of_a, of_b in resamples(a, b, draws=50, seed=7)], (0.025, 0.975)))
    assert summarize(a, bootstrap=0)["intervals"] == {}


def test_intervals_draw_the_expressions_of_an_image_together():
    """Ten equal expressions per image are worth as much as one."""
    once = [line(k, 10 + k % 90, 100) for k in range(200)]
    ten = [line(10 * k + j, 10 + k % 90, 100, image=k) for k in range(200) for j in range(10)]
    for key in ("oIoU", "mIoU"):
        assert summarize(ten)["intervals"][key] == pytest.approx(summarize(once)["intervals"][key], rel=1e-9)
        intervals = [compare(lines, [{**row, "intersection": row["intersection"] ** 2 // 100} for row in lines])[key]
                     for lines in (once, ten)]
        assert intervals[1]["interval"] == pytest.approx(intervals[0]["interval"], rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- processes


def test_what_other_processes_counted_is_merged_by_number(monkeypatch):
    """Three processes: this one has samples 2 and 0, another 1 and, for the second time, 2; the third has none."""
    def all_gather_object(places, own):
        assert len(places) == 3
        places[:] = [own, {name: np.array(values) for name, values in other.items()}, {}]

    other = {"number": [2, 1], "intersection": [7, 10], "union": [7, 100], "spread": [0.5, 0.25]}
    monkeypatch.setattr(metrics, "dist", SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 3,
        all_gather_object=all_gather_object))
    scores = Scores()
    scores.add(torch.tensor([2, 0]), torch.tensor([20, 0]), torch.tensor([200, 5]), spread=torch.zeros(2))
    merged = {name: values.tolist() for name, values in scores.merged(expected=3).items()}
    assert merged == {"number": [0, 1, 2], "intersection": [0, 10, 20], "union": [5, 100, 200], "spread": [0, 0.25, 0]}
    assert Scores().merged()["number"].tolist() == [1, 2]               # of a process that had no share


def share(rank, world, n):
    """What a process adds, in batches of 7: rank 0 nearly all, rank 1 five samples (one again), rank 2 nothing."""
    generator = torch.Generator().manual_seed(5)
    union = torch.randint(0, 4, (n,), generator=generator) * torch.randint(1, 900, (n,), generator=generator)
    intersection = (union * torch.rand(n, generator=generator, dtype=torch.float64)).long()
    spread = torch.rand(n, generator=generator)
    order = torch.randperm(n, generator=generator)
    mine = {0: order} if world == 1 else {0: order[:-4], 1: order[-5:], 2: order[:0]}
    scores = Scores()
    for numbers in mine[rank].split(7) if len(mine[rank]) else ():
        scores.add(numbers, intersection[numbers], union[numbers], spread=spread[numbers])
    return scores


def one_process(rank, world, n, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
    lines = records(samples_of(n), share(rank, world, n).merged(expected=n))
    (folder / f"{world}-{rank}.json").write_text(json.dumps([lines, summarize(lines)], allow_nan=False))
    with pytest.raises(ValueError, match="missing or unknown: 1"):
        share(rank, world, n).merged(expected=n + 1)
    dist.destroy_process_group()


def test_any_number_of_processes_gives_the_same_numbers(tmp_path):
    """31 samples: 27, 5 (one of them counted by both) and none, gathered over gloo."""
    n = 31
    lines = records(samples_of(n), share(0, 1, n).merged(expected=n))
    alone = json.loads(json.dumps([lines, summarize(lines)]))
    assert [row["id"] for row in alone[0]] == [f"s{k}" for k in range(n)]
    multiprocessing.set_forkserver_preload(["torch", "numpy", "pytest"])       # imported once, not once per process
    for world in (2, 3):
        mp.start_processes(one_process, args=(world, n, tmp_path), nprocs=world, start_method="forkserver")
        for rank in range(world):
            assert json.loads((tmp_path / f"{world}-{rank}.json").read_text()) == alone


# ------------------------------------------------------------------------------------------- printing and command line


def test_table_says_what_it_scored():
    lines = [line(0, 3, 4, category="ship", spread=0.125, failure="none", kind="size", on_distractor=0.0),
             line(1, 1, 4, category="road", source="parsed", never=None, failure="wrong", kind="place"),
             line(2, 0, 0, image=1, instance="1", failure="wrong", kind="size", on_distractor=1.0)]
    summary = summarize(lines, bootstrap=0)
    summary["intervals"] = {"oIoU": [25.0, 75.0], "mIoU": [20.126, 50.0]}
    fields = {"dataset": "rrsisd", "split": "val", "protocol": "resized", "threshold": "logits > 0", "empty": "zero",
              "subset": "", "control": None}
    assert table(summary, fields).splitlines() == [
        "dataset rrsisd · split val · protocol resized · threshold logits > 0 · samples 3 · "
        "empty union: zero (1 found) · Pr@X: IoU >= X",
        "  Pr@0.5  Pr@0.6  Pr@0.7  Pr@0.8  Pr@0.9  oIoU (cIoU)  mIoU (gIoU)  ImgAcc  InstAcc",
        "   33.33   33.33   33.33    0.00    0.00        50.00        33.33   43.75    33.33",
        "oIoU 95 % interval 25.00 .. 75.00 (bootstrap over 2 images)",
        "mIoU 95 % interval 20.13 .. 50.00 (bootstrap over 2 images)",
        "category                      n    oIoU    mIoU  Pr@0.5",
        "road                          1   25.00   25.00    0.00",
        "ship                          1   75.00   75.00  100.00",
        "mean over 2 categories        2   50.00   50.00   50.00",
        "(1 of 2 categories parsed from the expression)",
        "failures, % of the samples: none 33.33, nothing 0.00, wrong 66.67, spill 0.00, boundary 0.00",
        "kind of sentence              n    mIoU  mask on another object of the category",
        "place                         1   25.00",
        "size                          2   37.50  50.0%",
        "spread 0.1250 (mean over 1 samples)",
        "on_distractor 0.5000 (mean over 2 samples)",
        "never nan (mean over 0 samples)"]
    plain = table(summarize([line(0, 3, 4, category="ship")], bootstrap=0), fields).splitlines()
    assert len(plain) == 6 and plain[5].startswith("mean over 1 categories")        # nothing of what is not there
    for name in ("split", "protocol", "threshold"):
        with pytest.raises(ValueError, match=f"lacks .'{name}'"):
            table(summary, {key: value for key, value in fields.items() if key != name})


def test_rows_hold_a_split_each():
    summaries = {"val": summarize([line(0, 3, 4), line(1, 1, 4)]), "testA": summarize([line(0, 9, 10, image="a")])}
    assert rows(summaries).splitlines() == [
        "split             samples   Pr@0.5   Pr@0.6   Pr@0.7   Pr@0.8   Pr@0.9     oIoU     mIoU   ImgAcc  InstAcc",
        "val                     2    50.00    50.00    50.00     0.00     0.00    50.00    50.00    50.00    50.00",
        "testA                   1   100.00   100.00   100.00   100.00   100.00    90.00    90.00    90.00    90.00"]


def test_runs_of_different_sizes_are_not_compared():
    line = {"id": "a", "image": "a", "expression": "x", "instance": "1", "category": None, "category_source": None,
            "intersection": 1, "union": 2, "iou": 0.5}
    metrics.compare([line | {"truth": 9}], [line | {"truth": 9}], bootstrap=2)
    metrics.compare([line | {"truth": 9}], [line], bootstrap=2)
    with pytest.raises(ValueError, match="sample a has 9 pixels in A, 36 in B: .* score both by one --protocol"):
        metrics.compare([line | {"truth": 9}], [line | {"truth": 36}])


def test_compare_is_paired_by_id():
    a, b = random_lines(400, 200), random_lines(400, 200, shift=0.05)
    result = compare(a, b[::-1])
    for key in ("oIoU", "mIoU"):
        row, (low, high) = result[key], result[key]["interval"]
        assert (row["A"], row["B"]) == (summarize(a)[key], pytest.approx(summarize(b)[key]))
        assert row["difference"] == row["B"] - row["A"]
        assert 0 < low < row["difference"] < high
        own = summarize(a)["intervals"][key]
        assert high - low < (own[1] - own[0]) / 2  # pairing takes out what the images share
        back = compare(b, a)[key]
        assert back["difference"] == pytest.approx(-row["difference"])
        assert back["interval"] == pytest.approx([-high, -low])
    wins = [x["iou"] < y["iou"] for x, y in zip(a, b, strict=True)]
    assert result["wins"]["B"] == pytest.approx(100 * sum(wins) / 400)
    assert sum(result["wins"].values()) == pytest.approx(100)
    assert compare(a, b) == compare(a, b, empty="zero", bootstrap=1000, seed=0)
    assert compare(a, b, seed=1)["mIoU"]["interval"] != compare(a, b)["mIoU"]["interval"]
    same = compare(a, a)
    assert same["wins"] == {"A": 0.0, "B": 0.0, "equal": 100.0} and same["mIoU"]["interval"] == [0.0, 0.0]


def test_compare_by_size_of_the_object_and_length_of_the_sentence():
    a, b = random_lines(90, 30), random_lines(90, 30, shift=0.1)
    for k, row in enumerate(a):
        row["expression"] = " ".join(["word"] * (2 + k % 3))
    old = compare(a, b)["parts"]
    assert list(old) == ["up to 2 words", "3 to 3 words", "above 3 words"]                  # files without `truth`
    for k, row in enumerate(b):
        row["truth"] = 1000 - 7 * k                         # 377 to 1000; thirds of 30 end at 580 and 790
    parts = compare(a, b)["parts"]
    assert list(parts)[3:] == [f"{label} pixels of the object" for label in ("up to 580", "581 to 790", "above 790")]
    for name, members in (("up to 580 pixels of the object", range(60, 90)), ("3 to 3 words", range(1, 90, 3))):
        kept = [[run[k] for k in members] for run in (a, b)]
        whole = compare(*kept)
        assert parts[name] == {"samples": 30, "oIoU": whole["oIoU"], "mIoU": whole["mIoU"]}
    assert list(compare(a[:1], b[:1])["parts"]) == ["up to 2 words", "up to 1000 pixels of the object"]
    assert compare(b, a)["parts"].keys() >= {"up to 580 pixels of the object"}              # of either file


def test_compare_leaves_out_a_sample_that_either_run_leaves_out():
    a, b = lines_of([(0, 0), (1, 2), (3, 4)]), lines_of([(0, 3), (2, 2), (3, 4)])
    assert (compare(a, b, empty="skip")["samples"], compare(a, b, empty="skip")["empty"]) == (2, "skip")
    assert compare(a, b, empty="skip")["wins"] == {"A": 0.0, "B": 50.0, "equal": 50.0}
    assert compare(a, b, empty="one")["wins"] == pytest.approx({"A": 100 / 3, "B": 100 / 3, "equal": 100 / 3})


def test_compare_refuses_other_samples():
    a = lines_of([(1, 2), (3, 4)])
    with pytest.raises(ValueError, match=r"not in both: \['s1'\]"):
        compare(a, a[:1])
    for pair in (([*a, a[0]], a), (a, [*a, a[0]])):
        with pytest.raises(ValueError, match="each once"):
            compare(*pair)
    with pytest.raises(ValueError, match="nothing to score"):
        compare([], [])


def test_command_line_compares_two_files(tmp_path, monkeypatch):
    a, b, broken = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "broken.jsonl"
    lines = random_lines(60, 60)
    lines[0]["expression"] = "a line\u2028break"
    a.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
    b.write_text("".join(json.dumps(row) + "\n" for row in random_lines(60, 60, shift=0.1)))
    assert read_records(a) == lines and summarize(read_records(a)) == summarize(lines)

    done = subprocess.run([sys.executable, metrics.__file__, a, b], capture_output=True, text=True)
    result = compare(read_records(a), read_records(b))
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "60 samples, empty union: zero"
    assert done.stdout.splitlines()[-1].startswith(f"IoU higher in B: {result['wins']['B']:.2f} % of the samples, in A")

    broken.write_text(a.read_text(encoding="utf-8") + '{"id": "s60"}\n', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(a), str(b), "--empty", "none"])
    with pytest.raises(SystemExit, match="2"):
        metrics.main()
    for wrong, message in ((broken, f"{broken}, line 61: expected a record"), (tmp_path / "none.jsonl", "none.jsonl"),
                           (tmp_path, str(tmp_path))):
        monkeypatch.setattr(sys, "argv", ["metrics.py", str(a), str(wrong)])
        with pytest.raises(SystemExit) as stopped:
            metrics.main()
        assert message in stopped.value.code and "\n" not in stopped.value.code


@pytest.mark.parametrize(("options", "samples", "miou"), [((), 4, "37.50   50.00   +12.50  +12.50 .. +12.50"),
                                                          (("--empty", "skip"), 3,
                                                           "50.00   66.67   +16.67  +16.67 .. +16.67")])
def test_command_line_prints_the_comparison(options, samples, miou, tmp_path, monkeypatch, capsys):
    """All sentences on one image, so that each resample is that image and the interval the difference itself."""
    for name, pairs in (("a", [(1, 4), (2, 4), (6, 8), (0, 0)]), ("b", [(2, 4), (2, 4), (8, 8), (0, 0)])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in lines_of(pairs, image="i", truth=4)))
    monkeypatch.setattr(sys, "argv", ["metrics.py", str(tmp_path / "a"), str(tmp_path / "b"), *options])
    metrics.main()
    equal = 100 * (samples - 2) / samples
    assert capsys.readouterr().out.splitlines() == [
        f"{samples} samples, empty union: {options[-1] if options else 'zero'}",
        "           A       B    B - A  95 % interval",
        "oIoU   56.25   75.00   +18.75  +18.75 .. +18.75",
        f"mIoU   {miou}",
        f"mIoU   {miou}   {samples} samples, up to 2 words",
        f"mIoU   {miou}   {samples} samples, up to 4 pixels of the object",
        f"IoU higher in B: {100 - equal:.2f} % of the samples, in A: 0.00 %, equal: {equal:.2f} %"]


def test_a_run_stands_for_its_test_split(tmp_path):
    lines, other = lines_of([(1, 2)]), lines_of([(1, 3)])
    for name, content in (("run/test", lines), ("run/val", other), ("second/testA", lines), ("second/testB", other)):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "per_sample.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    assert read_records(tmp_path / "run") == read_records(tmp_path / "run/test") == lines
    assert read_records(tmp_path / "run/val") == other
    for name in "fdbhcaegi":
        (tmp_path / "third" / name).mkdir(parents=True)
        (tmp_path / "third" / name / "per_sample.jsonl").touch()
    with pytest.raises(FileNotFoundError, match=", ".join(f"\\S*third/{name}" for name in "abcdefghi")):
        read_records(tmp_path / "third")
    with pytest.raises(FileNotFoundError, match="there are: .*second/testA, .*second/testB"):
        read_records(tmp_path / "second")
    with pytest.raises(FileNotFoundError, match="there are: no scores"):
        read_records(tmp_path)


@pytest.mark.parametrize("text", ["not json", "3", '["id"]', '{"id": "s0", "union": 3}', "", "\x00\xff"])
def test_a_file_that_is_no_list_of_records_is_named(tmp_path, text):
    (tmp_path / "lines.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 1: expected a record"):
        read_records(tmp_path / "lines.jsonl")
