"""models/__init__.py: settings by name, exports that leave out only what a named source can give back."""

import copy
import dataclasses
import json
import os
import resource
import shutil

import huggingface_hub
import pytest
import sentencepiece
import torch
import toy
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import data
import models


@pytest.fixture(autouse=True)
def known():
    toy.register()


def test_unknown_model_names_those_there_are():
    with pytest.raises(ValueError, match="no such model; there are crobim_u"):
        models.paper("lavt")


def test_the_words_that_settings_and_exports_take():
    """DESIGN 4 and 6; an export is text and tensors, never a pickle."""
    assert models.CHOICES == {
        "schedule": ("poly", "cosine", "step", "constant"), "protocol": ("resized", "original"),
        "empty": ("zero", "one", "skip"), "precision": ("bf16", "fp16", "fp32"),
        "select": ("mIoU", "oIoU", "mIoU+oIoU", "last")}
    assert set(models.EXPORTED) == {"*.json", "*.safetensors", "*.txt", "*.spm", "*.model"}


@dataclasses.dataclass(frozen=True)
class Kinds:
    number: int = 1
    share: float = 0.5
    switch: bool = False
    word: str = "a"
    sizes: tuple[int, ...] = (1, 2)
    longest: int | None = None
    rate: float | None = None


@pytest.mark.parametrize("setting, value", [
    ("number=3", 3), ("number=-3", -3), ("share=0", 0.0), ("share=1e-3", 1e-3), ("switch=True", True),
    ("switch=true", True), ("switch=FALSE", False), ("word=none", "none"), ("word=3", "3"), ("word=a=b", "a=b"),
    ("word='b c'", "b c"), ("word=True", "True"), ("sizes=[3,4]", (3, 4)), ("sizes=(3,)", (3,)), ("longest=7", 7),
    ("longest=none", None), ("rate=None", None), ("rate=2", 2.0)])
def test_a_setting_becomes_a_value_of_its_field(setting, value):
    config, _ = models.override(Kinds(longest=1, rate=1.0), {}, [setting])
    found = getattr(config, setting.partition("=")[0])
    assert (found, type(found)) == (value, type(value))


def test_settings_reach_config_and_recipe():
    config, recipe = models.override(toy.Config(), toy.RECIPE, ["width=16", "dropout=0", "lr=1e-3", "schedule=cosine"])
    assert (config.width, config.dropout, recipe["lr"], recipe["schedule"]) == (16, 0.0, 1e-3, "cosine")
    assert toy.RECIPE["schedule"] == "poly"                                 # a copy was changed
    for text, phases in (("none", None), ("{'a': 0.25, 'b': 0.75}", {"a": 0.25, "b": 0.75})):
        assert models.override(Kinds(), {"phases": {"a": 1.0}}, [f"phases={text}"])[1] == {"phases": phases}
    for setting, field in (("clip=some/tower", "some/tower"), ("clip=0.5", "google/siglip2-so400m-patch16-512")):
        config, recipe = models.override(models.paper("rsrefseg2").Config(), {"clip": 3.0}, [setting])
        assert (config.clip, recipe["clip"]) == (field, 0.5 if setting == "clip=0.5" else 3.0)


@pytest.mark.parametrize("setting, message", [
    ("nubmer=3", "has a field 'nubmer'; there are longest, lr, number"), ("number", "number: expected field=value"),
    ("number=wide", "number takes int, got str"), ("number=1.5", "number takes int, got float"),
    ("number=True", "number takes int, got bool"), ("switch=1", "switch takes bool, got int"),
    ("share=True", "share takes float, got bool"), ("lr=fast", "lr takes float, got str"),
    ("longest=0.5", "longest takes int or NoneType, got float"), ("word=[1]", "word takes str, got list"),
    ("word=(1,)", "word takes str, got tuple"), ("word={}", "word takes str, got dict"),
    ("sizes=3", "sizes takes tuple, got int"), ("share=none", "share takes float, got NoneType"),
    ("phases=3", "phases takes dict or NoneType, got int")])
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        models.override(Kinds(), {"lr": 0.1, "phases": None}, [setting])


