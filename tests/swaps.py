"""What the masks of a trained model depend on: one signal of its paper at a time is taken from elsewhere.

    python tests/swaps.py --checkpoint runs/prompt_ris-synthetic                    every signal, on the test split
    python tests/swaps.py --checkpoint RUN --data-root DIR --split val --limit 360  evaluate.py's options of data

A row is a signal, its columns mIoU where each expression gets that of another expression of its picture, that of
another picture, zeros, and, where the signal is itself a mask, the true one. Where mIoU stays, the masks do not depend
on it. Words of another expression are read as far as one's own are long.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402

COLUMNS = ("sentence", "picture", "zeros", "truth")


class Signal(NamedTuple):
    """Where a signal passes: into or out of some modules, at a place of the arguments or outputs."""
    name: str
    module: str                         # how their paths end, a regular expression
    side: str                           # "in", "out"
    place: int | str | None = None      # of a tuple, a dict or the keyword arguments; None: all of the output
    first: str = ""                     # of dimension 1, only as many as the module has of these
    mask: bool = False                  # whether it is one


SIGNALS = {
    "icipnet": [Signal("T_o, prompts, Eq. (4)", "icip", "out", 0, "prompts"),
                Signal("V in T_o, Eq. (4)", "icip", "in", 0),
                Signal("O, fusion, Eq. (13)", r"stages\.\d\.attention", "out")],
    "rsrefseg2": [Signal("v'_1, first order, Eq. (5)", "prompter.second", "in", 1),
                  Signal("p_sparse, Eq. (6)", "prompter", "out", "p_sparse"),
                  Signal("p_dense, Eq. (7)", "prompter", "out", "p_dense")],
    "crobim_u": [Signal("Delta V, Eq. (9)", "fusion.proj", "out"),
                 Signal("U in the gate, Eq. (10)", "fusion", "in", 3),
                 Signal("U in M, Eq. (13)", "refinement", "in", 2),
                 Signal("Delta, Eq. (15)", "refinement.head.4", "out")],
    "rs2sam2": [Signal("T_0, words, Eq. (2)", "fusion.0", "in", 2),
                Signal("words of the gate, Eq. (4)", "gate", "in", 2),
                Signal("M_p, pseudo-mask, Eq. (5)", "prompt_generator", "out", mask=True),
                Signal("[CLS], sparse prompt", "token_mlp", "out")],
    "prompt_ris": [Signal("V2L prompts, Eq. (5)", "v2l", "out"),
                   Signal("L2V prompts, Eq. (6)", "l2v", "out"),
                   Signal("P_mask, Eq. (4)", "mask_decoder", "in", "dense_prompt_embeddings"),
                   Signal("P_point, P_text, Eq. (4)", "mask_decoder", "in", "sparse_prompt_embeddings")],
}


def elsewhere(image_index):
    """image_index (M,) of a batch -> (M,) twice: another expression of each one's picture, one of the next picture."""
    index = np.asarray(image_index)
    rows = [np.flatnonzero(index == picture) for picture in range(index.max() + 1)]
    sentence, picture = np.empty_like(index), np.empty_like(index)
    for mine, theirs in zip(rows, rows[1:] + rows[:1], strict=True):
        sentence[mine], picture[mine] = np.roll(mine, 1), np.resize(theirs, len(mine))
    return torch.from_numpy(sentence), torch.from_numpy(picture)


def changes(signal, batch):
    """{column: function of the signal's tensor (M,...)}."""
    sentence, picture = elsewhere(batch["image_index"].cpu())
    result = {"sentence": lambda x: x[sentence], "picture": lambda x: x[picture], "zeros": torch.zeros_like}
    if signal.mask:
        masks = batch["masks"][:, None].float()
        result["truth"] = lambda x: torch.nn.functional.interpolate(masks, x.shape[-2:], mode="area").to(x)
    return result


