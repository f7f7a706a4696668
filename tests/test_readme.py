"""README.md: its Python runs, its commands parse, its sizes are the files'."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from PIL import Image
from torch import nn

import data
import evaluate
import metrics
import models
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LISTING, LOOP, MODULES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_notebook_lines_give_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models.PAPERS, "toy", "Toy")
    toy.register()
    model = models.build("toy", toy.Config()).eval()
    model.tokenizer = models.word_tokenizer("toy", model.config, ["the", "ship", "tanks", "pier", "at", "storage"])
    monkeypatch.setattr(models, "load", lambda run, device: model)
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save("photo.jpg")
    names = {}
    exec(LISTING, names)
    assert names["masks"].shape == (2, 40, 50) and names["masks"].dtype == bool


def test_loop_without_train_py_changes_the_weights():
    names = {}
    torch.manual_seed(0)
    exec(LOOP, names)
    assert any(parameter.grad is not None for parameter in names["model"].parameters())
    assert len(LOOP.strip().split("\n")) <= 16 and len(names["loader"]) == 2


def test_modules_plug_into_other_towers():
    class Decoder(nn.Module):
        def forward(self, levels, words):
            return levels[0].mean(1, keepdim=True)

    names = {"coarsest": torch.randn(2, 256, 2, 3), "words": torch.randn(2, 5, 256), "decoder": Decoder(),
             "text_mask": torch.ones(2, 5, dtype=torch.bool), "finest": torch.randn(2, 256, 8, 12),
             "levels": [torch.randn(2, 256, 8, 12), torch.randn(2, 256, 4, 6)]}
    exec(MODULES, names)
    assert names["U"].shape == (2, 1, 2, 3) and names["logits"].shape == (2, 1, 8, 12)
    assert [level.shape[-2:] for level in names["levels"]] == [(8, 12), (4, 6)]


def commands():
    program = r"((?:train|evaluate|data|metrics)\.py [^\n#]*)"
    found = re.findall(r"^ {4}(?:srun )?(?:torchrun [-\w ]+? )?(?:python )?" + program, README, re.M)
    return [command for command in found if "..." not in command]


@pytest.mark.parametrize("command", commands())
def test_commands_are_known_to_the_parsers(command):
    program, *words = shlex.split(command)
    parse = {"train.py": train.arguments, "evaluate.py": evaluate.arguments}.get(program)
    if parse:
        parse(words)
    else:
        options = set(re.findall(r'"(--[a-z-]+)"', (ROOT / program).read_text()))
        assert {word for word in words if word.startswith("--")} <= options


def test_line_counts_and_names_are_the_files():
    for name in (path.stem for path in ROOT.glob("models/[a-z]*.py")):
        stated = int(re.search(rf"models/{name}\.py\), ([\d,]+)", README)[1].replace(",", ""))
        assert stated == pytest.approx(len((ROOT / f"models/{name}.py").read_text().splitlines()), rel=0.05), name
    shared = [ROOT / name for name in ("data.py", "train.py", "evaluate.py", "losses.py", "metrics.py",
                                       "models/__init__.py")]
    stated = int(re.search(r"Beside them, ([\d,]+) lines", README)[1].replace(",", ""))
    assert stated == pytest.approx(sum(len(path.read_text().splitlines()) for path in shared), rel=0.05)
    for dataset in data.DATASETS:
        assert f"`{dataset}`" in README, dataset


def test_the_grep_line_finds_code():
    pattern, file = re.search(r'`grep -n "(.*?)" (\S+)`', README).groups()
    found = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().split("\n")[45:] if pattern in line]
    assert any(found), "the mark stands behind code, not in the head alone"


def test_scores_have_the_names_that_the_readme_uses():
    line = {"id": "1", "image": "a", "expression": "x", "instance": "1", "category": None, "category_source": None,
            "intersection": 1, "union": 2, "iou": 0.5}
    assert {"oIoU", "mIoU", "Pr@0.5", "Pr@0.9", "ImgAcc", "InstAcc"} <= set(metrics.summarize([line], bootstrap=0))
