"""Score a checkpoint on a dataset's splits, or segment your own image.

    python evaluate.py --checkpoint runs/crobim_u-rrsisd --dataset rrsisd --split val,test
    python evaluate.py --checkpoint runs/crobim_u-rrsisd --image photo.jpg --text "the ship at the pier" --output out

In a notebook: model = models.load("runs/..."); result = evaluate.predict(model, image, ["the ship ...", "..."]).
Scoring runs on one process or on several (torchrun), with the same numbers exactly.
"""

import argparse
import contextlib
import dataclasses
import dis
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import metrics
import models

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
GEOREFERENCE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)    # scale, tie points, transformation, GeoKeys


# ------------------------------------------------------------------------------------------------------- processes


@dataclasses.dataclass(frozen=True)
class Processes:
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
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(where)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Processes(rank, world, where)


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
    return {key: value.float() if value.is_floating_point() else value for key, value in outputs.items()}, batch


def load_batch(dataset, numbers):
    """In a loader's worker: the collated batch, or the user's error as a value; raised, it would arrive as text."""
    try:
        return data.collate([dataset[image] for image in numbers])
    except USER_ERRORS as error:
        if is_users(error):
            return error
        raise


def batches(dataset, plan, workers, device):
    """Generates the batches of `plan`, a list of the dataset's indices for each."""
    loader = DataLoader(list(plan), batch_size=None, collate_fn=functools.partial(load_batch, dataset),
                        num_workers=workers, worker_init_fn=outlast_signals, pin_memory=device.type == "cuda",
                        generator=torch.Generator().manual_seed(0))
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def outlast_signals(worker):
    """A stop that reaches the whole process group is for the main process, which ends its workers itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------- errors

USER_ERRORS = (ValueError, OSError, ImportError)


def is_users(error):
    """Whether one line is answer enough: what the system refuses, or what a `raise` of this repository calls wrong.

    Any other ValueError, of a library or a builtin, is a fault of ours and keeps its traceback.
    """
    last = error.__traceback__
    while last.tb_next:
        last = last.tb_next
    code = last.tb_frame.f_code
    raised = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return isinstance(error, OSError) or raised and Path(code.co_filename).is_relative_to(Path(__file__).parent)


@contextlib.contextmanager
def one_line_errors():
    """Wrong input ends the program with one line, Ctrl-C and a closed standard output (`| head`) without any."""
    try:
        yield
    except USER_ERRORS as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------------- scoring


def shuffled(samples, seed=0):
    """Each image's samples with the sentences of another image, the images in one random cycle.

    A model that scores well on this control finds the object without reading the sentence.
    """
    by_image = {}
    for number, sample in enumerate(samples):
        by_image.setdefault(sample.picture, []).append(number)
    if len(by_image) < 2:
        raise ValueError("--control shuffled needs at least two images in the split")
    cycle = [list(by_image)[k] for k in np.random.default_rng(seed).permutation(len(by_image))]
    result = list(samples)
    for here, there in zip(cycle, cycle[1:] + cycle[:1], strict=True):
        for k, number in enumerate(by_image[here]):
            sentence = samples[by_image[there][k % len(by_image[there])]].expression
            result[number] = dataclasses.replace(samples[number], expression=sentence)
    return result


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
    """Intersection and union per expression, (M,) int64 each: at the square, or at every mask's own size."""
    pairs = []
    for i, truth in enumerate(batch.get("original_masks", batch["masks"])):
        prediction = upsampled(outputs["logits"][i:i + 1], truth.shape)[0] > 0                         # (1,H,W)
        pairs.append(metrics.intersection_union(prediction, truth[None].to(prediction.device)))
        if save_masks:
            write_mask(prediction[0].cpu().numpy(), save_masks / f"{batch['samples'][i].id}.png")
    intersection, union = zip(*pairs, strict=True)
    return torch.cat(intersection), torch.cat(union)


def write_mask(mask, path, **options):
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, **options)


@torch.no_grad()
def evaluate(model, samples, processes, *, tokenizer, protocol, empty="zero", precision="fp32", micro_batch=32,
             workers=1, save_masks=None, label="evaluate"):
    """Run `model` over all samples, shared out over the processes -> the lines of per_sample.jsonl, each sample once.

    save_masks: a folder for one PNG (0/255) per sample.
    """
    dataset = data.ReferringDataset(samples, model.config.image_size, tokenizer, original=protocol == "original")
    mine = packed(dataset.images[processes.rank::processes.world], micro_batch)
    loaded = batches(dataset, mine, workers, processes.device)
    scores, training = metrics.Scores(), model.training
    model.eval()
    for images, batch in zip(mine, tqdm(loaded, label, len(mine), disable=not processes.first, leave=False),
                             strict=True):
        outputs, batch = forward(model, batch, processes.device, precision)
        diagnostics = model.diagnose(outputs, batch["masks"]) if hasattr(model, "diagnose") else {}
        numbers = torch.tensor([number for image in images for number in image])
        scores.add(numbers, *counts(outputs, batch, save_masks), **diagnostics)
    model.train(training)
    return metrics.records(samples, scores.merged(expected=len(samples)), empty)


