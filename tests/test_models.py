"""models/__init__.py: settings by name, exports that leave out only what a named source can give back."""

import dataclasses
import json
import os
import resource
import shutil

import huggingface_hub
import pytest
import torch
import toy
from safetensors.torch import save_file

import models


@pytest.fixture(autouse=True)
def known():
    toy.register()


def test_unknown_model_names_those_there_are():
    with pytest.raises(ValueError, match="no such model; there are crobim_u"):
        models.paper("lavt")


def test_settings_reach_config_and_recipe_with_their_types():
    config, recipe = models.override(toy.Config(), toy.RECIPE, ["width=16", "dropout=0", "lr=1e-3", "schedule=cosine"])
    assert (config.width, config.dropout, recipe["lr"], recipe["schedule"]) == (16, 0.0, 1e-3, "cosine")
    assert type(config.dropout) is float
    assert toy.RECIPE["schedule"] == "poly"
    config, recipe = models.override(toy.Config(pretrained="hub"), {"phases": {"a": 1.0}},
                                     ["pretrained=none", "phases=none"])
    assert (config.pretrained, recipe["phases"]) == ("none", None)          # a word in one, nothing in the other
    for setting, field in (("clip=some/tower", "some/tower"), ("clip=0.5", "google/siglip2-so400m-patch16-512")):
        config, recipe = models.override(models.paper("rsrefseg2").Config(), {"clip": 3.0}, [setting])
        assert (config.clip, recipe["clip"]) == (field, 0.5 if setting == "clip=0.5" else 3.0)


@pytest.mark.parametrize("setting, message", [
    ("widht=3", "has a field 'widht'"), ("width", "expected field=value"), ("width=wide", "width takes int"),
    ("width=1.5", "width takes int"), ("batch_norm=1", "batch_norm takes bool"), ("lr=fast", "lr takes float"),
    ("width=True", "width takes int"),
])
def test_wrong_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        models.override(toy.Config(), toy.RECIPE, [setting])


@pytest.mark.parametrize("name", [name for name in models.PAPERS if name != "toy"])
def test_config_survives_json(name):
    for config in (models.paper(name).Config(), models.paper(name).Config.tiny()):
        values = json.loads(json.dumps(config.__dict__))
        assert models.config_from(name, values) == config


WORDS = tuple(f"word{k}" for k in range(98))         # with the toy's two marks, its vocab_size of 100


def written_run(folder, model, words=WORDS):
    folder.mkdir()
    values = {"model": "toy", "config": model.config.__dict__, "recipe": toy.RECIPE, "dataset": "synthetic",
              "data_root": "data", "limit": 0, "small": False}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(json.dumps({"words": list(words)}))
    models.save(model, folder / "best.safetensors")


def test_round_trip_through_a_run_folder(tmp_path):
    model = models.build("toy", toy.Config(width=4))
    written_run(tmp_path / "run", model)
    for run in (tmp_path / "run", tmp_path / "run" / "best.safetensors"):
        loaded = models.load(run)
        assert not loaded.training and loaded.config == model.config and loaded.tokenizer.words == list(WORDS)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])


class Pretrained(toy.Toy):
    """A toy whose frozen part comes from a source."""

    value = 0.5

    def load_pretrained(self):
        torch.nn.init.constant_(self.frozen.weight, self.value)
        torch.nn.init.zeros_(self.frozen.bias)
        return {"frozen.": "hub/frozen"}


def test_only_unchanged_frozen_tensors_of_a_source_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "Toy", Pretrained)
    model = models.build("toy", toy.Config())
    sources = model.load_pretrained()
    model.param_groups(toy.RECIPE)
    models.remember_sources(model, sources)
    written_run(tmp_path / "run", model)
    path = tmp_path / "run" / "best.safetensors"
    tensors, left_out = models.read_weights(path)
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
    with pytest.raises(FileNotFoundError, match="nowhere: no such run folder"):
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
    ("{", "not valid JSON"), ({"recipe": None}, "config.json holds no recipe"), ({"config": []}, "holds no config"),
    ({"model": "lavt"}, "no such model")])
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


