"""The models by name: settings, building, exports.

    model = models.load("runs/crobim_u-synthetic")      # the best weights, ready to predict; model.tokenizer beside it

A weights file leaves out only what came unchanged from a named source (a frozen pretrained backbone): its header
keeps the source and a hash of each tensor, and loading checks them.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
import sys
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import data

PAPERS = {
    "crobim_u": "CroBIMU",
    "icipnet": "ICIPNet",
    "rsrefseg2": "RSRefSeg2",
    "rs2sam2": "RS2SAM2",
    "prompt_ris": "PromptRIS",
}


# ---------------------------------------------------------------------------------------------- names and settings


def paper(name):
    """The module of one paper: Config, RECIPE, ABLATIONS, tokenizer and the model class live in it."""
    if name not in PAPERS:
        raise ValueError(f"--model {name}: no such model; there are {', '.join(PAPERS)}")
    return importlib.import_module(f"models.{name}")


def build(name, config):
    """The model of paper `name` with random weights; `load_pretrained` is the caller's next step."""
    return getattr(paper(name), PAPERS[name])(config)


def maps(model):
    """Names of the model's outputs, (M,1,h,w) in [0,1], that pictures show: MAPS of its file."""
    return sys.modules[type(model).__module__].MAPS


def override(config, recipe, settings):
    """`field=value` strings applied to the Config or to the recipe, whichever has the field -> (config, recipe).

    Raises ValueError for an unknown field or a value of another type than the field's.
    """
    kinds = typing.get_type_hints(type(config))
    changes, recipe = {}, dict(recipe)
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected field=value")
        if field in kinds:
            changes[field] = _typed(field, text, kinds[field])
        elif field in recipe:
            kind = dict | None if field == "phases" else type(recipe[field])
            recipe[field] = _typed(field, text, kind)
        else:
            raise ValueError(f"--set {setting}: neither the configuration nor the recipe has a field '{field}'; "
                             f"there are {', '.join(sorted([*kinds, *recipe]))}")
    return dataclasses.replace(config, **changes), recipe


CHOICES = {"schedule": ("poly", "cosine", "step", "constant"), "protocol": ("resized", "original"),
           "empty": ("zero", "one", "skip"), "precision": ("bf16", "fp16", "fp32"),
           "select": ("mIoU", "oIoU", "mIoU+oIoU", "last")}


def check_recipe(recipe):
    """ValueError, in one line, for a recipe that no run can follow, before anything is read or written."""
    for field, choices in CHOICES.items():
        if recipe.get(field, choices[0]) not in choices:
            raise ValueError(f"{field}={recipe[field]}: there are {', '.join(choices)}")
    for field, value in recipe.items():
        if type(value) not in (int, float):
            continue
        least = 1 if field in ("epochs", "batch_size", "micro_batch") else 0
        if not least <= value < math.inf:
            raise ValueError(f"{field}={value}: expected a number of at least {least}")
    fractions = list((recipe.get("phases") or {}).values())
    if fractions and not (all(type(one) in (int, float) and one > 0 for one in fractions)
                          and math.isclose(sum(fractions), 1)):
        raise ValueError(f"phases={recipe['phases']}: expected a share of the run for each phase, 1 together")


def _typed(field, text, kind):
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, type(int | None)) else (kind,)
    for one in kinds:
        base = typing.get_origin(one) or one
        if base is type(None) and value is None:
            return None
        if base is tuple and isinstance(value, (list, tuple)):
            return tuple(value)
        if base is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        absent = value is None and type(None) in kinds      # none is a word where the field can't be empty
        if base is str and not absent and not isinstance(value, (list, tuple, dict)):
            return text.strip("'\"")
        if base in (bool, int, dict) and type(value) is base:
            return value
    wanted = " or ".join(getattr(one, "__name__", str(one)) for one in kinds)
    raise ValueError(f"--set {field}={text}: {field} takes {wanted}, got {type(value).__name__}")


def config_from(name, values):
    """The Config that config.json holds as plain JSON (lists become the tuples they were)."""
    return settings_from(name, values, {})[0]


def settings_from(name, config, recipe):
    """(Config, recipe) that config.json holds as plain JSON, also of an older version.

    A field that is gone is accepted at the value of the model file's RETIRED, which is what this version does; one that
    is missing takes the value of OLD_DEFAULTS, else the default, and is named.
    """
    module, parts, missing = paper(name), [], {}
    retired, old = getattr(module, "RETIRED", {}), getattr(module, "OLD_DEFAULTS", {})
    defaults = {field.name: field.default for field in dataclasses.fields(module.Config)}
    for values, known in ((config, defaults), (recipe, {**module.RECIPE_TINY, **module.RECIPE} if recipe else {})):
        values = {field: _tuples(value) for field, value in values.items()}
        for field in set(values) - set(known):
            value = values.pop(field)
            if field not in retired or value != _tuples(retired[field]):
                only = f", which knows {field}={retired[field]} only" if field in retired else ""
                raise ValueError(f"config.json is of another version of {name}{only}: {field}={value}; "
                                 "use the version of the code that wrote it, or train anew")
        lacking = {field: old.get(field, known[field]) for field in known if field not in values}
        parts.append({**values, **lacking})
        missing |= lacking
    if missing:
        print(f"config.json is of an older version of {name}; what it lacks is taken as it was then: "
              + "  ".join(f"{field}={value}" for field, value in missing.items()))
    return module.Config(**parts[0]), parts[1]


def _tuples(value):
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------------------- exports


