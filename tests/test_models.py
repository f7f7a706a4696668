"""models/__init__.py: settings by name, exports that leave out only what a named source can give back."""

import json

import pytest
import torch
import toy

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


def written_run(folder, model, words=("a", "ship")):
    folder.mkdir()
    values = {"model": "toy", "config": model.config.__dict__, "recipe": toy.RECIPE, "dataset": "synthetic"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.json").write_text(json.dumps({"words": list(words)}))
    models.save(model, folder / "best.safetensors")


def test_round_trip_through_a_run_folder(tmp_path):
    model = models.build("toy", toy.Config(width=4))
    written_run(tmp_path / "run", model)
    for run in (tmp_path / "run", tmp_path / "run" / "best.safetensors"):
        loaded = models.load(run)
        assert not loaded.training and loaded.config == model.config and loaded.tokenizer.words == ["a", "ship"]
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


def test_a_config_of_another_version_is_refused():
    with pytest.raises(ValueError, match="another version of toy.*depth"):
        models.config_from("toy", {**toy.Config().__dict__, "depth": 3})


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
