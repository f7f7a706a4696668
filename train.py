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
import functools
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
from collections import namedtuple
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import resource
except ImportError:                                 # Windows has no such count
    resource = None

import data
import evaluate
import metrics
import models
from evaluate import PRECISIONS, Options, at_least, autocast, in_file_name, start_processes, to_device, write_text

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
    how = parser.add_argument_group("how (defaults: the recipe's)")
    number = {"type": at_least(1), "metavar": "N"}
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
    where.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and dropout")
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
    args.resume = holds_run(args.output) if args.resume == "auto" else args.resume
    return args


def settle(args):
    """Config and recipe: paper < dataset's or tiny recipe < ablation row < command line -> both, and what is asked for.

    What is asked for: the fields that the row and the command line name.
    """
    paper, tiny = models.paper(args.model), args.preset == "tiny"
    rows = {f"{table}/{row}": changes for table, named in paper.ABLATIONS.items() for row, changes in named.items()}
    if args.ablation and args.ablation not in rows:
        raise ValueError(f"--ablation {args.ablation}: no such row; there are {', '.join(rows)}")
    if args.ablation and args.ablation.partition("/")[0] in getattr(paper, "EVALUATION_ONLY", ()):
        changes = " ".join(f"{field}={value}" for field, value in rows[args.ablation].items())
        raise ValueError(f"--ablation {args.ablation}: no training of its own; train the whole model, then say "
                         f"python evaluate.py --checkpoint RUN --set {changes}")
    config, recipe = paper.Config.tiny() if tiny else paper.Config(), dict(paper.RECIPE)
    row, fields = rows.get(args.ablation, {}), {field.name for field in dataclasses.fields(config)}
    for changes in (paper.RECIPE_TINY if tiny else paper.RECIPE_FOR.get(args.dataset, {}), row):
        config = dataclasses.replace(config, **{key: value for key, value in changes.items() if key in fields})
        recipe |= {key: value for key, value in changes.items() if key not in fields}
    config, recipe = models.override(config, recipe, args.set)
    options = {key: getattr(args, key) for key in ("epochs", "batch_size", "micro_batch", "lr", "weight_decay")}
    options = {key: value for key, value in options.items() if value is not None}
    recipe |= options
    models.check_recipe(recipe)
    return config, recipe, {*row, *options, *(setting.partition("=")[0] for setting in args.set)}


def begun_with(args, config, recipe, asked):
    """Config and recipe of the run that --resume goes on with; whatever is asked for otherwise is an error."""
    path = args.output / "config.json"
    run, _ = models.run_settings(args.output, "--resume")
    old_config, old_recipe = models.settings_from(args.model, run["config"], run["recipe"])
    fields = (dataclasses.asdict(old_config), dataclasses.asdict(config)), (old_recipe, recipe)
    pairs = [(f"{part} ", "", run[part], getattr(args, part)) for part in RUN if part in run and part != "data_root"]
    if args.dataset != "synthetic":
        pairs += [("data_root ", "", *(str(Path(root).resolve()) for root in (run["data_root"], args.data_root)))]
    pairs += [(f"{field}=", f"{field}=", old[field], new[field]) for field in sorted(asked) for old, new in fields
              if field in new]
    for before, now, there, here in pairs:
        if there != here:
            longer = f", or train on from its weights: --start {args.output} --output NEW" if now == "epochs=" else ""
            raise ValueError(f"--resume: {path} was begun with {before}{there}, now {now}{here} is asked for; "
                             f"repeat the first command line with --resume, or give another --output{longer}")
    return old_config, old_recipe


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
    """Settings, data and tokenizer: what can be wrong with the input is found here, before a file is touched."""
    (config, recipe, asked), output = settle(args), args.output
    args.precision = args.precision or (recipe["precision"] if processes.device.type == "cuda" else "fp32")
    there = holds_run(output)
    if args.resume and not there:
        raise FileNotFoundError(f"--resume: no {output / 'resume.pt'}; start the run without --resume")
    if there and not (args.resume or args.overwrite):
        raise ValueError(f"{output} holds a run already: --resume goes on with it, --overwrite begins anew, "
                         "--output DIR keeps both")
    if args.tensorboard:
        for_tensorboard(output, 0, {})              # is it there?
    if args.resume:
        config, recipe = begun_with(args, config, recipe, asked)
    if processes.first:
        for name, part in (("config", dataclasses.asdict(config)), ("recipe", recipe)):
            print(f"{name}   " + "  ".join(f"{key}={value}" for key, value in part.items()), flush=True)
    samples = read(args, "train")
    validation = read(args, "val") if data.has_split(args.dataset, args.data_root, "val", args.refs) else []
    select = recipe["select"] if validation else "last"
    if config.pretrained == "none":
        tokenizer = models.word_tokenizer(args.model, config, data.vocabulary(args.dataset, samples))
        kept = models.read_tokenizer(args.model, config, output).words if args.resume else tokenizer.words
        if kept != tokenizer.words:
            odd = ", ".join(sorted({*kept} ^ {*tokenizer.words})[:5]) or "their order"
            raise ValueError(f"--resume: {output / 'tokenizer.json'} has other words than the data now ({odd}): "
                             "the data have changed")
        config = dataclasses.replace(config, vocab_size=len(tokenizer))
    else:
        tokenizer = models.paper(args.model).tokenizer(config)
    sampler = make_sampler(args, recipe, processes, samples)
    with can_be(output):
        output.mkdir(parents=True, exist_ok=True)
    return Job(args, processes, config, recipe, select, samples, validation, tokenizer, sampler)


