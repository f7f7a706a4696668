"""A paper in miniature: the contract of DESIGN in the fewest lines, so that the trainer's tests take seconds.

It has what can go wrong in a trainer: dropout, batch norm, a frozen part, two phases, a loss that can be made infinite.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: E402
from losses import binary_cross_entropy  # noqa: E402

MAPS = ("coarse",)


@dataclass(frozen=True)
class Config:
    image_size: int = 32
    text_length: int = 12
    vocab_size: int = 100
    pretrained: str = "none"
    width: int = 8
    dropout: float = 0.1
    batch_norm: bool = False
    explode_at: float = 2.0                         # progress from which the loss is infinite

    @classmethod
    def tiny(cls):
        return cls()


RECIPE = {"epochs": 2, "batch_size": 8, "micro_batch": 8, "lr": 1e-2, "weight_decay": 0.01, "schedule": "poly",
          "power": 0.9, "warmup": 0, "clip": 1.0, "precision": "fp32", "per_image": 0, "repeat_mask": 0.0,
          "black_boxes": 0.0, "protocol": "resized", "empty": "zero", "select": "mIoU", "phases": None}
RECIPE_FOR = {"rrsisd": {"lr": 2e-2, "width": 9}}
RECIPE_TINY = {"per_image": 2}
ABLATIONS = {"1": {"wide": {"width": 12}, "slow": {"lr": 1e-4}}, "2": {"dry": {"dropout": 0.0}},
             "official": {"all": {"width": 6, "black_boxes": 0.5}}}
FIGURES = {"1": {"wide": "71.3 oIoU"}}
EVALUATION_ONLY = ("2",)
RETIRED = {"depth": 2, "sizes": (1, 2), "swing": 0.5}           # fields of before, at what they have always meant here
OLD_DEFAULTS = {"dropout": 0.3}                                 # what a run meant that does not say
SPECIAL_TOKENS = {"pad": 0, "unknown": 1}


def tokenizer(config):
    raise FileNotFoundError("the toy's tokenizer is on no hub")


def read_official(path):
    return {name.removeprefix("theirs."): tensor for name, tensor in torch.load(path, weights_only=True).items()}


class Toy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.frozen = nn.Conv2d(3, 3, 1)
        self.image = nn.Sequential(nn.Conv2d(3, config.width, 3, padding=1),
                                   nn.BatchNorm2d(config.width) if config.batch_norm else nn.Identity(), nn.ReLU())
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.second = nn.Conv2d(config.width, 1, 3, padding=1)
        self.phase = "both"

    def start_phase(self, name):
        self.phase = name

    def forward(self, images, tokens, text_mask, image_index=None):
        index = torch.arange(len(images)) if image_index is None else image_index
        features = self.image(self.frozen(images / 255.0))[index]                           # (M,C,S,S)
        words = self.words(tokens) * text_mask[..., None]
        sentence = words.sum(1) / text_mask.sum(1, keepdim=True)                            # (M,C)
        mixed = self.dropout(features * sentence[:, :, None, None])
        coarse = mixed.sum(1, keepdim=True)                                                 # (M,1,S,S)
        logits = coarse if self.phase == "first" else coarse + self.second(mixed)
        return {"logits": logits, "coarse": coarse.sigmoid()}

    def criterion(self, outputs, batch, progress):
        loss = binary_cross_entropy(outputs["logits"], batch["masks"][:, None]).mean()
        return {"seg": loss * (float("inf") if progress >= self.config.explode_at else 1.0)}

    def param_groups(self, recipe):
        self.requires_grad_(False)
        learning = [self.image, self.words] + ([] if self.phase == "first" else [self.second])
        for module in learning:
            module.requires_grad_(True)
        return [{"params": [p for module in learning for p in module.parameters()], "lr": recipe["lr"],
                 "weight_decay": recipe["weight_decay"]}]

    def diagnose(self, outputs, masks):
        return {"brightness": outputs["coarse"].mean((1, 2, 3))}


def register():
    """Make the toy known as --model toy in this process."""
    sys.modules["models.toy"] = sys.modules[__name__]
    models.PAPERS["toy"] = "Toy"


def watch(folder, event, number):
    """Note each step's progress in `folder`; the step of that number holds until a stop is asked for, or goes wrong."""
    real, rank = Toy.criterion, os.environ.get("RANK", "0")
    steps, holds = Path(folder, f"steps-{rank}"), Path(folder, f"holds-{rank}")

    def criterion(self, outputs, batch, progress):
        with open(steps, "a") as file:
            print(progress, file=file)
        now = event if len(steps.read_text().split()) == int(number) else ""
        if now == "hold":
            holds.touch()
            deadline = time.monotonic() + 300
            while signal.getsignal(signal.SIGTERM).__self__.asked is None and time.monotonic() < deadline:
                time.sleep(0.01)
        if now == "crash" and rank == "1":
            os._exit(13)
        if now == "fault":
            raise RuntimeError("a fault of ours")
        return real(self, outputs, batch, progress)

    Toy.criterion = criterion


if __name__ == "__main__":      # python tests/toy.py ARGUMENTS: train.py with the toy known; TOY: "FOLDER EVENT NUMBER"
    import evaluate
    import train

    register()
    if "TOY" in os.environ:
        watch(*os.environ["TOY"].split())
    with evaluate.one_line_errors():
        train.main()
