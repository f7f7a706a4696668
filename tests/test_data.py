"""Readers on the layouts people have, traps of the formats, the loader's batches, the sampler, the check command."""

import csv
import io
import json
import math
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import layouts
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from pycocotools import mask as coco

import data

ROOT = Path(__file__).resolve().parent.parent
ON_DISK = ("refsegrs", "risbench", "rrsisd", "refcoco", "refcoco+", "refcocog-umd", "refcocog-google", "custom")


def tokenizer(expressions):
    """(M, 6) word lengths."""
    rows = [[len(word) for word in data.words(text)][:6] for text in expressions]
    tokens = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    return tokens, tokens > 0


def sample(image="a", instance="a0", number=0, **fields):
    return data.Sample(**{"id": str(number), "image": 0, "mask": 0, "expression": "a ship", "split": "train",
                          "image_id": image, "instance": instance, "category": None, "category_source": None, **fields})


def picture(path, size=(8, 6), mode="RGB", value=None):
    """A file of (W, H) noise, or of one value."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8) if value is None else np.full(
        shape, value, np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def box(height=6, width=8):
    mask = np.zeros((height, width), bool)
    mask[1:3, 2:7] = True
    return mask


def lists(folder, lines, suffix="png", mask=None, split="train", size=(8, 6)):
    """A RISBench or RefSegRS folder of given lines; pictures and masks of `size`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"output_phrase_{split}.txt").write_text(lines)
    for name in {line.split()[0] for line in lines.splitlines() if line.strip()}:
        name = name if "." in name else f"{name}.{suffix}"
        picture(folder / "images" / name, size)
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(box(*size[::-1]) if mask is None else mask).save(folder / "masks" / name)
    return folder


def refer(root, segmentation, *, dataset="rrsisd", size=(8, 6), actual=None, annotation=None, ref=None, sentence=None,
          protocol=2):
    """A REFER set of one object; `size` as instances.json says it, `actual` that of the image file, both (W, H)."""
    folder, refs = {"rrsisd": ("rrsisd", "refs(unc).p"), **layouts.REFER}[dataset]
    (root / folder).mkdir(parents=True, exist_ok=True)
    sentence = {"sent_id": 5, "raw": "The ship", "sent": "the ship", "tokens": ["the", "ship"]} | (sentence or {})
    refs_rows = [{"ref_id": 7, "ann_id": 3, "image_id": 9, "category_id": 13, "split": "train", "sent_ids": [5],
                  "file_name": "x.jpg", "sentences": [sentence]} | (ref or {})]
    (root / folder / refs).write_bytes(pickle.dumps(refs_rows, protocol=protocol))
    (root / folder / "instances.json").write_text(json.dumps({
        "images": [{"id": 9, "file_name": "00009.jpg", "width": size[0], "height": size[1]}],
        "annotations": [{"id": 3, "image_id": 9, "categories_id": 13, "segmentation": segmentation,
                         **(annotation or {})}],
        "categories": [{"id": 13, "name": "ship"}]}))
    place = "images/rrsisd/JPEGImages" if dataset == "rrsisd" else "images/mscoco/images/train2014"
    picture(root / place / "00009.jpg", actual or size)
    return root


def only(dataset, root, split="train", **options):
    [found] = data.read(dataset, root, split, **options)
    return found


def anew(dataset, root):
    """The same, although nothing may have changed that tells the reader to look again."""
    data._KNOWN.clear()
    return only(dataset, root)


# ---------------------------------------------------------------------------------------------------------------------
# Readers


@pytest.mark.parametrize("dataset", ON_DISK)
def test_each_layout_is_read_back(dataset, tmp_path):
    written = layouts.write(dataset, tmp_path, scenes=1)
    assert data.split_names(dataset, ",".join(written), tmp_path) == list(written)
    for split, entries in written.items():
        samples = data.read(dataset, tmp_path, split)
        assert [s.expression for s in samples] == [" ".join(entry.expression.split()) for entry in entries]
        assert len({s.id for s in samples}) == len(samples) and not any(set(s.id) & set("/\\ ") for s in samples)
        assert {s.split for s in samples} == {split}
        for found, entry in zip(samples, entries, strict=True):
            image, [mask] = data.load([found])
            assert image.mode == "RGB" and mask.dtype == bool and (mask == entry.mask).all()
        several = dataset.startswith("refcoco") or dataset == "custom"  # the others have a copy of the image per sample
        assert len({s.image_id for s in samples}) == (1 if several else len(samples))
        assert len({s.instance for s in samples}) == len({(entry.scene, entry.object) for entry in entries})


def test_category_comes_from_the_file_where_it_is(tmp_path):
    entries = layouts.write("rrsisd", tmp_path, splits={"train": 2})["train"]
    found = [(s.category, s.category_source) for s in data.read("rrsisd", tmp_path, "train")]
    assert found == [(layouts.RRSISD[layouts.RRSISD_NUMBER[entry.category]], "file") for entry in entries]
    entries = layouts.write("refcoco", tmp_path, splits={"train": 2})["train"]
    found = [(s.category, s.category_source) for s in data.read("refcoco", tmp_path, "train")]
    assert found == [(layouts.COCO[layouts.COCO_NUMBER[entry.category]], "file") for entry in entries]


@pytest.mark.parametrize(("dataset", "expression", "category"), [
    ("refsegrs", "building along the road", "building"), ("refsegrs", "two buses", "bus"),
    ("refsegrs", "the white road marking on the road", "road marking"), ("refsegrs", "Paved road", "paved road"),
    ("refsegrs", "road along the paved road", "road"), ("refsegrs", "the carport", None),
    ("refsegrs", "the railroad", None), ("refsegrs", "low-vegetation", "low vegetation"),
    ("refsegrs", "vehicles driving on the paved road", "vehicle"), ("risbench", "a storage_tank", "storage tank"),
    ("risbench", "The storage-tank beside the harbor.", "storage tank"), ("risbench", "a small-vehicle", "vehicle"),
    ("risbench", "a grey plane left of the terminal", "airplane"),
    ("risbench", "the baseball field near the tennis court", "baseball diamond"),
    ("risbench", "The aircraft near the storage tank", "airplane"), ("risbench", "something in the middle", None),
    ("custom", "a ship", None)])
def test_category_from_the_expression(dataset, expression, category):
    assert data.find_category(expression, data.DATASETS[dataset].classes) == category


@pytest.mark.parametrize(("dataset", "classes", "others"), [
    # 14 of RSRefSeg 2's and FIANet's lists, and the one more of ICIPNet's Table V; then what else they are called
    ("refsegrs", "road, vehicle, car, van, building, truck, trailer, bus, road marking, bikeway, sidewalk, tree, "
     "low vegetation, impervious surface, paved road",
     {"house": "building", "bike lane": "bikeway", "pavement": "sidewalk", "grass": "low vegetation",
      "vegetation": "low vegetation"}),
    ("risbench", "expressway service area, expressway toll station, ground track field, basketball court, container "
     "crane, roundabout, windmill, overpass, stadium, bridge, soccer ball field, baseball diamond, train station, golf "
     "field, airport, harbor, dam, ship, helipad, vehicle, chimney, airplane, helicopter, tennis court, storage tank, "
     "swimming pool",
     {"service area": "expressway service area", "toll station": "expressway toll station", "harbour": "harbor",
      "track field": "ground track field", "running track": "ground track field", "crane": "container crane",
      "traffic circle": "roundabout", "wind turbine": "windmill", "flyover": "overpass", "golf course": "golf field",
      "soccer field": "soccer ball field", "football field": "soccer ball field", "baseball field": "baseball diamond",
      "railway station": "train station", "boat": "ship", "vessel": "ship", "car": "vehicle", "truck": "vehicle",
      "van": "vehicle", "bus": "vehicle", "plane": "airplane", "aircraft": "airplane", "aeroplane": "airplane",
      "tank": "storage tank", "pool": "swimming pool"})])
def test_classes_that_are_looked_for(dataset, classes, others):
    named = {name: name for name in classes.split(", ")} | others
    assert data.DATASETS[dataset].classes == named and len(classes.split(", ")) == {"refsegrs": 15}.get(dataset, 26)
    for name, category in named.items():
        assert data.find_category(f"The {name.upper()}s", data.DATASETS[dataset].classes) == category


def test_parsed_category_is_marked(tmp_path):
    lists(tmp_path / "RefSegRS", "12 van driving on the road\n13 something red\n", "tif")
    found = data.read("refsegrs", tmp_path, "train")
    assert [(s.category, s.category_source) for s in found] == [("van", "parsed"), (None, None)]
    assert [s.image.name for s in found] == ["12.tif", "13.tif"] and found[0].mask.name == "12.tif"


def test_lines_with_double_spaces_trailing_newlines_and_repeats(tmp_path):
    text = ("\ufefftrain_0_0.png  The  plane is\tleft .\r\n\n  \n"
            "train_0_0.png a second one\rtrain_0_2.png I'm the middle \n\n")
    lists(tmp_path / "RISBench", text.lstrip("\ufeff"))
    (tmp_path / "RISBench" / "output_phrase_train.txt").write_bytes(text.encode())
    found = data.read("risbench", tmp_path, "train")
    assert [s.expression for s in found] == ["The plane is left .", "a second one", "I'm the middle"]
    assert [s.id for s in found] == ["train_0_0", "train_0_0-2", "train_0_2"]
    assert found[0].instance == found[1].instance != found[2].instance
    assert data.words(found[2].expression) == ["i", "'", "m", "the", "middle"]


def test_ids_stay_distinct_whatever_they_are(tmp_path):
    lists(tmp_path / "RISBench", "a.png x\na.png y\na-2.png z\na.png w\n")
    assert [s.id for s in data.read("risbench", tmp_path, "train")] == ["a", "a-2", "a-2-2", "a-3"]


def test_risbench_without_val_list_is_normal(tmp_path):
    layouts.write("risbench", tmp_path, splits={"train": 1, "test": 1})
    assert not data.has_split("risbench", tmp_path, "val") and data.has_split("risbench", tmp_path, "test")
    with pytest.raises(ValueError, match=r"no split 'val'.*it has train, test$"):
        data.split_names("risbench", "val", tmp_path)
    with pytest.raises(ValueError, match=r"no split 'val'"):
        data.read("risbench", tmp_path, "val")
    with pytest.raises(FileNotFoundError):  # no data at all is not a missing split
        data.has_split("risbench", tmp_path / "elsewhere", "val")


def test_split_names(tmp_path):
    layouts.write("refcoco", tmp_path, scenes=1)
    assert data.split_names("refcoco", "val, test", tmp_path) == ["val", "testA", "testB"]
    assert data.split_names("refcoco", "testB,test", tmp_path) == ["testB", "testA"]
    assert data.split_names("refcoco", "val,testA+testB", tmp_path) == ["val", "testA+testB"]
    both, parts = (data.read("refcoco", tmp_path, "testA+testB"),
                   [data.read("refcoco", tmp_path, split) for split in ("testA", "testB")])
    assert both == parts[0] + parts[1] and len({one.id for one in both}) == len(both)
    for wanted in ("testA+testC", "testA+"):
        with pytest.raises(ValueError, match="no split"):
            data.split_names("refcoco", wanted, tmp_path)
        with pytest.raises(ValueError, match="no split"):
            data.read("refcoco", tmp_path, wanted)
    assert data.has_split("refcoco", tmp_path, "test")
    with pytest.raises(ValueError, match="no split ''"):
        data.split_names("refcoco", "val,", tmp_path)
    with pytest.raises(ValueError, match="it has train, val; its tests are those of refcoco, refcoco"):
        data.split_names("refcoco-union", "test", tmp_path)
    assert data.split_names("refcoco-union", "val", "nowhere") == ["val"]  # without reading four sets
    layouts.write("refcocog-google", tmp_path, scenes=1)
    assert data.split_names("refcocog-google", "val+train", tmp_path) == ["val+train"]
    assert not data.has_split("refcocog-google", tmp_path, "test")
    with pytest.raises(ValueError, match="unknown data set 'refcocoo'.*risbench"):
        data.read("refcocoo", tmp_path, "val")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(encoding, tmp_path):
    folder = lists(tmp_path / "mine", "a.png a ship\n")
    (folder / "output_phrase_train.txt").write_text("a.png a ship\n", encoding=encoding)
    with pytest.raises(ValueError, match=f"^{folder}/output_phrase_train.txt: it is UTF-16, not UTF-8; convert it: ic"):
        data.read("risbench", folder, "train")
    (folder / "output_phrase_test.txt").write_bytes(b"a.png caf\xe9\n")
    with pytest.raises(ValueError, match="UTF-16.*1 more entries are wrong"):
        data.split_names("risbench", "test", folder)


def test_masks_and_images_may_have_another_extension(tmp_path):
    entries = layouts.write("risbench", tmp_path, splits={"train": 1})["train"]
    for path in (tmp_path / "RISBench_dataset" / "mask").iterdir():
        Image.open(path).save(path.with_suffix(".tif"))
        path.unlink()
    for path in (tmp_path / "RISBench_dataset" / "img_rgb").iterdir():
        path.rename(path.with_suffix(".PNG"))
    samples = data.read("risbench", tmp_path, "train")
    assert all((mask == entry.mask).all() for mask, entry in zip(data.load(samples)[1], entries, strict=True))
    (tmp_path / "RISBench_dataset" / "mask" / f"{samples[1].id}.bmp").touch()
    one = samples[1].id
    with pytest.raises(ValueError, match=rf"train.txt:2: is {one}.png the file {one}.bmp or {one}.tif. Take"):
        data.read("risbench", tmp_path, "train")
    layouts.write("refsegrs", tmp_path, splits={"train": 1})
    for path in [*(tmp_path / "RefSegRS").glob("*/*.tif")]:
        path.rename(path.with_suffix(".png"))
    names = [(one.id, one.image.name, one.mask.name) for one in data.read("refsegrs", tmp_path, "train")]
    assert names == [(str(k), f"{k}.png", f"{k}.png") for k in range(1001, 1005)]


@pytest.mark.parametrize("name", ["{:05d}.jpg", "{:05d}"])
def test_rrsisd_as_folders_and_lists(name, tmp_path):
    written = layouts.write("rrsisd", tmp_path, splits={"train": 1, "val": 1, "test": 1})
    root, number = tmp_path / "RRSIS-D", 400
    move(tmp_path / "images/rrsisd/JPEGImages", root / "images")
    shutil.rmtree(tmp_path / "rrsisd")
    (root / "masks").mkdir()
    (root / "phrase_txts").mkdir()
    for split, entries in written.items():
        lines = []
        for entry in entries:
            number += 1
            Image.fromarray(entry.mask).save(root / "masks" / f"{number:05d}.png")
            lines.append(f"{name.format(number)} {entry.expression}\n")
        (root / "phrase_txts" / f"output_phrase_{split}.txt").write_text("".join(lines))
    for split, entries in written.items():
        for place in (tmp_path, root):
            samples = data.read("rrsisd", place, split)
            assert [one.expression for one in samples] == [" ".join(entry.expression.split()) for entry in entries]
            for one, entry in zip(samples, entries, strict=True):
                assert (data.load([one])[1][0] == entry.mask).all()


def datainfo(dataset, root, folder):
    """Turns a layout of layouts.py into the images alone with a JSON line per sample in `folder`; the samples."""
    written = {split: data.read(dataset, root, split) for split in ("train", "val", "test")}
    folder.mkdir(parents=True, exist_ok=True)
    for split, samples in written.items():
        lines = []
        for one in samples:
            [mask] = data.load([one])[1]
            row = {"split": split, "image_id": one.id, "sent": one.expression, "file_name": one.image.name}
            if dataset == "rrsisd":
                row |= {"image_id": int(one.id), "category_id": 13, "category_name": one.category,
                        "ann_id": int(one.id), "bbox": [0, 0, 1, 1], "area": 7}
            rle = layouts.rle(mask)
            lines.append(json.dumps({**row, "segmentation": [rle] if dataset == "rrsisd" else rle}) + "\n")
        (folder / f"{dataset}_{split}.jsonl").write_text("".join(lines))
    return written


@pytest.mark.parametrize(("dataset", "folder", "root"), [
    ("refsegrs", "RefSegRS/datainfo", "."), ("refsegrs", "datainfo", "."),
    ("refsegrs", "RefSegRS/images", "RefSegRS/images"),
    ("risbench", "RISBench_dataset/annotations", "."), ("risbench", "RISBench_dataset", "RISBench_dataset"),
    ("rrsisd", "datainfo", "."), ("rrsisd", "rrsisd/datainfo", "."),
    ("rrsisd", "images/rrsisd/JPEGImages/datainfo", "images/rrsisd/JPEGImages")])
def test_annotations_as_datainfo(dataset, folder, root, tmp_path):
    layouts.write(dataset, tmp_path, splits={"train": 1, "val": 1, "test": 1})
    written = datainfo(dataset, tmp_path, tmp_path / folder)
    before = {split: data.load(samples[:1])[1][0] for split, samples in written.items()}
    assert isinstance(data.read(dataset, tmp_path, "train")[0].mask, dict) == (dataset == "rrsisd")  # the original wins
    for path in [*tmp_path.rglob("*.txt"), *tmp_path.rglob("*.p"), *tmp_path.rglob("mask*")]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    for split, samples in written.items():
        found = data.read(dataset, tmp_path / root, split)
        for key in ("id", "image", "expression", "split", "category", "category_source", "picture"):
            same = [os.path.realpath(getattr(one, key)) if key == "image" else getattr(one, key) for one in found]
            assert same == [os.path.realpath(getattr(one, key)) if key == "image" else getattr(one, key)
                            for one in samples], key
        assert (data.load(found[:1])[1][0] == before[split]).all()
        assert len({one.instance for one in found}) == len(found)
        assert [one.image_id for one in found] == [one.image.name for one in found]
        assert all(one.mask["resize"] == (dataset == "rrsisd") for one in found)
    lines = next(tmp_path.rglob(f"{dataset}_train.jsonl"))
    lines.write_text(lines.read_text().replace('"sent"', '"sentence"', 1) + "{\n")
    with pytest.raises(ValueError, match=rf"{dataset}_train.jsonl:1: not as it should be .KeyError: 'sent'.*; 1 more"):
        data.read(dataset, tmp_path / root, "test")


