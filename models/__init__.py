"""The models by name: settings, building, exports.

    model = models.load("runs/crobim_u-synthetic")      # the best weights, ready to predict; model.tokenizer beside it

A weights file leaves out only what came unchanged from a named source (a frozen pretrained backbone): its header
keeps the source and a hash of each tensor, and loading checks them.
"""

import ast
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib
import json
import math
import os
import re
import sys
import types
import typing
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import data

PAPERS = {"crobim_u": "CroBIMU", "icipnet": "ICIPNet", "rsrefseg2": "RSRefSeg2", "rs2sam2": "RS2SAM2",
          "prompt_ris": "PromptRIS"}
EXPORTED = ("*.json", "*.safetensors", "*.txt", "*.spm", "*.model")        # what an export holds: text and tensors
CHOICES = {"schedule": ("poly", "cosine", "step", "constant"), "protocol": ("resized", "original"),
           "empty": ("zero", "one", "skip"), "precision": ("bf16", "fp16", "fp32"),
           "select": ("mIoU", "oIoU", "mIoU+oIoU", "last")}


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
    """`field=value` strings applied to Config or recipe, whichever has the field -> (config, recipe), or ValueError."""
    kinds, changes, recipe = typing.get_type_hints(type(config)), {}, dict(recipe)
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting}: expected field=value")
        # RSRefSeg 2's clip is a tower's name in the one, a number in the other
        if field in kinds and not (field in recipe and re.fullmatch(r"[-+.\de]+", text)):
            changes[field] = _typed(field, text, kinds[field])
        elif field in recipe:
            recipe[field] = _typed(field, text, dict | None if field == "phases" else type(recipe[field]))
        else:
            raise ValueError(f"--set {setting}: neither the configuration nor the recipe has a field '{field}'; "
                             f"there are {', '.join(sorted([*kinds, *recipe]))}")
    return dataclasses.replace(config, **changes), recipe


def _typed(field, text, kind):
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    kinds = [typing.get_origin(one) or one for one in (kind.__args__ if isinstance(kind, types.UnionType) else [kind])]
    for one in kinds:
        if one is type(value):
            return value
        if (one, type(value)) in ((tuple, list), (float, int)):
            return one(value)
        if one is str and type(value) not in (list, tuple, dict):
            return text
    wanted = " or ".join(one.__name__ for one in kinds)
    raise ValueError(f"--set {field}={text}: {field} takes {wanted}, got {type(value).__name__}")


def check_recipe(recipe):
    """ValueError, in one line, for a recipe that no run can follow, before anything is read or written."""
    for field, value in recipe.items():
        if value not in CHOICES.get(field, (value,)):
            raise ValueError(f"{field}={value}: there are {', '.join(CHOICES[field])}")
        least = 1 if field in ("epochs", "batch_size", "micro_batch") else 0
        if type(value) in (int, float) and not least <= value < math.inf:
            raise ValueError(f"{field}={value}: expected a number of at least {least}")
    if recipe.get("schedule") == "step" and not {"drop_epochs", "drop_factor"} <= recipe.keys():
        raise ValueError("schedule=step: this paper's recipe has no drop_epochs and drop_factor; there are "
                         + ", ".join(one for one in CHOICES["schedule"] if one != "step"))
    shares = recipe["phases"].values() if recipe.get("phases") else [1]
    if not all(type(one) in (int, float) and one > 0 for one in shares) or not math.isclose(sum(shares), 1):
        raise ValueError(f"phases={recipe['phases']}: expected a share of the run for each phase, 1 together")


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
    for values, known in ((config, defaults), (recipe, module.RECIPE if recipe else {})):
        values = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
        for field in sorted(values.keys() - known):
            if field not in retired or values[field] != retired[field]:
                only = f", which knows {field}={retired[field]} only" if field in retired else ""
                raise ValueError(f"config.json is of another version of {name}{only}: {field}={values[field]}; "
                                 "use the version of the code that wrote it, or train anew")
        then = {field: old.get(field, default) for field, default in known.items()}
        parts.append({field: values.get(field, then[field]) for field in known})
        missing |= {field: then[field] for field in known if field not in values}
    if missing:
        print(f"config.json is of an older version of {name}; what it lacks is taken as it was then: "
              + "  ".join(f"{field}={value}" for field, value in missing.items()))
    return module.Config(**parts[0]), parts[1]


