"""Train one of the models on one of the datasets, from a fresh machine's synthetic default to a paper's run.

    python train.py                                                       # tiny CroBIM-U on synthetic scenes, CPU
    python train.py --model crobim_u --dataset risbench --data-root DIR   # the paper's recipe
    torchrun --nproc-per-node 8 train.py ...                              # the same on eight GPUs
    python train.py ... --resume                                          # go on where it was interrupted
    python train.py ... --start RUN                                       # a new run from the weights of another

The run folder holds config.json, resume.pt, best and last weights, log.jsonl and the scores of the test splits.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import namedtuple
from importlib import import_module, metadata, util
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import evaluate
import metrics
import models
from evaluate import PRECISIONS, Options, at_least, autocast, in_file_name, start_processes, to_device, write_text

resource = import_module("resource") if os.name == "posix" else None     # counts memory; Windows has none

# ------------------------------------------------------------------------------------------------------- arguments

def arguments(argv=None):
    parser = Options(description=__doc__.split("\n\n")[0], formatter_class=evaluate.Defaults)
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", default="crobim_u", choices=models.PAPERS, help="the paper")
    what.add_argument("--dataset", default="synthetic", choices=data.DATASETS, help="the data")
    what.add_argument("--data-root", default="data", metavar="DIR", help="folder of the dataset as downloaded")
    what.add_argument("--refs", metavar="NAME", help="dataset refer: its pickle, such as 'refs(unc).p'")
    what.add_argument("--categories", default="all", choices=["all", "seen"], help="COCO categories to train on")
    what.add_argument("--small", action="store_true", help="synthetic scenes: objects from 0.2 %% of the image")
    what.add_argument("--preset", choices=["paper", "tiny"], help="default: paper, for synthetic tiny")
    what.add_argument("--ablation", metavar="TABLE/ROW", help="a row of the paper's ablation tables, e.g. V/+UGF")
    what.add_argument("--list-ablations", action="store_true", help="print the paper's ablation tables and end")
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                      help="any fields of Config or recipe; options named below come after it")
    how, number = parser.add_argument_group("how (defaults: the recipe's)"), {"type": at_least(1), "metavar": "N"}
    how.add_argument("--epochs", **number, help="epochs")
    how.add_argument("-b", "--batch-size", **number, help="expressions per step, over all processes")
    how.add_argument("--micro-batch", **number, help="expressions that one process takes at once")
    how.add_argument("--lr", type=float, metavar="X", help="base learning rate")
    how.add_argument("--weight-decay", type=float, metavar="X", help="AdamW weight decay")
    how.add_argument("--precision", choices=PRECISIONS, help="default: the recipe's on cuda, fp32 on the cpu")
    number = {"type": at_least(0), "metavar": "N"}
    how.add_argument("--limit", **number, default=0, help="first N samples of a split (0: all)")
    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    where.add_argument("-j", "--workers", **number, default=min(8, max(1, os.cpu_count() // 2)),
                       help="loader processes per training process")
    where.add_argument("--seed", **number, default=0, help="of weights, order and dropout")
    where.add_argument("--output", type=Path, metavar="DIR",
                       help="run folder (default: runs/MODEL-DATASET, then -tiny on real data and the ablation row)")
    where.add_argument("--save-every", **number, default=0, help="save resume.pt also within an epoch, every N steps")
    where.add_argument("--tensorboard", action="store_true", help="write losses, rates and scores for tensorboard too")
    where.add_argument("--plan", action="store_true", help="print the memory that a step keeps and end")
    where.add_argument("--start", metavar="RUN|FILE", help="begin with the weights of a run, export or authors' file")
    where.add_argument("--checkpoint", "--init", "--weights", help=argparse.SUPPRESS)
    again = where.add_mutually_exclusive_group()
    again.add_argument("--resume", nargs="?", const=True, default=False, choices=["auto"],
                       help="go on with the run in --output; auto: if there is one, else begin it")
    again.add_argument("--overwrite", action="store_true", help="begin anew in --output")
    args = parser.parse_args(argv)
    if args.checkpoint:
        parser.error("a new run begins with the weights of another by --start RUN|FILE; --resume goes on with a run")
    usual = "tiny" if args.dataset == "synthetic" else "paper"
    args.preset = args.preset or usual
    if args.start and models.official_reader(args.model, args.start):
        args.ablation = args.ablation or "official/all"
    parts = [args.model, args.dataset, "" if args.preset == usual else args.preset, args.ablation]
    args.output = args.output or Path("runs", in_file_name("-".join(filter(None, parts))))
    if args.resume == "auto":
        args.resume = os.path.isfile(args.output / "resume.pt")
    return args


def settle(args):
    """Paper < dataset's or tiny recipe < table's row < command line -> (Config, recipe, what the last two name)."""
    paper, tiny = models.paper(args.model), args.preset == "tiny"
    rows = {f"{table}/{row}": changes for table, named in paper.ABLATIONS.items() for row, changes in named.items()}
    if args.ablation and args.ablation not in rows:
        raise ValueError(f"--ablation {args.ablation}: no such row; there are {', '.join(rows)}")
    if args.ablation and args.ablation.partition("/")[0] in getattr(paper, "EVALUATION_ONLY", ()):
        changes = " ".join(f"{field}={value}" for field, value in rows[args.ablation].items())
        raise ValueError(f"--ablation {args.ablation}: no training of its own; train the whole model, then say "
                         f"python evaluate.py --checkpoint RUN --set {changes}")
    row, config = rows.get(args.ablation, {}), paper.Config.tiny() if tiny else paper.Config()
    changes = (paper.RECIPE_TINY if tiny else paper.RECIPE_FOR.get(args.dataset, {})) | row
    config = dataclasses.replace(config, **{key: value for key, value in changes.items() if key in vars(config)})
    recipe = paper.RECIPE | {key: value for key, value in changes.items() if key not in vars(config)}
    config, recipe = models.override(config, recipe, args.set)
    options = {key: value for key in ("epochs", "batch_size", "micro_batch", "lr", "weight_decay")
               if (value := getattr(args, key)) is not None}
    recipe |= options
    models.check_recipe(recipe)
    return config, recipe, {*row, *options, *(setting.partition("=")[0] for setting in args.set)}


def list_ablations(name):
    """Every row of the paper's tables: the paper's figure, where the model file has it, and what the row changes."""
    paper = models.paper(name)
    for table, rows in paper.ABLATIONS.items():
        only = "   (of one trained model: evaluate.py --set)" if table in getattr(paper, "EVALUATION_ONLY", ()) else ""
        print(f"{name}, table {table}{only}")
        for row, changes in rows.items():
            figure = getattr(paper, "FIGURES", {}).get(table, {}).get(row, "")
            changed = "  ".join(f"{field}={value}" for field, value in changes.items())
            print(f"  {table + '/' + row:<28} {figure:<24} {changed}".rstrip())


# ------------------------------------------------------------------------------------------------ settings, data, model

# What tells one run from another, beside the fields of its configuration and its recipe.
RUN = ("model", "dataset", "data_root", "refs", "preset", "ablation", "categories", "small", "limit", "seed",
       "precision")
# What a run is told and given, settled before its first step.
Job = namedtuple("Job", "args processes config recipe select samples validation tokenizer sampler")
# What learns: the model, as the step calls it (under DDP) the network. A phase brings a new learner.
Learner = namedtuple("Learner", "model network optimizer scaler")


def begin(args, processes):
    """Settings, data and tokenizer: what can be wrong with them is found here, before a file is touched."""
    (config, recipe, asked), output = settle(args), args.output
    args.precision = args.precision or (recipe["precision"] if processes.device.type == "cuda" else "fp32")
    there = os.path.isfile(output / "resume.pt")
    weights = [name for name in ("best", "last", "model") if os.path.isfile(output / f"{name}.safetensors")]
    if weights and not (there or args.overwrite):
        raise ValueError(f"{output} holds {weights[0]}.safetensors but no resume.pt: --start {output} --output NEW "
                         "trains on from its weights, --overwrite deletes them")
    if args.resume and not there:
        raise FileNotFoundError(f"--resume: no {output / 'resume.pt'}; start the run without --resume")
    if there and not (args.resume or args.overwrite):
        raise ValueError(f"{output} holds a run already: --resume goes on with it, --overwrite begins anew, "
                         "--output DIR keeps both")
    if args.tensorboard and not util.find_spec("tensorboard"):
        raise ValueError("--tensorboard: the package is not there; pip install tensorboard")
    if args.resume:
        config, recipe = begun_with(args, config, recipe, asked)
    for name, part in (("config", dataclasses.asdict(config)), ("recipe", recipe)):
        print(f"{name}   " + "  ".join(f"{key}={value}" for key, value in part.items()), flush=True)
    sampler = make_sampler(args, recipe, processes)
    validation = read(args, "val") if data.has_split(args.dataset, args.data_root, "val", args.refs) else []
    select = recipe["select"] if validation else "last"
    if config.pretrained == "none":
        tokenizer = models.word_tokenizer(args.model, config, data.vocabulary(args.dataset, sampler.samples))
        kept = models.read_tokenizer(args.model, config, output).words if args.resume else tokenizer.words
        if kept != tokenizer.words:
            odd = ", ".join(sorted({*kept} ^ {*tokenizer.words})[:5]) or "their order"
            raise ValueError(f"--resume: {output / 'tokenizer.json'} has other words than the data now ({odd}): "
                             "the data have changed")
        config = dataclasses.replace(config, vocab_size=len(tokenizer))
    else:
        tokenizer = models.paper(args.model).tokenizer(config)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {output} can't be a folder ({error.strerror}); name another") from None
    return Job(args, processes, config, recipe, select, sampler.samples, validation, tokenizer, sampler)


def begun_with(args, config, recipe, asked):
    """Config and recipe of the run that --resume goes on with; whatever is asked for otherwise is an error."""
    run, _ = models.run_settings(args.output, "--resume")
    old_config, old_recipe = models.settings_from(run["model"], run["config"], run["recipe"])
    parts = (vars(old_config), vars(config)), (old_recipe, recipe)
    compared = [(f"{part} ", run[part], getattr(args, part)) for part in RUN if part in run and part != "data_root"]
    if args.dataset != "synthetic":
        compared += [("data_root ", *(str(Path(root).resolve()) for root in (run["data_root"], args.data_root)))]
    compared += [(f"{field}=", old.get(field), new[field]) for field in sorted(asked) for old, new in parts
                 if field in new]
    for name, there, here in compared:
        if there != here:
            now = f"{name}{here}" if name.endswith("=") else here
            longer = f", or train on from its weights: --start {args.output} --output NEW" if name == "epochs=" else ""
            raise ValueError(f"--resume: {args.output / 'config.json'} was begun with {name}{there}, now {now} is asked"
                             " for; repeat the first command line with --resume, or give another --output" + longer)
    return old_config, old_recipe


def read(args, split, epoch=0):
    return data.read(args.dataset, args.data_root, split, refs=args.refs, categories=args.categories,
                     limit=args.limit, epoch=epoch, small=args.small)


def make_sampler(args, recipe, processes, epoch=0):
    return data.TrainSampler(read(args, "train", epoch), batch_size=recipe["batch_size"], seed=args.seed,
                             micro_batch=recipe["micro_batch"], per_image=recipe["per_image"], world=processes.world,
                             repeat_mask=recipe.get("repeat_mask", 0.0))


def build(job, saved=None):
    """Model, optimiser and scaler as they are before the first step; `saved`: what resume.pt holds, if there is one."""
    args, config, processes = job.args, job.config, job.processes
    start = None if saved or not args.start else models.starting_weights(args.model, args.start)
    torch.manual_seed(args.seed)
    model, sources = models.build(args.model, config), {}
    whole = (saved and not saved["left_out"]) or (start and not start[1] and {*start[0]} >= {*model.state_dict()})
    if config.pretrained != "none" and not whole:
        sources = model.load_pretrained()
    if start:
        words = job.tokenizer.words if config.pretrained == "none" else None
        print(f"start    {models.start_from(model, start, args.start, words)}", flush=True)
    if processes.device.type == "cuda" and processes.world > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(processes.device).train()
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.precision == "fp16")
    learner = start_phase(job, Learner(model, model, None, scaler), 0)
    models.remember_sources(model, sources)
    for epoch in phase_starts(job.recipe):
        if saved and 0 < epoch <= saved["phase"]:
            learner = start_phase(job, learner, epoch)
    torch.manual_seed(args.seed + 1000003 * (processes.rank + 1))          # dropout differs between processes
    return learner


def print_settings(job, model):
    args, recipe, sampler = job.args, job.recipe, job.sampler
    every = sum(one.numel() for one in model.parameters()) / 1e6
    learn = sum(one.numel() for one in model.parameters() if one.requires_grad) / 1e6
    print(f"{args.model} ({args.preset}) on {args.dataset}: {every:.2f} M parameters, {learn:.2f} M learn")
    print(f"data     {len(job.samples)} training and {len(job.validation)} validation expressions; an epoch has "
          f"{sampler.steps} steps of {recipe['batch_size']} expressions: {job.processes.world} process(es) x "
          f"{len(sampler.plan(0, 0)[0])} micro-batch(es)")
    if cut := data.cut(job.samples, job.tokenizer):
        print(f"text     {cut}")
    if sampler.groups:
        print(f"groups   {recipe['per_image']} expressions of each image, masked repeats where it has fewer")
    elif recipe.get("repeat_mask"):
        single = len({sample.picture for sample in job.samples}) == len(job.samples)
        why = ", one expression per image: instance contrastive learning (ICL) is off" if single else ""
        print(f"groups   none{why}")
    if left := sorted({*(recipe.get("phases") or {})} - {*phase_starts(recipe).values()}):
        print(f"phases   {', '.join(left)}: none of {recipe['epochs']} epochs")
    kept = "the last epoch" if job.select == "last" else f"validation {job.select}"
    print(f"run      {job.processes.device.type}, {job.args.precision}, seed {args.seed}, kept by {kept}, "
          f"folder {args.output}", flush=True)


# ---------------------------------------------------------------------------------------- optimiser, schedule, phases

def factor(recipe, step, total):
    """Learning-rate factor of optimiser step `step` of `total`; warm-up and drop are given in epochs."""
    per_epoch, kind = total / recipe["epochs"], recipe["schedule"]
    warmup = recipe.get("warmup", 0) * per_epoch
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if kind == "poly":
        return (1 - step / total) ** recipe.get("power", 0.9)
    if kind == "cosine":                            # to the floor at the end, or t_max runs long and after a plateau
        begin, low = max(warmup, recipe.get("plateau", 0) * per_epoch), recipe.get("floor", 0)
        length = recipe.get("t_max", 0) * total or max(1, total - begin)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * max(0, step - begin) / length))
    if kind == "step" and step >= total - recipe["drop_epochs"] * per_epoch:
        return recipe["drop_factor"]
    return 1.0                                      # constant; models.check_recipe knows no other


def make_optimizer(model, recipe, device, known):
    """AdamW over `model.param_groups`; what is `known` of parameters that go on learning is kept."""
    groups = [{**group, "base_lr": group["lr"]} for group in model.param_groups(recipe)]
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    optimizer.state.update({one: known[one] for group in groups for one in group["params"] if one in known})
    return optimizer


def phase_starts(recipe):
    """{first epoch: name}; phases are fractions of the run and begin with an epoch."""
    phases = recipe.get("phases") or {}
    begun = itertools.accumulate(phases.values(), initial=0.0)
    return {round(share * recipe["epochs"]): name for name, share in zip(phases, begun, strict=False)}


def start_phase(job, learner, epoch):
    """The learner of the phase that begins with `epoch`; a run without phases has its one from epoch 0 on."""
    model, device = learner.model, job.processes.device
    name = phase_starts(job.recipe).get(epoch)
    if name and not hasattr(model, "start_phase"):
        raise ValueError(f"phases={job.recipe['phases']}: {job.args.model} has none; say --set phases=none")
    if name:
        model.start_phase(name)
    optimizer = make_optimizer(model, job.recipe, device, known=learner.optimizer.state if learner.optimizer else {})
    network = model
    if job.processes.world > 1:
        warnings.filterwarnings("ignore", "Grad strides do not match")         # of 1x1 convolutions; costs nothing here
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    return Learner(model, network, optimizer, learner.scaler)


# -------------------------------------------------------------------------------------- stopping, saving, resuming

class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


class StopRequest:
    """Within it, Ctrl-C and SIGTERM wait until the step is over; a second Ctrl-C, some seconds later, ends at once."""

    asked = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        # torchrun passes on a Ctrl-C that its processes have had from the terminal already
        if self.asked and time.monotonic() - self.asked > 3 and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()


def random_state(device):
    on_card = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **on_card}


def save_resume(job, learner, position, random):
    """resume.pt, the commit point of a run: everything that the next step depends on, as plain types."""
    processes, states = job.processes, [random]
    if processes.world > 1:
        states = [None] * processes.world
        dist.all_gather_object(states, random)
    if processes.first:
        tensors, left_out = models.own_state(learner.model)
        values = {"model": tensors, "left_out": left_out, "optimizer": learner.optimizer.state_dict(),
                  "scaler": learner.scaler.state_dict(), "random": states, **position}
        with models.put_in_place(job.args.output / "resume.pt") as part:
            torch.save(values, part)


def load_resume(path):
    """What `save_resume` has written; in older files the epoch whose phase had begun is told by the step."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {"phase": saved["epoch"] - (saved["step"] == 0), **saved}
    except Exception as error:
        raise ValueError(f"{path} is truncated or not a resume file ({type(error).__name__}); --start {path.parent} "
                         "--output NEW trains on from the weights beside it, --overwrite begins anew") from None


