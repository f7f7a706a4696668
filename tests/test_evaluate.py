"""evaluate.py: scoring, the control, pictures, own images. On the toy paper, trained for two short epochs."""

import dataclasses
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import layouts
import numpy as np
import pytest
import torch
import toy
from PIL import Image, ImageFilter, ImageFont
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


def test_logits_come_at_the_model_own_size_unless_its_paper_enlarges_twice():
    class Half(torch.nn.Module):
        config = SimpleNamespace()

        def forward(self, images, *_):
            logits = torch.arange(4.0, dtype=torch.bfloat16).view(1, 1, 2, 2)
            return {"logits": logits, "image_index": torch.zeros(1, dtype=torch.long)}

    batch = {"images": torch.zeros(1, 3, 8, 8)} | dict.fromkeys(("tokens", "text_mask", "image_index"))
    outputs, _ = evaluate.forward(Half(), batch, ONE.device, "fp32")
    assert outputs["logits"].flatten().tolist() == [0, 1, 2, 3] and outputs["logits"].dtype == torch.float32
    assert outputs["image_index"].dtype == torch.int64
    Half.config = SimpleNamespace(enlarge_twice=True)
    enlarged = evaluate.forward(Half(), batch, ONE.device, "fp32")[0]["logits"]
    assert torch.equal(enlarged, evaluate.upsampled(outputs["logits"], (8, 8)))


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


def sample_of(number, picture, expression, **fields):
    return data.Sample(f"s{number}", Path(f"{number}.png"), Path(f"{number}m.png"), expression, "test", f"{number}.png",
                       f"o{number}", None, None, picture=picture, **fields)


def test_control_never_gives_a_picture_its_own_sentence():
    """One picture stands under two names; sentences differ by more than case and stops; 'c' holds all there are."""
    said = [("a", "The red ship."), ("a", "the tank"), ("b", "the red ship"), ("b", "a pier"), ("c", "the red SHIP"),
            ("c", "the tank"), ("c", "a pier")]
    samples = [sample_of(number, picture, text, kind="place") for number, (picture, text) in enumerate(said)]
    for seed in range(5):
        control = evaluate.shuffled(samples, seed)
        assert {sample.id: sample.expression for sample in control} == {
            "s0": "a pier", "s1": "a pier", "s2": "the tank", "s3": "the tank"}
        assert all(sample.kind is None for sample in control)
    alike = [sample_of(number, f"p{number}", "the red building") for number in range(12)]
    for hopeless in (alike, samples[:2]):
        with pytest.raises(ValueError, match="at least two images, one with a sentence that the other lacks"):
            evaluate.shuffled(hopeless)


def test_control_takes_the_sentences_of_the_next_picture_in_turn():
    samples = [sample_of(10 * k + j, f"p{k}", f"object {j} of picture {k}") for k in range(4) for j in range(1 + k)]
    order = [f"p{k}" for k in np.random.default_rng(3).permutation(4)]
    after = dict(zip(order, order[1:] + order[:1], strict=True))
    for sample in evaluate.shuffled(samples, seed=3):
        k, j = divmod(int(sample.id[1:]), 10)
        donor = int(after[f"p{k}"][1:])
        assert sample.expression == f"object {j % (1 + donor)} of picture {donor}"


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


def test_other_weights_and_other_data_have_folders_of_their_own(tmp_path, monkeypatch):
    toy.register()
    layouts.write("rrsisd", tmp_path / "data", scenes=2)
    layouts.write("rrsisd", tmp_path / "other", scenes=3)
    monkeypatch.chdir(tmp_path)
    run, own = tmp_path / "run", ["--dataset", "rrsisd", "--data-root"]
    train.train(train.arguments(["--model", "toy", "--device", "cpu", "--workers", "0", *own, "data", "--output",
                                 str(run), "--epochs", "1"]), ONE)

    def scored(*words):
        there = {path: path.stat().st_mtime_ns for path in run.glob("*/metrics.json")}
        evaluate.main(evaluate.arguments(["--device", "cpu", "--workers", "0", "--checkpoint", *map(str, words)]))
        return [path.parent.name for path in run.glob("*/metrics.json") if there.get(path) != path.stat().st_mtime_ns]

    assert scored(run) == scored(run / "best.safetensors") == ["test"]
    assert scored(run, "--data-root", tmp_path / "data") == ["test"]                    # the same by another name
    assert scored(run / "last.safetensors") == ["test-checkpoint=last"]
    assert scored(run, "--data-root", "other") == [evaluate.in_file_name(f"test-data_root={tmp_path / 'other'}")]


