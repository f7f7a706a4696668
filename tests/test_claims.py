"""claims.py: one run of the toy from command to table, and the table's arithmetic on numbers worked out by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import toy

import claims
import data
import metrics
import models
import train

TINY = ["--model", "toy", "--rows", "1/wide", "1/slow", "--seeds", "1", "--epochs", "1", "--limit", "24"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The file of results and the scratch folders lie in tmp_path; the toy is a paper whose train.py is toy.py."""
    monkeypatch.setitem(sys.modules, "models.toy", toy)
    monkeypatch.setitem(models.PAPERS, "toy", "Toy")
    monkeypatch.setitem(claims.MAIN, "toy", ("1", 3))
    monkeypatch.setattr(claims, "COMMAND", (sys.executable, toy.__file__))
    monkeypatch.setattr(claims, "FILE", tmp_path / "claims.jsonl")
    monkeypatch.setattr(claims.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def scored(pairs, **fields):
    """A line of intersections and unions of samples; the picture of each is the third number."""
    lines = [{"image": image, "intersection": intersection, "union": union} for intersection, union, image in pairs]
    ious = [100 * intersection / union for intersection, union, _ in pairs]
    return {"mIoU": float(np.mean(ious)), "oIoU": 60.0, "control": 10.0, "counts": claims.packed(lines), **fields}


def test_a_run_is_trained_kept_and_not_repeated(place, monkeypatch, capsys):
    claims.main([*TINY, "--jobs", "2"])
    printed = capsys.readouterr().out
    lines = {line["row"]: line for line in map(json.loads, claims.FILE.read_text().splitlines())}
    assert sorted(lines) == ["1/slow", "1/wide"] and [file.name for file in place.iterdir()] == ["claims.jsonl"]
    for line in lines.values():
        pictures, intersections, unions = claims.unpacked(line)
        assert len(pictures) == 24 and pictures.max() == 1                  # 12 sentences of each picture
        assert line["mIoU"] == pytest.approx(100 * np.mean(intersections / unions))
        assert line["oIoU"] == pytest.approx(100 * intersections.sum() / unions.sum())
        assert (line["model"], line["seed"], line["limit"]) == ("toy", 0, 24) and line["seconds"] > 0
        assert (line["recipe"]["epochs"], line["recipe"]["per_image"]) == (1, 2)
        assert line["diagnostics"].keys() == {"brightness", "on_distractor"} and 0 <= line["control"] <= 100
    assert lines["1/wide"]["config"]["width"] == 12 and lines["1/slow"]["recipe"]["lr"] == 1e-4
    words = claims.command(claims.arguments(TINY), "1/slow", 0)             # the plain command, here, with workers
    train.train(train.arguments([*words, "--output", str(place / "run")]), train.start_processes("cpu"))
    for split, name in (("test", "mIoU"), ("test-shuffled", "control")):
        assert json.loads((place / "run" / split / "metrics.json").read_text())["mIoU"] == lines["1/slow"][name]
    capsys.readouterr()

    monkeypatch.setattr(claims, "COMMAND", ("false",))
    claims.main(TINY)
    assert capsys.readouterr().out == printed
    claims.main([*TINY, "--epochs", "2", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == ("python train.py --model toy --dataset synthetic --preset tiny --ablation 1/wide --seed 0 "
                         "--epochs 2 --precision fp32 --limit 24")
    assert [row.split()[:3] for row in listed[-2:]] == [["1/wide", "not", "run"], ["1/slow", "not", "run"]]
    with pytest.raises(ValueError, match=r"^1/wide, seed 1: train.py ended with 1: $"):
        claims.main([*TINY, "--seeds", "2"])
    assert len(claims.kept()) == 2


def test_a_line_stays_small(monkeypatch):
    """The test split of 1,440 samples with counts like those of a trained model, all of them different."""
    monkeypatch.setattr(claims, "scenes", lambda limit: 12 * "0")
    rng, samples = np.random.default_rng(0), data.read("synthetic", "", "test")
    truth = rng.integers(20, 1500, len(samples))
    shares = rng.beta(0.6, 0.6, len(samples))
    records = [{"image": sample.picture, "intersection": int(area * share), "union": int(area * (2 - share))}
               for sample, area, share in zip(samples, truth, shares, strict=True)]
    given = [claims.arguments(["--model", name]) for name in claims.MAIN]
    longest = max(len(json.dumps(claims.protocol(args, args.rows[0]))) for args in given)
    assert len(claims.packed(records)) + longest < 9500
    pictures, intersections, unions = claims.unpacked({"counts": claims.packed(records)})
    assert pictures.tolist() == [k // 12 for k in range(1440)]
    assert intersections.tolist() == [record["intersection"] for record in records]
    assert unions.tolist() == [record["union"] for record in records]


def test_one_seed_is_the_paired_comparison_of_metrics():
    rng = np.random.default_rng(3)
    pairs = [[(int(k), 100, place // 4) for place, k in enumerate(rng.integers(20, 80, 60))] for _ in range(2)]
    records = [[{"id": str(place), "image": image, "expression": "x", "intersection": intersection, "union": union}
                for place, (intersection, union, image) in enumerate(one)] for one in pairs]
    n, mean, low, high = claims.difference({5: scored(pairs[0])}, {5: scored(pairs[1]), 6: scored(pairs[0])})
    expected = metrics.compare(*records, bootstrap=claims.DRAWS)["mIoU"]
    assert (n, mean) == (1, pytest.approx(expected["difference"]))
    assert [low, high] == pytest.approx(expected["interval"])


def test_seeds_widen_the_interval_by_students_t():
    """One picture, whose bootstrap adds nothing, and gains of 10, 20, 60 points: t(0.975) of two degrees is 4.303."""
    before = {seed: scored([(10, 100, 0)]) for seed in range(3)}
    after = {seed: scored([(10 + gain, 100, 0)]) for seed, gain in enumerate((10, 20, 60))}
    n, mean, low, high = claims.difference(before, after)
    assert (n, mean) == (3, pytest.approx(30))
    half = 4.303 * np.sqrt((20 ** 2 + 10 ** 2 + 30 ** 2) / 2 / 3)
    assert [mean - low, high - mean] == pytest.approx([half, half], rel=0.08)
    alike = {seed: scored([(15, 100, 0)]) for seed in range(3)}
    assert claims.difference(before, alike)[2:] == pytest.approx((5, 5))


def test_the_table_by_hand():
    """Two sentences of one picture; the gain is the same in both seeds, so that its interval is itself."""
    args = claims.arguments(["--model", "crobim_u", "--seeds", "2", "--epochs", "7", "--set", "width=24"])
    rows = {"V/Base": {0: scored([(1, 4, 0), (2, 4, 0)]), 1: scored([(2, 4, 0), (2, 4, 0)], oIoU=61.0, control=None)},
            "V/+UGF": {1: scored([(2, 4, 0), (3, 4, 0)]), 0: scored([(1, 4, 0), (3, 4, 0)])},
            "V/+UDLR": {},
            "V/RUS only": {0: scored([(1, 4, 0), (3, 4, 0)], control=None)},
            "V/Full": {0: scored([(0, 4, 0), (3, 4, 0)], device="a card")}}
    printed = claims.table(args, rows).splitlines()
    assert [" ".join(row.split()) for row in printed] == [
        "crobim_u, tiny preset on synthetic scenes, 7 epochs, test split, width=24, a card, cpu",
        "row mIoU oIoU control of each seed less the row before (95 %) the paper",
        "V/Base 43.75 60.50 10.00 37.50 50.00 mIoU 69.33, Pr@0.9 34.07",
        "V/+UGF 56.25 60.00 10.00 50.00 62.50 +12.50 +12.50 .. +12.50, 2 seeds mIoU 69.44, Pr@0.9 34.45",
        "V/+UDLR not run not run not run mIoU 69.53, Pr@0.9 35.10",
        "V/RUS only 50.00 60.00 none 50.00",
        "V/Full 37.50 60.00 10.00 37.50 -12.50 -12.50 .. -12.50, 1 seed mIoU 69.62, Pr@0.9 35.52"]
    assert {row.find("mIoU 6") for row in (*printed[2:5], printed[6])} == {printed[1].index("the paper")}
    assert {row[:37].rfind(".") for row in (*printed[2:4], printed[6])} == {printed[1].index("control") + 4}


def test_a_kept_run_counts_if_settings_and_scenes_are_the_same():
    wanted = claims.protocol(claims.arguments(TINY), "1/wide")
    line = json.loads(json.dumps({"model": "toy", "seed": 0, **wanted}))
    assert claims.is_of(line, wanted, "toy")
    assert claims.is_of({**line, "config": {**line["config"], "depth": 2}}, wanted, "toy")      # gone, as it always was
    for other in ({"scenes": "another"}, {"limit": 0}, {"model": "crobim_u"}, {"recipe": {**line["recipe"], "lr": 1.0}},
                  {"config": {**line["config"], "width": 8}}, {"config": {**line["config"], "unheard": 1}},
                  {"config": {name: one for name, one in line["config"].items() if name != "dropout"}}):
        assert not claims.is_of(line | other, wanted, "toy")                            # the last: 0.3 in those days


def test_the_name_of_the_scenes_changes_with_a_sentence_a_pixel_and_a_mask(monkeypatch):
    name, read, render = claims.scenes.__wrapped__, data.read, data.render
    before = name(12)
    assert before == name(12) != name(24)

    def other_picture(scene):
        picture, masks = render(scene)
        return 255 - picture, masks

    def other_mask(scene):
        picture, masks = render(scene)
        return picture, [~masks[0], *masks[1:]]

    names = {before}
    for changed in (other_picture, other_mask):
        monkeypatch.setattr(data, "render", changed)
        names.add(name(12))
    monkeypatch.setattr(data, "render", render)
    monkeypatch.setattr(data, "read", lambda *args, **options: [
        data.replace(sample, expression=sample.expression + "!") for sample in read(*args, **options)])
    assert len(names | {name(12)}) == 4


def test_rows_of_one_setting_are_one_run(capsys):
    """RS2-SAM 2's Table 4 names its whole model three times."""
    claims.main(["--model", "rs2sam2", "--rows", "4/Bi", "4/w BC&BL", "4/w/o BC", "--seeds", "1", "--epochs", "1",
                 "--list"])
    listed = [row for row in capsys.readouterr().out.splitlines() if row.startswith("python")]
    assert len(listed) == 2 and "--ablation 4/Bi " in listed[0] and "--ablation '4/w/o BC' " in listed[1]


@pytest.mark.parametrize("name", claims.MAIN)
def test_the_main_rows_have_the_papers_figures(name):
    args = claims.arguments(["--model", name])
    rows = [row.partition("/")[2] for row in args.rows]
    assert rows == {"crobim_u": ["Base", "+UGF", "+UDLR", "Full"], "icipnet": ["Base", "+ICIP", "+BIF", "Full"],
                    "rsrefseg2": ["single-stage", "cascaded", "cascaded+dense"],
                    "rs2sam2": ["MPG w/o MHCA", "MPG w MHCA", "Linear", "Uni", "Bi", "w/o BC", "w/o BL", "w BC&BL"],
                    "prompt_ris": ["CLIP", "CLIP+CMP", "CLIP+CMP+ICL", "CLIP+CMP+SAM", "CLIP+CMP+ICL+SAM"],
                    "toy": ["wide"]}[name]
    assert args.seeds == 3 and args.epochs == claims.MAIN[name][1]


def test_wrong_input_is_one_line(place):
    for words, message in ((["--rows", "V/none"], r"--rows V/none: toy has no such row; there are 1/wide, 1/slow"),
                           (["--rows", "2/dry"], "2/dry: no training of its own"), (["--set", "depht=1"], "depht")):
        with pytest.raises(ValueError, match=message) as raised:
            claims.main([*TINY, *words])
        assert "\n" not in str(raised.value)
    claims.FILE.write_text('{"model": "toy", "row"')
    with pytest.raises(ValueError, match=r"claims\.jsonl, line 1: no JSON; delete it"):
        claims.main(TINY)


def test_what_train_says_last_is_passed_on(monkeypatch):
    monkeypatch.setattr(claims, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('bar\\rerror: no room')"))
    with pytest.raises(ValueError, match=r"^1/slow, seed 0: train.py ended with 1: error: no room$"):
        claims.main([*TINY, "--rows", "1/slow"])
    assert not Path(claims.FILE).exists()