def new_folder(job):
    """An empty run folder with what is known before the first step -> where the run stands."""
    output = job.args.output
    if job.processes.first:
        for name in ("resume.pt", "best.safetensors", "last.safetensors", "tokenizer.json", "log.jsonl"):
            (output / name).unlink(missing_ok=True)
        for scores in output.glob("*/metrics.json"):
            shutil.rmtree(scores.parent)
        versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                    "transformers": metadata.version("transformers")}
        about = {part: getattr(job.args, part) for part in (*RUN, "start")} | {
            "config": dataclasses.asdict(job.config), "recipe": job.recipe, "versions": versions}
        write_text(output / "config.json", json.dumps(about, indent=1) + "\n")
        if job.config.pretrained == "none":
            write_text(output / "tokenizer.json", json.dumps({"words": job.tokenizer.words}) + "\n")
    return {"epoch": 0, "step": 0, "phase": 0, "best": None, "log_length": 0, "sums": {}, "expressions": 0, "images": 0,
            "seconds": 0.0, "samples": len(job.samples), "steps": job.sampler.steps}


def resume(job, learner, saved):
    """Take up the run in the folder -> where it stands, as resume.pt has it."""
    output, processes = job.args.output, job.processes
    if (saved["samples"], saved["steps"]) != (len(job.samples), job.sampler.steps):
        raise ValueError(f"--resume: the run was begun on {saved['samples']} samples, {saved['steps']} steps an epoch; "
                         f"now there are {len(job.samples)}, {job.sampler.steps} steps: the data have changed")
    models.load_own_state(learner.model, saved.pop("model"), saved.pop("left_out"), output / "resume.pt")
    learner.optimizer.load_state_dict(saved.pop("optimizer"))
    learner.scaler.load_state_dict(saved.pop("scaler"))
    random = saved.pop("random")
    if len(random) == processes.world:
        torch.set_rng_state(random[processes.rank]["cpu"])
        if processes.device.type == "cuda" and "cuda" in random[processes.rank]:
            torch.cuda.set_rng_state(random[processes.rank]["cuda"], processes.device)
    else:
        print(f"resumed on {processes.world} processes instead of {len(random)}: "
              "the same samples in the same order, other dropout")
    if processes.first:
        log = output / "log.jsonl"
        lines = log.read_bytes()[:saved["log_length"]] if log.exists() else b""
        if len(lines) < saved["log_length"]:
            print(f"{log} has lost lines of before; it goes on with those to come")
        with models.put_in_place(log) as part:
            part.write_bytes(lines[:lines.rfind(b"\n") + 1])
    return {"images": 0, **saved}