def test_coco_images_under_the_names_of_2017(tmp_path):
    entries = layouts.write("refcoco", tmp_path, splits={"train": 2})["train"]
    for path in (tmp_path / "images/mscoco/images/train2014").iterdir():
        move(path, tmp_path / "train2017" / path.name.removeprefix("COCO_train2014_"))
    shutil.rmtree(tmp_path / "images")
    samples = data.read("refcoco", tmp_path, "train")
    assert {one.image.name for one in samples} == {"000000000000.jpg", "000000000001.jpg"}
    assert (data.load(samples[:1])[1][0] == entries[0].mask).all()


@pytest.mark.parametrize("form", ["refs(unc).p", "grefs(unc).json"])
@pytest.mark.parametrize("ann_id", [[3], [3, 4], [-1], [], None, -1])
def test_sets_with_no_or_several_targets_are_named(form, ann_id, tmp_path):
    root = refer(tmp_path, [], dataset="refcoco")
    [row] = pickle.loads((root / "refcoco" / "refs(unc).p").read_bytes())
    rows = [row, {**row, "ann_id": ann_id, "no_target": True}]
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(rows))
    (root / "refcoco" / "grefs(unc).json").write_text(json.dumps(rows))
    where = {"refs(unc).p": ("refcoco", root, None), "grefs(unc).json": ("refer", root / "refcoco", form)}[form]
    with pytest.raises(ValueError, match="refcoco/g?refs.unc...*: sentences of no target or of several, as gRefCOCO"):
        data.read(*where[:2], "train", refs=where[2])


def test_not_found_errors_say_where_it_is_downloaded(tmp_path):
    for dataset, place in (("refsegrs", "huggingface.co/datasets/JessicaYuan/RefSegRS"), ("rrsisd", "Lsan2401/RMSIN"),
                           ("risbench", "HIT-SIRS/CroBIM"), ("refcoco", "lichengunc/refer"), ("refcocog-umd", "refer")):
        with pytest.raises(FileNotFoundError, match=f" or its folder .*it is downloaded from .*{place}$"):
            data.read(dataset, tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=f"in the data root {tmp_path}; .*from where its authors keep it$"):
        data.read("refer", tmp_path, "train", refs="a.p")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"\{train,val,test\}.txt in .*/file or its folder .*/file is a file\."):
        data.read("risbench", tmp_path / "file", "train")


def test_every_wrong_entry_is_found_in_one_run(tmp_path, capsys):
    folder = lists(tmp_path / "RISBench", "a.png a ship\nb.png\nno_name a ship\nc.png  \n", split="test")
    lists(folder, "d.png\na.png a ship\n")
    with pytest.raises(ValueError, match=r"train.txt:1: the expression is empty.*; 3 more entries are wrong, python d"):
        data.read("risbench", folder, "train")
    code, out, _ = check(capsys, "--dataset", "risbench", "--data-root", folder)
    assert [line.split("output_phrase_")[1][:11] for line in out.splitlines() if line.startswith("entry ")] == [
        "train.txt:1", "test.txt:2:", "test.txt:3:", "test.txt:4:"]
    assert code == 1 and "0 resized, 4 entry: 4 problems would stop a training" in out
    root = refer(tmp_path / "rrsisd", [layouts.rle(box())])
    rows = pickle.loads((root / "rrsisd" / "refs(unc).p").read_bytes())
    broken = [{**rows[0], "ref_id": 8, "ann_id": 77}, {**rows[0], "ref_id": 9, "sentences": [{"raw": " "}]}, *rows]
    (root / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(broken))
    code, out, _ = check(capsys, "--dataset", "rrsisd", "--data-root", root)
    assert code == 1 and "ref 8, with its" in out and "ref 9, with its" in out and "2 entry: 2 problems" in out


def test_lists_of_another_data_set_are_refused(tmp_path):
    folder = lists(tmp_path / "mine", "train_0_0.png a ship\n")
    with pytest.raises(ValueError, match="'train_0_0.png' is no name of refsegrs"):
        data.read("refsegrs", folder, "train")
    (folder / "output_phrase_train.txt").write_bytes(b"a.png caf\xe9\n")
    with pytest.raises(ValueError, match="byte 9 is not UTF-8"):
        data.read("risbench", folder, "train")


def move(old, new):
    new.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(old, new)


@pytest.mark.parametrize(("dataset", "moves", "root"), [
    ("refsegrs", {}, "RefSegRS"), ("refsegrs", {"RefSegRS": "anything"}, "anything"),
    ("refsegrs", {"RefSegRS/output_phrase_val.txt": "RefSegRS/output_phrase_val3.txt"}, "."),
    ("risbench", {}, "RISBench_dataset"),
    ("rrsisd", {"rrsisd": "refer/data/rrsisd", "images": "refer/data/images"}, "."), ("rrsisd", {}, "rrsisd"),
    ("rrsisd", {"rrsisd": "RRSIS-D/rrsisd", "images": "RRSIS-D/images"}, "."),
    ("rrsisd", {"rrsisd": "RRSIS-D/rrsisd", "images": "RRSIS-D/images"}, "RRSIS-D"),
    ("rrsisd", {"rrsisd": "rrssid"}, "."), ("rrsisd", {"images": "rrsisd/images"}, "."),
    ("rrsisd", {"images/rrsisd/JPEGImages": "rrsisd/JPEGImages"}, "rrsisd"),
    ("rrsisd", {"images/rrsisd/JPEGImages": "rrsisd/JPEGImages", "rrsisd": "flat"}, "flat"),
    ("refcoco", {}, "refcoco"), ("refcoco", {"refcoco": "data/refcoco", "images": "data/images"}, "."),
    ("refcoco", {"images/mscoco/images/train2014": "images/train2014"}, "refcoco"),
    ("refcoco", {"refcoco": "refer/refcoco", "images/mscoco/images/train2014": "train2014"}, "refer")])
def test_folder_variants(dataset, moves, root, tmp_path):
    layouts.write(dataset, tmp_path, splits={"train": 1, "val": 1})
    for old, new in moves.items():
        move(tmp_path / old, tmp_path / new)
    for split in ("train", "val"):
        samples = data.read(dataset, tmp_path / root, split)
        assert data.load(samples[:1])[1][0].any()


@pytest.mark.parametrize(("dataset", "places"), [
    ("rrsisd", ("images/rrsisd/JPEGImages", "JPEGImages", "images/JPEGImages", "images/rrsisd", "images")),
    ("refcoco", (*(f"{place}train{year}" for year in (2014, 2017) for place in (
        "images/mscoco/images/", "images/", "", "images/mscoco/", "mscoco/images/", "coco/")), "images"))])
def test_images_are_taken_from_the_first_usual_place_that_holds_them(dataset, places, tmp_path):
    layouts.write(dataset, tmp_path, splits={"train": 1})
    first = data.read(dataset, tmp_path, "train")[0].image
    files = [*first.parent.iterdir()]
    for path in files:
        move(path, tmp_path / "aside" / path.name)
    for place in reversed(places):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)             # empty ones do not count
    for place in reversed(places):
        for path in files:
            shutil.copy(tmp_path / "aside" / path.name, tmp_path / place)
        data._KNOWN.clear()
        assert {one.image.parent for one in data.read(dataset, tmp_path, "train")} == {tmp_path / place}
    for place in places[1:]:
        (tmp_path / place / first.name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / places[0])
    (tmp_path / places[0]).mkdir()
    data._KNOWN.clear()
    if len(files) > 1:  # one that holds some of the files is the place; what is missing is named
        with pytest.raises(FileNotFoundError, match=f"{places[1]}/{first.name}, of {dataset} train, is missing"):
            data.read(dataset, tmp_path, "train")


def test_images_are_looked_for_beside_the_folder_of_the_pickle_then_in_and_above_it(tmp_path):
    root = refer(tmp_path / "sets", [])
    shutil.rmtree(root / "images")
    for base in (root / "RRSISD", tmp_path, root / "rrsisd", root):
        picture(base / "JPEGImages/00009.jpg")
        assert anew("rrsisd", root).image.parent == base / "JPEGImages"


@pytest.mark.parametrize(("dataset", "names"), [
    ("refsegrs", ("RefSegRS", "refsegrs", "new_dataset2")), ("risbench", ("RISBench_dataset", "RISBench", "risbench")),
    ("rrsisd", ("rrsisd", "RRSIS-D/rrsisd", "RRSIS-D", "RRSISD", "rrssid"))])
def test_the_first_of_the_usual_folders_is_taken(dataset, names, tmp_path):
    places = [f"{parent}{name}" for parent in ("", "refer/data/", "data/") for name in names]
    for place in reversed([*places, ""]):
        lists(tmp_path / place, "1.tif a ship\n")
        assert anew(dataset, tmp_path).image.parent == tmp_path / place / "images"


def test_the_first_of_several_layouts_and_names_is_taken(tmp_path):
    folder = lists(tmp_path / "rrsisd", "00009.jpg a car\n")
    names = {"image": ("images", "img_rgb", "images2"), "mask": ("masks", "mask", "masks2")}
    for kind, of_kind in names.items():
        move(folder / of_kind[0], tmp_path / kind)
        shutil.copytree(tmp_path / kind, folder / of_kind[-1])
    for kind, of_kind in names.items():
        for name in reversed(of_kind):
            shutil.copytree(tmp_path / kind, folder / name, dirs_exist_ok=True)
            assert getattr(anew("rrsisd", folder), kind).parent == folder / name
    (folder / "output_phrase_train.txt").unlink()
    (folder / "phrase_txts").mkdir()
    for name in ("phrase_txts/output_phrase_train3.txt", "output_phrase_train3.txt",
                 "phrase_txts/output_phrase_train.txt", "output_phrase_train.txt"):
        (folder / name).write_text(f"00009.jpg {name}\n")
        assert anew("rrsisd", folder).expression == name
    refer(tmp_path, [])  # the authors' own layout beside it
    assert anew("rrsisd", tmp_path).expression == "The ship"
    (folder / "refs(unc).p").unlink()
    row = {"file_name": "00009.jpg", "segmentation": layouts.rle(box())}
    for place in ("", "annotations", "datainfo"):  # the last reader
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "rrsisd_train.jsonl").write_text(json.dumps({**row, "sent": f"of {place}"}))
    assert anew("rrsisd", folder).expression == "output_phrase_train.txt"
    for wanted in ("of datainfo", "of annotations", "of"):
        for path in folder.glob("**/output_phrase*"):
            path.unlink()
        assert anew("rrsisd", folder).expression == wanted
        (Path(*folder.parts, wanted[3:]) / "rrsisd_train.jsonl").unlink()


@pytest.mark.parametrize("absent", ["images", "masks", "output_phrase_train.txt"])
def test_a_folder_that_lacks_a_part_is_none(absent, tmp_path):
    folder = lists(tmp_path / "RISBench", "a.png a ship\n")
    move(folder / absent, tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=r"risbench: no \{images\|img_rgb\}/, \{masks\|mask\}/ and output_phr"):
        data.read("risbench", tmp_path, "train")


def test_wrong_data_root_says_what_was_looked_for_and_found(tmp_path):
    for dataset, looked_for in (("rrsisd", r"no refs\(unc\).p with instances.json"),
                                ("refsegrs", r"output_phrase_\{train,val")):
        with pytest.raises(FileNotFoundError, match=looked_for + r".*nowhere is not there.*--data-root"):
            data.read(dataset, tmp_path / "nowhere", "train")
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / "some" / "thing.zip").touch()
        with pytest.raises(FileNotFoundError, match=looked_for + r".*some holds thing.zip") as error:
            data.read(dataset, tmp_path / "some", "train")
        assert "\n" not in str(error.value)
    layouts.write("rrsisd", tmp_path, splits={"train": 1})
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match=r"no images; looked for images/rrsisd/JPEGImages .*instances.json"):
        data.read("rrsisd", tmp_path, "train")


def test_at_most_twelve_names_of_a_folder_are_shown(tmp_path):
    for count, shown in ((12, "f00, .*, f10, f11. Give"), (13, "f00, .*, f10, f11, .... Give")):
        (tmp_path / f"f{count - 1:02d}").touch()
        for number in range(count):
            (tmp_path / f"f{number:02d}").touch()
        with pytest.raises(FileNotFoundError, match=f"holds {shown}"):
            data.read("rrsisd", tmp_path, "train")


def test_a_folder_of_another_set_is_not_taken_for_the_one_asked_for(tmp_path):
    layouts.write("refcoco", tmp_path, splits={"train": 1})
    with pytest.raises(FileNotFoundError, match=r"refcoco\+: no refs"):
        data.read("refcoco+", tmp_path / "refcoco", "train")


def test_missing_image_is_found_before_training(tmp_path):
    layouts.write("rrsisd", tmp_path, splits={"train": 1, "val": 1})
    first, last = (data.read("rrsisd", tmp_path, "train")[place].image for place in (0, -1))
    last.unlink()
    with pytest.raises(FileNotFoundError, match=f"{last.name}, of rrsisd train, is missing.*data.py --dataset rrsisd"):
        data.read("rrsisd", tmp_path, "train")
    assert data.read("rrsisd", tmp_path, "val")
    for path in [*first.parent.iterdir()]:
        move(path, tmp_path / "elsewhere" / path.name)
    with pytest.raises(FileNotFoundError, match="images/rrsisd/JPEGImages/00401.jpg, of rrsisd train, is missing"):
        data.read("rrsisd", tmp_path, "train")
    for path in [*(tmp_path / "elsewhere").iterdir()]:
        path.rename(first.parent / path.name)
    assert [s.image for s in data.read("rrsisd", tmp_path, "train", limit=1)] == [first]


def test_samples_cannot_be_changed_in_place():
    with pytest.raises(AttributeError, match="expression"):
        sample().expression = "another"
    assert data.replace(sample(image="x"), expression="y").picture == "x" and sample().kind is None
    with pytest.raises(AttributeError, match="source"):
        data.DATASETS["custom"].source = "another"


def test_limit_and_empty_selection(tmp_path):
    layouts.write("refcoco", tmp_path, splits={"train": 1})
    assert [s.id for s in data.read("refcoco", tmp_path, "train", limit=5)] == [
        s.id for s in data.read("refcoco", tmp_path, "train")][:5]
    refer(tmp_path / "other", [], dataset="refcoco")
    with pytest.raises(ValueError, match="has no sample .seen categories"):
        data.read("refcoco", tmp_path / "other", "train", categories="seen")


@pytest.mark.parametrize(("dataset", "name", "old", "new"), [
    ("rrsisd", "rrsisd/refs(unc).p", b"The ship", b"The boat"), ("rrsisd", "rrsisd/instances.json", b"ship", b"boat"),
    ("risbench", "RISBench/output_phrase_train.txt", b"ship", b"boat"), ("custom", "data.jsonl", b"ship", b"boat")])
def test_changed_files_are_read_anew(dataset, name, old, new, tmp_path):
    picture(tmp_path / "m.png")
    {"rrsisd": lambda: refer(tmp_path, []), "risbench": lambda: lists(tmp_path / "RISBench", "a.png The ship\n"),
     "custom": lambda: custom(tmp_path, {"image": "a.png", "mask": "m.png", "expression": "The ship"})}[dataset]()
    before, content = only(dataset, tmp_path), (tmp_path / name).read_bytes()
    assert only(dataset, tmp_path) is before                              # as long as nothing changes
    (tmp_path / name).write_bytes(content.replace(old, new))              # in place: its folder does not change
    os.utime(tmp_path / name, ns=(1, 1))
    after = only(dataset, tmp_path)
    assert "boat" in (after.expression if name != "rrsisd/instances.json" else after.category).lower()
    shutil.rmtree((tmp_path / name).parent)
    with pytest.raises(FileNotFoundError, match=f"{dataset}: .*data-root"):
        data.read(dataset, tmp_path, "train")


def test_a_list_that_comes_later_is_found(tmp_path):
    folder = lists(tmp_path / "RISBench", "a.png a ship\n")
    assert not data.has_split("risbench", tmp_path, "val")
    (folder / "output_phrase_val.txt").write_text("a.png a ship\n")
    os.utime(folder, ns=(1, 1))                                           # clocks of file systems are coarse
    assert data.has_split("risbench", tmp_path, "val")


# ---------------------------------------------------------------------------------------------------------------------
# Pickles and REFER


def test_expression_keeps_case_and_falls_back(tmp_path):
    for number, (sentence, expression) in enumerate([
            ({"raw": " The  SHIP\n"}, "The SHIP"), ({"raw": "", "sent": "the boat"}, "the boat"),
            ({"raw": "", "sent": None}, "the ship")]):
        assert only("rrsisd", refer(tmp_path / str(number), [], sentence=sentence)).expression == expression
    with pytest.raises(ValueError, match="ref 7.*the expression is empty"):
        data.read("rrsisd", refer(tmp_path / "e", [], sentence={"raw": " ", "sent": "", "tokens": []}), "train")


@pytest.mark.parametrize(("of_ref", "of_annotation", "category"), [
    (13, {"categories_id": 99}, "ship"), (None, {"categories_id": 13}, "ship"), (None, {"category_id": 13}, "ship"),
    (None, {"category_id": 13, "categories_id": 99}, "ship"), (14, {"categories_id": 13}, None)])