def hooked(model, signal, change):
    """Puts `change` on the signal's way -> handles to take it off again; none where the model has no such signal."""
    def changed(module, value):
        if isinstance(value, torch.Tensor):
            n = len(getattr(module, signal.first)) if signal.first else value.shape[1]
            return torch.cat((change(value[:, :n]), value[:, n:]), 1)
        if isinstance(value, dict):
            return value | {signal.place: changed(module, value[signal.place])}
        return tuple(changed(module, one) if place == signal.place else one for place, one in enumerate(value))

    def on_input(module, args, kwargs):
        return (args, changed(module, kwargs)) if isinstance(signal.place, str) else (changed(module, args), kwargs)

    modules = [module for path, module in model.named_modules() if re.search(rf"(^|\.){signal.module}$", path)]
    if signal.side == "in":
        return [module.register_forward_pre_hook(on_input, with_kwargs=True) for module in modules]
    return [module.register_forward_hook(lambda module, args, output: changed(module, output)) for module in modules]


@torch.no_grad()
def ious(model, batch, device, precision):
    """IoU of each expression, (M,), at the size that the run's protocol scores; 0 of empty on empty."""
    counted = evaluate.counts(*evaluate.forward(model, batch, device, precision))
    return torch.where(counted["union"] > 0, counted["intersection"] / counted["union"], 0.0).cpu()


def pairs(pictures):
    """Batches of two pictures or more: with one there would be no other."""
    batches = [pictures[start:start + 2] for start in range(0, len(pictures), 2)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def swapped(model, samples, device, precision):
    """mIoU of `samples` -> as it is, {signal: {column: mIoU}}."""
    dataset = data.ReferringDataset(samples, model.config.image_size, model.tokenizer,
                                    original=model.run["recipe"]["protocol"] == "original")
    if len(dataset.images) < 2:
        raise ValueError(f"{len(samples)} samples of one picture: a signal of another picture needs two")
    own, rows = [], {}
    for numbers in tqdm(pairs(dataset.images), "pairs of pictures", leave=False):
        batch = data.collate([dataset[one] for one in numbers])
        own.append(ious(model, batch, device, precision))
        for signal in SIGNALS[model.run["model"]]:
            for column, change in changes(signal, batch).items():
                if handles := hooked(model, signal, change):
                    found = ious(model, batch, device, precision)
                    rows.setdefault(signal.name, {}).setdefault(column, []).append(found)
                for handle in handles:
                    handle.remove()
    return mean(own), {name: {column: mean(parts) for column, parts in row.items()} for name, row in rows.items()}


def mean(parts):
    return 100 * torch.cat(parts).mean().item()


def table(title, own, rows):
    width = max(map(len, rows))
    lines = [f"{title}; as it is: mIoU {own:.2f}", "".join([" " * width, *(f"{column:>10}" for column in COLUMNS)])]
    for name, row in rows.items():
        cells = (f"{row[column]:10.2f}" if column in row else "" for column in COLUMNS)
        lines.append("".join([f"{name:<{width}}", *cells]))
    return "\n".join(lines)


def main(argv=None):
    args = evaluate.arguments(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, run, *_ = evaluate.load_model(args, device)
    if run.get("model") not in SIGNALS:
        raise ValueError(f"{args.checkpoint}: no signals of {run.get('model')} are named in tests/swaps.py")
    dataset = args.dataset or run["dataset"]
    root = args.data_root or run.get("data_root", "data")
    refs = args.refs or (run.get("refs") if dataset == run["dataset"] else None)
    for split in data.split_names(dataset, args.split, root, refs):
        samples = data.read(dataset, root, split, categories=args.categories, limit=args.limit, small=args.small,
                            refs=refs)
        with mock.patch.object(models.paper(run["model"]), "AT_ONCE", sys.maxsize, create=True):
            found = swapped(model, samples, device, args.precision or "fp32")       # each batch in one piece
        print(table(f"{args.checkpoint}, {dataset}, {split}, {len(samples)} samples", *found))


if __name__ == "__main__":
    with evaluate.one_line_errors():
        main()
