"""Data: one record per expression, one reader per way of storing a data set, one loader for all models.

    python data.py --dataset rrsisd --data-root DIR     checks a download before hours are spent on it

Sections: records - readers - images and masks - dataset, sampler, tokenizer - check command - synthetic scenes.
"""

import argparse
import cmath
import copy
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass, replace
from multiprocessing.pool import Pool, ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One expression and the object it refers to."""

    id: str                      # unique within data set and split, safe as a file name
    image: Path | int            # file, or the number of a synthetic scene
    mask: object                 # file | {"file", "value"} | {"size", "parts", "resize"} | number of a scene's object
    expression: str              # stripped, single spaces, case as written
    split: str
    image_id: str                # what the data set calls the image
    instance: str                # equal = the same object of the same image
    category: str | None
    category_source: str | None  # "file" | "parsed" from the expression | None
    size: tuple[int, int] | None = None  # (H, W) of the image, filled in when it is loaded
    picture: str = ""            # equal = the same picture, whatever its names; all that goes by images goes by it
    kind: str | None = None      # of a synthetic sentence: attribute, place, extreme, size, relation, nearest

    def __post_init__(self):
        if not self.picture:
            object.__setattr__(self, "picture", self.image_id)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def words(expression: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", expression.lower())


def vocabulary(dataset: str, samples: list[Sample]) -> list[str]:
    """Sorted distinct words; for synthetic, whose scenes are fresh in every epoch, all that the generator knows."""
    return sorted(SYNTHETIC_WORDS if dataset == "synthetic" else {w for s in samples for w in words(s.expression)})


# ---------------------------------------------------------------------------------------------------------------------
# Readers: reader(benchmark, root) -> samples of all splits, a line for each entry that is wrong, the files read
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """How a data set is stored and what it is known to hold."""

    name: str
    readers: tuple[Callable, ...]                  # of the layouts that people have, the original one first
    splits: tuple[str, ...]
    folders: tuple[str, ...] = ()                  # usual names of its folder
    source: str = ""                               # where it is downloaded
    names: str = ""                                # pattern of the names in its lists, the picture in group "picture"
    refs: str = ""                                 # its pickle, where it is stored as REFER does
    images: tuple[str, ...] = ()                   # where it may keep its images
    classes: dict = field(default_factory=dict)    # name -> class, the longest first, to find it in an expression
    published: dict = field(default_factory=dict)  # split -> {"refs" | "images" | "expressions": number}
    reference: dict = field(default_factory=dict)  # refs of "seen" | "unseen" categories by CGFormer's code
    note: str = ""                                 # what the numbers found should be seen beside


class NotThere(FileNotFoundError):
    """The data set is not stored in the layout that was looked for."""


def find_category(expression: str, classes: dict[str, str]) -> str | None:
    """The class named first, as the head noun comes before its relations, in whole words; the longest at one place."""
    pattern = rf"\b({'|'.join(classes)})(?:s|es)?\b"
    found = classes and re.search(pattern, re.sub(r"[-_]", " ", expression.lower()))
    return classes[found[1]] if found else None


def _holds(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is {'a file' if folder.exists() else 'not there'}"
    names = sorted(os.listdir(folder))
    return f"{folder} holds {', '.join(names[:12]) or 'nothing'}{', ...' if len(names) > 12 else ''}"


def _find_folder(benchmark: Benchmark, root: Path, complete: Callable[[Path], object], wanted: str) -> Path:
    """--data-root itself, or the data set's folder in one of the usual places below it."""
    places = [root / parent / name for parent in ("", "refer/data", "data") for name in benchmark.folders]
    foreign = {name for other in DATASETS.values() for name in other.folders if name not in benchmark.folders}
    if root.resolve().name not in foreign or not benchmark.folders:  # refcoco/ is complete in itself, but not refcoco+/
        places.append(root)
    if found := next((place for place in places if complete(place)), None):
        return found
    seen = dict.fromkeys([root, *(place for place in places if place.is_dir())])
    folders = f" or its folder {' | '.join(benchmark.folders)}" if benchmark.folders else ""
    raise NotThere(f"{benchmark.name}: no {wanted} in the data root {root}{folders}; {'; '.join(map(_holds, seen))}. "
                   f"Give --data-root the data set's folder or its parent; it is downloaded from {benchmark.source}")


def _find_images(benchmark: Benchmark, folder: Path, names: list[str]) -> tuple[Path, dict]:
    """The first of the usual places that holds one of the named files, and its listing."""
    bases = folder.parent, folder, folder.parent.parent, *(folder.parent / name for name in benchmark.folders)
    places = [place for base in bases for sub in (*benchmark.images, "") if (place := base / sub).is_dir()]
    for place in places:
        listing = _listing(place)
        if any((place / _find_name(name, listing)).is_file() for name in names):
            return place, listing
    if not (places := [place for place in places if place not in bases]):
        raise FileNotFoundError(f"{benchmark.name}: no images; looked for {' | '.join(benchmark.images)} in "
                                f"{', '.join(map(str, bases[:3]))}; {_holds(folder.parent)}; {_holds(folder)}")
    return places[0], _listing(places[0])


def _listing(folder: Path) -> dict[str, list[str]]:
    """stem -> names of files: one look at the folder, since on a network disk one at each file is slow."""
    listing = defaultdict(list)
    for name in os.listdir(folder):
        listing[Path(name).stem].append(name)
    return listing


def _find_name(name: str, listing: dict[str, list[str]]) -> str:
    """The name itself if it is there, or the one of another extension, or COCO's of 2017 for its name of 2014."""
    stem = Path(name).stem
    found = listing.get(stem) or listing.get(re.sub(r"^COCO_\w+_", "", stem)) or [name]
    if name not in found and len(found) > 1:
        raise ValueError(f"is {name} the file {' or '.join(sorted(found))}? Take the others out of their folder")
    return name if name in found else found[0]


def _text(path: Path) -> str:
    content = path.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{path}: it is UTF-16, not UTF-8; convert it: iconv -f utf-16 -t utf-8")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert it from the encoding that it was written "
                         "in, as in: iconv -f cp1252 -t utf-8 (or -f gbk)") from None


def _clean(expression) -> str:
    if not isinstance(expression, str | None):
        raise ValueError(f"the expression is no text but {json.dumps(expression)[:40]}")
    if not (words := (expression or "").split()):
        raise ValueError("the expression is empty; write one or take the entry out")
    if re.search("[\ufffd\ud800-\udfff]", expression):
        raise ValueError(f"a letter of the expression is lost: {ascii(expression)[:60]}; convert the original anew")
    return " ".join(words)


def _plain(pairs: list[tuple]) -> dict:
    """Of a JSON object, which may not name a thing twice: the later one would take the place of the first."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"one name stands twice among {', '.join(name for name, _ in pairs)}")
    return row


def _rows(path: Path, mark: str = ":") -> list[tuple[str, str]]:
    """(where, line) of each line that is not blank, or one row for what is wrong with the file."""
    try:
        lines = enumerate(_text(path).split("\n"), 1)
    except ValueError as error:
        return [("", error)]
    return [(f"{path}{mark}{number}", line) for number, line in lines if line.strip()]


def _gather(rows, samples_of: Callable) -> tuple[list[Sample], list[str]]:
    """The samples of all (where, row), and a line for each row that is wrong, so that one run names them all."""
    samples, faults = [], []
    for where, *row in rows:
        try:
            if isinstance(row[0], ValueError):
                raise row[0]
            samples += samples_of(*row)
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON ({error}); each line is one object")
        except ValueError as error:
            faults.append(f"{where}: {error}" if where else str(error))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            faults.append(f"{where}: not as it should be ({type(error).__name__}: {error}); download it anew")
    return samples, faults


def read_lists(benchmark: Benchmark, root: Path):
    """RefSegRS, RISBench: folders of images and masks of the same names, a list of `name expression` per split."""
    def parts(place):
        def first(*names):
            return next((place / name for name in names if (place / name).exists()), None)

        lists = {split: first(*(f"{folder}output_phrase_{split}{end}.txt" for end in ("", "3")
                                for folder in ("", "phrase_txts/"))) for split in benchmark.splits}
        lists = {split: path for split, path in lists.items() if path}  # some downloads of RISBench have no val list
        images, masks = first("images", "img_rgb", "images2"), first("masks", "mask", "masks2")
        return (images, masks, lists) if images and masks and lists else None

    def samples_of(line, split):
        name, *rest = line.split(None, 1)
        expression, picture = _clean(" ".join(rest)), _picture(benchmark, name)
        if found := re.search(r"\S+\.(?:png|tiff?|jpe?g)\b", expression, re.IGNORECASE):
            raise ValueError(f"{found[0]} stands in the expression; a line is one name and one expression")
        image, mask = (_find_name(name if "." in name else f"{name}.tif", listing) for listing in listings)
        category = find_category(expression, benchmark.classes)
        return [Sample(image.rpartition(".")[0], images / image, masks / mask, expression, split, image, image,
                       category, category and "parsed", picture=picture)]

    wanted = f"{{images|img_rgb}}/, {{masks|mask}}/ and output_phrase_{{{','.join(benchmark.splits)}}}.txt"
    images, masks, lists = parts(_find_folder(benchmark, root, parts, wanted))
    listings = _listing(images), _listing(masks)
    rows = [(*row, split) for split, path in lists.items() for row in _rows(path)]
    return *_gather(rows, samples_of), (images, masks, *lists.values())


def _picture(benchmark: Benchmark, name: str) -> str:
    """What of a file's name is the picture's: RISBench keeps a copy for each object, train_12_0.png, train_12_3.png."""
    if not (match := re.fullmatch(benchmark.names, name)):
        raise ValueError(f"{name!r} is no name of {benchmark.name}; is it another data set's list?")
    return match.groupdict().get("picture") or name


def read_datainfo(benchmark: Benchmark, root: Path):
    """The same sets as RSRefSeg 2's authors distribute them: a JSON line with its RLE per sample, beside the images."""
    def lists(place):
        return next((found for folder in ("datainfo", "annotations", "") if (found := {
            split: path for split in benchmark.splits
            if (path := place / folder / f"{benchmark.name}_{split}.jsonl").is_file()})), None)

    def samples_of(line, split):
        row = json.loads(line, object_pairs_hook=_plain)
        if row.get("split", split) != split:
            raise ValueError(f"an entry of the split {row['split']} in the file of {split}; is it a copy?")
        parts = row["segmentation"] if isinstance(row["segmentation"], list) else [row["segmentation"]]
        mask = {"size": tuple(parts[0]["size"]), "parts": parts, "resize": benchmark.name == "rrsisd"}
        name, expression = row["file_name"], _clean(row["sent"])
        parsed = find_category(expression, benchmark.classes)
        return [Sample(Path(name).stem, images / _find_name(name, listing), mask, expression, split, name,
                       f"{name}/{row.get('ann_id', '')}", row.get("category_name", parsed),
                       "file" if "category_name" in row else parsed and "parsed", picture=_picture(benchmark, name))]

    paths = lists(_find_folder(benchmark, root, lists, f"{benchmark.name}_{{{','.join(benchmark.splits)}}}.jsonl"))
    rows = [(*row, split) for split, path in paths.items() for row in _rows(path)]
    names = re.findall(r'"file_name": *"([^"]+)"', "".join(str(line) for _, line, _ in rows[:3]))
    images, listing = _find_images(benchmark, next(iter(paths.values())).parent, names)
    return *_gather(rows, samples_of), (images, *paths.values())


