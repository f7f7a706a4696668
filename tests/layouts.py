"""Writers that put a few synthetic scenes on disk as each data set is after its download.

    write("rrsisd", tmp_path, splits={"train": 3, "val": 1, "test": 1})   -> {split: [Entry]}
"""

import csv
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import data

RRSISD = ["Expressway-Service-area", "Expressway-toll-station", "airplane", "airport", "baseballfield",
          "basketballcourt", "bridge", "chimney", "dam", "golffield", "groundtrackfield", "harbor",
          "overpass", "ship", "stadium", "storagetank", "tenniscourt", "trainstation", "vehicle",
          "windmill"]
RRSISD_NUMBER = {"building": 14, "storage tank": 15, "ship": 13, "airplane": 2, "vehicle": 18, "tennis court": 16,
                 "bridge": 6, "windmill": 19}
COCO = {3: "car", 5: "airplane", 6: "bus", 9: "boat", 10: "traffic light", 15: "bench", 38: "kite", 44: "bottle"}
COCO_NUMBER = {"vehicle": 3, "airplane": 5, "bridge": 6, "ship": 9, "building": 10, "tennis court": 15, "windmill": 38,
               "storage tank": 44}  # seen, unseen, unseen, seen, in neither part, seen, seen, seen
SPLITS = dict.fromkeys(("refsegrs", "risbench", "rrsisd", "custom", "refcocog-umd"), ("train", "val", "test")) | {
    "refcoco": ("train", "val", "testA", "testB"), "refcoco+": ("train", "val", "testA", "testB"),
    "refcocog-google": ("train", "val")}
REFER = {"refcoco": ("refcoco", "refs(unc).p"), "refcoco+": ("refcoco+", "refs(unc).p"),
         "refcocog-umd": ("refcocog", "refs(umd).p"), "refcocog-google": ("refcocog", "refs(google).p")}
# Scenes of the union: another set than the one that trains on them holds out 3 and 4, google's val alone 1 and 7.
UNION = {"refcoco": {"train": [0, 1, 2], "val": [3], "testA": [4], "testB": [5]},
         "refcoco+": {"train": [0, 1, 3], "val": [6], "testA": [5], "testB": [9]},
         "refcocog-umd": {"train": [1, 2, 4, 7, 8], "val": [10], "test": [11]},
         "refcocog-google": {"train": [2, 8, 10, 11], "val": [1, 7]}}


@dataclass
class Entry:
    """What a reader should give back."""

    scene: int
    object: int
    expression: str
    mask: np.ndarray
    category: str


def entries(scene: int, size: int, expressions: int):
    """(picture, entries of the scene's referred objects)."""
    drawn = data.scene(scene, size=size)
    pixels, masks = data.render(drawn)
    return Image.fromarray(pixels), [
        Entry(scene, number, said.text, masks[number], drawn.things[number].category)
        for number, texts in zip(drawn.referred, drawn.expressions, strict=True) for said in texts[:expressions]]


def polygons(mask: np.ndarray) -> list[list[float]]:
    """Rectangles that cover the mask exactly: one per run of pixels in a row."""
    found = []
    for y, row in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        found += [[int(a), y, int(b), y, int(b), y + 1, int(a), y + 1] for a, b in edges.reshape(-1, 2)]
    return found