# ------------------------------------------------------------------------------------------------------------ the step

def train_step(job, learner, position, sampler, batches, stop):
    """One optimiser step -> (sums of the loss terms over its expressions, what it took, whether to stop after it).

    The gradient is that of the mean over all of its expressions, whatever processes and micro-batches divide them; what
    a model couples within a micro-batch (batch norm, a contrast) stays within it.
    """
    recipe, processes, (model, network, optimizer, scaler) = job.recipe, job.processes, learner
    done, total = position["epoch"] * sampler.steps + position["step"], recipe["epochs"] * sampler.steps
    plan = sampler.plan(position["epoch"], position["step"])
    expressions = sum(len(numbers) for rank in plan for micro in rank for numbers in micro)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor(recipe, done, total)
    random, buffers = random_state(processes.device), [(one, one.clone()) for one in model.buffers()]    # before it
    sums, infinite = {}, torch.zeros(processes.world, len(plan[0]), device=processes.device)
    for micro in range(len(plan[0])):
        batch, last = to_device(next(batches), processes.device), micro + 1 == len(plan[0])
        with contextlib.nullcontext() if last or processes.world == 1 else network.no_sync():
            with autocast(processes.device, job.args.precision):
                outputs = network(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
            outputs = {key: value.float() if value.is_floating_point() else value for key, value in outputs.items()}
            terms = model.criterion(outputs, batch, done / total)
            loss, count = sum(terms.values()), len(batch["samples"])
            scaler.scale(loss * (count * processes.world / expressions)).backward()
        infinite[processes.rank, micro] = ~torch.isfinite(loss)
        for name, value in {**terms, "loss": loss}.items():
            sums[name] = sums.get(name, 0) + value.detach() * count
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.get("clip") or math.inf)
    broken = ~torch.isfinite(norm) & (not scaler.is_enabled())          # else the scaler skips the step
    (stops, broken, *infinite), totals = agree(processes, [stop.asked is not None, broken, infinite], sums)
    if broken or any(infinite):
        for buffer, before in buffers:              # statistics of batch norm
            buffer.copy_(before)
        save_resume(job, learner, position, random)
        refuse_infinite(job, position, sampler, infinite)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return totals, {"expressions": expressions, "images": sum(map(len, itertools.chain(*plan)))}, bool(stops)