class _PlainUnpickler(pickle.Unpickler):
    """A pickle may name any function to be called while it is read. Here none is: plain containers need none."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; a genuine one holds plain lists and dicts")


def _unpickle(path: Path):
    for encoding in ("utf-8", "latin-1"):  # of the byte strings that Python 2 wrote
        try:
            return _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding=encoding).load()
        except UnicodeDecodeError:
            continue
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ValueError(f"{path}: refused or damaged ({error}); download the authors' file anew") from None


def read_refer(benchmark: Benchmark, root: Path):
    """RRSIS-D, RefCOCO, RefCOCO+, RefCOCOg: refs(*).p and instances.json in one folder, images in another."""
    names = benchmark.refs, "instances.json"
    folder = _find_folder(benchmark, root, lambda place: all((place / name).is_file() for name in names),
                          " with ".join(names))
    path, where = (folder / name for name in names)
    resize = benchmark.name == "rrsisd"  # a few of its images are some rows or columns off the 800x800 of all masks
    try:
        content = json.loads(_text(where))
        annotations, images = ({entry["id"]: entry for entry in content[name]} for name in ("annotations", "images"))
        for name, table in (("annotations", annotations), ("images", images)):
            if twice := [entry["id"] for entry in content[name] if table[entry["id"]] != entry]:
                raise ValueError(f"{where}: two different {name} of id {twice[0]}; were two files joined?")
        categories = {entry["id"]: entry["name"] for entry in content.get("categories", [])}
        place, listing = _find_images(benchmark, folder, [image["file_name"] for image in content["images"][:3]])
        where = path
        rows = json.loads(_text(path)) if path.suffix == ".json" else _unpickle(path)
        if any(not isinstance(row.get("ann_id", 0), int | str) or row.get("ann_id") == -1 for row in rows):
            raise ValueError(f"{path}: sentences of no target or of several, as gRefCOCO has them, are not read; each "
                             "must have one object")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: not as REFER has it ({type(error).__name__}: {error}); download it anew") from None

    def samples_of(row):
        annotation, image = annotations[row["ann_id"]], images[row["image_id"]]
        if (theirs := annotation.get("image_id", row["image_id"])) != row["image_id"]:
            raise ValueError(f"a ref of image {row['image_id']}, its annotation {row['ann_id']} of image {theirs}")
        if not (isinstance(row["split"], str) and row["split"].strip()):
            raise ValueError(f"the split is {row['split']!r}; a name is needed")
        if not row["sentences"]:
            raise ValueError("no sentence; write one or take the ref out")
        stored = annotation["segmentation"]
        parts = stored if isinstance(stored, list) else [stored]
        size = parts[0]["size"] if parts and isinstance(parts[0], dict) else (image["height"], image["width"])
        mask, samples = {"size": tuple(size), "parts": parts, "resize": resize}, []
        file, instance = place / _find_name(image["file_name"], listing), f"{row['image_id']}/{row['ann_id']}"
        number = annotation.get("category_id", annotation.get("categories_id"))  # RRSIS-D's spelling
        category = categories.get(row.get("category_id", number))
        for sentence in row["sentences"]:
            text = sentence.get("raw") or sentence.get("sent") or " ".join(sentence.get("tokens", []))
            name = file.stem if resize else f"{row['ref_id']}_{sentence['sent_id']}"
            samples.append(Sample(name, file, mask, _clean(text), row["split"], str(row["image_id"]), instance,
                                  category, category and "file", picture=os.path.normpath(image["file_name"])))
        return samples

    rows = [(f"{path}, ref {row.get('ref_id')}, with its annotation and image in instances.json", row) for row in rows]
    return *_gather(rows, samples_of), (path, folder / "instances.json", place)


def read_union(benchmark: Benchmark, root: Path):
    """RefCOCO, RefCOCO+ and RefCOCOg together, trained without any image of any val or test split of theirs.

    Both partitions of RefCOCOg hold the same objects: umd gives the training part, google only images to leave out.
    """
    found = {name: read_refer(DATASETS[name], root) for name in (*UNION, "refcocog-google")}
    held_out = {s.image_id for samples, *_ in found.values() for s in samples if s.split != "train"}
    samples = [replace(s, id=f"{name}_{s.id}") for name in UNION for s in found[name][0]
               if (s.split == "train" and s.image_id not in held_out) or (s.split, name) == ("val", "refcoco")]
    return samples, *([line for one in found.values() for line in one[k]] for k in (1, 2))


def read_custom(benchmark: Benchmark, root: Path):
    """The user's own: one .jsonl or .csv file of image, mask (paths from the file's folder), expression.

    Optional are category, split (else train) and mask_value, the object's number in a mask file of many; in .jsonl the
    mask may be an RLE {size, counts} or a list of polygons, the expression a list of several.
    """
    files = [root] if root.is_file() else [*root.glob("*.jsonl"), *root.glob("*.csv")]
    if len(files) != 1 or files[0].suffix not in (".jsonl", ".csv"):
        raise FileNotFoundError(f"custom: --data-root takes a .jsonl or .csv file or a folder with one; {_holds(root)}")
    rows = _csv_rows(files[0]) if files[0].suffix == ".csv" else _rows(files[0], ", entry ")
    return *_gather(rows, lambda row: _custom_samples(files[0].parent, row)), (files[0],)


def _csv_rows(path: Path) -> list[tuple[str, tuple]]:
    """(where, (header, fields)); header names lose the blanks around them."""
    reader = csv.reader(io.StringIO(_text(path)), strict=True)
    try:
        rows = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}; a quote within quotes is written twice") from None
    header = [name.strip() for _, fields in rows[:1] for name in fields]
    return [(f"{path}:{line}, entry {number}", (header, fields)) for number, (line, fields) in enumerate(rows[1:], 1)]


def _csv_row(header: list[str], fields: list[str]) -> dict:
    spaced = [name for name, field in zip(header, fields, strict=False) if field[:1] == " "]
    if any(field.lstrip() != field and field.lstrip()[0] == '"' for field in fields if field.strip()):
        raise ValueError('a blank stands before a quote, which then is a letter; write a.png,m.png,"the red ship"')
    if len(header) == 1 or (len(fields) < len(header) and not spaced):
        raise ValueError(f"{len(fields)} of {len(header)} fields: {', '.join(header)}; commas part them, no ; or tab")
    if len(fields) != len(header) or (spaced and "expression" not in spaced) or any(
            text.strip() for name, text in zip(header[1:], fields[1:], strict=True) if not name):  # the first: an index
        raise ValueError(f"{len(fields)} fields under a header of {len([*filter(None, header)])}; an expression that "
                         'holds a comma needs quotes: "the ship, left of the pier"')
    if any("\n" in field for field in fields):
        raise ValueError("a field goes over several lines; is a quote lost?")
    return _plain([pair for pair in zip(header, fields, strict=True) if pair[0]])


def _custom_samples(folder: Path, row) -> list[Sample]:
    row = json.loads(row, object_pairs_hook=_plain) if isinstance(row, str) else _csv_row(*row)
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object with image, mask, expression")
    if absent := [name for name in ("image", "mask", "expression") if name not in row]:
        raise ValueError(f"no {', '.join(absent)}; image, mask, expression are needed, category and split optional; "
                         f"found {', '.join(map(str, row))}")
    for name in row.keys() - {*CUSTOM.values()}:
        if (letters := re.sub(r"[\W_]", "", name.lower())) in CUSTOM:
            raise ValueError(f"{name!r} is written {CUSTOM[letters]}")
    image, split, category, value = (str("" if row.get(key) is None else row[key]).strip()
                                     for key in ("image", "split", "category", "mask_value"))
    mask = row["mask"].strip() if isinstance(row["mask"], str) else row["mask"]
    if not (image and mask):
        raise ValueError(f"{'mask' if image else 'image'} is empty; it takes a file name")
    if isinstance(mask, str) and mask[0] in "[{":
        raise ValueError("run lengths and polygons are read from .jsonl; a .csv takes a mask file")
    if isinstance(mask, str):
        name, instance, mask = Path(mask).stem, _one_name(folder, mask), folder / mask
    else:
        name, instance = Path(image).stem, _digest(json.dumps(mask).encode())
        parts = mask if isinstance(mask, list) else [mask]
        if not all({"size", "counts"} <= set(part) if isinstance(part, dict) else isinstance(part, list)
                   and len(part) % 2 == 0 and len(part) >= 6 and all(isinstance(x, int | float) for x in part)
                   for part in parts):
            raise ValueError("a mask is a file name, an RLE of size and counts or a list of polygons, each a flat list "
                             "of three points or more: [[x, y, x, y, x, y, ...], ...]")
        size = next((tuple(part["size"]) for part in parts if isinstance(part, dict)), None)
        mask = {"size": size, "parts": parts, "resize": False}
    if value:
        if not (isinstance(mask, Path) and value.isdecimal()):
            raise ValueError(f"mask_value {value!r} is not the number of an object in a mask file")
        mask, instance = {"file": mask, "value": int(value)}, f"{instance}#{value}"
    texts = row["expression"] if isinstance(row["expression"], list) and row["expression"] else [row["expression"]]
    picture, split = _one_name(folder, image), SYNONYMS.get(split.lower(), split) or "train"
    return [Sample(name, folder / image, mask, _clean(text), split, picture, f"{picture}/{instance}", category or None,
                   "file" if category else None) for text in texts]


@functools.cache
def _one_name(folder: Path, name: str) -> str:
    """The same for all ways to write a file's path."""
    path, base = Path(os.path.realpath(folder / name)), Path(os.path.realpath(folder))
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def _lists(name, folders, source, names, classes, note="", **published) -> Benchmark:
    named = {name: group[0] for group in (entry.split(" = ") for entry in classes.split(", ")) for name in group}
    classes = dict(sorted(named.items(), key=lambda pair: -len(pair[0])))
    return Benchmark(name, (read_lists, read_datainfo), SPLITS, folders, source, names, classes=classes, note=note,
                     images=("images", "img_rgb", "images2"),
                     published={split: {"expressions": number} for split, number in published.items()})