def test_category_under_either_key(of_ref, of_annotation, category, tmp_path):
    root = refer(tmp_path, [], annotation={"categories_id": 99, **of_annotation}, ref={"category_id": of_ref})
    rows = pickle.loads((root / "rrsisd" / "refs(unc).p").read_bytes())
    if of_ref is None:
        del rows[0]["category_id"]
        (root / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(rows))
    found = only("rrsisd", root)
    assert (found.category, found.category_source) == (category, category and "file")


def test_file_name_of_the_ref_is_not_the_image(tmp_path):
    found = only("refcoco", refer(tmp_path, [], dataset="refcoco"))  # its ref names x.jpg
    assert found.image.name == "00009.jpg" and found.id == "7_5" and found.image_id == "9"
    path = tmp_path / "refcoco" / "instances.json"
    path.write_text(path.read_text().replace("00009.jpg", "./00009.jpg").replace('"id": 3', '"id": "3"'))
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([{
        "ref_id": 7, "ann_id": "3", "image_id": 9, "split": "train", "sentences": [{"sent_id": 5, "raw": "x"}]}]))
    found = only("refcoco", tmp_path)  # object numbers as strings, the file's name in other words
    assert (found.picture, found.instance, found.expression) == ("00009.jpg", "9/3", "x")


def latin_pickle(text):
    """[{...}] as Python 2 writes it: strings as bytes of an encoding of its own (opcode U = SHORT_BINSTRING)."""
    def string(value):
        return b"U" + bytes([len(value)]) + value

    def pairs(entries):
        return b"}(" + b"".join(string(key) + value for key, value in entries) + b"u"

    sentence = pairs([(b"raw", string(text)), (b"sent_id", b"K\x05")])
    return b"\x80\x02](" + pairs([
        (b"ref_id", b"K\x07"), (b"ann_id", b"K\x03"), (b"image_id", b"K\x09"), (b"category_id", b"K\x0d"),
        (b"split", string(b"train")), (b"sentences", b"](" + sentence + b"e")]) + b"e."


@pytest.mark.parametrize("text", ["a ship at the café".encode("latin-1"), "a ship at the café".encode()])
def test_pickles_of_python_2(text, tmp_path):
    root = refer(tmp_path, [])
    (root / "rrsisd" / "refs(unc).p").write_bytes(latin_pickle(text))
    assert only("rrsisd", root).expression == "a ship at the café"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("protocol", range(5))
def test_pickle_that_would_run_code_is_refused(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = refer(tmp_path, [], ref={"split": Evil()}, protocol=protocol)
    with pytest.raises(ValueError, match=r"refs\(unc\).p: refused or damaged .it asks for \w+.mkdir"):
        data.read("rrsisd", root, "train")
    assert not (tmp_path / "harm").exists()


def test_pickle_of_other_classes_or_cut_is_refused(tmp_path):
    root = refer(tmp_path, [])
    path = root / "rrsisd" / "refs(unc).p"
    whole = path.read_bytes()
    for content, reason in ((pickle.dumps(np.zeros(1)), "numpy"), (pickle.dumps(Path()), "pathlib"),
                            (whole[:len(whole) // 2], "refused or damaged"), (b"", "refused or damaged")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"refs\(unc\).p: .*{reason}"):
            data.read("rrsisd", root, "train")


def test_damaged_refer_tables(tmp_path):
    with pytest.raises(ValueError, match="ref 7, with its annotation.*KeyError: 'segmentation'"):
        root = refer(tmp_path / "a", [])
        path = root / "rrsisd" / "instances.json"
        path.write_text(path.read_text().replace('"segmentation"', '"segmentations"'))
        data.read("rrsisd", root, "train")
    with pytest.raises(ValueError, match="instances.json: not as REFER has it .JSONDecodeError"):
        root = refer(tmp_path / "b", [])
        (root / "rrsisd" / "instances.json").write_text('{"images": [')
        data.read("rrsisd", root, "train")
    with pytest.raises(ValueError, match="KeyError: 77"):
        data.read("rrsisd", refer(tmp_path / "c", [], ref={"ann_id": 77}), "train")
    (tmp_path / "c" / "rrsisd" / "refs.json").write_text("[")
    with pytest.raises(ValueError, match="refs.json: not as REFER has it .JSONDecodeError"):
        data.read("refer", tmp_path / "c" / "rrsisd", "train", refs="refs.json")


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def runs_by_hand(mask):
    """Uncompressed column-major runs, background first, counted pixel by pixel."""
    counts, value = [0], False
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            if mask[y, x] != value:
                counts.append(0)
                value = not value
            counts[-1] += 1
    return counts


@pytest.mark.parametrize("form", ["list of one dict", "dict", "uncompressed dict"])
def test_rle_is_column_major(form, tmp_path):
    mask = box()
    code = {"uncompressed dict": {"size": [6, 8], "counts": runs_by_hand(mask)}}.get(form, layouts.rle(mask))
    root = refer(tmp_path, [code] if form == "list of one dict" else code)
    found = data.load([only("rrsisd", root)])[1][0]
    assert found.shape == (6, 8) and found.dtype == bool and (found == mask).all()


def test_run_lengths_equal_pycocotools():
    rng = np.random.default_rng(1)
    for height, width, share in ((6, 8, 0.5), (37, 300, 0.001), (10, 900, 0.9), (5, 5, 1.0), (300, 20, 0.02)):
        mask = rng.random((height, width)) < share
        code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        for counts in (code["counts"], code["counts"].decode(), runs_by_hand(mask)):
            assert (data._mask_from_parts([{"size": [height, width], "counts": counts}], (height, width)) == mask).all()


@pytest.mark.parametrize("segmentation", [
    [], {}, [{"size": [6, 8], "counts": ""}], [{"size": [6, 8], "counts": [48]}], layouts.rle(np.zeros((6, 8)))])
def test_empty_segmentation_is_an_empty_mask(segmentation, tmp_path):
    if segmentation == {}:
        segmentation = {"size": [6, 8], "counts": []}
    mask = data.load([only("rrsisd", refer(tmp_path, segmentation))])[1][0]
    assert mask.shape == (6, 8) and not mask.any()


@pytest.mark.parametrize("counts", [layouts.rle(box())["counts"][:-3], [3, 4], [50, -2], [40, 50]])
def test_damaged_rle_is_an_error(counts, tmp_path):
    found = only("rrsisd", refer(tmp_path, {"size": [6, 8], "counts": counts}))
    with pytest.raises(ValueError, match="00009.jpg, sample 00009: damaged segmentation"):
        data.load([found])


def test_overlapping_polygon_parts_are_a_union(tmp_path):
    parts = [[1, 1, 6, 1, 6, 4, 1, 4], [4, 2, 8, 2, 8, 6, 4, 6], [0, 0, 3, 3]]  # the last has two corners: nothing
    mask = data.load([only("refcoco", refer(tmp_path, parts, dataset="refcoco"))])[1][0]
    expected = np.zeros((6, 8), bool)
    expected[1:4, 1:6] = expected[2:6, 4:8] = True
    assert (mask == expected).all()
    # Alone or in front, pycocotools would take two corners for a box; three are a triangle, half of one here.
    assert not data.load([only("refcoco", refer(tmp_path / "two", [[1, 1, 3, 3]], dataset="refcoco"))])[1][0].any()
    three = refer(tmp_path / "three", [[0, 0, 6, 0, 0, 6]], dataset="refcoco")
    assert data.load([only("refcoco", three)])[1][0].sum() == pytest.approx(18, abs=3)


def test_parts_of_both_kinds_are_a_union(tmp_path):
    one, two = np.zeros((6, 8), bool), np.zeros((6, 8), bool)
    one[0:3, 0:3] = two[2:5, 2:5] = True
    root = refer(tmp_path, [layouts.rle(one), layouts.rle(two), [4, 4, 6, 4, 6, 6, 4, 6]])
    mask = data.load([only("rrsisd", root)])[1][0]
    both = one | two
    both[4:6, 4:6] = True
    assert (mask == both).all()


def test_polygons_without_pycocotools(tmp_path, monkeypatch):
    polygon = only("refcoco", refer(tmp_path, [[1, 1, 6, 1, 6, 4, 1, 4]], dataset="refcoco"))
    lengths = only("rrsisd", refer(tmp_path / "rle", [layouts.rle(box())]))
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pycocotools"):
        data.load([polygon])
    assert data.load([lengths])[1][0].any()


@pytest.mark.parametrize("array", [
    box().astype(np.uint8), box().astype(np.uint8) * 255, np.repeat(box().astype(np.uint8)[..., None], 3, 2),
    np.repeat(box().astype(np.uint8)[..., None] * 255, 3, 2), box(),
    np.stack([box() * 0, box() * 0, box() * 255], 2).astype(np.uint8),
    box().astype(np.uint16) * 255, box().astype(np.uint16) * 65535,
    np.concatenate([np.repeat(box()[..., None] * 255, 3, 2), np.full((6, 8, 1), 255)], 2).astype(np.uint8),
    np.stack([box() * 0, box() * 0, box() * 1], 2).astype(np.uint8)],
    ids=["0/1", "0/255", "3 bands 0/1", "3 bands 0/255", "1 bit", "blue", "255 in 16 bit", "16 bit", "alpha", "blue 1"])
def test_mask_files(array, tmp_path):
    folder = lists(tmp_path / "RISBench", "a.png a ship\n", mask=array)
    assert (data.load([only("risbench", folder)])[1][0] == box()).all()


def is_read_as(path, expected, right=True, message="a coloured mask; one in gray or in one colour on black is read"):
    """Whether a mask file is read as `expected`, or refused where it is not `right`."""
    if right:
        assert (data._mask_from_file(path) == expected).all()
    else:
        with pytest.raises(ValueError, match=f"{path.name}: {message}"):
            data._mask_from_file(path)


def test_mask_files_with_palette_for_printing_and_empty(tmp_path):
    for palette in ([0, 0, 0, 128, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 255, 255, 255]):
        image = Image.fromarray(box().astype(np.uint8)).convert("P")
        image.putpalette(palette)
        image.save(tmp_path / "mask.png")
        is_read_as(tmp_path / "mask.png", box())
    Image.fromarray(np.repeat(box()[..., None] * np.uint8(255), 3, 2)).convert("CMYK").save(tmp_path / "mask.tif")
    is_read_as(tmp_path / "mask.tif", box())
    Image.new("L", (8, 6)).save(tmp_path / "empty.png")
    is_read_as(tmp_path / "empty.png", np.zeros((6, 8), bool))


@pytest.mark.parametrize(("name", "options"), [
    ("m.jpg", {"quality": 100}), ("m.mpo", {"quality": 100}), ("m.webp", {"lossless": True}),
    ("m.jp2", {"irreversible": False}), ("m.tif", {"compression": "jpeg", "quality": 100})])
def test_few_values_of_a_lossy_file_may_be_off(name, options, tmp_path):
    """0 and 254 alone: in a lossless file they are two classes."""
    array = np.kron([[0, 254], [254, 254]], np.ones((32, 32))).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / name, **options)
    values = np.asarray(Image.open(tmp_path / name).convert("L"))
    assert 253 <= values.max() < 255 and len(np.unique(values)) <= 8
    is_read_as(tmp_path / name, array > 0)
    Image.fromarray(array).save(tmp_path / "m.png")
    is_read_as(tmp_path / "m.png", None, False, "a mask holds .* this one 0, 254;")


def blob(side=64):
    """A disc and a thin bar, (side, side) bool."""
    y, x = np.mgrid[:side, :side]
    disc = (x - side / 3) ** 2 + (y - side / 3) ** 2 < (side / 5) ** 2
    return disc | ((abs(y - side * 0.8) < 2) & (x > 8) & (x < side - 8))


def coloured(mask, inside, outside=(0, 0, 0)):
    return np.where(mask[..., None], inside, outside).astype(np.uint8)


def labels(number):
    """Areas of 0 to number, each more than 3 pixels wide and high."""
    return np.kron(np.arange(64) % (number + 1), np.ones((5, 5))).astype(np.uint16).reshape(5, -1).repeat(3, 0)


@pytest.mark.parametrize(("array", "found"), [
    ((blob() + 254 * (blob() & ~np.roll(blob(), 1, 1))).astype(np.uint8), "0, 1, 255"),     # two classes, a void edge
    (np.where(blob(), 210, 10).astype(np.uint8), "10, 210"), (np.where(blob(), 128, 0).astype(np.uint8), "0, 128"),
    *((blob().astype(np.uint16) * value, f"0, {value}") for value in (2, 7, 256)),
    (labels(7).astype(np.uint8), "0, 1, 2, 3, 4, 5, 6, 7"),
    (labels(4).astype(np.uint8), "0, 1, 2, 3, 4"), (labels(60).astype(np.uint8), "0, 1, 2, 3, 4, 5, 6, 7, ..."),
    ((labels(60) * 4).astype(np.uint8), "0, 4, 8, 12, 16, 20, 24, 28, ..."),
    (labels(300), "0, 1, 2, 3, 4, 5, 6, 7, ..."),
    (labels(3) * 1000, "0, 1000, 2000, 3000"), (labels(63) * 1000, "0, 1000, 2000, 3000, 4000, 5000, 6000, 7000, ...")])
def test_masks_of_other_values_are_refused_by_their_values(array, found, tmp_path):
    Image.fromarray(array).save(tmp_path / "m.png")
    is_read_as(tmp_path / "m.png", None, False,
               f"a mask holds 0 and 1 or 0 and 255, this one {found}; of a map .* mask_value takes one")


@pytest.mark.parametrize("array", [
    coloured(blob(), (253, 231, 36), (68, 1, 84)), coloured(blob(), (103, 0, 13), (255, 245, 240)),
    coloured(blob(), (0, 255, 0)) + coloured(np.roll(blob(), 20, 1) & ~blob(), (255, 0, 0)),
    coloured(blob(), (255, 255, 255), (0, 0, 255))], ids=["viridis", "Reds", "two colours", "white on blue"])
@pytest.mark.parametrize("form", ["m.png", "m.jpg", "rgba.png", "palette.png"])
def test_coloured_masks_are_refused(array, form, tmp_path):
    image = Image.fromarray(array)
    image = {"rgba.png": image.convert("RGBA"), "palette.png": image.quantize(8)}.get(form, image)
    image.save(tmp_path / form)
    is_read_as(tmp_path / form, None, False)


@pytest.mark.parametrize("colour", [(255, 0, 0), (128, 0, 0), (0, 90, 200), (250, 240, 10)])
@pytest.mark.parametrize("form", ["m.png", "m.jpg", "palette.png"])
def test_one_colour_on_black_is_a_mask(colour, form, tmp_path):
    image = Image.fromarray(coloured(blob(), colour))
    (image.quantize(8) if form == "palette.png" else image).save(tmp_path / form, quality=95, subsampling=0)
    assert (data._mask_from_file(tmp_path / form) != blob()).mean() < 0.02 * form.endswith("jpg") + 1e-9


@pytest.mark.parametrize("quality", [60, 75, 90])
def test_noise_of_jpeg_and_smooth_edges_are_no_other_values(quality, tmp_path):
    Image.fromarray(blob().astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=quality)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "m.jpg")))) > 8
    assert (data._mask_from_file(tmp_path / "m.jpg") != blob()).mean() < 0.03
    large = Image.fromarray(blob(256).astype(np.uint8) * 255)
    large.resize((64, 64), Image.Resampling.LANCZOS).save(tmp_path / "m.png")
    edge = np.asarray(Image.open(tmp_path / "m.png"))
    assert len(np.unique(edge)) > 8 and (data._mask_from_file(tmp_path / "m.png") == (edge > 50)).all()


def scattered(values, square=None, lines=()):
    """A mask of 0 and 255 with single pixels of other values, perhaps a 3x3 square of one and lines 2 pixels wide."""
    array = blob().astype(np.uint8) * 255
    array[60, 2:2 + 2 * len(values):2] = values
    if square is not None:
        array[50:53, 40:43] = square
    for row, value in enumerate(lines):
        array[2 + 4 * row:4 + 4 * row, 34:60] = value
    return array


@pytest.mark.parametrize(("array", "right"), [
    (scattered(range(1, 8)), True), (scattered(range(1, 7)), False),                  # nine and eight values
    (scattered(range(1, 9), 8), True), (scattered(range(1, 9), 9), False),            # noise about 0 ends at 8,
    (scattered(range(1, 9), 247), True), (scattered(range(1, 9), 246), False),        # about 255 it begins at 247
    (scattered(range(1, 9), None, (100, 128, 200)), True),                            # edges are not 3 pixels wide
    (scattered([*range(1, 9), 50, 51]), True),
    (np.where(blob(), 0, scattered(range(42, 51))), False), (np.where(blob(), 0, scattered(range(43, 52))), True)])
def test_the_edges_of_what_is_read_as_a_mask(array, right, tmp_path):
    for stored in (array, array.astype(np.uint16) * 257):                             # 255 becomes 65535
        Image.fromarray(stored).save(tmp_path / "m.png")
        is_read_as(tmp_path / "m.png", array > 50, right, "a mask holds 0 and 1 or 0 and 255")


@pytest.mark.parametrize(("off", "right"), [(2, True), (3, False)])
def test_how_far_one_colour_may_be_from_another(off, right, tmp_path):
    array = coloured(blob(), (200, 100, 0))
    array[0, 0] = 200, 100, off
    Image.fromarray(array).save(tmp_path / "m.png")
    is_read_as(tmp_path / "m.png", array[..., 0] > 0, right)
    array[20:23, 20:23] = 200, 100, 46 + off            # 48 and 49 of nine pixels, where a file has many colours
    array[0, 10:28:2] = [(200, 100, k) for k in range(9)]
    Image.fromarray(array).save(tmp_path / "many.png")
    is_read_as(tmp_path / "many.png", array[..., 0] > 0, right)