def score_split(model, processes, *, dataset, data_root, split, recipe, output, tokenizer, precision, micro_batch=32,
                workers=1, categories="all", limit=0, small=False, control=False, save_masks=False, checkpoint="",
                prefix=(), changes=()):
    """Score one split, print its table and write metrics.json, per_sample.jsonl and sheet.png -> the summary.

    control: every image carries another image's sentences, see `shuffled`. changes: `field=value`, what differs from
    the run's own settings. The folder is named by the prefix, the split, the categories, the control and the changes,
    as far as there are any, so that no score of one kind takes the place of another.
    """
    samples = data.read(dataset, data_root, split, categories=categories, limit=limit,
                        **({"small": small} if dataset == "synthetic" else {}))
    name = [split]
    if categories != "all":
        name.append(categories)
    if control:
        samples = shuffled(samples)
        name.append("shuffled")
    folder = Path(output) / in_file_name("-".join([*prefix, *name, *changes]))
    if processes.first:
        (folder / "masks" if save_masks else folder).mkdir(parents=True, exist_ok=True)
    if processes.world > 1:
        dist.barrier()
    lines = evaluate(model, samples, processes, tokenizer=tokenizer, protocol=recipe["protocol"],
                     empty=recipe["empty"], precision=precision, micro_batch=micro_batch, workers=workers,
                     save_masks=folder / "masks" if save_masks else None, label=folder.name)
    summary = metrics.summarize(lines, empty=recipe["empty"])
    about = {"dataset": dataset, "split": "-".join(name), "protocol": recipe["protocol"], "threshold": "logits > 0",
             "subset": f"{categories} categories", "checkpoint": str(checkpoint), "changes": ", ".join(changes),
             "precision": precision}
    if recipe["protocol"] == "resized":
        about["side"] = model.config.image_size
    if processes.first:
        write_text(folder / "per_sample.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_text(folder / "metrics.json", json.dumps({**about, **summary}, indent=1) + "\n")
        print(metrics.table(summary, about), flush=True)
        shown = spread(len(samples), 10)
        sheet(sheet_rows(model, [samples[number] for number in shown], tokenizer, processes.device, precision),
              [lines[number]["iou"] for number in shown], folder / "sheet.png")
    return summary


def spread(count, most):
    """The numbers of min(count, most) things, evenly spread from the first to the last."""
    shown = min(count, most)
    return [round(k * (count - 1) / max(1, shown - 1)) for k in range(shown)]


def write_text(path, text):
    with models.put_in_place(path) as part:
        part.write_text(text, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- pictures


def shades(values):
    """(h,w) in [0,1] -> RGB uint8, dark blue over green to yellow."""
    stops = np.array([[20, 20, 80], [30, 110, 140], [60, 180, 110], [250, 230, 40]], float)
    place = np.clip(values, 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(int), len(stops) - 2)
    part = (place - low)[..., None]
    return (stops[low] * (1 - part) + stops[low + 1] * part).astype(np.uint8)


def overlay(image, mask, colour=(255, 40, 40)):
    """Image (H,W,3) uint8 with the mask (H,W) bool tinted and its border drawn."""
    inside = np.pad(mask, 1)
    inner = inside[1:-1, 1:-1] & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    result = image.astype(float)
    result[mask] = 0.5 * result[mask] + 0.5 * np.array(colour)
    result[mask & ~inner] = colour
    return result.astype(np.uint8)


@torch.no_grad()
def sheet_rows(model, samples, tokenizer, device, precision):
    """What the sheet shows of each sample, on the host."""
    dataset = data.ReferringDataset(samples, model.config.image_size, tokenizer)
    rows, training = [], model.training
    model.eval()
    for number, sample in enumerate(samples):
        outputs, batch = forward(model, data.collate([dataset[(number,)]]), device, precision)
        size = batch["masks"].shape[-2:]
        shown = {name: upsampled(outputs[name], size)[0, 0].cpu().numpy()
                 for name in ("logits", *models.maps(model)) if name in outputs}
        rows.append({"expression": sample.expression, "image": batch["images"][0].permute(1, 2, 0).cpu().numpy(),
                     "truth": batch["masks"][0].cpu().numpy(), "prediction": shown.pop("logits") > 0, "maps": shown})
    model.train(training)
    return rows


def sheet(rows, ious, path, cell=160):
    """The picture sheet: a row per sample with image, truth, prediction and maps; its IoU and sentence beneath."""
    titles = ["image", "truth", "prediction", *rows[0]["maps"]]
    font, gap, caption = ImageFont.load_default(13), 6, 22
    width = max(len(titles) * (cell + gap) + gap, 480)
    page = Image.new("RGB", (width, 24 + len(rows) * (cell + caption + gap)), "white")
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell + gap), 5), title, "black", font)
    for r, (row, iou) in enumerate(zip(rows, ious, strict=True)):
        top = 24 + r * (cell + caption + gap)
        truth, prediction = overlay(row["image"], row["truth"], (40, 200, 60)), overlay(row["image"], row["prediction"])
        panels = [row["image"], truth, prediction, *map(shades, row["maps"].values())]
        for column, panel in enumerate(panels):
            picture = Image.fromarray(panel).resize((cell, cell), Image.Resampling.BILINEAR)
            page.paste(picture, (gap + column * (cell + gap), top))
        text = f"IoU {'left out' if iou is None else format(iou, '.2f')}   {row['expression']}"
        draw.text((gap, top + cell + 3), text, "black", font)
    with models.put_in_place(path) as part:
        page.save(part, "PNG")


