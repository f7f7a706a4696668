"""evaluate.py: scoring, the control, pictures, own images. On the toy paper, trained for two short epochs."""

import contextlib
import dataclasses
import inspect
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
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
from PIL import Image, ImageDraw, ImageFilter, ImageFont
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


# ------------------------------------------------------------------------------------------------ processes, batches


@pytest.mark.parametrize("asked, card, world, wanted", [
    (None, True, 4, ("cuda:1", "nccl")), (None, False, 4, ("cpu", "gloo")), ("cpu", True, 4, ("cpu", "gloo")),
    ("cuda", True, 1, ("cuda:1", None)), ("cpu", False, 1, ("cpu", None)), ("cuda", False, 1, None)])
def test_processes_join_as_torchrun_says(monkeypatch, asked, card, world, wanted):
    joined, chosen = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 3, world)]))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **there: joined.append(
        (backend, there["store"].underlying_store, there["rank"], there["world_size"])))
    for name, value in (("RANK", 3), ("WORLD_SIZE", world), ("LOCAL_RANK", 1)):
        monkeypatch.setenv(name, str(value))
    if wanted is None:
        with pytest.raises(ValueError, match="--device cuda: torch sees no CUDA device here; use --device cpu"):
            evaluate.start_processes(asked)
        return
    device, backend = wanted
    if device == "cuda:1":
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(ValueError, match="process 2 .* no card, there are 1: .*--nproc-per-node.*--device cpu"):
            evaluate.start_processes(asked)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert (joined, chosen) == ([], [])
    assert evaluate.start_processes(asked) == (3, world, torch.device(device))
    assert (joined, chosen) == ([(backend, store, 3, 4)] if backend else [], [1] if device == "cuda:1" else [])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    evaluate.start_processes(asked)
    assert len(joined) == bool(backend)                                         # once
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    assert evaluate.start_processes("cpu") == (0, 1, torch.device("cpu")) and evaluate.start_processes("cpu").first
    assert evaluate.start_processes(asked).device == torch.device("cuda:0" if device == "cuda:1" else "cpu")


def test_precisions_and_what_travels_to_the_device(monkeypatch):
    assert {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None} == evaluate.PRECISIONS
    images = torch.ones(2, 2)
    for name, dtype in evaluate.PRECISIONS.items():
        with evaluate.autocast(ONE.device, name):
            assert torch.is_autocast_enabled("cpu") == (name != "fp32")
            assert name == "fp32" or torch.get_autocast_dtype("cpu") == dtype
    monkeypatch.setattr(torch.Tensor, "to", lambda *words, **options: (words[1:], options))
    there = torch.device("meta")
    assert evaluate.to_device({"images": images, "samples": [images]}, there) == {
        "images": ((there,), {"non_blocking": True}), "samples": [images]}


def test_the_loader_pins_memory_for_a_card_alone_and_ends_its_workers(monkeypatch):
    class Loader:
        def __init__(self, plan, **options):
            asked.append((plan, options))

        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def _shutdown_workers(self):
            ended.append(self)

    asked, ended = [], []
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    for kind, workers in (("cpu", 3), ("cuda", 0)):
        assert not list(evaluate.batches("dataset", iter([[(0,)]]), workers, torch.device(kind)))
    (plan, options), (_, of_card) = asked
    assert plan == [[(0,)]] and options["batch_size"] is None
    assert [(one["num_workers"], one["pin_memory"]) for one in (options, of_card)] == [(3, False), (0, True)]
    assert len(ended) == 1


def test_a_worker_is_silent_about_a_main_process_that_is_gone(monkeypatch, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: print(kind.__name__))
    try:
        evaluate.outlast_signals(0)
        assert [signal.getsignal(number) for number in before] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for kind in (ConnectionResetError, EOFError, KeyError):
        sys.excepthook(kind, kind(), None)
    assert capsys.readouterr().out == "KeyError\n"


# --------------------------------------------------------------------------------------------------------- scoring


def test_logits_are_resized_bilinearly_without_aligned_corners():
    logits = torch.tensor([[[[0.0, 4.0]]]])
    assert evaluate.upsampled(logits, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_logits_come_at_the_model_own_size_unless_its_paper_enlarges_twice():
    class Half(torch.nn.Module):
        config = SimpleNamespace()

        def forward(self, images, *_):
            seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            logits = torch.arange(4.0, dtype=torch.bfloat16).view(1, 1, 2, 2)
            return {"logits": logits, "image_index": torch.zeros(1, dtype=torch.long)}

    seen, batch = [], {"images": torch.zeros(1, 3, 8, 8)} | dict.fromkeys(("tokens", "text_mask", "image_index"))
    outputs, _ = evaluate.forward(Half(), batch, ONE.device, "fp32")
    assert outputs["logits"].flatten().tolist() == [0, 1, 2, 3] and outputs["logits"].dtype == torch.float32
    assert outputs["image_index"].dtype == torch.int64
    Half.config = SimpleNamespace(enlarge_twice=True)
    enlarged = evaluate.forward(Half(), batch, ONE.device, "fp32")[0]["logits"]
    assert torch.equal(enlarged, evaluate.upsampled(outputs["logits"], (8, 8)))
    for precision in ("bf16", "fp16"):
        evaluate.forward(Half(), batch, ONE.device, precision)
    assert seen == [None, None, torch.bfloat16, torch.float16]


def test_counts_at_the_square_and_at_each_mask_own_size():
    logits = torch.tensor([[[[1.0, -1.0], [-1.0, -1.0]]], [[[-1.0, -1.0], [-1.0, 0.0]]]])       # zero is background
    masks = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 1]]]).bool()
    samples = [SimpleNamespace(id=f"s{k}", image=Path("a.png")) for k in range(2)]
    found = evaluate.counts({"logits": logits}, {"masks": masks, "samples": samples})
    assert {name: values.tolist() for name, values in found.items()} == {
        "intersection": [1, 0], "union": [2, 1], "truth": [2, 1]}
    with pytest.raises(ValueError, match="zip"):
        evaluate.counts({"logits": logits}, {"masks": masks[:1], "samples": samples})
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


def test_pixels_are_counted_with_those_on_other_objects(monkeypatch):
    """By hand on 1x6 pixels; the prediction has to cover more of another object than of its own to count."""
    def masks(*rows):
        return torch.tensor([[[letter == "x" for letter in row]] for row in rows])

    prediction, truth = masks("xxx...", "x....x")
    for others, wanted in (((".xx...", "....x."), 1.0), ((".x....", "....x."), 0.0), ((), math.nan)):
        others = masks(*others).bool().reshape(-1, 1, 6).numpy()
        monkeypatch.setattr(data, "distractors", lambda sample, size, others=others: others)
        found = evaluate.count(SimpleNamespace(image=7), prediction, truth)
        assert [found[name].item() for name in ("intersection", "union", "truth")] == [1, 4, 2]
        np.testing.assert_equal(found["on_distractor"].item(), wanted)
    assert "on_distractor" not in evaluate.count(SimpleNamespace(image=Path("a.png")), prediction, truth)