# --------------------------------------------------------------------------------------------------------- exports


def _digest(tensor):
    return hashlib.sha256(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def remember_sources(model, sources):
    """Note which frozen tensors came from where; `sources` is what `load_pretrained` returned, {prefix: source}.

    Call it once the parameters that learn are known: only what has requires_grad=False can stay out of an export.
    """
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.unchanged = {name: (source, _digest(tensor)) for name, tensor in model.state_dict().items()
                       for prefix, source in sources.items() if name.startswith(prefix) and name not in learning}


def own_state(model):
    """(tensors that an export must hold, {name: (source, sha256)} of those that it may leave out)."""
    state = model.state_dict()
    left_out = {name: mark for name, mark in getattr(model, "unchanged", {}).items() if _digest(state[name]) == mark[1]}
    return {name: tensor for name, tensor in state.items() if name not in left_out}, left_out


def load_own_state(model, tensors, left_out, origin):
    """Load what `own_state` gave into `model`, whose left-out tensors must already be those of their source."""
    tensors, state = renamed(model, tensors), model.state_dict()
    odd = sorted(tensors.keys() ^ (state.keys() - left_out)) or [
        f"{name} {tuple(tensor.shape)}, here {tuple(state[name].shape)}"
        for name, tensor in tensors.items() if tensor.shape != state[name].shape]
    if odd:
        raise ValueError(f"{origin} does not fit this configuration: {len(odd)} tensors differ by name or shape, the "
                         f"first {odd[:3]}; both must be of one run; leave fields that change shapes as trained")
    for name, (source, digest) in left_out.items():
        if _digest(state[name]) != digest:
            raise ValueError(f"{origin} was trained on another version of {source}: the tensor {name} differs; "
                             "give the folder with the original files as --set pretrained=DIR")
    model.load_state_dict(state | tensors)


def renamed(model, tensors):
    """`tensors` of a version of before under the names of today: RENAMED of the model's file, {old part: new part}."""
    for old, new in getattr(sys.modules[type(model).__module__], "RENAMED", {}).items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


@contextlib.contextmanager
def put_in_place(path):
    """The name of a file to write beside `path`: synced and moved there at the end, gone if the write fails."""
    part, umask = Path(f"{path}.part"), os.umask(0)
    os.umask(umask)
    try:
        yield part
        os.chmod(part, 0o666 & ~umask)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:       # RuntimeError: torch.save of a write that failed
        raise ValueError(f"{path} could not be written ({str(error).splitlines()[0]}): is the disk full, the place not "
                         "yours? What stood there is whole; make room and begin the command again") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save(model, path):
    """Write `model` as a safetensors export."""
    tensors, left_out = own_state(model)
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    with put_in_place(path) as part:
        save_file(tensors, part, metadata={"format": "pt", "left_out": json.dumps(left_out)})


def read_weights(path):
    """(tensors, left_out) of an export. ValueError with the file's name if it is none."""
    try:
        with safe_open(path, "pt") as file:
            left_out = json.loads((file.metadata() or {}).get("left_out", "{}"))
            if not isinstance(left_out, dict) or any(len(mark) != 2 for mark in left_out.values()):
                raise ValueError("what it leaves out is not {name: (source, hash)}")
            return {name: file.get_tensor(name) for name in file.keys()}, left_out  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file of ours ({error}); copy it again") from None


def run_settings(run, option="--checkpoint"):
    """config.json of a run folder, an export, here or on the hub, or that beside a weights file -> (dict, folder)."""
    name, run = str(run), Path(run)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not run.parent.exists():
        import huggingface_hub
        try:
            run = Path(huggingface_hub.snapshot_download(name, allow_patterns=EXPORTED))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{option} {name}: no such folder here, and not reached on the hub "
                                    f"({str(error).strip().splitlines()[0]})") from error
    folder = run if run.is_dir() else run.parent
    path = folder / "config.json"
    if not run.exists():
        raise FileNotFoundError(f"{option} {run}: no such run folder or weights file")
    if not path.is_file():
        raise FileNotFoundError(f"{option} {run}: no config.json in {folder}; give a folder that train.py wrote, "
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


def weights_file(run, folder):
    """The weights that `run` stands for: itself, or the best, the last or the exported ones in its folder."""
    for path in (Path(run), *(folder / f"{name}.safetensors" for name in ("best", "last", "model"))):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} holds no best.safetensors or last.safetensors; has its first epoch ended?")


