"""train.py: settings, schedules, resume bit for bit, stops, several processes, wrong input. On the toy paper."""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import layouts
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import toy
import transformers

import data
import evaluate
import losses
import metrics
import models
import train

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("seconds", "images_per_second", "peak_gib")
ONE = evaluate.Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def known():
    """The toy, for this test; how many threads torch takes is left as it was."""
    toy.register()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    models.PAPERS.pop("toy")


def main(monkeypatch, *words):
    """The program, in this process; torch is left as it was."""
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic
    before = fill.fill_uninitialized_memory
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    try:
        train.main()
    finally:
        torch.use_deterministic_algorithms(deterministic)
        fill.fill_uninitialized_memory = before


def options(output, *words):
    return train.arguments(["--model", "toy", "--device", "cpu", "--workers", "0", "--limit", "60",
                            "--output", str(output), *words])


def run_to_end(output, *words):
    train.train(options(output, *words), ONE)


def state_of(output):
    return torch.load(output / "resume.pt", weights_only=True)


def assert_same(a, b, path=""):
    """Equal to the bit, through dicts and lists; wall-clock seconds aside."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "log_length"):
                assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{k}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def log_of(output):
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


# -------------------------------------------------------------------------------------------------- settings, schedule


def test_precedence_is_recipe_then_preset_then_ablation_then_command_line(tmp_path):
    def settled(*words):
        return train.settle(train.arguments(["--model", "toy", "--output", str(tmp_path), *words]))[:2]

    assert settled("--dataset", "rrsisd")[1]["lr"] == 2e-2                                  # RECIPE_FOR
    assert [settled("--dataset", name)[0].width for name in ("rrsisd", "risbench")] == [9, 8]
    assert "width" not in settled("--dataset", "rrsisd")[1]
    assert settled("--dataset", "rrsisd", "--preset", "tiny")[1]["per_image"] == 2          # RECIPE_TINY instead
    assert settled("--dataset", "rrsisd", "--preset", "tiny")[1]["lr"] == 1e-2
    assert settled()[1]["per_image"] == 2                                                   # synthetic means tiny
    config, recipe = settled("--dataset", "rrsisd", "--ablation", "1/slow")
    assert recipe["lr"] == 1e-4
    assert settled("--ablation", "1/slow", "--lr", "3e-4")[1]["lr"] == 3e-4
    assert settled("--ablation", "1/wide")[0].width == 12
    assert settled("--ablation", "1/wide", "--set", "width=5", "clip=0.5") == (
        toy.Config(width=5), {**toy.RECIPE, **toy.RECIPE_TINY, "clip": 0.5})


def test_a_second_set_adds_to_the_first(tmp_path):
    args = train.arguments(["--model", "toy", "--set", "width=5", "--epochs", "3", "--set", "clip=0.5", "dropout=0.3"])
    config, recipe, asked = train.settle(args)
    assert (config.width, config.dropout, recipe["clip"], recipe["epochs"]) == (5, 0.3, 0.5, 3)
    assert asked == {"width", "dropout", "clip", "epochs"}


def test_run_folder_is_named_by_what_is_trained():
    for words, folder in (([], "toy-synthetic"), (["--preset", "paper"], "toy-synthetic-paper"),
                          (["--dataset", "rrsisd"], "toy-rrsisd"),
                          (["--dataset", "rrsisd", "--preset", "tiny", "--ablation", "1/wide"],
                           "toy-rrsisd-tiny-1_wide")):
        assert train.arguments(["--model", "toy", *words]).output == Path("runs") / folder


@pytest.mark.parametrize("words", [["--limit", "-1"], ["--epochs", "0"], ["--save-every", "-1"], ["-j", "-1"]])
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        train.arguments(["--model", "toy", *words])
    assert "must be at least" in capsys.readouterr().err


def test_underscores_are_taken_for_hyphens(tmp_path):
    assert train.arguments(["--batch_size", "4", "--weight_decay=0.1"]).batch_size == 4


def test_options_left_out_are_these(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    asked = vars(train.arguments([]))
    assert asked == {
        "model": "crobim_u", "dataset": "synthetic", "data_root": "data", "refs": None, "categories": "all",
        "small": False, "preset": "tiny", "ablation": None, "list_ablations": False, "set": [], "epochs": None,
        "batch_size": None, "micro_batch": None, "lr": None, "weight_decay": None, "precision": None, "limit": 0,
        "device": None, "workers": 3, "seed": 0, "output": Path("runs/crobim_u-synthetic"), "save_every": 0,
        "tensorboard": False, "plan": False, "start": None, "checkpoint": None, "resume": False, "overwrite": False}


def test_every_option_is_taken():
    words = ["--model", "toy", "--dataset", "refer", "--data-root", "D", "--refs", "R", "--categories", "seen",
             "--small", "--preset", "tiny", "--ablation", "1/slow", "--list-ablations", "--set", "a=1", "b=2",
             "--epochs", "3", "-b", "4", "--micro-batch", "2", "--lr", "0.5", "--weight-decay", "0.25",
             "--precision", "bf16", "--limit", "9", "--device", "cpu", "-j", "5", "--seed", "7", "--output", "O",
             "--save-every", "6", "--tensorboard", "--plan", "--start", "S", "--resume"]
    assert vars(train.arguments(words)) == {
        "model": "toy", "dataset": "refer", "data_root": "D", "refs": "R", "categories": "seen", "small": True,
        "preset": "tiny", "ablation": "1/slow", "list_ablations": True, "set": ["a=1", "b=2"], "epochs": 3,
        "batch_size": 4, "micro_batch": 2, "lr": 0.5, "weight_decay": 0.25, "precision": "bf16", "limit": 9,
        "device": "cpu", "workers": 5, "seed": 7, "output": Path("O"), "save_every": 6, "tensorboard": True,
        "plan": True, "start": "S", "checkpoint": None, "resume": True, "overwrite": False}
    assert train.arguments(["--model", "toy", "--overwrite"]).overwrite


def test_the_help_names_groups_options_values_and_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    with pytest.raises(SystemExit):
        train.arguments(["--help"])
    _, said, _, *groups = (text := capsys.readouterr().out).split("\n\n")
    assert said == train.__doc__.split("\n")[0]
    named = {lines[0]: [re.sub("^(-.) N, ", r"\1, ", re.split("  +", line.strip())[0])     # as Python 3.13 has it
                        for line in lines[1:] if line.startswith("  -")] for lines in map(str.splitlines, groups)}
    assert named == {
        "what to train:": [
            f"--model {{{','.join(models.PAPERS)}}}", f"--dataset {{{','.join(data.DATASETS)}}}", "--data-root DIR",
            "--refs NAME", "--categories {all,seen}", "--small", "--preset {paper,tiny}", "--ablation TABLE/ROW",
            "--list-ablations", "--set FIELD=VALUE [FIELD=VALUE ...]"],
        "how (defaults: the recipe's):": [
            "--epochs N", "-b, --batch-size N", "--micro-batch N", "--lr X", "--weight-decay X",
            f"--precision {{{','.join(evaluate.PRECISIONS)}}}", "--limit N"],
        "where:": [
            "--device {cpu,cuda}", "-j, --workers N", "--seed N", "--output DIR", "--save-every N", "--tensorboard",
            "--plan", "--start RUN|FILE", "--resume [{auto}]", "--overwrite"]}
    defaults = re.findall(r"\(default: ([^\s)]+)", text)
    assert defaults == ["crobim_u", "synthetic", "data", "all", "3", "runs/MODEL-DATASET,"]


@pytest.mark.parametrize("words", [
    ["--resume", "--overwrite"], ["--resume", "yes"], ["--model", "none"], ["--dataset", "none"], ["--preset", "small"],
    ["--categories", "unseen"], ["--precision", "fp64"], ["--device", "tpu"], ["--batch-size", "0"],
    ["--micro-batch", "0"], ["--lr", "much"], ["--seed", "x"]])
def test_options_take_no_other_word(words, capsys):
    with pytest.raises(SystemExit):
        train.arguments(words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("cores, workers", [(1, 1), (2, 1), (6, 3), (64, 8)])
def test_half_the_cores_load(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert train.arguments([]).workers == workers


@pytest.mark.parametrize("device, words, precision", [
    ("cpu", [], "fp32"), ("cuda", [], "bf16"), ("cuda", ["--precision", "fp16"], "fp16"),
    ("cpu", ["--precision", "fp16"], "fp16")])
def test_precision_is_the_recipes_on_a_card_alone(tmp_path, device, words, precision):
    args = options(tmp_path / "run", "--set", "precision=bf16", "--seed", "3", *words)
    job = train.begin(args, evaluate.Processes(0, 2, torch.device(device)))
    assert job.args.precision == precision
    assert (job.sampler.seed, job.sampler.world, job.select) == (3, 2, "mIoU")
    assert [sample.split for sample in job.samples + job.validation] == 60 * ["train"] + 60 * ["val"]


def test_factor_of_each_schedule():
    poly = {"epochs": 4, "schedule": "poly", "power": 0.9}
    assert train.factor(poly, 0, 40) == 1
    assert train.factor(poly, 30, 40) == pytest.approx(0.25 ** 0.9)
    cosine = {"epochs": 4, "schedule": "cosine", "warmup": 1}
    assert train.factor(cosine, 0, 40) == pytest.approx(0.1)
    plain = {"epochs": 4, "schedule": "cosine"}                             # neither warm-up nor plateau nor floor
    for k in (0, 1, 10, 39):
        assert train.factor(plain, k, 40) == pytest.approx(0.5 * (1 + math.cos(math.pi * k / 40)))
        assert train.factor({"epochs": 4, "schedule": "poly"}, k, 40) == pytest.approx((1 - k / 40) ** 0.9)
    short = [train.factor({**cosine, "epochs": 40, "warmup": 0.5}, step, 40) for step in range(3)]
    assert short[0] == 1 and short == sorted(short, reverse=True)          # a warm-up shorter than a step
    assert train.factor(cosine, 9, 40) == 1
    assert train.factor(cosine, 25, 40) == pytest.approx(0.5)
    assert train.factor(cosine, 39, 40) == pytest.approx(0.5 * (1 + math.cos(math.pi * 29 / 30)))
    official = {"epochs": 4, "schedule": "cosine", "warmup": 1, "plateau": 2, "t_max": 1.3, "floor": 0.1}
    assert [train.factor(official, k, 40) for k in (4, 12, 20)] == [0.5, 1.0, 1.0]
    assert train.factor(official, 39, 40) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 52)))
    late = {**cosine, "warmup": 0, "plateau": 3.85}                 # ends within the last epoch, before its last step
    assert train.factor(late, 39, 40) == pytest.approx(0.5 * (1 + math.cos(math.pi / 3)))
    assert train.factor({**late, "plateau": 4}, 39, 40) == 1
    assert train.factor({**poly, "warmup": 1}, 4, 40) == 0.5
    assert train.factor({**poly, "warmup": 1}, 10, 40) == pytest.approx(0.75 ** 0.9)
    assert train.factor({"epochs": 4, "schedule": "poly"}, 20, 40) == pytest.approx(0.5 ** 0.9)     # LAVT's power
    step = {"epochs": 4, "schedule": "step", "drop_epochs": 1, "drop_factor": 0.1}
    assert [train.factor(step, k, 40) for k in (29, 30)] == [1.0, 0.1]
    assert train.factor({"epochs": 4, "schedule": "constant"}, 39, 40) == 1
    with pytest.raises(ValueError, match="there are poly, cosine"):
        models.check_recipe({"epochs": 4, "schedule": "linear"})
    assert set(models.CHOICES["empty"]) == set(metrics.EMPTY)
    assert set(models.CHOICES["precision"]) == set(evaluate.PRECISIONS)


def test_phases_of_a_model_that_has_none_are_refused():
    job = SimpleNamespace(recipe={"epochs": 2, "phases": {"first": 1.0}}, processes=ONE,
                          args=SimpleNamespace(model="plain"))
    with pytest.raises(ValueError, match="plain has none; say --set phases=none"):
        train.start_phase(job, train.Learner(torch.nn.Linear(1, 1), None, None, None), 0)


def test_data_without_val_and_test_keep_the_last_epoch_and_say_that_nothing_is_scored(tmp_path, capsys):
    layouts.write("custom", tmp_path / "data", splits={"train": 3})
    run_to_end(tmp_path / "run", "--dataset", "custom", "--data-root", str(tmp_path / "data"), "--preset", "tiny",
               "--epochs", "1", "--batch-size", "4")
    out = capsys.readouterr().out
    assert "kept by the last epoch, folder" in out
    assert "nothing is scored: the data have neither a test nor a val split" in out
    assert not (tmp_path / "run/test").exists() and not (tmp_path / "run/best.safetensors").exists()


def test_phases_begin_with_an_epoch():
    assert train.phase_starts({"epochs": 50, "phases": {"first": 0.4, "both": 0.6}}) == {0: "first", 20: "both"}
    assert train.phase_starts({"epochs": 72, "phases": {"first": 0.15, "both": 0.85}}) == {0: "first", 11: "both"}
    assert train.phase_starts({"epochs": 5, "phases": None}) == {}


# ------------------------------------------------------------------------------------------------------ run and resume


def test_a_run_leaves_its_folder_and_its_numbers_can_be_recomputed(tmp_path, capsys):
    run_to_end(tmp_path / "run")
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert there == {"config.json", "resume.pt", "best.safetensors", "last.safetensors", "tokenizer.json", "log.jsonl",
                     "test", "test-shuffled"}
    assert all("val_brightness" in line for line in log_of(tmp_path / "run"))               # the toy's diagnostic
    for split in ("test", "test-shuffled"):
        folder = tmp_path / "run" / split
        assert {path.name for path in folder.iterdir()} == {"metrics.json", "per_sample.jsonl", "sheet.png"}
        written = json.loads((folder / "metrics.json").read_text())
        again = metrics.summarize(metrics.read_records(folder / "per_sample.jsonl"))
        assert {key: written[key] for key in again} == json.loads(json.dumps(again))
        assert written["split"] == split and written["samples"] == 60
    assert len(log_of(tmp_path / "run")) == 2
    printed = capsys.readouterr().out
    assert "oIoU (cIoU)" in printed and "control, every image with another image's sentences" in printed
    assert models.load(tmp_path / "run").tokenizer(["the ship"])[0].shape == (1, 12)


class StopAt(train.StopRequest):
    """Asks to stop once `steps` steps have asked."""

    steps = 3

    count = 0

    @property
    def asked(self):
        self.count += 1
        return self.count if self.count >= self.steps else None


@pytest.mark.parametrize("steps", [2, 4], ids=["in mid-epoch", "at the end of an epoch"])
@pytest.mark.parametrize("settings", [
    ("dropout=0.3", "batch_norm=True"), ("phases={'first': 0.5, 'both': 0.5}",)], ids=["plain", "phases"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch, steps, settings):
    words = ("--epochs", "4", "--set", "batch_size=4", "micro_batch=2", *settings)
    run_to_end(tmp_path / "whole", *words)
    for round_, at in enumerate((steps, steps + 1)):               # stopped twice, in either phase
        monkeypatch.setattr(StopAt, "steps", at)
        monkeypatch.setattr(train, "StopRequest", StopAt)
        where = "" if round_ else {2: "step 2 of epoch 1", 4: "epoch 1"}[at]
        with pytest.raises(train.Stopped, match=f"^stopped after {where}.*; go on with --resume$"):
            run_to_end(tmp_path / "parts", *words, *(["--resume"] if round_ else []))
    monkeypatch.undo()
    torch.manual_seed(12345)                                        # whatever state the process is in
    run_to_end(tmp_path / "parts", *words, "--resume")
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    for file in ("best.safetensors", "last.safetensors"):
        whole, parts = (models.read_weights(tmp_path / name / file) for name in ("whole", "parts"))
        assert_same(whole, parts, file)
    files = [tmp_path / name / "test/per_sample.jsonl" for name in ("whole", "parts")]
    assert files[0].read_text() == files[1].read_text()


def test_log_written_after_the_commit_point_is_cut(tmp_path, capsys):
    run_to_end(tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_text()
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "half a li')
    run_to_end(tmp_path / "run", "--resume")
    assert (tmp_path / "run" / "log.jsonl").read_text() == before and "has lost lines" not in capsys.readouterr().out


def test_rates_progress_and_means_of_a_run(tmp_path, monkeypatch):
    """What the log has is the mean over expressions; rate and progress are those of the step among all steps."""
    seen, saves, real, real_save = [], [], toy.Toy.criterion, train.save_resume

    def watched(self, outputs, batch, progress):
        terms = real(self, outputs, batch, progress)
        seen.append((progress, terms["seg"].item(), len(batch["samples"])))
        return {**terms, "half": terms["seg"] / 2}

    def saved(job, learner, position, random):
        saves.append((position["epoch"], position["step"], dict(learner.optimizer.param_groups[0])))
        real_save(job, learner, position, random)

    def agreed(processes, flags, sums):
        assert not any(value.requires_grad for value in sums.values())      # else they keep the step's graph
        return real_agree(processes, flags, sums)

    real_agree = train.agree
    monkeypatch.setattr(toy.Toy, "criterion", watched)
    monkeypatch.setattr(train, "agree", agreed)
    monkeypatch.setattr(train, "save_resume", saved)
    run_to_end(tmp_path / "run", "--set", "batch_size=5", "micro_batch=5", "--save-every", "2", "--weight-decay", "0.3")
    steps = len(seen) // 2
    assert steps == 3 and [progress for progress, _, _ in seen] == [k / 6 for k in range(6)]
    # within an epoch, before its validation, after it
    assert [save[:2] for save in saves] == [(0, 2), (0, 3), (1, 0), (1, 2), (1, 3), (2, 0)]
    for k, (epoch, step, group) in zip((1, 2, 2, 4, 5, 5), saves, strict=True):
        assert group["lr"] == pytest.approx(1e-2 * (1 - k / 6) ** 0.9), (epoch, step)
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.3)
    for epoch, line in enumerate(log_of(tmp_path / "run")):
        part = seen[epoch * steps:(epoch + 1) * steps]
        mean = sum(value * count for _, value, count in part) / sum(count for _, _, count in part)
        assert len({count for _, _, count in part}) > 1
        assert (line["seg"], line["half"], line["loss"]) == pytest.approx((mean, mean / 2, 1.5 * mean), rel=1e-5)


@pytest.mark.parametrize("refs, line", [
    ("refcoco", "groups   2 expressions of each image, masked repeats where it has fewer"),
    ("rrsisd", "groups   none, one expression per image: instance contrastive learning (ICL) is off")])
def test_groups_are_said_where_there_are_any(tmp_path, capsys, refs, line):
    layouts.write(refs, tmp_path / "data", splits={"train": 4, "val": 1})
    for share, said in ((0.5, [line]), (0.0, [])):
        job = train.begin(train.arguments([
            "--model", "toy", "--dataset", refs, "--data-root", str(tmp_path / "data"), "--preset", "tiny",
            "--output", str(tmp_path / "run"), "--batch-size", "4", "--set", f"repeat_mask={share}"]), ONE)
        train.print_settings(job, train.build(job).model)
        assert [one for one in capsys.readouterr().out.splitlines() if one.startswith("groups")] == said


def test_the_settings_of_a_run_are_said(tmp_path, capsys):
    job = train.begin(options(tmp_path / "run", "--seed", "3", "--micro-batch", "4", "--set", "text_length=3",
                              "select=last"), evaluate.Processes(0, 2, ONE.device))
    learns, stays = (torch.nn.Linear(1000, width, bias=False) for width in (1230, 2220))
    capsys.readouterr()
    train.print_settings(job, torch.nn.Sequential(learns, stays.requires_grad_(False)))
    micros, cut = len(job.sampler.plan(0, 0)[0]), sum(len(data.words(one.expression)) > 3 for one in job.samples)
    assert micros == 1 and 0 < cut < 60
    assert capsys.readouterr().out.splitlines() == [
        "toy (tiny) on synthetic: 3.45 M parameters, 1.23 M learn",
        f"data     60 training and 60 validation expressions; an epoch has {job.sampler.steps} steps of 8 expressions: "
        f"2 process(es) x {micros} micro-batch(es)", f"text     {cut} of 60 sentences are longer than 3 tokens and are "
        "cut", f"run      cpu, fp32, seed 3, kept by the last epoch, folder {tmp_path / 'run'}"]


def test_what_a_run_shows_is_what_its_log_holds(tmp_path, monkeypatch, capsys):
    bars, steps = [], []

    class Bar(train.tqdm):
        def __init__(self, *args, **options):
            bars.append((list(args[0]), args[1], options))
            super().__init__(*args, **options)

        def set_postfix(self, shown, refresh):
            assert not refresh                                      # the bar itself knows how often
            steps.append(shown)

    real = train.train_step
    monkeypatch.setattr(train, "tqdm", Bar)
    monkeypatch.setattr(train, "train_step", lambda *given: taken.append(real(*given)) or taken[-1])
    taken = []
    run_to_end(tmp_path / "run", "--epochs", "2", "--set", "batch_size=4", "dropout=0", "--seed", "3", "--lr", "0.5")
    monkeypatch.undo()
    toy.register()
    options = {"initial": 0, "total": 3, "disable": False, "leave": False}
    assert bars == [([0, 1, 2], "epoch 1/2", options), ([0, 1, 2], "epoch 2/2", options)]
    for k, (shown, (totals, count, _)) in enumerate(zip(steps, taken, strict=True)):
        assert shown["loss"] == totals["loss"] / count["expressions"]
        assert shown["rate"] == pytest.approx(0.5 * (1 - k / 6) ** 0.9) and shown["images_per_second"] > 0
    said, lines = capsys.readouterr().out.splitlines(), log_of(tmp_path / "run")
    epochs = [line for line in said if line.startswith("epoch ")]
    for epoch, (line, entry) in enumerate(zip(epochs, lines, strict=True), 1):
        assert re.sub(r"\d+ s(?=  |$)", "N s", line) == "  ".join([
            f"epoch {epoch}/2", f"loss {entry['loss']:.3f}", f"val_oIoU {entry['val_oIoU']:.2f}",
            f"val_mIoU {entry['val_mIoU']:.2f}", "N s", *(["best"] if entry["best"] else [])])
        assert {"seg", "loss", "lr", "val_oIoU", "val_mIoU", "val_brightness", "best"} < entry.keys()
        mean = sum(totals["loss"] for totals, _, _ in taken[3 * epoch - 3:3 * epoch]) / sum(
            count["expressions"] for _, count, _ in taken[3 * epoch - 3:3 * epoch])
        assert entry["loss"] == pytest.approx(mean) and entry["epoch"] == epoch
    begun = json.loads((tmp_path / "run/config.json").read_text())
    begun["config"]["vocab_size"] = toy.Config.vocab_size           # the words are not read yet
    for line, part in zip(said, ("config", "recipe"), strict=False):
        assert line == f"{part}   " + "  ".join(f"{key}={value}" for key, value in begun[part].items())
    assert said[2] == "toy (tiny) on synthetic: 0.00 M parameters, 0.00 M learn"
    assert said[3] == ("data     60 training and 60 validation expressions; an epoch has 3 steps of 4 expressions: "
                       "1 process(es) x 1 micro-batch(es)")
    assert said[4] == f"run      cpu, fp32, seed 3, kept by validation mIoU, folder {tmp_path / 'run'}"
    assert said[-1] == f"run folder: {tmp_path / 'run'}"


@pytest.mark.parametrize("told", [True, False], ids=["", "of before there were such options"])
def test_epochs_draw_anew_and_seeds_apart(tmp_path, monkeypatch, told):
    """Synthetic scenes are others in every epoch; what is drawn for an image depends on seed and epoch."""
    seen, real = [], data.ReferringDataset.__init__

    def watched(self, samples, *args, **options):
        if "draw" in options:
            seen.append((options["draw"], [sample.id for sample in samples], options["repeat_mask"],
                         options["black_boxes"]))
        real(self, samples, *args, **options)

    monkeypatch.setattr(data.ReferringDataset, "__init__", watched)
    for name in () if told else ("repeat_mask", "black_boxes"):
        monkeypatch.delitem(toy.RECIPE, name)
    run_to_end(tmp_path / "run", "--seed", "5", *(["--set", "repeat_mask=0.5", "black_boxes=0.25"] if told else []))
    shares = [0.5, 0.25] if told else [0, 0]
    assert [(draw, *of_recipe) for draw, _, *of_recipe in seen] == [((5, 0), *shares), ((5, 1), *shares)]
    assert [ids for _, ids, *_ in seen] == [
        [sample.id for sample in data.read("synthetic", "", "train", limit=60, epoch=epoch)] for epoch in (0, 1)]


def prepared(output, *words):
    job = train.begin(options(output, *words), ONE)
    learner = train.build(job)
    dataset = data.ReferringDataset(job.samples, job.config.image_size, job.tokenizer)
    return job, learner, (data.collate([dataset[numbers] for numbers in micro]) for micro in job.sampler.batches(0, 0))


@pytest.mark.parametrize("world", [1, 2])
def test_the_gradient_is_that_of_the_mean_over_the_expressions_of_all_processes(tmp_path, monkeypatch, world):
    """This one's share in it, before it is averaged; what is averaged goes around once, after the last micro-batch."""
    job = train.begin(options(tmp_path / "run", "--batch-size", "15", "--micro-batch", "4", "--set", "dropout=0",
                              "per_image=0", "clip=0"), evaluate.Processes(0, world, ONE.device))
    learner, dataset = train.build(job._replace(processes=ONE)), data.ReferringDataset(job.samples, 32, job.tokenizer)
    plan, apart, found = job.sampler.plan(0, 0), [], {}
    micros = [data.collate([dataset[numbers] for numbers in micro]) for micro in plan[0]]

    class Network:
        def __call__(self, *inputs):
            return learner.model(*inputs)

        @contextlib.contextmanager
        def no_sync(self):
            apart.append("a micro-batch")
            yield

    monkeypatch.setattr(dist, "all_reduce", lambda values: None)
    learner.optimizer.step = lambda: found.update(
        {name: one.grad.clone() for name, one in learner.model.named_parameters() if one.requires_grad})
    train.train_step(job, learner._replace(network=Network()), train.new_folder(job), job.sampler, iter(micros),
                     train.StopRequest())
    assert len(micros) > 1 and len(apart) == (len(micros) - 1 if world > 1 else 0)
    every = sum(len(numbers) for rank in plan for micro in rank for numbers in micro)
    for micro in micros:
        logits = learner.model(micro["images"], micro["tokens"], micro["text_mask"], micro["image_index"])["logits"]
        of_each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits[:, 0], micro["masks"].float(), reduction="none").mean((1, 2))
        (of_each.sum() * world / every).backward()
    for name, one in learner.model.named_parameters():
        if one.requires_grad:
            torch.testing.assert_close(found[name], one.grad, rtol=1e-4, atol=1e-6)