def test_scores_of_another_folder_of_the_same_data_set_are_not_written_over(run, tmp_path, monkeypatch):
    """By a model that was trained on other data, and by masks of others: one name of folder for two roots."""
    monkeypatch.chdir(tmp_path)
    for name, scenes in (("data", 1), ("other", 2)):
        layouts.write("rrsisd", tmp_path / name, scenes=scenes)
    masks = tmp_path / "masks"
    masks.mkdir()
    for sample in data.read("rrsisd", "other", "test"):
        Image.fromarray(data.load([sample])[1][0]).convert("L").save(masks / f"{sample.id}.png")
    words = ["--dataset", "rrsisd", "--limit", "4", "--output", "out", "--data-root"]
    for begin, name in ((["--checkpoint", str(run), "--device", "cpu", "--workers", "0"], "rrsisd-test-limit=4"),
                        (["--predictions", str(masks)], "test")):
        for root in ("other", str(tmp_path / "other")):                                 # one place by two names
            evaluate.main(evaluate.arguments([*begin, *words, root]))
            written = json.loads(Path("out", name, "metrics.json").read_text())
            assert (written["dataset"], written["data_root"]) == ("rrsisd", root)
        before = {path: path.read_bytes() for path in Path("out", name).iterdir()}
        with pytest.raises(ValueError, match=f"out/{name} holds the scores of the data in .*other, not data: give "):
            evaluate.main(evaluate.arguments([*begin, *words, "data"]))
        assert {path: path.read_bytes() for path in Path("out", name).iterdir()} == before
        for unreadable in ("[]", "{", '{"mIoU": 1}'):                                   # none of ours, or of before
            Path("out", name, "metrics.json").write_text(unreadable)
            evaluate.main(evaluate.arguments([*begin, *words, "other"]))
            assert json.loads(Path("out", name, "metrics.json").read_text())["data_root"] == "other"


def test_masks_of_an_earlier_scoring_do_not_pass_for_those_of_the_scores(run, tmp_path, monkeypatch):
    score(run, tmp_path, "--save-masks")
    [folder] = tmp_path.iterdir()
    kept = {path.name: path.read_bytes() for path in (folder / "masks").iterdir()}
    monkeypatch.setattr(evaluate, "forward", None)
    for words in ([], ["--save-masks"]):                                                # one that comes to nothing
        with pytest.raises(TypeError):
            score(run, tmp_path, *words)
        assert {path.name: path.read_bytes() for path in (folder / "masks").iterdir()} == kept
    monkeypatch.undo()
    (folder / "masks/other.png").write_bytes(b"")
    score(run, tmp_path, "--save-masks")
    assert {path.name for path in (folder / "masks").iterdir()} == kept.keys()
    score(run, tmp_path)
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "per_sample.jsonl", "sheet.png"}


def test_the_authors_weights_score_into_a_folder_of_their_own(run, photo, tmp_path, monkeypatch):
    """models.load_official gives a model without a data set; what is asked with --set is in the Config that it gets."""
    asked = []

    def load_official(name, path, config=None, device="cpu"):
        asked.append((name, path, config))
        model = models.load(run)
        model.run = {key: model.run[key] for key in ("model", "config", "recipe")}
        return model

    monkeypatch.setattr(models, "load_official", load_official)
    monkeypatch.chdir(tmp_path)
    words = ["--model", "rs2sam2", "--checkpoint", "authors.pth", "--device", "cpu", "--set", "pretrained=DIR"]
    evaluate.main(evaluate.arguments([*words, "--dataset", "synthetic", "--limit", "12", "--workers", "0"]))
    assert len(metrics.read_records("runs/rs2sam2-official/test-limit=12")) == 12
    evaluate.main(evaluate.arguments([*words, "--image", str(photo), "--text", "a ship"]))
    assert Path("out/photo-mask.png").is_file()
    wanted = dataclasses.replace(models.paper("rs2sam2").Config(), pretrained="DIR")
    assert asked == [("rs2sam2", "authors.pth", wanted)] * 2
    Path("authors.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="authors.pth: weights as a paper's authors released them take --model"):
        score("authors.pth", tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the authors of icipnet have released no trained weights"):
        score(tmp_path / "authors.pth", tmp_path, "--model", "icipnet", "--dataset", "synthetic")


def test_a_name_that_is_too_long_for_a_file_is_cut_and_stays_its_own():
    names = {evaluate.in_file_name("x" * 300 + end) for end in "ab"}
    assert len(names) == 2 and all(len(name) <= 160 for name in names)
    assert evaluate.in_file_name("V/+UGF é") == "V_+UGF_é" and evaluate.in_file_name("x" * 160) == "x" * 160


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
    (["--rows", "test-00000-0-0,nothere"], "the split test has no sample nothere"),
    (["--dataset", "rrsisd", "--data-root", "nowhere"], "nowhere")])