@pytest.mark.parametrize("changes", [
    {"lr": 0.0}, {"epochs": 1, "batch_size": 1, "micro_batch": 1}, {"warmup": 0.25}, {"phases": {"a": 1}},
    {"phases": {"a": 0.1, "b": 0.2, "c": 0.7}}, {"phases": {}}, {"checkpointing": True},
    *({field: word} for field, words in models.CHOICES.items() for word in words)])
def test_a_recipe_that_a_run_can_follow_passes(changes):
    drop = {"drop_epochs": 10, "drop_factor": 0.1}                          # what schedule=step takes
    models.check_recipe(toy.RECIPE | drop | changes)
    models.check_recipe(drop | changes)


@pytest.mark.parametrize("changes, message", [
    *(({field: "other"}, f"^{field}=other: there are {words[0]}, {words[1]}")
      for field, words in models.CHOICES.items()),
    *(({field: 0}, f"^{field}=0: expected a number of at least 1")
      for field in ("epochs", "batch_size", "micro_batch")),
    ({"schedule": "step", "drop_factor": 0.1}, "^schedule=step: this paper's recipe has no drop_epochs and drop_fac"),
    ({"lr": -1e-9}, "^lr=-1e-09: expected a number of at least 0"), ({"lr": float("nan")}, "lr=nan"),
    ({"epochs": float("inf")}, "epochs=inf"),
    *(({"phases": phases}, "^phases=.*expected a share of the run for each phase, 1 together") for phases in (
        {"a": 0.5}, {"a": 1, "b": 0}, {"a": 1.5, "b": -0.5}, {"a": True}, {"a": "1"}, {"a": 0.5, "b": None}))])
def test_a_recipe_that_no_run_can_follow_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        models.check_recipe(toy.RECIPE | changes)


@pytest.mark.parametrize("name", [name for name in models.PAPERS if name != "toy"])
def test_config_survives_json(name, capsys):
    for config in (models.paper(name).Config(), models.paper(name).Config.tiny()):
        values = json.loads(json.dumps(config.__dict__))
        assert models.config_from(name, values) == config
    assert capsys.readouterr().out == ""                                    # nothing is lacking


WORDS = tuple(f"word{k}" for k in range(98))         # with the toy's two marks, its vocab_size of 100


def written_run(folder, model, words=WORDS):
    folder.mkdir()
    values = {"model": "toy", "config": model.config.__dict__, "recipe": toy.RECIPE, "dataset": "synthetic",
              "data_root": "/home/me/data", "limit": 0, "small": False}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(json.dumps({"words": list(words)}))
    models.save(model, folder / "best.safetensors")


def test_round_trip_through_a_run_folder(tmp_path):
    model = models.build("toy", toy.Config(width=4))
    written_run(tmp_path / "run", model)
    for run in (tmp_path / "run", tmp_path / "run" / "best.safetensors"):
        loaded = models.load(run)
        assert not loaded.training and loaded.config == model.config and loaded.tokenizer.words == list(WORDS)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert loaded.tokenizer(["word0 ship word97"])[0].tolist() == [[2, 1, 99, *[0] * 9]]        # unknown 1, pad 0
        assert loaded.run == json.loads((tmp_path / "run/config.json").read_text())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])


def test_settings_for_a_trained_model_are_taken_or_refused(tmp_path):
    written_run(tmp_path / "run", models.build("toy", toy.Config()))
    loaded = models.load(tmp_path / "run", ["dropout=0.5", "empty=one"])
    assert loaded.config.dropout == loaded.dropout.p == 0.5 and loaded.run["recipe"] == {**toy.RECIPE, "empty": "one"}
    assert (loaded.run["dataset"], loaded.run["recipe"]["lr"]) == ("synthetic", 1e-2)
    with pytest.raises(ValueError, match="empty=none: there are zero"):
        models.load(tmp_path / "run", ["empty=none"])


def test_the_best_weights_come_before_the_last_and_those_before_an_export(tmp_path):
    written_run(tmp_path / "run", models.build("toy", toy.Config()))
    for name in ("best", "last", "model"):
        model = models.build("toy", toy.Config())
        with torch.no_grad():
            model.second.bias.fill_(len(name) + ord(name[0]))
        models.save(model, tmp_path / f"run/{name}.safetensors")
    for name in ("best", "last", "model"):
        assert models.load(tmp_path / "run").second.bias.item() == len(name) + ord(name[0])
        assert models.weights_file(tmp_path / "run/model.safetensors", tmp_path / "run").stem == "model"
        (tmp_path / f"run/{name}.safetensors").unlink()