class Bar:
    """In the place of tqdm."""

    made = []

    def __init__(self, iterable=None, desc=None, total=None, **options):
        self.iterable, self.steps, self.said = iterable, 0, {"desc": desc, "total": total, **options}
        self.made.append(self)

    def __iter__(self):
        return iter(self.iterable)

    def update(self):
        self.steps += 1

    def close(self):
        self.said["steps"] = self.steps


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(evaluate, "tqdm", Bar)
    return Bar.made


def test_scoring_is_without_dropout_and_leaves_the_model_as_it_was(run, bars, monkeypatch):
    model, samples = models.load(run), data.read("synthetic", "", "val", limit=24)
    settings = {"tokenizer": model.tokenizer, "protocol": "resized", "workers": 0}
    assert model.dropout.p > 0
    wanted, rows = evaluate.evaluate(model, samples, ONE, **settings), None
    for training in (True, False):
        model.train(training)
        assert evaluate.evaluate(model, samples, ONE, **settings) == wanted and model.training == training
        model.train(training)
        drawn = evaluate.sheet_rows(model, samples[:3], model.tokenizer, ONE.device, "fp32")
        assert model.training == training
        rows = rows or drawn
        assert all((one["maps"]["coarse"] == two["maps"]["coarse"]).all() for one, two in zip(rows, drawn, strict=True))
    assert bars[0].said == {"desc": "evaluate", "total": 1, "disable": False, "leave": False}
    with pytest.raises(ValueError, match="expected scores of samples 0 to 23, got 12"):
        evaluate.evaluate(model, samples, evaluate.Processes(1, 2, ONE.device), **settings, label="half")
    assert bars[-1].said == {"desc": "half", "total": 1, "disable": True, "leave": False}
    monkeypatch.delattr(toy.Toy, "diagnose")
    bare = evaluate.evaluate(model, samples, ONE, **settings)
    assert bare == [{key: value for key, value in line.items() if key != "brightness"} for line in wanted]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_writes_when_all_have_come(run, tmp_path, monkeypatch, capsys, rank):
    """Two processes, the collective calls stubbed: what each asks, waits for, writes and gives back."""
    lines = evaluate.evaluate(models.load(run), data.read("synthetic", "", "val", limit=6), ONE, protocol="resized",
                              tokenizer=models.load(run).tokenizer, workers=0)
    folder, asked = tmp_path / "val-dropout=0.2", []

    def evaluated(model, samples, processes, **settings):
        asked.append(settings)
        assert folder.is_dir() == (rank == 0) and asked[0] == "all are there"
        assert [sample.id for sample in samples] == [line["id"] for line in lines]
        if rank == 0:
            assert not list(settings["save_masks"].iterdir())
            Image.new("L", (8, 8)).save(settings["save_masks"] / "new.png")
        return lines

    if rank == 0:                                                       # what a scoring that was killed has left
        (folder / "masks.part").mkdir(parents=True)
        (folder / "masks.part/old.png").write_bytes(b"")
    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: asked.append("all are there"))
    model = models.load(run)
    summary = evaluate.score_split(
        model, evaluate.Processes(rank, 2, ONE.device), dataset="synthetic", data_root="data", split="val", limit=6,
        output=tmp_path, recipe={"protocol": "original", "empty": "one"}, tokenizer=model.tokenizer, precision="bf16",
        micro_batch=5, workers=3, checkpoint=run, changes=["dropout=0.2"], save_masks=True)
    assert asked[1] == {"tokenizer": model.tokenizer, "protocol": "original", "empty": "one", "precision": "bf16",
                        "micro_batch": 5, "workers": 3, "save_masks": folder / "masks.part", "label": folder.name}
    assert summary == metrics.summarize(lines, "one")
    about = {"dataset": "synthetic", "data_root": "", "split": "val", "subset": "all categories",
             "protocol": "original", "threshold": "logits > 0", "checkpoint": str(run), "changes": "dropout=0.2",
             "precision": "bf16"}
    if rank == 1:
        assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
        return
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "per_sample.jsonl", "sheet.png", "masks"}
    assert [path.name for path in (folder / "masks").iterdir()] == ["new.png"]
    assert (folder / "metrics.json").read_text() == json.dumps({**about, **summary}, indent=1) + "\n"
    assert (folder / "per_sample.jsonl").read_text() == "".join(json.dumps(line) + "\n" for line in lines)
    assert capsys.readouterr().out == metrics.table(summary, about) + "\n"


def test_what_scoring_takes_when_nothing_is_said():
    """Our choice: as on the command line; precision as on the CPU, an empty union as in all five papers' recipes."""
    args = evaluate.arguments(["--checkpoint", "run"])
    for function in (evaluate.evaluate, evaluate.score_split):
        defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
        assert (defaults["micro_batch"], defaults["workers"]) == (args.micro_batch, 1) == (32, 1)
        assert defaults["save_masks"] in (None, False)
    assert inspect.signature(evaluate.evaluate).parameters["empty"].default == "zero"
    for function in (evaluate.evaluate, evaluate.predict):
        assert inspect.signature(function).parameters["precision"].default == "fp32"
    samples = [sample_of(number, f"p{number}", f"object {number}") for number in range(12)]
    assert evaluate.shuffled(samples) == evaluate.shuffled(samples, 0) != evaluate.shuffled(samples, 1)


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
    model = models.load(run)
    for split in ("val", "test"):
        folder = tmp_path / f"{split}{'-protocol=original' * (protocol == 'original')}-limit=24"
        lines = metrics.read_records(folder / "per_sample.jsonl")
        written = json.loads((folder / "metrics.json").read_text())
        assert (written["split"], written["protocol"], written["samples"]) == (split, protocol, len(lines))
        assert written.get("side") == (32 if protocol == "resized" else None)
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
            image = data.load([samples[line["id"]]])[0].resize((side, side), Image.Resampling.BILINEAR)
            found = evaluate.predict(model, image, line["expression"])["masks"][0]
            assert (found == (prediction > 0)).mean() > 0.99
        assert Image.open(folder / "sheet.png").height > 1000


def test_a_folder_for_masks_is_made_only_where_they_are_asked_for(run, tmp_path, monkeypatch):
    seen, real = [], evaluate.evaluate

    def watched(*given, **settings):
        seen.append(sorted(path.name for path in tmp_path.glob("*/*")))
        return real(*given, **settings)

    monkeypatch.setattr(evaluate, "evaluate", watched)
    for words in ((), ("--save-masks",)):
        score(run, tmp_path, "--split", "val", *words)
    assert seen == [[], ["masks.part", "metrics.json", "per_sample.jsonl", "sheet.png"]]