def agree(processes, flags, sums):
    """The one small all-reduce and the one host read of a step -> (flags, sums) over all processes as floats."""
    values = torch.cat([torch.as_tensor(one, dtype=torch.float64, device=processes.device).flatten()
                        for one in (*flags, *sums.values())])
    if processes.world > 1:
        dist.all_reduce(values)
    values = values.tolist()
    end = len(values) - len(sums)
    return values[:end], dict(zip(sums, values[end:], strict=True))


def refuse_infinite(job, position, sampler, infinite):
    """Name the samples of the micro-batches whose loss is not finite; all, if only the gradient is not."""
    micros = [micro for rank in sampler.plan(position["epoch"], position["step"]) for micro in rank]
    bad = [micro for micro, flag in zip(micros, infinite, strict=True) if flag] or micros
    named = ", ".join(sampler.samples[number].id for micro in bad for numbers in micro for number in numbers)
    raise ValueError(f"the loss is not finite at step {position['step'] + 1} of epoch {position['epoch'] + 1}; samples "
                     f"{named}; {job.args.output / 'resume.pt'} holds the state before this step; "
                     "try a lower --lr or --precision fp32 in a new run")


# ------------------------------------------------------------------------------------------------------------ the loop

def train_epoch(job, learner, position, stop):
    """The rest of an epoch, from the step at which the run stands."""
    args, recipe, processes, epoch, sampler = job.args, job.recipe, job.processes, position["epoch"], job.sampler
    if args.dataset == "synthetic":
        sampler = make_sampler(args, recipe, processes, epoch)
    dataset = data.ReferringDataset(sampler.samples, job.config.image_size, job.tokenizer, draw=(args.seed, epoch),
                                    repeat_mask=recipe.get("repeat_mask", 0.0),
                                    black_boxes=recipe.get("black_boxes", 0.0))
    batches = evaluate.batches(dataset, sampler.batches(epoch, processes.rank, position["step"]), args.workers,
                               processes.device)
    begun = time.monotonic() - position["seconds"]
    bar = tqdm(range(position["step"], sampler.steps), f"epoch {epoch + 1}/{recipe['epochs']}",
               initial=position["step"], total=sampler.steps, disable=not processes.first, leave=False)
    for step in bar:
        totals, taken, stops = train_step(job, learner, position, sampler, batches, stop)
        position["sums"] = {name: position["sums"].get(name, 0.0) + value for name, value in totals.items()}
        position |= {name: position[name] + number for name, number in taken.items()}
        position |= {"step": step + 1, "seconds": time.monotonic() - begun}
        bar.set_postfix({"loss": totals["loss"] / taken["expressions"], "rate": learner.optimizer.param_groups[0]["lr"],
                         **pace(position, processes.device)}, refresh=False)
        if stops or (args.save_every and (step + 1) % args.save_every == 0):
            save_resume(job, learner, position, random_state(processes.device))
        if stops:
            raise Stopped(f"stopped after step {step + 1} of epoch {epoch + 1}; go on with --resume")