class Pretrained(toy.Toy):
    """A toy whose frozen part comes from a source."""

    value = 0.5

    def load_pretrained(self):
        torch.nn.init.constant_(self.frozen.weight, self.value)
        torch.nn.init.zeros_(self.frozen.bias)
        return {"frozen.": "hub/frozen"}


def test_only_unchanged_frozen_tensors_of_a_source_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "Toy", Pretrained)
    model = models.build("toy", toy.Config(batch_norm=True))        # its statistics do not learn, but have no source
    sources = model.load_pretrained()
    model.param_groups(toy.RECIPE)
    models.remember_sources(model, {"image.": "hub/image", **sources} | {"image.0": "what learns is no one's"})
    assert set(model.unchanged) == {"frozen.weight", "frozen.bias", "image.1.running_mean", "image.1.running_var",
                                    "image.1.num_batches_tracked"}
    models.remember_sources(model, sources)
    written_run(tmp_path / "run", model)
    path = tmp_path / "run" / "best.safetensors"
    tensors, left_out = models.read_weights(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "left_out": json.dumps(left_out)}
    assert set(left_out) == {"frozen.weight", "frozen.bias"} and not set(left_out) & set(tensors)
    assert torch.equal(models.load(tmp_path / "run").frozen.weight, model.frozen.weight)

    with torch.no_grad():
        model.frozen.bias += 1                      # changed after all, so it must be in the file
    models.save(model, path)
    assert set(models.read_weights(path)[1]) == {"frozen.weight"}
    assert torch.equal(models.load(tmp_path / "run").frozen.bias, model.frozen.bias)

    monkeypatch.setattr(Pretrained, "value", 0.25)  # the source has another version now
    with pytest.raises(ValueError, match="another version of hub/frozen.*frozen.weight"):
        models.load(tmp_path / "run")


def test_wrong_or_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--checkpoint .*nowhere: no such run folder"):
        models.load(tmp_path / "nowhere")
    run = tmp_path / "run"
    written_run(run, models.build("toy", toy.Config()))
    path = run / "best.safetensors"
    with pytest.raises(ValueError, match=r"does not fit this configuration: 4 tensors .* \(8,\), here \(9,\)"):
        models.load(run, ["width=9"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="best.safetensors is truncated"):
        models.load(run)
    other = models.build("toy", toy.Config())
    other.extra = torch.nn.Linear(2, 2)
    models.save(other, path)
    with pytest.raises(ValueError, match="does not fit this configuration: 2 tensors differ by name or shape.*extra"):
        models.load(run)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no best.safetensors or last"):
        models.load(run)
    (run / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        models.load(run)


@pytest.mark.parametrize("fields, message", [
    ({"depth": 3}, "another version of toy, which knows depth=2 only: depth=3"),
    ({"heads": 3}, "another version of toy: heads=3"),
    ({"sizes": [2, 1]}, r"sizes=\(1, 2\) only: sizes=\(2, 1\)")])
def test_a_field_that_is_gone_is_refused_at_another_value(fields, message):
    with pytest.raises(ValueError, match=message):
        models.config_from("toy", {**toy.Config().__dict__, **fields})
    with pytest.raises(ValueError, match=message):
        models.settings_from("toy", toy.Config().__dict__, {**toy.RECIPE, **fields})
    with pytest.raises(ValueError, match="another version of toy: a=0"):                    # the first of several
        models.config_from("toy", {**toy.Config().__dict__, **dict.fromkeys("fbedca", 0)})


def test_settings_of_an_older_version_are_accepted_and_what_they_lack_is_named(capsys):
    config = {**toy.Config(width=5).__dict__, "depth": 2, "sizes": [1, 2]}
    recipe = {**toy.RECIPE, **toy.RECIPE_TINY, "swing": 0.5, "lr": 0.5}
    assert models.settings_from("toy", config, recipe) == (
        toy.Config(width=5), {**toy.RECIPE, **toy.RECIPE_TINY, "lr": 0.5})
    assert capsys.readouterr().out == ""
    for part, field in ((config, "dropout"), (config, "batch_norm"), (recipe, "per_image")):
        del part[field]
    assert models.settings_from("toy", config, recipe) == (
        toy.Config(width=5, dropout=0.3), {**toy.RECIPE, "lr": 0.5})              # not as the tiny preset has it now
    assert "older version of toy" in (said := capsys.readouterr().out)
    assert "dropout=0.3  batch_norm=False  per_image=0" in said


@pytest.mark.parametrize("content, message", [
    ("[]", "holds no model, config, recipe"), ("null", "holds no model"), ("3", "holds no model"),
    ("{", "not valid JSON"), ({"model": "lavt"}, "no such model"),
    ({"recipe": [], "limit": "0"}, "holds no recipe, limit, as"),
    *(({key: None}, f"config.json holds no {key}, as train.py writes it")
      for key in ("model", "config", "recipe", "dataset", "data_root", "limit"))])
def test_a_config_file_of_another_form_is_named(tmp_path, content, message):
    written_run(tmp_path / "run", models.build("toy", toy.Config()))
    path = tmp_path / "run/config.json"
    values = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps({**values, **content}))
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "run")