def test_control_is_written_beside_the_split(run, tmp_path):
    score(run, tmp_path, "--control", "shuffled")
    written = json.loads((tmp_path / "test-shuffled-limit=24/metrics.json").read_text())
    assert written["split"] == "test-shuffled"
    assert written["control"] == "24 of 24 sentences changed, the others left out"
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
        for unreadable in (b"[]", b"{\xff", b'{"mIoU": 1}'):                             # none of ours, or of before
            Path("out", name, "metrics.json").write_bytes(unreadable)
            evaluate.main(evaluate.arguments([*begin, *words, "other"]))
            assert json.loads(Path("out", name, "metrics.json").read_text())["data_root"] == "other"
    for limit, said, count in ((1, 1, 1), (0, "", len(data.read("rrsisd", "other", "test")))):
        evaluate.main(evaluate.arguments(["--predictions", str(masks), *words, "other", "--limit", str(limit)]))
        written = json.loads(Path("out/test/metrics.json").read_text())
        assert (written["limit"], written["samples"]) == (said, count)


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
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "masks").mkdir()

    def full(path):
        raise ValueError(f"{path} could not be written")

    monkeypatch.setattr(models, "put_in_place", full)
    with pytest.raises(ValueError, match="per_sample.jsonl could not be written"):
        score(run, tmp_path, "--save-masks")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before        # nor new ones by old scores


def test_the_authors_weights_score_into_a_folder_of_their_own(run, photo, tmp_path, monkeypatch):
    """models.load_official gives a model without a data set; what is asked with --set is in the Config that it gets."""
    asked = []

    def load_official(name, path, config=None, device=None):
        asked.append((name, path, config, device))
        model = models.load(run)
        model.run = {key: model.run[key] for key in ("model", "config", "recipe")}
        return model

    monkeypatch.setattr(models, "load_official", load_official)
    monkeypatch.chdir(tmp_path)
    words = ["--model", "rs2sam2", "--checkpoint", "authors.pth", "--device", "cpu", "--set", "pretrained=DIR"]
    evaluate.main(evaluate.arguments([*words, "--dataset", "synthetic", "--limit", "12", "--workers", "0"]))
    assert len(metrics.read_records("runs/rs2sam2-official-authors/synthetic/test-limit=12")) == 12
    evaluate.main(evaluate.arguments([*words, "--image", str(photo), "--text", "a ship"]))
    assert Path("out/photo-mask.png").is_file()
    wanted = dataclasses.replace(models.paper("rs2sam2").Config(), pretrained="DIR")
    assert asked == [("rs2sam2", "authors.pth", wanted, ONE.device)] * 2
    Path("authors.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="authors.pth: weights as a paper's authors released them take --model"):
        score("authors.pth", tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the authors of icipnet have released no trained weights"):
        score(tmp_path / "authors.pth", tmp_path, "--model", "icipnet", "--dataset", "synthetic")


def test_a_run_is_not_the_authors_file(run):
    for checkpoint in (str(run), str(run / "best.safetensors")):
        with pytest.raises(ValueError, match="--model is for the authors' files; leave it out for a run"):
            evaluate.main(evaluate.arguments(["--model", "rs2sam2", "--checkpoint", checkpoint, "--dataset", "rrsisd"]))


def test_a_run_on_a_pickle_is_scored_on_other_data(run, tmp_path, monkeypatch):
    """--refs is inherited with its data set only."""
    real = evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", lambda args, device: (
        (found := real(args, device))[0], {**found[1], "dataset": "refer", "refs": "refs(unc).p"}, *found[2:]))
    score(run, tmp_path, "--dataset", "synthetic", "--limit", "12")
    assert len(metrics.read_records(tmp_path / "synthetic-test-limit=12")) == 12


def test_what_stands_beside_a_picture_is_not_written_over(run, photo, tmp_path):
    for name in ("photo.png", "photo-mask.png", "alone/photo.png", "alone/photo-2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(photo, tmp_path / name)
    words = ["--checkpoint", str(run), "--image", str(tmp_path / "photo.png"), "--text", "a ship"]
    with pytest.raises(ValueError, match="photo-mask.png stands beside the picture and would be written over; name an"):
        evaluate.main(evaluate.arguments([*words, "--output", str(tmp_path)]))
    assert sorted(file.name for file in tmp_path.glob("*.*")) == ["photo-mask.png", "photo.png"]
    assert (tmp_path / "photo-mask.png").read_bytes() == photo.read_bytes()
    for _ in range(2):                                                      # its own results it renews
        evaluate.main(evaluate.arguments([*words, "--output", str(tmp_path / "out")]))
    words[3] = str(tmp_path / "alone/photo.png")                            # photo-2.png is no name of a result
    evaluate.main(evaluate.arguments([*words, "--output", str(tmp_path / "alone")]))
    assert (tmp_path / "alone/photo-mask.png").is_file()


def test_memory_that_is_too_small_is_one_line(capsys):
    with pytest.raises(SystemExit), evaluate.one_line_errors():
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")
    assert capsys.readouterr().err == ("error: out of memory (tried to allocate 9 GiB); a smaller --micro-batch takes "
                                       "less\n")


def test_a_name_that_is_too_long_for_a_file_is_cut_and_stays_its_own():
    names = {evaluate.in_file_name("x" * 300 + end) for end in "ab"}
    assert len(names) == 2 and all(len(name) <= 160 for name in names)
    assert evaluate.in_file_name("V/+UGF é") == "V_+UGF_é" and evaluate.in_file_name("x" * 160) == "x" * 160
    assert len(evaluate.in_file_name("x" * 161)) == 160 and evaluate.in_file_name("a=1, b-2.5") == "a=1_b-2.5"


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


def test_a_sheet_without_rows_takes_the_old_one_away(run, tmp_path, capsys, monkeypatch):
    score(run, tmp_path, "--split", "val,test")
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/sheet.png")}
    assert len(there) == 2
    monkeypatch.setattr(metrics, "failure", lambda *_: "boundary")
    score(run, tmp_path, "--split", "val,test", "--rows", "spill")
    assert "--rows spill: there is no such sample, so there is no sheet\n" in capsys.readouterr().out
    assert not list(tmp_path.glob("*/sheet.png"))


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
    (["--rows", "f,b,d,test-00000-0-0,a,c,e"], "the split test has no sample a, b, c, d, e, f; --rows takes ids, as "),
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
    ([], "give --checkpoint RUN, or --predictions DIR"),
    (["--checkpoint", "run", "--predictions", "dir"], "give --checkpoint RUN, or --predictions DIR"),
    (["--checkpoint", "run", "--image", "a.png"], "--image goes with --text"),
    (["--checkpoint", "run", "--text", "a ship"], "--text goes with --image"),
    (["--checkpoint", "run", "--tile", "512"], "--tile goes with --image"),
    (["--checkpoint", "run", "--side", "512"], "--side goes with --predictions"),
    (["--predictions", "dir", "--dataset", "synthetic", "--control", "shuffled"], "--control goes with --checkpoint"),
    (["--predictions", "dir", "--dataset", "synthetic", "--save-masks"], "--save-masks goes with --checkpoint"),
    (["--predictions", "dir", "--dataset", "synthetic", "--set", "a=1"], "--set goes with --checkpoint"),
    *((["--predictions", "dir", "--dataset", "synthetic", "--protocol", *words],
       "--predictions: --protocol resized goes with --side N, original goes without")
      for words in (["resized"], ["original", "--side", "9"])),
    (["--predictions", "dir", "--image", "a.png", "--text", "a ship"], "--image goes with --checkpoint"),
    (["--predictions", "dir"], "--dataset is needed: no run says which"),
    (["--model", "rs2sam2", "--checkpoint", "f"], "--dataset is needed: no run says which")])