def test_outputs_come_to_the_criterion_in_full_precision_and_numbers_as_they_are(tmp_path, monkeypatch):
    real, seen = toy.Toy.forward, {}
    monkeypatch.setattr(toy.Toy, "forward", lambda self, *inputs: {
        **(outputs := real(self, *inputs)), "coarse": outputs["coarse"].bfloat16(), "chosen": inputs[3]})
    monkeypatch.setattr(toy.Toy, "criterion", lambda self, outputs, batch, progress: seen.update(
        {name: value.dtype for name, value in outputs.items()}) or {"seg": outputs["logits"].mean()})
    job, learner, batches = prepared(tmp_path / "run", "--precision", "bf16")
    train.train_step(job, learner, train.new_folder(job), job.sampler, batches, train.StopRequest())
    assert seen == {"logits": torch.float32, "coarse": torch.float32, "chosen": torch.int64}


def test_flags_and_sums_are_counted_exactly():
    assert train.agree(ONE, [True, torch.tensor([0.0, 1.0])], {"many": torch.tensor(2 ** 24 + 1), "loss": 0.5}) == (
        [1, 0, 1], {"many": 2 ** 24 + 1, "loss": 0.5})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_the_gradient_is_clipped_by_its_norm_over_all_that_learns(tmp_path, clip, precision):
    norms = []
    for clip_ in (0.0, clip):
        job, learner, batches = prepared(tmp_path / "run", "--precision", precision, "--set", f"clip={clip_}")
        if precision == "fp16":
            learner = learner._replace(scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
        learning = [one for one in learner.model.parameters() if one.requires_grad]
        learner.optimizer.step = lambda learning=learning: norms.append(
            math.sqrt(sum(one.grad.double().square().sum().item() for one in learning)))
        train.train_step(job, learner, train.new_folder(job), job.sampler, batches, train.StopRequest())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(min(clip, norms[0]), rel=1e-4)


def test_a_scaled_gradient_that_overflows_is_skipped_and_scaled_down(tmp_path, monkeypatch):
    real = toy.Toy.criterion
    monkeypatch.setattr(toy.Toy, "criterion", lambda self, *given: {"seg": real(self, *given)["seg"] * 1e34})
    words = ("--set", "clip=0", "per_image=0")
    job, learner, batches = prepared(tmp_path / "run", "--precision", "fp16", *words)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    train.train_step(job, learner, train.new_folder(job), job.sampler, batches, train.StopRequest())
    assert_same(before, dict(learner.model.state_dict()))
    assert learner.scaler.get_scale() == 2.0 ** 15                  # torch begins with 2 ** 16


def test_processes_begin_with_one_model_and_drop_out_differently(tmp_path):
    job = train.begin(options(tmp_path / "run"), ONE)
    seeds, weights = [], []
    for rank in (0, 1):
        learner = train.build(job._replace(processes=evaluate.Processes(rank, 1, ONE.device)))
        seeds.append(torch.initial_seed())
        weights.append(dict(learner.model.state_dict()))
    assert_same(*weights)
    assert seeds == [1000003, 2000006]              # one for each rank, the same in every version
    other = train.build(train.begin(options(tmp_path / "run", "--seed", "7"), ONE)).model
    assert torch.initial_seed() == 1000010 and not torch.equal(other.words.weight, weights[0]["words.weight"])


@pytest.mark.parametrize("kind, world, together", [("cpu", 1, 0), ("cpu", 2, 0), ("cuda", 1, 0), ("cuda", 2, 1)])
def test_several_cards_share_the_statistics_of_batch_norm(tmp_path, monkeypatch, kind, world, together):
    """What torch is handed of the device: it moves the model, scales half precision, fuses the optimiser's step."""
    job, done, groups = train.begin(options(tmp_path / "run"), ONE), [], []
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "convert_sync_batchnorm", lambda model: done.append("shared") or model)
    monkeypatch.setattr(toy.Toy, "to", lambda self, device: done.append(("moved", device.type)) or self)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: done.append(("scaler", device, enabled)))
    monkeypatch.setattr(torch.optim, "AdamW", lambda given, fused: (
        groups.extend(given), done.append(("fused", fused)))[0] or SimpleNamespace(state={}))
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model, device_ids: model)
    job.args.precision = "fp16" if kind == "cuda" else "bf16"
    model = train.build(job._replace(processes=evaluate.Processes(0, world, torch.device(kind)))).model
    assert done == [*together * ["shared"], ("moved", kind), ("scaler", kind, kind == "cuda"),
                    ("fused", kind == "cuda")] and model.training
    assert [group["base_lr"] for group in groups] == [group["lr"] for group in groups] == [1e-2]