@pytest.mark.parametrize("content, message", [
    ('{"words": ["a", "ship"]}', "tokenizer.json has 4 words and marks, the model 100"),
    ("[]", "holds no list of words"), ('{"words": 3}', "holds no list of words"), ("{", "holds no list of words")])
def test_a_word_list_of_another_run_is_named(tmp_path, content, message):
    written_run(tmp_path / "run", models.build("toy", toy.Config()))
    (tmp_path / "run/tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "run")


@pytest.mark.parametrize("left_out", ["[]", "3", '{"a": 3}', '{"a": ["hub"]}', "{", '{"b": ["hub", "0"], "a": "?"}'])
def test_a_header_of_another_form_is_named(tmp_path, left_out):
    save_file({"a": torch.zeros(1)}, tmp_path / "best.safetensors", metadata={"left_out": left_out})
    with pytest.raises(ValueError, match="best.safetensors is truncated or not a safetensors file of ours"):
        models.read_weights(tmp_path / "best.safetensors")


def test_a_file_of_tensors_alone_leaves_nothing_out(tmp_path):
    save_file({"a": torch.arange(2.0)}, tmp_path / "best.safetensors")
    tensors, left_out = models.read_weights(tmp_path / "best.safetensors")
    assert left_out == {} and tensors["a"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="gone.safetensors is truncated or not .*No such file"):
        models.read_weights(tmp_path / "gone.safetensors")


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "best.safetensors"
    models.save(models.build("toy", toy.Config()), path)
    before = path.read_bytes()

    def broken(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(models, "save_file", broken)
    with pytest.raises(ValueError, match="best.safetensors could not be written .disk full.*What stood there is whole"):
        models.save(models.build("toy", toy.Config()), path)
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["best.safetensors"]


@pytest.mark.parametrize("write", [
    lambda part: torch.save({"a": torch.zeros(100_000)}, part), lambda part: part.write_text("a" * 100_000),
    lambda part: save_file({"a": torch.zeros(100_000)}, part)], ids=["resume", "text", "export"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, write):
    (tmp_path / "kept").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with (pytest.raises(ValueError, match="kept could not be written"),
              models.put_in_place(tmp_path / "kept") as part):
            write(part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "kept").read_text() == "old" and [one.name for one in tmp_path.iterdir()] == ["kept"]


def test_files_are_synced_before_they_are_in_place_and_readable_as_the_umask_says(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("sync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    before = os.umask(0o026)
    try:
        models.save(models.build("toy", toy.Config()), tmp_path / "best.safetensors")
    finally:
        os.umask(before)
    assert order == ["sync", "replace"]
    assert (tmp_path / "best.safetensors").stat().st_mode & 0o777 == 0o640


def test_an_export_is_complete_in_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "Toy", Pretrained)
    model = models.build("toy", toy.Config())
    sources = model.load_pretrained()
    model.param_groups(toy.RECIPE)
    models.remember_sources(model, sources)
    written_run(tmp_path / "run", model)
    for _ in range(2):                                                      # a second one replaces the first
        models.export(tmp_path / "run", tmp_path / "exports/out")
    (tmp_path / "exports/out").rename(tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"config.json", "model.safetensors", "tokenizer.json"}
    was = json.loads((tmp_path / "run/config.json").read_text())
    assert json.loads((tmp_path / "out/config.json").read_text()) == was | {"data_root": "data"}    # no path of a user
    assert '{\n "model": "toy",\n' in (tmp_path / "out/config.json").read_text()              # a line a field
    assert models.read_weights(tmp_path / "out/model.safetensors")[1] == {}
    monkeypatch.setattr(Pretrained, "load_pretrained", lambda self: pytest.fail("the export is not complete"))
    for place in (tmp_path / "out", tmp_path / "out/model.safetensors"):
        loaded = models.load(place)
        assert loaded.tokenizer.words == list(WORDS) and loaded.config == model.config
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def published_words(folder):
    """A folder as BERT's tokenizer is published, with a hundred words."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ship", *(f"w{k}" for k in range(94))]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')


def written_run_of(name, folder, config):
    written_run(folder, models.build(name, config))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"model": name, "recipe": models.paper(name).RECIPE}))


def test_an_export_takes_the_published_tokenizer_with_it(tmp_path):
    published_words(tmp_path / "hub/bert-base-uncased")
    tiny = models.paper("crobim_u").Config.tiny()
    config = dataclasses.replace(tiny, pretrained=str(tmp_path / "hub"), vocab_size=100)
    written_run_of("crobim_u", tmp_path / "run", config)
    models.export(tmp_path / "run", tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(FileNotFoundError, match="bert-base-uncased"):
        models.load(tmp_path / "run")
    tokens, text_mask = models.load(tmp_path / "out").tokenizer(["Ship w3"])
    assert tokens[0, :4].tolist() == [2, 5, 9, 3] and text_mask.sum() == 4
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".part")]


def test_an_export_takes_a_sentencepiece_file_with_it(tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "text.txt").write_text("\n".join(f"the {word} on the left side of the pier" for word in WORDS))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "words"),
                                             vocab_size=60, hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "words.model").rename(tmp_path / "hub/beit3.spm")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "hub/beit3.spm")).get_piece_size()
    config = dataclasses.replace(models.paper("rs2sam2").Config.tiny(), pretrained=str(tmp_path / "hub"),
                                 vocab_size=pieces + 2 + 8, image_size=64, beit_size=48)
    written_run_of("rs2sam2", tmp_path / "run", config)
    before = models.load(tmp_path / "run").tokenizer(["the word7 of the pier"])
    models.export(tmp_path / "run", tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    after = models.load(tmp_path / "out").tokenizer(["the word7 of the pier"])
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"beit3.spm", "config.json", "model.safetensors"}


def test_an_export_takes_the_sizes_of_published_towers_with_it(tmp_path):
    """RSRefSeg 2 reads them in the towers' own files."""
    paper = models.paper("rsrefseg2")
    config = dataclasses.replace(paper.Config.tiny(), pretrained=str(tmp_path / "hub"), clip="any/clip", sam="any/sam")
    for name, sizes in zip(("clip", "sam"), paper.tower_configs(paper.Config.tiny()), strict=True):
        sizes.save_pretrained(tmp_path / "hub" / name)
    pieces = {piece: k for k, piece in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *WORDS])}
    transformers.GemmaTokenizer(vocab=pieces, merges=[]).save_pretrained(tmp_path / "hub/clip")
    written_run_of("rsrefseg2", tmp_path / "run", config)
    models.export(tmp_path / "run", tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    (tmp_path / "out").rename(tmp_path / "moved")
    model = models.load(tmp_path / "moved")
    assert model.tokenizer(["a ship"])[0].shape == (1, config.text_length)
    assert model.run["config"] | {"pretrained": 0} == json.loads(json.dumps(config.__dict__)) | {"pretrained": 0}


def test_a_model_on_the_hub_is_loaded_by_its_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    written_run(tmp_path / "run", models.build("toy", toy.Config(width=3)))
    models.export(tmp_path / "run", tmp_path / "hub")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/none":
            raise OSError("offline\nand more")
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert models.load("org/name").config.width == 3
    assert asked == [("org/name", models.EXPORTED)] and not any("bin" in one or "pt" in one for one in models.EXPORTED)
    with pytest.raises(FileNotFoundError, match="org/none: no such folder here, and not reached on the hub .offline.$"):
        models.load("org/none")
    written_run(tmp_path / "org", models.build("toy", toy.Config(width=5)))
    (tmp_path / "org").rename(tmp_path / "name")
    (tmp_path / "org").mkdir()
    (tmp_path / "name").rename(tmp_path / "org/name")
    assert models.load("org/name").config.width == 5
    for place in ("org/typo", "runs/of/mine", "runs", "my runs/best", tmp_path / "gone/run"):           # no org/name
        with pytest.raises(FileNotFoundError, match="no such run folder"):
            models.load(place)
    assert len(asked) == 2


def test_authors_weights_load_in_their_forms_without_a_tokenizer(tmp_path, monkeypatch):
    model = models.build("toy", toy.Config(width=6, text_length=5))
    torch.save({f"theirs.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "theirs.pth")
    given = toy.Config(text_length=5, width=9, pretrained="there")
    loaded = models.load_official("toy", tmp_path / "theirs.pth", config=given)
    assert not loaded.training and loaded.config == toy.Config(text_length=5, width=6)      # as ABLATIONS have it
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.run == {"model": "toy", "config": dataclasses.asdict(given) | {"width": 6},
                          "recipe": {**toy.RECIPE, "black_boxes": 0.5}}
    with pytest.raises(FileNotFoundError, match="on no hub"):
        loaded.tokenizer(["a ship"])
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file of the authors"):
        models.load_official("toy", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="does not fit this configuration: 1 tensors.*words.weight"):
        models.load_official("toy", save_without(tmp_path, model, "words.weight"))
    for name in ("icipnet", "crobim_u", "prompt_ris"):
        with pytest.raises(ValueError, match=f"authors of {name} have released no trained weights"):
            models.load_official(name, tmp_path / "theirs.pth")

    found = []

    def tokenizer(config):
        found.append(config.pretrained)
        return data.WordTokenizer(["ship"], 12, toy.SPECIAL_TOKENS)

    monkeypatch.setattr(toy, "tokenizer", tokenizer)
    usual = models.load_official("toy", tmp_path / "theirs.pth")
    assert usual.config == toy.Config(width=6) and usual.tokenizer.length == 12
    for one, length in ((loaded, 5), (loaded, 5), (usual, 12)):
        assert one.tokenizer(["a ship"])[0].tolist() == [[1, 2, *[0] * (length - 2)]]
    assert found == ["there", "hub"]                                        # once each; "none" would have no words
    longer = copy.copy(loaded.tokenizer)
    longer.length += 1
    assert longer(["a ship"])[1].shape == (1, 6) and loaded.tokenizer(["a ship"])[1].shape == (1, 5)


def save_without(folder, model, missing):
    torch.save({name: one for name, one in model.state_dict().items() if name != missing}, folder / "less.pth")
    return folder / "less.pth"


def test_a_card_that_is_not_there_is_named(tmp_path, monkeypatch):
    written_run(tmp_path / "run", models.build("toy", toy.Config()))
    with pytest.raises(ValueError, match="device=cuda: torch sees no CUDA device"):
        models.load(tmp_path / "run", device="cuda")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(toy.Toy, "to", lambda self, device: asked.append(device))
    models.load(tmp_path / "run", device="cuda:0")
    assert asked == ["cuda:0"]


def test_a_start_takes_what_fits_and_each_word_its_own_vector(tmp_path):
    old = models.build("toy", toy.Config(vocab_size=5))
    written_run(tmp_path / "run", old, ["ship", "red", "plane"])
    theirs, start = old.state_dict(), models.starting_weights("toy", tmp_path / "run")
    assert start[1:] == ({}, ["ship", "red", "plane"])
    model = models.build("toy", toy.Config(vocab_size=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = models.start_from(model, start, "run", ["tank", "red"])
    state = model.state_dict()
    assert said == f"run: {len(theirs)} of its {len(theirs)} tensors taken; 0 of the model's are new"
    assert torch.equal(state["words.weight"][[0, 1, 3]], theirs["words.weight"][[0, 1, 3]])     # marks and "red"
    assert torch.equal(state["words.weight"][2], before["words.weight"][2])                     # "tank" is new
    assert all(torch.equal(state[name], theirs[name]) for name in theirs if name != "words.weight")

    def taken(words, **changes):
        model = models.build("toy", toy.Config(**{"vocab_size": 5, **changes}))
        return models.start_from(model, start, "run", words), model

    said, _ = taken(["ship", "red", "plane"], width=9)
    assert said == ("run: 3 of its 7 tensors taken; 4 of the model's are new "
                    "(image.0.bias, image.0.weight, second.weight, words.weight)")
    statistics = "image.1.bias, image.1.num_batches_tracked, image.1.running_mean, image.1.running_var, image.1.weight"
    assert taken(["ship", "red", "plane"], batch_norm=True)[0].endswith(f"; 5 of the model's are new ({statistics})")
    assert taken(None, vocab_size=6, batch_norm=True)[0].endswith(f"; 6 of the model's are new ({statistics}, ...)")
    for words, changed in ((None, False), (["plane", "red", "ship"], True)):                    # None: published words
        _, model = taken(words)
        assert torch.equal(model.words.weight, theirs["words.weight"]) != changed
    model = models.build("toy", toy.Config(vocab_size=5))
    models.start_from(model, (theirs, {}, None), "file.pth", ["plane", "red", "ship"])
    assert torch.equal(model.words.weight, theirs["words.weight"])
    with pytest.raises(ValueError, match="run: none of its 1 tensors fits"):
        models.start_from(model, ({"strange": torch.zeros(1)}, {}, None), "run", None)


def test_a_start_remaps_no_other_table_of_vectors():
    model, words = models.build("toy", toy.Config(vocab_size=5)), ["ship", "red", "plane"]
    model.places = torch.nn.Embedding(4, 8)
    tensors = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    models.start_from(model, (tensors, {}, words[::-1]), "run", words)
    assert torch.equal(model.places.weight, tensors["places.weight"])
    assert torch.equal(model.words.weight, tensors["words.weight"][[0, 1, 4, 3, 2]])
    tensors["words.weight"] = torch.randn(4, 8)                             # an architecture with one mark fewer
    models.start_from(model, (tensors, {}, words[::-1]), "run", words)
    assert torch.equal(model.words.weight[[0, 2, 3, 4]], tensors["words.weight"][[0, 3, 2, 1]])


def test_a_start_from_weights_that_leave_a_source_out_needs_the_source():
    frozen = {"frozen.weight": ("hub/frozen", "0"), "frozen.bias": ("hub/frozen", "1")}
    model = models.build("toy", toy.Config())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    with pytest.raises(ValueError, match="--start run leaves out 2 tensors of hub/frozen; say --set pretrained=hub"):
        models.start_from(model, (tensors, frozen, None), "run", None)
    hub = models.build("toy", toy.Config(pretrained="hub"))
    assert models.start_from(hub, (tensors, frozen, None), "run", None) == (
        "run: 5 of its 5 tensors taken; 0 of the model's are new")


def test_a_start_reads_a_run_weights_in_one_and_the_authors_file(tmp_path, monkeypatch):
    model = models.build("toy", toy.Config())
    written_run(tmp_path / "run", model)
    for place in (tmp_path / "run", tmp_path / "run/best.safetensors"):
        tensors, left_out, words = models.starting_weights("toy", place)
        assert tensors.keys() == model.state_dict().keys() and (left_out, words) == ({}, list(WORDS))
    torch.save({"theirs.second.bias": torch.ones(1)}, tmp_path / "theirs.pth")
    assert models.starting_weights("toy", tmp_path / "theirs.pth") == ({"second.bias": torch.ones(1)}, {}, None)
    with pytest.raises(FileNotFoundError, match="--start .*nowhere: no such run folder"):
        models.starting_weights("toy", tmp_path / "nowhere")
    values = json.loads((tmp_path / "run/config.json").read_text())
    values["config"]["pretrained"] = "hub"                                  # its words are published: none to match
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    assert models.starting_weights("toy", tmp_path / "run")[2] is None

    monkeypatch.setattr(toy, "RENAMED", {"first.": "image."}, raising=False)
    before = {name.replace("image.", "first."): torch.ones_like(one) for name, one in model.state_dict().items()}
    models.start_from(model, (before, {}, None), "run", None)
    assert (model.image[0].weight == 1).all()
    models.load_own_state(model, {name: one * 2 for name, one in before.items()}, {}, "a run of before")
    assert (model.image[0].weight == 2).all()