def pace(position, device):
    """Images a second in this epoch and the process's peak memory so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource else 0
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak
    return {"images_per_second": round(position["images"] / max(position["seconds"], 1e-9), 2),
            "peak_gib": round(peak / 2 ** 30, 2)}


def end_epoch(job, learner, position):
    """Validate, keep the best, write the log's line and the commit point."""
    args, recipe, processes, model = job.args, job.recipe, job.processes, learner.model
    save_resume(job, learner, position, random_state(processes.device))     # what ends a long validation costs no epoch
    epoch, summary, better = position["epoch"] + 1, {}, False
    if job.select != "last":
        lines = evaluate.evaluate(model, job.validation, processes, tokenizer=job.tokenizer,
                                  protocol=recipe["protocol"], empty=recipe["empty"], precision=args.precision,
                                  micro_batch=recipe["micro_batch"], workers=args.workers, label="validate")
        summary = metrics.summarize(lines, empty=recipe["empty"], bootstrap=0)
        score = sum(summary[name] for name in job.select.split("+"))
        better = position["best"] is None or score > position["best"]
        position["best"] = score if better else position["best"]
    if processes.first:
        if better:
            models.save(model, args.output / "best.safetensors")
        models.save(model, args.output / "last.safetensors")
        means = {name: value / position["expressions"] for name, value in position["sums"].items()}
        scores = {f"val_{name}": summary[name] for name in ("oIoU", "mIoU") if summary}
        figures = {f"val_{name}": row["mean"] for name, row in summary.get("diagnostics", {}).items()}
        entry = {**means, "lr": learner.optimizer.param_groups[0]["lr"], **scores, **figures,
                 "best": better, "seconds": round(position["seconds"], 1), **pace(position, processes.device)}
        with open(args.output / "log.jsonl", "a") as file:
            file.write(json.dumps({"epoch": epoch, **entry}) + "\n")
            position["log_length"] = file.tell()
        print(f"epoch {epoch}/{recipe['epochs']}", f"loss {entry['loss']:.3f}",
              *(f"{name} {value:.2f}" for name, value in scores.items()), f"{entry['seconds']:.0f} s"
              + ("  best" if better else ""), sep="  ", flush=True)
        if args.tensorboard:
            for_tensorboard(args, epoch, entry)
    position |= {"epoch": epoch, "step": 0, "sums": {}, "expressions": 0, "images": 0, "seconds": 0.0}
    save_resume(job, learner, position, random_state(processes.device))