def test_options_that_do_not_go_together(capsys, words, message):
    with pytest.raises(SystemExit):
        evaluate.arguments(words)
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_each_option_takes_what_it_should(monkeypatch, capsys):
    def parsed(*words):
        return evaluate.arguments(["--checkpoint", "run", *words])

    for option, least in (("micro-batch", 1), ("workers", 0), ("limit", 0), ("side", 1), ("tile", 1), ("overlap", 0)):
        beside = {"side": ["--predictions", "dir", "--dataset", "synthetic"], "tile": ["--image", "a", "--text", "b"]}
        start = beside["side"] if option == "side" else ["--checkpoint", "run", *beside.get(option, [])]
        assert getattr(evaluate.arguments([*start, f"--{option}={least}"]), option.replace("-", "_")) == least
        with pytest.raises(SystemExit):
            evaluate.arguments([*start, f"--{option}={least - 1}"])
        assert f"must be at least {least}" in capsys.readouterr().err
    for option in ("model", "device", "precision", "dataset", "protocol", "empty", "categories", "control"):
        with pytest.raises(SystemExit):
            parsed(f"--{option}", "other")
        assert f"--{option}: invalid choice: 'other'" in capsys.readouterr().err
    for option, values in (("device", "cpu cuda"), ("precision", "bf16 fp16 fp32"), ("protocol", "resized original"),
                           ("empty", "zero one skip"), ("categories", "all seen unseen"), ("control", "shuffled")):
        assert [getattr(parsed(f"--{option}", value), option) for value in values.split()] == values.split()
    args = parsed("--set", "a=1", "--set", "b=2", "c=3", "--data_root=x_y", "--save_masks", "-j", "3", "--refs", "u_v")
    assert (args.set, args.data_root, args.save_masks, args.workers, args.refs) == (
        ["a=1", "b=2", "c=3"], "x_y", True, 3, "u_v")
    args = parsed("--image", "a_b", "c", "--text", "d e", "f", "--small")
    assert (args.image, args.text, args.small, args.set, args.split) == (["a_b", "c"], ["d e", "f"], True, [], "test")
    for count, workers in ((1, 1), (3, 1), (6, 3), (64, 8)):            # half of the processors, eight at most
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert parsed().workers == workers
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "mine"])
    assert evaluate.arguments().checkpoint == "mine"
    assert parsed("--model", "icipnet", "--image", "a", "--text", "b").dataset is None


RUN = {"dataset": "rrsisd", "recipe": {"protocol": "resized", "empty": "zero", "precision": "bf16"}}


@pytest.mark.parametrize("trained, words, wanted", [
    ({}, "", {}),
    ({"data_root": "mine", "small": True, "limit": 9, "refs": "unc"}, "--limit 9",
     {"data_root": "mine", "small": True, "limit": 9, "refs": "unc"}),
    ({}, "--protocol original --empty one --small --limit 5 --refs umd --data-root other --set clip=2 pretrained=a "
     "weights_dir=b", {"recipe": ("original", "one"), "small": True, "limit": 5, "refs": "umd", "data_root": "other",
                       "changes": ["clip=2", "protocol=original", "empty=one", "small=True", "limit=5",
                                   "checkpoint=last", "refs=umd", "data_root=HERE/other"]}),
    ({"limit": 9}, "--protocol resized --empty zero --data-root ./data --categories seen --rows worst",
     {"categories": "seen", "rows": "worst", "data_root": "./data", "changes": ["limit=0"]}),
    ({}, "--dataset risbench --data-root other --refs umd --micro-batch 3 --workers 2 --control shuffled --save-masks "
     "--output out --precision fp16", {"dataset": "risbench", "data_root": "other", "refs": "umd", "micro_batch": 3,
                                       "workers": 2, "control": True, "save_masks": True, "output": "out",
                                       "prefix": ["risbench"], "precision": "fp16"}),
    ({"dataset": "synthetic"}, "--data-root other", {"dataset": "synthetic", "data_root": "other"})])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_asked_of_each_split(tmp_path, monkeypatch, capsys, trained, words, wanted, kind):
    """The run's own settings, what differs from them by name, and the recipe's precision on a card alone."""
    monkeypatch.chdir(tmp_path)
    args = evaluate.arguments(["--checkpoint", "run", "--split", "val,test", *words.split()])
    weights = "last" if "checkpoint=last" in wanted.get("changes", []) else None
    model, asked, looked = SimpleNamespace(tokenizer="words"), [], []
    monkeypatch.setattr(evaluate, "start_processes", lambda device: evaluate.Processes(0, 1, torch.device(kind)))
    monkeypatch.setattr(evaluate, "load_model", lambda args, device: (model, {**RUN, **trained}, "folder", weights))
    monkeypatch.setattr(evaluate, "score_split", lambda *words, **settings: asked.append((words, settings)) or {})
    monkeypatch.setattr(data, "split_names", lambda *words: looked.append(words) or words[1].split(","))
    monkeypatch.setattr(metrics, "rows", lambda summaries: f"a row each: {[*summaries]}")
    evaluate.main(args)
    assert capsys.readouterr().out == "a row each: ['val', 'test']\n"
    defaults = {"tokenizer": "words", "precision": "fp32" if kind == "cpu" else "bf16", "micro_batch": 32,
                "workers": args.workers, "control": False, "save_masks": False, "checkpoint": "run", "prefix": [],
                "changes": [], "output": "folder", "dataset": "rrsisd", "data_root": "data", "rows": "",
                "categories": "all", "limit": 0, "small": False, "refs": None, "recipe": ("resized", "zero")}
    defaults |= wanted
    defaults["changes"] = [one.replace("HERE", str(tmp_path)) for one in defaults["changes"]]
    assert looked == [(defaults["dataset"], "val,test", defaults["data_root"], defaults["refs"])]
    for (words, settings), split in zip(asked, ("val", "test"), strict=True):
        settings["recipe"] = (settings["recipe"]["protocol"], settings["recipe"]["empty"])
        assert words[0] is model and settings == {**defaults, "split": split}
    for rank, splits in ((1, "val,test"), (0, "val")):
        here = evaluate.Processes(rank, 2, ONE.device)
        monkeypatch.setattr(evaluate, "start_processes", lambda device, here=here: here)
        args.split = splits
        evaluate.main(args)
        assert capsys.readouterr().out == ""


