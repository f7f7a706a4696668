"""Train one of the models on one of the datasets, from a fresh machine's synthetic default to a paper's run.

    python train.py                                                       # tiny CroBIM-U on synthetic scenes, CPU
    python train.py --model crobim_u --dataset risbench --data-root DIR   # the paper's recipe
    torchrun --nproc-per-node 8 train.py ...                              # the same on eight GPUs
    python train.py ... --resume                                          # go on where it was interrupted

The run folder holds config.json, resume.pt, best and last weights, log.jsonl and the scores of the test splits.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

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
    what.add_argument("--categories", default="all", choices=["all", "seen"], help="COCO categories to train on")
    what.add_argument("--small", action="store_true", help="synthetic scenes: objects from 0.2 %% of the image")
    what.add_argument("--preset", choices=["paper", "tiny"], help="default: paper, for synthetic tiny")
    what.add_argument("--ablation", metavar="TABLE/ROW", help="a row of the paper's ablation tables, e.g. V/+UGF")
    what.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
                      help="any fields of Config or recipe; options named below come after it")
    how = parser.add_argument_group("how (defaults: the recipe's)")
    how.add_argument("--epochs", type=at_least(1), metavar="N", help="epochs")
    how.add_argument("-b", "--batch-size", type=at_least(1), metavar="N",
                     help="expressions per step, over all processes")
    how.add_argument("--micro-batch", type=at_least(1), metavar="N", help="expressions that one process takes at once")
    how.add_argument("--lr", type=float, metavar="X", help="base learning rate")
    how.add_argument("--weight-decay", type=float, metavar="X", help="AdamW weight decay")
    how.add_argument("--precision", choices=PRECISIONS, help="default: the recipe's on cuda, fp32 on the cpu")
    how.add_argument("--limit", type=at_least(0), default=0, metavar="N", help="first N samples of a split (0: all)")
    where = parser.add_argument_group("where")
    where.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    where.add_argument("--compile", action="store_true", help="torch.compile the model")
    where.add_argument("-j", "--workers", type=at_least(0), default=min(8, max(1, os.cpu_count() // 2)), metavar="N",
                       help="loader processes per training process")
    where.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, order and dropout")
    where.add_argument("--output", metavar="DIR",
                       help="run folder (default: runs/MODEL-DATASET, then -tiny on real data and the ablation row)")
    where.add_argument("--save-every", type=at_least(0), default=0, metavar="STEPS",
                       help="save resume.pt also within an epoch")
    again = where.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the run in --output")
    again.add_argument("--overwrite", action="store_true", help="begin anew in --output")
    args = parser.parse_args(argv)
    usual = "tiny" if args.dataset == "synthetic" else "paper"
    args.preset = args.preset or usual
    parts = [args.model, args.dataset, *[args.preset] * (args.preset != usual), *[args.ablation] * bool(args.ablation)]
    args.output = Path(args.output or f"runs/{in_file_name('-'.join(parts))}")
    return args


def settle(args):
    """Config and recipe: paper < dataset's or tiny recipe < ablation row < command line."""
    paper = models.paper(args.model)
    tiny = args.preset == "tiny"
    changes = [paper.RECIPE_TINY if tiny else paper.RECIPE_FOR.get(args.dataset, {})]
    if args.ablation:
        table, _, row = args.ablation.partition("/")
        rows = [f"{t}/{r}" for t, names in paper.ABLATIONS.items() for r in names]
        if args.ablation not in rows:
            raise ValueError(f"--ablation {args.ablation}: no such row; there are {', '.join(rows)}")
        changes.append(paper.ABLATIONS[table][row])
    config, recipe = paper.Config.tiny() if tiny else paper.Config(), dict(paper.RECIPE)
    fields = {field.name for field in dataclasses.fields(config)}
    for change in changes:
        config = dataclasses.replace(config, **{key: value for key, value in change.items() if key in fields})
        recipe |= {key: value for key, value in change.items() if key not in fields}
    config, recipe = models.override(config, recipe, args.set)
    named = {key: getattr(args, key) for key in ("epochs", "batch_size", "micro_batch", "lr", "weight_decay")}
    recipe |= {key: value for key, value in named.items() if value is not None}
    models.check_recipe(recipe)
    return config, recipe