def test_all_wait_for_the_kept_weights_and_one_writes_what_they_score(tmp_path, monkeypatch, capsys):
    job = train.begin(options(tmp_path / "run"), evaluate.Processes(1, 2, ONE.device))
    job.args.tensorboard, model = True, train.build(job._replace(processes=ONE)).model
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = []

    def written():
        models.save(model, tmp_path / "run/best.safetensors")
        torch.nn.init.zeros_(model.words.weight)
        done.append("written")

    def scored(model, processes, control=False, **options):
        assert_same(kept, dict(model.state_dict()))
        if control and len(done) > 1:
            raise evaluate.NoControl("one picture")
        return {"mIoU": 6.789 if control else 12.346}

    monkeypatch.setattr(dist, "barrier", written)
    monkeypatch.setattr(evaluate, "score_split", scored)
    monkeypatch.setattr(train, "for_tensorboard", lambda *_: done.append("rank 1 writes"))
    for wanted in ("6.79", "none, one picture"):
        capsys.readouterr()
        train.score_tests(job, model)
        assert capsys.readouterr().out == (
            f"test: mIoU 12.35; control, every image with another image's sentences: {wanted}\n")
    assert done == ["written", "written"]


def test_the_end_of_a_run_is_scored_as_it_was_trained(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(evaluate, "score_split", lambda *_, **options: given.append(options) or {"mIoU": 1.0})
    run_to_end(tmp_path / "run", "--epochs", "1", "--small", "--micro-batch", "5", "--set", "protocol=original")
    for control, one in zip((None, True), given, strict=True):
        assert one["recipe"]["protocol"] == "original" and one["tokenizer"].words
        assert {key: one.get(key) for key in (
            "dataset", "split", "limit", "small", "categories", "precision", "workers", "micro_batch", "checkpoint",
            "output", "control")} == {
            "dataset": "synthetic", "split": "test", "limit": 60, "small": True, "categories": "all",
            "precision": "fp32", "workers": 0, "micro_batch": 5, "checkpoint": tmp_path / "run/best.safetensors",
            "output": tmp_path / "run", "control": control}


def test_where_the_recipe_keeps_the_last_epoch_that_one_is_scored(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(evaluate, "score_split", lambda *_, **options: given.append(options) or {"mIoU": 1.0})
    run_to_end(tmp_path / "run", "--epochs", "1", "--set", "select=last")
    assert [one["checkpoint"] for one in given] == 2 * [tmp_path / "run/last.safetensors"]
    assert not (tmp_path / "run/best.safetensors").exists() and state_of(tmp_path / "run")["best"] is None
    assert log_of(tmp_path / "run")[0].keys() == {"epoch", "seg", "loss", "lr", "best"}     # nothing is validated


def test_of_equal_epochs_the_first_is_kept(tmp_path, monkeypatch):
    real, given, summed = metrics.summarize, [], []
    monkeypatch.setattr(metrics, "summarize", lambda *args, **options: summed.append(options) or {
        **real(*args, **options), "mIoU": 7.0})
    evaluated = evaluate.evaluate

    def watched(*args, **options):
        given.append(options)
        return evaluated(*args, **options)

    monkeypatch.setattr(evaluate, "evaluate", watched)
    run_to_end(tmp_path / "run", "--set", "protocol=original", "empty=one", "micro_batch=3")
    assert [line["best"] for line in log_of(tmp_path / "run")] == [True, False]
    for one in given[:2]:
        assert one.pop("tokenizer").words
        assert one == {"protocol": "original", "empty": "one", "micro_batch": 3, "precision": "fp32", "workers": 0,
                       "label": "validate"}
    assert summed[:2] == 2 * [{"empty": "one", "bootstrap": 0}]


def test_a_score_of_two_measures_is_their_sum(tmp_path, monkeypatch):
    scores, real = iter([(30.0, 1.0), (20.0, 12.0)]), metrics.summarize
    monkeypatch.setattr(metrics, "summarize", lambda *args, **options: {
        **real(*args, **options),
        **(dict(zip(("mIoU", "oIoU"), next(scores), strict=True)) if options.get("bootstrap") == 0 else {})})
    run_to_end(tmp_path / "run", "--set", "select=mIoU+oIoU")
    assert [line["best"] for line in log_of(tmp_path / "run")] == [True, True]
    assert state_of(tmp_path / "run")["best"] == 32.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_and_what_the_scaler_knows_is_kept(tmp_path, precision):
    run_to_end(tmp_path / "run", "--epochs", "1", "--precision", precision)
    assert math.isfinite(log_of(tmp_path / "run")[0]["loss"])
    assert bool(state_of(tmp_path / "run")["scaler"]) == (precision == "fp16")
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == precision
    run_to_end(tmp_path / "run", "--epochs", "1", "--precision", precision, "--resume")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_worse_epoch_never_overwrites_the_best(tmp_path, monkeypatch, resumed):
    scores = iter([30.0, 20.0, 10.0])
    real = metrics.summarize

    def summarize(*args, **options):
        validating = options.get("bootstrap") == 0
        return {**real(*args, **options), **({"mIoU": next(scores)} if validating else {})}

    monkeypatch.setattr(metrics, "summarize", summarize)
    words = ("--epochs", "3")
    if resumed:
        monkeypatch.setattr(StopAt, "steps", 2)
        monkeypatch.setattr(train, "StopRequest", StopAt)
        while True:
            try:
                run_to_end(tmp_path / "run", *words, *(["--resume"] if (tmp_path / "run").exists() else []))
                break
            except train.Stopped:
                continue
    else:
        run_to_end(tmp_path / "run", *words)
    assert [line["best"] for line in log_of(tmp_path / "run")] == [True, False, False]
    best, last = (models.read_weights(tmp_path / "run" / f"{name}.safetensors")[0] for name in ("best", "last"))
    assert not torch.equal(best["words.weight"], last["words.weight"])
    assert state_of(tmp_path / "run")["best"] == 30.0


def test_phase_change_keeps_what_goes_on_learning_and_starts_the_best_anew(tmp_path, monkeypatch):
    kept = []
    real = train.start_phase

    def watched(job, learner, epoch):
        new = real(job, learner, epoch)
        if learner.optimizer:
            weight, second = new.model.words.weight, new.model.second.weight
            kept.append((new.optimizer.state[weight] is learner.optimizer.state[weight],
                         second in new.optimizer.state))
        return new

    monkeypatch.setattr(train, "start_phase", watched)
    scores, real_summary = iter([30.0, 20.0]), metrics.summarize
    monkeypatch.setattr(metrics, "summarize", lambda *args, **options: {
        **real_summary(*args, **options), **({"mIoU": next(scores)} if options.get("bootstrap") == 0 else {})})
    run_to_end(tmp_path / "run", "--set", "phases={'first': 0.5, 'both': 0.5}")
    assert kept == [(True, False)]
    assert [line["best"] for line in log_of(tmp_path / "run")] == [True, True]      # 20 is the best of its phase
    lines = log_of(tmp_path / "run")                                # the schedule is that of the whole run
    assert [line["lr"] for line in lines] == pytest.approx([1e-2 * (1 - k / 4) ** 0.9 for k in (1, 3)])


def test_repeats_lose_words_anew_in_every_epoch_and_the_same_in_every_run(tmp_path, monkeypatch):
    """Prompt-RIS's groups: an image with three expressions, a batch of four."""
    layouts.write("refcoco", tmp_path / "data", scenes=1)
    said = [sample.expression for sample in data.read("refcoco", tmp_path / "data", "train", limit=3)]
    shown, real = [], toy.Toy.criterion

    def watched(self, outputs, batch, progress):
        shown.append([sample.expression for sample in batch["samples"]])
        return real(self, outputs, batch, progress)

    monkeypatch.setattr(toy.Toy, "criterion", watched)
    for seed in (0, 0, 1):
        run_to_end(tmp_path / "run", "--dataset", "refcoco", "--data-root", str(tmp_path / "data"), "--preset", "tiny",
                   "--limit", "3", "--epochs", "4", "--batch-size", "4", "--seed", str(seed), "--overwrite",
                   "--set", "per_image=4", "repeat_mask=0.6")
    assert len(shown) == 12 and shown[:4] == shown[4:8] != shown[8:]
    repeats = []
    for texts in shown[:4]:
        assert sorted(texts[:3]) == sorted(said) and len(texts) == 4
        assert any(set(texts[3].split()) <= set(text.split()) for text in said)
        repeats.append(texts[3])
    assert len(set(repeats)) > 1 and not set(repeats) <= set(said)


# --------------------------------------------------------------------------------------------------- what can go wrong


def test_an_infinite_loss_names_step_and_samples_and_keeps_the_last_good_state(tmp_path):
    words = ("--set", "batch_size=4", "batch_norm=True", "per_image=0")
    with pytest.raises(ValueError, match=r"not finite at step 2 of epoch 2; samples train-\S+") as caught:
        run_to_end(tmp_path / "bad", *words, "explode_at=0.55")
    assert str(tmp_path / "bad" / "resume.pt") in str(caught.value)
    state = state_of(tmp_path / "bad")
    assert (state["epoch"], state["step"]) == (1, 1)
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values() if tensor.is_floating_point())
    config = json.loads((tmp_path / "bad" / "config.json").read_text())
    config["config"]["explode_at"] = 2.0
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    run_to_end(tmp_path / "bad", *words, "--resume")
    run_to_end(tmp_path / "good", *words)
    assert_same(state_of(tmp_path / "good"), state_of(tmp_path / "bad"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_infinite_loss_is_refused_whatever_its_gradient(tmp_path, monkeypatch, precision):
    real, count = toy.Toy.criterion, []
    monkeypatch.setattr(toy.Toy, "criterion", lambda self, *given: count.append(1) or {
        "seg": real(self, *given)["seg"] + (math.inf if len(count) == 2 else 0)})
    job, learner, batches = prepared(tmp_path / "run", "--precision", precision, "--micro-batch", "2")
    second = ", ".join(job.samples[k].id for numbers in job.sampler.plan(0, 0)[0][1] for k in numbers)
    with pytest.raises(ValueError, match=f"step 1 of epoch 1; samples {second}; {tmp_path}.*holds the state before"):
        train.train_step(job, learner, train.new_folder(job), job.sampler, batches, train.StopRequest())


def test_a_gradient_alone_that_is_not_finite_names_all_samples_of_the_step(tmp_path, monkeypatch):
    real = toy.Toy.criterion
    monkeypatch.setattr(toy.Toy, "criterion", lambda self, *given: {
        "seg": real(self, *given)["seg"] + (0 * self.words.weight).square().sum().sqrt()})        # 0, of slope 0 * inf
    job, learner, batches = prepared(tmp_path / "run", "--micro-batch", "2")
    micros = job.sampler.plan(0, 0)[0]
    every = ", ".join(job.samples[k].id for micro in micros for numbers in micro for k in numbers)
    with pytest.raises(ValueError, match=f"step 1 of epoch 1; samples {every};") as caught:
        train.train_step(job, learner, train.new_folder(job), job.sampler, batches, train.StopRequest())
    assert len(micros) > 1 and state_of(tmp_path / "run")["step"] == 0 and "try a lower --lr" in str(caught.value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    class Refuses:
        def __reduce__(self):
            raise OSError("disk full")

    with models.put_in_place(tmp_path / "resume.pt") as part:
        torch.save({"epoch": 1, "step": 0}, part)
    with pytest.raises(ValueError, match="disk full"), models.put_in_place(tmp_path / "resume.pt") as part:
        torch.save({"epoch": 2, "bad": Refuses()}, part)
    assert train.load_resume(tmp_path / "resume.pt") == {"epoch": 1, "step": 0, "phase": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["resume.pt"]


@pytest.mark.parametrize("words", [[], ["--resume"], ["--resume", "auto"]])
@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "model.safetensors"])
def test_weights_without_resume_pt_are_not_deleted(tmp_path, name, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(b"hours of work")
    with pytest.raises(ValueError, match=f"run holds {name} but no resume.pt: --start .*run --output NEW trains on"):
        run_to_end(tmp_path / "run", *words)
    assert (tmp_path / "run" / name).read_bytes() == b"hours of work" and len(list((tmp_path / "run").iterdir())) == 1


def test_what_ends_a_validation_costs_no_epoch(tmp_path, monkeypatch):
    run_to_end(tmp_path / "whole")

    def killed(*given, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "evaluate", killed)
        run_to_end(tmp_path / "run")
    assert (state := state_of(tmp_path / "run"))["step"] == state["steps"] and state["epoch"] == 0
    run_to_end(tmp_path / "run", "--resume")
    whole, again = (state_of(tmp_path / name)["model"] for name in ("whole", "run"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_phase_whose_first_step_failed_is_gone_on_with(tmp_path, monkeypatch):
    words, real = ("--epochs", "2", "--set", "phases={'a': 0.5, 'b': 0.5}"), train.train_step

    def fails(job, learner, position, *given):
        if position["epoch"] == 1:
            train.save_resume(job, learner, position, train.random_state(job.processes.device))
            raise ValueError("not finite")
        return real(job, learner, position, *given)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="not finite"):
        patch.setattr(train, "train_step", fails)
        run_to_end(tmp_path / "run", *words)
    assert (state_of(tmp_path / "run")["step"], state_of(tmp_path / "run")["phase"]) == (0, 1)
    run_to_end(tmp_path / "run", *words, "--resume")
    assert len(log_of(tmp_path / "run")) == 2


def test_a_phase_without_an_epoch_is_said(tmp_path, capsys):
    run_to_end(tmp_path / "run", "--epochs", "1", "--limit", "12", "--set", "phases={'a': 0.2, 'b': 0.8}")
    assert "phases   a: none of 1 epochs" in capsys.readouterr().out


def test_settings_that_no_run_can_follow_delete_nothing(tmp_path, capsys):
    run_to_end(tmp_path / "run", "--epochs", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        options(tmp_path / "run", "--overwrite", "--seed", "-1")
    assert "argument --seed: " in capsys.readouterr().err
    with pytest.raises(ValueError, match="schedule=step: this paper's recipe has no drop_epochs and drop_factor"):
        run_to_end(tmp_path / "run", "--overwrite", "--set", "schedule=step")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_second_run_in_one_folder_is_asked_about(tmp_path):
    run_to_end(tmp_path / "run")
    before = (tmp_path / "run" / "resume.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already: --resume goes on with it, --overwrite"):
        run_to_end(tmp_path / "run")
    assert (tmp_path / "run" / "resume.pt").read_bytes() == before
    run_to_end(tmp_path / "run", "--overwrite", "--epochs", "1")
    assert len(log_of(tmp_path / "run")) == 1


@pytest.mark.parametrize("words, message", [
    (["--set", "width=9"], "begun with width=8, now width=9"), (["--lr", "0.5"], r"begun with lr=0\.01, now lr=0\.5"),
    (["--seed", "1"], "begun with seed 0, now 1"), (["--limit", "12"], "begun with limit 60, now 12")])
def test_resume_with_other_settings_is_refused(tmp_path, words, message):
    run_to_end(tmp_path / "run", "--epochs", "1")
    with pytest.raises(ValueError, match=f"{message} is asked for; .* or give another --output$"):
        run_to_end(tmp_path / "run", "--epochs", "1", "--resume", *words)


def test_of_several_other_settings_the_first_by_name_is_said_and_a_lost_config_is_named(tmp_path):
    run_to_end(tmp_path / "run", "--epochs", "1")
    words = ("--epochs", "5", "--weight-decay", "0.3", "--lr", "0.5", "--batch-size", "4", "--micro-batch", "2")
    with pytest.raises(ValueError, match="begun with batch_size=8, now batch_size=4"):
        run_to_end(tmp_path / "run", *words, "--resume")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"--resume {tmp_path / 'run'}: no config.json"):
        run_to_end(tmp_path / "run", "--resume")


def test_resume_compares_all_that_tells_runs_apart(tmp_path):
    words = custom(tmp_path / "data")
    run_to_end(tmp_path / "run", *words)
    path = tmp_path / "run/config.json"
    begun = json.loads(path.read_text())
    for part, other in {"model": "crobim_u", "dataset": "risbench", "refs": "r.p", "preset": "paper", "seed": 9,
                        "ablation": "1/wide", "categories": "seen", "small": True, "limit": 3,
                        "precision": "bf16"}.items():
        paper = models.paper(other if part == "model" else "toy")
        of_model = {"config": dataclasses.asdict(paper.Config()), "recipe": paper.RECIPE} if part == "model" else {}
        path.write_text(json.dumps({**begun, part: other, **of_model}))
        with pytest.raises(ValueError, match=rf"begun with {part} {other}, now {begun[part]} is asked for; repeat"):
            run_to_end(tmp_path / "run", *words, "--resume")
    path.write_text(json.dumps({name: value for name, value in begun.items() if name not in ("refs", "small")}))
    run_to_end(tmp_path / "run", *words, "--resume")                # of before there were such options
    path.write_text(json.dumps({**begun, "data_root": str(tmp_path / "run/../data")}))
    run_to_end(tmp_path / "run", *words, "--resume")                # the same place by another way


def test_config_json_rebuilds_the_run_and_what_was_in_the_folder_is_its_own(tmp_path):
    tmp_path = tmp_path / "a/folder/to/make"
    run_to_end(tmp_path / "run", "--epochs", "1")
    for name in ("mine.txt", "notes/mine.txt"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run/val").mkdir()
    (tmp_path / "run/val/metrics.json").write_text("{}")
    args = options(tmp_path / "run", "--overwrite", "--seed", "4", "--epochs", "1", "--set", "select=oIoU")
    job = train.begin(args, ONE)
    assert job.select == "oIoU"
    position = train.new_folder(job)
    assert position == {"epoch": 0, "step": 0, "phase": 0, "best": None, "log_length": 0, "sums": {}, "expressions": 0,
                        "images": 0, "seconds": 0.0, "samples": 60, "steps": 2}
    kept = sorted(str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert kept == ["config.json", "mine.txt", "notes/mine.txt", "tokenizer.json"]
    assert (tmp_path / "run/tokenizer.json").read_text() == json.dumps({"words": job.tokenizer.words}) + "\n"
    about = json.loads(text := (tmp_path / "run/config.json").read_text())
    assert text == json.dumps(about, indent=1) + "\n"                   # a line for each, to be read and compared
    assert about.pop("versions") == {"python": platform.python_version(), "torch": torch.__version__,
                                     "numpy": np.__version__, "transformers": transformers.__version__}
    vocabulary = len(job.tokenizer.words) + len(toy.SPECIAL_TOKENS)
    assert about == {
        "model": "toy", "dataset": "synthetic", "data_root": "data", "refs": None, "preset": "tiny", "ablation": None,
        "categories": "all", "small": False, "limit": 60, "seed": 4, "precision": "fp32", "start": None,
        "config": dataclasses.asdict(toy.Config(vocab_size=vocabulary)),
        "recipe": {**toy.RECIPE, **toy.RECIPE_TINY, "epochs": 1, "select": "oIoU"}}


def test_a_run_goes_on_with_another_number_of_processes_and_says_so(tmp_path, capsys):
    words = ("--epochs", "1", "--set", "dropout=0")
    run_to_end(tmp_path / "run", *words)
    state = state_of(tmp_path / "run")
    torch.save({**state, "random": state["random"] * 2}, tmp_path / "run/resume.pt")
    run_to_end(tmp_path / "run", *words, "--resume")
    said = "resumed on 1 processes instead of 2: the same samples in the same order, other dropout"
    assert said in capsys.readouterr().out
    job = train.begin(options(tmp_path / "run", *words, "--resume"), ONE)
    position = train.resume(job, train.build(job, state), {key: one for key, one in state.items() if key != "images"})
    assert position["images"] == 0                                  # of before they were counted
    torch.save({**state, "steps": 3}, tmp_path / "run/resume.pt")
    with pytest.raises(ValueError, match="begun on 60 samples, 3 steps an epoch; now there are 60, 2 steps: the data"):
        run_to_end(tmp_path / "run", *words, "--resume")


def test_a_published_tokenizer_is_the_papers(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="the toy's tokenizer is on no hub"):
        run_to_end(tmp_path / "run", "--set", "pretrained=hub")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(toy, "tokenizer", lambda config: f"of {config.pretrained}")
    job = train.begin(options(tmp_path / "run", "--set", "pretrained=hub"), ONE)
    assert (job.tokenizer, job.config.vocab_size) == ("of hub", 100)
    (tmp_path / "run/tokenizer.json").write_text("of a run of before")
    train.new_folder(job)
    assert not (tmp_path / "run/tokenizer.json").exists()


def test_what_would_be_resumed_is_the_first_to_go(tmp_path):
    run_to_end(tmp_path / "run", "--epochs", "1")
    (tmp_path / "run/best.safetensors").unlink()
    (tmp_path / "run/best.safetensors").mkdir()                     # cannot be removed like a file
    with pytest.raises(OSError, match=r"best\.safetensors"):
        run_to_end(tmp_path / "run", "--overwrite", "--epochs", "1")
    assert not (tmp_path / "run/resume.pt").exists()


def test_a_run_of_an_older_version_goes_on_and_loads(tmp_path, capsys):
    """old_run.tar.xz: CroBIM-U shrunk, stopped after the first step of the second epoch by the code of that time."""
    with tarfile.open(ROOT / "tests/old_run.tar.xz") as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))    # 3.11.4
    run = tmp_path / "old_run"
    before, stopped = models.load(run), state_of(run)
    assert (stopped["epoch"], stopped["step"], before.config.bert_width) == (1, 1, 4)
    words = ["--device", "cpu", "--workers", "0", "--output", str(run), "--limit", "24", "--resume"]
    with pytest.raises(ValueError, match="begun with epochs=2, now epochs=3"):
        train.train(train.arguments([*words, "--epochs", "3"]), ONE)
    train.train(train.arguments([*words, "--epochs", "2", "--batch-size", "3", "--set", "width=8"]), ONE)
    assert [line["epoch"] for line in log_of(run)] == [1, 2]
    assert "epochs=2  batch_size=3  lr=0.002" in capsys.readouterr().out
    after = models.load(run)
    assert (run / "test/metrics.json").is_file() and after.run["recipe"]["batch_size"] == 3
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(before.state_dict()[name], models.read_weights(run / "best.safetensors")[0][name])
    assert not torch.equal(stopped["model"][name], state_of(run)["model"][name])


def test_resume_goes_on_with_the_settings_of_the_run_whatever_the_presets_are_now(tmp_path, monkeypatch):
    run_to_end(tmp_path / "run", "--epochs", "1", "--lr", "0.5")
    monkeypatch.setattr(toy, "RECIPE_TINY", {"per_image": 0, "clip": 9.0})
    run_to_end(tmp_path / "run", "--epochs", "1", "--resume")
    with pytest.raises(ValueError, match=r"begun with clip=1\.0, now clip=9\.0"):
        run_to_end(tmp_path / "run", "--epochs", "1", "--resume", "--set", "clip=9")


def test_signals_are_handled_as_before_after_a_run(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_to_end(tmp_path / "run", "--epochs", "1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with train.StopRequest() as stop:
        assert stop.asked is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)                         # at once: passed on by torchrun
        stop.asked -= 4
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_ctrl_c_more_than_three_seconds_after_the_first_ends_at_once(monkeypatch):
    stop, now = train.StopRequest(), [0.0]
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def ends(number, seconds):
        now[0] = seconds
        try:
            stop.ask(number, None)
        except KeyboardInterrupt:
            return True
        return False

    assert [ends(number, seconds) for number, seconds in (
        (signal.SIGTERM, 100.0), (signal.SIGINT, 102.0), (signal.SIGINT, 103.0), (signal.SIGTERM, 109.0),
        (signal.SIGINT, 103.25))] == [False, False, False, False, True]
    assert stop.asked == 100.0


def test_resume_of_nothing_and_of_a_torn_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="start the run without --resume"):
        run_to_end(tmp_path / "run", "--resume")
    run_to_end(tmp_path / "run")
    path = tmp_path / "run" / "resume.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="resume.pt is truncated"):
        run_to_end(tmp_path / "run", "--resume")


def test_the_state_of_a_run_is_read_as_plain_types_into_memory(tmp_path, monkeypatch):
    torch.save({"epoch": 1, "strange": SimpleNamespace()}, tmp_path / "resume.pt")
    with pytest.raises(ValueError, match=r"resume.pt is truncated or not a resume file .UnpicklingError.; --start "):
        train.load_resume(tmp_path / "resume.pt")
    torch.save({"some": "state"}, tmp_path / "resume.pt")
    with pytest.raises(ValueError, match=r"not a resume file .KeyError.; --start .*--output NEW trains on from the"):
        train.load_resume(tmp_path / "resume.pt")
    monkeypatch.setattr(torch, "load", lambda path, **how: {"epoch": 3, "step": 1, "path": path, **how})
    assert train.load_resume("resume.pt") == {          # not to the card on which it was saved
        "epoch": 3, "step": 1, "phase": 3, "path": "resume.pt", "map_location": "cpu", "weights_only": True}


@pytest.mark.parametrize("words, message", [
    (["--ablation", "2/none"], "no such row; there are 1/wide"),
    (["--set", "schedule=linear"], "there are poly"), (["--set", "select=AP"], "select=AP: there are mIoU"),
    (["--set", "empty=half"], "empty=half: there are"), (["--set", "precision=fp8"], "precision=fp8: there are bf16"),
    (["--set", "batch_size=0"], "batch_size=0: expected a number of at least 1"), (["--lr", "-1"], "lr=-1"),
    (["--lr", "nan"], "lr=nan"), (["--set", "phases={'first': 0.5}"], "a share of the run for each phase"),
    (["--set", "witdh=3"], "has a field 'witdh'"), (["--dataset", "rrsisd", "--data-root", "nowhere"], "nowhere"),
    (["--dataset", "refsegrs", "--data-root", "/dev"], "/dev")])
def test_wrong_input_is_named(tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run_to_end(tmp_path / "run", *words)
    assert "\n" not in str(caught.value).strip()


def test_wrong_input_ends_in_one_line_and_a_nonzero_exit(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--dataset", "risbench", "--data-root", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 1 and [line.split()[0] for line in done.stdout.splitlines()] == ["config", "recipe"]
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------- real processes


@pytest.fixture
def start():
    """start(OUTPUT, WORDS, processes=N, launch=WORDS for torchrun, VARIABLE=value): a process of train.py's, with the
    toy, in a group of its own; whatever is left of it ends with the test."""
    running = []

    def start(output, *words, processes=1, launch=(), **environment):
        by = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *(launch or ["--standalone"])]
        command = [sys.executable, *(by if processes > 1 or launch else []), ROOT / "tests/toy.py", "--model", "toy",
                   "--device", "cpu", "--limit", "60", "--workers", "1", "--output", output, *words]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        start_new_session=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}))
        return running[-1]

    yield start
    for process in running:
        if process.poll() is None:
            process.terminate()                                     # torchrun ends its own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def spawn(function, *args):
    """function(0, ...) and function(1, ...) in two processes that have five minutes."""
    context, deadline = mp.spawn(function, args, nprocs=2, join=False), time.monotonic() + 300
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes wait for each other")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_the_whole_group_in_the_first_epoch_is_gone_on_from(tmp_path, start, processes):
    """As schedulers, `timeout` and torchrun send it: the loader's workers get it too. The toy waits for it."""
    words = ("--workers", "2", "--set", "batch_size=4", "per_image=0", "dropout=0.3")
    process = start(tmp_path / "run", *words, processes=processes, TOY=f"{tmp_path} hold 3")
    deadline = time.monotonic() + 300
    while len(list(tmp_path.glob("holds-*"))) < processes:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "after step 3 of epoch 1; go on with --resume" in errors, errors
    assert "DataLoader worker" not in errors and ("Traceback" not in errors or processes > 1), errors   # torchrun's own
    stopped = state_of(tmp_path / "run")
    assert (stopped["epoch"], stopped["step"]) == (0, 3) and not (tmp_path / "run/log.jsonl").exists()
    process = start(tmp_path / "run", *words, "--resume", "auto", processes=processes, TOY=f"{tmp_path} note 0")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert [line["epoch"] for line in log_of(tmp_path / "run")] == [1, 2]
    for rank in range(processes):                                   # no step twice, none left out
        assert steps_of(tmp_path, rank) == list(range(2 * stopped["steps"]))


def steps_of(folder, rank):
    """Numbers of the steps that a process has taken, as the toy notes their progress."""
    progress = [float(line) for line in (folder / f"steps-{rank}").read_text().split()]
    least = min(one for one in progress if one > 0)
    return [round(one / least) for one in progress]


def test_a_crash_is_gone_on_from_by_torchrun_itself(tmp_path, start):
    """One process of two ends hard, once: --max-restarts starts both again, --resume auto takes the last state."""
    words = ("--save-every", "2", "--set", "batch_size=4", "per_image=0", "dropout=0.3", "--resume", "auto")
    process = start(tmp_path / "run", *words, processes=2, launch=("--standalone", "--max-restarts", "1"),
                    TOY=f"{tmp_path} crash 4")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0 and "(exitcode: 13)" in errors, errors
    process = start(tmp_path / "whole", *words, processes=2)
    _, errors_ = process.communicate(timeout=300)
    assert process.returncode == 0, errors_
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "run"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "run") and len(log_of(tmp_path / "run")) == 2
    assert steps_of(tmp_path, 1)[:6] == [0, 1, 2, 3, 2, 3]          # the fourth step crashed, two were saved


def test_a_fault_of_ours_ends_the_program_and_its_loader(tmp_path, start):
    process = start(tmp_path / "run", "--workers", "2", TOY=f"{tmp_path} fault 2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and errors.rstrip().endswith("RuntimeError: a fault of ours"), errors


def gradients(rank, world, folder, words, explode, port=None):
    """The gradient of the first step as `world` processes see it; with `explode` the last one's loss is infinite."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    toy.register()
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    processes = evaluate.start_processes("cpu")
    job = train.begin(options(folder / f"run{world}", "--set", "clip=0", *words), processes)
    learner, position = train.build(job), train.new_folder(job)
    model, grads = learner.model, {}
    if explode:
        real, scale = model.criterion, float("inf") if rank == world - 1 else 1.0
        model.criterion = lambda *given: {name: value * scale for name, value in real(*given).items()}
    learner.optimizer.step = lambda: grads.update(
        {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad})
    dataset = train.data.ReferringDataset(job.samples, job.config.image_size, job.tokenizer)
    batches = (train.data.collate([dataset[numbers] for numbers in micro]) for micro in job.sampler.batches(0, rank))
    message = ""
    try:
        totals, expressions, _ = train.train_step(job, learner, position, job.sampler, batches, train.StopRequest())
        if processes.first:
            micros = len(job.sampler.plan(0, 0)[0])
            torch.save({"totals": totals, "expressions": expressions, **grads},
                       folder / f"gradients-{world}-{micros}.pt")
    except ValueError as error:
        message = str(error)
    assert bool(message) == explode
    (folder / f"message{rank}").write_text(message)
    mine = [job.samples[k].id for micro in job.sampler.plan(0, 0)[rank] for numbers in micro for k in numbers]
    (folder / f"samples{rank}").write_text(", ".join(mine))
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def test_processes_and_accumulation_do_not_change_the_gradient(tmp_path):
    words = ["--batch-size", "15", "--set", "dropout=0", "per_image=0"]      # odd for two, images of unequal size
    gradients(0, 1, tmp_path, [*words, "--micro-batch", "15"], False)
    gradients(0, 1, tmp_path, [*words, "--micro-batch", "4"], False)
    spawn(gradients, 2, tmp_path, [*words, "--micro-batch", "4"], False, free_port())
    files = sorted(path.name for path in tmp_path.glob("gradients-*"))
    assert len(files) == 3, files
    whole = torch.load(tmp_path / "gradients-1-1.pt", weights_only=True)
    for file in files:
        other = torch.load(tmp_path / file, weights_only=True)
        for name in whole:
            if name in ("totals", "expressions"):
                assert other[name] == pytest.approx(whole[name], rel=1e-5)
            else:
                assert whole[name].abs().max() > 1e-6, name
                torch.testing.assert_close(other[name], whole[name], rtol=1e-5, atol=1e-7)


def test_an_infinite_loss_on_one_process_stops_both(tmp_path):
    spawn(gradients, 2, tmp_path, ["--batch-size", "8", "--set", "per_image=0"], True, free_port())
    first, second = ((tmp_path / f"message{rank}").read_text() for rank in (0, 1))
    assert first == second and "not finite at step 1" in first
    assert f"samples {(tmp_path / 'samples1').read_text()};" in first        # those of the process that went wrong
    assert state_of(tmp_path / "run2")["step"] == 0


def test_two_machines_train_and_score_like_one_process(tmp_path, start):
    """Two agents of torchrun, as on two machines that share the run folder."""
    words = ("--epochs", "2", "--set", "dropout=0", "batch_size=6", "per_image=0")
    launch = ("--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port(), "--node-rank")
    for agent in [start(tmp_path / "two", *words, launch=(*launch, rank)) for rank in "01"]:
        _, errors = agent.communicate(timeout=300)
        assert agent.returncode == 0 and "Grad strides" not in errors, errors
    torch.set_num_threads(1)
    run_to_end(tmp_path / "one", *words)
    for name, tensor in state_of(tmp_path / "one")["model"].items():
        torch.testing.assert_close(tensor, state_of(tmp_path / "two")["model"][name], rtol=1e-3, atol=1e-4)
    # the same weights on one process give the same numbers exactly
    evaluate.main(evaluate.arguments(["--checkpoint", str(tmp_path / "two"), "--limit", "60", "--workers", "0",
                                      "--output", str(tmp_path / "again")]))
    lines = [metrics.read_records(tmp_path / name / "test/per_sample.jsonl") for name in ("two", "again")]
    assert [[line[field] for field in metrics.FIELDS] for line in lines[0]] == \
        [[line[field] for field in metrics.FIELDS] for line in lines[1]]
    scores = [json.loads((tmp_path / name / "test/metrics.json").read_text()) for name in ("two", "again")]
    assert scores[0]["mIoU"] == scores[1]["mIoU"] and scores[0]["oIoU"] == scores[1]["oIoU"]


class Asked(Exception):
    """A collective call was reached."""


COLLECTIVE = {("evaluate.py", "score_split", "barrier"), ("losses.py", "backward", "all_reduce"),
              ("losses.py", "forward", "all_gather"), ("metrics.py", "merged", "all_gather_object"),
              ("train.py", "agree", "all_reduce"), ("train.py", "save_resume", "all_gather_object"),
              ("train.py", "score_tests", "barrier")}


def test_a_card_is_never_asked_to_gather_what_lies_elsewhere(tmp_path, monkeypatch):
    """NCCL takes no tensor of the CPU. The meta device stands for the card; objects travel as what is on no device."""
    called = {(path.name, function.name, call.func.attr) for path in (*ROOT.glob("*.py"), *ROOT.glob("models/*.py"))
              for function in ast.walk(ast.parse(path.read_text())) if isinstance(function, ast.FunctionDef)
              for call in ast.walk(function) if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
              and ast.unparse(call.func.value) == "dist" and hasattr(dist, call.func.attr)}
    asking = {one for one in called if not re.match("is_|get_|init_process|destroy_|rendezvous|PrefixStore", one[2])}
    assert asking == COLLECTIVE                                     # each of them is asked below, or has no tensor
    card = torch.device("meta")

    def gather(parts, mine):
        assert {one.device for one in (*parts, mine)} == {card}
        if mine.dtype == torch.long:
            parts[:] = [torch.tensor([3]), torch.tensor([2])]       # what the host reads

    def reduce(tensor):
        assert tensor.device == card
        raise Asked

    def gather_objects(every, mine):
        assert every == [None, None]
        every[:] = [mine] * len(every)
        kinds = {type(value) for value in mine.values()}
        assert kinds == {np.ndarray} or all(value.device.type == "cpu" for value in mine.values())
        raise Asked

    for name, stand_in in {"all_gather": gather, "all_reduce": reduce, "all_gather_object": gather_objects,
                           "is_initialized": lambda: True, "get_world_size": lambda: 2, "get_rank": lambda: 1}.items():
        monkeypatch.setattr(dist, name, stand_in)
    flags = [True, torch.ones((), dtype=torch.bool, device=card), torch.zeros(2, 3, dtype=torch.float64, device=card)]
    with pytest.raises(Asked):
        train.agree(evaluate.Processes(0, 2, card), flags, {"loss": torch.zeros((), device=card)})
    rows = torch.zeros(2, 4, device=card, requires_grad=True)
    every, first = losses.GatherRows.apply(rows)
    assert (every.shape, every.device, first) == ((5, 4), card, 3)
    with pytest.raises(Asked):
        every.sum().backward()
    scores = metrics.Scores()
    scores.add(torch.arange(2), torch.ones(2).long(), torch.ones(2).long())
    with pytest.raises(Asked):
        scores.merged()
    job = train.begin(options(tmp_path / "run"), ONE)
    with pytest.raises(Asked):
        train.save_resume(job._replace(processes=evaluate.Processes(0, 2, ONE.device)), None, {},
                          train.random_state(ONE.device))


def test_each_process_takes_its_card_before_they_meet_and_wraps_the_model_there(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(getattr(device, "index", device)))
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 5, 8)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **there: done.append(backend))
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    processes = evaluate.start_processes()
    assert processes == evaluate.Processes(5, 8, torch.device("cuda", 1))
    assert done == [1, "nccl"]
    job = train.begin(options(tmp_path / "run"), ONE)
    learner = train.build(job)
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model, device_ids: (model, device_ids))
    for at, ids in ((processes, [1]), (evaluate.Processes(0, 2, ONE.device), None)):
        network = train.start_phase(job._replace(processes=at), learner, 0).network
        assert network == (learner.model, ids)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for at in (ONE, evaluate.Processes(0, 2, ONE.device)):      # DDP's word on 1x1 convolutions
            assert train.start_phase(job._replace(processes=at), learner, 0).network == (
                learner.model if at == ONE else (learner.model, None))
            warnings.warn("Grad strides do not match bucket view strides.", stacklevel=1)
    assert len(said) == 1


def test_fewer_samples_than_processes_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="process"):
        train.begin(options(tmp_path / "run", "--limit", "1"), evaluate.Processes(0, 2, torch.device("cpu")))


# ------------------------------------------------------------------------------------------------- the same to the bit


@pytest.mark.parametrize("name", [name for name in models.PAPERS if name != "toy"])
def test_two_threads_give_the_same_gradient_every_time(name, monkeypatch):
    """Seven sentences of an image: the two threads meet in the gradient of x[index], which they share at one image."""
    torch.set_num_threads(2)
    paper = models.paper(name)
    samples = data.read("synthetic", "", "train", limit=12)
    tokenizer = models.word_tokenizer(name, paper.Config.tiny(), data.vocabulary("synthetic", samples))
    torch.manual_seed(0)
    model = models.build(name, dataclasses.replace(paper.Config.tiny(), vocab_size=len(tokenizer))).train()
    if hasattr(model, "start_phase"):
        model.start_phase("joint")
    model.param_groups({**paper.RECIPE, **paper.RECIPE_TINY})
    batch = data.collate([data.ReferringDataset(samples, model.config.image_size, tokenizer)[tuple(range(7))]])
    gradients = []

    def step(*_):
        torch.manual_seed(1)
        outputs, moved = evaluate.forward(model, batch, ONE.device, "fp32")
        sum(model.criterion(outputs, moved, 0.5).values()).backward()
        gradients.append([one.grad.clone() for one in model.parameters() if one.requires_grad])
        model.zero_grad()

    monkeypatch.setattr(train, "train", step)
    for _ in range(3):
        main(monkeypatch, "--device", "cpu")
    assert_same(gradients[0], gradients[1])
    assert_same(gradients[0], gradients[2])


def test_a_run_is_repeatable_throughout(tmp_path, monkeypatch):
    torch.set_num_threads(2)
    seen, real = [], toy.Toy.forward

    def watched(self, *inputs):
        seen.append((torch.are_deterministic_algorithms_enabled(),
                     torch.utils.deterministic.fill_uninitialized_memory))
        return real(self, *inputs)

    monkeypatch.setattr(toy.Toy, "forward", watched)
    for run in ("one", "two"):
        main(monkeypatch, "--model", "toy", "--device", "cpu", "--workers", 0, "--limit", 60, "--output",
             tmp_path / run, "--set", "per_image=7", "batch_size=14")
    assert_same(state_of(tmp_path / "one"), state_of(tmp_path / "two"))
    assert set(seen) == {(True, False)}


# ---------------------------------------------------------------------------------------------- faults, nothing lost


def test_a_full_disk_ends_in_one_line_and_leaves_no_part(tmp_path, capsys):     # what is printed takes no file
    words = ("--epochs", "3", "--set", "batch_size=4")
    run_to_end(tmp_path / "run", *words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    state = state_of(tmp_path / "run")
    (tmp_path / "run/resume.pt").unlink()
    with models.put_in_place(tmp_path / "run/resume.pt") as part:
        torch.save({**state, "epoch": 2}, part)
    kept = (tmp_path / "run/resume.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.safetensors"]) - 100, limits[1]))
    try:
        with pytest.raises(ValueError, match="resume.pt could not be written"):
            run_to_end(tmp_path / "run", *words, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run/resume.pt").read_bytes() == kept
    assert (tmp_path / "run/last.safetensors").read_bytes() == before["last.safetensors"]
    assert not list((tmp_path / "run").glob("*.part"))
    run_to_end(tmp_path / "run", *words, "--resume")


def test_weights_that_are_not_finite_are_never_scored(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        run_to_end(tmp_path / "run", "--epochs", "1", "--limit", "12", "--batch-size", "12", "--lr", "1e30")
    assert not (tmp_path / "run/best.safetensors").exists() and not (tmp_path / "run/test").exists()


@pytest.mark.parametrize("output, reason", [("file", "File exists"), ("file/below", "Not a directory"),
                                            ("x" * 300, "File name too long")])
def test_an_output_that_cannot_be_a_folder_is_named(tmp_path, output, reason):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=f"--output .* can't be a folder .{reason}"):
        run_to_end(tmp_path / output)
    assert (tmp_path / "file").read_text() == "mine"


def custom(folder, word="zebra"):
    layouts.write("custom", folder, splits={"train": 3, "val": 2})
    head, *lines = (folder / "samples.csv").read_text().splitlines()
    said = [re.sub(r"(truth/\S+?\.png),", rf"\1,{word} ", line) for line in lines]
    (folder / "samples.csv").write_text("\n".join([head, *said]))
    return ("--dataset", "custom", "--data-root", str(folder), "--preset", "tiny", "--epochs", "1", "--batch-size", "4")


def test_resume_with_another_precision_other_data_or_other_words_is_refused(tmp_path):
    words = custom(tmp_path / "data")
    run_to_end(tmp_path / "run", *words)
    with pytest.raises(ValueError, match="begun with precision fp32, now bf16 is asked for"):
        run_to_end(tmp_path / "run", *words, "--resume", "--precision", "bf16")
    other = custom(tmp_path / "other")
    with pytest.raises(ValueError, match=f"begun with data_root {tmp_path / 'data'}, now {tmp_path / 'other'} is"):
        run_to_end(tmp_path / "run", *other, "--resume")
    shutil.rmtree(tmp_path / "data")
    custom(tmp_path / "data", "quark")
    with pytest.raises(ValueError, match=r"tokenizer.json has other words than the data now \(quark, zebra\)"):
        run_to_end(tmp_path / "run", *words, "--resume")
    shutil.rmtree(tmp_path / "data")
    custom(tmp_path / "data", "zebra quark")
    with pytest.raises(ValueError, match=r"tokenizer.json has other words than the data now \(quark\)"):
        run_to_end(tmp_path / "run", *words, "--resume")
    shutil.rmtree(tmp_path / "data")
    custom(tmp_path / "data")
    path = tmp_path / "run/tokenizer.json"
    known = json.loads(path.read_text())["words"]
    for kept, odd in ((known[::-1], "their order"), (known[:-9] + [f"a{k}" for k in range(9)], "a0, a1, a2, a3, a4")):
        path.write_text(json.dumps({"words": kept}))
        with pytest.raises(ValueError, match=rf"other words than the data now \({odd}\): the data have changed"):
            run_to_end(tmp_path / "run", *words, "--resume")


def test_a_lost_log_is_said_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(StopAt, "steps", 4)                         # at the end of the first epoch
    monkeypatch.setattr(train, "StopRequest", StopAt)
    words = ("--epochs", "2", "--set", "batch_size=4", "per_image=4")
    for damage in (lambda log: log.unlink(), lambda log: log.write_bytes(log.read_bytes()[:-10])):
        with pytest.raises(train.Stopped, match="stopped"):
            run_to_end(tmp_path / "run", *words, "--overwrite")
        while state_of(tmp_path / "run")["epoch"] < 1:
            with pytest.raises(train.Stopped):
                run_to_end(tmp_path / "run", *words, "--resume")
        damage(tmp_path / "run/log.jsonl")
        monkeypatch.setattr(StopAt, "steps", 1000)
        run_to_end(tmp_path / "run", *words, "--resume")
        monkeypatch.setattr(StopAt, "steps", 4)
        assert "log.jsonl has lost lines of before" in capsys.readouterr().out
        assert [line["epoch"] for line in log_of(tmp_path / "run")] == [2]


# ---------------------------------------------------------------------------------------- to begin, to see, to plan


def test_a_new_run_starts_from_the_weights_of_another(tmp_path, capsys):
    run_to_end(tmp_path / "old", "--epochs", "1")
    run_to_end(tmp_path / "new", "--epochs", "1", "--lr", "0", "--start", str(tmp_path / "old"))
    assert "start    " in (said := capsys.readouterr().out) and "7 of its 7 tensors taken" in said
    old, new = (models.read_weights(tmp_path / name / "last.safetensors")[0] for name in ("old", "new"))
    assert_same(old, new)
    assert json.loads((tmp_path / "new/config.json").read_text())["start"] == str(tmp_path / "old")
    run_to_end(tmp_path / "new", "--epochs", "1", "--lr", "0", "--start", str(tmp_path / "gone"), "--resume")
    with pytest.raises(FileNotFoundError, match="--start .*gone: no such run folder"):
        run_to_end(tmp_path / "third", "--start", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=f"now epochs=3 .* train on from its weights: --start {tmp_path / 'new'}"):
        run_to_end(tmp_path / "new", "--epochs", "3", "--resume")


def test_a_word_takes_its_vector_along_into_a_list_of_other_words(tmp_path):
    words = custom(tmp_path / "old")
    run_to_end(tmp_path / "run", *words, "--lr", "0")
    old = models.load(tmp_path / "run")
    words = custom(tmp_path / "new", "quark")                       # before those words that zebra came after
    job = train.begin(options(tmp_path / "next", *words, "--start", str(tmp_path / "run")), ONE)
    new, ours, theirs = train.build(job).model, job.tokenizer.numbers, old.tokenizer.numbers
    assert ours.keys() ^ theirs.keys() == {"quark", "zebra"} and ours["the"] != theirs["the"]
    for word in ours.keys() & theirs.keys():
        assert torch.equal(new.words.weight[ours[word]], old.words.weight[theirs[word]]), word


def test_a_run_from_the_authors_file_takes_their_forms(tmp_path):
    theirs = models.build("toy", toy.Config(width=6, vocab_size=7))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    args = train.arguments(["--model", "toy", "--start", str(tmp_path / "theirs.pth"), "--dataset", "rrsisd"])
    config, recipe, _ = train.settle(args)
    assert (config.width, recipe["black_boxes"], args.output) == (6, 0.5, Path("runs/toy-rrsisd-official_all"))
    words = ("--model", "toy", "--ablation", "1/slow", "--start")
    assert train.arguments([*words, str(tmp_path / "theirs.pth")]).ablation == "1/slow"
    assert train.arguments([*words[:2], "--start", str(tmp_path)]).ablation is None         # a run of ours
    with pytest.raises(ValueError, match="the authors of crobim_u have released no trained weights"):
        train.arguments(["--model", "crobim_u", "--start", str(tmp_path / "theirs.pth")])
    torch.save({"strange": torch.zeros(1)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth: none of its 1 tensors fits"):
        run_to_end(tmp_path / "run", "--start", str(tmp_path / "odd.pth"))


@pytest.mark.parametrize("option", ["--checkpoint", "--init", "--weights"])
def test_other_names_of_start_are_answered_with_it(option, capsys):
    with pytest.raises(SystemExit):
        train.arguments(["--model", "toy", option, "run"])
    assert "begins with the weights of another by --start RUN|FILE" in capsys.readouterr().err


def test_resume_auto_begins_a_run_or_goes_on_with_it(tmp_path):
    words = ("--epochs", "1", "--resume", "auto")
    assert not options(tmp_path / "run", *words).resume
    run_to_end(tmp_path / "run", *words)
    assert options(tmp_path / "run", *words).resume is True
    run_to_end(tmp_path / "run", *words)
    assert len(log_of(tmp_path / "run")) == 1


def test_tables_of_ablations_are_listed_and_rows_of_one_trained_model_refused(tmp_path, capsys, monkeypatch):
    main(monkeypatch, "--model", "toy", "--list-ablations")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["toy, table 1", f"  {'1/wide':<28} {'71.3 oIoU':<24} width=12",
                     f"  {'1/slow':<28} {'':<24} lr=0.0001",
                     "toy, table 2   (of one trained model: evaluate.py --set)",
                     f"  {'2/dry':<28} {'':<24} dropout=0.0",
                     "toy, table official", f"  {'official/all':<28} {'':<24} width=6  black_boxes=0.5"]
    with pytest.raises(ValueError, match="2/dry: no training of its own; .* python evaluate.py .* --set dropout=0.0"):
        run_to_end(tmp_path / "run", "--ablation", "2/dry")


def test_a_refused_row_is_answered_with_all_that_it_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(toy.ABLATIONS, "2", {"dry": {"dropout": 0.0, "width": 4}})
    with pytest.raises(ValueError, match="--checkpoint RUN --set dropout=0.0 width=4$"):
        train.settle(options(tmp_path / "run", "--ablation", "2/dry"))


def test_settings_cut_sentences_speed_and_memory_are_said(tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        run_to_end(tmp_path / "run", "--dataset", "rrsisd", "--data-root", str(tmp_path / "none"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["config", "recipe"]
    run_to_end(tmp_path / "run", "--epochs", "1", "--set", "text_length=3")
    assert " of 60 sentences are longer than 3 tokens and are cut" in capsys.readouterr().out
    (line,) = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert 0.05 < line["peak_gib"] < 16 and line["images_per_second"] > 0


def test_seconds_are_those_of_the_steps_also_over_a_stop(tmp_path, monkeypatch):
    """A clock on which a step takes 2.04 seconds: 6.12 in an epoch of three steps, whatever lies between."""
    now, real, images = [0.0], train.train_step, []

    def step(*given):
        now[0] += 2.04
        result = real(*given)
        images.append(result[1]["images"])
        return result

    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(train, "train_step", step)
    words = ("--set", "batch_size=4")
    for stops_at in (2, 1000):
        with monkeypatch.context() as stopping:
            stopping.setattr(StopAt, "steps", stops_at)
            stopping.setattr(train, "StopRequest", StopAt)
            with contextlib.suppress(train.Stopped):
                run_to_end(tmp_path / "run", *words, *(["--resume"] if images else []))
        now[0] += 500
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(images) == 6 and [line["seconds"] for line in lines] == [6.1, 6.1]
    assert [line["images_per_second"] for line in lines] == [round(sum(images[k:k + 3]) / 6.12, 2) for k in (0, 3)]


def test_pace_is_of_images_and_the_peak_of_the_card_where_there_is_one(monkeypatch):
    there = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2 ** 19))     # KiB
    monkeypatch.setattr(train, "resource", there)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2 ** 29)
    at = {"images": 5, "seconds": 3.0}
    assert train.pace(at, ONE.device) == {"images_per_second": 1.67, "peak_gib": 1.5}
    assert train.pace(at, torch.device("cuda")) == {"images_per_second": 1.67, "peak_gib": 2.5}
    monkeypatch.setattr(train, "resource", None)
    assert train.pace({"images": 1, "seconds": 0.0}, ONE.device) == {"images_per_second": 1e9, "peak_gib": 0.0}


def test_windows_counts_no_memory(monkeypatch):
    spec = importlib.util.spec_from_file_location("train_on_windows", train.__file__)
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        windows.setitem(sys.modules, "resource", None)              # it has no such module
        spec.loader.exec_module(there := importlib.util.module_from_spec(spec))
    assert there.resource is None and train.resource is resource


def test_data_are_read_and_divided_as_the_options_and_the_recipe_say(monkeypatch):
    args = train.arguments(["--model", "toy", "--dataset", "refer", "--data-root", "D", "--refs", "R", "--categories",
                            "seen", "--small", "--limit", "9", "--seed", "3"])
    monkeypatch.setattr(data, "read", lambda *words, **options: (words, options))
    read = train.read(args, "val", 2)
    assert read == (("refer", "D", "val"),
                    {"refs": "R", "categories": "seen", "limit": 9, "epoch": 2, "small": True})
    assert train.read(args, "val")[1]["epoch"] == 0
    monkeypatch.setattr(data, "TrainSampler", lambda samples, **options: (samples, options))
    recipe = {"batch_size": 4, "micro_batch": 2, "per_image": 1}
    shared = {"batch_size": 4, "micro_batch": 2, "per_image": 1, "seed": 3, "world": 5}
    processes = evaluate.Processes(0, 5, ONE.device)
    for recipe_, epoch, masked in ((recipe, 0, 0.0), ({**recipe, "repeat_mask": 0.5}, 2, 0.5)):
        samples, options = train.make_sampler(args, recipe_, processes, *([epoch] if epoch else []))
        assert (samples[0][2], samples[1]["epoch"]) == ("train", epoch)
        assert options == {**shared, "repeat_mask": masked}


def test_published_weights_are_loaded_where_no_others_are_complete(tmp_path, monkeypatch):
    """A run or a start that holds every tensor needs none of them, one that leaves some out does."""
    loads, source = [], {"frozen": "hub"}
    words = models.word_tokenizer("toy", toy.Config(), ["ship"])

    class Published:
        length = toy.Config.text_length

        def __call__(self, texts):
            return words(texts)

    monkeypatch.setattr(toy, "tokenizer", lambda config: Published())
    monkeypatch.setattr(toy.Toy, "load_pretrained", lambda self: loads.append(1) or dict(source), raising=False)
    go = ("--epochs", "1", "--set", "pretrained=hub")
    for name, sources, times in (("short", {"frozen": "hub"}, [1, 2, 3]), ("whole", {}, [1, 1, 1])):
        loads.clear()
        source.clear()
        source.update(sources)
        run_to_end(tmp_path / name, *go)
        assert state_of(tmp_path / name)["left_out"].keys() == (
            {"frozen.weight", "frozen.bias"} if sources else set())
        done = [len(loads)]
        run_to_end(tmp_path / name, *go, "--resume")
        done.append(len(loads))
        run_to_end(tmp_path / f"{name}-on", *go, "--start", str(tmp_path / name))
        assert [*done, len(loads)] == times
    theirs = train.build(train.begin(options(tmp_path / "new", *go, "--ablation", "official/all"), ONE)).model
    tensors = theirs.state_dict()
    for names, times in ((list(tensors), 0), (list(tensors)[:-1], 1)):    # the authors' file, whole or without one
        loads.clear()
        torch.save({name: tensors[name] for name in names}, tmp_path / "theirs.pth")
        train.build(train.begin(options(tmp_path / "new", *go, "--start", str(tmp_path / "theirs.pth")), ONE))
        assert len(loads) == times


def test_a_resumed_run_begins_the_phases_that_have_begun(tmp_path, monkeypatch):
    job, begun, real = train.begin(options(tmp_path / "run", "--epochs", "4", "--set",
                                           "phases={'a': 0.25, 'b': 0.5, 'c': 0.25}"), ONE), [], train.start_phase
    monkeypatch.setattr(train, "start_phase", lambda job, learner, epoch: begun.append(epoch) or real(
        job, learner, epoch))
    for (epoch, step, phase), wanted in {
            (0, 0, None): [0], (0, 2, None): [0], (1, 0, None): [0], (1, 1, None): [0, 1], (2, 0, None): [0, 1],
            (3, 0, None): [0, 1], (3, 1, None): [0, 1, 3],      # older files: what begins with this step begins later
            (1, 0, 0): [0], (1, 0, 1): [0, 1], (3, 0, 3): [0, 1, 3], (2, 1, 1): [0, 1]}.items():
        begun.clear()
        torch.save({"epoch": epoch, "step": step, "left_out": {}, **({} if phase is None else {"phase": phase})},
                   tmp_path / "resume.pt")
        learner = train.build(job, train.load_resume(tmp_path / "resume.pt"))
        assert begun == wanted and learner.model.phase == {0: "a", 1: "b", 3: "c"}[wanted[-1]]


def test_the_images_of_an_epoch_are_counted_and_its_bar_goes_on_where_it_stood(tmp_path, monkeypatch):
    monkeypatch.setattr(StopAt, "steps", 2)
    monkeypatch.setattr(train, "StopRequest", StopAt)
    with pytest.raises(train.Stopped, match="^stopped after step 2 of epoch 1; go on with --resume$"):
        run_to_end(tmp_path / "run", "--limit", "100")
    sampler = data.TrainSampler(data.read("synthetic", "", "train", limit=100), batch_size=8, micro_batch=8,
                                per_image=2, seed=0)
    images = sum(len(micro) for step in range(2) for rank in sampler.plan(0, step) for micro in rank)
    assert state_of(tmp_path / "run")["images"] == images > 4

    def bar(steps, title, **given):
        raise Asked(f"{steps} {title} {given}")

    monkeypatch.setattr(train, "tqdm", bar)
    wanted = f"range(2, {sampler.steps}) epoch 1/2 {{'initial': 2, 'total': {sampler.steps}, "
    with pytest.raises(Asked, match=f"^{re.escape(wanted)}"):
        run_to_end(tmp_path / "run", "--limit", "100", "--resume")


def test_the_control_of_own_data_and_the_black_boxes_of_the_recipe(tmp_path, monkeypatch, capsys):
    given, real = [], data.ReferringDataset.__init__

    def watched(self, *args, **options):
        given.append(options.get("black_boxes"))
        real(self, *args, **options)

    monkeypatch.setattr(data.ReferringDataset, "__init__", watched)
    monkeypatch.setattr(toy, "RECIPE", {**toy.RECIPE, "black_boxes": 0.25})
    words = custom(tmp_path / "data")
    run_to_end(tmp_path / "run", *words)
    assert 0.25 in given and (tmp_path / "run/val-shuffled/metrics.json").is_file()
    assert "val: mIoU" in (said := capsys.readouterr().out) and "control, every image with another image's" in said


class Writer(list):
    """Stands for tensorboard's."""

    every = []

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, name, value, epoch):
        self.every.append((self.folder.name, name, value, epoch))

    def add_image(self, name, image, epoch, dataformats):
        self.every.append((name, image.ndim, dataformats, epoch))


def test_tensorboard_gets_losses_rates_scores_and_the_sheet(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        run_to_end(tmp_path / "run", "--tensorboard")
    assert not (tmp_path / "run").exists() and train.begin(options(tmp_path / "other"), ONE)      # nor is it needed
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__="there"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    run_to_end(tmp_path / "run", "--tensorboard", "--epochs", "2")
    names = [entry[1] for entry in Writer.every if entry[0] == "tensorboard"]
    assert {"loss", "seg", "lr", "val_mIoU", "test_mIoU"} <= set(names) and names.count("loss") == 2
    assert ("test", 3, "HWC", 2) in Writer.every
    for entry in log_of(tmp_path / "run"):
        assert ("tensorboard", "loss", entry["loss"], entry["epoch"]) in Writer.every
    score = json.loads((tmp_path / "run/test/metrics.json").read_text())["mIoU"]
    assert ("tensorboard", "test_mIoU", score, 2) in Writer.every


@pytest.mark.parametrize("name, precision", [
    *((name, "bf16") for name in models.PAPERS if name != "toy"), ("crobim_u", "fp32"), ("rs2sam2", "fp32")])
def test_the_plan_counts_what_a_step_keeps(name, precision):
    paper = models.paper(name)
    config, recipe = dataclasses.replace(paper.Config.tiny(), pretrained="none"), {**paper.RECIPE, **paper.RECIPE_TINY}
    model = models.build(name, config).train()
    if recipe["phases"]:
        model.start_phase(list(recipe["phases"])[-1])
    model.param_groups(recipe)
    text_mask, side = torch.ones(8, config.text_length, dtype=torch.bool), config.image_size
    batch = {"images": torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8), "tokens": text_mask.long() * 4,
             "text_mask": text_mask, "image_index": torch.arange(8) // 4, "masks": torch.rand(8, side, side) > 0.5,
             "instance": torch.arange(8)}
    real = train.kept_for_backward(model, batch, precision)
    every, learn, fixed, kept = train.count(name, config, recipe, precision, 8)
    assert kept == pytest.approx(real, rel=0.05)
    learning = [one for one in model.parameters() if one.requires_grad]
    assert (every, learn) == (sum(one.numel() for one in model.parameters()), sum(one.numel() for one in learning))
    held = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    assert fixed == held + 3 * sum(one.nbytes for one in learning)          # gradients, AdamW's two moments
    if name == "prompt_ris":
        args = train.arguments(["--model", name, "--precision", precision])
        *settings, every_, learn_, table = train.memory(args)
        assert (settings, every_, learn_) == ([paper.Config.tiny(), recipe], every, learn)
        assert table[8] == pytest.approx((fixed + kept) / 2 ** 30, rel=0.02) and table[32] > table[16] > table[4]


class Powers(torch.nn.Module):
    """Keeps the images as floats, their exponential and that one's sine: three tensors of their size."""

    def __init__(self):
        super().__init__()
        self.config, self.weight = toy.Config(), torch.nn.Parameter(torch.ones(3, 1, 1))
        self.register_buffer("shift", torch.zeros(3, 32, 32))

    def forward(self, images, tokens, text_mask, image_index):
        return {"logits": (images.float() * self.weight * 1.0 + self.shift).exp()}

    def criterion(self, outputs, batch, progress):
        assert progress == 0.5                                      # when everything that a schedule adds is on
        return {"sine": outputs["logits"].sin().square().sum()}


def test_what_is_kept_is_counted_once_and_without_the_models_own():
    batch = {"images": torch.zeros(2, 3, 32, 32), "tokens": None, "text_mask": None, "image_index": None}
    assert train.kept_for_backward(Powers(), batch, "fp32") == 3 * 4 * batch["images"].numel()


@pytest.mark.parametrize("per_image, expressions, images", [(0, 3, 3), (1, 3, 3), (3, 6, 2), (4, 6, 2), (3, 1, 1)])
def test_the_batch_that_is_counted_has_whole_images(monkeypatch, per_image, expressions, images):
    seen = []
    monkeypatch.setattr(train, "kept_for_backward", lambda model, batch, precision: seen.append((model, batch)) or 7)
    config = toy.Config(image_size=48, text_length=9)
    recipe = {**toy.RECIPE, "per_image": per_image, "phases": {"first": 0.5, "joint": 0.5}}
    *_, kept = train.count("toy", config, recipe, "fp32", expressions)
    model, batch = seen[0]
    assert kept == 7 and model.training and model.phase == "joint"
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "images": ((images, 3, 48, 48), torch.uint8), "masks": ((expressions, 48, 48), torch.bool),
        "tokens": ((expressions, 9), torch.long), "text_mask": ((expressions, 9), torch.bool),
        "image_index": ((expressions,), torch.long), "instance": ((expressions,), torch.long)}
    assert {(one.device.type, type(one).__name__) for one in batch.values()} == {("cpu", "FakeTensor")}


def test_the_plan_of_a_command_needs_neither_data_nor_weights(capsys, monkeypatch):
    build, asked = models.build, set()                      # RSRefSeg 2 reads its towers' sizes from their source
    monkeypatch.setattr(models, "build", lambda name, config: asked.add(config.pretrained) or build(name, config))
    main(monkeypatch, "--model", "crobim_u", "--dataset", "rrsisd", "--plan", "--data-root", "nowhere")
    said = capsys.readouterr().out
    assert "crobim_u (paper) on rrsisd" in said and "steps per epoch: not known" in said
    rows = [line.split() for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert [(int(row[0]), int(row[2])) for row in rows] == [(1, 32), (2, 16), (4, 8), (8, 4), (16, 2), (32, 1)]
    assert asked == {"none"}
    main(monkeypatch, "--model", "toy", "--plan", "--limit", 60)
    assert "60 training expressions: 2 steps per epoch, 4 in 2 epochs" in capsys.readouterr().out
    objects = len({sample.instance for sample in data.read("synthetic", "", "train", limit=60)})
    main(monkeypatch, "--model", "toy", "--plan", "--limit", 60, "--batch-size", 1, "--set", "per_image=0")
    assert f": {objects} steps per epoch, {2 * objects} in 2 epochs" in capsys.readouterr().out     # by one process


def test_the_plan_extends_two_counts_by_whole_images(monkeypatch, capsys):
    asked, gib = [], 2 ** 30

    def count(name, config, recipe, precision, expressions):
        asked.append((name, precision, expressions))
        return 3_450_000, 1_230_000, 4 * gib, (1 + expressions) * gib

    monkeypatch.setattr(train, "count", count)
    args = train.arguments(["--model", "toy", "--dataset", "rrsisd", "--data-root", "nowhere", "--batch-size", "20",
                            "--set", "per_image=3"])
    config, recipe, *numbers, table = train.memory(args)
    assert asked == [("toy", "fp32", 3), ("toy", "fp32", 6)] and numbers == [3_450_000, 1_230_000]
    assert (config, recipe) == (toy.Config(width=9), {**toy.RECIPE, "lr": 2e-2, "per_image": 3, "batch_size": 20})
    assert table == {3: 8.0, 6: 11.0, 12: 17.0}                     # 4 fixed, 1 + n kept
    train.plan(args)
    assert capsys.readouterr().out == (
        "toy (paper) on rrsisd: 3.45 M parameters, 1.23 M learn, fp32\n"
        "parameters, gradients, optimiser and what is kept for the backward pass; the peak may lie a third above\n\n"
        "micro-batch      GiB   micro-batches in a step of 20\n"
        "          3     8.00   7\n          6    11.00   4\n         12    17.00   2\n"
        "\nsteps per epoch: not known, the data are not there\n")
    args = train.arguments(["--model", "toy", "--batch-size", "2", "--set", "per_image=3", "--precision", "bf16"])
    assert train.memory(args)[-1] == {3: 8.0} and asked[-1] == ("toy", "bf16", 6)       # an image is never divided
    args = train.arguments(["--model", "toy", "--dataset", "rrsisd", "--batch-size", "4"])
    assert train.memory(args)[-1] == {1: 6.0, 2: 7.0, 4: 9.0} and asked[-2:] == [("toy", "fp32", 1), ("toy", "fp32", 2)]


def test_the_program_ends_as_its_run_does(monkeypatch, capsys):
    """A stop: status 130 and one line; the first process speaks; a fault lets go of what it held."""
    def stop(*_):
        raise train.Stopped("stopped after step 1")

    class Held:
        pass

    def fail(*_):
        held = Held()
        kept.append(weakref.ref(held))
        raise RuntimeError("a fault of ours")

    kept = []
    monkeypatch.setattr(train, "train", stop)
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, "--device", "cpu")
    assert ended.value.code == 130 and capsys.readouterr() == ("", "stopped after step 1\n")
    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(RuntimeError, match="a fault of ours") as caught:
        main(monkeypatch, "--device", "cpu")
    assert caught.tb and kept[0]() is None
    monkeypatch.setattr(train, "train", lambda args, processes: print("rank", processes.rank))
    for rank in (0, 1):
        monkeypatch.setattr(train, "start_processes", lambda _, rank=rank: evaluate.Processes(rank, 2, ONE.device))
        main(monkeypatch, "--device", "cpu")
    assert capsys.readouterr().out == "rank 0\n"


def test_the_random_state_of_a_card_comes_back(tmp_path, monkeypatch):
    card, given = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given.append((state, device)))
    state = train.random_state(card)
    assert state["cuda"].tolist() == [1] and state.keys() == {"cpu", "cuda"}
    assert train.random_state(ONE.device).keys() == {"cpu"}
    run_to_end(tmp_path / "run", "--epochs", "1")
    job = train.begin(options(tmp_path / "run", "--epochs", "1", "--resume"), ONE)
    here = job._replace(processes=evaluate.Processes(0, 1, card))
    for random, times in ((state, 1), (train.random_state(ONE.device), 1)):         # of a run that began on the CPU
        saved = state_of(tmp_path / "run")
        learner = train.build(job, saved)
        train.resume(here, learner, {**saved, "random": [random]})
        assert torch.equal(torch.get_rng_state(), random["cpu"]) and len(given) == times
    assert given == [(state["cuda"], card)]
    torch.manual_seed(3)
    second = train.random_state(ONE.device)
    saved = state_of(tmp_path / "run")
    learner = train.build(job, saved)
    two = job._replace(processes=evaluate.Processes(1, 2, ONE.device))
    train.resume(two, learner, {**saved, "random": [saved["random"][0], second]})
    assert torch.equal(torch.get_rng_state(), second["cpu"])