@pytest.mark.parametrize(("colours", "right"), [(8, False), (9, True)])
def test_how_many_colours_are_many(colours, right, tmp_path):
    """Black, the mask's, one that is 3 off, and others within 2: up to eight they are all looked at."""
    array = coloured(blob(), (200, 100, 0))
    near = [(200, 99 + k // 3, k % 3) for k in (0, 1, 2, 4, 5, 6)]
    array[0, :2 * colours - 4:2] = [(200, 100, 3), *near[:colours - 3]]
    assert len(np.unique(array.reshape(-1, 3), axis=0)) == colours
    Image.fromarray(array).save(tmp_path / "m.png")
    is_read_as(tmp_path / "m.png", array[..., 0] > 0, right)


@pytest.mark.parametrize("darker", [(100, 52, 0), (80, 42, 0)])
def test_the_colour_is_that_of_the_pixels_brighter_than_half(darker, tmp_path):
    """Many dark pixels, 2 off each: with them in the mean, the one bright pixel would be more than 2 off."""
    array = np.zeros((8, 8, 3), np.uint8)
    array[2:5, 2:7], array[6, 6] = darker, (200, 100, 0)
    Image.fromarray(array).save(tmp_path / "m.png")
    is_read_as(tmp_path / "m.png", None, False, "a mask holds .* this one 0, ")  # one of two values, not of two colours


@pytest.mark.parametrize("colour", [0, 255, 90])
def test_a_mask_in_the_alpha_band_is_named(colour, tmp_path):
    alpha = Image.fromarray(blob().astype(np.uint8) * 255)
    plain = Image.new("L", alpha.size, colour)
    Image.merge("RGBA", [plain, plain, plain, alpha]).save(tmp_path / "rgba.png")
    Image.merge("LA", [plain, alpha]).save(tmp_path / "la.png")
    image = Image.fromarray(blob().astype(np.uint8)).convert("P")
    image.putpalette([colour] * 6)
    image.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba", "la", "palette"):
        is_read_as(tmp_path / f"{name}.png", None, False, "the mask is in its alpha band")
    for opacity in (*(Image.new("L", alpha.size, level) for level in (255, 100, 0)), alpha):
        Image.merge("LA", [alpha, opacity]).save(tmp_path / "both.png")
        is_read_as(tmp_path / "both.png", blob())


def custom(folder, *rows, form="jsonl"):
    """A custom set of given rows beside a.png of 64 x 64."""
    picture(folder / "a.png", (64, 64))
    text = "\n".join(map(json.dumps, rows)) if form == "jsonl" else "\n".join(rows)
    (folder / f"data.{form}").write_text(text + "\n", encoding="utf-8")
    return folder


def test_mask_value_takes_one_object_of_a_map(tmp_path):
    stored = labels(3)[:15, :64].repeat(5, 0)[:64]
    Image.fromarray(stored.astype(np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray((stored * 700).astype(np.uint16)).save(tmp_path / "deep.png")
    palette = Image.fromarray(stored.astype(np.uint8)).convert("P")
    palette.putpalette([9, 9, 9, 200, 0, 0, 7, 7, 7, 0, 90, 0])
    palette.save(tmp_path / "palette.png")
    rows = [{"image": "a.png", "mask": f"{name}.png", "expression": "x", "mask_value": value}
            for name, value in (("gray", 2), ("deep", 1400), ("palette", 2), ("gray", "2"), ("gray", 0), ("gray", 1))]
    samples = data.read("custom", custom(tmp_path, *rows), "train")
    masks = data.load(samples)[1]
    assert all((mask == (stored == 2)).all() for mask in masks[:4]) and (masks[4] == (stored == 0)).all()
    assert len({one.instance for one in samples}) == 5 and len({one.id for one in samples}) == 6
    Image.new("LA", (64, 64)).save(tmp_path / "la.png")
    picture(tmp_path / "rgb.png", (64, 64))
    for name, bands in (("rgb.png", 3), ("la.png", 2)):
        with pytest.raises(ValueError, match=f"{name}: mask_value needs one band, the file has {bands}"):
            data.load(data.read("custom", custom(tmp_path, {**rows[0], "mask": name}), "train"))
    with pytest.raises(ValueError, match="entry 1: mask_value 'two' is not the number of an object"):
        data.read("custom", custom(tmp_path, {**rows[0], "mask_value": "two"}), "train")
    with pytest.raises(ValueError, match="entry 1: mask_value '2' is not the number of an object in a mask file"):
        data.read("custom", custom(tmp_path, {**rows[0], "mask": layouts.rle(blob())}), "train")
    for name in ("none.png", "no/folder.png"):
        with pytest.raises(FileNotFoundError, match=f"{name}, of custom train, is missing"):
            data.read("custom", custom(tmp_path, {**rows[0], "mask": name}), "train")
    written = "image,mask,expression,mask_value\na.png,gray.png,x,2\na.png,b.png,y,"
    Image.fromarray(blob()).save(tmp_path / "b.png")
    (tmp_path / "data.jsonl").unlink()
    samples = data.read("custom", custom(tmp_path, written, form="csv"), "train")
    assert (data.load(samples)[1][0] == (stored == 2)).all() and (data.load(samples)[1][1] == blob()).all()


def test_custom_masks_as_run_lengths_and_polygons(tmp_path):
    masks = [layouts.rle(blob()), [layouts.rle(blob())], {"size": [64, 64], "counts": runs_by_hand(blob())},
             [[float(x) for x in part] for part in layouts.polygons(blob())]]
    rows = [{"image": "a.png", "mask": mask, "expression": "x"} for mask in masks]
    samples = data.read("custom", custom(tmp_path, *rows), "train")
    assert all((mask == blob()).all() for mask in data.load(samples)[1])
    assert len({one.id for one in samples}) == 4 and len({one.instance for one in samples}) == 4
    assert (data.read_mask(samples[0], None) == blob()).all()                       # whatever the size of the image
    small = data.read("custom", custom(tmp_path, {**rows[0], "mask": layouts.rle(blob(32))}), "train")
    with pytest.raises(ValueError, match=r"a.png, sample a: the image is 64x64 .height x width., its mask 32x32"):
        data.load(small)
    for wrong in ({"size": [64, 64]}, [[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5, 6], [[1, 2, 3, "4", 5, 6]], 7,
                  [*layouts.polygons(blob()), [1, 2, 3]]):
        with pytest.raises(ValueError, match="entry 1: a mask is a file name, an RLE of size and counts or a list of"):
            data.read("custom", custom(tmp_path, {**rows[0], "mask": wrong}), "train")


@pytest.mark.parametrize("mask, said", [
    ([[200, 160, 600, 160, 600, 400, 200, 400]], "a polygon of 160 to 600 in an image of 64x64; is it of another size"),
    ([[0.2, 0.25, 0.6, 0.25, 0.6, 0.6]], "a polygon of 0.2 to 0.6 .* or in shares of the sides"),
    ([[-9, 1, 6, 1, 6, 4]], "a polygon of -9 to 6"), ([[math.nan, 1, 6, 1, 6, 4]], "a polygon of nan"),
    ([[math.inf, 1, 6, 1, 6, 4]], "a polygon of 1 to inf"), ([[1, 1, 6, 1, 6, 1e9]], r"a polygon of 1 to 1e\+09"),
    ({"size": [64, 64], "counts": [10 ** 11, 1]}, "runs of 100000000001 pixels"),
    ({"size": [64, 64], "counts": [10 ** 20]}, "too large"), ({"size": [64, 64], "counts": [-1, 4097]}, "runs of 4096"),
    ({"size": [64, 64], "counts": [100.7, 3996]}, "the runs of an RLE are whole numbers"),
    ([{"size": [64, 64], "counts": [4095, 1]}, {"size": [32, 128], "counts": [4095, 1]}], r"size .32, 128., in a mask"),
])
def test_parts_of_a_mask_that_lie_elsewhere_are_refused(mask, said, tmp_path):
    folder = custom(tmp_path, {"image": "a.png", "mask": mask, "expression": "x"})
    with pytest.raises(ValueError, match=f"a.png, sample a: damaged segmentation .*{said}"):
        data.load(data.read("custom", folder, "train"))


def test_a_polygon_may_lie_a_little_outside(tmp_path):
    folder = custom(tmp_path, {"image": "a.png", "mask": [[-2, -2, 66.5, -2, 66.5, 66, -2, 66]], "expression": "x"})
    assert data.load(data.read("custom", folder, "train"))[1][0].all()


@pytest.mark.parametrize("mask", [[[20, 16], [60, 16], [60, 40]], [[20, 16, 40, 24]], [[]]])
def test_points_and_boxes_are_no_polygons(mask, tmp_path):
    with pytest.raises(ValueError, match="entry 1: a mask is a file name, .* each a flat list of three points or more"):
        data.read("custom", custom(tmp_path, {"image": "a.png", "mask": mask, "expression": "x"}), "train")


@pytest.mark.parametrize("stored", [[[1, 1, 6, 1, 6, 4, 1]], [[[1, 1], [6, 1], [6, 4]]], "abc"])
def test_odd_parts_of_refer_are_refused(stored, tmp_path):
    with pytest.raises(ValueError, match="damaged segmentation"):
        data.load([only("refcoco", refer(tmp_path, stored, dataset="refcoco"))])


def test_polygons_of_a_turned_image_are_refused(tmp_path):
    folder = custom(tmp_path, {"image": "a.png", "mask": [[1, 1, 6, 1, 6, 4]], "expression": "x"})
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(folder / "a.png") as image:
        image.save(folder / "a.png", exif=exif)
    with pytest.raises(ValueError, match="polygons of an image with an orientation tag"):
        data.load(data.read("custom", folder, "train"))


def test_mask_value_that_the_map_does_not_hold(tmp_path):
    stored = np.zeros((64, 64), np.uint8)
    stored[20:30, 10:40] = 160
    Image.fromarray(stored).save(tmp_path / "m.png")
    Image.fromarray(stored).save(tmp_path / "m.jpg")
    row = {"image": "a.png", "mask": "m.png", "expression": "x", "mask_value": 9}
    for changes, said in (({}, "mask_value 9 is not in it; it holds 0, 160"),
                          ({"mask": "m.jpg", "mask_value": 160}, "its compression changes values")):
        with pytest.raises(ValueError, match=said):
            data.load(data.read("custom", custom(tmp_path, row | changes), "train"))


@pytest.mark.parametrize("depth", [2, 4])
def test_png_of_few_bits_holds_what_it_was_given(depth, tmp_path):
    """PIL stretches it to 8 bits, and writes none: one row of pixels, no filter, by hand."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    values = [0, 1, 1, 2 if depth == 2 else 9]
    packed = sum(value << (4 * depth - depth * (k + 1)) for k, value in enumerate(values))
    rows = b"\0" + packed.to_bytes(4 * depth // 8, "big")
    head = struct.pack(">IIBBBBB", 4, 1, depth, 0, 0, 0, 0)
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows))
                                     + chunk(b"IEND", b""))
    assert data._mask_from_file(tmp_path / "m.png", 1).tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match=f"this one 0, 1, {values[-1]};"):
        data._mask_from_file(tmp_path / "m.png")


def test_pages_of_a_file_are_counted_but_not_its_overviews(tmp_path):
    pages = [Image.fromarray(box()), Image.fromarray(~box())]
    for name in ("m.tif", "m.png", "m.gif"):
        pages[0].convert("L").save(tmp_path / name, save_all=True, append_images=[pages[1].convert("L")])
        with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: 2 pages, of which one would be read; save each "):
            data._mask_from_file(tmp_path / name)
    smaller = pages[1].convert("L").resize((4, 3))
    smaller.encoderinfo = {"tiffinfo": {254: 1}}                            # as GDAL writes an overview
    pages[0].convert("L").save(tmp_path / "cog.tif", save_all=True, append_images=[smaller])
    assert (data._mask_from_file(tmp_path / "cog.tif") == box()).all()


def test_fourth_band_of_a_tiff_divides_no_other(tmp_path):
    bands = np.full((6, 8, 4), 100, np.uint8)
    bands[:, :4, 3] = 0
    Image.fromarray(bands, "RGBA").save(tmp_path / "a.tif", tiffinfo={338: 1})
    content = bytearray((tmp_path / "a.tif").read_bytes())
    place = content.index(struct.pack("<HHI", 338, 3, 1))
    content[place + 8:place + 10] = struct.pack("<H", 1)                    # associated alpha, whatever PIL made of it
    (tmp_path / "a.tif").write_bytes(content)
    assert (np.asarray(data.read_image(tmp_path / "a.tif")) == 100).all()


@pytest.mark.parametrize("text, said", [
    ("image,mask,expression,\na.png,m.png,the red box,left of it", "4 fields under a header of 3; an expression"),
    ("image,mask,expression,expression\na.png,m.png,left box,right box", "one name stands twice among image, mask"),
    ('image, mask, expression\na.png, m.png, "the red box"', "a blank stands before a quote"),
    ("image,mask,expression,Split\na.png,m.png,the box,test", "'Split' is written split"),
    ("image,mask,expression,maskvalue\na.png,m.png,the box,2", "'maskvalue' is written mask_value"),
    ("image,mask,expression\na.png,m.png", "2 of 3 fields: image, mask, expression"),
    ("image;mask;expression\na.png;m.png;the box", "1 of 1 fields: .* commas part them, no ; or tab"),
    ('image,mask,expression\na.png,m.png,"the box\na.png,m.png,the ship"', "a field goes over several lines"),
    ('image,mask,expression\na.png,"[[1, 1, 6, 1, 6, 4]]",the box', "polygons are read from .jsonl"),
])
def test_csv_that_would_be_read_otherwise(text, said, tmp_path):
    with pytest.raises(ValueError, match=f"entry 1: .*{said}"):
        data.read("custom", custom(tmp_path, *text.split("\n"), form="csv"), "train")


def test_first_column_of_a_csv_may_be_an_index_without_name(tmp_path):
    picture(tmp_path / "m.png", (64, 64), "L", 255)
    found = only("custom", custom(tmp_path, ",image,mask,expression", "0,a.png,m.png,the box", form="csv"))
    assert found.expression == "the box"


def test_letters_that_were_lost_and_names_that_stand_twice(tmp_path):
    for line, said in (('{"image": "a.png", "mask": "m.png", "expression": "a", "expression": "b"}', "expression"),
                       (r'{"image": "a.png", "mask": "m.png", "expression": "a\ud83d"}', "a letter .* is lost"),
                       ('{"image": "a.png", "mask": "m.png", "expression": "caf\ufffd"}', "a letter .* is lost")):
        custom(tmp_path)
        (tmp_path / "data.jsonl").write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=f"entry 1: .*{said}"):
            data.read("custom", tmp_path, "train")


def test_pictures_of_one_name_and_length_that_differ(tmp_path):
    folder = lists(tmp_path / "RISBench", "P1_0_0.bmp a ship\nP1_0_512.bmp a plane\n")
    picture(folder / "images" / "P1_0_512.bmp", value=7)
    with pytest.raises(ValueError, match="are one picture by name, but differ"):
        data.load(data.read("risbench", folder, "train"))


def test_a_line_of_two_names_or_two_entries(tmp_path):
    for line in ("1.tif 2.tif a ship", "1.tif a ship\u20282.tif a boat"):
        folder = lists(tmp_path / "RefSegRS", "1 a ship\n", suffix="tif")
        (folder / "output_phrase_train.txt").write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match="2.tif stands in the expression"):
            data.read("refsegrs", folder, "train")


@pytest.mark.parametrize("changes, said", [
    ({"annotation": {"image_id": 8}}, "a ref of image 9, its annotation 3 of image 8"),
    ({"ref": {"split": ["val"]}}, "the split is .'val'.; a name is needed"),
    ({"ref": {"split": " "}}, "a name is needed"),
    ({"ref": {"sentences": []}}, "no sentence; write one or take the ref out")])
def test_refs_that_do_not_fit(changes, said, tmp_path):
    with pytest.raises(ValueError, match=f"ref 7, .*{said}"):
        data.read("rrsisd", refer(tmp_path, [layouts.rle(box())], **changes), "train")


@pytest.mark.parametrize("section", ["annotations", "images"])
@pytest.mark.parametrize("number", [0, 5])
def test_two_different_entries_of_one_id(number, section, tmp_path):
    path = refer(tmp_path, [layouts.rle(box())]) / "rrsisd" / "instances.json"
    content = json.loads(path.read_text())
    content[section] += 2 * [{**content[section][0], "id": number}]
    path.write_text(json.dumps(content))
    assert only("rrsisd", tmp_path).expression == "The ship"
    content[section].append({**content[section][0], "id": number, "bbox": [1]})
    path.write_text(json.dumps(content) + " ")
    data._KNOWN.clear()
    with pytest.raises(ValueError, match=f"two different {section} of id {number};"):
        data.read("rrsisd", tmp_path, "train")


def test_a_copied_file_of_another_split(tmp_path):
    row = {"split": "test", "sent": "a ship", "file_name": "1.tif", "segmentation": layouts.rle(box())}
    (tmp_path / "datainfo").mkdir()
    (tmp_path / "datainfo" / "refsegrs_val.jsonl").write_text(json.dumps(row))
    picture(tmp_path / "images" / "1.tif")
    with pytest.raises(ValueError, match="an entry of the split test in the file of val"):
        data.read("refsegrs", tmp_path, "val")


def test_names_without_extension(tmp_path):
    picture(tmp_path / "images" / "1.tif")
    (tmp_path / "datainfo").mkdir()
    row = {"sent": "a ship", "file_name": "1", "segmentation": layouts.rle(box())}
    (tmp_path / "datainfo" / "refsegrs_val.jsonl").write_text(json.dumps(row))
    assert only("refsegrs", tmp_path, "val").image.name == "1.tif"


def test_rrsisd_alone_resizes_its_masks(tmp_path):
    found = only("rrsisd", refer(tmp_path, [layouts.rle(box(8, 8))], size=(8, 8), actual=(8, 9)))
    image, [mask] = data.load([found])
    assert image.size == (8, 9) and mask.shape == (9, 8)
    nearest = np.minimum(((np.arange(9) + 0.5) * 8 / 9).astype(int), 7)
    assert (mask == box(8, 8)[nearest]).all()
    assert data.look([found])[0][0][0] == "resized"
    assert (data.read_mask(found, None) == box(8, 8)).all()                         # to no size that is not known
    polygon = [[1, 1, 6, 1, 6, 4, 1, 4]]
    with pytest.raises(ValueError, match=r"the image is 9x8 .height x width., its mask 8x8; export one .*'s size$"):
        data.load([only("refcoco", refer(tmp_path, polygon, dataset="refcoco", size=(8, 8), actual=(8, 9)))])
    folder = lists(tmp_path / "RISBench", "a.png a ship\n", mask=np.zeros((6, 9), np.uint8))
    with pytest.raises(ValueError, match=r"a.png, sample a: the image is 6x8 .height x width., its mask 6x9"):
        data.load([only("risbench", folder)])


# ---------------------------------------------------------------------------------------------------------------------
# Images


def rgb(path):
    image = data.read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_gray_is_repeated(suffix, tmp_path):
    pixels = rgb(picture(tmp_path / f"a.{suffix}", mode="L", value=77))
    assert pixels.shape == (6, 8, 3) and (pixels == 77).all()


def test_one_bit_and_palette(tmp_path):
    Image.fromarray(box()).save(tmp_path / "bit.png")
    assert (rgb(tmp_path / "bit.png") == box()[..., None] * 255).all()
    image = Image.fromarray(box().astype(np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "palette.png")
    assert (rgb(tmp_path / "palette.png") == np.where(box()[..., None], (200, 100, 50), (10, 20, 30))).all()
    image.save(tmp_path / "clear.png", transparency=0)
    assert (rgb(tmp_path / "clear.png") == np.where(box()[..., None], (200, 100, 50), (255, 255, 255))).all()


def test_transparency_is_laid_over_white_but_the_fourth_band_of_a_tiff_is_left_out(tmp_path):
    four = np.concatenate([np.full((6, 8, 3), (200, 100, 50)), box()[..., None] * 255], 2).astype(np.uint8)
    Image.fromarray(four).save(tmp_path / "a.png")
    assert (rgb(tmp_path / "a.png") == np.where(box()[..., None], (200, 100, 50), (255, 255, 255))).all()
    Image.fromarray(four).save(tmp_path / "a.tif")
    assert (rgb(tmp_path / "a.tif") == (200, 100, 50)).all()
    Image.fromarray(four[..., 2:]).save(tmp_path / "gray.png")
    assert (rgb(tmp_path / "gray.png") == np.where(box()[..., None], 50, 255)).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_is_stretched(suffix, tmp_path):
    ramp = np.arange(1000, dtype=np.uint16).reshape(25, 40) + 300  # a sensor's 11 bits: 8 high ones would be black
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    gray = rgb(tmp_path / f"a.{suffix}")[..., 0].ravel().astype(int)
    low, high = np.percentile(ramp, 2), np.percentile(ramp, 98)
    assert (abs(gray - ((ramp.ravel() - low) / (high - low) * 255).clip(0, 255)) <= 0.51).all()
    spike = np.zeros((25, 40), np.uint16)
    spike[3, 4:6] = 20000, 40000  # too few for the percentiles: from the smallest to the largest value
    Image.fromarray(spike).save(tmp_path / f"b.{suffix}")
    gray = rgb(tmp_path / f"b.{suffix}")[..., 0].astype(int)
    assert gray[3, 4:6].tolist() == [128, 255] and gray.sum() == 128 + 255
    Image.fromarray(np.minimum(spike, 1)).save(tmp_path / f"b.{suffix}")
    assert rgb(tmp_path / f"b.{suffix}")[..., 0].sum() == 2 * 255
    Image.fromarray(spike[:1]).save(tmp_path / f"c.{suffix}")
    assert (rgb(tmp_path / f"c.{suffix}") == 0).all()


def test_cmyk_and_exif_orientation(tmp_path):
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert abs(rgb(tmp_path / "a.jpg").astype(int) - (255, 0, 0)).max() < 8
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the picture is 6 wide, 8 high
    Image.new("RGB", (8, 6)).save(tmp_path / "b.jpg", exif=exif)
    assert data.read_image(tmp_path / "b.jpg").size == (6, 8)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_pixels_of_data_sets_are_read_as_stored(suffix, tmp_path):
    """A square picture with an orientation tag: turned, its mask would lie elsewhere without a word."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(coloured(blob(), (250, 250, 250)))
    folder = lists(tmp_path / "RISBench", f"a.{suffix} a ship\n")
    stored.save(folder / "images" / f"a.{suffix}", exif=exif, quality=95)
    Image.fromarray(blob().astype(np.uint8) * 255).save(folder / "masks" / f"a.{suffix}", exif=exif, quality=95)
    image, [mask] = data.load(data.read("risbench", folder, "train"))
    assert ((np.asarray(image)[..., 0] > 125) == mask).mean() > 0.98
    turned = np.rot90(blob(), -1)
    assert ((rgb(folder / "images" / f"a.{suffix}")[..., 0] > 125) == turned).mean() > 0.98       # a user's own picture
    exif[0x0112] = 2                                                                      # mirrored, so of equal size
    Image.fromarray(coloured(blob()[:40], (250, 0, 0))).save(folder / "images" / f"a.{suffix}", exif=exif)
    Image.fromarray(np.rot90(blob()[:40], -1).copy()).save(folder / "masks" / f"a.{suffix}")
    with pytest.raises(ValueError, match="the image is 40x64 .*its mask 64x40;.* the image has an orientation tag"):
        data.load(data.read("risbench", folder, "train"))


def test_16_bit_colour_of_jpeg_2000_is_refused(tmp_path):
    Image.fromarray(coloured(blob(), (200, 90, 10))).save(tmp_path / "a.jp2", irreversible=False)
    assert (rgb(tmp_path / "a.jp2") == coloured(blob(), (200, 90, 10))).all()
    content = (tmp_path / "a.jp2").read_bytes()
    place = content.index(b"\xff\x4f\xff\x51") + 4 + 36 + 2           # behind markers, sizes, number of components
    for bits, stated in ((16, "uint16"), (12, "uint16"), (9, "uint16")):
        deep = bytearray(content)
        deep[place:place + 9:3] = bytes([bits - 1] * 3)
        (tmp_path / "b.jp2").write_bytes(deep)
        with pytest.raises(ValueError, match=f"b.jp2: 3 bands of {stated}; .*gdal_translate"):
            data.read_image(tmp_path / "b.jp2")


@pytest.mark.parametrize("nodata", ["0", "65535", "-9999", "0.0", "none", "300 "])
def test_nodata_is_left_out_of_the_stretch(nodata, tmp_path):
    ramp = np.arange(10000, 12000, dtype=np.uint16).reshape(40, 50)
    number = {"none": None}.get(nodata) or float(nodata) if nodata != "none" else None
    stored = ramp.copy()
    if number is not None and 0 <= number < 65536:
        stored[:20] = number
    Image.fromarray(stored).save(tmp_path / "a.tif", tiffinfo={42113: nodata})
    gray, valid = rgb(tmp_path / "a.tif")[..., 0].astype(int), stored == ramp
    low, high = np.percentile(stored[valid], (2, 98))
    expected = ((stored[valid] - low) / (high - low) * 255).clip(0, 255)
    assert (abs(gray[valid] - expected) <= 0.51).all() and (gray[~valid] == 0).all()
    Image.fromarray(np.full((4, 5), 7, np.uint16)).save(tmp_path / "b.tif", tiffinfo={42113: "7"})
    assert (rgb(tmp_path / "b.tif") == 0).all()
    spike = np.full((25, 40), 500, np.uint16)
    spike[0, :3] = 600, 20, 65535                             # too few for the percentiles, the last of them nodata
    Image.fromarray(spike).save(tmp_path / "c.tif", tiffinfo={42113: "65535"})
    gray = rgb(tmp_path / "c.tif")[..., 0]
    assert gray[0, :3].tolist() == [255, 0, 0] and gray[1, 1] == round(480 / 580 * 255)


def tiff(path, bands, kind, photometric=1, big=False):
    """An uncompressed TIFF, or BigTIFF, of a size of 2 x 2, written by hand: PIL writes no such bands."""
    array = np.ones((2, 2, bands), kind)
    code = {"u": 1, "i": 2, "f": 3, "c": 6}[array.dtype.kind]
    bits = struct.pack(f"<{bands}H", *[8 * array.itemsize] * bands)
    tags = [(256, 3, 1, 2), (257, 3, 1, 2), (258, 3, bands, None), (259, 3, 1, 1), (262, 3, 1, photometric),
            (273, 4, 1, 0), (277, 3, 1, bands), (278, 3, 1, 2), (279, 4, 1, array.nbytes), (339, 3, bands, None)]
    header, count, word = (b"II+\0\x08\0\0\0" + struct.pack("<Q", 16), "<Q", "<Q") if big else (
        b"II*\0" + struct.pack("<I", 8), "<H", "<I")
    size = struct.calcsize(word)
    offset = len(header) + struct.calcsize(count) + (4 + 2 * size) * len(tags) + size
    extra, body = b"", b""
    for number, form, length, value in tags:
        if value is None:
            content = bits if number == 258 else struct.pack(f"<{bands}H", *[code] * bands)
            field = content.ljust(size, b"\0") if len(content) <= size else struct.pack(word, offset + len(extra))
            extra += content if len(content) > size else b""
        elif number == 273:
            field = b"DATADATA"[:size]
        else:
            field = struct.pack("<I", value).ljust(size, b"\0")
        body += struct.pack("<HH", number, form) + struct.pack(word, length) + field
    body = body.replace(b"DATADATA"[:size], struct.pack(word, offset + len(extra)))
    path.write_bytes(header + struct.pack(count, len(tags)) + body + b"\0" * size + extra + array.tobytes())
    return path


@pytest.mark.parametrize(("bands", "kind", "photometric", "stated", "command"), [
    (5, "u1", 2, "5 bands of uint8", "-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB {}"),
    (3, "u1", 1, "3 bands of uint8 in a form that PIL does not open", "-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB {}"),
    (8, "u2", 1, "8 bands of uint16", "-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB -ot Byte -scale {}"),
    (3, "u2", 2, "3 bands of uint16", "-b 1 -b 2 -b 3 -co PHOTOMETRIC=RGB -ot Byte -scale {}"),
    (2, "u1", 1, "2 bands of uint8", "-b 1 {}"), (1, "f4", 1, "1 band of float32", "-b 1 -ot Byte -scale {}"),
    (1, "i2", 1, "1 band of int16", "-b 1 -ot Byte -scale {}"),
    (1, "u4", 1, "1 band of uint32", "-b 1 -ot Byte -scale {}"),
    (1, "f8", 1, "1 band of float64", "-b 1 -ot Byte -scale {}"),
    (1, "c8", 1, "1 band of cfloat64", "-b 1 -ot Byte -scale {}")])
@pytest.mark.parametrize("big", [False, True])
def test_other_bands_and_types_are_refused_with_the_remedy(bands, kind, photometric, stated, command, big, tmp_path):
    path = tiff(tmp_path / "a.tif", bands, kind, photometric, big)
    with pytest.raises(ValueError) as error:
        data.read_image(path)
    assert stated in str(error.value) and "\n" not in str(error.value)
    assert "gdal_translate " + command.format(path) + " converted.tif" in str(error.value)


@pytest.mark.parametrize(("bands", "kind", "photometric"), [(1, "u1", 1), (3, "u1", 2), (4, "u1", 2), (1, "u2", 1)])
@pytest.mark.parametrize("big", [False, True])
def test_the_same_writer_makes_files_that_are_read(bands, kind, photometric, big, tmp_path):
    assert rgb(tiff(tmp_path / "a.tif", bands, kind, photometric, big)).shape == (2, 2, 3)


@pytest.mark.parametrize(("tags", "stated"), [
    ({}, (1, "uint8")), ({258: (1,)}, (1, "uint8")), ({277: 3, 258: (8, 16, 8), 339: (1, 1, 1)}, (3, "uint16")),
    ({339: (2,), 258: (16,)}, (1, "int16")), ({339: (3,), 258: (32,)}, (1, "float32")),
    ({339: (5,), 258: (32,)}, (1, "cint32")), ({339: (6,), 258: (64,)}, (1, "cfloat64")),
    ({339: (4,), 258: (8,)}, (1, "unknown 8"))])
def test_bands_of_a_tiff_by_its_tags(tags, stated):
    """BitsPerSample 258, SamplesPerPixel 277, SampleFormat 339: 1 uint, 2 int, 3 float, 4 unknown, 5 and 6 complex."""
    assert data._tag_bands(tags) == stated


def deep_png(path, colour_type, bands):
    """A PNG of 2 x 2 with 16 bits, of a colour type that PIL does not write."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + bytes(range(4 * bands)) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, colour_type, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(("colour_type", "bands"), [(2, 3), (4, 2), (6, 4)])  # PIL opens gray with alpha as colour
def test_16_bit_colour_and_transparency_of_png_are_refused(colour_type, bands, tmp_path):
    with pytest.raises(ValueError, match=r"[34] bands of uint16.*gdal_translate"):
        data.read_image(deep_png(tmp_path / "a.png", colour_type, bands))


def test_other_files_that_pil_opens(tmp_path):
    picture(tmp_path / "a.bmp", (72, 5))                                          # 216 bytes a row
    assert (rgb(tmp_path / "a.bmp") == np.asarray(Image.open(tmp_path / "a.bmp"))).all()
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 65535 " + struct.pack(">HH", 0, 999))
    assert rgb(tmp_path / "a.pgm").tolist() == [[[0] * 3, [255] * 3]]              # 16-bit gray
    (tmp_path / "a.pfm").write_bytes(b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", 0, 0.5))
    with pytest.raises(ValueError, match="a.pfm: 1 band of float32; .*gdal_translate -b 1 -ot Byte -scale"):
        data.read_image(tmp_path / "a.pfm")


def test_a_damaged_exif_block_is_not_spoken_of(tmp_path):
    block = b"Exif\0\0II*\0\x08\0\0\0\x01\0"                                 # one entry, which is not there
    Image.new("RGB", (8, 6)).save(tmp_path / "a.jpg", exif=block)
    with pytest.warns(UserWarning, match="Corrupt EXIF data"), Image.open(tmp_path / "a.jpg") as image:
        image.getexif()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rgb(tmp_path / "a.jpg").shape == (6, 8, 3)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_truncated_image_is_an_error_even_where_pil_was_told_otherwise(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = picture(tmp_path / f"a.{suffix}", (64, 64))
    whole = path.read_bytes()
    for share in (0.9, 0.5):
        path.write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ValueError, match=f"a.{suffix}: "):
            data.read_image(path)


def test_a_picture_beyond_pil_s_limit_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 23)
    with pytest.raises(ValueError, match="a.png: above 46 pixels; cut it: gdal_translate -srcwin 0 0 4096 4096 "):
        data.read_image(picture(tmp_path / "a.png"))                                # 48 pixels


def test_missing_image_and_what_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.png: no such file"):
        data.read_image(tmp_path / "a.png")
    for content in (b"", b"<html>404</html>", b"II*\0junk"):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=rf"a.png: not an image, or one cut short .{len(content)} bytes"):
            data.read_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a folder"):
        data.read_image(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Custom, union, categories, synthetic


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_custom_file(form, tmp_path):
    picture(tmp_path / "in" / "a.png")
    picture(tmp_path / "in" / "b.png", mode="L", value=255)
    rows = [{"image": "in/a.png", "mask": "in/b.png", "expression": 'a  ship, "long"'},
            {"image": "in/a.png", "mask": "in/b.png", "expression": "the café", "category": "ship", "split": "val"},
            {"image": "in/a.png", "mask": "in/b.png", "expression": "x", "category": None, "split": "test"}]
    path = tmp_path / f"mine.{form}"
    with open(path, "w", newline="", encoding="utf-8") as file:
        if form == "csv":
            writer = csv.DictWriter(file, ["image", "mask", "expression", "category", "split"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(map(json.dumps, rows)) + "\n\n")
    for root in (path, tmp_path):
        found, other = only("custom", root), only("custom", root, "val")
        assert (found.expression, found.category, found.category_source) == ('a ship, "long"', None, None)
        assert (other.expression, other.category, other.category_source) == ("the café", "ship", "file")
        assert found.image == tmp_path / "in" / "a.png" and found.id == "b" and found.image_id == other.image_id
        assert only("custom", root, "test").category is None
    assert not data.has_split("custom", path, "val2")


def test_a_data_root_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lists(tmp_path / "sets" / "RISBench", "a.png a ship\n")
    assert only("risbench", "~/sets").image == tmp_path / "sets/RISBench/images/a.png"


def test_a_file_that_its_folder_lists_under_another_spelling_is_there(tmp_path, monkeypatch):
    """As on disks that do not tell cases apart."""
    picture(tmp_path / "m.png")
    folder = custom(tmp_path, {"image": "a.png", "mask": "m.png", "expression": "x"})
    monkeypatch.setattr(os, "listdir", lambda path: ["A.PNG", "M.PNG"])
    assert only("custom", folder).image == folder / "a.png"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.csv", "image,text\nx.png,ship\n", "entry 1: no mask, expression; .* found image, text"),
    ("a.jsonl", '{"image": "x", "mask": "y", "expression": "z"}\n{"image": \n', "entry 2: not JSON"),
    ("a.jsonl", "[1]\n", "entry 1: a list, not an object"),
    ("a.csv", "image,mask,expression\nx.png,y.png, \n", "entry 1: the expression is empty"),
    ("a.csv", "image,mask,expression\nx.png,,ship\n", "entry 1: mask is empty"),
    ("a.csv", "image,mask,expression\n,y.png,ship\n", "entry 1: image is empty"),
    ("a.jsonl", "{}\n", "entry 1: no image, mask, expression; "),
    ("a.csv", "image,mask,expression\nx.png,y.png,ship\n", "x.png, of custom train, is missing")])
def test_custom_file_errors(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.read("custom", tmp_path, "train")


@pytest.mark.parametrize(("content", "message"), [
    ("image,mask,expression\na.png,m.png,the red box, left of the pier\n",
     "data.csv:2, entry 1: 4 fields under a header of 3"),
    ("image,mask,expression,category,split\na.png,m.png,x,,\n\na.png,m.png,the box, left of the pier,box,test\n",
     "data.csv:4, entry 2: 6 fields under a header of 5"),
    ("image,mask,expression,category,split\na.png,m.png,the box, left\n", "entry 1: 4 fields under a header of 5"),
    ("image,mask,expression,category,split\na.png,m.png,the box, left,box\n", "entry 1: 5 fields under a header of 5")])
def test_a_comma_outside_quotes_is_an_error(content, message, tmp_path):
    custom(tmp_path, content, form="csv")
    with pytest.raises(ValueError, match=message + '; an expression that holds a comma needs quotes: "the ship, left'):
        data.read("custom", tmp_path, "train")


def test_broken_quotes_are_named_with_their_line(tmp_path):
    for content in ('a.png,m.png,"the red box', 'a.png,m.png,"the "red" box"'):
        custom(tmp_path, f"image,mask,expression\na.png,m.png,x\n{content}", form="csv")
        with pytest.raises(ValueError, match=r"data.csv:\d: .*; a quote within quotes is written twice"):
            data.read("custom", tmp_path, "train")


def test_blanks_around_header_names_and_fields_do_not_count(tmp_path):
    content = '\ufeffimage, mask,expression ,split\r\na.png,m.png ,"the  red box, left ", val\r\n'
    custom(tmp_path)
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "data.csv").write_bytes(content.replace(", val", ",val ").encode())
    Image.fromarray(blob()).save(tmp_path / "m.png")
    found = only("custom", tmp_path, "val")
    assert (found.expression, found.mask, found.id) == ("the red box, left", tmp_path / "m.png", "m")
    (tmp_path / "data.csv").write_text("image, mask, expression\na.png, m.png, the box\n")     # a blank everywhere
    assert only("custom", tmp_path).expression == "the box"


def test_a_list_of_expressions_is_a_sample_each(tmp_path):
    row = {"image": "a.png", "mask": "m.png", "expression": ["red box", " box on  the left"]}
    Image.fromarray(blob()).save(custom(tmp_path, row) / "m.png")
    found = data.read("custom", tmp_path, "train")
    assert [(one.id, one.expression) for one in found] == [("m", "red box"), ("m-2", "box on the left")]
    assert found[0].instance == found[1].instance
    for wrong, message in (([], "is no text but .."), ({"a": 1}, "is no text but .\"a\": 1"), (7, "is no text but 7"),
                           ([["a"]], "is no text"), *((empty, "is empty") for empty in (["a", ""], ["a", None], None))):
        with pytest.raises(ValueError, match=f"entry 1: the expression {message}"):
            data.read("custom", custom(tmp_path, {**row, "expression": wrong}), "train")


def test_names_of_splits_are_read_in_any_case(tmp_path, capsys):
    names = {"train": ["train", "Train", "training", "TRAINING", "", None], "test": ["test", "Testing"],
             "val": ["val", "valid", "Validation", "dev", "VAL"], "Holdout": ["Holdout"]}
    rows = [{"image": "a.png", "mask": "m.png", "expression": "x", "split": name}
            for group in names.values() for name in group]
    Image.fromarray(blob()).save(custom(tmp_path, *rows) / "m.png")
    for split, group in names.items():
        assert len(data.read("custom", tmp_path, split)) == len(group)
    code, out, _ = check(capsys, "--dataset", "custom", "--data-root", tmp_path)
    assert code == 0 and all(f"{split:6s} {len(group)} expressions" in out for split, group in names.items())


def test_custom_takes_one_file(tmp_path):
    for names in ((), ("a.csv", "b.jsonl")):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(FileNotFoundError, match="a .jsonl or .csv file or a folder with one"):
            data.read("custom", tmp_path, "train")


def test_union_has_no_image_of_any_val_or_test_split(tmp_path):
    layouts.write("refcoco-union", tmp_path)
    train, val = (data.read("refcoco-union", tmp_path, split) for split in ("train", "val"))
    held_out = {str(scene) for splits in layouts.UNION.values() for split, scenes in splits.items() if split != "train"
                for scene in scenes}
    assert {s.image_id for s in train} == {"0", "2", "8"} and not {s.image_id for s in train} & held_out
    assert {s.image_id for s in val} == {"3"} and data.split_names("refcoco-union", "val", tmp_path) == ["val"]
    assert len({s.id for s in train}) == len(train)
    # One object of one image under one name in all sets, and none of RefCOCOg's sentences twice.
    instances = [{s.instance for s in train if s.id.startswith(name)} for name in ("refcoco_", "refcoco+_")]
    assert instances[0] & instances[1]
    assert max(Counter((s.instance, s.expression) for s in train if "refcocog" in s.id).values()) == 1
    (tmp_path / "refcocog" / "refs(google).p").unlink()
    with pytest.raises(FileNotFoundError, match=r"refs\(google\).p"):
        data.read("refcoco-union", tmp_path, "train")


def test_any_folder_of_refer_by_its_pickle(tmp_path):
    """RemoteSAM-270K: pickle, instances.json and JPEGImages side by side; the splits are the pickle's."""
    written = layouts.write("refcoco", tmp_path, splits={"train": 1, "val": 1, "minitest": 1})
    move(tmp_path / "images/mscoco/images/train2014", tmp_path / "refcoco/JPEGImages")
    move(tmp_path / "refcoco/refs(unc).p", tmp_path / "refcoco/refs(unc)_mine.p")
    root, refs = tmp_path / "refcoco", "refs(unc)_mine.p"
    assert data.split_names("refer", "val,minitest", root, refs=refs) == ["val", "minitest"]
    assert data.has_split("refer", root, "minitest", refs=refs) and not data.has_split("refer", root, "test", refs=refs)
    for split, entries in written.items():
        found = data.read("refer", root, split, refs=refs)
        assert [one.expression for one in found] == [entry.expression for entry in entries]
        assert (data.load(found[:1])[1][0] == entries[0].mask).all()
    with pytest.raises(ValueError, match="--refs names the pickle of --dataset refer"):
        data.read("refer", root, "train")
    with pytest.raises(ValueError, match="--refs names the pickle of --dataset refer"):
        data.read("refcoco", root, "train", refs=refs)
    with pytest.raises(FileNotFoundError, match=r"no other.p with instances.json"):
        data.read("refer", root, "train", refs="other.p")


def test_risbench_pictures_are_told_by_the_name(tmp_path):
    names = ["train_0_0.png", "train_0_2.png", "train_1_0.png", "train_10_0.png", "odd.png", "odd_3.png"]
    lists(tmp_path / "RISBench", "".join(f"{name} a ship\n" for name in names))
    samples = data.read("risbench", tmp_path, "train")
    assert [one.picture for one in samples] == ["train_0", "train_0", "train_1", "train_10", "odd.png", "odd_3.png"]
    assert [one.image_id for one in samples] == names and len({one.instance for one in samples}) == 6


def test_refsegrs_pictures_are_told_by_the_content(tmp_path):
    """Its four samples of a scene are one picture, under four numbers."""
    layouts.write("refsegrs", tmp_path, splits={"train": 2, "val": 1})
    samples = data.read("refsegrs", tmp_path, "train")
    assert [one.picture for one in samples] == [samples[0].picture] * 4 + [samples[4].picture] * 4
    assert samples[0].picture != samples[4].picture and len({one.image_id for one in samples}) == 8
    changed = np.asarray(Image.open(samples[1].image)).copy()
    changed[0, 0, 0] ^= 1
    Image.fromarray(changed).save(samples[1].image)
    again = data.read("refsegrs", tmp_path, "train")
    assert [one.picture == samples[0].picture for one in again[:4]] == [True, False, True, True]
    assert data.ReferringDataset(again, 24, tokenizer).images == [(0, 2, 3), (1,), (4, 5, 6, 7)]


def test_one_picture_by_name_must_be_one_by_content(tmp_path, capsys):
    layouts.write("risbench", tmp_path, splits={"train": 2, "val": 1, "test": 1})
    samples = data.read("risbench", tmp_path, "train")
    Image.open(samples[1].image).save(samples[1].image, compress_level=1)  # the same in a file of another size
    assert samples[0].image.stat().st_size != samples[1].image.stat().st_size
    assert len(data.load(samples[:2])[1]) == 2
    shutil.copy(samples[5].image, samples[1].image)                        # of the other scene
    with pytest.raises(ValueError, match=f"{samples[0].image} and {samples[1].image} are one picture by name, but"):
        data.load(samples[:2])
    code, out, _ = check(capsys, "--dataset", "risbench", "--data-root", tmp_path)
    assert code == 1 and f"mismatch   {samples[0].image} and {samples[1].image} are one picture by name" in out


def test_one_custom_picture_however_its_path_is_written(tmp_path):
    folder = custom(tmp_path / "set")
    Image.fromarray(blob()).save(folder / "m.png")
    (folder / "link.png").symlink_to("a.png")
    picture(tmp_path / "a.png", (64, 64))
    names = ["a.png", "./a.png", str(folder / "a.png"), "../set/a.png", "link.png", "../a.png"]
    custom(folder, *({"image": name, "mask": mask, "expression": "x"} for name, mask in zip(
        names, ["m.png", "./m.png", str(folder / "m.png"), "m.png", "m.png", "m.png"], strict=True)))
    samples = data.read("custom", folder, "train")
    assert [one.picture for one in samples] == ["a.png"] * 5 + [str((tmp_path / "a.png").resolve())]
    assert len({one.image_id for one in samples}) == len({one.instance for one in samples}) == 2
    assert data.ReferringDataset(samples, 24, tokenizer).images == [(0, 1, 2, 3, 4), (5,)]


def test_seen_and_unseen_categories(tmp_path):
    """OVR-CNN's 48 and 17 of COCO's 80."""
    seen, unseen = (set(names.split()) for names in (
        "apple backpack banana bear bed bench bicycle bird boat book bottle bowl broccoli car carrot chair clock donut "
        "fork frisbee giraffe handbag horse kite laptop microwave motorcycle mouse orange oven person pizza remote "
        "refrigerator sandwich sheep skis spoon suitcase surfboard toaster toilet toothbrush train truck tv vase zebra",
        "airplane bus cake cat couch cow cup dog elephant keyboard knife scissors sink skateboard snowboard tie "
        "umbrella"))
    assert len(seen) == 48 and len(unseen) == 17 and not seen & unseen
    assert list(data.CATEGORIES.items()) == [("all", set()), ("seen", seen), ("unseen", unseen)]
    layouts.write("refcoco", tmp_path, splits={"train": 6})
    everything = data.read("refcoco", tmp_path, "train")
    parts = {name: data.read("refcoco", tmp_path, "train", categories=name) for name in ("seen", "unseen")}
    assert {s.category for s in parts["seen"]} <= {"car", "boat", "bench", "kite", "bottle"}
    assert {s.category for s in parts["unseen"]} == {"airplane", "bus"}
    assert {s.category for s in everything} - {s.category for part in parts.values() for s in part} == {"traffic light"}
    assert parts["seen"] == [s for s in everything if s.category in seen]
    with pytest.raises(ValueError, match="rrsisd takes only 'all'"):
        data.read("rrsisd", refer(tmp_path, []), "train", categories="seen")
    with pytest.raises(ValueError, match="unknown categories 'half'"):
        data.read("refcoco", tmp_path, "train", categories="half")


def test_synthetic_reads_like_a_data_set():
    train, again = (data.read("synthetic", None, "train", scenes=3, epoch=epoch) for epoch in (0, 1))
    assert len(train) == len(again) and not {s.image for s in train} & {s.image for s in again}
    assert data.split_names("synthetic", "val,test", "nowhere") == ["val", "test"]
    assert min(one.image for one in data.read("synthetic", None, "train", limit=5)) == data.FIRST_SCENE["train"]
    assert data.has_split("synthetic", None, "test") and not data.has_split("synthetic", None, "testA")
    assert set(data.vocabulary("synthetic", train)) >= {word for s in train for word in data.words(s.expression)}
    assert data.vocabulary("custom", train[:1]) == sorted(set(data.words(train[0].expression)))
    image, [mask] = data.load(train[:1])
    assert image.size == mask.shape[::-1] and mask.any() and (data.read_mask(train[0], mask.shape) == mask).all()
    with pytest.raises(ValueError, match="no split 'testA'"):
        data.read("synthetic", None, "testA")


def test_a_limit_draws_no_more_scenes_than_it_needs(monkeypatch):
    drawn, real = [], data.scene
    monkeypatch.setattr(data, "scene", lambda number, **size: (drawn.append(number), real(number, **size))[1])
    for limit, scenes in ((12, 1), (13, 2), (288, 24), (1000, 24)):       # 12 sentences a scene, 24 scenes of val
        drawn.clear()
        assert len(data.read("synthetic", None, "val", limit=limit)) == min(limit, 288) and len(drawn) == scenes
    assert len(data.read("synthetic", None, "val", limit=20, scenes=1)) == 12
    drawn.clear()
    assert data.split_names("synthetic", "train,val", None) == ["train", "val"] and not drawn


# ---------------------------------------------------------------------------------------------------------------------
# Dataset and collate


def test_batch_is_as_documented(tmp_path):
    layouts.write("refcoco", tmp_path, splits={"train": 2})
    samples = data.read("refcoco", tmp_path, "train")
    dataset = data.ReferringDataset(samples, 32, tokenizer, original=True)
    assert [number for group in dataset.images for number in group] == list(range(24)) and len(dataset.images) == 2
    first, second = dataset.images
    batch = data.collate([dataset[second[:2]], dataset[first[:3]], dataset[second[2:3]]])
    assert batch["images"].shape == (2, 3, 32, 32) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous()
    assert batch["tokens"].shape == (6, 6) and batch["tokens"].dtype == torch.int64
    assert batch["text_mask"].shape == (6, 6) and batch["text_mask"].dtype == torch.bool
    assert batch["masks"].shape == (6, 32, 32) and batch["masks"].dtype == torch.bool
    assert batch["image_index"].tolist() == [0, 0, 1, 1, 1, 0] and batch["image_index"].dtype == torch.int64
    assert batch["instance"].shape == (6,) and batch["instance"].dtype == torch.int64 and (batch["instance"] >= 0).all()
    numbers = [*second[:2], *first[:3], second[2]]
    assert [s.id for s in batch["samples"]] == [samples[number].id for number in numbers]
    assert {s.size for s in batch["samples"]} == {(96, 96)}
    assert [mask.shape for mask in batch["original_masks"]] == [(96, 96)] * 6
    for row, number in enumerate(numbers):
        image, [mask] = data.load([samples[number]])
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))
        assert (batch["images"][batch["image_index"][row]].permute(1, 2, 0).numpy() == pixels).all()
        assert (batch["original_masks"][row].numpy() == mask).all()
        assert (batch["masks"][row].numpy() == mask[1::3, 1::3]).all()  # 96 -> 32: the centre of each 3 x 3
        assert batch["tokens"][row].tolist() == tokenizer([samples[number].expression])[0][0].tolist()
    assert "original_masks" not in data.ReferringDataset(samples, 32, tokenizer)[first]


def test_batches_and_steps_go_by_the_picture_not_by_its_names():
    """Three names of one picture: one row of images, one draw of an epoch with per_image."""
    samples = [data.read("synthetic", None, "train", scenes=1)[k] for k in (0, 3, 6)]
    assert [one.picture for one in samples] == [one.image_id for one in samples]      # where nothing else is said
    alias = [data.replace(one, image_id=f"{k}.tif", picture="p") for k, one in enumerate(samples)]
    dataset = data.ReferringDataset(alias, 24, tokenizer)
    assert dataset.images == [(0, 1, 2)]
    batch = data.collate([dataset[(0,)], dataset[(1, 2)]])
    assert batch["images"].shape[0] == 1 and batch["image_index"].tolist() == [0, 0, 0]
    sampler = data.TrainSampler(alias, batch_size=3, micro_batch=3, per_image=3, seed=0)
    assert sampler.steps == 1 and [sorted(group) for group in sampler.plan(0, 0)[0][0]] == [[0, 1, 2]]


def boxes(dataset, numbers):
    """(of each of the pictures, the share of black pixels)."""
    return np.array([(dataset[(number,)]["image"] == 0).all(0).float().mean() for number in numbers])


def test_black_boxes_fall_on_a_fixed_share_of_the_pictures_and_leave_masks_alone(tmp_path):
    for number in range(40):
        picture(tmp_path / f"{number}.png", (400, 300), value=200)
    mask = {"size": (300, 400), "parts": [layouts.rle(box(300, 400))], "resize": False}
    samples = [data.replace(sample(f"i{k:02d}", f"i{k}", k, mask=mask), image=tmp_path / f"{k}.png") for k in range(40)]

    def dataset(seed=1, epoch=0, share=0.2):
        return data.ReferringDataset(samples, 400, tokenizer, black_boxes=share, draw=(seed, epoch))

    first = boxes(dataset(), range(40))
    assert (first > 0).sum() == 8 and (boxes(data.ReferringDataset(samples, 400, tokenizer), range(40)) == 0).all()
    assert (boxes(dataset(), reversed(range(40)))[::-1] == first).all()               # in any worker, in any order
    later = boxes(dataset(epoch=1), range(40))
    assert ((later > 0) == (first > 0)).all() and (later != first).sum() == 8         # the same pictures, other places
    assert ((boxes(dataset(seed=2), range(40)) > 0) != (first > 0)).any()
    assert (boxes(dataset(share=1.0), range(40)) > 0).all()
    drawn = np.random.default_rng((1, 0, 0, 0, 1)).permutation(40)[:8]                # a seed of its own
    assert sorted(drawn) == np.flatnonzero(first).tolist()
    sampler = data.TrainSampler(samples, batch_size=8, micro_batch=8, per_image=1, seed=1)
    assert set(np.flatnonzero(first)) != set(flat(sampler.plan(0, 0)))         # not those that an epoch begins with
    item, plain = dataset(share=1.0)[(3,)], dataset(share=0.0)[(3,)]
    assert torch.equal(item["masks"], plain["masks"]) and (plain["image"] == 200).all()
    assert set(item["image"].unique().tolist()) <= set(range(201))                    # black squares, resized


@pytest.mark.parametrize("size", [(800, 600), (33, 32), (31, 20)])
def test_black_boxes_are_20_to_60_squares_of_32_pixels_within_the_picture(size):
    """Their number, then x and y of each; a picture that is smaller is black."""
    counts = set()
    for seed in range(400 if size[0] == 800 else 3):
        painted, rng = Image.new("RGB", size, "white"), np.random.default_rng(seed)
        if size[0] == 800:  # the calls are looked at: painting takes longer
            painted = SimpleNamespace(size=size, pasted=[])
            painted.paste = lambda colour, place, painted=painted: painted.pasted.append((colour, place))
        data.add_black_boxes(painted, np.random.default_rng(seed))
        places = [[int(rng.integers(0, max(side - 32, 0), endpoint=True)) for side in size]
                  for _ in range(rng.integers(20, 60, endpoint=True))]
        counts.add(len(places))
        if size[0] == 800:
            assert painted.pasted == [((0, 0, 0), (x, y, x + 32, y + 32)) for x, y in places]
        else:
            expected = np.full((*size[::-1], 3), 255, np.uint8)
            for x, y in places:
                expected[y:y + 32, x:x + 32] = 0
            assert (np.asarray(painted) == expected).all()
    assert size[0] < 800 or (min(counts), max(counts)) == (20, 60)


def test_each_draw_of_a_picture_has_its_own_seed(tmp_path):
    """Boxes by seed, epoch and picture, lost words by seed, epoch, sample and count of the repeat."""
    mask = {"size": (90, 120), "parts": [layouts.rle(box(90, 120))], "resize": False}
    path = picture(tmp_path / "a.png", (120, 90), value=200)
    one = data.replace(sample("ä", mask=mask, expression="a b c d e f g h"), image=path)
    dataset = data.ReferringDataset([one], 120, tokenizer, black_boxes=1.0, repeat_mask=0.5, draw=(5, 3))
    expected = Image.open(path)
    data.add_black_boxes(expected, np.random.default_rng((5, 3, *"ä".encode())))
    item = dataset[(0, 0, 0)]
    assert (item["image"].permute(1, 2, 0).numpy() == np.asarray(expected.resize((120, 120), 2))).all()
    assert item["samples"][0].size == (90, 120)                                       # height, width
    assert [shown.expression for shown in item["samples"]] == [one.expression, *(
        data.masked(one.expression, 0.5, np.random.default_rng((5, 3, 0, count))) for count in (1, 2))]
    plain = data.ReferringDataset([one], 120, tokenizer)
    assert (plain[(0,)]["image"] == 200).all() and plain.draw == (0, 0) and not plain.original
    assert [shown.expression for shown in plain[(0, 0)]["samples"]] == [one.expression] * 2


def test_word_tokenizer():
    words = data.WordTokenizer(["red", "ship"], 5, {"pad": 1, "begin": 0, "end": 3, "unknown": 2})
    tokens, real = words(["Red ship", "a red red ship", ""])
    assert tokens.tolist() == [[0, 4, 5, 3, 1], [0, 2, 4, 4, 3], [0, 3, 1, 1, 1]] and tokens.dtype == torch.int64
    assert torch.equal(real, tokens != 1) and len(words) == 6
    plain = data.WordTokenizer(["red", "ship"], 3, {"pad": 0, "unknown": 1})
    assert plain(["ship ship ship red", "blue"])[0].tolist() == [[3, 3, 3], [1, 0, 0]]


def test_sentences_that_are_cut_are_counted():
    samples = [sample(expression=" ".join(["ship"] * count)) for count in (9, 3, 4, 5)]
    special = {"pad": 0, "unknown": 1}
    assert data.cut(samples, data.WordTokenizer(["ship"], 4, special)) == (
        "2 of 4 sentences are longer than 4 tokens and are cut")
    marks = data.WordTokenizer(["ship"], 6, {**special, "begin": 2, "end": 3})        # two of the six are marks
    assert data.cut(samples, marks).startswith("2 of 4") and marks.length == 6
    assert data.cut(samples, data.WordTokenizer(["ship"], 9, special)) == ""
    assert data.cut(samples * 525, data.WordTokenizer(["ship"], 4, special)).startswith("1050 of 2100 sentences")


def test_instance_numbers_are_stable_and_tell_objects_apart():
    assert data.instance_number(sample(instance="9/3")) == data.instance_number(sample(image="b", instance="9/3"))
    numbers = {data.instance_number(sample(instance=f"9/{number}")) for number in range(1000)}
    assert len(numbers) == 1000 and max(numbers) < 2 ** 63
    assert data.instance_number(sample(instance="9/3")) == 6096036606605523258  # in every process, unlike hash()


def test_an_image_is_opened_once_for_its_expressions(tmp_path, monkeypatch):
    layouts.write("refcoco", tmp_path, splits={"train": 1})
    dataset, opened = data.ReferringDataset(data.read("refcoco", tmp_path, "train"), 16, tokenizer), []
    read = data.read_image
    monkeypatch.setattr(data, "read_image", lambda path, **options: opened.append(path) or read(path, **options))
    assert len(dataset[dataset.images[0]]["samples"]) == 12 and len(opened) == 1
    layouts.write("risbench", tmp_path, splits={"train": 1})
    assert len(data.load(data.read("risbench", tmp_path, "train"))[1]) == 4 and len(opened) == 2  # four equal files


def test_loader_workers_give_the_same_batches(tmp_path):
    samples = data.read("synthetic", None, "train", scenes=3)
    dataset = data.ReferringDataset(samples, 24, tokenizer)
    sampler = data.TrainSampler(samples, batch_size=8, micro_batch=8, per_image=4, seed=0)
    batches = [[batch["masks"].sum().item(), batch["images"].sum().item(), [s.id for s in batch["samples"]]]
               for workers in (0, 1) for batch in torch.utils.data.DataLoader(
                   dataset, batch_sampler=sampler.batches(0, 0), num_workers=workers, collate_fn=data.collate)]
    assert len(batches) == 4 and batches[:2] == batches[2:]


# ---------------------------------------------------------------------------------------------------------------------
# Sampler


def many(counts, expressions=2):
    """Samples of images with so many objects each, every object with `expressions` expressions."""
    rows = [(f"i{image}", f"i{image}/{instance}") for image, count in enumerate(counts) for instance in range(count)
            for _ in range(expressions)]
    return [sample(image, instance, number) for number, (image, instance) in enumerate(rows)]


def steps_of(sampler, epoch=0):
    return [sampler.plan(epoch, step) for step in range(sampler.steps)]


def flat(plan):
    return [number for rank in plan for part in rank for group in part for number in group]


COUNTS = [np.random.default_rng(3).integers(1, 6, 41), [1] * 37, [1, 30, 2, 2, 1, 9, 4], [1] * 3 + [7]]


@pytest.mark.parametrize("counts", COUNTS, ids=["mixed", "single", "lopsided", "few"])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("per_image", [0, 1, 4])
@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_each_unit_once_and_equal_slices(counts, world, per_image, micro_batch):
    samples = many(counts)
    sampler = data.TrainSampler(samples, batch_size=12, micro_batch=micro_batch, per_image=per_image, seed=5,
                                world=world)
    plans = steps_of(sampler)
    chosen = [number for plan in plans for number in flat(plan)]
    assert len(set(chosen)) == len(chosen)
    units = Counter(samples[number].image_id if per_image else samples[number].instance for number in chosen)
    if per_image:
        expressions = Counter(s.image_id for s in samples)
        assert units == {image: min(number, per_image) for image, number in expressions.items()}
    else:
        assert units == dict.fromkeys({s.instance for s in samples}, 1)
    total = len(units)
    size = int(12 * total / len(chosen))                                    # as many units as make about 12 expressions
    whole = -(-total // size)
    assert sampler.steps == (whole if total // whole >= world else total // world)
    for plan in plans:
        taken = len({samples[number].image_id if per_image else samples[number].instance for number in flat(plan)})
        assert total // sampler.steps <= taken <= -(-total // sampler.steps)  # no tiny last step
        assert len(plan) == world and len({len(rank) for rank in plan}) == 1
        parts = [part for rank in plan for part in rank]
        assert all(part and all(part) for part in parts)
        for part in parts:
            assert all(len({samples[number].image_id for number in group}) == 1 for group in part)
            assert len({samples[group[0]].image_id for group in part}) == len(part)
        images = {samples[number].image_id for number in flat(plan)}
        pieces = Counter(samples[group[0]].image_id for part in parts for group in part)
        if len(images) >= world:  # no image is in two parts, and none exceeds micro_batch but for a single image
            assert max(pieces.values()) == 1
            sizes = [sum(map(len, part)) for part in parts]
            assert all(size <= micro_batch or len(part) == 1 or len(parts) > len(images) - world
                       for size, part in zip(sizes, parts, strict=True))
        else:
            assert per_image == 0


def test_the_step_is_the_same_however_it_is_divided():
    samples = many(COUNTS[0])
    for per_image in (0, 4):
        plans = [[sorted(flat(plan)) for plan in steps_of(data.TrainSampler(
            samples, batch_size=16, micro_batch=micro, per_image=per_image, seed=1, world=world), 3)]
            for world, micro in ((1, 16), (1, 2), (2, 8), (3, 1))]
        assert plans[0] == plans[1] == plans[2] == plans[3]
        one, two = (data.TrainSampler(samples, batch_size=16, micro_batch=8, per_image=per_image, seed=1, world=world)
                    for world in (1, 2))
        for step in range(one.steps):  # the slices of two processes, in order, are the accumulated parts of one
            assert [part for rank in two.plan(0, step) for part in rank] == one.plan(0, step)[0]


def test_draws_depend_on_seed_epoch_and_step_alone(monkeypatch):
    samples = many(COUNTS[0], expressions=3)
    settings = {"batch_size": 10, "micro_batch": 5, "per_image": 0}
    sampler = data.TrainSampler(samples, seed=1, **settings)
    torch.manual_seed(1)
    first = steps_of(sampler, 2)
    np.random.default_rng(0).random()
    torch.manual_seed(2)
    other = data.TrainSampler(samples, seed=1, **settings)
    assert other.plan(2, other.steps - 1) == first[-1] and steps_of(other, 2) == first == steps_of(sampler, 2)
    assert steps_of(sampler, 3) != first != steps_of(data.TrainSampler(samples, seed=2, **settings), 2)
    drawn = {number for epoch in range(12) for plan in steps_of(sampler, epoch) for number in flat(plan)}
    assert len(drawn) > 0.95 * len(samples)  # every expression has its turn
    orders, real = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: orders.append(seed) or real(seed))
    assert steps_of(sampler, 2) == first and orders.count((1, 2, 0)) == 1 == orders.count((1, 2, 1))   # drawn once
    monkeypatch.undo()
    whole = list(sampler.batches(2, 0))
    assert list(sampler.batches(2, 0, first_step=2)) == whole[sum(len(plan[0]) for plan in first[:2]):]


def test_an_epoch_by_hand():
    """7 images in steps of at most 3: the order from (seed, epoch, 0), a step's draws from (seed, epoch, step + 1).

    Numpy pads short seeds with zeros, so that (4, 9) would be the order and the first step's draws.
    """
    samples, settings = many([1] * 7, expressions=3), {"batch_size": 3, "micro_batch": 3, "seed": 4}
    sampler = data.TrainSampler(samples, per_image=0, **settings)
    order = np.array_split(np.random.default_rng((4, 9, 0)).permutation(7), 3)
    for step, units in enumerate(order):
        rng = np.random.default_rng((4, 9, step + 1))
        assert flat(sampler.plan(9, step)) == [3 * unit + rng.integers(3) for unit in units]
    assert sampler.steps == 3 and sampler.world == 1
    samples = many([2] * 7, expressions=3)                     # image i: numbers 6 i to 6 i + 5, three of each object
    sampler = data.TrainSampler(samples, per_image=3, **{**settings, "batch_size": 9})
    for step, images in enumerate(order):
        rng, expected = np.random.default_rng((4, 9, step + 1)), []
        for image in images:
            turns = [(turn, rng.random(), number) for first in (6 * image, 6 * image + 3)
                     for turn, number in enumerate(rng.permutation([first, first + 1, first + 2]))]
            expected += [number for _, _, number in sorted(turns)[:3]]
        assert flat(sampler.plan(9, step)) == expected
    sampler = data.TrainSampler(samples, per_image=8, repeat_mask=0.5, **{**settings, "batch_size": 24})
    for step, images in enumerate(order):  # of six sentences all, in any order, and two of them again
        rng, expected = np.random.default_rng((4, 9, step + 1)), []
        for image in images:
            once, again = (rng.permutation(range(6 * image, 6 * image + 6)) for _ in range(2))
            expected += [*once, *again][:8]
        assert flat(sampler.plan(9, step)) == expected


def parts_by_hand(sizes, world, micro_batch):
    """Numbers of groups in each part: each cut is the end nearest to its share, but leaves no part without a group."""
    ends, most = [sum(sizes[:k + 1]) for k in range(len(sizes))], len(sizes) // world
    for k in range(min(math.ceil(ends[-1] / (world * micro_batch)), most), most + 1):
        count, cuts = world * k, [0]
        for part in range(1, count):
            share = [abs(end - ends[-1] * part / count) for end in ends]
            nearest = share.index(min(share)) + 1
            cuts.append(min(max(nearest, cuts[-1] + 1), len(sizes) - (count - part)))
        cuts.append(len(sizes))
        lengths = [b - a for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        sums = [sum(sizes[a:b]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        if all(length == 1 or total <= micro_batch for length, total in zip(lengths, sums, strict=True)):
            break
    return lengths


def test_a_step_is_cut_into_nearly_equal_parts_as_few_as_fit():
    rng = np.random.default_rng(0)
    for _ in range(300):
        world, micro_batch, most = int(rng.integers(1, 4)), int(rng.integers(1, 9)), int(rng.integers(1, 8))
        sizes = rng.integers(1, most + 1, rng.integers(world, 16)).tolist()
        sampler = data.TrainSampler(many([1] * 9), batch_size=9, micro_batch=micro_batch, per_image=0, seed=0,
                                    world=world)
        parts = sampler._divide([(0,) * size for size in sizes])
        assert [len(part) for part in parts] == parts_by_hand(sizes, world, micro_batch)
        assert [len(group) for part in parts for group in part] == sizes


GROUPS = {"batch_size": 24, "per_image": 4, "seed": 3, "repeat_mask": 0.25}


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 24), (1, 6), (2, 4), (2, 3), (3, 16)])
def test_groups_hold_per_image_expressions_each_and_are_never_divided(world, micro_batch):
    """Prompt-RIS: 6 images x 4; the first five images have 1, 2, 3, 4 and 5 expressions, repeats fill them up."""
    samples = many([1, 2, 3, 4, 5, *[3] * 20], expressions=1)
    sampler = data.TrainSampler(samples, micro_batch=micro_batch, world=world, **GROUPS)
    images = []
    for plan in steps_of(sampler):
        groups = [group for rank in plan for part in rank for group in part]
        assert len(plan) == world and len(groups) in (5, 6) and sampler.steps == 5
        for group in groups:
            of_image = [k for k, one in enumerate(samples) if one.image_id == samples[group[0]].image_id]
            times = Counter(group)
            assert set(group) <= set(of_image) and len(group) == 4 and len(times) == min(4, len(of_image))
            assert max(times.values()) - min(times.values()) <= 1          # no sentence thrice while one comes once
        images += [samples[group[0]].image_id for group in groups]
    assert sorted(images) == sorted({one.image_id for one in samples})
    one = data.TrainSampler(samples, micro_batch=24, **GROUPS)
    for step in range(sampler.steps):
        assert sorted(flat(sampler.plan(0, step))) == sorted(flat(one.plan(0, step)))


def test_no_groups_where_no_image_has_two_sentences_or_none_are_asked_for():
    single = many([1] * 30, expressions=1)
    for samples, changes in ((single, {}), (many([2] * 30), {"repeat_mask": 0.0}), (many([2] * 30), {"per_image": 0})):
        sampler = data.TrainSampler(samples, micro_batch=24, **{**GROUPS, **changes})
        assert not sampler.groups
        assert all(max(Counter(flat(plan)).values()) == 1 for plan in steps_of(sampler))
    assert data.TrainSampler(single, micro_batch=24, **GROUPS).steps == 2              # 24 images a step, not 6


def test_a_repeat_loses_words_by_seed_epoch_sample_and_count_alone():
    samples = data.read("synthetic", None, "train", scenes=1)
    group = (3, 5, 3, 3, 5)

    def texts(draw, share=0.5, numbers=group):
        dataset = data.ReferringDataset(samples, 24, tokenizer, repeat_mask=share, draw=draw)
        item = dataset[numbers]
        assert torch.equal(item["instance"], torch.tensor([data.instance_number(samples[n]) for n in numbers]))
        shown = [one.expression for one in item["samples"]]
        assert torch.equal(item["tokens"], tokenizer(shown)[0])
        return shown

    first = texts((7, 2))
    assert texts((7, 2)) == first and texts((7, 2), numbers=(5, 3, 3, 5, 3))[2:] == [first[k] for k in (2, 4, 3)]
    assert first[:2] == [samples[3].expression, samples[5].expression]
    for text, number in zip(first[2:], group[2:], strict=True):
        assert text and set(text.split()) <= set(samples[number].expression.split())
    several = [texts((seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len({tuple(shown[2:]) for shown in several}) > 4 and len({tuple(shown[:2]) for shown in several}) == 1
    assert texts((7, 2), share=0.0)[2] == samples[3].expression and len(texts((7, 2), share=1.0)[2].split()) == 1
    for seed in range(30):  # a word each; where all are lost, one drawn after them stays
        rng, parts = np.random.default_rng(seed), ["a", "b", "c"]
        kept, spare = rng.random(3) >= 0.75, rng.integers(3)
        expected = [part for part, keep in zip(parts, kept, strict=True) if keep] or [parts[spare]]
        assert data.masked("a b c", 0.75, np.random.default_rng(seed)) == " ".join(expected)


def test_one_image_is_divided_only_where_processes_would_go_without():
    sampler = data.TrainSampler(many([6], 1), batch_size=6, micro_batch=6, per_image=0, seed=0, world=3)
    assert [[len(group) for group in part] for rank in sampler.plan(0, 0) for part in rank] == [[2]] * 3


def test_fewer_units_than_processes():
    with pytest.raises(ValueError, match=r"2 training objects in steps of 8 .* for 3 processes; start at most 2"):
        data.TrainSampler(many([2]), batch_size=8, micro_batch=8, per_image=0, seed=0, world=3)
    with pytest.raises(ValueError, match=r"9 training images in steps of 1 .batch size 4. .* start at most 1"):
        data.TrainSampler(many([2] * 9), batch_size=4, micro_batch=8, per_image=4, seed=0, world=2)


def test_a_batch_of_as_many_objects_as_processes_has_no_short_step():
    sampler = data.TrainSampler(many([1] * 11), batch_size=4, micro_batch=4, per_image=0, seed=0, world=4)
    assert sorted(len(flat(plan)) for plan in steps_of(sampler)) == [5, 6]


# ---------------------------------------------------------------------------------------------------------------------
# Check command


def check(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        data.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def test_check_finds_every_kind_of_fault(capsys, tmp_path):
    layouts.write("risbench", tmp_path, splits={"train": 2, "test": 1})
    images, masks = tmp_path / "RISBench_dataset" / "img_rgb", tmp_path / "RISBench_dataset" / "mask"
    names = sorted(path.name for path in images.glob("train*"))
    (images / names[0]).unlink()
    (images / names[1]).write_bytes((images / names[1]).read_bytes()[:200])
    (masks / names[2]).unlink()
    Image.new("L", (96, 96)).save(masks / names[3])
    Image.new("L", (96, 95), 255).save(masks / names[4])
    (images / names[5]).write_bytes(b"")
    code, out, _ = check(capsys, "--dataset", "risbench", "--data_root", tmp_path)
    lines = out.splitlines()
    assert code == 1 and sum("RISBench_dataset" in line for line in lines) == 6
    for kind, name in zip(("missing", "unreadable", "missing", "empty", "mismatch", "unreadable"), names, strict=False):
        assert [line for line in lines if line.startswith(kind) and name in line]
    assert "not there: val" in out and "8 expressions (published 26300: differs by -26292)" in out
    assert "3 different pictures, 0 of test's 1 are in train too; the median" in out and "" not in lines
    assert "12 images, 2 missing, 2 unreadable, 1 mismatch, 1 empty, 0 resized: 5 problems would stop" in lines[-1]
    code, out, _ = check(capsys, "--dataset", "risbench", "--data-root", tmp_path, "--split=test")
    assert code == 1 and "train " not in out
    assert out.splitlines()[-1].endswith("the files are sound, but their number is not the published one")


def test_check_of_own_data_names_the_splits_that_it_lacks(capsys, tmp_path):
    layouts.write("custom", tmp_path, splits={"train": 2})
    code, out, err = check(capsys, "--dataset", "custom", f"--data-root={tmp_path}")
    assert code == 0 and "not there: val, test (without val the last epoch is kept)" in out and err == ""
    assert out.splitlines()[-1].endswith("ready for training")


def test_check_finds_masks_of_nearly_everything_and_says_what_they_cover(capsys, tmp_path):
    shares = (0.01, 0.02, 0.95, 0.96, 1.0)
    rows = [{"image": f"{k}.png", "mask": f"m{k}.png", "expression": "x"} for k in range(5)]
    folder = custom(tmp_path, *rows)
    for k, share in enumerate(shares):
        picture(folder / f"{k}.png", (100, 10), value=k)
        mask = np.zeros(1000, bool)
        mask[:round(1000 * share)] = True
        Image.fromarray(mask.reshape(10, 100)).save(folder / f"m{k}.png")
    code, out, _ = check(capsys, "--dataset", "custom", "--data-root", folder)
    assert code == 0 and "0 empty, 0 resized, 2 full: ready for training" in out
    assert [line.split("sample ")[1] for line in out.splitlines() if line.startswith("full ")] == [
        "m3: its mask covers 96.0% of it", "m4: its mask covers 100.0% of it"]
    assert "5 different pictures; the median mask covers 95.0% of its picture" in out
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": "0.png"}])))
    _, out, _ = check(capsys, "--dataset", "custom", "--data-root", folder)
    assert "0 empty, 0 resized, 1 entry, 2 full: 1 problems would stop" in out


def test_check_says_what_of_val_and_test_is_in_train(capsys, tmp_path):
    layouts.write("refsegrs", tmp_path, splits={"train": [0, 1], "val": [1, 2], "test": [3]})
    code, out, _ = check(capsys, "--dataset", "refsegrs", "--data-root", tmp_path)
    assert "4 different pictures, 1 of val's 2 are in train too, 0 of test's 1 are in train too;" in out
    assert "train  8 expressions (published 2172: differs by -2164), of 8 objects in 2 pictures" in out
    assert "the paper counts 151, 31 and 103 scenes" in out.splitlines() and code == 1
    data.read("refsegrs", tmp_path, "val")[0].image.unlink()
    _, out, _ = check(capsys, "--dataset", "refsegrs", "--data-root", tmp_path)
    assert out.count("no such file") == 1 and "1 missing" in out
    code, _, _ = check(capsys, "--dataset", "refsegrs", "--data-root", tmp_path, "--categories", "seen")
    assert "refsegrs takes only 'all'" in code
    layouts.write("rrsisd", tmp_path / "r", splits={"train": [0], "val": [1], "test": [0]})  # under other numbers
    _, out, _ = check(capsys, "--dataset", "rrsisd", "--data-root", tmp_path / "r")
    assert "2 different pictures, 0 of val's 1 are in train too, 1 of test's 1 are in train too;" in out
    assert "0 empty, 0 resized: the files are sound" in out
    assert "the authors' pickle holds one sentence for each object" in out


def test_check_lists_every_bad_file_of_a_picture(capsys, tmp_path):
    rows = [{"image": "a.png", "mask": f"m{k}.png", "expression": "x"} for k in range(5)]
    folder = custom(tmp_path, *rows)
    for k in range(4):
        Image.fromarray(blob()).save(folder / f"m{k}.png")
    (folder / "m1.png").write_bytes(b"")
    Image.fromarray(blob(32)).save(folder / "m2.png")
    code, out, _ = check(capsys, "--dataset", "custom", "--data-root", folder)
    assert code == 1 and "1 missing, 1 unreadable, 1 mismatch, 0 empty, 0 resized: 3 problems would stop" in out
    (folder / "a.png").unlink()
    _, out, _ = check(capsys, "--dataset", "custom", "--data-root", folder)
    assert "2 missing, 1 unreadable, 0 mismatch" in out and "median" in out
    for path in folder.glob("m*.png"):
        path.unlink()
    custom(folder, {**rows[0], "mask_value": 1}, {**rows[1], "mask": layouts.polygons(blob())})
    (folder / "a.png").unlink()                                   # a polygon is not drawn without its picture's size
    _, out, _ = check(capsys, "--dataset", "custom", "--data-root", folder)
    assert "2 missing, 0 unreadable, 0 mismatch, 0 empty" in out and "\n0 different pictures\n" in out


def test_check_is_not_ready_without_training_samples(capsys, tmp_path):
    folder = custom(tmp_path, {"image": "a.png", "mask": "m.png", "expression": "x", "split": "test"})
    Image.fromarray(blob()).save(folder / "m.png")
    code, out, _ = check(capsys, "--dataset", "custom", "--data-root", folder)
    assert code == 1 and out.splitlines()[-1].endswith("there are no training samples")


def test_list_writes_a_line_per_sample(capsys, tmp_path, monkeypatch):
    folder = custom(tmp_path / "ä", {"image": "a.png", "mask": "m.png", "expression": ["ein Schiff", "船"]},
                    {"image": "a.png", "mask": "m.png", "expression": "x", "split": "val"})
    Image.fromarray(blob()).save(folder / "m.png")
    with monkeypatch.context() as elsewhere:                              # where another encoding is the usual one
        elsewhere.setattr(Path, "write_text", lambda path, text, encoding="ascii": path.write_bytes(
            text.encode(encoding)))
        code, _, _ = check(capsys, "--dataset", "custom", "--data-root", folder, "--list", tmp_path / "list.jsonl")
    assert '"ein Schiff"' in (written := (tmp_path / "list.jsonl").read_text(encoding="utf-8")) and '"船"' in written
    lines = [json.loads(line) for line in written.splitlines()]
    assert lines == [{"id": name, "image": str(folder / "a.png"), "expression": text, "split": split}
                     for name, text, split in (("m", "ein Schiff", "train"), ("m-2", "船", "train"), ("m", "x", "val"))]
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["list.jsonl", "ä"]
    layouts.write("refcoco", tmp_path, scenes=1)
    two = tmp_path / "two.jsonl"
    check(capsys, "--dataset", "refcoco", "--data-root", tmp_path, "--list", two, "--split", "val,testA+testB")
    found = [json.loads(line) for line in two.read_text().splitlines()]
    assert Counter(line["split"] for line in found) == {"val": 12, "testA+testB": 24}


def test_check_counts_resized_masks_of_rrsisd(capsys, tmp_path):
    refer(tmp_path, [layouts.rle(box(8, 8))], size=(8, 8), actual=(8, 9))
    code, out, _ = check(capsys, "--dataset", "rrsisd", "--data-root", tmp_path)
    assert code == 1 and "0 empty, 1 resized: the files are sound" in out
    assert "mask of 8x8 is resized to the image's 9x8" in out


def test_check_says_ok_where_counts_are_the_published_ones(capsys, tmp_path, monkeypatch):
    layouts.write("refcoco", tmp_path, splits={"val": 1})
    monkeypatch.setitem(data.DATASETS["refcoco"].published, "val", {"refs": 4, "images": 1, "expressions": 13})
    _, out, _ = check(capsys, "--dataset", "refcoco", "--data-root", tmp_path)
    assert "4 refs (published 4: OK), 1 images (published 1: OK), 12 expressions (published 13: differs by -1)" in out


PUBLISHED = {  # expressions, or refs, images and expressions, as the papers and the sets' own READMEs count them
    "refsegrs": {"train": (2172,), "val": (431,), "test": (1817,)},
    "rrsisd": {"train": (12181,), "val": (1740,), "test": (3481,)},
    "risbench": {"train": (26300,), "val": (10013,), "test": (16159,)},
    "refcoco": {"train": (42404, 16994, 120624), "val": (3811, 1500, 10834), "testA": (1975, 750, 5657),
                "testB": (1810, 750, 5095)},
    "refcoco+": {"train": (42278, 16992, 120191), "val": (3805, 1500, 10758), "testA": (1975, 750, 5726),
                 "testB": (1798, 750, 4889)},
    "refcocog-umd": {"train": (42226, 21899, 80512), "val": (2573, 1300, 4896), "test": (5023, 2600, 9602)},
    "refcocog-google": {"train": (44822, 24698, 85474), "val": (5000, 4650, 9536)}}
WHOLE = {"refsegrs": 4420, "rrsisd": 17402, "risbench": 52472, "refcoco": 142210, "refcoco+": 141564,
         "refcocog-umd": 95010, "refcocog-google": 95010}
SEEN = {"refcoco": ((35473, 3175, 3200), (445, 394)), "refcoco+": ((35375, 3171, 3189), (444, 394)),   # CGFormer's
        "refcocog-umd": ((33093, 2000, 3935), (386, 759)), "refcocog-google": ((35105, 3923), (760,))}


@pytest.mark.parametrize("dataset", PUBLISHED)
def test_published_numbers(dataset):
    """Those of the splits add up to those of the whole, where that is published by itself."""
    benchmark = data.DATASETS[dataset]
    assert {split: tuple(counts.values()) for split, counts in benchmark.published.items()} == PUBLISHED[dataset]
    assert benchmark.splits == tuple(PUBLISHED[dataset])
    assert all(list(counts) in (["expressions"], ["refs", "images", "expressions"])
               for counts in benchmark.published.values())
    assert sum(counts[-1] for counts in PUBLISHED[dataset].values()) == WHOLE[dataset]
    if dataset in SEEN:
        seen, unseen = SEEN[dataset]
        assert benchmark.reference == {"all": {"train": PUBLISHED[dataset]["train"][0]}, "seen": dict(zip(
            ("train", "val", "test"), seen, strict=False)), "unseen": dict(zip(("val", "test"), unseen, strict=False))}


def test_check_prints_reference_counts_of_categories(capsys, tmp_path):
    layouts.write("refcoco-union", tmp_path)
    _, out, _ = check(capsys, "--dataset", "refcoco", "--data-root", tmp_path, "--categories", "seen")
    refs = {split: {s.instance for s in data.read("refcoco", tmp_path, split, categories="seen")}
            for split in ("train", "testA", "testB")}
    assert f"train  seen: {len(refs['train'])} refs (published 35473: differs" in out
    assert f"test   seen: {len(refs['testA'] | refs['testB'])} refs (published 3200: differs" in out
    _, val, _ = check(capsys, "--dataset", "refcoco", "--data-root", tmp_path, "--categories", "seen", "--split", "val")
    assert "val    seen: " in val and "test   seen" not in val and "train  seen" not in val
    assert "expressions (published" not in out and "images (published" not in out      # those count all categories
    assert "refs of" not in out                                                        # that is the union's
    _, out, _ = check(capsys, "--dataset", "refcoco-union", "--data-root", tmp_path, "--categories", "unseen")
    assert "published 445" in out and "35473" not in out and "held out" not in out and " refs of refcoco\n" in out
    _, out, _ = check(capsys, "--dataset", "refcoco-union", "--data-root", tmp_path, "--categories", "seen")
    assert "published 3175" in out and "refs of refcocog-umd, of 33093" in out and "train  seen:" not in out
    _, out, _ = check(capsys, "--dataset", "refcoco-union", "--data-root", tmp_path)
    assert "8 refs of refcoco, of 42404" in out and "published 3811" in out
    assert "published 42404" not in out and "published 120624" not in out              # its training part is smaller
    _, out, _ = check(capsys, "--dataset", "refcoco-union", "--data-root", tmp_path, "--split", "val")
    assert "published 3811" in out and "refs of" not in out


def test_command_line(tmp_path, capsys, monkeypatch):
    layouts.write("rrsisd", tmp_path / "data", splits={"train": 1, "val": 1, "test": 1})
    done = subprocess.run([sys.executable, "data.py", "--dataset", "rrsisd", "--data-root", tmp_path], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "rrsisd: 12 images" in done.stdout, done.stderr
    assert "4 expressions (published 1740: differs by -1736)" in done.stdout
    monkeypatch.chdir(tmp_path)                                    # where nothing is said, the folder data
    monkeypatch.setattr(sys, "argv", ["data.py", "--dataset=rrsisd"])
    code, out, _ = check(capsys)
    assert code == 1 and out == done.stdout
    for words in (["--split=val"], ["--dataset=rrsisd_"], ["--dataset=rrsisd", "--categories=half"]):
        monkeypatch.setattr(sys, "argv", ["data.py", *words])
        code, _, err = check(capsys)
        assert code == 2 and "usage: data.py" in err


def test_a_bar_runs_over_the_images_and_ctrl_c_ends_this_process_alone(tmp_path, capsys, monkeypatch):
    layouts.write("custom", tmp_path, splits={"train": 3})
    started = []

    def pool(**settings):
        started.append(settings)
        return ThreadPool(2)

    monkeypatch.setattr(data, "Pool", pool)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, _, err = check(capsys, "--dataset", "custom", "--data-root", tmp_path)
    assert code == 0 and "images:   0%" in err and "3/3" in err
    assert started == [{"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_a_name_stops_nothing(encoding, tmp_path, monkeypatch):
    folder = custom(tmp_path, *({"image": name, "mask": "m.png", "expression": "船"} for name in ("图.png", "a.png")))
    Image.fromarray(blob()).save(folder / "m.png")
    with io.TextIOWrapper(io.BytesIO(), encoding=encoding) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit) as stopped:
            data.main(["--dataset", "custom", "--data-root", str(folder)])
        terminal.flush()
        shown = terminal.buffer.getvalue()
    assert stopped.value.code == 1 and b"?.png: no such file" in shown and b"1 missing" in shown


def test_check_of_a_wrong_folder_is_one_line(capsys, tmp_path):
    code, out, _ = check(capsys, "--dataset", "rrsisd", "--data-root", tmp_path / "nowhere")
    assert code.startswith("error: rrsisd: no refs(unc).p") and "\n" not in code and out == ""