@pytest.mark.parametrize("left_out", ["[]", "3", '{"a": 3}', '{"a": ["hub"]}', "{"])
def test_a_header_of_another_form_is_named(tmp_path, left_out):
    save_file({"a": torch.zeros(1)}, tmp_path / "best.safetensors", metadata={"left_out": left_out})
    with pytest.raises(ValueError, match="best.safetensors is truncated or not a safetensors file of ours"):
        models.read_weights(tmp_path / "best.safetensors")


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
    before = os.umask(0o027)
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
    models.export(tmp_path / "run", tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {"config.json", "model.safetensors", "tokenizer.json"}
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


def test_an_export_takes_the_published_tokenizer_with_it(tmp_path):
    published_words(tmp_path / "hub/bert-base-uncased")
    tiny = models.paper("crobim_u").Config.tiny()
    config = dataclasses.replace(tiny, pretrained=str(tmp_path / "hub"), vocab_size=100)
    model = models.build("crobim_u", config)
    written_run(tmp_path / "run", model)
    values = json.loads((tmp_path / "run/config.json").read_text())
    values |= {"model": "crobim_u", "recipe": models.paper("crobim_u").RECIPE}
    (tmp_path / "run/config.json").write_text(json.dumps(values))
    models.export(tmp_path / "run", tmp_path / "out")
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(FileNotFoundError, match="bert-base-uncased"):
        models.load(tmp_path / "run")
    tokens, text_mask = models.load(tmp_path / "out").tokenizer(["Ship w3"])
    assert tokens[0, :4].tolist() == [2, 5, 9, 3] and text_mask.sum() == 4
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".part")]


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
    with pytest.raises(FileNotFoundError, match="no such run folder"):
        models.load("org/typo")
    assert len(asked) == 2


def test_authors_weights_load_in_their_forms_without_a_tokenizer(tmp_path):
    model = models.build("toy", toy.Config(width=6, text_length=5))
    torch.save({f"theirs.{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "theirs.pth")
    loaded = models.load_official("toy", tmp_path / "theirs.pth", config=toy.Config(text_length=5, width=9))
    assert not loaded.training and loaded.config.width == 6 and loaded.tokenizer.length == 5
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert loaded.run["recipe"] == {**toy.RECIPE, "black_boxes": 0.5} and loaded.run["model"] == "toy"
    with pytest.raises(FileNotFoundError, match="on no hub"):
        loaded.tokenizer(["a ship"])
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file of the authors"):
        models.load_official("toy", tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="does not fit this configuration: 1 tensors.*words.weight"):
        models.load_official("toy", save_without(tmp_path, model, "words.weight"))
    for name in ("icipnet", "crobim_u", "prompt_ris"):
        with pytest.raises(ValueError, match=f"authors of {name} have released no trained weights"):
            models.load_official(name, tmp_path / "theirs.pth")


def save_without(folder, model, missing):
    torch.save({name: one for name, one in model.state_dict().items() if name != missing}, folder / "less.pth")
    return folder / "less.pth"


def test_a_card_that_is_not_there_is_named(tmp_path):
    written_run(tmp_path / "run", models.build("toy", toy.Config()))
    with pytest.raises(ValueError, match="device=cuda: torch sees no CUDA device"):
        models.load(tmp_path / "run", device="cuda")


def test_a_start_takes_what_fits_and_each_word_its_own_vector(tmp_path):
    old = models.build("toy", toy.Config(vocab_size=5))
    written_run(tmp_path / "run", old, ["ship", "red", "plane"])
    start = models.starting_weights("toy", tmp_path / "run")
    model = models.build("toy", toy.Config(vocab_size=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = models.start_from(model, start, "run", ["tank", "red"])
    state, theirs = model.state_dict(), old.state_dict()
    assert said == f"run: {len(theirs)} of its {len(theirs)} tensors taken; 0 of the model's are new"
    assert torch.equal(state["words.weight"][[0, 1, 3]], theirs["words.weight"][[0, 1, 3]])     # marks and "red"
    assert torch.equal(state["words.weight"][2], before["words.weight"][2])                     # "tank" is new
    wide = models.build("toy", toy.Config(vocab_size=5, width=9))
    assert models.start_from(wide, start, "run", ["ship", "red", "plane"]) == (
        "run: 3 of its 7 tensors taken; 4 of the model's are new "
        "(image.0.bias, image.0.weight, second.weight, words.weight)")
    with pytest.raises(ValueError, match="run: none of its 1 tensors fits"):
        models.start_from(wide, ({"strange": torch.zeros(1)}, {}, None), "run", None)
    with pytest.raises(ValueError, match="leaves out 1 tensors of hub/frozen; say --set pretrained=hub"):
        models.start_from(wide, (start[0], {"frozen.weight": ("hub/frozen", "0")}, None), "run", None)


@pytest.mark.parametrize("name", [name for name in models.PAPERS if name != "toy"])
def test_an_exported_program_gives_the_same_numbers(name):
    torch.manual_seed(0)
    model = models.build(name, models.paper(name).Config.tiny()).eval()
    side, length = model.config.image_size, model.config.text_length
    text_mask = torch.arange(length) < torch.tensor([[length], [4], [5]])
    inputs = (torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8),
              torch.randint(4, 60, (3, length)) * text_mask, text_mask, torch.tensor([0, 1, 1]))
    with torch.no_grad():
        outputs = model(*inputs)
        again = torch.export.export(model, inputs).module()(*inputs)
    assert outputs.keys() == again.keys()
    for key, value in outputs.items():
        torch.testing.assert_close(again[key], value, rtol=1e-4, atol=1e-4 * max(1.0, value.float().abs().max().item()))