def test_a_card_that_is_too_small_is_answered_with_the_micro_batch_that_fits(tmp_path, monkeypatch):
    def explode(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    table, card = {1: 1.0, 2: 3.0, 4: 7.0, 8: 15.0}, SimpleNamespace(total_memory=2 ** 29)
    known = [toy.Config(), toy.RECIPE, 1, 1, table]
    monkeypatch.setattr(toy.Toy, "criterion", explode)
    monkeypatch.setattr(train, "memory", lambda _: known)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {0: card}.get)
    with pytest.raises(ValueError, match="of memory: 0.5 GiB, --micro-batch 8 in fp32.*no smaller micro-batch fits$"):
        main(monkeypatch, "--model", "toy", "--device", "cpu", "--limit", 60, "--workers", 0, "--output",
             tmp_path / "run")
    args, said = options(tmp_path / "run", "--precision", "bf16"), []
    for gib, micro_batch in ((7, 8), (7.5, 8), (100, 8), (100, 4), (100, 1)):
        card.total_memory, known[1] = gib * 2 ** 30, {**toy.RECIPE, "micro_batch": micro_batch}
        said.append(train.out_of_memory(args))
    assert "7.0 GiB, --micro-batch 8 in bf16; by the count of --plan say --micro-batch 2" in said[0]
    assert [re.search("say --micro-batch (.)|no smaller", one)[1] for one in said] == ["2", "4", "4", "2", None]
    assert "checkpointing" not in said[0]
    for on in (True, False):
        known[0] = dataclasses.make_dataclass("Config", [("checkpointing", bool, on)])()
        said = train.out_of_memory(args)
        assert ("; --set checkpointing=True keeps less and takes longer" in said) is not on