# ------------------------------------------------------------------------------------------------------- own image


@torch.no_grad()
def predict(model, image, expressions, precision="fp32"):
    """Segment one image by one sentence or several.

    image: a path, a PIL image or a uint8 array (H,W,3); expressions: a string or a list of M strings. Returns a dict of
    numpy arrays at the image's own size: "masks" (M,H,W) bool, "probs" (M,H,W) in [0,1] and each of the model's maps.
    """
    expressions = [expressions] if isinstance(expressions, str) else list(expressions)
    if not expressions or not all(isinstance(text, str) and text.strip() for text in expressions):
        raise ValueError("the expression is empty: give a sentence that names the object, for example 'the red ship'")
    if isinstance(image, (str, Path)):
        image = data.read_image(image)
    elif isinstance(image, Image.Image):
        image = data.to_rgb(image)
    else:
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 array (H,W,3), got {image.dtype} {image.shape}; "
                             "a path or a PIL image may also be gray or 16-bit")
        image = Image.fromarray(image)
    device, side = next(model.parameters()).device, model.config.image_size
    pixels = torch.from_numpy(np.array(image.resize((side, side), Image.Resampling.BILINEAR)))
    tokens, text_mask = model.tokenizer([" ".join(text.split()) for text in expressions])
    outputs, _ = forward(model, {"images": pixels.permute(2, 0, 1)[None], "tokens": tokens, "text_mask": text_mask,
                                 "image_index": torch.zeros(len(expressions), dtype=torch.long)}, device, precision)
    size = (image.height, image.width)
    logits = upsampled(outputs["logits"], size)[:, 0]
    maps = {name: upsampled(outputs[name], size)[:, 0].cpu().numpy() for name in models.maps(model) if name in outputs}
    return {"masks": (logits > 0).cpu().numpy(), "probs": logits.sigmoid().cpu().numpy(), **maps}


def segment_files(model, files, texts, output, precision):
    """`predict` on every file with every sentence; writes mask, overlay and maps.

    The mask of a georeferenced TIFF is a TIFF with the same tags, so that it lands on the map in a GIS.
    """
    if unreadable := [str(file) for file in files if not Path(file).is_file()]:
        hint = "; of a folder, name the files: FOLDER/*.png" if Path(unreadable[0]).is_dir() else ""
        raise FileNotFoundError(f"--image: no such file {', '.join(unreadable)}{hint}")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    stems = [Path(file).stem for file in files]
    for k, file in enumerate(files):
        name = stems[k] if stems.count(stems[k]) == 1 else f"{stems[k]}-{Path(file).suffix[1:]}{k + 1}"
        picture = data.read_image(file)
        result = predict(model, picture, texts, precision)
        for i, text in enumerate(texts):
            mask = result["masks"][i]
            base = output / (f"{name}-{i + 1}" if len(texts) > 1 else name)
            tags = georeference(file)
            written = Path(f"{base}-mask{'.tif' if tags else '.png'}")
            write_mask(mask, written, **({"tiffinfo": tags} if tags else {}))
            Image.fromarray(overlay(np.array(picture), mask)).save(f"{base}-overlay.png")
            for title in models.maps(model):
                if title in result:
                    Image.fromarray(shades(result[title][i])).save(f"{base}-{title}.png")
            print(f"{written}  {mask.mean():.1%} of {file}: {text}")


def georeference(file):
    """The georeferencing tags of a TIFF as PIL writes them; empty for any other file."""
    with Image.open(file) as image:
        tags = getattr(image, "tag_v2", {})
        kept = {tag: tags[tag] for tag in GEOREFERENCE_TAGS if tag in tags}
        if not kept:
            return {}
        directory = ImageFileDirectory_v2()
        for tag, value in kept.items():
            directory.tagtype[tag] = tags.tagtype[tag]
            directory[tag] = value
        return directory