def word_tokenizer(name, config, words):
    """data.WordTokenizer over `words` with the marks of paper `name`, for pretrained="none"."""
    return data.WordTokenizer(words, config.text_length, paper(name).SPECIAL_TOKENS)


def read_tokenizer(name, config, folder):
    """The tokenizer of a run: the published one, or the list of words that the run kept in tokenizer.json."""
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

    run: a run folder (best.safetensors, else last.safetensors), a weights file in one, an export or `org/name` on the
    hub; a path that exists comes first. settings: `field=value` strings that change no tensor's shape. Raises
    FileNotFoundError or ValueError naming the file or the field.
    """
    values, folder = run_settings(run)
    name, path = values["model"], weights_file(run, folder)
    config, recipe = override(*settings_from(name, values["config"], values["recipe"]), settings)
    check_recipe(recipe)
    if path.name == "model.safetensors" and config.pretrained != "none":        # what is published is in the export
        config = dataclasses.replace(config, pretrained=str(folder))
    tokenizer = read_tokenizer(name, config, folder)
    return ready(config, {**values, "recipe": recipe}, read_weights(path), path, tokenizer, device)


def ready(config, run, weights, origin, tokenizer, device):
    """The model of `run` with `weights`, as `read_weights` gives them, in eval mode on `device`."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device}: torch sees no CUDA device here; use device=\"cpu\"")
    (tensors, left_out), model = weights, build(run["model"], config)
    if left_out:
        model.load_pretrained()
    load_own_state(model, tensors, left_out, origin)
    model.tokenizer, model.run = tokenizer, run
    return model.eval().requires_grad_(False).to(device)