def _coco(name, folder, refs, seen, unseen, **published) -> Benchmark:
    counts = ("refs", "images", "expressions")
    return Benchmark(name, (read_refer,), tuple(published), (folder,), "the README of github.com/lichengunc/refer",
                     refs=refs, images=COCO_IMAGES,
                     published={split: dict(zip(counts, row, strict=True)) for split, row in published.items()},
                     reference={"all": {"train": published["train"][0]}, "seen": dict(zip(SPLITS, seen, strict=False)),
                                "unseen": dict(zip(SPLITS[1:], unseen, strict=False))})


_KNOWN = {}  # what _read_all has read
SPLITS = ("train", "val", "test")
CUSTOM = {name.replace("_", ""): name for name in ("image", "mask", "expression", "split", "category", "mask_value")}
SYNONYMS = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test",
            "train": "train", "val": "val", "test": "test"}
RRSISD_IMAGES = ("images/rrsisd/JPEGImages", "JPEGImages", "images/JPEGImages", "images/rrsisd", "images")
COCO_IMAGES = (*(f"{place}train{year}" for year in (2014, 2017) for place in (
    "images/mscoco/images/", "images/", "", "images/mscoco/", "mscoco/images/", "coco/")), "images")
UNION = ("refcoco", "refcoco+", "refcocog-umd")
DATASETS = {benchmark.name: benchmark for benchmark in (
    Benchmark("synthetic", (lambda *_: ([s for split in SPLITS for s in synthetic_samples(split)], [], ()),), SPLITS),
    _lists("refsegrs", ("RefSegRS", "refsegrs", "new_dataset2"), "huggingface.co/datasets/JessicaYuan/RefSegRS",
           r"\d+(\.[A-Za-z]+)?",
           "road, paved road, vehicle, car, van, building = house, truck, trailer, bus, road marking, bikeway = bike "
           "lane, sidewalk = pavement, tree, low vegetation = vegetation = grass, impervious surface",
           "the paper counts 151, 31 and 103 scenes", train=2172, val=431, test=1817),
    Benchmark("rrsisd", (read_refer, read_lists, read_datainfo), SPLITS,
              ("rrsisd", "RRSIS-D/rrsisd", "RRSIS-D", "RRSISD", "rrssid"), "the README of github.com/Lsan2401/RMSIN",
              names=r"\d+(\.[A-Za-z]+)?", refs="refs(unc).p", images=RRSISD_IMAGES,
              note="the authors' pickle holds one sentence for each object, the paper counts several",
              published={"train": {"expressions": 12181}, "val": {"expressions": 1740}, "test": {"expressions": 3481}}),
    _lists("risbench", ("RISBench_dataset", "RISBench", "risbench"), "the README of github.com/HIT-SIRS/CroBIM",
           r"(?P<picture>\S+_\d+)_\d+\.[A-Za-z]+|\S+\.[A-Za-z]+",
           "expressway service area = service area, expressway toll station = toll station, ground track field = track "
           "field = running track, basketball court, container crane = crane, roundabout = traffic circle, windmill = "
           "wind turbine, overpass = flyover, stadium, bridge, soccer ball field = soccer field = football field, "
           "baseball diamond = baseball field, train station = railway station, golf field = golf course, airport, "
           "harbor = harbour, dam, ship = boat = vessel, helipad, vehicle = car = truck = van = bus, chimney, airplane "
           "= plane = aircraft = aeroplane, helicopter, tennis court, storage tank = tank, swimming pool = pool",
           train=26300, val=10013, test=16159),
    _coco("refcoco", "refcoco", "refs(unc).p", (35473, 3175, 3200), (445, 394), train=(42404, 16994, 120624),
          val=(3811, 1500, 10834), testA=(1975, 750, 5657), testB=(1810, 750, 5095)),
    _coco("refcoco+", "refcoco+", "refs(unc).p", (35375, 3171, 3189), (444, 394), train=(42278, 16992, 120191),
          val=(3805, 1500, 10758), testA=(1975, 750, 5726), testB=(1798, 750, 4889)),
    _coco("refcocog-umd", "refcocog", "refs(umd).p", (33093, 2000, 3935), (386, 759), train=(42226, 21899, 80512),
          val=(2573, 1300, 4896), test=(5023, 2600, 9602)),
    _coco("refcocog-google", "refcocog", "refs(google).p", (35105, 3923), (760,), train=(44822, 24698, 85474),
          val=(5000, 4650, 9536)),
    Benchmark("refcoco-union", (read_union,), ("train", "val")),
    Benchmark("refer", (read_refer,), (), (), "where its authors keep it", images=(*RRSISD_IMAGES, *COCO_IMAGES)),
    Benchmark("custom", (read_custom,), SPLITS),
)}

# OVR-CNN's division of COCO's one-word categories, which CGFormer and Prompt-RIS use; the 15 others are in no part.
CATEGORIES = {"all": set(), "seen": set(words(
    "person bicycle car motorcycle train truck boat bench bird horse sheep bear zebra giraffe backpack handbag "
    "suitcase frisbee skis kite surfboard bottle fork spoon bowl banana apple sandwich orange broccoli carrot pizza "
    "donut chair bed toilet tv laptop mouse remote microwave oven toaster refrigerator book clock vase toothbrush")),
    "unseen": set(words("airplane bus cat dog cow elephant umbrella tie snowboard skateboard cup knife cake couch "
                        "keyboard sink scissors"))}


def _read_layout(benchmark: Benchmark, root: Path):
    """What the first reader gives that finds its layout."""
    absent = []
    for reader in benchmark.readers:
        try:
            return reader(benchmark, root)
        except NotThere as error:
            absent.append(error)
    raise absent[0]


def _read_all(dataset: str, data_root, refs: str | None, faults: list[str] | None = None) -> dict[str, list[Sample]]:
    """Every split, kept while its files stay. Wrong entries are put in `faults`, or are an error without it."""
    key = dataset, Path(data_root or "").expanduser(), refs
    if key not in _KNOWN or _KNOWN[key][0] != _stamps(_KNOWN[key][0]):
        samples, wrong, files = _read_layout(_benchmark(dataset, refs), key[1])
        splits, taken = {split: [] for split in DATASETS[dataset].splits}, Counter()
        for sample in samples:
            name = sample.id
            while (sample.split, name) in taken:  # ids are made distinct by their count
                taken[sample.split, sample.id] += 1
                name = f"{sample.id}-{taken[sample.split, sample.id]}"
            taken[sample.split, name] = 1
            splits.setdefault(sample.split, []).append(sample if name == sample.id else replace(sample, id=name))
        stamps = _stamps(path for file in files for path in (file, file.parent))
        _KNOWN[key] = stamps, {split: samples for split, samples in splits.items() if samples}, wrong
    _, splits, wrong = _KNOWN[key]
    if faults is not None:
        faults += wrong
    elif wrong:
        more = f"; {len(wrong) - 1} more entries are wrong, python data.py lists them all" if wrong[1:] else ""
        raise ValueError(wrong[0] + more)
    return splits


def _stamps(paths) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns if path.exists() else 0 for path in paths}


def _benchmark(dataset: str, refs: str | None = None) -> Benchmark:
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; choose one of {', '.join(DATASETS)}")
    if (dataset == "refer") != bool(refs):
        raise ValueError('--refs names the pickle of --dataset refer, as in --refs "refs(unc).p", and of no other')
    return replace(DATASETS[dataset], refs=refs) if refs else DATASETS[dataset]


class NoSplit(ValueError):
    """The data set is there, the split is not."""
    def __init__(self, dataset: str, data_root, wanted: str, splits):
        hint = "; its tests are those of refcoco, refcoco+ and refcocog-umd" if dataset == "refcoco-union" else ""
        there = ", ".join(splits) or "no entry"
        super().__init__(f"{dataset} has no split {wanted!r} in {data_root}; it has {there}{hint}")


def split_names(dataset: str, wanted: str, data_root, refs: str | None = None) -> list[str]:
    """The splits that `wanted` names with commas; test stands for testA and testB, testA+testB for both as one."""
    fixed, names = dataset in ("synthetic", "refcoco-union"), {}
    splits = list(_benchmark(dataset, refs).splits if fixed else _read_all(dataset, data_root, refs))
    for name in wanted.replace(" ", "").split(","):
        group = [split for split in splits if split == name or (name == "test" and split in ("testA", "testB"))]
        if not group and not set(name.split("+")) <= set(splits):
            raise NoSplit(dataset, data_root, name, splits)
        names |= dict.fromkeys(group or [name])
    return list(names)


def has_split(dataset: str, data_root, split: str, refs: str | None = None) -> bool:
    """A download of RISBench without its val list is a normal one."""
    try:
        return bool(split_names(dataset, split, data_root, refs))
    except NoSplit:
        return False


def _select(dataset: str, samples: list[Sample], categories: str) -> list[Sample]:
    if categories not in CATEGORIES:
        raise ValueError(f"unknown categories {categories!r}; choose one of {', '.join(CATEGORIES)}")
    if categories != "all" and not dataset.startswith("refcoco"):
        raise ValueError(f"categories {categories!r} are a division of COCO's; {dataset} takes only 'all'")
    return [sample for sample in samples if categories == "all" or sample.category in CATEGORIES[categories]]