def rle(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco  # not everywhere, and not for every layout

    code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def save(image, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, quality=95)


def write(dataset: str, root, *, scenes: int = 2, splits: dict | None = None, size: int = 96) -> dict[str, list[Entry]]:
    """`splits` gives for each split a number of scenes or their numbers; without it each split has `scenes`.

    Scenes of different splits are different. `refcoco-union` writes its four parts as UNION says and returns one such
    dict for each of them.
    """
    root = Path(root)
    if dataset == "refcoco-union":
        return {name: write(name, root, splits=numbers, size=size) for name, numbers in UNION.items()}
    numbers, free = {}, 0
    for split, wanted in (splits or dict.fromkeys(SPLITS[dataset], scenes)).items():
        numbers[split] = list(range(free, free + wanted)) if isinstance(wanted, int) else wanted
        free = max([free, *(number + 1 for number in numbers[split])])
    if dataset in REFER:
        return _write_coco(root, numbers, size, *REFER[dataset])
    if dataset == "refsegrs":  # numbered, without extension in the list
        return _write_lists(root, numbers, size, "RefSegRS", "images", "masks", lambda count, *_: f"{count}.tif")
    if dataset == "risbench":
        return _write_lists(root, numbers, size, "RISBench_dataset", "img_rgb", "mask",
                            lambda _, split, scene, number: f"{split}_{scene}_{number}.png")
    return {"rrsisd": _write_rrsisd, "custom": _write_custom}[dataset](root, numbers, size)


def _write_lists(root, numbers, size, folder, images, masks, name):
    """One copy of the image per expression, a text file per split; `name` of (count, split, scene, object)."""
    written, count = {}, 1000
    for split, scenes in numbers.items():
        lines, written[split] = [], []
        for picture, entry in ((picture, entry) for scene in scenes for picture, found in [entries(scene, size, 1)]
                               for entry in found):
            count += 1
            file = name(count, split, entry.scene, entry.object)
            save(picture, root / folder / images / file)
            save(entry.mask.astype(np.uint8) * 255, root / folder / masks / file)
            lines.append(f"{file.removesuffix('.tif')} {entry.expression}\n")
            written[split].append(entry)
        (root / folder / f"output_phrase_{split}.txt").write_text("".join(lines))
    return written


def _write_rrsisd(root, numbers, size):
    """REFER with one expression per image: compressed RLE in a list, categories_id, boxes as corners."""
    written, refs, images, annotations, number = {}, [], [], [], 400
    for split, scenes in numbers.items():
        written[split] = []
        for picture, entry in ((picture, entry) for scene in scenes for picture, found in [entries(scene, size, 1)]
                               for entry in found):
            number += 1
            name, category = f"{number:05d}.jpg", RRSISD_NUMBER[entry.category]
            save(picture, root / "images" / "rrsisd" / "JPEGImages" / name)
            refs.append({"image_id": number, "split": split, "file_name": name, "category_id": category,
                         "ann_id": number, "sent_ids": [number], "ref_id": number, "sentences": [
                             {"tokens": entry.expression.split(), "raw": entry.expression, "sent": entry.expression,
                              "sent_id": number}]})
            images.append({"file_name": name, "height": size, "width": size, "id": number})
            annotations.append({"bbox": [0, 0, 9, 9], "categories_id": category, "id": number, "image_id": number,
                                "segmentation": [rle(entry.mask)], "area": 279213})
            written[split].append(entry)
    _write_refer(root / "rrsisd", "refs(unc).p", refs, images, annotations,
                 [{"id": place, "name": name} for place, name in enumerate(RRSISD)])
    return written


def _write_coco(root, numbers, size, folder, refs_name):
    """REFER over COCO: several expressions per object, polygons; an image may be in several sets."""
    written, refs, sentences = {}, [], 0
    path = root / folder / "instances.json"
    known = json.loads(path.read_text()) if path.exists() else {"images": [], "annotations": []}
    images, annotations = ({entry["id"]: entry for entry in known[name]} for name in ("images", "annotations"))
    for split, scenes in numbers.items():
        written[split] = []
        for scene in scenes:
            picture, found = entries(scene, size, 3)
            name = f"COCO_train2014_{scene:012d}.jpg"
            save(picture, root / "images" / "mscoco" / "images" / "train2014" / name)
            images[scene] = {"file_name": name, "height": size, "width": size, "id": scene}
            for target in dict.fromkeys(entry.object for entry in found):
                said = [entry for entry in found if entry.object == target]
                annotation, category = scene * 100 + target, COCO_NUMBER[said[0].category]
                annotations[annotation] = {"id": annotation, "image_id": scene, "category_id": category, "iscrowd": 0,
                                           "segmentation": polygons(said[0].mask), "bbox": [0, 0, 1, 1], "area": 1.0}
                first, sentences = sentences, sentences + len(said)
                refs.append({"ref_id": len(refs), "ann_id": annotation, "category_id": category, "image_id": scene,
                             "file_name": f"COCO_train2014_{scene:012d}_{annotation}.jpg", "split": split,
                             "sent_ids": list(range(first, sentences)), "sentences": [
                                 {"tokens": entry.expression.lower().split(), "raw": entry.expression,
                                  "sent": entry.expression.lower(), "sent_id": first + place}
                                 for place, entry in enumerate(said)]})
            written[split] += found
    _write_refer(root / folder, refs_name, refs, list(images.values()), list(annotations.values()),
                 [{"id": number, "name": name} for number, name in COCO.items()])
    return written


def _write_refer(folder, refs_name, refs, images, annotations, categories):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / refs_name).write_bytes(pickle.dumps(refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(
        {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}))


def _write_custom(root, numbers, size):
    """A CSV file with all its columns beside folders of pictures and masks."""
    written, rows = {}, []
    for split, scenes in numbers.items():
        written[split] = []
        for scene in scenes:
            picture, found = entries(scene, size, 2)
            save(picture, root / "pictures" / f"{scene}.png")
            for entry in found:
                mask = f"truth/{scene}_{entry.object}.png"
                save(entry.mask.astype(np.uint8) * 255, root / mask)
                rows.append([f"pictures/{scene}.png", mask, entry.expression, entry.category, split])
            written[split] += found
    with open(root / "samples.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", "mask", "expression", "category", "split"], *rows])
    return written
