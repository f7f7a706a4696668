"""models/__init__.py: settings by name, exports that leave out only what a named source can give back."""

import json

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
    with pytest.raises(ValueError, match="does not fit this configuration.*leave the fields"):
        models.load(run, ["width=9"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="best.safetensors is truncated"):
        models.load(run)
    other = models.build("toy", toy.Config())
    other.extra = torch.nn.Linear(2, 2)
    models.save(other, path)
    with pytest.raises(ValueError, match="not of this model: 2 tensors differ by name.*extra"):
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
    with pytest.raises(OSError, match="disk full"):
        models.save(models.build("toy", toy.Config()), path)
    assert path.read_bytes() == before