def holds_run(output):
    with can_be(output):
        return (output / "resume.pt").is_file()


@contextlib.contextmanager
def can_be(output):
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output {output} can't be a folder ({error.strerror}); name another") from None


def read(args, split, epoch=0):
    only_synthetic = {"small": args.small} if args.dataset == "synthetic" else {}
    return data.read(args.dataset, args.data_root, split, refs=args.refs, categories=args.categories, limit=args.limit,
                     epoch=epoch, **only_synthetic)


def make_sampler(args, recipe, processes, samples):
    return data.TrainSampler(samples, batch_size=recipe["batch_size"], micro_batch=recipe["micro_batch"],
                             per_image=recipe["per_image"], seed=args.seed, world=processes.world,
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
        line = models.start_from(model, start, args.start, job.tokenizer.words if config.pretrained == "none" else None)
        if processes.first:
            print(f"start    {line}", flush=True)
    if processes.device.type == "cuda" and processes.world > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(processes.device).train()
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.precision == "fp16")
    learner = start_phase(job, Learner(model, model, None, scaler), 0)
    models.remember_sources(model, sources)
    torch.manual_seed(args.seed + 1000003 * (processes.rank + 1))          # dropout differs between processes
    return learner


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
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is truncated or not a resume file ({type(error).__name__}); "
                         "begin anew with --overwrite") from None


def new_folder(job):
    """An empty run folder with what is known before the first step -> where the run stands."""
    output = job.args.output
    if job.processes.first:
        for name in ("resume.pt", "best.safetensors", "last.safetensors", "tokenizer.json", "log.jsonl"):
            (output / name).unlink(missing_ok=True)
        for scores in output.glob("*/metrics.json"):
            shutil.rmtree(scores.parent)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                    "transformers": version("transformers")}
        about = {**{part: getattr(job.args, part) for part in (*RUN, "start")},
                 "config": dataclasses.asdict(job.config), "recipe": job.recipe, "versions": versions}
        write_text(output / "config.json", json.dumps(about, indent=1) + "\n")
        if job.config.pretrained == "none":
            write_text(output / "tokenizer.json", json.dumps({"words": job.tokenizer.words}) + "\n")
    return {"epoch": 0, "step": 0, "best": None, "log_length": 0, "sums": {}, "expressions": 0, "images": 0,
            "seconds": 0.0, "samples": len(job.samples), "steps": job.sampler.steps}