def test_wrong_input_is_named(run, tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        score(run, tmp_path, *words)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_is_named_before_anything_is_scored(run, photo, monkeypatch):
    monkeypatch.setattr(evaluate, "forward", None)
    for words in ([], ["--image", str(photo), "--text", "a ship"]):
        for output in (photo, photo / "below"):
            with pytest.raises(OSError, match="photo.png"):
                score(run, output, *words)


@pytest.mark.parametrize("words, message", [
    ([], "give --checkpoint RUN, or --predictions DIR"), (["--checkpoint", "run", "--predictions", "dir"], "give --"),
    (["--checkpoint", "run", "--image", "a.png"], "--image goes with --text"),
    (["--checkpoint", "run", "--text", "a ship"], "--text goes with --image"),
    (["--checkpoint", "run", "--tile", "512"], "--tile goes with --image"),
    (["--checkpoint", "run", "--side", "512"], "--side goes with --predictions"),
    (["--predictions", "dir", "--image", "a.png", "--text", "a ship"], "--image goes with --checkpoint"),
    (["--predictions", "dir"], "--dataset is needed"), (["--model", "rs2sam2", "--checkpoint", "f"], "--dataset is"),
    (["--checkpoint", "run", "--limit", "-1"], "must be at least 0"),
    (["--checkpoint", "run", "--micro_batch=0"], "must be at least 1")])
def test_options_that_do_not_go_together(capsys, words, message):
    with pytest.raises(SystemExit):
        evaluate.arguments(words)
    assert message in capsys.readouterr().err


def test_options_have_the_defaults_that_their_help_names(capsys):
    args = evaluate.arguments(["--checkpoint", "run"])
    with pytest.raises(SystemExit):
        evaluate.arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (f"(default: {args.split})", f"at once (default: {args.micro_batch})", *evaluate.ROWS,
                 f"tiles (default: {args.overlap})", f"process (default: {args.workers})"):
        assert part in text
    assert (args.limit, args.categories, args.rows, args.small, args.save_masks) == (0, "all", "", False, False)
    assert args.overlap == inspect.signature(evaluate.predict).parameters["overlap"].default == 128      # DESIGN's


# ---------------------------------------------------------------------------------------------------------- faults

SCRIPT = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import toy; toy.register(); import evaluate\n" \
         "with evaluate.one_line_errors(): evaluate.main(evaluate.arguments())"


def command(run, *words):
    return [sys.executable, "-c", SCRIPT, "--checkpoint", str(run), *map(str, words)]


@pytest.mark.parametrize("name", models.PAPERS)
def test_an_output_that_is_not_finite_is_refused_by_the_name_of_its_sample(name, photo, tmp_path):
    config = models.paper(name).Config.tiny()
    tokenizer = models.word_tokenizer(name, config, data.vocabulary("synthetic", []))
    model = models.build(name, dataclasses.replace(config, vocab_size=len(tokenizer)))
    model.tokenizer = tokenizer
    with torch.no_grad():
        max((p for p in model.parameters() if p.requires_grad), key=torch.numel).fill_(math.nan)
    with pytest.raises(ValueError, match="sample test-00000-0-0, 3 of 3 samples: the model's output is not finite"):
        evaluate.score_split(model, ONE, dataset="synthetic", data_root="", split="test", limit=3, save_masks=True,
                             recipe={"protocol": "resized", "empty": "zero"}, output=tmp_path, tokenizer=tokenizer,
                             precision="fp32", workers=0)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(ValueError, match="'the ship': the model's output is not finite"):
        evaluate.predict(model.eval(), photo, ["the ship", "a car"])


def test_one_expression_that_is_not_finite_is_named():
    outputs = {"logits": torch.zeros(3, 1, 2, 2), "text_weight": torch.tensor([0.0, math.inf, 0.0]),
               "image_index": torch.zeros(3, dtype=torch.long), "v": torch.full((1, 4), math.nan)}
    assert evaluate.not_finite(outputs).tolist() == [False, True, False]            # v is of images, not of expressions
    outputs["logits"][2, 0, 1, 0] = math.nan
    assert evaluate.not_finite(outputs).tolist() == [False, True, True]


@pytest.mark.parametrize("fails", ["table", "sheet"])
def test_scores_are_written_before_they_are_printed_or_drawn(run, tmp_path, monkeypatch, fails):
    def fail(*_):
        raise RuntimeError("no room on the screen")

    monkeypatch.setattr(metrics if fails == "table" else evaluate, fails, fail)
    with pytest.raises(RuntimeError):
        score(run, tmp_path)
    assert len(metrics.read_records(tmp_path / "test-limit=24")) == 24
    assert json.loads((tmp_path / "test-limit=24/metrics.json").read_text())["samples"] == 24


def write_custom(folder, texts):
    """A custom data set of one scene, an object for each sentence."""
    folder.mkdir()
    image, masks = data.render(data.scene(3))
    Image.fromarray(image).save(folder / "a.png")
    entries = []
    for number, text in enumerate(texts):
        Image.fromarray(masks[number].astype(np.uint8) * 255).save(folder / f"m{number}.png")
        entries += [{"image": "a.png", "mask": f"m{number}.png", "expression": text, "split": split}
                    for split in ("train", "test")]
    (folder / "data.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_sentences_that_no_font_holds_or_no_terminal_shows_are_scored(run, tmp_path, capsys, monkeypatch):
    write_custom(tmp_path / "data", ["the red ship " * 80_000, "das Gebäude 建物", "a car"])
    monkeypatch.setattr(evaluate.ImageFont, "load_default", lambda size: ImageFont.load_default_imagefont())
    score(run, tmp_path / "out", "--dataset", "custom", "--data-root", str(tmp_path / "data"))
    out = capsys.readouterr().out
    assert "1 of 3 sentences are longer than 12 tokens and are cut" in out
    assert "1 of 3 sentences hold no word that the model knows, for example das Gebäude 建物" in out
    folder = tmp_path / "out/custom-test-limit=24"
    assert [len(line["expression"]) for line in metrics.read_records(folder)] == [13 * 80_000 - 1, 14, 5]
    assert Image.open(folder / "sheet.png").height > 3 * 160


def test_a_run_on_data_that_allow_no_control_says_so_and_ends_well(tmp_path, capsys):
    write_custom(tmp_path / "data", ["the red ship", "a car"])
    words = ["--model", "toy", "--dataset", "custom", "--data-root", str(tmp_path / "data"), "--device", "cpu"]
    train.train(train.arguments([*words, "--workers", "0", "--epochs", "1", "--output", str(tmp_path / "run")]), ONE)
    assert "sentences: none, --control shuffled: each picture" in capsys.readouterr().out
    assert [path.parent.name for path in tmp_path.glob("run/*/metrics.json")] == ["test"]


def test_a_terminal_that_cannot_show_the_sentence_gets_both_masks(run, photo, tmp_path):
    words = command(run, "--image", photo, "--text", "das Gebäude 建物", "the ship", "--output", tmp_path)
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "das Geb?ude ??" in done.stdout, done.stderr
    assert {f"photo-{k}-mask.png" for k in (1, 2)} < {path.name for path in tmp_path.iterdir()}
    assert done.stderr == "the model knows no word of 'das Geb?ude ??': its mask means nothing\n"


def test_a_closed_output_ends_the_program_in_silence_with_its_scores(run, tmp_path):
    started = subprocess.Popen(command(run, "--workers", 0, "--limit", 24, "--split", "val,test", "--output", tmp_path),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.stdout.close()
    error = started.stderr.read()
    assert started.wait() == 1 and "Error" not in error and "Traceback" not in error
    assert len(metrics.read_records(tmp_path / "val-limit=24")) == 24


def test_ctrl_c_ends_with_a_word(run, tmp_path):
    """To the whole group, as a terminal sends it, while the loader's workers are at work."""
    words = command(run, "--workers", 2, "--micro-batch", 12, "--output", tmp_path)
    words[2] = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + words[2]    # under nohup
    started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    seen = b""
    while not re.search(rb" [1-9]\d*/120", seen):
        seen += (read := os.read(started.stderr.fileno(), 4096))
        assert read, seen.decode()
    os.killpg(started.pid, signal.SIGINT)
    seen = started.stderr.read().decode()
    assert started.wait() == 130 and seen.rstrip().endswith("stopped") and "Traceback" not in seen


def test_workers_outlast_a_stop_of_the_whole_group():
    class Stopped:
        def __getitem__(self, numbers):
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
            return data.ReferringDataset(samples, 16, tokenizer)[numbers]

    samples = data.read("synthetic", "", "val", limit=4)
    tokenizer = data.WordTokenizer(["ship"], 4, toy.SPECIAL_TOKENS)
    found = list(evaluate.batches(Stopped(), [[(0, 1)], [(2, 3)]], workers=1, device=ONE.device))
    assert [[sample.id for sample in batch["samples"]] for batch in found] == [
        [sample.id for sample in samples[:2]], [sample.id for sample in samples[2:]]]


def test_workers_outlast_a_stop_in_their_first_moment(monkeypatch):
    """Before they have said what they ignore; the main process takes both signals again once they are started."""
    ignore = evaluate.outlast_signals

    def stopped_at_once(worker):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        ignore(worker)

    monkeypatch.setattr(evaluate, "outlast_signals", stopped_at_once)
    dataset = data.ReferringDataset(data.read("synthetic", "", "val", limit=2), 16,
                                    data.WordTokenizer(["ship"], 4, toy.SPECIAL_TOKENS))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert len(list(evaluate.batches(dataset, [[(0,)], [(1,)]], workers=1, device=ONE.device))) == 2
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(workers):
    """Dropout after a validation is what it is without one."""
    samples = data.read("synthetic", "", "val", limit=2)
    dataset = data.ReferringDataset(samples, 16, data.WordTokenizer(["ship"], 4, toy.SPECIAL_TOKENS))
    before = torch.get_rng_state()
    assert len(list(evaluate.batches(dataset, [[(0,)], [(1,)]], workers, ONE.device))) == 2
    assert torch.equal(torch.get_rng_state(), before)


def test_a_corrupt_image_ends_in_one_line_that_names_it(run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    done = subprocess.run(command(run, "--image", broken, "--text", "a ship", "--output", tmp_path / "out"),
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "broken.png" in done.stderr


def test_an_error_in_a_loader_worker_arrives_as_one_line(capsys):
    class Broken:
        def __getitem__(self, numbers):
            raise ValueError("images/3.png is truncated; copy it again")

    with pytest.raises(SystemExit), evaluate.one_line_errors():
        list(evaluate.batches(Broken(), [[(0,)]], workers=1, device=ONE.device))
    assert capsys.readouterr().err == "error: images/3.png is truncated; copy it again\n"


@pytest.mark.parametrize("fault", [lambda: np.zeros(3).reshape(2, 2), lambda: int("three"), lambda: json.loads("{"),
                                   lambda: [].index(1), lambda: {}["key"]])
def test_a_fault_of_ours_keeps_its_traceback(fault):
    with pytest.raises((ValueError, KeyError)), evaluate.one_line_errors():
        fault()


def test_what_the_system_or_a_missing_package_answers_is_one_line(tmp_path, capsys):
    def no_package():
        raise ModuleNotFoundError("masks stored as polygons need: pip install pycocotools")

    def no_folder():
        (tmp_path / "none" / "a").write_text("")

    for fault, line in ((no_folder, "No such file"), (no_package, "pip install")):
        with pytest.raises(SystemExit) as stopped, evaluate.one_line_errors():
            fault()
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and error.startswith("error: ") and line in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------ others' predictions


def score_files(folder, *words):
    evaluate.main(evaluate.arguments(["--predictions", str(folder), "--dataset", "synthetic", "--limit", "24", *words]))


@pytest.mark.parametrize("protocol, words", [("original", []), ("resized", ["--side", "32"])])
def test_masks_that_were_written_score_as_the_model_that_wrote_them(run, tmp_path, protocol, words):
    score(run, tmp_path, "--protocol", protocol, "--save-masks")
    [folder] = tmp_path.iterdir()
    score_files(folder / "masks", *words, "--output", str(tmp_path / "again"))
    diagnosed = [{key: value for key, value in line.items() if key != "brightness"}
                 for line in metrics.read_records(folder)]
    again = tmp_path / "again/test"
    assert metrics.read_records(again) == diagnosed and (again / "sheet.png").is_file()
    one, two = (json.loads((place / "metrics.json").read_text()) for place in (folder, again))
    assert one["mIoU"] == two["mIoU"] and one["intervals"] == two["intervals"] and two["protocol"] == protocol
    assert metrics.compare(metrics.read_records(folder), metrics.read_records(again))["wins"]["equal"] == 100


def test_predictions_that_cannot_be_scored_are_all_listed_and_nothing_is_written(tmp_path, capsys):
    names = [sample.id for sample in data.read("synthetic", "", "test", limit=24)]
    mask = np.zeros((96, 96), np.uint8)
    for name in names:
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    Image.fromarray(mask).convert("1").save(tmp_path / f"{names[9]}.png")               # as good as 0 and 255
    (tmp_path / f"{names[0]}.png").unlink()
    Image.fromarray(mask[:50]).save(tmp_path / f"{names[1]}.png")
    Image.fromarray(mask + np.eye(96, dtype=np.uint8)).save(tmp_path / f"{names[2]}.png")
    (tmp_path / f"{names[3]}.png").write_bytes(b"x")
    Image.fromarray(mask).convert("RGB").save(tmp_path / f"{names[4]}.png")
    Image.fromarray(mask).save(tmp_path / "odd.png")
    with pytest.raises(ValueError, match="5 of 24 predictions cannot be scored"):
        score_files(tmp_path)
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    wanted = "expected 96 x 96 (height x width) of 0 and 255 alone"
    for number, words in enumerate(("missing", f"50 x 96 of 0 to 0, {wanted}", f"96 x 96 of 0 to 1, {wanted}",
                                    "not a sound PNG", f"96 x 96 x 3 of 0 to 0, {wanted}")):
        assert sum(f"{names[number]}.png: {words}" in line for line in lines) == 1
    assert "odd.png: no sample of test has this name" in lines
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".png"]
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        score_files(tmp_path / "nowhere")


def test_kinds_of_failure_and_of_sentence(tmp_path, capsys):
    """Masks that are the object, another of its category, empty, twice as wide or a part of it."""
    samples = data.read("synthetic", "", "test", limit=24)
    wanted = []
    for number, sample in enumerate(samples):
        [truth] = data.load([sample])[1]
        others = data.distractors(sample, truth.shape)
        wide = np.asarray(Image.fromarray(truth).convert("L").filter(ImageFilter.MaxFilter(15))) > 0
        part = truth & (np.cumsum(truth).reshape(truth.shape) < 0.4 * truth.sum())
        kind = ("none", "nothing", "spill", "boundary", "wrong" if len(others) else "none")[number % 5]
        mask = {"none": truth, "nothing": truth & False, "spill": wide, "boundary": part,
                "wrong": others[0] if len(others) else truth}[kind]
        assert len(others) or not {"wrong"} & {kind}
        wanted.append((kind, None if not len(others) else float(kind == "wrong")))
        Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / f"{sample.id}.png")
    score_files(tmp_path, "--rows", "wrong")
    lines = metrics.read_records(tmp_path / "test")
    assert [(line["failure"], line["on_distractor"]) for line in lines] == wanted
    assert [(line["kind"], line["truth"]) for line in lines] == [
        (sample.kind, int(data.load([sample])[1][0].sum())) for sample in samples]
    printed = capsys.readouterr().out
    for kind in {sample.kind for sample in samples}:
        row = next(line for line in printed.split("\n") if line.startswith(kind)).split()
        mine = [line for line in lines if line["kind"] == kind]
        assert row[1:3] == [str(len(mine)), f"{100 * np.mean([line['iou'] for line in mine]):.2f}"]
    rows = sum(kind == "wrong" for kind, _ in wanted)
    assert 0 < rows < 10 and Image.open(tmp_path / "test/sheet.png").height == 42 + rows * (160 + 22 + 6)
    score_files(tmp_path, "--rows", f"{samples[3].id},{samples[0].id}")
    assert Image.open(tmp_path / "test/sheet.png").height == 42 + 2 * (160 + 22 + 6)


# -------------------------------------------------------------------------------------------------------- pictures


def test_outlines_are_seen_on_any_picture():
    for level in (0, 60, 128, 200, 255):
        image, mask = Image.new("RGB", (40, 40), (level,) * 3), np.zeros((40, 40), bool)
        mask[10:30, 10:30] = True
        drawn = np.asarray(evaluate.outlined(image, mask, (40, 40)))[..., 0].astype(int)
        assert (drawn[10:30, 10] == 255).all() and (drawn[10:30, 9] == 0).all()        # white within, black around
        assert (drawn[11:29, 11:29] == level).all() and (drawn[:9] == level * 2 // 5).all()
    for side, lines in ((639, 1), (640, 2)):                               # thicker where a screen shrinks the picture
        mask = np.arange(100) > 49
        drawn = np.asarray(evaluate.outlined(Image.new("RGB", (side, 100)), np.tile(mask[:, None], side), (side, 100)))
        assert (drawn[:, 300, 0] == 255).sum() == lines and (drawn[50:, 300, 0] == 255).argmax() == 0
    tiny = np.zeros((4000, 4000), bool)
    tiny[7, 3] = True
    shown = np.asarray(evaluate.outlined(Image.new("RGB", (4000, 4000)), tiny, (400, 400)))
    assert shown.max() == 255 and np.argwhere(shown[..., 0] == 255).tolist() == [[0, 0]]


def test_shades_run_from_dark_blue_to_yellow():
    colours = np.asarray(evaluate.shades(np.array([[-5.0, 0.0, 64 / 255, 127 / 255, 191 / 255, 1.0, 5.0]])))[0]
    blue, green, yellow = np.array([20, 20, 80]), np.array([45, 145, 125]), np.array([250, 230, 40])
    assert np.abs(colours - [blue, blue, (blue + green) / 2, green, (green + yellow) / 2, yellow, yellow]).max() <= 1


def test_the_sheet_shows_scale_and_point(tmp_path):
    image, mask = Image.new("RGB", (32, 32), (90, 90, 90)), np.zeros((32, 32), bool)
    row = {"expression": "a ship", "image": image, "truth": mask, "prediction": mask, "maps": {"coarse": 0.0 * mask}}
    evaluate.sheet([row, {**row, "point": (0.25, 0.75)}], [0.5, None], tmp_path / "sheet.png")
    page = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    assert page.shape == (42 + 2 * 188, 4 * 166 + 6, 3)
    bar = page[30, 3 * 166 + 20:3 * 166 + 152]                              # under the map's name
    assert (bar[:, 0] - bar[:, 2]).argmax() > 120 > (bar[:, 2] - bar[:, 0]).argmax()
    first, second = (page[top:top + 160, 2 * 166 + 6:2 * 166 + 166] for top in (42, 42 + 188))
    yellow = np.argwhere((second == (255, 255, 0)).all(-1))
    assert np.abs(yellow.mean(0) - (120, 40)).max() < 1 and not (first == (255, 255, 0)).all(-1).any()


def test_the_point_of_a_model_is_where_its_map_is_one(run, monkeypatch):
    model = models.load(run)
    forward = model.forward

    def with_point(*inputs):
        outputs = forward(*inputs)
        point = torch.zeros(len(outputs["logits"]), 1, 8, 16)
        point[:, 0, 6, 3] = 1
        logits = torch.full_like(outputs["logits"], 0.5)
        logits[..., 16:] = -0.5
        return {**outputs, "point": point, "logits": logits}

    monkeypatch.setattr(model, "forward", with_point)
    samples = data.read("synthetic", "", "val", limit=2)
    rows = evaluate.sheet_rows(model, samples, model.tokenizer, ONE.device, "fp32")
    assert [row["point"] for row in rows] == [(3.5 / 16, 6.5 / 8)] * 2
    assert rows[0]["prediction"][:, :16].all() and not rows[0]["prediction"][:, 16:].any()
    assert list(rows[0]["maps"]) == ["coarse"] and rows[0]["truth"].shape == rows[0]["prediction"].shape == (32, 32)
    assert (np.asarray(rows[0]["image"]) == np.asarray(Image.fromarray(data.render(data.scene(samples[0].image))[0])
                                                       .resize((32, 32), Image.Resampling.BILINEAR))).all()


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
    for nothing in (None, [3], 3, {"a ship"}):
        with pytest.raises(ValueError, match="expected a sentence or a list of sentences, got"):
            evaluate.predict(model, photo, nothing)
        with pytest.raises(ValueError, match=r"expected a uint8 array \(H,W,3\), got"):
            evaluate.predict(model, nothing, "a ship")
    with pytest.raises(ValueError, match="is a folder"):
        evaluate.predict(model, tmp_path, "a ship")


def test_what_makes_a_mask_doubtful_is_said(run, capsys):
    model = models.load(run)
    evaluate.predict(model, Image.new("RGB", (256, 100)), ["the ship", "xyzzy plugh", "a plugh"])
    assert capsys.readouterr().err == "the model knows no word of 'xyzzy plugh': its mask means nothing\n"
    evaluate.predict(model, Image.new("RGB", (100, 1280)), "the ship")
    assert capsys.readouterr().err.startswith("100x1280 is squashed by a factor of 40 to the model's square")
    evaluate.predict(model, Image.new("RGB", (100, 1280)), "the ship", tile=640)
    assert "squashed" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("length, tile, overlap", [(100, 40, 10), (100, 40, 0), (97, 32, 31), (33, 32, 8), (32, 32, 8),
                                                   (20, 32, 8), (1, 4, 1)])
def test_windows_sum_to_one(length, tile, overlap):
    windows = evaluate.windows(length, tile, overlap)
    total, covers = np.zeros(length), np.zeros(length)
    for start, weights in windows:
        assert len(weights) == min(tile, length) and (weights > 0).all()
        total[start:start + len(weights)] += weights
        covers[start:start + len(weights)] += 1
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert (covers > 0).all() and windows[0][0] == 0
    for (start, _), (after, _) in zip(windows, windows[1:], strict=False):
        assert start + tile - after >= overlap


def test_tiles_are_blended_from_what_the_model_says_of_each(run, capsys):
    """Against all tiles laid out at once, on a scene that they do not divide evenly."""
    model = models.load(run)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (170, 150, 3), dtype=np.uint8))
    texts, tile, overlap = ["the red ship", "the windmill"], 64, 16
    result = evaluate.predict(model, image, texts, tile=tile, overlap=overlap, maps=True)
    logits, coarse = np.zeros((2, 170, 150)), np.zeros((2, 170, 150))
    for top, down in evaluate.windows(170, tile, overlap):
        for left, across in evaluate.windows(150, tile, overlap):
            part = evaluate.predict(model, image.crop((left, top, left + tile, top + tile)), texts)
            place = np.s_[:, top:top + tile, left:left + tile]
            logits[place] += np.log(part["probs"] / (1 - part["probs"])) * down[:, None] * across
            coarse[place] += part["coarse"] * down[:, None] * across
    np.testing.assert_allclose(result["probs"], 1 / (1 + np.exp(-logits)), atol=1e-4)
    np.testing.assert_allclose(result["coarse"], coarse, atol=1e-5)
    clear = np.abs(logits) > 1e-3
    assert clear.mean() > 0.9 and (result["masks"] == (logits > 0))[clear].all()
    alone = evaluate.predict(model, image, texts, tile=tile, overlap=overlap)
    assert list(alone) == ["masks"] and (alone["masks"] == result["masks"]).all()
    assert "tiles: " in capsys.readouterr().err


def test_a_tile_as_large_as_the_scene_is_the_whole(run, photo):
    model = models.load(run)
    whole, tiled = (evaluate.predict(model, photo, "the ship", tile=tile, maps=True) for tile in (None, 500))
    assert whole.keys() == tiled.keys() == {"masks", "probs", "coarse"}
    assert all((whole[name] == tiled[name]).all() for name in whole)
    assert list(evaluate.predict(model, photo, "the ship", maps=False)) == ["masks"]
    for tile, overlap in ((64, 64), (64, -1), (100, 128)):
        with pytest.raises(ValueError, match=f"tile {tile}, overlap {overlap}: the overlap must be smaller"):
            evaluate.predict(model, photo, "the ship", tile=tile, overlap=overlap)


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


def test_a_folder_of_images_and_an_overlay_that_a_screen_shows(run, photo, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("b.PNG", "a.png"):
        Image.open(photo).save(tmp_path / "in" / name)
    (tmp_path / "in/notes.txt").write_text("no picture")
    monkeypatch.setattr(evaluate, "SCREEN", 50)
    words = ("--image", str(tmp_path / "in"), "--text", "the ship", "--tile", "60", "--overlap", "8")
    score(run, tmp_path / "out", *words)
    there = {path.name: Image.open(path).size for path in (tmp_path / "out").iterdir()}
    assert there == {f"{name}-{kind}.png": size for name in "ab" for kind, size in (("mask", (131, 77)),
                                                                                    ("overlay", (50, 29)))}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no picture .* in .*empty"):
        score(run, tmp_path / "none", "--image", str(tmp_path / "empty"), "--text", "a ship")


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
    score(run, tmp_path / "tiled", "--image", str(source), "--text", "the red ship", "--tile", "64", "--overlap", "8")
    with Image.open(tmp_path / "tiled/aerial-mask.tif") as mask:
        assert mask.size == (131, 77) and mask.tag_v2[33922] == values[33922]
    Image.open(photo).save(tmp_path / "plain.tif")
    score(run, tmp_path / "out", "--image", str(tmp_path / "plain.tif"), "--text", "the red ship")
    assert (tmp_path / "out/plain-mask.png").is_file()