def _digest(tensor):
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def remember_sources(model, sources):
    """Note which frozen tensors came from where; `sources` is what `load_pretrained` returned, {prefix: source}.

    Call it once the parameters that learn are known: only what has requires_grad=False can stay out of an export.
    """
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.unchanged = {
        name: (source, _digest(tensor))
        for name, tensor in model.state_dict().items()
        for prefix, source in sources.items()
        if name.startswith(prefix) and name not in learning
    }


def own_state(model):
    """(tensors that an export must hold, {name: (source, sha256)} of those that it may leave out)."""
    state = model.state_dict()
    left_out = {name: mark for name, mark in getattr(model, "unchanged", {}).items() if _digest(state[name]) == mark[1]}
    return {name: tensor for name, tensor in state.items() if name not in left_out}, left_out


def load_own_state(model, tensors, left_out, origin):
    """Load what `own_state` gave into `model`, whose left-out tensors must already be those of their source."""
    for old, new in getattr(sys.modules[type(model).__module__], "RENAMED", {}).items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    state = model.state_dict()
    expected = set(state) - set(left_out)
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise ValueError(f"{origin} is not of this model: {len(odd)} tensors differ by name, the first {odd[:3]}; "
                         "the configuration and the weights must come from one run")
    shapes = [name for name, tensor in tensors.items() if tensor.shape != state[name].shape]
    if shapes:
        name = shapes[0]
        raise ValueError(f"{origin} does not fit this configuration: {name} is {tuple(tensors[name].shape)} there and "
                         f"{tuple(state[name].shape)} here; leave the fields that change shapes as they were trained")
    for name, (source, digest) in left_out.items():
        if _digest(state[name]) != digest:
            raise ValueError(f"{origin} was trained on another version of {source}: the tensor {name} differs; "
                             "give the folder with the original files as --set pretrained=DIR")
    model.load_state_dict({**{name: state[name] for name in left_out}, **tensors})


@contextlib.contextmanager
def put_in_place(path):
    """The name of a file to write beside `path`: synced and moved there at the end, gone if the write fails."""
    part = Path(f"{path}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save(model, path):
    """Write `model` as a safetensors export."""
    tensors, left_out = own_state(model)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with put_in_place(path) as part:
        save_file(tensors, part, metadata={"format": "pt", "left_out": json.dumps(left_out)})


def read_weights(path):
    """(tensors, left_out) of an export. FileNotFoundError or ValueError with the file's name."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        with safe_open(path, "pt") as file:
            left_out = json.loads((file.metadata() or {}).get("left_out", "{}"))
            if not isinstance(left_out, dict) or any(len(mark) != 2 for mark in left_out.values()):
                raise ValueError("what it leaves out is not {name: (source, hash)}")
            return {name: file.get_tensor(name) for name in file.keys()}, left_out  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file of ours ({error}); copy it again") from None


def run_settings(run):
    """config.json of a run folder, or of the folder that a weights file lies in -> (dict, folder)."""
    run = Path(run)
    folder = run if run.is_dir() else run.parent
    if not run.exists():
        raise FileNotFoundError(f"--checkpoint {run}: no such run folder or weights file")
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--checkpoint {run}: no config.json in {folder}; give a folder that train.py wrote, "
                                "or a weights file inside one")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    values = values if isinstance(values, dict) else {}
    kinds = {"model": str, "config": dict, "recipe": dict, "dataset": str, "data_root": str, "limit": int}
    if lacking := [key for key, kind in kinds.items() if type(values.get(key)) is not kind]:
        raise ValueError(f"{path} holds no {', '.join(lacking)}, as train.py writes it; copy it from the run anew")
    return values, folder


def word_tokenizer(name, config, words):
    """data.WordTokenizer over `words` with the marks of paper `name`, for pretrained="none"."""
    return data.WordTokenizer(words, config.text_length, paper(name).SPECIAL_TOKENS)


def read_tokenizer(name, config, folder):
    """The tokenizer of a run: the pretrained one, or the word list that the run kept in tokenizer.json."""
    if config.pretrained != "none":
        return paper(name).tokenizer(config)
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: the run's vocabulary is missing; copy it beside config.json")
    try:
        tokenizer = word_tokenizer(name, config, json.loads(path.read_text())["words"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no list of words ({type(error).__name__}); copy it from the run anew") from None
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{path} has {len(tokenizer)} words and marks, the model {config.vocab_size}; the words "
                         "and the weights must come from one run")
    return tokenizer


def load(run, settings=(), device="cpu"):
    """A trained model in eval mode, `model.tokenizer` and `model.run` (config.json) attached.

    run: a run folder (best.safetensors, else last.safetensors) or a weights file in one. settings: `field=value`
    strings that change no tensor's shape. Raises FileNotFoundError or ValueError naming the file or the field.
    """
    values, folder = run_settings(run)
    name = values["model"]
    config, recipe = override(*settings_from(name, values["config"], values["recipe"]), settings)
    check_recipe(recipe)
    candidates = [Path(run)] if Path(run).is_file() else [folder / "best.safetensors", folder / "last.safetensors"]
    path = next((file for file in candidates if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no best.safetensors or last.safetensors; has its first epoch ended?")
    tensors, left_out = read_weights(path)
    model = build(name, config)
    if left_out:
        model.load_pretrained()
    load_own_state(model, tensors, left_out, path)
    model.tokenizer = read_tokenizer(name, config, folder)
    model.run = {**values, "recipe": recipe}
    return model.eval().requires_grad_(False).to(device)