def score_tests(job, model):
    """Score the kept weights on every test split (val where there is none); on synthetic scenes with the control."""
    args = job.args
    kept = args.output / ("last.safetensors" if job.select == "last" else "best.safetensors")
    if job.processes.world > 1:
        dist.barrier()
    models.load_own_state(model, *models.read_weights(kept), kept)
    there = [split for split in ("test", "val") if data.has_split(args.dataset, args.data_root, split, args.refs)]
    if not there:
        print("nothing is scored: the data have neither a test nor a val split")
    options = {name: getattr(args, name) for name in ("dataset", "data_root", "refs", "categories", "limit", "small",
                                                      "output", "precision", "workers")}
    options |= {"recipe": job.recipe, "micro_batch": job.recipe["micro_batch"], "tokenizer": job.tokenizer,
                "checkpoint": kept}
    for split in data.split_names(args.dataset, there[0], args.data_root, args.refs) if there else []:
        true = evaluate.score_split(model, job.processes, split=split, **options)["mIoU"]
        if args.dataset in ("synthetic", "custom"):
            try:
                control = evaluate.score_split(model, job.processes, split=split, control=True, **options)
                other = f"{control['mIoU']:.2f}"
            except evaluate.NoControl as error:
                other = f"none, {error}"
            print(f"{split}: mIoU {true:.2f}; control, every image with another image's sentences: {other}")
        if job.processes.first and args.tensorboard:
            for_tensorboard(args, job.recipe["epochs"], {f"{split}_mIoU": true}, args.output / split / "sheet.png")