def test_own_images_and_masks_of_others_take_their_options(tmp_path, monkeypatch):
    """Masks of others are scored by the first process alone."""
    asked = []
    for rank, kind in ((0, "cpu"), (1, "cuda")):
        monkeypatch.setattr(evaluate, "start_processes", lambda device, rank=rank, kind=kind: evaluate.Processes(
            rank, 2, torch.device(kind)))
        for name in ("segment_files", "score_predictions"):
            monkeypatch.setattr(evaluate, name, lambda *words, name=name: asked.append((name, *words)))
        monkeypatch.setattr(data, "split_names", lambda *words: list(words))
        words = ["--predictions", str(tmp_path), "--dataset", "refer", "--refs", "umd", "--rows", "worst"]
        for more in ([], ["--side", "8", "--empty", "skip", "--output", "out", "--small", "--limit", "3"]):
            evaluate.main(args := evaluate.arguments([*words, *more]))
            if rank == 0:
                selection = {"output": args.output or str(tmp_path), "dataset": "refer", "data_root": "data",
                             "rows": "worst", "categories": "all", "limit": args.limit, "small": bool(more),
                             "refs": "umd"}
                assert asked.pop() == ("score_predictions", args, ["refer", "test", "data", "umd"],
                                       "resized" if more else "original", "skip" if more else "zero", selection)
        assert not asked
        monkeypatch.setattr(evaluate, "load_model", lambda args, device: ("model", RUN, "folder", None))
        for more, output, precision in (([], "out", "bf16" if kind == "cuda" else "fp32"),
                                        (["--output", "there", "--precision", "fp16"], "there", "fp16")):
            evaluate.main(evaluate.arguments(["--checkpoint", "run", "--image", "a", "b", "--text", "c", "--tile", "64",
                                              "--overlap", "9", *more]))
            assert asked.pop() == ("segment_files", "model", ["a", "b"], ["c"], output, precision, 64, 9)
        monkeypatch.undo()


def test_which_weights_and_which_folder(tmp_path, monkeypatch):
    """Of the hub, the scores stand below runs/; weights that are not the usual ones of a run are named."""
    for name in ("best", "last"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    model, loaded = SimpleNamespace(run={"dataset": "rrsisd"}), []
    monkeypatch.setattr(models, "load", lambda *words: loaded.append(words) or model)
    monkeypatch.setattr(models, "run_settings", lambda run: ({}, tmp_path))
    for checkpoint, wanted in ((tmp_path, (tmp_path, None)), (tmp_path / "best.safetensors", (tmp_path, None)),
                               (tmp_path / "last.safetensors", (tmp_path, "last")),
                               ("org/name", (Path("runs/name"), None))):
        args = evaluate.arguments(["--checkpoint", str(checkpoint), "--set", "a=1"])
        assert evaluate.load_model(args, "cpu") == (model, model.run, *wanted)
        assert loaded.pop() == (str(checkpoint), ["a=1"], "cpu")


def test_options_have_the_defaults_that_their_help_names(capsys):
    args = evaluate.arguments(["--checkpoint", "run"])
    with pytest.raises(SystemExit):
        evaluate.arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (f"(default: {args.split})", f"at once (default: {args.micro_batch})", *evaluate.ROWS,
                 f"tiles (default: {args.overlap})", f"process (default: {args.workers})", "keep (default: all)",
                 "scoring a dataset:", "segmenting own images:", evaluate.__doc__.split("\n")[0]):
        assert part in text
    assert "notebook" not in text and not re.search(r"default: (None|False|0|\[\]|\))", text)
    assert (args.limit, args.categories, args.rows, args.small, args.save_masks) == (0, "all", "", False, False)
    assert (args.split, args.set, args.micro_batch) == ("test", [], 32)
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

    (tmp_path / "test-limit=24").mkdir()
    (tmp_path / "test-limit=24/sheet.png").write_bytes(b"of other scores")
    monkeypatch.setattr(metrics if fails == "table" else evaluate, fails, fail)
    with pytest.raises(RuntimeError):
        score(run, tmp_path)
    assert not (tmp_path / "test-limit=24/sheet.png").exists()
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
    toy.register()
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


def test_ctrl_c_amid_the_loaders_lines_leaves_no_queue_locked():
    """A queue that it leaves locked would hold up the end of the loader, and so of the program, for ever."""
    done = subprocess.run([sys.executable, "-c", f"""
import signal, sys; sys.path.insert(0, {str(ROOT)!r})
from multiprocessing.queues import Queue
import torch, data, evaluate
signal.signal(signal.SIGINT, signal.default_int_handler)
data.collate, put = list, Queue.put
def interrupted(self, *words):
    self._notempty.acquire(); signal.raise_signal(signal.SIGINT); self._notempty.release()
    put(self, *words)
with evaluate.one_line_errors():
    found = evaluate.batches([0] * 9, [[k] for k in range(9)], 1, torch.device("cpu"))
    print(next(found))
    Queue.put = interrupted
    print(list(found))
"""], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "[0]\n", "stopped\n")


def test_a_second_ctrl_c_does_not_wait_and_another_handler_keeps_its_say():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        reached = 0
        with pytest.raises(KeyboardInterrupt), evaluate.ctrl_c_waits():
            signal.raise_signal(signal.SIGINT)
            reached += 1
            signal.raise_signal(signal.SIGINT)
            reached += 1
        assert reached == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        heard = []
        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        with evaluate.ctrl_c_waits():
            signal.raise_signal(signal.SIGINT)
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


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


@pytest.mark.parametrize("fault, code, line", [
    (KeyboardInterrupt(), 130, "stopped\n"), (ValueError("no ship"), 1, "error: no ship\n"), (None, None, "")])
def test_how_the_program_ends(monkeypatch, capsys, fault, code, line):
    """A process group is left in any case; a terminal that cannot show a letter gets another."""
    left = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))
    with pytest.raises(SystemExit) if fault else contextlib.nullcontext() as stopped, evaluate.one_line_errors():
        assert sys.stdout.errors == sys.stderr.errors == "replace"
        if fault:
            raise fault
    assert (capsys.readouterr(), left) == (("", line), [True])
    assert not fault or stopped.value.code == code


