"""Score a checkpoint, or masks that another program wrote, on a dataset's splits; or segment your own images.

    python evaluate.py --checkpoint runs/crobim_u-rrsisd --dataset rrsisd --split val,test
    python evaluate.py --checkpoint runs/crobim_u-rrsisd --image photo.jpg --text "the ship at the pier" --output out
    python evaluate.py --model rs2sam2 --checkpoint authors.pth --dataset rrsisd       (or --image; their weights)
    python evaluate.py --predictions DIR --dataset rrsisd --split test                 (one PNG per sample id)

In a notebook: model = models.load("runs/..."); result = evaluate.predict(model, image, ["the ship ...", "..."]).
Scoring runs on one process or on several (torchrun), with the same numbers exactly.
"""

import argparse
import contextlib
import dataclasses
import dis
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import typing
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

import data
import metrics
import models

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
GEOREFERENCE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)    # scale, tie points, transformation, GeoKeys
SCREEN = 2048                                                     # longer side of an overlay at most
SUFFIXES = (".bmp", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ROWS = ("first", "worst", "best", *metrics.FAILURES)              # what --rows takes beside ids
NOT_FINITE = "the model's output is not finite: a weight is not, or half precision overflows (--precision fp32)"


# ---------------------------------------------------------------------------------------------- processes, batches


class Processes(typing.NamedTuple):
    """This process among those that torchrun started; alone where it did not."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self):
        return self.rank == 0


def start_processes(device=None):
    """Join the process group if torchrun started us; `device` is "cpu", "cuda" or None (cuda where there is one)."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; use --device cpu")
    rank, world, local = (int(os.environ.get(*one)) for one in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local >= (there := torch.cuda.device_count()):
            raise ValueError(f"process {local + 1} of this machine has no card, there are {there}: start as many "
                             "(torchrun --nproc-per-node), or say --device cpu")
        torch.cuda.set_device(local)
    if world > 1 and not dist.is_initialized():
        store, *_ = next(dist.rendezvous("env://"))     # torchrun's, which keeps what a crashed attempt left in it
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    return Processes(rank, world, torch.device("cuda", local) if cuda else torch.device("cpu"))


def autocast(device, precision):
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def to_device(batch, device):
    """The batch with its tensors on `device`; lists (samples, original masks) stay as they are."""
    return {key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()}


def forward(model, batch, device, precision):
    """-> (outputs in float32, the batch on `device`)."""
    batch = to_device(batch, device)
    with autocast(device, precision):
        outputs = model(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
    outputs = {key: value.float() if value.is_floating_point() else value for key, value in outputs.items()}
    if getattr(model.config, "enlarge_twice", False):           # its paper's code reaches any size by the square
        outputs["logits"] = upsampled(outputs["logits"], batch["images"].shape[-2:])
    return outputs, batch


def load_batch(dataset, numbers):
    """In a loader's worker: the collated batch, or the user's error as a value; raised, it would arrive as text."""
    try:
        return data.collate([dataset[image] for image in numbers])
    except Exception as error:
        if is_users(error):
            return error
        raise


def batches(dataset, plan, workers, device):
    """Generates the batches of `plan`, a list of the dataset's indices for each."""
    loader = torch.utils.data.DataLoader(
        list(plan), batch_size=None, collate_fn=functools.partial(load_batch, dataset), num_workers=workers,
        worker_init_fn=outlast_signals, pin_memory=device.type == "cuda", generator=torch.Generator().manual_seed(0))
    with ctrl_c_waits():
        loaded = started(loader)
    try:
        while True:
            with ctrl_c_waits():
                batch = next(loaded, None)
            if batch is None:
                break
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        if workers:         # the traceback of a fault would keep them alive, and they outlast the end of the program
            with ctrl_c_waits():
                loaded._shutdown_workers()


@contextlib.contextmanager
def ctrl_c_waits():
    """Within it the first Ctrl-C waits: amid the loader's lines it can leave a queue locked, on which its end waits."""
    ours = threading.current_thread() is threading.main_thread()        # no other thread is interrupted
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = []

    def wait(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if asked:
            raise KeyboardInterrupt


def started(loader):
    """Its iterator. The workers are forked with the signals held back that they will ignore a moment later."""
    if not hasattr(signal, "pthread_sigmask"):      # Windows
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlast_signals(worker):
    """A stop of the whole process group is for the main process to answer, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shown = sys.excepthook          # of the thread that hands tensors over, when the main process has gone first
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, (OSError, EOFError)) else shown(kind, *rest)


def is_users(error):
    """Whether one line is answer enough: what the system refuses, or what a `raise` of this repository calls wrong.

    Any other ValueError, of a library or a builtin, is a fault of ours and keeps its traceback.
    """
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    raised, file = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"], Path(code.co_filename)
    ours = raised and file.is_relative_to(Path(__file__).parent) and "site-packages" not in file.parts
    return isinstance(error, OSError) or (ours and isinstance(error, (ValueError, ImportError)))


@contextlib.contextmanager
def one_line_errors():
    """Wrong input ends the program with one line, Ctrl-C with a word, a closed output (`| head`) in silence."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")       # where a terminal cannot show a sentence
    try:
        yield
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # for what is flushed at the exit
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({error}); a smaller --micro-batch takes less", file=sys.stderr, flush=True)
        sys.exit(1)
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- scoring


class NoControl(ValueError):
    """The split has no picture with a sentence that another lacks."""


def shuffled(samples, seed=0):
    """The samples with sentences of another picture: the next one, in one random cycle, that says what this one does
    not, case and stops aside. Left out are the samples of a picture that holds all sentences there are.

    A model that scores well on this control finds the object without reading the sentence.
    """
    groups = data.by_picture(samples, range(len(samples)))
    cycle = [groups[k] for k in np.random.default_rng(seed).permutation(len(groups))]
    said = [tuple(word for word in data.words(sample.expression) if word.isalnum()) for sample in samples]
    every, result = set(said), {}
    for place, numbers in enumerate(cycle):
        own = {said[number] for number in numbers}
        if own == every:
            continue
        foreign = ([number for number in there if said[number] not in own] for there in cycle[place:] + cycle[:place])
        for number, other in zip(numbers, itertools.cycle(next(filter(None, foreign)))):
            result[number] = dataclasses.replace(samples[number], expression=samples[other].expression, kind=None)
    if not result:
        raise NoControl("--control shuffled: each picture of the split holds all sentences that there are; the "
                        "control takes at least two images, one with a sentence that the other lacks")
    return [result[number] for number in sorted(result)]


def packed(images, micro_batch):
    """Images (tuples of sample numbers) packed into batches of one image or at most `micro_batch` expressions."""
    batches = []
    for numbers in images:
        if not batches or sum(map(len, batches[-1])) + len(numbers) > micro_batch:
            batches.append([])
        batches[-1].append(numbers)
    return batches


def upsampled(logits, size):
    """(M,1,h,w) -> (M,1,H,W) bilinearly, the one way logits are resized."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)


def counts(outputs, batch, save_masks=None):
    """{name: (M,)} of `count`, at the square or at every mask's own size; the predictions as PNGs into save_masks."""
    rows, truths = [], batch.get("original_masks", batch["masks"])
    for logits, sample, truth in zip(outputs["logits"], batch["samples"], truths, strict=True):
        prediction = upsampled(logits[None], truth.shape)[0, 0] > 0
        rows.append(count(sample, prediction, truth.to(prediction.device)))
        if save_masks:
            Image.fromarray(prediction.cpu().numpy()).convert("L").save(save_masks / f"{sample.id}.png")
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def count(sample, prediction, truth):
    """Pixels of two masks (H,W) bool: intersection, union, truth; of a synthetic scene also on_distractor: 1 if the
    prediction covers more of another object of the category than of its own, NaN where there is none."""
    intersection, union = metrics.intersection_union(prediction[None], truth[None])
    row = {"intersection": intersection[0], "union": union[0], "truth": truth.sum()}
    if isinstance(sample.image, int):
        others = torch.from_numpy(data.distractors(sample, truth.shape)).to(truth.device)               # (K,H,W)
        covered = (prediction & others).sum((1, 2))                                                     # (K,)
        row["on_distractor"] = (covered > intersection).any().float() if len(others) else covered.sum() * torch.nan
    return row


def not_finite(outputs):
    """(M,) bool: of which expressions some output is not finite, or too large to be summed up."""
    M = len(outputs["logits"])
    values = [output for output in outputs.values() if output.is_floating_point() and len(output) == M]
    return ~torch.stack([one.reshape(M, -1).sum(1).isfinite() for one in values]).all(0)


@torch.no_grad()
def evaluate(model, samples, processes, *, tokenizer, protocol, empty="zero", precision="fp32", micro_batch=32,
             workers=1, save_masks=None, label="evaluate"):
    """Run `model` over all samples, shared out over the processes -> the lines of per_sample.jsonl, each sample once.

    save_masks: a folder for one PNG (0/255) per sample. Raises ValueError if an output is not finite.
    """
    dataset = data.ReferringDataset(samples, model.config.image_size, tokenizer, original=protocol == "original")
    mine = packed(dataset.images[processes.rank::processes.world], micro_batch)
    loaded = batches(dataset, mine, workers, processes.device)
    bar = tqdm(loaded, label, len(mine), disable=not processes.first, leave=False)
    scores, training = metrics.Scores(), model.training
    model.eval()
    for images, batch in zip(mine, bar, strict=True):
        outputs, batch = forward(model, batch, processes.device, precision)
        diagnostics = model.diagnose(outputs, batch["masks"]) if hasattr(model, "diagnose") else {}
        scores.add(torch.tensor(sum(images, ())), **counts(outputs, batch, save_masks), **diagnostics,
                   not_finite=not_finite(outputs))
    model.train(training)
    merged = scores.merged(expected=len(samples))
    if (bad := np.flatnonzero(merged.pop("not_finite"))).size:
        raise ValueError(f"sample {samples[bad[0]].id}, {len(bad)} of {len(samples)} samples: {NOT_FINITE}")
    return metrics.records(samples, merged, empty)


def score_split(model, processes, *, recipe, tokenizer, precision, micro_batch=32, workers=1, save_masks=False, rows="",
                checkpoint="", changes=(), **selection):
    """Score one split; write metrics.json, per_sample.jsonl and sheet.png, print the table -> the summary.

    selection: what `read_split` takes. rows: see `chosen`. changes: `field=value`, what differs from the run's own
    settings. masks/ of an earlier scoring gives way to the new one or, without save_masks, is removed.
    """
    samples, folder, about = read_split(rows=rows, changes=changes, **selection)
    about |= {"protocol": recipe["protocol"], "threshold": "logits > 0", "checkpoint": str(checkpoint),
              "changes": ", ".join(changes), "precision": precision}
    if recipe["protocol"] == "resized":
        about["side"] = model.config.image_size
    part = folder / "masks.part"
    if processes.first:
        if strange := [sample.expression for sample in samples if unknown(sample.expression, tokenizer)]:
            print(f"{len(strange)} of {len(samples)} sentences hold no word that the model knows, for example "
                  f"{strange[0]:.200}")
        if cut := data.cut(samples, tokenizer):
            print(cut, flush=True)
        shutil.rmtree(part, ignore_errors=True)
        (part if save_masks else folder).mkdir(parents=True, exist_ok=True)
    if processes.world > 1:
        dist.barrier()
    try:
        lines = evaluate(model, samples, processes, tokenizer=tokenizer, protocol=recipe["protocol"],
                         empty=recipe["empty"], precision=precision, micro_batch=micro_batch, workers=workers,
                         save_masks=part if save_masks else None, label=folder.name)
        summary = metrics.summarize(lines, empty=recipe["empty"])
        if processes.first:
            shutil.rmtree(folder / "masks", ignore_errors=True)         # at no moment do they stand by other scores
            report(folder, lines, summary, about, rows, lambda numbers: sheet_rows(
                model, [samples[number] for number in numbers], tokenizer, processes.device, precision),
                part if save_masks else None)
    finally:
        if processes.first:
            shutil.rmtree(part, ignore_errors=True)
    return summary


def read_split(*, output, dataset, data_root, split, rows="", categories="all", control=False, prefix=(), changes=(),
               **options):
    """(samples, folder of their scores, what the table says of them); options: limit, small, refs.

    control: see `shuffled`. The folder is named by the prefix, the split, the categories, the control and the changes,
    as far as there are any, so that no score of one kind takes the place of another. ValueError if it holds scores of
    another data_root, or if `rows` names a sample that is not there.
    """
    samples = data.read(dataset, data_root, split, categories=categories, **options)
    ids = set() if rows in ("", *ROWS) else set(rows.split(","))
    if absent := sorted(ids - {sample.id for sample in samples}):
        raise ValueError(f"--rows {rows}: the split {split} has no sample {', '.join(absent)}; --rows takes ids, as "
                         f"{samples[0].id}, or one of {', '.join(ROWS)}")
    name = split if categories == "all" else f"{split}-{categories}"
    root = "" if dataset == "synthetic" else str(data_root)
    about = {"dataset": dataset, "data_root": root, "split": name, "subset": f"{categories} categories"}
    if control:
        every, samples = len(samples), shuffled(samples)
        about |= {"split": f"{name}-shuffled",
                  "control": f"{len(samples)} of {every} sentences changed, the others left out"}
    folder = Path(output) / in_file_name("-".join([*prefix, about["split"], *changes]))
    with contextlib.suppress(OSError, AttributeError, json.JSONDecodeError):        # no scores there, or none of ours
        other = json.loads((folder / "metrics.json").read_text(errors="replace")).get("data_root", root)
        if Path(other).resolve() != Path(root).resolve():
            raise ValueError(f"{folder} holds the scores of the data in {other}, not {root}: give another --output")
    return samples, folder, about


def unknown(expression, tokenizer):
    """Whether a model that was trained from scratch, which knows a list of words alone, knows none of these."""
    return isinstance(tokenizer, data.WordTokenizer) and not tokenizer.numbers.keys() & set(data.words(expression))


def report(folder, lines, summary, about, rows, drawn, masks=None):
    """Write the scores of a split, put its masks beside them, then print its table and draw its sheet; `drawn` gives
    the rows of some numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "per_sample.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_text(folder / "metrics.json", json.dumps({**about, **summary}, indent=1) + "\n")
    (folder / "sheet.png").unlink(missing_ok=True)
    if masks:
        masks.rename(folder / "masks")
    print(metrics.table(summary, about), flush=True)
    if numbers := chosen(lines, rows):
        sheet(drawn(numbers), [lines[number]["iou"] for number in numbers], folder / "sheet.png")
    else:
        print(f"--rows {rows}: there is no such sample, so there is no sheet")


def write_text(path, text):
    with models.put_in_place(path) as part:
        part.write_text(text, encoding="utf-8")


def chosen(lines, rows, most=10):
    """Numbers of the lines that the sheet shows: spread over the split, the first of one of ROWS, or by their ids."""
    numbers = range(len(lines))
    if not rows:
        return np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int).tolist()
    if rows not in ROWS:
        return [number for name in rows.split(",") for number in numbers if lines[number]["id"] == name]
    if rows in metrics.FAILURES:
        numbers = [number for number in numbers if lines[number]["failure"] == rows]
    elif rows != "first":
        scored = [number for number in numbers if lines[number]["iou"] is not None]
        numbers = sorted(scored, key=lambda number: lines[number]["iou"], reverse=rows == "best")
    return list(numbers[:most])


def score_predictions(args, splits, protocol, empty, selection):
    """Score DIR/ID.png of each sample; whatever cannot be scored is listed, and then nothing is written."""
    def counted(sample):
        try:
            row = file_row(args, sample)
        except (OSError, ValueError) as error:
            return error
        return count(sample, torch.from_numpy(row["prediction"]), torch.from_numpy(row["truth"]))

    found = [read_split(split=split, **selection) for split in splits]
    every = [sample for samples, *_ in found for sample in samples]
    with ThreadPool() as pool:
        rows = list(tqdm(pool.imap(counted, every), "masks", len(every), leave=False))
    faults = [str(row) for row in rows if isinstance(row, Exception)]
    extra = {file.name for file in Path(args.predictions).glob("*.png")} - {f"{sample.id}.png" for sample in every}
    for line in [*faults, *(f"{name}: no sample of {args.split} has this name" for name in sorted(extra))]:
        print(line, file=sys.stderr)
    if faults:
        raise ValueError(f"{len(faults)} of {len(every)} predictions cannot be scored, see above; nothing is written")
    for samples, folder, about in found:
        mine, rows = rows[:len(samples)], rows[len(samples):]
        merged = {key: np.array([float(row[key]) for row in mine]) for key in mine[0]}
        lines = metrics.records(samples, {"number": np.arange(len(mine)), **merged}, empty)
        about |= {"protocol": protocol, "threshold": "255 of 0 and 255", "predictions": args.predictions,
                  "side": args.side, "limit": args.limit or ""}
        report(folder, lines, metrics.summarize(lines, empty), about, args.rows,
               lambda numbers, samples=samples: [file_row(args, samples[number]) for number in numbers])


def file_row(args, sample):
    """What the sheet shows of a sample and its file; masks (H,W) bool at the picture's own size, or side x side."""
    path, (image, (truth,)) = Path(args.predictions) / f"{sample.id}.png", data.load([sample])
    size = (args.side, args.side) if args.side else image.size
    try:
        with Image.open(path) as file:
            values = np.array(file.convert("L") if file.mode == "1" else file)
    except (OSError, SyntaxError):
        raise ValueError(f"{path}: {'not a sound PNG' if path.is_file() else 'missing'}") from None
    if values.shape != size[::-1] or not np.isin(values, (0, 255)).all():
        raise ValueError(f"{path}: {' x '.join(map(str, values.shape))} of {values.min()} to {values.max()}, expected "
                         f"{size[1]} x {size[0]} (height x width) of 0 and 255 alone")
    truth = np.array(Image.fromarray(truth).resize(size, Image.Resampling.NEAREST))
    return {"expression": sample.expression, "image": image, "truth": truth, "prediction": values > 0, "maps": {}}


# -------------------------------------------------------------------------------------------------------- pictures


def shades(values):
    """(h,w) in [0,1] -> RGB image, dark blue over green to yellow."""
    levels = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
    return ImageOps.colorize(Image.fromarray(levels), (20, 20, 80), (250, 230, 40), mid=(45, 145, 125))


def outlined(image, mask, size):
    """PIL image and mask (H,W) bool at `size`: the mask in an outline of two tones, white within black, so that it is
    seen on any picture; the rest dimmed. What is less than a pixel there is shown as one."""
    width = 2 * (1 + max(size) // 640) + 1
    inside = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BOX)
    inside = inside.point(lambda level: 255 if level else 0)
    image = image.resize(size, Image.Resampling.BILINEAR)
    result = Image.composite(image, image.point(lambda level: level * 2 // 5), inside)
    result.paste("black", mask=ImageChops.subtract(inside.filter(ImageFilter.MaxFilter(width)), inside))
    result.paste("white", mask=ImageChops.subtract(inside, inside.filter(ImageFilter.MinFilter(width))))
    return result


@torch.no_grad()
def sheet_rows(model, samples, tokenizer, device, precision):
    """What the sheet shows of each sample, on the host."""
    dataset = data.ReferringDataset(samples, model.config.image_size, tokenizer)
    rows, training = [], model.training
    model.eval()
    for number, sample in enumerate(samples):
        outputs, batch = forward(model, data.collate([dataset[(number,)]]), device, precision)
        shown = {name: upsampled(outputs[name], batch["masks"].shape[-2:])[0, 0].cpu().numpy()
                 for name in ("logits", *models.maps(model)) if name in outputs}
        rows.append({"expression": sample.expression, "truth": batch["masks"][0].cpu().numpy(),
                     "image": Image.fromarray(batch["images"][0].permute(1, 2, 0).cpu().numpy()),
                     "prediction": shown.pop("logits") > 0, "maps": shown})
        if "point" in outputs:                                                      # a map that is 1 at the point
            height, width = outputs["point"].shape[-2:]
            y, x = divmod(int(outputs["point"].argmax()), width)
            rows[-1]["point"] = (x + 0.5) / width, (y + 0.5) / height
    model.train(training)
    return rows


def sheet(rows, ious, path, cell=160):
    """The picture sheet: a row per sample with image, truth, prediction (a dot is the point that prompted it) and maps,
    each under its name and scale; the IoU and the sentence beneath."""
    titles, font = ["image", "truth", "prediction", *rows[0]["maps"]], ImageFont.load_default(13)
    across, down, head = cell + 6, cell + 28, 42
    page = Image.new("RGB", (max(len(titles) * across + 6, 480), head + len(rows) * down), "white")
    draw = ImageDraw.Draw(page)
    for left, title in zip(itertools.count(6, across), titles):
        draw.text((left, 5), title, "black", font)
        if title in rows[0]["maps"]:
            draw.text((left, 21), "0", "black", font)
            draw.text((left + cell - 8, 21), "1", "black", font)
            page.paste(shades(np.linspace(0, 1, cell - 28)[None].repeat(8, 0)), (left + 14, 26))
    for top, row, iou in zip(itertools.count(head, down), rows, ious):
        panels = [row["image"], *(outlined(row["image"], row[name], (cell, cell)) for name in ("truth", "prediction")),
                  *map(shades, row["maps"].values())]
        if "point" in row:
            x, y = (cell * share for share in row["point"])
            ImageDraw.Draw(panels[2]).ellipse((x - 4, y - 4, x + 4, y + 4), "yellow", "black", 2)
        for left, panel in zip(itertools.count(6, across), panels):
            page.paste(panel.resize((cell, cell), Image.Resampling.BILINEAR), (left, top))
        text = f"IoU {'left out' if iou is None else format(iou, '.2f')}   {row['expression'][:200]}"
        if not isinstance(font, ImageFont.FreeTypeFont):        # without FreeType there is a font of latin-1 alone
            text = text.encode("latin-1", "replace")
        draw.text((6, top + cell + 3), text, "black", font)
    with models.put_in_place(path) as part:
        page.save(part, "PNG")


# ------------------------------------------------------------------------------------------------------- own image


def predict(model, image, expressions, precision="fp32", *, tile=None, overlap=128, maps=None):
    """Segment one image by one sentence or several.

    image: a path, a PIL image or a uint8 array (H,W,3); expressions: a string or a list of M strings. Returns a dict of
    numpy arrays at the image's own size: "masks" (M,H,W) bool, and "probs" (M,H,W) and each of the model's maps in
    [0,1] unless maps=False. The image is squashed to the model's square. For objects that are small in a large scene,
    `tile` cuts it into overlapping squares of so many pixels, each of which is, and blends what is found in them; then
    maps=None means False. A tile does not know where in the scene it lies.
    """
    texts = [expressions] if isinstance(expressions, str) else expressions
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a sentence or a list of sentences, got {expressions!r:.80}")
    if not texts or not all(text.strip() for text in texts):
        raise ValueError("the expression is empty: give a sentence that names the object, for example 'the red ship'")
    if tile is not None and not 0 <= overlap < tile:
        raise ValueError(f"tile {tile}, overlap {overlap}: the overlap must be smaller than the tile")
    if isinstance(image, (str, Path)) and Path(image).is_dir():
        raise ValueError(f"{image} is a folder; predict takes one picture, evaluate.py --image also a folder")
    if isinstance(image, (str, Path)):
        picture = data.read_image(image)
    elif isinstance(image, Image.Image):
        picture = data.to_rgb(image)
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape[2:] == (3,):
        picture = Image.fromarray(image)
    else:
        got = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else f"{image!r:.80}"
        raise ValueError(f"expected a uint8 array (H,W,3), got {got}; a path or a PIL image may also be gray or 16-bit")
    for text in texts:
        if unknown(text, model.tokenizer):
            print(f"the model knows no word of '{text:.200}': its mask means nothing", file=sys.stderr)
    factor = max(picture.size) / model.config.image_size
    if tile is None and factor > 8:
        print(f"{picture.width}x{picture.height} is squashed by a factor of {factor:.0f} to the model's square: small "
              "objects vanish; --tile 1024 (tile=1024) cuts the scene into overlapping tiles instead", file=sys.stderr)
    return segment(model, picture, [" ".join(text.split()) for text in texts], precision, tile, overlap,
                   with_maps=tile is None if maps is None else maps)


@torch.no_grad()
def segment(model, picture, texts, precision, tile, overlap, with_maps):
    """`predict` on a PIL image by rows of tiles, of which the whole image may be the only one."""
    device, side, (width, height) = next(model.parameters()).device, model.config.image_size, picture.size
    tokens, text_mask = model.tokenizer(texts)
    batch = {"tokens": tokens, "text_mask": text_mask, "image_index": torch.zeros(len(texts), dtype=torch.long)}
    rows, columns = (windows(length, tile or length, overlap) for length in (height, width))
    names, band = ["logits", *(models.maps(model) if with_maps else ())], {}
    result = {"masks": np.empty((len(texts), height, width), bool)}
    bar = tqdm(total=len(rows) * len(columns), desc="tiles", disable=tile is None, leave=False)
    for (top, down), below in zip(rows, [*(start for start, _ in rows[1:]), height], strict=True):
        for left, across in columns:
            part = picture.crop((left, top, left + len(across), top + len(down)))
            part = np.array(part.resize((side, side), Image.Resampling.BILINEAR))
            batch["images"] = torch.from_numpy(part).permute(2, 0, 1)[None]
            outputs, _ = forward(model, batch, device, precision)
            if (bad := not_finite(outputs)).any():
                raise ValueError(f"'{texts[int(bad.int().argmax())]:.200}': {NOT_FINITE}")
            window = torch.from_numpy(down[:, None] * across)                                           # (h,w)
            for name in (name for name in names if name in outputs):
                sums = band.setdefault(name, torch.zeros(len(texts), len(down), width))
                sums[..., left:left + len(across)] += upsampled(outputs[name], window.shape)[:, 0].cpu() * window
            bar.update()
        for name, sums in band.items():            # what the next row of tiles does not reach is done
            done, band[name] = sums[:, :below - top], F.pad(sums[:, below - top:], (0, 0, 0, below - top))
            if name == "logits":
                result["masks"][:, top:below] = done > 0
                name, done = "probs", done.sigmoid()
            if with_maps:
                result.setdefault(name, np.empty(result["masks"].shape, np.float32))[:, top:below] = done
    bar.close()
    return result


def windows(length, tile, overlap):
    """[(start, weights)] of the tiles along one side; at every pixel the weights of all tiles sum to one."""
    tile = min(tile, length)
    count = 1 + -(-(length - tile) // max(1, tile - overlap))
    starts = np.linspace(0, length - tile, count).round().astype(int).tolist()
    slope = np.minimum(np.arange(1, tile + 1), np.arange(tile, 0, -1)).clip(max=overlap + 1)
    total = np.zeros(length)
    for start in starts:
        total[start:start + tile] += slope
    return [(start, (slope / total[start:start + tile]).astype(np.float32)) for start in starts]


def segment_files(model, names, texts, output, precision, tile, overlap):
    """`predict` on every file, and every picture of a folder, with every sentence; writes mask, overlay and maps. The
    mask of a georeferenced TIFF is a TIFF with the same tags, so that it lands on the map in a GIS."""
    files, output = [], Path(output)
    for path in map(Path, names):
        inside = sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not path.exists() or not inside:
            raise FileNotFoundError(f"--image: no such file, or no picture ({', '.join(SUFFIXES)}) in {path}")
        files += inside
    stems, ends = [file.stem for file in files], [f"-{i + 1}" for i in range(len(texts))] if len(texts) > 1 else [""]
    names = [file.stem if stems.count(file.stem) == 1 else f"{file.stem}-{file.suffix[1:]}{k + 1}"
             for k, file in enumerate(files)]
    kinds = ["mask.png", "mask.tif", "overlay.png", *(f"{title}.png" for title in models.maps(model))]
    for file, name in zip(files, names, strict=True):
        there = [place for end in ends for what in kinds if (place := output / f"{name}{end}-{what}").exists()]
        if there and file.parent.resolve() == output.resolve():
            raise ValueError(f"{there[0]} stands beside the picture and would be written over; name another --output")
    output.mkdir(parents=True, exist_ok=True)
    for file, name in zip(files, names, strict=True):
        picture = data.read_image(file)
        with Image.open(file) as stored:
            tags = {tag: stored.tag_v2[tag] for tag in GEOREFERENCE_TAGS if tag in getattr(stored, "tag_v2", ())}
        result = predict(model, picture, texts, precision, tile=tile, overlap=overlap)
        scale = min(1, SCREEN / max(picture.size))
        for i, (text, mask) in enumerate(zip(texts, result["masks"], strict=True)):
            base = output / (name + ends[i])
            written = Path(f"{base}-mask{'.tif' if tags else '.png'}")
            Image.fromarray(mask).convert("L").save(written, tiffinfo=tags)
            size = [max(1, round(scale * length)) for length in picture.size]
            outlined(picture, mask, size).save(f"{base}-overlay.png")
            for title in result.keys() & {*models.maps(model)}:
                shades(result[title][i]).save(f"{base}-{title}.png")
            print(f"{written}  {mask.mean():.1%} of {file}: {text}")


# ---------------------------------------------------------------------------------------------------- command line


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "", []) else super()._get_help_string(action)


class Options(argparse.ArgumentParser):
    """argparse that takes underscores for hyphens in option names."""

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        words = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in words]
        return super().parse_known_args(words, namespace)


def at_least(least):
    """An argparse type: whole numbers from `least` on."""
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)
    return whole_number


def in_file_name(text):
    """`text` with everything but letters, digits and . + = - as an underscore; a long one ends in a hash."""
    name = re.sub(r"[^\w.+=-]+", "_", text)
    return name if len(name) <= 160 else f"{name[:150]}-{hashlib.sha256(text.encode()).hexdigest()[:9]}"


def arguments(argv=None):
    parser = Options(description=__doc__.split("\n\n")[0], formatter_class=Defaults)
    parser.add_argument("--checkpoint", metavar="RUN", help="a run, weights in one, an export, org/name of the hub")
    parser.add_argument("--model", choices=models.PAPERS, help="the paper whose authors released --checkpoint FILE")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="change fields of the configuration or the recipe that leave all tensor shapes alone")
    parser.add_argument("--output", metavar="DIR", help="for results (default: the run's folder; out for own images)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the recipe's on cuda, fp32 on the cpu")
    score = parser.add_argument_group("scoring a dataset")
    score.add_argument("--dataset", choices=data.DATASETS, help="default: the one it was trained on")
    score.add_argument("--data-root", metavar="DIR", help="folder of the dataset (default: as in training, or data)")
    score.add_argument("--refs", metavar="NAME", help="the pickle of --dataset refer (default: as in training)")
    score.add_argument("--split", default="test", help="one or several with commas, testA+testB as one")
    score.add_argument("--protocol", choices=models.CHOICES["protocol"], help="size that is scored (default: recipe)")
    score.add_argument("--empty", choices=models.CHOICES["empty"], help="IoU of empty on empty (default: recipe)")
    score.add_argument("--categories", choices=["all", "seen", "unseen"], default="all", help="COCO categories to keep")
    score.add_argument("--small", action="store_true", help="synthetic scenes: objects from 0.2 %% of the image")
    score.add_argument("--control", choices=["shuffled"], help="score with another picture's sentences instead")
    score.add_argument("--save-masks", action="store_true", help="one PNG (0/255) per sample, at the scored size; "
                       "without it, those of an earlier scoring go")
    score.add_argument("--rows", default="", metavar="WHICH", help="samples of the sheet: their ids with commas, or "
                       f"{', '.join(ROWS)} (why they failed); default: ten from the whole split")
    score.add_argument("--micro-batch", type=at_least(1), default=32, metavar="N", help="expressions at once")
    score.add_argument("-j", "--workers", type=at_least(0), default=min(8, max(1, os.cpu_count() // 2)), metavar="N",
                       help="loader processes per process")
    score.add_argument("--limit", type=at_least(0), default=0, metavar="N", help="first N samples of a split (0: all)")
    score.add_argument("--predictions", metavar="DIR", help="score DIR/ID.png, 0 and 255, instead of a checkpoint")
    score.add_argument("--side", type=at_least(1), metavar="N", help="of --predictions that are NxN (protocol resized)")
    own = parser.add_argument_group("segmenting own images")
    own.add_argument("--image", nargs="+", metavar="FILE", help="images to segment, or folders of them")
    own.add_argument("--text", nargs="+", metavar="SENTENCE", help="what to find in each of them")
    own.add_argument("--tile", type=at_least(1), metavar="PIXELS", help="cut large scenes into overlapping tiles and "
                     "blend their masks; a tile does not know where in the scene it lies (default: the whole at once)")
    own.add_argument("--overlap", type=at_least(0), default=128, metavar="PIXELS", help="of the tiles")
    args = parser.parse_args(argv)
    for option, other in (("image", "text"), ("text", "image"), ("tile", "image"), ("side", "predictions"),
                          ("image", "checkpoint")):
        if getattr(args, option) and not getattr(args, other):
            parser.error(f"--{option} goes with --{other}")
    if bool(args.predictions) == bool(args.checkpoint):
        parser.error("give --checkpoint RUN, or --predictions DIR")
    for option in ("control", "save_masks", "set", "model"):
        if args.predictions and getattr(args, option):
            parser.error(f"--{option.replace('_', '-')} goes with --checkpoint")
    if args.predictions and args.protocol and (args.protocol == "resized") != bool(args.side):
        parser.error("--predictions: --protocol resized goes with --side N, original goes without")
    if (args.predictions or args.model) and not (args.dataset or args.image):
        parser.error("--dataset is needed: no run says which")
    return args


def load_model(args, device):
    """(model, its run's config.json, folder for its scores, weights file if it is not the usual one)."""
    if args.predictions:
        if not Path(args.predictions).is_dir():
            raise FileNotFoundError(f"--predictions {args.predictions}: no such folder")
        recipe = {"protocol": "resized" if args.side else "original", "empty": "zero", "precision": "fp32"}
        return None, {"dataset": args.dataset, "recipe": recipe}, args.predictions, None
    if args.model and (Path(args.checkpoint).is_dir() or Path(args.checkpoint).suffix == ".safetensors"):
        raise ValueError(f"--checkpoint {args.checkpoint}: --model is for the authors' files; leave it out for a run")
    if args.model:
        paper = models.paper(args.model)
        config, _ = models.override(paper.Config(), paper.RECIPE, args.set)
        model = models.load_official(args.model, args.checkpoint, config=config, device=device)
        folder = Path("runs", in_file_name(f"{args.model}-official-{Path(args.checkpoint).stem}"), args.dataset or "")
        return model, {"dataset": args.dataset, **model.run}, folder, None
    if Path(args.checkpoint).is_file() and Path(args.checkpoint).suffix != ".safetensors":
        raise ValueError(f"--checkpoint {args.checkpoint}: weights as a paper's authors released them take --model too")
    model, (_, folder) = models.load(args.checkpoint, args.set, device), models.run_settings(args.checkpoint)
    weights, usual = (models.weights_file(one, folder) for one in (args.checkpoint, folder))
    folder = folder if Path(args.checkpoint).exists() else Path("runs", Path(args.checkpoint).name)     # of the hub
    return model, model.run, folder, None if weights.samefile(usual) else weights.stem


def main(args):
    processes = start_processes(args.device)
    model, run, folder, weights = load_model(args, processes.device)
    usual = {"small": False, "limit": 0, "refs": None, "data_root": "data", **run, **run["recipe"]}
    precision = args.precision or (usual["precision"] if processes.device.type == "cuda" else "fp32")
    if args.image:
        segment_files(model, args.image, args.text, args.output or "out", precision, args.tile, args.overlap)
        return
    dataset, root, refs = (getattr(args, key) or usual[key] for key in ("dataset", "data_root", "refs"))
    refs = refs if dataset == run["dataset"] else args.refs
    asked = {key: getattr(args, key) or usual[key] for key in ("protocol", "empty", "small")}
    asked |= {"limit": args.limit, "checkpoint": weights}
    same = dataset == run["dataset"]
    if same and dataset != "synthetic":
        asked |= {"refs": refs, "data_root": Path(root).resolve()}
        usual["data_root"] = Path(usual["data_root"]).resolve()
    changes = [one for one in args.set if not one.startswith(("pretrained=", "weights_dir="))]    # where, not what
    changes += [f"{key}={value}" for key, value in asked.items() if value != usual.get(key)]
    splits = data.split_names(dataset, args.split, root, refs)
    selection = {"output": args.output or folder, "dataset": dataset, "data_root": root, "rows": args.rows,
                 "categories": args.categories, "limit": args.limit, "small": asked["small"], "refs": refs}
    if args.predictions:
        if processes.first:
            score_predictions(args, splits, asked["protocol"], asked["empty"], selection)
        return
    summaries = {split: score_split(
        model, processes, split=split, recipe=asked, tokenizer=model.tokenizer, precision=precision,
        micro_batch=args.micro_batch, workers=args.workers, control=args.control == "shuffled",
        save_masks=args.save_masks, checkpoint=args.checkpoint, prefix=[] if same else [dataset], changes=changes,
        **selection) for split in splits}
    if processes.first and len(summaries) > 1:
        print(metrics.rows(summaries))


if __name__ == "__main__":
    with one_line_errors():
        main(arguments())