def resume(job, learner, saved):
    """Take up the run in the folder -> its learner and where it stands, as resume.pt has them."""
    path, log, processes = job.args.output / "resume.pt", job.args.output / "log.jsonl", job.processes
    if (saved["samples"], saved["steps"]) != (len(job.samples), job.sampler.steps):
        raise ValueError(f"--resume: the run was begun on {saved['samples']} samples, {saved['steps']} steps an epoch; "
                         f"now there are {len(job.samples)}, {job.sampler.steps} steps: the data have changed")
    for epoch in phase_starts(job.recipe):
        if 0 < epoch < saved["epoch"] + (saved["step"] > 0):
            learner = start_phase(job, learner, epoch)
    tensors, left_out, random = (saved.pop(name) for name in ("model", "left_out", "random"))
    models.load_own_state(learner.model, tensors, left_out, path)
    learner.optimizer.load_state_dict(saved.pop("optimizer"))
    learner.scaler.load_state_dict(saved.pop("scaler"))
    if len(random) == processes.world:
        torch.set_rng_state(random[processes.rank]["cpu"])
        if processes.device.type == "cuda" and "cuda" in random[processes.rank]:
            torch.cuda.set_rng_state(random[processes.rank]["cuda"], processes.device)
    elif processes.first:
        print(f"resumed on {processes.world} processes instead of {len(random)}: "
              "the same samples in the same order, other dropout")
    if processes.first:
        lines = log.read_bytes()[:saved["log_length"]] if log.exists() else b""
        if len(lines) < saved["log_length"]:
            print(f"{log} has lost lines of before; it goes on with those to come")
            lines = lines[:lines.rfind(b"\n") + 1]
        with models.put_in_place(log) as part:
            part.write_bytes(lines)
    return learner, {"images": 0, **saved}


# ------------------------------------------------------------------------------------------------------------ the step