def test_a_closed_output_is_found_at_the_end_and_stays_silent(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as stopped, evaluate.one_line_errors():
            closed.write("a line that waits for the end")
        assert stopped.value.code == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize("fault, message", [
    (lambda: int("three"), "Original Traceback(.|\n)*invalid literal for int"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "exited unexpectedly|is killed by signal")])
def test_a_fault_in_a_worker_keeps_its_traceback_but_no_worker(fault, message):
    """Workers that nobody ends wait for ever, and so does the program."""
    class Broken:
        def __getitem__(self, numbers):
            return fault()

    with pytest.raises((ValueError, RuntimeError), match=message) as kept:
        list(evaluate.batches(Broken(), [[(0,)], [(1,)]], workers=2, device=ONE.device))
    assert not multiprocessing.active_children() and kept.tb


def test_the_file_is_a_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "nowhere", "--device=cpu"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert capsys.readouterr().err == "error: --checkpoint nowhere: no such run folder or weights file\n"
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="evaluate")


def test_a_corrupt_image_ends_in_one_line_that_names_it(run, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as stopped, evaluate.one_line_errors():
        score(run, tmp_path / "out", "--image", str(broken), "--text", "a ship")
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1 and str(broken) in error


def test_an_error_in_a_loader_worker_arrives_as_one_line(capsys):
    class Broken:
        def __getitem__(self, numbers):
            raise ValueError("images/3.png is truncated; copy it again")

    with pytest.raises(SystemExit), evaluate.one_line_errors():
        list(evaluate.batches(Broken(), [[(0,)]], workers=1, device=ONE.device))
    assert capsys.readouterr().err == "error: images/3.png is truncated; copy it again\n"


def raised_in(file):
    exec(compile("raise ValueError('no ship')", ROOT / file, "exec"))


@pytest.mark.parametrize("fault", [lambda: np.zeros(3).reshape(2, 2), lambda: int("three"), lambda: json.loads("{"),
                                   lambda: [].index(1), lambda: {}["key"],
                                   lambda: raised_in(".venv/lib/python3/site-packages/numpy/core.py")])
def test_a_fault_of_ours_keeps_its_traceback(fault):
    with pytest.raises((ValueError, KeyError)), evaluate.one_line_errors():
        fault()


def test_what_the_system_or_a_missing_package_answers_is_one_line(tmp_path, capsys):
    def no_package():
        raise ModuleNotFoundError("masks stored as polygons need: pip install pycocotools")

    def no_folder():
        (tmp_path / "none" / "a").write_text("")

    for fault, line in ((no_folder, "No such file"), (no_package, "pip install"),
                        (lambda: raised_in("models/toy.py"), "no ship")):
        with pytest.raises(SystemExit) as stopped, evaluate.one_line_errors():
            fault()
        error = capsys.readouterr().err
        assert stopped.value.code == 1 and error.startswith("error: ") and line in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------ others' predictions


def score_files(folder, *words):
    evaluate.main(evaluate.arguments(["--predictions", str(folder), "--dataset", "synthetic", "--limit", "24", *words]))


@pytest.mark.parametrize("protocol, words", [("original", []), ("resized", ["--side", "32"])])
def test_masks_that_were_written_score_as_the_model_that_wrote_them(run, bars, tmp_path, protocol, words):
    score(run, tmp_path, "--protocol", protocol, "--save-masks")
    [folder] = tmp_path.iterdir()
    score_files(folder / "masks", *words, "--output", str(tmp_path / "again"))
    diagnosed = [{key: value for key, value in line.items() if key != "brightness"}
                 for line in metrics.read_records(folder)]
    again = tmp_path / "again/test"
    assert metrics.read_records(again) == diagnosed and (again / "sheet.png").is_file()
    one, two = (json.loads((place / "metrics.json").read_text()) for place in (folder, again))
    assert one["mIoU"] == two["mIoU"] and one["intervals"] == two["intervals"]
    assert [*two.items()][:9] == [
        ("dataset", "synthetic"), ("data_root", ""), ("split", "test"), ("subset", "all categories"),
        ("protocol", protocol), ("threshold", "255 of 0 and 255"), ("predictions", str(folder / "masks")),
        ("side", 32 if words else None), ("limit", 24)]
    assert [bar.said for bar in bars[-1:]] == [{"desc": "masks", "total": 24, "leave": False}]
    assert metrics.compare(metrics.read_records(folder), metrics.read_records(again))["wins"]["equal"] == 100
    args = evaluate.arguments(["--predictions", str(folder / "masks"), "--dataset", "synthetic", *words])
    sample = data.read("synthetic", "", "test", limit=24)[5]
    image, [truth] = data.load([sample])
    row, size = evaluate.file_row(args, sample), (32, 32) if words else (96, 96)
    assert (row["expression"], row["image"], row["maps"]) == (sample.expression, image, {})
    assert (row["truth"] == np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))).all()
    assert (row["prediction"] == (np.asarray(Image.open(folder / f"masks/{sample.id}.png")) == 255)).all()
    assert row["prediction"].shape == size and row["prediction"].dtype == bool


def test_the_splits_of_one_call_are_written_all_or_none(tmp_path, capsys):
    for split in ("val", "test"):
        for sample in data.read("synthetic", "", split, limit=24):
            Image.new("L", (96, 96), 255).save(tmp_path / f"{sample.id}.png")
    for name in "fbdace":
        (tmp_path / f"{name}.png").write_bytes(b"")
    missing = tmp_path / f"{data.read('synthetic', '', 'test', limit=1)[0].id}.png"
    kept = missing.read_bytes()
    missing.unlink()
    with pytest.raises(ValueError, match="1 of 48 predictions cannot be scored"):
        score_files(tmp_path, "--split", "val,test")
    assert not (tmp_path / "val").exists()
    listed = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if ".png" in line]
    assert listed == [f"{missing}: missing", *(f"{name}.png: no sample of val,test has this name" for name in "abcdef")]
    missing.write_bytes(kept)
    score_files(tmp_path, "--split", "val,test", "--empty", "one")
    for split in ("val", "test"):
        assert json.loads((tmp_path / split / "metrics.json").read_text())["empty"] == "one"