def read(dataset: str, data_root, split: str, *, refs: str | None = None, categories: str = "all", limit: int = 0,
         epoch: int = 0, **options) -> list[Sample]:
    """The samples of a split. `refs` is the pickle of `refer`; `epoch`, `options` go to `synthetic_samples` alone."""
    if dataset == "synthetic":
        scenes = min(SCENES.get(split, 0), -(-limit // (REFERRED * EXPRESSIONS))) if limit else None
        samples = synthetic_samples(split, epoch, **{"scenes": scenes, **options})
    else:
        splits = _read_all(dataset, data_root, refs)
        parts = [split] if split in splits else split.split("+")
        if not set(parts) <= set(splits):
            raise NoSplit(dataset, data_root, split, splits)
        samples = [sample for part in parts for sample in splits[part]]
    samples = _select(dataset, samples, categories)
    samples = samples[:limit] if limit else samples
    if not samples:
        raise ValueError(f"{dataset}: split {split} in {data_root} has no sample ({categories} categories)")
    for path in _missing(samples):
        raise FileNotFoundError(f"{path}, of {dataset} {split}, is missing; all such files are listed by: "
                                f"python data.py --dataset {dataset} --data-root {data_root}")
    return _by_content(samples) if dataset == "refsegrs" else samples


def _by_content(samples: list[Sample]) -> list[Sample]:
    """RefSegRS keeps one picture under many names, which do not tell; its files are equal then."""
    with ThreadPool(os.cpu_count()) as pool:  # reading and hashing leave Python's lock to the others
        digests = pool.map(lambda sample: sample.image.is_file() and _digest(sample.image.read_bytes()), samples)
    return [replace(sample, picture=digest or sample.picture) for sample, digest in zip(samples, digests, strict=True)]


def _missing(samples: list[Sample]) -> Iterator[Path]:
    """Image and mask files that are not there. One look at each folder: on a network disk one at each file is slow."""
    names = functools.cache(lambda folder: set(os.listdir(folder)) if folder.is_dir() else set())
    files = (path for s in samples for path in (s.image, s.mask.get("file") if isinstance(s.mask, dict) else s.mask))
    return (path for path in dict.fromkeys(files) if isinstance(path, Path)
            and path.name not in names(path.parent) and not path.is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Images and masks
# ---------------------------------------------------------------------------------------------------------------------


def _open(path: Path, upright: bool = False) -> Image.Image:
    """The decoded picture of a file, `upright` by its EXIF tag or as stored; whatever is wrong with it is one line."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # another library may have set it; half a picture is no picture
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Corrupt EXIF data")  # of the pixels, which alone are read, it says nothing
        try:
            with Image.open(path) as image:
                if (pages := _pages(image)) > 1:
                    refusal = f"{path}: {pages} pages, of which one would be read; save each as a file"
                elif not (refusal := _refusal(path, *_bands(image))):
                    if not upright:
                        image.getexif().pop(0x0112, None)  # while it loads a TIFF PIL turns it by itself
                    if image.format == "TIFF":  # a fourth band that is tagged so would divide the others
                        image.tile = [tile._replace(args=tuple("RGBA" if one == "RGBa" else one for one in tile.args))
                                      for tile in image.tile]
                    image.load()
                    ImageOps.exif_transpose(image, in_place=True)
                    return image
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file") from None
        except IsADirectoryError:
            refusal = f"{path}: a folder, not an image"
        except UnidentifiedImageError:
            refusal = _refusal(path, *_unread_bands(path)) or (
                f"{path}: not an image, or one cut short ({path.stat().st_size} bytes); PNG, JPEG and TIFF are read")
        except Image.DecompressionBombError:
            refusal = (f"{path}: above {2 * Image.MAX_IMAGE_PIXELS} pixels; cut it: gdal_translate -srcwin 0 0 4096 "
                       f"4096 {path} part.tif")
        except Exception as error:  # PIL's decoders raise nearly anything on a damaged file
            refusal = f"{path}: truncated or damaged image ({error}); download or export it anew"
    raise ValueError(refusal)


def _pages(image: Image.Image) -> int:
    """Pictures in a file; a TIFF's overviews and masks and a JPEG's previews are none."""
    if image.format != "TIFF":
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    kinds = []
    for page in range(image.n_frames):
        image.seek(page)
        kinds.append(image.tag_v2.get(254, 0) & 5)
    image.seek(0)
    return kinds.count(0)


def _bands(image: Image.Image) -> tuple[int, str]:
    """(number of bands, type) as stored: PIL cuts 16-bit colour to its high bytes without a word."""
    if image.format == "TIFF":
        return _tag_bands(image.tag_v2)
    bands = len(image.getbands())
    if image.format == "PNG" and bands > 1 and "16" in str(image.tile[0][3]):
        return bands, "uint16"
    if image.format == "JPEG2000":
        content = Path(image.filename).read_bytes()  # its SIZ segment holds the depth of the first band, less one
        return bands, "uint8" if content[content.find(b"\xff\x4f\xff\x51") + 42] < 8 else "uint16"
    return 1 if image.mode == "LA" else bands, {"I": "uint16", "F": "float32"}.get(image.mode[0], "uint8")


def _tag_bands(tags) -> tuple[int, str]:
    kind = {1: "uint", 2: "int", 3: "float", 5: "cint", 6: "cfloat"}.get(tags.get(339, (1,))[0], "unknown ")
    return tags.get(277, 1), kind + str(max(8, *tags.get(258, (1,))))


def _unread_bands(path: Path) -> tuple[int, str]:
    """The same for a TIFF that PIL does not open; any other file passes as one band of bytes."""
    with open(path, "rb") as file:
        header = file.read(16)
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(header if b"\x2b" in header[2:4] else header[:8])
            file.seek(tags.next)
            tags.load(file)
            return tags[277], _tag_bands(tags)[1] + " in a form that PIL does not open"
        except Exception:  # of a file that is no TIFF
            return 1, "uint8"


def _refusal(path: Path, bands: int, kind: str) -> str:
    if (kind == "uint8" and bands in (1, 3, 4)) or (bands, kind) == (1, "uint16"):
        return ""
    options = "-b 1" if bands < 3 else "-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB"
    options += "" if "uint8" in kind else " -ot Byte -scale"
    return (f"{path}: {bands} band{'s' if bands > 1 else ''} of {kind}; 8-bit images of 1, 3 or 4 bands and 16-bit "
            f"gray are read. Convert it: gdal_translate {options} {path} converted.tif")


def read_image(path, upright: bool = True) -> Image.Image:
    """An image file as RGB, see `to_rgb`. Annotations are of the pixels as stored: for them `upright` is False."""
    return to_rgb(_open(Path(path), upright))


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as RGB. Gray is repeated, transparency laid over white.

    16-bit gray is stretched from its 2nd to its 98th percentile, as GIS viewers show it; what GDAL's tag calls no data
    gets black. The fourth band of a TIFF is left out: it is often infrared, whatever its tag says.
    """
    if image.mode.startswith("I"):
        values, nodata = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {}).get(42113, "").strip(" \0")
        valid = values != float(nodata) if re.fullmatch(r"[-+]?\d+(\.\d*)?", nodata) else np.full(values.shape, True)
        shown = values[valid] if valid.any() else values
        low, high = np.percentile(shown, (2, 98))
        if low == high:
            low, high = shown.min(), max(shown.max(), shown.min() + 1)
        image = Image.fromarray(((values - low) / (high - low) * 255 * valid).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data and image.format != "TIFF":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _mask_from_file(path: Path, value: int | None = None) -> np.ndarray:
    """0 and 1 or 0 and 255, in gray or in one colour on black; with `value`, where the file holds that.

    Noise and smooth edges may be between; what fills 3x3 pixels, or is one of eight values of a lossless file, may not.
    """
    image = _open(path)
    lossy = image.format in ("JPEG", "MPO", "WEBP", "JPEG2000") or image.info.get("compression") == "jpeg"
    with open(path, "rb") as file:
        depth = file.read(25)[-1]
    scale = {2: 85, 4: 17}.get(depth, 1) if image.format == "PNG" and image.mode == "L" else 1  # PIL stretches it to 8
    if value is not None:
        if len(image.getbands()) > 1:
            raise ValueError(f"{path}: mask_value needs one band, the file has {len(image.getbands())}")
        if lossy or not (found := np.asarray(image) // scale == value).any():
            held = "its compression changes values" if lossy else f"it holds {_some(np.unique(image) // scale)}"
            raise ValueError(f"{path}: mask_value {value} is not in it; {held}")
        return found
    if image.mode in ("P", "CMYK"):
        image = image.convert("RGBA")
    bands = np.atleast_3d(np.asarray(image) // scale if scale > 1 else np.asarray(image))
    if image.mode in ("LA", "RGBA"):
        bands, alpha = bands[..., :-1], bands[..., -1]
        if not np.ptp(bands, (0, 1)).any() and np.ptp(alpha):
            raise ValueError(f"{path}: the mask is in its alpha band, all colours are alike; save that band as gray")
    values, top = bands.max(-1), bands.max()
    if (bands != values[..., None]).any():
        colour = bands[values > top / 2].mean(0)
        off = abs(bands - values[..., None] * (colour / colour.max())).max(-1)
        if (off > 2).any() if not lossy and image.getcolors(8) else _fills_a_square(off > 48):
            raise ValueError(f"{path}: a coloured mask; one in gray or in one colour on black is read")
        values, top = np.rint(values * (255 / colour.max())).clip(0, 255), 255
    full = 1 if top <= 1 else 255 if top <= 255 else 65535
    if ((values > 0) & (values < full)).any():
        found, scaled = np.unique(values), values * (255 / full)
        if (not lossy and len(found) <= 8) or scaled.max() <= 50 or _fills_a_square((scaled >= 9) & (scaled <= 246)):
            raise ValueError(f"{path}: a mask holds 0 and 1 or 0 and 255, this one {_some(found)}; of a map of classes "
                             "or objects, custom's mask_value takes one")
    return values > 50 * full / 255


def _some(numbers) -> str:
    return ", ".join(f"{number:g}" for number in numbers[:8]) + (", ..." if len(numbers) > 8 else "")


def _fills_a_square(flags: np.ndarray) -> bool:  # of 3x3 pixels
    rows = flags[:-2] & flags[1:-1] & flags[2:]
    return bool((rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]).any())


def run_lengths(counts: list | str | bytes) -> np.ndarray:
    """Runs of a COCO RLE, background first; compressed to 5 bits per character, differences to the run two before."""
    if isinstance(counts, list):
        if not all(isinstance(count, int) for count in counts):
            raise ValueError("the runs of an RLE are whole numbers")
        return np.array(counts, np.int64)
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    starts = np.flatnonzero(np.append(True, codes & 32 == 0)[:-1])
    lengths = np.diff(np.append(starts, len(codes)))
    values = (codes & 31) << 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat(values, starts)
    runs -= np.where(codes[starts + lengths - 1] & 16, 1 << 5 * lengths, 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


def _mask_from_parts(parts: list, size: tuple[int, int]) -> np.ndarray:
    """Union of RLEs (column-major) and polygons; without any part an empty mask."""
    mask, (height, width) = np.zeros(size, bool), size
    codes = [part for part in parts if isinstance(part, dict) and len(part["counts"])]
    polygons = [_polygon(part, height, width) for part in parts if not isinstance(part, dict)]
    # Two corners have no area, and pycocotools takes four numbers for a box.
    if polygons := [polygon for polygon in polygons if len(polygon) >= 6]:
        try:
            from pycocotools import mask as coco
        except ImportError:
            raise ModuleNotFoundError("masks stored as polygons need: pip install pycocotools") from None
        codes.append(coco.merge(coco.frPyObjects(polygons, height, width)))
    for code in codes:
        runs = run_lengths(code["counts"])
        # pycocotools would leave memory as it finds it where runs are too few
        if tuple(code["size"]) != tuple(size) or runs.min() < 0 or sum(runs.tolist()) != height * width:
            raise ValueError(f"runs of {sum(runs.tolist())} pixels, size {code['size']}, in a mask of {height}x{width}")
        mask |= np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    return mask


def _polygon(part, height: int, width: int) -> list[float]:
    """x, y, x, y, ... in pixels; a little outside is cut off, as the field does."""
    points = np.array(part, float)
    if points.ndim != 1 or len(points) % 2:
        raise ValueError("a polygon is a flat list x, y, x, y, ...")
    shares = points.reshape(-1, 2) / (width, height)
    if not ((shares > -0.05) & (shares < 1.05)).all() or (len(points) >= 6 and points.max() <= 1):
        raise ValueError(f"a polygon of {points.min():g} to {points.max():g} in an image of {height}x{width}; is it of "
                         "another size, or in shares of the sides")
    return points.tolist()


class SizeError(ValueError):
    """A mask of another size than its image."""


def read_mask(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool; `size` is that of the image, which the mask must have, or None where it is not known."""
    if isinstance(sample.mask, int):
        return _drawn(sample.image, sample.size)[1][sample.mask]
    stored = {"file": sample.mask} if isinstance(sample.mask, Path) else sample.mask
    if "file" in stored:
        mask = _mask_from_file(stored["file"], stored.get("value"))
    else:
        try:
            if not sample.mask["size"] and _turned(sample.image):
                raise ValueError("polygons of an image with an orientation tag, drawn on which side up?")
            mask = _mask_from_parts(sample.mask["parts"], sample.mask["size"] or size)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"{sample.image}, sample {sample.id}: damaged segmentation ({error}); download or write "
                             "the annotation anew") from None
        if sample.mask["resize"] and size and mask.shape != size and np.allclose(mask.shape, size, rtol=0, atol=16):
            mask = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    if size and mask.shape != tuple(size):
        tag = "; the image has an orientation tag, but is read as stored: save it turned and without"
        tag = tag if _turned(sample.image) else ""
        raise SizeError(f"{sample.image}, sample {sample.id}: the image is {size[0]}x{size[1]} (height x width), its "
                        f"mask {mask.shape[0]}x{mask.shape[1]}; export one of them at the other's size{tag}")
    return mask


def _turned(path: Path) -> bool:
    with Image.open(path) as image:
        return image.getexif().get(0x0112, 1) > 1


@functools.lru_cache(maxsize=32)
def _drawn(number: int, size: tuple[int, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    return render(scene(number, size=size[0]))


def distractors(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    """(K, H, W) bool of `size`: the other objects of the sample's category in its synthetic scene."""
    things, masks = scene(sample.image, size=sample.size[0]).things, _drawn(sample.image, sample.size)[1]
    others = [Image.fromarray(masks[number]).resize(size[::-1], Image.Resampling.NEAREST)
              for number, thing in enumerate(things) if thing.category == sample.category and number != sample.mask]
    return np.array(others, bool).reshape(-1, *size)


def picture_of(sample: Sample) -> Image.Image:
    is_file = isinstance(sample.image, Path)
    return read_image(sample.image, upright=False) if is_file else Image.fromarray(_drawn(sample.image, sample.size)[0])


def load(samples: list[Sample]) -> tuple[Image.Image, list[np.ndarray]]:
    """The image of some samples of one picture, read once, and the mask of each."""
    first, image = samples[0].image, picture_of(samples[0])
    for one in {sample.image: sample for sample in samples if sample.image != first}.values():
        if one.image.read_bytes() != first.read_bytes() and picture_of(one) != image:
            raise ValueError(f"{first} and {one.image} are one picture by name, but differ; rename one of them")
    return image, [read_mask(sample, image.size[::-1]) for sample in samples]


# ---------------------------------------------------------------------------------------------------------------------
# Dataset, sampler, tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def by_picture(samples: list[Sample], numbers) -> list[tuple[int, ...]]:
    groups = defaultdict(list)
    for number in numbers:
        groups[samples[number].picture].append(number)
    return [tuple(group) for group in groups.values()]


def masked(expression: str, share: float, rng) -> str:
    """The expression, each word lost with probability `share`, but never all of them."""
    parts = expression.split()
    kept = rng.random(len(parts)) >= share
    if not kept.any():
        kept[rng.integers(len(parts))] = True
    return " ".join(itertools.compress(parts, kept))


def add_black_boxes(image: Image.Image, rng):
    """20 to 60 black squares of 32 pixels, as RMSIN's code lays them over a fifth of its training images."""
    for _ in range(rng.integers(20, 61)):
        x, y = (int(rng.integers(max(side - 32, 0) + 1)) for side in image.size)
        image.paste((0, 0, 0), (x, y, x + 32, y + 32))


class ReferringDataset(torch.utils.data.Dataset):
    """Indexed by a tuple of sample numbers of one image, which is loaded once for all of them.

    A number that comes again in the tuple is a repeat: it loses words as TrainSampler's `repeat_mask` says, drawn from
    `draw`, the (seed, epoch), the sample and the count of the repeat. black_boxes: the share of the pictures, the same
    ones in every epoch, that get black squares, each time at other places; masks stay as they are.
    """

    def __init__(self, samples: list[Sample], image_size: int, tokenizer, original: bool = False, *,
                 repeat_mask: float = 0.0, black_boxes: float = 0.0, draw: tuple[int, int] = (0, 0)):
        self.samples, self.image_size, self.tokenizer, self.original = samples, image_size, tokenizer, original
        self.repeat_mask, self.draw = repeat_mask, draw
        self.images = by_picture(samples, range(len(samples)))
        rng = np.random.default_rng((draw[0], 0, 0, 0, 1))  # with zeros alone it would be the sampler's first order
        pictures = rng.permutation(sorted({sample.picture for sample in samples}))
        self.blackened = set(pictures[:int(black_boxes * len(pictures))].tolist())

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, numbers: tuple[int, ...]) -> dict:
        samples, square = [self.samples[number] for number in numbers], (self.image_size, self.image_size)
        for place, number in enumerate(numbers):
            if repeats := numbers[:place].count(number):
                rng = np.random.default_rng((*self.draw, number, repeats))
                text = masked(samples[place].expression, self.repeat_mask, rng)
                samples[place] = replace(samples[place], expression=text)
        image, masks = load(samples)
        if (picture := samples[0].picture) in self.blackened:
            add_black_boxes(image, np.random.default_rng((*self.draw, *picture.encode())))
        pixels = np.array(image.resize(square, Image.Resampling.BILINEAR))
        resized = [np.asarray(Image.fromarray(mask).resize(square, Image.Resampling.NEAREST)) for mask in masks]
        tokens, text_mask = self.tokenizer([sample.expression for sample in samples])
        item = {"image": torch.from_numpy(pixels).permute(2, 0, 1),                             # (3, S, S) uint8
                "tokens": tokens, "text_mask": text_mask,                                       # (m, L)
                "masks": torch.from_numpy(np.stack(resized)),                                   # (m, S, S) bool
                "instance": torch.tensor([instance_number(sample) for sample in samples]),      # (m,) int64
                "samples": [replace(sample, size=image.size[::-1]) for sample in samples]}
        if self.original:
            item["original_masks"] = [torch.from_numpy(mask.copy()) for mask in masks]          # m of (H, W) bool
        return item


def instance_number(sample: Sample) -> int:
    """63 bits, the same in every process."""
    return int(_digest(sample.instance.encode()), 16) >> 1


def collate(items: list[dict]) -> dict:
    """The batch of some items; an image that comes in two of them is in it once."""
    rows = {}
    for item in items:
        rows.setdefault(item["samples"][0].picture, (len(rows), item["image"]))
    samples = [sample for item in items for sample in item["samples"]]
    batch = {name: torch.cat([item[name] for item in items]) for name in ("tokens", "text_mask", "masks", "instance")}
    batch |= {"images": torch.stack([image for _, image in rows.values()]),                     # (N, 3, S, S) uint8
              "image_index": torch.tensor([rows[sample.picture][0] for sample in samples]),     # (M,) int64
              "samples": samples}
    if "original_masks" in items[0]:
        batch["original_masks"] = [mask for item in items for mask in item["original_masks"]]
    return batch


class WordTokenizer:
    """Words of a given list to numbers, for training from scratch: strings -> tokens, text_mask, both (M,length).

    special: number of "pad", "unknown" and, where an architecture marks them, of "begin" and "end"; they are 0, 1, ...
    and the words come after them. A sentence that is too long is cut, its marks kept.
    """

    def __init__(self, words: list[str], length: int, special: dict[str, int]):
        self.words, self.length, self.special = list(words), length, special
        self.numbers = {word: number for number, word in enumerate(self.words, len(special))}

    def __len__(self):
        return len(self.special) + len(self.words)

    def __call__(self, expressions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pad, unknown = self.special["pad"], self.special["unknown"]
        begin, end = ([self.special[mark]] if mark in self.special else [] for mark in ("begin", "end"))
        tokens = torch.full((len(expressions), self.length), pad)
        for row, expression in zip(tokens, expressions, strict=True):
            kept = words(expression)[:self.length - len(begin) - len(end)]
            numbers = begin + [self.numbers.get(word, unknown) for word in kept] + end
            row[:len(numbers)] = torch.tensor(numbers)
        return tokens, tokens != pad


def cut(samples: list[Sample], tokenizer) -> str:
    """How many sentences the model's text length cuts, as a line to print; empty where there are none."""
    texts, longer = [sample.expression for sample in samples], copy.copy(tokenizer)
    longer.length += 1
    lost = sum(int(longer(texts[k:k + 1000])[1].all(1).sum()) for k in range(0, len(texts), 1000))
    return f"{lost} of {len(texts)} sentences are longer than {tokenizer.length} tokens and are cut" if lost else ""


class TrainSampler:
    """Which expressions make up each step of an epoch, divided over processes and micro-batches.

    per_image = 0: each object once per epoch by one of its expressions; b > 0: each image once by up to b expressions,
    of different objects as far as there are, and a step takes as many images as have about batch_size of them. Every
    draw depends on (seed, epoch, step) alone.
    repeat_mask > 0, Prompt-RIS's groups: each image by exactly per_image of its expressions, of any objects, and
    where it has fewer, some of them again; these lose words. Where no image has two expressions there are no groups.
    """

    def __init__(self, samples: list[Sample], *, batch_size: int, micro_batch: int, per_image: int, seed: int,
                 world: int = 1, repeat_mask: float = 0.0):
        self.samples, self.micro_batch, self.per_image = samples, micro_batch, per_image
        self.seed, self.world, self.order = seed, world, (None, [])
        units = defaultdict(lambda: defaultdict(list))
        for number, sample in enumerate(samples):
            units[sample.picture if per_image else sample.instance][sample.instance].append(number)
        self.units = [list(instances.values()) for instances in units.values()]
        self.groups = bool(per_image and repeat_mask) and len(self.units) < len(samples)
        drawn = [min(per_image, sum(map(len, unit))) for unit in self.units] if per_image else [1]  # of each unit
        drawn = [per_image] if self.groups else drawn
        size, total = max(int(batch_size * len(drawn) / sum(drawn)), 1), len(self.units)
        if min(size, total) < world:
            what = "images" if per_image else "objects"
            raise ValueError(f"{total} training {what} in steps of {size} (batch size {batch_size}) are too few for "
                             f"{world} processes; start at most {min(size, total)}, or enlarge the batch or the data")
        self.steps = min(-(-total // size), total // world)  # nearly equal ones, so none below `world` units

    def plan(self, epoch: int, step: int) -> list[list[list[tuple[int, ...]]]]:
        """plan[rank][micro] = one tuple of sample numbers per image."""
        if self.order[0] != epoch:
            # To numpy the seeds (a, b) and (a, b, 0) are equal, so the order has a 0 of its own and steps count from 1.
            order = np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.units))
            self.order = epoch, np.array_split(order, self.steps)
        rng = np.random.default_rng((self.seed, epoch, step + 1))
        drawn = [number for unit in self.order[1][step] for number in self._draw(self.units[unit], rng)]
        groups = by_picture(self.samples, drawn)
        if len(groups) < self.world:  # never with per_image, where each unit is an image
            groups = [(number,) for group in groups for number in group]
        parts = [by_picture(self.samples, itertools.chain(*part)) for part in self._divide(groups)]
        k = len(parts) // self.world
        return [parts[rank * k:(rank + 1) * k] for rank in range(self.world)]

    def _draw(self, instances: list[list[int]], rng) -> list[int]:
        if not self.per_image:
            return [instances[0][rng.integers(len(instances[0]))]]
        if self.groups:
            numbers = list(itertools.chain(*instances))
            rounds = -(-self.per_image // len(numbers))
            return [int(number) for _ in range(rounds) for number in rng.permutation(numbers)][:self.per_image]
        turns = [(turn, rng.random(), int(number)) for numbers in instances
                 for turn, number in enumerate(rng.permutation(numbers))]  # each object's first, then each one's second
        return [number for *_, number in sorted(turns)[:self.per_image]]

    def _divide(self, groups: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Contiguous, nearly equal parts, as few for each process as keep within micro_batch where images allow it."""
        ends, most = np.cumsum([len(group) for group in groups]), len(groups) // self.world
        for k in range(min(-(-ends[-1] // (self.world * self.micro_batch)), most), most + 1):
            count, cuts = self.world * k, [0]
            for part in range(1, count):
                nearest = int(abs(ends - ends[-1] * part / count).argmin()) + 1
                cuts.append(min(max(nearest, cuts[-1] + 1), len(groups) - count + part))
            parts = [groups[a:b] for a, b in zip(cuts, [*cuts[1:], len(groups)], strict=True)]
            if all(len(part) == 1 or sum(map(len, part)) <= self.micro_batch for part in parts):
                break
        return parts

    def batches(self, epoch: int, rank: int, first_step: int = 0) -> Iterator[list[tuple[int, ...]]]:
        """The micro-batches of one process in order: a DataLoader's batch_sampler."""
        for step in range(first_step, self.steps):
            yield from self.plan(epoch, step)[rank]


# ---------------------------------------------------------------------------------------------------------------------
# Check command
# ---------------------------------------------------------------------------------------------------------------------

STOPS = ("missing", "unreadable", "mismatch", "entry")  # what stops a training


def look(samples: list[Sample]) -> tuple[list[tuple[str, str]], str, list[float]]:
    """(kind, line) for all that is wrong with an image file and its masks; a hash of its pixels; what masks cover."""
    findings, shares = [], []

    def tried(read, *arguments):
        try:
            return read(*arguments)
        except (ValueError, OSError) as error:
            kinds = {FileNotFoundError: "missing", SizeError: "mismatch"}
            findings.append((kinds.get(type(error), "unreadable"), str(error)))

    image = tried(picture_of, samples[0])
    for sample in {sample.instance: sample for sample in samples}.values():
        stored = sample.mask if isinstance(sample.mask, dict) else {}
        unknown = image is None and "parts" in stored  # the size on which they are drawn
        if unknown or (mask := tried(read_mask, sample, image and image.size[::-1])) is None:
            continue
        shares.append(mask.mean())
        if not 0 < shares[-1] <= 0.95:
            findings.append(("full" if shares[-1] else "empty",
                             f"{sample.image}, sample {sample.id}: its mask covers {shares[-1]:.1%} of it"))
        if (size := stored.get("size")) and tuple(size) != mask.shape:
            findings.append(("resized", "{}, sample {}: its mask of {}x{} is resized to the image's {}x{}".format(
                sample.image, sample.id, *size, *mask.shape)))
    return findings, image and _digest(image.tobytes()), shares


def _counts(dataset: str, splits: dict[str, list[Sample]], categories: str):
    """Lines: numbers found beside the published ones; for seen and unseen those that CGFormer's code states."""
    def refs(*parts):
        return len({sample.id.rpartition("_")[0] for samples in parts for sample in samples})

    union = dataset == "refcoco-union"
    benchmark = DATASETS["refcoco" if union else dataset]
    for name, samples in splits.items():
        counts = {"refs": refs(samples), "images": len({sample.image_id for sample in samples})}
        counts = (counts if benchmark.reference else {}) | {"expressions": len(samples)}
        known = benchmark.published.get(name, {}) if categories == "all" and not (union and name == "train") else {}
        objects, pictures = (len({getattr(sample, key) for sample in samples}) for key in ("instance", "picture"))
        yield (f"{name:6s} " + ", ".join(_beside(number, what, known.get(what)) for what, number in counts.items())
               + f", of {objects} objects in {pictures} pictures")
    for part in UNION if union and "train" in splits else ():
        kept = refs([sample for sample in splits["train"] if sample.id.startswith(f"{part}_")])
        whole = DATASETS[part].reference[categories].get("train")
        yield f"train  {kept} refs of {part}" + (f", of {whole} with images held out elsewhere" if whole else "")
    for name, expected in benchmark.reference.get(categories, {}).items() if categories != "all" else ():
        parts = [samples for split, samples in splits.items() if split.startswith(name)]
        if parts and not (union and name == "train"):
            yield f"{name:6s} {categories}: {_beside(refs(*parts), 'refs', expected)}"
    if benchmark.note:
        yield benchmark.note


def _beside(found: int, what: str, expected: int | None) -> str:
    if expected is None:
        return f"{found} {what}"
    verdict = "OK" if found == expected else f"differs by {found - expected:+d}"
    return f"{found} {what} (published {expected}: {verdict})"


def check(dataset: str, data_root, split: str | None, categories: str, refs: str | None = None, file=None) -> bool:
    """Prints the counts, every entry and file that is wrong and a summary; returns whether one can train on it."""
    every = _read_all(dataset, data_root, refs, faults := [])
    if absent := [name for name in DATASETS[dataset].splits if name not in every]:
        print(f"not there: {', '.join(absent)}{' (without val the last epoch is kept)' if 'val' in absent else ''}")
    wanted = split_names(dataset, split, data_root, refs) if split else every
    splits = {name: _select(dataset, itertools.chain(*(every[part] for part in name.split("+"))), categories)
              for name in wanted}
    splits = {name: _by_content(samples) if dataset == "refsegrs" else samples for name, samples in splits.items()}
    if file:
        lines = [json.dumps({"id": s.id, "image": str(s.image), "expression": s.expression, "split": name},
                            ensure_ascii=False) + "\n" for name, samples in splits.items() for s in samples]
        Path(f"{file}.part").write_text("".join(lines), encoding="utf-8")
        os.replace(f"{file}.part", file)
    counts, found = list(_counts(dataset, splits, categories)), Counter(entry=len(faults))
    groups, digests, shares, seen = defaultdict(list), {}, [], {}
    print(*counts, *(f"{'entry':10s} {line}" for line in faults), sep="\n")
    for sample in itertools.chain(*splits.values()):
        groups[sample.image].append(sample)
    with Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:  # Ctrl-C ends this one
        for samples, (findings, digest, covered) in zip(groups.values(), tqdm(
                pool.imap(look, groups.values(), 16), "images", len(groups), disable=None), strict=True):
            digests[samples[0].image] = digest
            shares += covered
            first, known = seen.setdefault(samples[0].picture, (samples[0].image, digest))
            if digest and known and digest != known:
                findings.append(("mismatch", f"{first} and {samples[0].image} are one picture by name, but differ"))
            for kind, line in findings:
                found[kind] += 1
                tqdm.write(f"{kind:10s} {line}")
    known = {name: {digests.get(s.image) for s in samples} - {None} for name, samples in splits.items()}
    shared = [f", {len(known[name] & known['train'])} of {name}'s {len(known[name])} are in train too"
              for name in known if name != "train" and "train" in known]
    print(f"{len(set().union(*known.values()))} different pictures" + "".join(shared)
          + (f"; the median mask covers {np.median(shares):.1%} of its picture" if shares else ""))
    stops = sum(found[kind] for kind in STOPS)
    kinds = (*STOPS[:3], "empty", "resized", *(kind for kind in ("entry", "full") if found[kind]))
    verdict = (f"{stops} problems would stop a training" if stops
               else "there are no training samples" if "train" not in every
               else "the files are sound, but their number is not the published one" if "differs by" in "".join(counts)
               else "ready for training")
    print(f"{dataset}: {len(groups)} images, {', '.join(f'{found[kind]} {kind}' for kind in kinds)}: {verdict}")
    return verdict == "ready for training"


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Check a download: counts beside the published ones, then every file.")
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="the data set")
    parser.add_argument("--data-root", default="data", help="its folder, the parent or custom's file (default: data)")
    parser.add_argument("--refs", help="the pickle in it, for --dataset refer, as in \"refs(unc).p\"")
    parser.add_argument("--split", help="one split or several with commas (default: all)")
    parser.add_argument("--categories", default="all", choices=CATEGORIES, help="of the RefCOCO sets (default: all)")
    parser.add_argument("--list", metavar="FILE", help="write a JSON line per sample: id, image, expression, split")
    args = parser.parse_args([re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word)
                              for word in arguments or sys.argv[1:]])
    sys.stdout.reconfigure(errors="replace")  # where a terminal cannot show a file's name
    try:
        sys.exit(0 if check(args.dataset, args.data_root, args.split, args.categories, args.refs, args.list) else 1)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic scenes: aerial pictures of a few objects, with sentences that each fit exactly one of them
# ---------------------------------------------------------------------------------------------------------------------
# A scene is a function of its number: objects and the sentences that refer to them (`scene`, cheap), pixels and masks
# (`render`). Lengths and positions are fractions of the image side, x to the right and y downwards.

SCENES = {"train": 400, "val": 24, "test": 120}                     # of training: per epoch, always new ones
FIRST_SCENE = {"val": 0, "test": 1_000_000, "train": 2_000_000}     # training has no end, so it comes last
SMALL_SCENES = 1 << 40                                              # from this number on objects are smaller
REFERRED, EXPRESSIONS, SIDE, SEED = 4, 3, 96, 20250711          # objects that are referred to, sentences each; pixels
COLOURS = {"red": (205, 40, 40), "orange": (245, 135, 20), "yellow": (245, 220, 50), "green": (40, 205, 85),
           "blue": (40, 80, 230), "white": (238, 238, 238)}
GROUNDS = {"grass": (98, 116, 70), "soil": (136, 112, 84), "sand": (180, 162, 124), "concrete": (128, 127, 122),
           "forest": (62, 82, 56), "asphalt": (88, 88, 92), "water": (56, 84, 100)}
record = functools.partial(make_dataclass, frozen=True)
# An object; angle in radians from +x towards +y, area of its shape as a share of the image.
Thing = record("Thing", ["category", "colour", "rgb", "x", "y", "angle", "length", "width", "area"])
# What a sentence says: a category, perhaps a colour, perhaps one of CUES, perhaps the Description it relates to.
Description = record("Description", ["category", *((name, object, None) for name in ("colour", "cue", "anchor"))])
Expression = record("Expression", ["text", "target", "description"])            # target: number of the object
Scene = record("Scene", ["number", "size", "things", "referred", "expressions"])    # numbers of objects; those of each
# A category: names; length / width; share of that box that its shape covers; smallest and largest area of the shape;
# ground around it, with half-axes along and across in lengths; the shape: polygons of u + iv, u along its length and v
# along its width, both in [-1, 1], each with a tone (lighter towards 1, darker towards -1), later over earlier ones.
Kind = record("Kind", ["names", "aspect", "fill", "area", "site", "shape"])


def bar(u0, u1, v0, v1):
    return [u0 + v0 * 1j, u1 + v0 * 1j, u1 + v1 * 1j, u0 + v1 * 1j]


DISC = np.exp(2j * math.pi * np.arange(20) / 20)
BLADES = np.exp(2j * math.pi * np.arange(3) / 3)[:, None] * [-0.12j, 0.3-0.25j, 0.97-0.13j, 0.97+0.13j, 0.2+0.13j]
KINDS = {
    "building": Kind(("building", "house"), 1.4, 1.03, (0.019, 0.055), None, [(0.25, [-1-1j, 1-1j, 0.45, -0.45]),
        (-0.1, [-1-1j, -0.45, -1+1j]), (-0.2, [1-1j, 0.45, 1+1j]), (-0.4, [-1+1j, 1+1j, 0.45, -0.45])]),
    "storage tank": Kind(("storage tank", "tank"), 1.0, 0.80, (0.018, 0.045), None, [
        (-0.4, DISC), (0, 0.8 * DISC), (0.4, 0.42 * DISC - 0.2 - 0.2j)]),
    "ship": Kind(("ship", "boat"), 2.8, 0.82, (0.018, 0.040), ("water", 0.75, 0.42), [
        (0, [-1-0.75j, 0.35-1j, 0.75-0.6j, 1, 0.75+0.6j, 0.35+1j, -1+0.75j]),
        (-0.45, [-0.85-0.45j, 0.3-0.6j, 0.7, 0.3+0.6j, -0.85+0.45j]),
        (0.7, bar(-0.75, -0.3, -0.45, 0.45)), (0.5, bar(0, 0.2, -0.3, 0.3))]),
    "airplane": Kind(("airplane", "plane", "aircraft"), 1.0, 0.34, (0.016, 0.028), ("asphalt", 0.62, 0.6), [
        (0, [0.35, -0.15+1j, -0.45+1j, -0.2, -0.45-1j, -0.15-1j]),
        (0, [-0.6, -0.85+0.42j, -1+0.42j, -0.9, -1-0.42j, -0.85-0.42j]),
        (0.2, [1, 0.8+0.12j, -0.9+0.1j, -1, -0.9-0.1j, 0.8-0.12j])]),
    "vehicle": Kind(("vehicle", "car"), 1.9, 1.00, (0.017, 0.034), ("asphalt", 0.8, 0.5), [
        (0, [-1-0.8j, -0.85-1j, 0.8-1j, 1-0.7j, 1+0.7j, 0.8+1j, -0.85+1j, -1+0.8j]),
        (-0.75, [0.15-0.75j, 0.5-0.85j, 0.5+0.85j, 0.15+0.75j]), (-0.75, bar(-0.8, -0.6, -0.75, 0.75)),
        (0.25, bar(-0.55, 0.1, -0.7, 0.7))]),
    "tennis court": Kind(("tennis court", "court"), 1.8, 1.03, (0.020, 0.048), None, [(0, bar(-1, 1, -1, 1)),
        (0.9, bar(-0.8, 0.8, -0.75, 0.75)), (0, bar(-0.72, 0.72, -0.6, 0.6)), (0.9, bar(-0.42, -0.34, -0.6, 0.6)),
        (0.9, bar(0.34, 0.42, -0.6, 0.6)), (0.9, bar(-0.4, 0.4, -0.07, 0.07)), (-0.6, bar(-0.05, 0.05, -0.95, 0.95))]),
    "bridge": Kind(("bridge",), 4.0, 1.03, (0.018, 0.040), ("water", 0.38, 0.62), [
        (0, bar(-1, 1, -1, 1)), (0.6, bar(-1, 1, -1, -0.7)), (0.6, bar(-1, 1, 0.7, 1)),
        *((0.8, bar(u - 0.08, u + 0.08, -0.12, 0.12)) for u in (-0.8, -0.4, 0, 0.4, 0.8))]),
    "windmill": Kind(("windmill", "wind turbine"), 1.0, 0.24, (0.016, 0.023), None, [
        *((0, blade) for blade in BLADES), (-0.5, 0.17 * DISC)])}

# A cue gives each object t of the named category and colour a score, in relation to the anchor a. A superlative means
# the object of the highest score, which must lead by the margin. Every other cue means the objects of positive score:
# just one may have it, and no score may lie within the margin of zero. So no sentence rests on a close call.
Cue = record("Cue", ["group", "score", "wordings"])
MARGINS = {"place": 0.07, "extreme": 0.08, "size": math.log(1.5), "relation": 0.07, "nearest": 0.1}
SUPERLATIVE = ("extreme", "size", "nearest")
CUES = {name: Cue(group, score, tuple(wordings.split("|"))) for group, name, score, wordings in (
    ("place", "left", lambda t, _: 0.5 - t.x, "{} on the left|{} on the left side|{} in the left half"),
    ("place", "right", lambda t, _: t.x - 0.5, "{} on the right|{} on the right side|{} in the right half"),
    ("place", "top", lambda t, _: 0.5 - t.y, "{} at the top|{} on the upper side|{} in the upper half"),
    ("place", "bottom", lambda t, _: t.y - 0.5, "{} at the bottom|{} on the lower side|{} in the lower half"),
    *(("place", f"{half} {side}", lambda t, _, x=x, y=y: min(x * (t.x - 0.5), y * (t.y - 0.5)),
       f"{{}} in the {half} {side}|{{}} at the {end} {side}|{{}} in the {half} {side} quarter")
      for half, end, y in (("upper", "top", -1), ("lower", "bottom", 1)) for side, x in (("left", -1), ("right", 1))),
    ("place", "middle", lambda t, _: 0.2 - max(abs(t.x - 0.5), abs(t.y - 0.5)),
     "{} in the middle|{} in the center|{} near the center"),
    ("extreme", "leftmost", lambda t, _: -t.x, "leftmost {}|{} on the far left|{} farthest to the left"),
    ("extreme", "rightmost", lambda t, _: t.x, "rightmost {}|{} on the far right|{} farthest to the right"),
    ("extreme", "topmost", lambda t, _: -t.y, "topmost {}|uppermost {}|{} at the very top"),
    ("extreme", "bottommost", lambda t, _: t.y, "bottommost {}|lowest {}|{} at the very bottom"),
    ("size", "largest", lambda t, _: math.log(t.area), "largest {}|biggest {}|large {}"),
    ("size", "smallest", lambda t, _: -math.log(t.area), "smallest {}|small {}"),
    ("relation", "left of", lambda t, a: beside(a.x - t.x, a.y - t.y), "{} left of {}|{} to the left of {}"),
    ("relation", "right of", lambda t, a: beside(t.x - a.x, a.y - t.y), "{} right of {}|{} to the right of {}"),
    ("relation", "above", lambda t, a: beside(a.y - t.y, a.x - t.x), "{} above {}"),
    ("relation", "below", lambda t, a: beside(t.y - a.y, a.x - t.x), "{} below {}|{} under {}"),
    ("nearest", "nearest", lambda t, a: -math.hypot(t.x - a.x, t.y - a.y), "{} nearest to {}|{} closest to {}"))}
# How often a group is tried; few sentences by relation or place fit just one object, most by colour do.
DRAWN = ("attribute",) * 7 + ("place",) * 5 + ("extreme",) * 4 + ("size",) * 2 + ("relation",) * 2 + ("nearest",)
ARTICLES = ("the ", "the ", "the ", "the ", "a ", "an ", "")
SYNTHETIC_WORDS = sorted({word for text in (
    *(name for kind in KINDS.values() for name in kind.names), *COLOURS, *ARTICLES, "that is", "of the image", ".",
    *(wording.format("", "") for cue in CUES.values() for wording in cue.wordings)) for word in words(text)})


def beside(gap, aside):
    """Score of `left of` and the like: objects of that side count, but one that lies more aside is a close call."""
    return gap if gap <= 0 or gap > abs(aside) else 0.0


def referent(description, things) -> int | None:
    """Number of the one object that fits; None where none or several do, or where it is a close call."""
    anchor = description.anchor and referent(description.anchor, things)
    if description.anchor and anchor is None:
        return None
    numbers = [number for number, thing in enumerate(things) if thing.category == description.category
               and description.colour in (None, thing.colour) and number != anchor]
    if not numbers or not description.cue:
        return numbers[0] if len(numbers) == 1 else None
    cue, anchor = CUES[description.cue], None if anchor is None else things[anchor]
    ranked = sorted(((cue.score(things[number], anchor), number) for number in numbers), reverse=True)
    lead = min([ranked[0][0], *(-score for score, _ in ranked[1:])])
    if cue.group in SUPERLATIVE:
        lead = ranked[0][0] - ranked[1][0] if len(ranked) > 1 else 0.0
    return ranked[0][1] if lead >= MARGINS[cue.group] else None


def pick(rng, options):
    return options[int(rng.random() * len(options))]


def sentence(rng, description, *, bare=False) -> str:
    """The description in words, with an article and at times a full stop; `bare`, an anchor's, without both."""
    name, colour, cue = pick(rng, KINDS[description.category].names), description.colour, CUES.get(description.cue)
    if cue:
        anchor = "the " + sentence(rng, description.anchor, bare=True) if description.anchor else ""
        text = pick(rng, cue.wordings).format(f"{colour} {name}" if colour else name, anchor)
        text += " of the image" if cue.group == "place" and rng.random() < 0.2 else ""
    else:
        text = pick(rng, (f"{colour} {name}", f"{colour} {name}", f"{name} that is {colour}")) if colour else name
    if bare:
        return text
    article = pick(rng, ARTICLES)
    if article in ("a ", "an "):
        article = "the " if cue and cue.group in SUPERLATIVE else "an " if text[0] in "aeiou" else "a "
    text = article + text
    return text[0].upper() + text[1:] + "." if rng.random() < 0.2 else text


def express(rng, things, target: int) -> tuple:
    """Up to EXPRESSIONS sentences of different meaning that each fit the target alone."""
    thing, found = things[target], {}
    for _ in range(40):
        group, anchor = pick(rng, DRAWN), None
        colour = thing.colour if rng.random() < (0.8 if group == "attribute" else 0.4) else None
        if group in ("relation", "nearest"):
            other = pick(rng, things[target + 1:] + things[:target])
            anchor = Description(other.category, other.colour if rng.random() < 0.7 else None)
        cue = pick(rng, [name for name in CUES if CUES[name].group == group] or [None])
        meaning = Description(thing.category, colour, cue, anchor)
        if referent(meaning, things) == target and meaning not in found:
            found[meaning] = Expression(sentence(rng, meaning), target, meaning)
        if len(found) == EXPRESSIONS:
            break
    return tuple(found.values())


def room(rng, length: float, width: float, taken: np.ndarray):
    """(centre x + iy, angle, discs) of a box clear of border and `taken`, or None; a disc is a row (centre, radius)."""
    n = round(1.5 * length / width) if length > width else 1
    radius = math.hypot(length / n, width) / 2 if n > 1 else 0.54 * length
    centres, angles = rng.random(40) + 1j * rng.random(40), 2 * math.pi * rng.random(40)
    discs = centres[:, None] + np.exp(1j * angles)[:, None] * (((np.arange(n) + 0.5) / n - 0.5) * length)   # (tries, n)
    inside = np.maximum(abs(discs.real - 0.5), abs(discs.imag - 0.5)).max(1) < 0.48 - radius
    gaps = abs(discs[:, :, None] - taken[:, 0]) - radius - taken[:, 1].real                         # (tries, n, taken)
    free = inside & (gaps > 0.02).all((1, 2))
    k = int(free.argmax())
    return (complex(centres[k]), float(angles[k]), np.stack([discs[k], np.full(n, radius)], 1)) if free[k] else None


def draw_things(rng, small: bool) -> list:
    """4 to 6 objects that do not touch, some alike in category, some in colour; none where they did not find room."""
    categories = [str(name) for name in rng.permutation(list(KINDS)) for _ in range(pick(rng, (1, 2, 2, 3)))]
    palette = [str(name) for name in rng.permutation(list(COLOURS))[:4]]
    boxes, things, taken = [], [], np.zeros((0, 2), complex)
    for category in categories[:pick(rng, (4, 5, 5, 6))]:
        kind = KINDS[category]
        low, high = (kind.area[0] / 7, kind.area[1] / 2) if small else kind.area
        area = low * (high / low) ** rng.random()
        aspect = kind.aspect * 1.2 ** (2 * rng.random() - 1) if kind.aspect > 1 else 1.0
        boxes.append((math.sqrt(area / kind.fill * aspect), math.sqrt(area / kind.fill / aspect), area, category))
    for length, width, area, category in sorted(boxes, reverse=True):
        if (spot := room(rng, length, width, taken)) is None:
            return []
        centre, angle, discs = spot
        taken, colour = np.concatenate([taken, discs]), pick(rng, palette)
        rgb = tuple(int(level + 16 * (rng.random() - 0.5)) for level in COLOURS[colour])
        things.append(Thing(category, colour, rgb, centre.real, centre.imag, angle, length, width, area))
    return things


@functools.lru_cache(maxsize=1024)                       # loader workers forked after the listing find it made
def scene(number: int, *, size: int = SIDE):
    """Scene by number: its objects and the sentences that refer to REFERRED of them. Nothing is drawn yet."""
    rng, expressions = np.random.default_rng((SEED, number)), {}
    while len(expressions) < REFERRED:
        things, expressions = draw_things(rng, small=number >= SMALL_SCENES), {}
        for target in map(int, rng.permutation(len(things))):
            if len(expressions) < REFERRED and len(found := express(rng, things, target)) == EXPRESSIONS:
                expressions[target] = found
    referred, said = zip(*sorted(expressions.items()), strict=True)
    return Scene(number, size, tuple(things), referred, said)


def render(scene) -> tuple[np.ndarray, list[np.ndarray]]:
    """Picture (H, W, 3) uint8 and for each object its mask (H, W) bool: the pixels whose centre it covers."""
    size, fine = scene.size, 3                           # objects are drawn `fine` times as large, then averaged
    canvas = Image.new("RGBA", (size * fine, size * fine))                  # the fourth channel: the object's number
    for number, thing in enumerate(scene.things, 1):
        place, turn = complex(thing.x, thing.y) * fine * size, cmath.rect(fine * size / 2, thing.angle)
        for tone, polygon in KINDS[thing.category].shape:
            outline = place + turn * (np.real(polygon) * thing.length + np.imag(polygon) * thing.width * 1j)
            tone *= -0.35 if tone > 0 and min(thing.rgb) > 200 else 1               # white cannot get lighter
            rgb = [int(level + tone * (255 - level if tone > 0 else level)) for level in thing.rgb]
            ImageDraw.Draw(canvas).polygon(outline.view(float).tolist(), fill=(*rgb, number))
    labels = canvas.getchannel("A")
    numbers = np.asarray(labels)[fine // 2::fine, fine // 2::fine]
    cover = np.asarray(labels.point([0] + [255] * 255).reduce(fine), np.float32) / 255
    paint = np.moveaxis(np.asarray(canvas.convert("RGB").reduce(fine)), -1, 0) / np.maximum(cover, 1 / fine**2)
    rng = np.random.default_rng((SEED, scene.number, 1))                    # the ground does not depend on the objects

    def smooth(cells: int) -> np.ndarray:                # (H, W) soft random blobs around 0.5
        grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))

    grounds = {name: np.array(colour, np.float32)[:, None, None] for name, colour in GROUNDS.items()}
    base, patch = (grounds[name] for name in rng.permutation(list(GROUNDS))[:2])
    picture = base + (patch - base) * np.clip(8 * smooth(4) - 4.5, 0, 1)                 # (3, H, W)
    wobble, grain = smooth(8), rng.normal(0, 5, (size, size)).astype(np.float32)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    sites = {name: np.full((size, size), -1, np.float32) for name in ("asphalt", "water")}      # above 0 near an object
    for thing in scene.things:
        if site := KINDS[thing.category].site:
            ground, along, across = site
            c, s = math.cos(thing.angle) / thing.length, math.sin(thing.angle) / thing.length
            dx, dy = centres - thing.x, (centres - thing.y)[:, None]
            u, v = (dx * c + dy * s) / along, (dy * c - dx * s) / across
            np.maximum(sites[ground], 1.4 - u * u - v * v, out=sites[ground])
    for name, near in sites.items():
        picture += (grounds[name] - picture) * np.clip(2 * near + 4 * wobble - 2, 0, 1)
    picture *= 0.85 + 0.3 * smooth(16)
    picture *= 1 - 0.5 * np.roll(cover, [max(1, round(size / 60))] * 2, (0, 1))      # a shadow to the lower right
    picture = np.clip(np.where(numbers > 0, paint, picture) + grain, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(picture, 0, -1)), [numbers == i + 1 for i in range(len(scene.things))]


def synthetic_samples(split: str, epoch=0, scenes: int | None = None, small=False) -> list[Sample]:
    """REFERRED x EXPRESSIONS samples of each scene, each object's number as mask; every epoch trains on new scenes."""
    if split not in SCENES:
        raise ValueError(f"synthetic has no split {split!r}; choose one of {', '.join(SCENES)}")
    scenes, samples = SCENES[split] if scenes is None else scenes, []
    first = epoch * scenes if split == "train" else 0
    for place in range(first, first + scenes):
        drawn, image_id = scene(FIRST_SCENE[split] + place + (SMALL_SCENES if small else 0)), f"{split}-{place:05d}"
        for target, expressions in zip(drawn.referred, drawn.expressions, strict=True):
            instance, category = f"{image_id}-{target}", drawn.things[target].category
            for i, said in enumerate(expressions):
                kind = CUES[said.description.cue].group if said.description.cue else "attribute"
                samples.append(Sample(f"{instance}-{i}", drawn.number, target, said.text, split, image_id, instance,
                                      category, "file", (drawn.size, drawn.size), kind=kind))
    return samples


if __name__ == "__main__":
    main()