def export(run, folder):
    """Write the weights of `run` to `folder`, complete in itself: config.json, every tensor, the tokenizer's files."""
    model, folder = load(run), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config, tokenizer, files, module = model.config, model.tokenizer, {}, paper(model.run["model"])
    if config.pretrained == "none":
        files["tokenizer.json"] = json.dumps({"words": tokenizer.words}).encode()
    elif hasattr(tokenizer, "pieces"):                      # sentencepiece
        files[Path(config.beit_words).name] = tokenizer.pieces.serialized_model_proto()
    else:
        published = next(value for value in vars(tokenizer).values() if hasattr(value, "save_pretrained"))
        published.save_pretrained(folder / Path(published.name_or_path).name)
        if hasattr(module, "tower_configs"):                # RSRefSeg 2 reads its towers' sizes where it has the towers
            for name, sizes in zip((config.clip, config.sam), module.tower_configs(config), strict=True):
                sizes.save_pretrained(folder / Path(name).name)
    files["config.json"] = json.dumps({**model.run, "data_root": "data"}, indent=1).encode()
    for name, content in files.items():
        with put_in_place(folder / name) as part:
            part.write_bytes(content)
    save(model, folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------- weights of others


def official_reader(name, path):
    """What reads `path` under our names, if it is a file as the authors' code writes it and none of ours."""
    if not Path(path).is_file() or Path(path).suffix == ".safetensors":
        return None
    if not hasattr(paper(name), "read_official"):
        raise ValueError(f"{path}: the authors of {name} have released no trained weights that could be read; "
                         "train the model, or give a run of train.py")
    return paper(name).read_official


class LaterTokenizer:
    """The published tokenizer, whose files are looked for when the first text is given."""

    def __init__(self, name, config):
        config = dataclasses.replace(config, pretrained="hub") if config.pretrained == "none" else config
        self.find, self.length = functools.cache(lambda: paper(name).tokenizer(config)), config.text_length

    def __call__(self, expressions):
        tokenizer = copy.copy(self.find())
        tokenizer.length = self.length
        return tokenizer(expressions)


def load_official(name, path, config=None, device="cpu"):
    """The authors' released weights in the authors' forms, in eval mode, `model.tokenizer` and `model.run` attached.

    config: another Config for the sizes; every field of ABLATIONS["official"]["all"] is set in it.
    """
    reader, module = official_reader(name, path), paper(name)
    if reader is None:
        raise FileNotFoundError(f"{path}: no such file of the authors; it takes their released weights of {name}")
    config, changes = config or module.Config(), module.ABLATIONS["official"]["all"]
    config = dataclasses.replace(config, **{field: changes[field] for field in changes if hasattr(config, field)})
    recipe = module.RECIPE | {field: changes[field] for field in changes if not hasattr(config, field)}
    run = {"model": name, "config": dataclasses.asdict(config), "recipe": recipe}
    tokenizer = LaterTokenizer(name, config)
    return ready(dataclasses.replace(config, pretrained="none"), run, (reader(path), {}), path, tokenizer, device)


def starting_weights(name, path):
    """({name: tensor}, {name: (source, hash)} left out, word list or None) of a run, an export or the authors' file."""
    if reader := official_reader(name, path):
        return reader(path), {}, None
    values, folder = run_settings(path, "--start")
    config = config_from(values["model"], values["config"])
    words = read_tokenizer(values["model"], config, folder).words if config.pretrained == "none" else None
    return *read_weights(weights_file(path, folder)), words


def start_from(model, start, path, words):
    """Take into `model` what fits of `starting_weights` -> a line that says what was taken and what is new.

    words: the model's own list, None with a published tokenizer; the embedding of a word goes to the same word.
    """
    (tensors, left_out, their_words), own, taken = start, model.state_dict(), {}
    if left_out and model.config.pretrained == "none":
        source = next(iter(left_out.values()))[0]
        raise ValueError(f"--start {path} leaves out {len(left_out)} tensors of {source}; say --set pretrained=hub")
    tables = {f"{name}.weight" for name, module in model.named_modules()
              if isinstance(module, torch.nn.Embedding) and module.num_embeddings == model.config.vocab_size}
    for name, tensor in renamed(model, tensors).items():
        if name in tables and words and their_words and tensor.shape[1] == own[name].shape[1]:
            theirs, ours = ([*range(len(table) - len(known)), *known]               # numbers for the marks, then words
                            for table, known in ((tensor, their_words), (own[name], words)))
            rows = dict(zip(theirs, tensor, strict=True))
            taken[name] = torch.stack([rows.get(key, row) for key, row in zip(ours, own[name], strict=True)])
        elif name in own and own[name].shape == tensor.shape:
            taken[name] = tensor
    new = sorted(own.keys() - taken.keys() - left_out.keys())
    if not taken:
        raise ValueError(f"--start {path}: none of its {len(tensors)} tensors fits this model; is it of another model?")
    model.load_state_dict({**own, **taken})
    return (f"{path}: {len(taken)} of its {len(tensors)} tensors taken; {len(new)} of the model's are new"
            + (f" ({', '.join(new[:5])}{', ...' if len(new) > 5 else ''})" if new else ""))