def test_predictions_that_cannot_be_scored_are_all_listed_and_nothing_is_written(tmp_path, capsys):
    names = [sample.id for sample in data.read("synthetic", "", "test", limit=24)]
    mask = np.zeros((96, 96), np.uint8)
    for name in names:
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    Image.fromarray(mask + 255).convert("1").save(tmp_path / f"{names[9]}.png")         # as good as 0 and 255
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
    args = evaluate.arguments(["--predictions", str(tmp_path), "--dataset", "synthetic"])
    for number, sample in enumerate(data.read("synthetic", "", "test", limit=24)[:5]):
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / names[number]}.png: ")):
            evaluate.file_row(args, sample)
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
        colour, mask = np.array([level, 255 - level, 7]), np.zeros((40, 40), bool)
        mask[10:30, 10:30] = True
        drawn = np.asarray(evaluate.outlined(Image.new("RGB", (40, 40), tuple(colour.tolist())), mask, (40, 40)))
        assert (drawn[10:30, 10] == 255).all() and (drawn[10:30, 9] == 0).all()        # white within, black around
        assert (drawn[11:29, 11:29] == colour).all() and (drawn[:9] == colour * 2 // 5).all()
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
    assert (colours[[0, 1, 3, 5, 6]] == [blue, blue, green, yellow, yellow]).all()
    assert np.abs(colours[[2, 4]] - [(blue + green) / 2, (green + yellow) / 2]).max() <= 1


def test_the_sheet_has_everything_in_its_place(tmp_path, monkeypatch):
    """Drawn again, item by item, at the places that our layout gives them in pixels."""
    font = ImageFont.load_default(13)
    images = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (32, 32, 3), dtype=np.uint8)) for k in range(2)]
    truth, prediction = np.zeros((2, 32, 32), bool)
    truth[4:20, 6:12], prediction[10:30, 20:28] = True, True
    ramp = np.linspace(0, 1, 32)[None].repeat(32, 0)
    rows = [{"expression": f"{k} " + "a ship " * 40, "image": image, "truth": truth, "prediction": prediction,
             "maps": {"coarse": ramp, "uncertainty": ramp.T}} for k, image in enumerate(images)]
    rows[1]["point"] = (0.25, 0.75)
    evaluate.sheet(rows, [0.125, None], tmp_path / "sheet.png")
    page = Image.new("RGB", (6 + 5 * 166, 42 + 2 * 188), "white")
    words = [((6, 5), "image"), ((172, 5), "truth"), ((338, 5), "prediction"), ((504, 5), "coarse"),
             ((670, 5), "uncertainty"), ((504, 21), "0"), ((656, 21), "1"), ((670, 21), "0"), ((822, 21), "1"),
             ((6, 42 + 163), f"IoU 0.12   {rows[0]['expression'][:200]}"),
             ((6, 230 + 163), f"IoU left out   {rows[1]['expression'][:200]}")]
    for place, text in words:
        ImageDraw.Draw(page).text(place, text, "black", font)
    for left in (518, 684):                                             # the scale, between its 0 and its 1
        page.paste(evaluate.shades(np.linspace(0, 1, 132)[None].repeat(8, 0)), (left, 26))
    for top, row in zip((42, 230), rows, strict=True):
        panels = [row["image"].resize((160, 160), Image.Resampling.BILINEAR)]
        panels += [evaluate.outlined(row["image"], mask, (160, 160)) for mask in (truth, prediction)]
        panels += [evaluate.shades(values).resize((160, 160), Image.Resampling.BILINEAR) for values in (ramp, ramp.T)]
        if "point" in row:
            ImageDraw.Draw(panels[2]).ellipse((36, 116, 44, 124), "yellow", "black", 2)
        for left, panel in zip((6, 172, 338, 504, 670), panels, strict=True):
            page.paste(panel, (left, top))
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == np.asarray(page)).all()
    evaluate.sheet([{**rows[0], "maps": {}}], [0.5], tmp_path / "narrow.png")
    assert Image.open(tmp_path / "narrow.png").size == (3 * 166 + 6, 42 + 188)
    evaluate.sheet([{**rows[0], "maps": {}}], [0.5], tmp_path / "small.png", cell=40)
    assert Image.open(tmp_path / "small.png").size == (480, 42 + 68)                    # room for the sentence


def with_outputs(monkeypatch, model, **changes):
    """The model with some outputs replaced: {name: a function of the shape of the logits}."""
    forward = model.forward

    def changed(*inputs):
        outputs = forward(*inputs)
        return outputs | {name: change(outputs["logits"].shape) for name, change in changes.items()}

    monkeypatch.setattr(model, "forward", changed)


def test_the_point_of_a_model_is_where_its_map_is_one(run, monkeypatch):
    def point(shape):
        result = torch.zeros(shape[0], 1, 8, 16)
        result[:, 0, 6, 3] = 1
        return result

    model = models.load(run)
    half = torch.where(torch.arange(32) < 16, 0.5, -0.5)
    with_outputs(monkeypatch, model, point=point, logits=lambda shape: half.expand(shape))
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
        got = re.escape(f"expected a uint8 array (H,W,3), got {wrong.dtype} {wrong.shape}; a path or a PIL image may")
        with pytest.raises(ValueError, match=got):
            evaluate.predict(model, wrong, "a ship")
    for empty in ([], "", ["a ship", " "]):
        with pytest.raises(ValueError, match="expression is empty"):
            evaluate.predict(model, photo, empty)
    for nothing in (None, [3], 3, {"a ship"}):
        with pytest.raises(ValueError, match="expected a sentence or a list of sentences, got"):
            evaluate.predict(model, photo, nothing)
        with pytest.raises(ValueError, match=re.escape(f"expected a uint8 array (H,W,3), got {nothing!r}; a path")):
            evaluate.predict(model, nothing, "a ship")
    with pytest.raises(ValueError, match="is a folder"):
        evaluate.predict(model, tmp_path, "a ship")


def test_what_makes_a_mask_doubtful_is_said(run, capsys):
    """A published tokenizer knows parts of any word."""
    model = models.load(run)
    assert evaluate.unknown("xyzzy", model.tokenizer) and not evaluate.unknown("xyzzy", SimpleNamespace())
    evaluate.predict(model, Image.new("RGB", (256, 100)), ["the ship", "xyzzy plugh", "a plugh"])
    assert capsys.readouterr().err == "the model knows no word of 'xyzzy plugh': its mask means nothing\n"
    evaluate.predict(model, Image.new("RGB", (100, 1280)), "the ship")
    assert capsys.readouterr().err.startswith("100x1280 is squashed by a factor of 40 to the model's square")
    evaluate.predict(model, Image.new("RGB", (100, 1280)), "the ship", tile=640)
    assert "squashed" not in capsys.readouterr().err