def check_same_run(args, config, recipe):
    """A resumed run goes on with the settings it began with; anything asked for otherwise is an error."""
    path = args.output / "config.json"
    run, asked = json.loads(path.read_text()), json.loads(json.dumps(describe(args, config, recipe)))
    for part in ("model", "dataset", "preset", "categories", "small", "limit", "seed"):
        if run[part] != asked[part]:
            raise ValueError(f"--resume: {path} was begun with {part} {run[part]}, now {asked[part]} is asked for; "
                             "repeat the first command line with --resume, or give another --output")
    for part in ("config", "recipe"):
        for field in sorted({*run[part], *asked[part]}):
            old, new = run[part].get(field), asked[part].get(field)
            if old != new:
                raise ValueError(f"--resume: {path} was begun with {field}={old}, now {field}={new} is asked for; "
                                 "repeat the first command line with --resume, or give another --output")


def describe(args, config, recipe):
    """What config.json holds: enough to rebuild the model and to repeat the run."""
    return {
        "model": args.model, "config": dataclasses.asdict(config), "recipe": recipe, "dataset": args.dataset,
        "data_root": str(args.data_root), "categories": args.categories, "small": args.small, "limit": args.limit,
        "preset": args.preset, "ablation": args.ablation, "seed": args.seed,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": version("transformers"), "numpy": np.__version__},
    }


# ---------------------------------------------------------------------------------------- optimiser, schedule, phases


def factor(recipe, step, total):
    """Learning-rate factor of optimiser step `step` of `total`; warm-up and drop are given in epochs."""
    per_epoch = total / recipe["epochs"]
    warmup = recipe.get("warmup", 0) * per_epoch
    if step < warmup:
        return (step + 1) / warmup
    kind = recipe["schedule"]
    if kind == "poly":
        return (1 - step / total) ** recipe.get("power", 0.9)
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if kind == "step":
        return recipe["drop_factor"] if step >= total - recipe["drop_epochs"] * per_epoch else 1.0
    return 1.0                                      # constant; models.check_recipe knows no other


def make_optimizer(model, recipe, device, old=None):
    """AdamW over `model.param_groups`; what an `old` optimiser knows of parameters that go on learning is kept."""
    groups = [{**group, "base_lr": group["lr"]} for group in model.param_groups(recipe)]
    optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
    if old is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in old.state:
                    optimizer.state[parameter] = old.state[parameter]
    return optimizer


def phase_starts(recipe):
    """[(first epoch, name)]; phases are fractions of the run and begin with an epoch."""
    starts, begun = [], 0.0
    for name, fraction in (recipe.get("phases") or {}).items():
        starts.append((round(begun * recipe["epochs"]), name))
        begun += fraction
    return starts


class Stopped(Exception):
    """The run was asked to stop and has saved its state."""


# ------------------------------------------------------------------------------------------------- saving, stopping


class StopRequest:
    """Remembers Ctrl-C or SIGTERM until the step is over; a second Ctrl-C, some seconds later, ends at once."""

    def __init__(self):
        self.asked = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        # torchrun passes on a Ctrl-C that its processes have had from the terminal already
        if self.asked and time.monotonic() - self.asked > 3 and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or time.monotonic()