def for_tensorboard(args, epoch, numbers, sheet=None):
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(args.output / "tensorboard") as writer:
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        if sheet:
            writer.add_image(sheet.parent.name, np.asarray(data.read_image(sheet)), epoch, dataformats="HWC")


# ------------------------------------------------------------------------------------------------------------ the plan

def kept_for_backward(model, batch, precision):
    """Bytes that forward and criterion keep for the backward pass; the model's own tensors are not among them."""
    kept, own = {}, {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs, batch = evaluate.forward(model, batch, torch.device("cpu"), precision)
        sum(model.criterion(outputs, batch, 0.5).values())
    return sum(storage.nbytes() for name, storage in kept.items() if name not in own)


def count(name, config, recipe, precision, expressions):
    """What a step with so many expressions needs -> (parameters, those that learn, fixed bytes, bytes kept).

    Fixed: parameters, buffers, gradients, AdamW's two moments. The tensors are fake and take no memory, but answer as
    a processor's, so that attention keeps what a fused one keeps.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode            # slow to import
    with torch.device("meta"):
        model = models.build(name, dataclasses.replace(config, pretrained="none")).train()
    if recipe.get("phases"):
        model.start_phase(list(recipe["phases"])[-1])
    model.param_groups(recipe)
    learning = [one for one in model.parameters() if one.requires_grad]
    every, learn = (sum(one.numel() for one in some) for some in (model.parameters(), learning))
    fixed = sum(one.nbytes for one in (*model.parameters(), *model.buffers(), *3 * learning))
    images, side, length = -(-expressions // max(1, recipe["per_image"])), config.image_size, config.text_length
    with FakeTensorMode(allow_non_fake_inputs=True):
        text_mask, numbers = torch.ones(expressions, length, dtype=torch.bool), torch.arange(expressions)
        batch = {"images": torch.zeros(images, 3, side, side, dtype=torch.uint8), "tokens": text_mask.long(),
                 "text_mask": text_mask, "image_index": numbers, "instance": numbers,
                 "masks": torch.zeros(expressions, side, side, dtype=torch.bool)}
        return every, learn, fixed, kept_for_backward(model.to_empty(device="cpu"), batch, precision)


def memory(args):
    """-> (config, recipe, parameters, those that learn, {micro-batch of whole images: GiB that a step keeps})."""
    config, recipe, _ = settle(args)
    args.precision, least = args.precision or recipe["precision"], max(1, recipe["per_image"])
    (every, learn, fixed, one), (*_, two) = (
        count(args.model, config, recipe, args.precision, expressions) for expressions in (least, 2 * least))
    sizes = [least << k for k in range(20) if k == 0 or least << k <= recipe["batch_size"]]
    table = {size: (fixed + one + (two - one) * (size // least - 1)) / 2 ** 30 for size in sizes}
    return config, recipe, every, learn, table


def plan(args):
    """Print what a step keeps in memory, by micro-batch; neither weights nor data are needed."""
    _, recipe, every, learn, table = memory(args)
    print(f"{args.model} ({args.preset}) on {args.dataset}: {every / 1e6:.2f} M parameters, {learn / 1e6:.2f} M learn, "
          f"{args.precision}\nparameters, gradients, optimiser and what is kept for the backward pass; the peak may "
          f"lie a third above\n\nmicro-batch      GiB   micro-batches in a step of {recipe['batch_size']}")
    for size, gib in table.items():
        print(f"{size:>11} {gib:>8.2f}   {-(-recipe['batch_size'] // size)}")
    try:
        sampler = make_sampler(args, recipe, evaluate.Processes(0, 1, torch.device("cpu")))
        print(f"\n{len(sampler.samples)} training expressions: {sampler.steps} steps per epoch, "
              f"{sampler.steps * recipe['epochs']} in {recipe['epochs']} epochs")
    except FileNotFoundError:
        print("\nsteps per epoch: not known, the data are not there")


def out_of_memory(args):
    """What to do where the card is too small, in one line."""
    config, recipe, *_, table = memory(args)
    there = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
    fitting = [size for size, gib in table.items() if gib < there and size < recipe["micro_batch"]]
    advice = f"say --micro-batch {fitting[-1]}" if fitting else "no smaller micro-batch fits"
    if not getattr(config, "checkpointing", True):
        advice += "; --set checkpointing=True keeps less and takes longer"
    return (f"out of memory: {there:.1f} GiB, --micro-batch {recipe['micro_batch']} in {args.precision}; "
            f"by the count of --plan {advice}")


# ------------------------------------------------------------------------------------------------------------- the run

def train(args, processes):
    job = begin(args, processes)
    saved = load_resume(args.output / "resume.pt") if args.resume else None
    learner = build(job, saved)
    position = resume(job, learner, saved) if saved else new_folder(job)
    print_settings(job, learner.model)
    with StopRequest() as stop:
        for epoch in range(position["epoch"], job.recipe["epochs"]):
            if position["phase"] < epoch and epoch in phase_starts(job.recipe):
                learner, position["best"], position["phase"] = start_phase(job, learner, epoch), None, epoch
            train_epoch(job, learner, position, stop)
            end_epoch(job, learner, position)
            if agree(processes, [stop.asked is not None], {})[0][0]:
                raise Stopped(f"stopped after epoch {epoch + 1}; go on with --resume")
    score_tests(job, learner.model)
    print(f"run folder: {args.output}")


def main():
    args = arguments()
    if args.list_ablations:
        return list_ablations(args.model)
    if args.plan:
        return plan(args)
    processes = start_processes(args.device)
    # on the CPU a run repeats to the bit: otherwise threads add the gradients of x[index] in any order
    torch.use_deterministic_algorithms(processes.device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        with contextlib.redirect_stdout(sys.stdout if processes.first else None):
            train(args, processes)
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(args)) from error
    except Exception as error:                      # a traceback that is kept to the end keeps the loader's workers
        traceback.clear_frames(error.__traceback__)
        raise


if __name__ == "__main__":
    with evaluate.one_line_errors():
        main()