def test_zero_is_background_and_precision_reaches_the_model(run, photo, monkeypatch):
    model = models.load(run)
    with_outputs(monkeypatch, model, logits=torch.zeros)
    found = evaluate.predict(model, photo, ["a ship", "a car"])
    assert not found["masks"].any() and (found["probs"] == 0.5).all()
    [row] = evaluate.sheet_rows(model, data.read("synthetic", "", "val", limit=1), model.tokenizer, ONE.device, "fp32")
    assert not row["prediction"].any()
    with_outputs(monkeypatch, model, logits=lambda shape: torch.tensor([1.0, math.nan]).view(2, 1, 1, 1).expand(shape))
    with pytest.raises(ValueError, match="^'a car': the model's output is not finite"):
        evaluate.predict(model, photo, ["a ship", "a car"])
    monkeypatch.setattr(evaluate, "forward", lambda model, batch, device, precision: {}[precision])
    for words, wanted in (((), "fp32"), (("bf16",), "bf16")):
        with pytest.raises(KeyError, match=wanted):
            evaluate.predict(model, photo, "a ship", *words)
    samples = data.read("synthetic", "", "val", limit=1)
    with pytest.raises(KeyError, match="fp16"):
        evaluate.sheet_rows(model, samples, model.tokenizer, ONE.device, "fp16")
    for words, wanted in (({}, "fp32"), ({"precision": "bf16"}, "bf16")):
        with pytest.raises(KeyError, match=wanted):
            evaluate.evaluate(model, samples, ONE, tokenizer=model.tokenizer, protocol="resized", workers=0, **words)


def test_what_may_be_given_as_a_picture_and_how_large_it_is(run, photo, capsys):
    model = models.load(run)
    wanted = evaluate.predict(model, photo, "the ship")["masks"]
    for same in (str(photo), Image.open(photo), np.array(Image.open(photo))):
        assert (evaluate.predict(model, same, ("the ship",))["masks"] == wanted).all()
    capsys.readouterr()
    for size, squashed in (((256, 20), False), ((20, 257), True)):                      # eight times the model's 32
        evaluate.predict(model, Image.new("RGB", size), "the ship")
        assert ("squashed by a factor of 8" in capsys.readouterr().err) == squashed
    assert evaluate.predict(model, Image.new("RGB", (300, 20)), "the ship", tile=4, overlap=0).keys() == {"masks"}
    assert capsys.readouterr().err.count("squashed") == 0


def test_what_is_written_for_an_image(run, tmp_path, capsys):
    """Every kind of file that a folder is searched for; an overlay has 2,048 pixels at most, one at least."""
    (tmp_path / "in").mkdir()
    kinds = ["bmp", "jp2", "jpeg", "jpg", "png", "tif", "tiff", "webp"]
    for kind in kinds:
        Image.new("RGB", (5, 4)).save(tmp_path / f"in/{kind}.{kind.upper()}", "PNG")
    score(run, tmp_path / "a/b", "--image", str(tmp_path / "in"), "--text", "the ship")
    assert {path.name for path in (tmp_path / "a/b").iterdir()} == {
        f"{kind}-{what}.png" for kind in kinds for what in ("mask", "overlay", "coarse")}
    printed = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in printed] == [str(tmp_path / f"a/b/{kind}-mask.png") for kind in kinds]
    assert re.fullmatch(rf"\d+\.\d% of {tmp_path}/in/bmp\.BMP: the ship", printed[0][1])
    Image.effect_noise((4096, 1), 90).convert("RGB").save(tmp_path / "long.png")
    score(run, tmp_path, "--image", str(tmp_path / "long.png"), "--text", "the ship", "a car")
    model, image = models.load(run), Image.open(tmp_path / "long.png")
    found = evaluate.predict(model, image, ["the ship", "a car"])
    for k in range(2):
        for name, wanted in (("mask", Image.fromarray(found["masks"][k]).convert("L")),
                             ("coarse", evaluate.shades(found["coarse"][k])),
                             ("overlay", evaluate.outlined(image, found["masks"][k], (2048, 1)))):
            written = Image.open(tmp_path / f"long-{k + 1}-{name}.png")
            assert written.size == wanted.size and (np.asarray(written) == np.asarray(wanted)).all()


# ------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("tile, overlap, wanted", [
    (6, 2, [(0, [1, 1, 1, 1, 2 / 3, 1 / 3]), (4, [1 / 3, 2 / 3, 1, 1, 1, 1])]),
    (5, 0, [(0, [1] * 5), (5, [1] * 5)]),
    (4, 1, [(0, [1, 1, 1, 0.5]), (3, [0.5, 1, 1, 0.5]), (6, [0.5, 1, 1, 1])]),
    (10, 9, [(0, [1] * 10)]), (40, 20, [(0, [1] * 10)])])
def test_windows_by_hand(tile, overlap, wanted):
    """Ten pixels: as few tiles as cover them, evenly spread, ramps of `overlap` pixels where two meet."""
    found = evaluate.windows(10, tile, overlap)
    assert [start for start, _ in found] == [start for start, _ in wanted]
    for (_, weights), (_, expected) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(weights, expected, rtol=1e-6)
        assert weights.dtype == np.float32
    assert [start for start, _ in evaluate.windows(100, 30, 10)] == [0, 18, 35, 52, 70]     # 17.5 k, to even


def test_progress_of_tiles(run, bars):
    model = models.load(run)
    evaluate.predict(model, Image.new("RGB", (150, 100)), "the ship", tile=64, overlap=16)
    evaluate.predict(model, Image.new("RGB", (150, 100)), "the ship")
    assert [bar.said for bar in bars] == [
        {"desc": "tiles", "total": 2 * 3, "disable": False, "leave": False, "steps": 6},
        {"desc": "tiles", "total": 1, "disable": True, "leave": False, "steps": 1}]


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
    tags.tagtype |= {33550: 12, 33922: 12, 34264: 12, 34735: 3, 34736: 12, 34737: 2, 305: 2}
    values = {33550: (0.5, 0.5, 0.0), 33922: (0.0, 0.0, 0.0, 354000.0, 5812000.0, 0.0),
              34735: (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), 34736: (6378137.0, 298.257223563),
              34264: tuple(map(float, range(16))), 34737: "WGS 84 / UTM zone 33N|", 305: "not of the map"}
    for tag, value in values.items():
        tags[tag] = value
    source = tmp_path / "aerial.tif"
    Image.open(photo).save(source, tiffinfo=tags)
    score(run, tmp_path / "out", "--image", str(source), "--text", "the red ship")
    with Image.open(source) as image, Image.open(tmp_path / "out/aerial-mask.tif") as mask:
        assert mask.size == image.size and mask.mode == "L"
        assert 305 in image.tag_v2 and 305 not in mask.tag_v2
        for tag in values.keys() - {305}:
            assert mask.tag_v2[tag] == image.tag_v2[tag] == values[tag], tag
            assert mask.tag_v2.tagtype[tag] == image.tag_v2.tagtype[tag], tag
    score(run, tmp_path / "tiled", "--image", str(source), "--text", "the red ship", "--tile", "64", "--overlap", "8")
    with Image.open(tmp_path / "tiled/aerial-mask.tif") as mask:
        assert mask.size == (131, 77) and mask.tag_v2[33922] == values[33922]
    Image.open(photo).save(tmp_path / "plain.tif")
    score(run, tmp_path / "out", "--image", str(tmp_path / "plain.tif"), "--text", "the red ship")
    assert (tmp_path / "out/plain-mask.png").is_file()
