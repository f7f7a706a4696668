"""evaluate.py: scoring, the control, pictures, own images. On the toy paper, trained for two short epochs."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import layouts
import numpy as np
import pytest
import torch
import toy
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

import data
import evaluate
import metrics
import models
import train

ROOT = Path(__file__).resolve().parent.parent
ONE = evaluate.Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    toy.register()
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train.train(train.arguments(["--model", "toy", "--device", "cpu", "--workers", "0", "--limit", "40", "--output",
                                 str(folder)]), ONE)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    image, _ = data.render(data.scene(7))
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(image).resize((131, 77)).save(path)
    return path


def score(run, output, *words):
    evaluate.main(evaluate.arguments(["--checkpoint", str(run), "--device", "cpu", "--workers", "0", "--limit", "24",
                                      "--output", str(output), *words]))


# --------------------------------------------------------------------------------------------------------- scoring


def test_logits_are_resized_bilinearly_without_aligned_corners():
    logits = torch.tensor([[[[0.0, 4.0]]]])
    assert evaluate.upsampled(logits, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_counts_at_the_square_and_at_each_mask_own_size():
    logits = torch.tensor([[[[1.0, -1.0], [-1.0, -1.0]]], [[[-1.0, -1.0], [-1.0, 0.0]]]])       # zero is background
    masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 1]]]).bool()
    samples = [SimpleNamespace(id=f"s{k}", image=Path("a.png")) for k in range(2)]
    found = evaluate.counts({"logits": logits}, {"masks": masks, "samples": samples})
    assert {name: values.tolist() for name, values in found.items()} == {
        "intersection": [1, 0], "union": [2, 1], "truth": [2, 1]}
    own = [torch.ones(4, 4, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)]
    found = evaluate.counts({"logits": logits}, {"masks": masks, "original_masks": own, "samples": samples})
    inside = (evaluate.upsampled(logits[:1], (4, 4)) > 0).sum().item()
    assert 0 < inside < 16
    assert {name: values.tolist() for name, values in found.items()} == {
        "intersection": [inside, 0], "union": [16, 0], "truth": [16, 0]}


def test_packing_cuts_at_image_borders_only():
    images = [(0, 1, 2), (3,), (4, 5), (6, 7, 8, 9, 10), (11,)]
    assert evaluate.packed(images, 4) == [[(0, 1, 2), (3,)], [(4, 5)], [(6, 7, 8, 9, 10)], [(11,)]]
    assert evaluate.packed([], 4) == []


def test_control_gives_every_image_sentences_of_one_other():
    samples = data.read("synthetic", "", "val", limit=60)
    control = evaluate.shuffled(samples)
    origin = {}
    for sample in samples:
        origin.setdefault(sample.expression, set()).add(sample.image_id)
    donors = {}
    for before, after in zip(samples, control, strict=True):
        assert (before.id, before.mask, before.image_id) == (after.id, after.mask, after.image_id)
        there = origin[after.expression] - {after.image_id}
        assert there
        donors[before.image_id] = donors.get(before.image_id, there) & there
    assert all(donors.values())
    assert evaluate.shuffled(samples) == control
    with pytest.raises(ValueError, match="at least two images"):
        evaluate.shuffled([sample for sample in samples if sample.image_id == samples[0].image_id])


def test_scores_do_not_depend_on_how_the_samples_are_batched(run):
    model = models.load(run)
    samples = data.read("synthetic", "", "val", limit=24)
    settings = {"tokenizer": model.tokenizer, "protocol": "resized", "workers": 0}
    lines = evaluate.evaluate(model, samples, ONE, micro_batch=3, **settings)
    again = evaluate.evaluate(model, samples, ONE, micro_batch=24, **settings)
    assert [(line["id"], line["intersection"], line["union"]) for line in lines] == \
        [(line["id"], line["intersection"], line["union"]) for line in again]
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    assert all(0 <= line["brightness"] <= 1 for line in lines)


def test_rows_of_the_sheet():
    kinds = ["none", "wrong", "spill", "wrong", "none", "nothing"]
    lines = [{"id": f"s{k}", "iou": iou, "failure": kind}
             for k, (iou, kind) in enumerate(zip((0.7, 0.1, 0.3, None, 0.5, 0.0), kinds, strict=True))]
    assert evaluate.chosen(24 * lines[:1], "", 5) == [0, 6, 12, 17, 23]         # k * 23 / 4, rounded
    assert evaluate.chosen(lines[:5], "") == [0, 1, 2, 3, 4]
    assert evaluate.chosen(lines[:1], "") == [0]
    assert evaluate.chosen(lines, "first", 3) == [0, 1, 2]
    assert evaluate.chosen(lines, "worst", 3) == [5, 1, 2]
    assert evaluate.chosen(lines, "best") == [0, 4, 2, 1, 5]
    assert evaluate.chosen(lines, "wrong") == [1, 3]
    assert evaluate.chosen(lines, "boundary") == []
    assert evaluate.chosen(lines, "s5,s0") == [5, 0]
    assert len(evaluate.chosen(24 * lines, "first")) == len(evaluate.chosen(24 * lines, "")) == 10


@pytest.mark.parametrize("protocol, side", [("resized", 32), ("original", 96)])
def test_a_scored_split_can_be_recomputed_from_its_files(run, tmp_path, capsys, protocol, side):
    score(run, tmp_path, "--protocol", protocol, "--split", "val,test", "--save-masks")
    assert f"protocol {protocol}" in capsys.readouterr().out
    for split in ("val", "test"):
        folder = tmp_path / f"{split}{'-protocol=original' * (protocol == 'original')}-limit=24"
        lines = metrics.read_records(folder / "per_sample.jsonl")
        written = json.loads((folder / "metrics.json").read_text())
        assert (written["split"], written["protocol"], written["samples"]) == (split, protocol, len(lines))
        assert written["mIoU"] == pytest.approx(100 * np.mean([line["iou"] for line in lines]))
        assert written["oIoU"] == pytest.approx(
            100 * sum(line["intersection"] for line in lines) / sum(line["union"] for line in lines))
        samples = {sample.id: sample for sample in data.read("synthetic", "", split, limit=24)}
        for line in lines[:8]:
            mask = Image.open(folder / "masks" / f"{line['id']}.png")
            prediction = np.array(mask)
            assert mask.size == (side, side) and set(np.unique(prediction)) <= {0, 255}
            if protocol == "original":
                truth = data.read_mask(samples[line["id"]], (96, 96))
                assert line["intersection"] == ((prediction > 0) & truth).sum()
                assert line["union"] == ((prediction > 0) | truth).sum()
        assert Image.open(folder / "sheet.png").height > 1000


def test_control_is_written_beside_the_split(run, tmp_path):
    score(run, tmp_path, "--control", "shuffled")
    assert json.loads((tmp_path / "test-shuffled-limit=24/metrics.json").read_text())["split"] == "test-shuffled"
    assert [path.name for path in tmp_path.iterdir()] == ["test-shuffled-limit=24"]


def test_what_differs_from_the_run_is_written_down_and_overwrites_no_score_of_its_own(run, tmp_path, capsys):
    for settings in ((), ("--set", "explode_at=3", "--set", "dropout=0.2"),
                     ("--protocol", "resized", "--set", "pretrained=none")):
        score(run, tmp_path, *settings)
    assert "changes explode_at=3, dropout=0.2, limit=24 · precision fp32" in capsys.readouterr().out
    folders = {path.name: json.loads((path / "metrics.json").read_text()) for path in tmp_path.iterdir()}
    assert {name: written["changes"] for name, written in folders.items()} == {
        "test-limit=24": "limit=24", "test-explode_at=3-dropout=0.2-limit=24": "explode_at=3, dropout=0.2, limit=24"}


def test_several_splits_end_in_a_row_each(run, tmp_path, capsys):
    score(run, tmp_path, "--split", "val,test")
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert printed[0].split() == ["split", "samples", *(f"Pr@0.{k}" for k in range(5, 10)), "oIoU", "mIoU", "ImgAcc",
                                  "InstAcc"]
    for line, split in zip(printed[1:], ("val", "test"), strict=True):
        scores = json.loads((tmp_path / f"{split}-limit=24" / "metrics.json").read_text())
        names = printed[0].split()[1:]
        assert line.split() == [split, *(format(scores[name], "d" if name == "samples" else ".2f") for name in names)]


def test_categories_and_other_data_sets_have_folders_of_their_own(run, tmp_path, capsys):
    """Table 2 of Prompt-RIS: seen and unseen by themselves, testA and testB as one."""
    layouts.write("refcoco", tmp_path / "data", scenes=2)
    words = ("--dataset", "refcoco", "--data-root", str(tmp_path / "data"))
    for categories in ("seen", "unseen"):
        score(run, tmp_path / "out", *words, "--split", "testA+testB", "--categories", categories, "--limit", "99")
    parts = {}
    for categories in ("seen", "unseen"):
        folder = tmp_path / "out" / f"refcoco-testA+testB-{categories}-limit=99"
        lines = metrics.read_records(folder / "per_sample.jsonl")
        assert {line["category"] for line in lines} <= data.CATEGORIES[categories]
        written = json.loads((folder / "metrics.json").read_text())
        assert (written["split"], written["samples"]) == (f"testA+testB-{categories}", len(lines))
        parts[categories] = {line["id"] for line in lines}
    every = [one for split in ("testA", "testB") for one in data.read("refcoco", tmp_path / "data", split)]
    named = data.CATEGORIES["seen"] | data.CATEGORIES["unseen"]
    assert parts["seen"] | parts["unseen"] == {one.id for one in every if one.category in named}
    assert not parts["seen"] & parts["unseen"] and all(parts.values())


def test_the_empty_policy_reaches_the_records(run, tmp_path, monkeypatch):
    nothing = torch.zeros((), dtype=torch.long)
    monkeypatch.setattr(evaluate, "count", lambda *_: {"intersection": nothing, "union": nothing, "truth": nothing})
    for policy, value in (("zero", 0.0), ("one", 1.0)):
        score(run, tmp_path / policy, "--empty", policy)
        folder = tmp_path / policy / f"test{'-empty=one' * (policy == 'one')}-limit=24"
        assert {line["iou"] for line in metrics.read_records(folder)} == {value}
        assert json.loads((folder / "metrics.json").read_text())["mIoU"] == 100 * value


@pytest.mark.parametrize("words, message", [
    (["--split", "testA"], "testA"), (["--set", "width=9"], "does not fit this configuration"),
    (["--set", "protocol=squared"], "protocol=squared: there are resized, original"),
    (["--dataset", "rrsisd", "--data-root", "nowhere"], "nowhere")])
def test_wrong_input_is_named(run, tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        score(run, tmp_path, *words)


def test_a_corrupt_image_ends_in_one_line_that_names_it(run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import toy; toy.register(); import evaluate\n" \
             "with evaluate.one_line_errors(): evaluate.main(evaluate.arguments())"
    command = [sys.executable, "-c", script, "--checkpoint", run, "--image", broken, "--text", "a ship"]
    done = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "broken.png" in done.stderr


def test_an_error_in_a_loader_worker_arrives_as_one_line(capsys):
    class Broken:
        def __getitem__(self, numbers):
            raise ValueError("images/3.png is truncated; copy it again")

    with pytest.raises(SystemExit), evaluate.one_line_errors():
        list(evaluate.batches(Broken(), [[(0,)]], workers=1, device=ONE.device))
    assert capsys.readouterr().err == "error: images/3.png is truncated; copy it again\n"


def test_a_fault_of_a_library_keeps_its_traceback():
    with pytest.raises(ValueError), evaluate.one_line_errors():
        np.zeros(3).reshape(2, 2)


# ------------------------------------------------------------------------------------------------------- own images


def test_predict_gives_masks_and_maps_at_the_image_own_size(run, photo, tmp_path):
    model = models.load(run)
    result = evaluate.predict(model, photo, ["the red ship", "the windmill"])
    assert result["masks"].shape == result["probs"].shape == result["coarse"].shape == (2, 77, 131)
    assert result["masks"].dtype == bool and ((result["probs"] > 0.5) == result["masks"]).all()
    one = evaluate.predict(model, Image.open(photo), "the  red ship ")
    array = evaluate.predict(model, np.array(Image.open(photo)), ["the red ship"])
    np.testing.assert_allclose(one["probs"][0], result["probs"][0], atol=1e-6)
    np.testing.assert_allclose(array["probs"][0], result["probs"][0], atol=1e-6)
    gray = np.array(Image.open(photo).convert("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 256)            # stretched as from a file, not cut off at 255
    deep.save(tmp_path / "deep.png")
    np.testing.assert_array_equal(evaluate.predict(model, deep, "a ship")["probs"],
                                  evaluate.predict(model, tmp_path / "deep.png", "a ship")["probs"])
    for wrong in (gray, np.array(deep), np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(ValueError, match=r"expected a uint8 array \(H,W,3\), got"):
            evaluate.predict(model, wrong, "a ship")
    for empty in ([], "", ["a ship", " "]):
        with pytest.raises(ValueError, match="expression is empty"):
            evaluate.predict(model, photo, empty)


def test_several_images_and_sentences_in_one_call(run, photo, tmp_path, capsys):
    second = tmp_path / "photo.jpg"                                 # the same stem as the first
    Image.open(photo).convert("L").save(second)
    score(run, tmp_path / "out", "--image", str(photo), str(second), "--text", "the red ship", "the windmill")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {f"photo-{name}-{i}-{kind}.png" for name in ("png1", "jpg2") for i in (1, 2)
                     for kind in ("mask", "overlay", "coarse")}
    assert all(Image.open(tmp_path / "out" / name).size == (131, 77) for name in there)
    mask = np.array(Image.open(tmp_path / "out/photo-png1-2-mask.png"))
    assert (mask == 255 * evaluate.predict(models.load(run), photo, "the windmill")["masks"][0]).all()
    with pytest.raises(FileNotFoundError, match="no such file.*missing.png"):
        score(run, tmp_path / "none", "--image", str(photo), "missing.png", "--text", "a ship")
    assert not (tmp_path / "none").exists()


def test_the_mask_of_a_georeferenced_tiff_lands_where_the_image_does(run, photo, tmp_path):
    tags = ImageFileDirectory_v2()
    tags.tagtype |= {33550: 12, 33922: 12, 34735: 3, 34736: 12, 34737: 2}
    values = {33550: (0.5, 0.5, 0.0), 33922: (0.0, 0.0, 0.0, 354000.0, 5812000.0, 0.0),
              34735: (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), 34736: (6378137.0, 298.257223563),
              34737: "WGS 84 / UTM zone 33N|"}
    for tag, value in values.items():
        tags[tag] = value
    source = tmp_path / "aerial.tif"
    Image.open(photo).save(source, tiffinfo=tags)
    score(run, tmp_path / "out", "--image", str(source), "--text", "the red ship")
    with Image.open(source) as image, Image.open(tmp_path / "out/aerial-mask.tif") as mask:
        assert mask.size == image.size and mask.mode == "L"
        for tag in values:
            assert mask.tag_v2[tag] == image.tag_v2[tag], tag
            assert mask.tag_v2.tagtype[tag] == image.tag_v2.tagtype[tag], tag
    Image.open(photo).save(tmp_path / "plain.tif")
    score(run, tmp_path / "out", "--image", str(tmp_path / "plain.tif"), "--text", "the red ship")
    assert (tmp_path / "out/plain-mask.png").is_file()