def random_state(device):
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_torch(values, path):
    """torch.save beside and then into place, on disk before the old file goes."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save_resume(run, random):
    """resume.pt, the commit point of a run: everything that the next step depends on, as plain types."""
    processes = run.processes
    states = [random]
    if processes.world > 1:
        states = [None] * processes.world
        dist.all_gather_object(states, random)
    if processes.first:
        tensors, left_out = models.own_state(run.model)
        save_torch({"model": tensors, "left_out": left_out, "optimizer": run.optimizer.state_dict(),
                    "scaler": run.scaler.state_dict(), "random": states, **run.position}, run.args.output / "resume.pt")


def load_resume(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is truncated or not a resume file ({type(error).__name__}); "
                         "begin anew with --overwrite") from None


def batch_norm_buffers(model):
    """Copies of the running statistics, which a forward pass changes before its loss is known to be finite."""
    return [(buffer, buffer.clone()) for module in model.modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for buffer in module.buffers()]


# ------------------------------------------------------------------------------------------------------------ steps


def expressions_of(plan):
    return sum(len(numbers) for rank in plan for micro in rank for numbers in micro)


def accumulate(run, batches, plan, progress):
    """Forward and backward of one optimiser step; the gradient is that of the mean over all of the step's expressions.

    Returns ({term: sum over this process's expressions}, the loss of each micro-batch, the sample ids of each).
    """
    processes, total = run.processes, expressions_of(plan)
    sums, losses, ids = {}, [], []
    count = len(plan[processes.rank])
    for k in range(count):
        batch = to_device(next(batches), processes.device)
        expressions = len(batch["samples"])
        waits = processes.world > 1 and k < count - 1
        with run.network.no_sync() if waits else contextlib.nullcontext():
            with autocast(processes.device, run.precision):
                outputs = run.network(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
            outputs = {key: value.float() if value.is_floating_point() else value for key, value in outputs.items()}
            terms = run.model.criterion(outputs, batch, progress)
            loss = sum(terms.values())
            run.scaler.scale(loss * (expressions * processes.world / total)).backward()
        ids.append([sample.id for sample in batch["samples"]])
        losses.append(loss.detach())
        for name, value in {**terms, "loss": loss}.items():
            sums[name] = sums.get(name, 0) + value.detach() * expressions
    return sums, losses, ids


def agree(processes, flags, sums):
    """The one small all-reduce and the one host read of a step -> (flags, sums) over all processes as floats."""
    values = torch.stack([*(torch.as_tensor(flag, dtype=torch.float64, device=processes.device) for flag in flags),
                          *(value.double() for value in sums.values())])
    if processes.world > 1:
        dist.all_reduce(values)
    values = values.tolist()
    return values[:len(flags)], dict(zip(sums, values[len(flags):], strict=True))


def name_culprits(processes, losses, ids):
    """Ids, over all processes, of the samples with a loss that is not finite; of all, if only the gradient is not."""
    mine = [one for loss, group in zip(losses, ids, strict=True) for one in group if not torch.isfinite(loss)]
    gathered = [(mine, sum(ids, []))]
    if processes.world > 1:
        gathered = [None] * processes.world
        dist.all_gather_object(gathered, (mine, sum(ids, [])))
    named = [one for bad, _ in gathered for one in bad]
    return named or [one for _, every in gathered for one in every]


# -------------------------------------------------------------------------------------------------------------- run


@dataclasses.dataclass
class Run:
    """What the sections of a run hand on to each other."""

    args: argparse.Namespace
    processes: evaluate.Processes
    config: object
    recipe: dict
    precision: str
    samples: list
    validation: list
    tokenizer: object
    sampler: data.TrainSampler
    model: torch.nn.Module = None
    network: torch.nn.Module = None        # the model as the step calls it: compiled, under DDP
    optimizer: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None
    position: dict = None                  # where the run stands, as resume.pt keeps it

    @property
    def total_steps(self):
        return self.recipe["epochs"] * self.sampler.steps

    @property
    def select(self):
        return self.recipe["select"] if self.validation else "last"


def read_samples(args, split, epoch=0):
    return data.read(args.dataset, args.data_root, split, categories=args.categories, limit=args.limit, epoch=epoch,
                     **({"small": args.small} if args.dataset == "synthetic" else {}))


def make_sampler(args, recipe, processes, samples):
    return data.TrainSampler(samples, batch_size=recipe["batch_size"], micro_batch=recipe["micro_batch"],
                             per_image=recipe["per_image"], seed=args.seed, world=processes.world,
                             repeat_mask=recipe.get("repeat_mask", 0.0))


def begin(args, processes):
    """Settings, data and tokenizer: what can be wrong with the input is found here, before a file is touched."""
    config, recipe = settle(args)
    output = args.output
    if args.resume and not (output / "resume.pt").is_file():
        raise FileNotFoundError(f"--resume: no {output / 'resume.pt'}; start the run without --resume")
    if (output / "resume.pt").exists() and not (args.resume or args.overwrite):
        raise ValueError(f"{output} holds a run already: --resume goes on with it, --overwrite begins anew, "
                         "--output DIR keeps both")
    precision = args.precision or (recipe["precision"] if processes.device.type == "cuda" else "fp32")
    samples = read_samples(args, "train")
    validation = read_samples(args, "val") if data.has_split(args.dataset, args.data_root, "val") else []
    if config.pretrained == "none":
        tokenizer = models.word_tokenizer(args.model, config, data.vocabulary(args.dataset, samples))
        config = dataclasses.replace(config, vocab_size=len(tokenizer))
    else:
        tokenizer = models.paper(args.model).tokenizer(config)
    if args.resume:
        check_same_run(args, config, recipe)
    sampler = make_sampler(args, recipe, processes, samples)
    return Run(args, processes, config, recipe, precision, samples, validation, tokenizer, sampler)


def build(run):
    """Model, optimiser and scaler as they are before the first step."""
    args, device = run.args, run.processes.device
    torch.manual_seed(args.seed)
    model = models.build(args.model, run.config)
    sources = model.load_pretrained() if run.config.pretrained != "none" else {}
    if device.type == "cuda" and run.processes.world > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    run.model = model.to(device).train()
    start_phase(run, 0)
    models.remember_sources(model, sources)
    run.scaler = torch.amp.GradScaler(device.type, enabled=run.precision == "fp16")
    run.position = {"epoch": 0, "step": 0, "best": None, "log_length": 0, "sums": {}, "expressions": 0, "seconds": 0.0,
                    "samples": len(run.samples), "steps": run.sampler.steps}
    torch.manual_seed(args.seed + 1000003 * (run.processes.rank + 1))      # dropout differs between processes


def start_phase(run, epoch):
    """Enter the phase that begins with `epoch`, if one does; a run without phases has its optimiser from epoch 0 on."""
    names = [name for start, name in phase_starts(run.recipe) if start == epoch]
    if names and not hasattr(run.model, "start_phase"):
        raise ValueError(f"phases={run.recipe['phases']}: {run.args.model} has none; say --set phases=none")
    if names:
        run.model.start_phase(names[-1])
    if names or epoch == 0:
        run.optimizer = make_optimizer(run.model, run.recipe, run.processes.device, old=run.optimizer)
        if epoch > 0:
            run.position["best"] = None
        wrap(run)


def wrap(run):
    device = run.processes.device
    run.network = torch.compile(run.model) if run.args.compile else run.model
    if run.processes.world > 1:
        run.network = DistributedDataParallel(run.network, device_ids=[device.index] if device.type == "cuda" else None)


def resume(run):
    """Take up the run in the folder: weights, optimiser, random state and position of resume.pt."""
    path, processes = run.args.output / "resume.pt", run.processes
    saved = load_resume(path)
    if (saved["samples"], saved["steps"]) != (len(run.samples), run.sampler.steps):
        raise ValueError(f"--resume: the run was begun on {saved['samples']} samples, {saved['steps']} steps an epoch; "
                         f"now there are {len(run.samples)}, {run.sampler.steps} steps: the data have changed")
    for epoch in range(1, saved["epoch"] + (saved["step"] > 0)):
        start_phase(run, epoch)
    models.load_own_state(run.model, saved["model"], saved["left_out"], path)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scaler.load_state_dict(saved["scaler"])
    run.position = {key: saved[key] for key in run.position}
    if len(saved["random"]) == processes.world:
        set_random_state(saved["random"][processes.rank], processes.device)
    elif processes.first:
        print(f"resumed on {processes.world} processes instead of {len(saved['random'])}: "
              "the same samples in the same order, other dropout")
    if processes.first and (run.args.output / "log.jsonl").exists():
        with open(run.args.output / "log.jsonl", "r+b") as file:
            file.truncate(run.position["log_length"])


def new_folder(run):
    """An empty run folder with what is known before the first step."""
    output = run.args.output
    output.mkdir(parents=True, exist_ok=True)
    for name in ("resume.pt", "best.safetensors", "last.safetensors", "tokenizer.json", "log.jsonl"):
        (output / name).unlink(missing_ok=True)
    for scores in output.glob("*/metrics.json"):
        shutil.rmtree(scores.parent)
    write_text(output / "config.json", json.dumps(describe(run.args, run.config, run.recipe), indent=1) + "\n")
    if run.config.pretrained == "none":
        write_text(output / "tokenizer.json", json.dumps({"words": run.tokenizer.words}) + "\n")


def train_epoch(run, epoch, stop):
    """The rest of an epoch, from the step at which the run stands."""
    args, recipe, processes, position = run.args, run.recipe, run.processes, run.position
    if args.dataset == "synthetic":
        run.samples = read_samples(args, "train", epoch)
        run.sampler = make_sampler(args, recipe, processes, run.samples)
    dataset = data.ReferringDataset(run.samples, run.config.image_size, run.tokenizer,
                                    repeat_mask=recipe.get("repeat_mask", 0.0), draw=(args.seed, epoch))
    loader = DataLoader(dataset, batch_sampler=list(run.sampler.batches(epoch, processes.rank, position["step"])),
                        num_workers=args.workers, collate_fn=data.collate, pin_memory=processes.device.type == "cuda",
                        generator=torch.Generator().manual_seed(0))
    batches, begun = iter(loader), time.monotonic() - position["seconds"]
    bar = tqdm(range(position["step"], run.sampler.steps), f"epoch {epoch + 1}/{recipe['epochs']}",
               initial=position["step"], total=run.sampler.steps, disable=not processes.first, leave=False)
    for step in bar:
        totals, expressions, stops = train_step(run, epoch, step, batches, stop)
        position["expressions"] += expressions
        position["sums"] = {name: position["sums"].get(name, 0.0) + value for name, value in totals.items()}
        position |= {"step": step + 1, "seconds": time.monotonic() - begun}
        bar.set_postfix(loss=f"{totals['loss'] / expressions:.3f}", lr=f"{run.optimizer.param_groups[0]['lr']:.1e}",
                        refresh=False)
        if stops or (args.save_every and (step + 1) % args.save_every == 0):
            save_resume(run, random_state(processes.device))
        if stops:
            raise Stopped(f"stopped after step {step + 1} of epoch {epoch + 1}; go on with --resume")


def train_step(run, epoch, step, batches, stop):
    """One optimiser step -> (sums of the loss terms over its expressions, their number, whether to stop after it)."""
    recipe, processes, optimizer, scaler = run.recipe, run.processes, run.optimizer, run.scaler
    done = epoch * run.sampler.steps + step
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor(recipe, done, run.total_steps)
    rng, statistics = random_state(processes.device), batch_norm_buffers(run.model)
    plan = run.sampler.plan(epoch, step)
    sums, losses, ids = accumulate(run, batches, plan, done / run.total_steps)
    scaler.unscale_(optimizer)
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(learning, recipe.get("clip") or math.inf)
    overflow_is_handled = scaler.is_enabled()
    finite = torch.isfinite(torch.stack(losses)).all() & (torch.isfinite(norm) | overflow_is_handled)
    (stops, infinite), totals = agree(processes, [float(stop.asked is not None), ~finite], sums)
    if infinite:
        for buffer, copy in statistics:
            buffer.copy_(copy)
        save_resume(run, rng)
        named = name_culprits(processes, losses, ids)
        raise ValueError(f"the loss is not finite at step {step + 1} of epoch {epoch + 1}; samples {', '.join(named)}; "
                         f"{run.args.output / 'resume.pt'} holds the state before this step; try a lower --lr or "
                         "--precision fp32 in a new run")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return totals, expressions_of(plan), bool(stops)


def end_epoch(run, epoch):
    """Validate, keep the best, write the log's line and the commit point."""
    args, recipe, processes, position = run.args, run.recipe, run.processes, run.position
    summary = {}
    if run.select != "last":
        lines, _ = evaluate.evaluate(run.model, run.validation, processes, tokenizer=run.tokenizer,
                                     protocol=recipe["protocol"], empty=recipe["empty"], precision=run.precision,
                                     micro_batch=recipe["micro_batch"], workers=args.workers, label="validate")
        summary = metrics.summarize(lines, empty=recipe["empty"], bootstrap=0)
    score = sum(summary[name] for name in run.select.split("+")) if summary else None
    better = bool(summary) and (position["best"] is None or score > position["best"])
    if better:
        position["best"] = score
    if processes.first:
        if better:
            models.save(run.model, args.output / "best.safetensors")
        models.save(run.model, args.output / "last.safetensors")
        means = {name: value / position["expressions"] for name, value in position["sums"].items()}
        scores = {f"val_{name}": summary[name] for name in ("oIoU", "mIoU") if summary}
        figures = {f"val_{name}": row["mean"] for name, row in summary.get("diagnostics", {}).items()}
        entry = {"epoch": epoch + 1, **means, "lr": run.optimizer.param_groups[0]["lr"], **scores, **figures,
                 "best": better, "seconds": round(position["seconds"], 1)}
        with open(args.output / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
            position["log_length"] = file.tell()
        shown = [f"epoch {epoch + 1}/{recipe['epochs']}", f"loss {entry['loss']:.3f}",
                 *(f"{name} {value:.2f}" for name, value in scores.items()), f"{entry['seconds']:.0f} s"]
        print("  ".join(shown + ["best"] * better), flush=True)
    position |= {"epoch": epoch + 1, "step": 0, "sums": {}, "expressions": 0, "seconds": 0.0}
    save_resume(run, random_state(processes.device))


def score_tests(run):
    """Score the kept weights on every test split (val where there is none); on synthetic scenes with the control."""
    args, processes = run.args, run.processes
    kept = args.output / ("last.safetensors" if run.select == "last" else "best.safetensors")
    if processes.world > 1:
        dist.barrier()
    models.load_own_state(run.model, *models.read_weights(kept), kept)
    wanted = next((split for split in ("test", "val") if data.has_split(args.dataset, args.data_root, split)), None)
    if processes.first and not wanted:
        print("nothing is scored: the data have neither a test nor a val split")
    for split in data.split_names(args.dataset, wanted, args.data_root) if wanted else []:
        def score(control, split=split):
            return evaluate.score_split(
                run.model, processes, dataset=args.dataset, data_root=args.data_root, split=split, recipe=run.recipe,
                output=args.output, tokenizer=run.tokenizer, precision=run.precision,
                micro_batch=run.recipe["micro_batch"], workers=args.workers, categories=args.categories,
                limit=args.limit, small=args.small, control=control, checkpoint=kept)["mIoU"]

        true = score(control=False)
        if args.dataset == "synthetic":
            other = score(control=True)
            if processes.first:
                print(f"{split}: mIoU {true:.2f}; control, every image with another image's sentences: {other:.2f}")


def train(args, processes):
    run = begin(args, processes)
    build(run)
    if args.resume:
        resume(run)
    elif processes.first:
        new_folder(run)
    if processes.first:
        print_settings(run)
    stop = StopRequest()
    for epoch in range(run.position["epoch"], run.recipe["epochs"]):
        if epoch > 0 and run.position["step"] == 0:
            start_phase(run, epoch)
        train_epoch(run, epoch, stop)
        end_epoch(run, epoch)
        if agree(processes, [float(stop.asked is not None)], {})[0][0]:
            raise Stopped(f"stopped after epoch {epoch + 1}; go on with --resume")
    score_tests(run)
    if processes.first:
        print(f"run folder: {args.output}")


def print_settings(run):
    args, recipe, processes = run.args, run.recipe, run.processes
    parameters = list(run.model.parameters())
    learn = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    micros = len(run.sampler.plan(0, 0)[0])
    print(f"{args.model} ({args.preset}) on {args.dataset}: "
          f"{sum(parameter.numel() for parameter in parameters) / 1e6:.2f} M parameters, {learn / 1e6:.2f} M learn")
    print("config   " + "  ".join(f"{key}={value}" for key, value in dataclasses.asdict(run.config).items()))
    print("recipe   " + "  ".join(f"{key}={value}" for key, value in recipe.items()))
    kept = "the last epoch" if run.select == "last" else f"validation {run.select}"
    print(f"data     {len(run.samples)} training and {len(run.validation)} validation expressions; an epoch has "
          f"{run.sampler.steps} steps of {recipe['batch_size']} expressions: {processes.world} process(es) x "
          f"{micros} micro-batch(es)")
    if recipe.get("repeat_mask"):
        print(f"groups   {recipe['per_image']} expressions of each image, masked repeats where it has fewer"
              if run.sampler.groups else
              "groups   none, one expression per image: no repeats, instance contrastive learning (ICL) is off")
    print(f"run      {processes.device.type}, {run.precision}, seed {args.seed}, kept by {kept}, folder {args.output}",
          flush=True)


def main():
    args = arguments()
    try:
        train(args, start_processes(args.device))
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    with evaluate.one_line_errors():
        main()