def train_step(job, learner, position, sampler, batches, stop):
    """One optimiser step -> (sums of the loss terms over its expressions, what it took, whether to stop after it).

    The gradient is that of the mean over all of its expressions, whatever processes and micro-batches divide them.
    """
    recipe, processes, (model, network, optimizer, scaler) = job.recipe, job.processes, learner
    done, total = position["epoch"] * sampler.steps + position["step"], recipe["epochs"] * sampler.steps
    plan = sampler.plan(position["epoch"], position["step"])
    expressions = sum(len(numbers) for rank in plan for micro in rank for numbers in micro)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor(recipe, done, total)
    random, statistics = random_state(processes.device), batch_norm_buffers(model)
    sums, losses, ids = {}, [], []
    for left in reversed(range(len(plan[processes.rank]))):
        batch = to_device(next(batches), processes.device)
        with network.no_sync() if processes.world > 1 and left else contextlib.nullcontext():
            with autocast(processes.device, job.args.precision):
                outputs = network(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
            outputs = {key: value.float() if value.is_floating_point() else value for key, value in outputs.items()}
            terms = model.criterion(outputs, batch, done / total)
            loss, count = sum(terms.values()), len(batch["samples"])
            scaler.scale(loss * (count * processes.world / expressions)).backward()
        losses.append(loss.detach())
        ids.append([sample.id for sample in batch["samples"]])
        for name, value in {**terms, "loss": loss}.items():
            sums[name] = sums.get(name, 0) + value.detach() * count
    scaler.unscale_(optimizer)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(learning, recipe.get("clip") or math.inf)
    overflow_is_handled = scaler.is_enabled()
    finite = torch.isfinite(torch.stack(losses)).all() & (torch.isfinite(norm) | overflow_is_handled)
    (stops, infinite), totals = agree(processes, [float(stop.asked is not None), ~finite], sums)
    if infinite:
        for buffer, copy in statistics:
            buffer.copy_(copy)
        save_resume(job, learner, position, random)
        refuse_infinite(job, position, losses, ids)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return totals, {"expressions": expressions, "images": sum(map(len, itertools.chain(*plan)))}, bool(stops)


def batch_norm_buffers(model):
    """Copies of the running statistics, which a forward pass changes before its loss is known to be finite."""
    return [(buffer, buffer.clone()) for module in model.modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for buffer in module.buffers()]


def agree(processes, flags, sums):
    """The one small all-reduce and the one host read of a step -> (flags, sums) over all processes as floats."""
    values = torch.stack([*(torch.as_tensor(flag, dtype=torch.float64, device=processes.device) for flag in flags),
                          *(value.double() for value in sums.values())])
    if processes.world > 1:
        dist.all_reduce(values)
    values = values.tolist()
    return values[:len(flags)], dict(zip(sums, values[len(flags):], strict=True))


def refuse_infinite(job, position, losses, ids):
    """Name, over all processes, the samples whose loss is not finite; all, if only the gradient is not."""
    bad = [one for loss, group in zip(losses, ids, strict=True) for one in group if not torch.isfinite(loss)]
    gathered = [(bad, sum(ids, []))]
    if job.processes.world > 1:
        gathered = [None] * job.processes.world
        dist.all_gather_object(gathered, (bad, sum(ids, [])))
    named = [one for bad, _ in gathered for one in bad] or [one for _, every in gathered for one in every]
    raise ValueError(f"the loss is not finite at step {position['step'] + 1} of epoch {position['epoch'] + 1}; samples "
                     f"{', '.join(named)}; {job.args.output / 'resume.pt'} holds the state before this step; "
                     "try a lower --lr or --precision fp32 in a new run")


# ------------------------------------------------------------------------------------------------------------ the loop


def train_epoch(job, learner, position, stop):
    """The rest of an epoch, from the step at which the run stands."""
    args, recipe, processes, epoch = job.args, job.recipe, job.processes, position["epoch"]
    samples, sampler = job.samples, job.sampler
    if args.dataset == "synthetic":
        samples = read(args, "train", epoch)
        sampler = make_sampler(args, recipe, processes, samples)
    dataset = data.ReferringDataset(samples, job.config.image_size, job.tokenizer,
                                    repeat_mask=recipe.get("repeat_mask", 0.0),
                                    black_boxes=recipe.get("black_boxes", 0.0), draw=(args.seed, epoch))
    batches = evaluate.batches(dataset, sampler.batches(epoch, processes.rank, position["step"]), args.workers,
                               processes.device)
    begun = time.monotonic() - position["seconds"]
    bar = tqdm(range(position["step"], sampler.steps), f"epoch {epoch + 1}/{recipe['epochs']}",
               initial=position["step"], total=sampler.steps, disable=not processes.first, leave=False)
    for step in bar:
        totals, taken, stops = train_step(job, learner, position, sampler, batches, stop)
        for name, number in taken.items():
            position[name] += number
        position["sums"] = {name: position["sums"].get(name, 0.0) + value for name, value in totals.items()}
        position |= {"step": step + 1, "seconds": time.monotonic() - begun}
        now, rate = pace(position, processes.device), learner.optimizer.param_groups[0]["lr"]
        bar.set_postfix_str(f"loss {totals['loss'] / taken['expressions']:.3f}, rate {rate:.1e}, "
                            f"{now['images_per_second']} images/s, {now['peak_gib']} GiB", refresh=False)
        if stops or (args.save_every and (step + 1) % args.save_every == 0):
            save_resume(job, learner, position, random_state(processes.device))
        if stops:
            raise Stopped(f"stopped after step {step + 1} of epoch {epoch + 1}; go on with --resume")


def pace(position, device):
    """Images a second in this epoch and the process's peak memory so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else 0
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak
    return {"images_per_second": round(position["images"] / max(position["seconds"], 1e-9), 2),
            "peak_gib": round(peak / 2 ** 30, 2)}


def end_epoch(job, learner, position):
    """Validate, keep the best, write the log's line and the commit point."""
    args, recipe, processes, model = job.args, job.recipe, job.processes, learner.model
    epoch, summary, better = position["epoch"] + 1, {}, False
    if job.select != "last":
        lines = evaluate.evaluate(model, job.validation, processes, tokenizer=job.tokenizer,
                                  protocol=recipe["protocol"], empty=recipe["empty"], precision=job.args.precision,
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
        entry = {"epoch": epoch, **means, "lr": learner.optimizer.param_groups[0]["lr"], **scores, **figures,
                 "best": better, "seconds": round(position["seconds"], 1), **pace(position, processes.device)}
        with open(args.output / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
            position["log_length"] = file.tell()
        print(f"epoch {epoch}/{recipe['epochs']}", f"loss {entry['loss']:.3f}",
              *(f"{name} {value:.2f}" for name, value in scores.items()), f"{entry['seconds']:.0f} s",
              *(["best"] if better else []), sep="  ", flush=True)
        if args.tensorboard:
            for_tensorboard(args.output, epoch, {name: value for name, value in entry.items() if name != "epoch"})
    position |= {"epoch": epoch, "step": 0, "sums": {}, "expressions": 0, "images": 0, "seconds": 0.0}
    save_resume(job, learner, position, random_state(processes.device))


def for_tensorboard(folder, epoch, numbers, sheet=None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard: the package is not there; pip install tensorboard") from None
    with SummaryWriter(folder / "tensorboard") if numbers else contextlib.nullcontext() as writer:
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        if sheet:
            writer.add_image(sheet.parent.name, np.asarray(Image.open(sheet)), epoch, dataformats="HWC")


# ------------------------------------------------------------------------------------------------------------ the plan


def kept_for_backward(model, batch, precision):
    """Bytes that forward and criterion keep for the backward pass; the model's own tensors are not among them."""
    own = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with autocast(torch.device("cpu"), precision):
            outputs = model(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
        outputs = {key: value.float() if value.is_floating_point() else value for key, value in outputs.items()}
        sum(model.criterion(outputs, batch, 0.5).values())
    return sum(storage.nbytes() for storage in kept.values())


def count(name, config, recipe, precision, expressions):
    """A step's needs with so many expressions at once -> (parameters, those that learn, fixed bytes, bytes kept).

    Fixed are parameters, buffers, gradients and AdamW's two moments. No memory is taken: the tensors are fake, of the
    meta device, but answer as a processor's, so that attention keeps what a fused one keeps.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode            # slow to import
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()):
        model = models.build(name, dataclasses.replace(config, pretrained="none")).train()
        if recipe.get("phases"):
            model.start_phase(list(recipe["phases"])[-1])
        model.param_groups(recipe)
    images, side, length = -(-expressions // max(1, recipe["per_image"])), config.image_size, config.text_length
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {one: torch.nn.Parameter(torch.empty_like(one, device="cpu"), one.requires_grad)
                 for one in model.parameters()}
        fakes |= {one: torch.empty_like(one, device="cpu") for one in model.buffers()}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fakes.get(one) for name, one in tensors.items()})
        batch = {"images": torch.zeros(images, 3, side, side, dtype=torch.uint8),
                 "tokens": torch.ones(expressions, length, dtype=torch.long),
                 "text_mask": torch.ones(expressions, length, dtype=torch.bool),
                 "image_index": torch.arange(expressions) * images // expressions,
                 "masks": torch.zeros(expressions, side, side, dtype=torch.bool), "instance": torch.arange(expressions)}
        kept = kept_for_backward(model, batch, precision)
    learning = [one for one in model.parameters() if one.requires_grad]
    fixed = sum(one.nbytes for one in (*model.parameters(), *model.buffers(), *3 * learning))
    return *(sum(one.numel() for one in some) for some in (model.parameters(), learning)), fixed, kept


def memory(args, config, recipe):
    """(parameters, those that learn, {micro-batch: GiB that a step keeps}); the micro-batches are whole images."""
    precision, least = args.precision or recipe["precision"], max(1, recipe["per_image"])
    (every, learn, fixed, one), (*_, two) = (count(args.model, config, recipe, precision, least * k) for k in (1, 2))
    sizes = [least << k for k in range(20) if k == 0 or least << k <= recipe["batch_size"]]
    return every, learn, {size: (fixed + one + (two - one) * (size // least - 1)) / 2 ** 30 for size in sizes}


def plan(args):
    """Print what a step keeps in memory, by micro-batch; neither weights nor data are needed."""
    config, recipe, _ = settle(args)
    every, learn, table = memory(args, config, recipe)
    print(f"{args.model} ({args.preset}) on {args.dataset}: {every / 1e6:.2f} M parameters, {learn / 1e6:.2f} M learn, "
          f"{args.precision or recipe['precision']}\nparameters, gradients, optimiser and what is kept for the backward"
          f" pass; the peak lies above it\n\nmicro-batch      GiB   micro-batches in a step of {recipe['batch_size']}")
    for size, gib in table.items():
        print(f"{size:>11} {gib:>8.2f}   {-(-recipe['batch_size'] // size)}")
    try:
        samples = read(args, "train")
        sampler = make_sampler(args, recipe, evaluate.Processes(0, 1, torch.device("cpu")), samples)
        print(f"\n{len(samples)} training expressions: {sampler.steps} steps per epoch, "
              f"{sampler.steps * recipe['epochs']} in {recipe['epochs']} epochs")
    except FileNotFoundError:
        print("\nsteps per epoch: not known, the data are not there")


def out_of_memory(args):
    """What to do where the card is too small, in one line."""
    config, recipe, _ = settle(args)
    there = torch.cuda.get_device_properties(0).total_memory / 2 ** 30 if torch.cuda.is_available() else 0.0
    *_, table = memory(args, config, recipe)
    fitting = [size for size, gib in table.items() if gib < there and size < recipe["micro_batch"]]
    advice = f"say --micro-batch {fitting[-1]}, the same gradient" if fitting else "no smaller micro-batch fits"
    if not getattr(config, "checkpointing", True):
        advice += "; --set checkpointing=True keeps less and takes longer"
    return (f"out of memory: {there:.1f} GiB, --micro-batch {recipe['micro_batch']} in "
            f"{args.precision or recipe['precision']}; by the count of --plan {advice}")


# ------------------------------------------------------------------------------------------------------------- the run


@contextlib.contextmanager
def repeatable(device):
    """On the CPU a run repeats to the bit: without this, threads add the gradients of x[index] in any order."""
    fill, before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(device.type == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def train(args, processes):
    job = begin(args, processes)
    saved = load_resume(args.output / "resume.pt") if args.resume else None
    with repeatable(processes.device):
        learner = build(job, saved)
        if saved:
            learner, position = resume(job, learner, saved)
        else:
            position = new_folder(job)
        if processes.first:
            print_settings(job, learner.model)
        with StopRequest() as stop:
            for epoch in range(position["epoch"], job.recipe["epochs"]):
                if epoch > 0 and position["step"] == 0 and epoch in phase_starts(job.recipe):
                    learner, position["best"] = start_phase(job, learner, epoch), None
                train_epoch(job, learner, position, stop)
                end_epoch(job, learner, position)
                if agree(processes, [float(stop.asked is not None)], {})[0][0]:
                    raise Stopped(f"stopped after epoch {epoch + 1}; go on with --resume")
        score_tests(job, learner.model)
    if processes.first:
        print(f"run folder: {args.output}")


def print_settings(job, model):
    args, recipe, sampler = job.args, job.recipe, job.sampler
    every, learn = (sum(one.numel() for one in model.parameters() if one.requires_grad or frozen) / 1e6
                    for frozen in (True, False))
    print(f"{args.model} ({args.preset}) on {args.dataset}: {every:.2f} M parameters, {learn:.2f} M learn")
    print(f"data     {len(job.samples)} training and {len(job.validation)} validation expressions; an epoch has "
          f"{sampler.steps} steps of {recipe['batch_size']} expressions: {job.processes.world} process(es) x "
          f"{len(sampler.plan(0, 0)[0])} micro-batch(es)")
    if cut := data.cut(job.samples, job.tokenizer):
        print(f"text     {cut}")
    if recipe.get("repeat_mask"):
        print(f"groups   {recipe['per_image']} expressions of each image, masked repeats where it has fewer"
              if sampler.groups else
              "groups   none, one expression per image: no repeats, instance contrastive learning (ICL) is off")
    kept = "the last epoch" if job.select == "last" else f"validation {job.select}"
    print(f"run      {job.processes.device.type}, {job.args.precision}, seed {args.seed}, kept by {kept}, "
          f"folder {args.output}", flush=True)


def score_tests(job, model):
    """Score the kept weights on every test split (val where there is none); on synthetic scenes with the control."""
    args, processes = job.args, job.processes
    kept = args.output / ("last.safetensors" if job.select == "last" else "best.safetensors")
    if processes.world > 1:
        dist.barrier()
    models.load_own_state(model, *models.read_weights(kept), kept)
    wanted = next((split for split in ("test", "val")
                   if data.has_split(args.dataset, args.data_root, split, args.refs)), None)
    if processes.first and not wanted:
        print("nothing is scored: the data have neither a test nor a val split")
    score = functools.partial(
        evaluate.score_split, model, processes, dataset=args.dataset, data_root=args.data_root, refs=args.refs,
        recipe=job.recipe, output=args.output, tokenizer=job.tokenizer, precision=args.precision,
        micro_batch=job.recipe["micro_batch"], workers=args.workers, categories=args.categories, limit=args.limit,
        small=args.small, checkpoint=kept)
    for split in data.split_names(args.dataset, wanted, args.data_root, args.refs) if wanted else []:
        true = score(split=split)["mIoU"]
        if args.dataset in ("synthetic", "custom"):
            try:
                other = f"{score(split=split, control=True)['mIoU']:.2f}"
            except evaluate.NoControl as error:
                other = f"none, {error}"
            if processes.first:
                print(f"{split}: mIoU {true:.2f}; control, every image with another image's sentences: {other}")
        if processes.first and args.tensorboard:
            sheet = args.output / split / "sheet.png"
            for_tensorboard(args.output, job.recipe["epochs"], {f"{split}_mIoU": true}, sheet)


def main():
    args = arguments()
    if args.list_ablations:
        return list_ablations(args.model)
    if args.plan:
        return plan(args)
    try:
        train(args, start_processes(args.device))
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        raise ValueError(out_of_memory(args)) from error


if __name__ == "__main__":
    with evaluate.one_line_errors():
        main()