# ---------------------------------------------------------------------------------------------------- command line


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of an option where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def at_least(least):
    """An argparse type: whole numbers from `least` on."""
    def whole_number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return int(text)
    return whole_number


def in_file_name(text):
    """`text` with everything but letters, digits and . + = - as an underscore."""
    return re.sub(r"[^\w.+=-]+", "_", text)


class Options(argparse.ArgumentParser):
    """argparse that takes underscores for hyphens in option names."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        swapped = []
        for word in args:
            name, equals, value = word.partition("=")
            swapped.append(name.replace("_", "-") + equals + value if name.startswith("--") else word)
        return super().parse_known_args(swapped, namespace)


def arguments(argv=None):
    parser = Options(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run folder, or a weights file in one")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                        help="change fields of the configuration or the recipe that leave all tensor shapes alone")
    parser.add_argument("--output", metavar="DIR", help="for results (default: the run folder; out for own images)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: the recipe's on cuda, fp32 on the cpu")
    score = parser.add_argument_group("scoring a dataset")
    score.add_argument("--dataset", choices=data.DATASETS, help="default: the one it was trained on")
    score.add_argument("--data-root", metavar="DIR", help="folder of the dataset (default: as in training)")
    score.add_argument("--split", default="test",
                       help="one or several with commas (default test; on refcoco testA,testB; testA+testB as one)")
    score.add_argument("--protocol", choices=models.CHOICES["protocol"],
                       help="size masks are scored at (default: recipe)")
    score.add_argument("--empty", choices=models.CHOICES["empty"], help="IoU of empty on empty (default: recipe)")
    score.add_argument("--categories", choices=["all", "seen", "unseen"], default="all", help="COCO categories to keep")
    score.add_argument("--small", action="store_true", help="synthetic scenes: objects from 0.2 %% of the image")
    score.add_argument("--control", choices=["shuffled"], help="score with another image's sentences instead")
    score.add_argument("--save-masks", action="store_true", help="one PNG (0/255) per sample, at the scored size")
    score.add_argument("--micro-batch", type=at_least(1), default=32, metavar="N",
                       help="expressions at once per process (default 32)")
    score.add_argument("-j", "--workers", type=at_least(0), default=min(8, max(1, os.cpu_count() // 2)), metavar="N",
                       help="loader processes per process")
    score.add_argument("--limit", type=at_least(0), default=0, metavar="N", help="first N samples of a split (0: all)")
    own = parser.add_argument_group("segmenting own images")
    own.add_argument("--image", nargs="+", metavar="FILE", help="images to segment")
    own.add_argument("--text", nargs="+", metavar="SENTENCE", help="what to find in each of them")
    args = parser.parse_args(argv)
    if bool(args.image) != bool(args.text):
        parser.error("--image and --text go together")
    return args


def main(args):
    processes = start_processes(args.device)
    model = models.load(args.checkpoint, args.set, processes.device)
    run, (trained, folder) = model.run, models.run_settings(args.checkpoint)
    precision = args.precision or (run["recipe"]["precision"] if processes.device.type == "cuda" else "fp32")
    if args.image:
        segment_files(model, args.image, args.text, args.output or "out", precision)
        return
    recipe = {**run["recipe"], **{key: value for key in ("protocol", "empty") if (value := getattr(args, key))}}
    dataset, data_root = args.dataset or run["dataset"], args.data_root or run["data_root"]
    prefix = [dataset] if dataset != run["dataset"] else []
    changes = [one for one in args.set if not one.startswith(("pretrained=", "weights_dir="))]    # where, not what
    changes += [f"{key}={recipe[key]}" for key in ("protocol", "empty")
                if getattr(args, key) and recipe[key] != trained["recipe"][key]]
    if args.small and not run["small"]:
        changes.append("small=True")
    if args.limit != run["limit"]:
        changes.append(f"limit={args.limit}")
    summaries = {split: score_split(
        model, processes, dataset=dataset, data_root=data_root, split=split, recipe=recipe,
        output=args.output or folder, tokenizer=model.tokenizer, precision=precision, micro_batch=args.micro_batch,
        workers=args.workers, categories=args.categories, limit=args.limit, small=args.small or run["small"],
        control=args.control == "shuffled", save_masks=args.save_masks, checkpoint=args.checkpoint, prefix=prefix,
        changes=changes)
        for split in data.split_names(dataset, args.split, data_root)}
    if processes.first and len(summaries) > 1:
        print(metrics.rows(summaries))


if __name__ == "__main__":
    with one_line_errors():
        main(arguments())
