"""Speed and memory, by hand: ratios within one run, each beside what the architecture itself demands.

    python tests/bench.py --model crobim_u                       paper size, random weights, one image and sentence
    python tests/bench.py --model crobim_u --preset tiny --repeat 1                     every part in half a minute

A measured ratio is a median of times taken in turn; a demanded one divides the floating-point operations that torch
counts (matrix products, convolutions, attention) of the same two pieces of work. measured/demanded is what the rest
costs: 1 where only these operations take time; at tiny sizes, where they take next to none, it says nothing. On the CPU
the process keeps the memory it has freed, as torch does on CUDA: fresh pages for every large tensor would be a cost.
"""

import argparse
import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import layouts  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import metrics  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}        # read by glibc at start
PARTS = {"step": "forward, loss, backward and AdamW of the model / of its published towers alone, the loss a sum",
         "inference": "forward of the model / of its published towers alone, both without gradients",
         "expressions": "inference on fifteen sentences of one image / on one sentence",
         "loader": "decoding and resizing image and mask by PIL alone / the data loader; 1 is as fast as decoding",
         "metrics": "evaluating 24 samples / their forward passes",
         "memory": "peak of a step's whole process, libraries included, beside the count of train.py --plan",
         "card": "on cuda: a step's sentences a second, share of the rate of a large matrix product, slowest operators"}


def crobim_u_backbones(model, batch):
    """ConvNeXt on every image and BERT on every sentence, nothing else."""
    features = model.convnext.embeddings(batch["images"] / 255)
    total = 0
    for stage in model.convnext.encoder.stages:
        features = stage(features)
        total = total + features.float().mean()
    words = model.bert(batch["tokens"], attention_mask=batch["text_mask"][:, None, None]).last_hidden_state
    return total + words.float().mean()


def icipnet_backbones(model, batch):
    """Swin on every sentence's image, as the model runs it from the second stage on, and BERT on every sentence."""
    tokens, size = model.swin.embeddings(batch["images"] / 255)
    total = 0
    for i, stage in enumerate(model.swin.encoder.layers):
        for block in stage.blocks:
            tokens = block(tokens, size, always_partition=True)[0]
        total = total + tokens.float().mean()
        if i == 0:
            tokens = tokens[batch["image_index"]]
        if stage.downsample is not None:
            tokens = stage.downsample(tokens, size)
            size = tuple((side + 1) // 2 for side in size)
    words = model.bert(batch["tokens"], attention_mask=batch["text_mask"][:, None, None]).last_hidden_state
    return total + words.float().mean()


def rsrefseg2_backbones(model, batch):
    """SigLIP 2 on small images and sentences, SAM 2.1's image encoder on large images, with their LoRA."""
    I_1, I_2 = model.two_sizes(batch["images"])
    v, words, _, sentence = model.encode(I_1, batch["tokens"], batch["text_mask"])
    features = model.sam.vision_encoder(I_2).fpn_hidden_states
    return sum(value.float().mean() for value in (v, words, sentence, *features))


def rs2sam2_backbones(model, batch):
    """BEiT-3 on image and words, SAM 2 on the image with no prompt, for every expression."""
    c, sam, to_pixels = model.config, model.sam, models.paper("rs2sam2").to_pixels
    images = batch["images"][batch["image_index"]]
    tokens, words = model.beit3(to_pixels(images, c.beit_size, *model.beit_statistics, "bicubic"),
                                batch["tokens"], batch["text_mask"])
    with torch.set_grad_enabled(torch.is_grad_enabled() and not c.freeze):
        pixels = to_pixels(images, c.image_size, *model.sam_statistics, "bilinear")
        feature4, feature8, feature16 = sam.vision_encoder(pixels).fpn_hidden_states
    logits = sam.mask_decoder(
        image_embeddings=feature16 + sam.no_memory_embedding.view(1, -1, 1, 1),
        image_positional_embeddings=sam.get_image_wide_positional_embeddings(),
        sparse_prompt_embeddings=feature16.new_zeros(len(images), 1, 0, c.sam_width),
        dense_prompt_embeddings=sam.prompt_encoder(None, None, None, None)[1], multimask_output=False,
        high_resolution_features=[sam.mask_decoder.conv_s0(feature4), sam.mask_decoder.conv_s1(feature8)])[0]
    return tokens.float().mean() + words.float().mean() + logits.float().mean()


def prompt_ris_backbones(model, batch):
    """CLIP's towers on every expression, crossed by the gradient as prompts demand; SAM's encoder on every image."""
    config, index = model.config, batch["image_index"]
    paper = sys.modules[type(model).__module__]
    pixels = paper.normalised(batch["images"], config.clip_size, paper.CLIP_MEAN, paper.CLIP_STD)
    image = model.clip_image.embeddings(pixels, interpolate_pos_encoding=True)
    image = model.clip_image.pre_layrnorm(image)[index]
    text = model.clip_text.embeddings(batch["tokens"])
    if torch.is_grad_enabled() and not image.requires_grad:
        image, text = image.requires_grad_(), text.requires_grad_()
    for image_layer, text_layer in zip(model.clip_image.encoder.layers, model.clip_text.encoder.layers, strict=True):
        image = image_layer(image, None)
        text = text_layer(text, None, is_causal=True)
    total = model.clip_image.post_layernorm(image[:, 1:]).float().mean()
    total = total + model.clip_text.final_layer_norm(text).float().mean()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not config.freeze):
        pixels = paper.normalised(batch["images"], config.image_size, paper.SAM_MEAN, paper.SAM_STD)
        features = model.sam.vision_encoder(pixels).last_hidden_state
    return total + features.float().mean()


BACKBONES = {"crobim_u": crobim_u_backbones, "icipnet": icipnet_backbones, "rsrefseg2": rsrefseg2_backbones,
             "rs2sam2": rs2sam2_backbones, "prompt_ris": prompt_ris_backbones}


def convolution_backward_flops(grad_shape, input_shape, weight_shape, *rest, **_):
    """One convolution per wanted gradient; torch's own count forgets the groups here, and ConvNeXt's are depthwise."""
    transposed, wanted = rest[4], rest[7]
    return conv_flop_count(input_shape, weight_shape, grad_shape, transposed) * sum(wanted[:2])


FLOPS = {torch.ops.aten.convolution_backward: convolution_backward_flops}


class Bench:
    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        paper = models.paper(args.model)
        config = paper.Config.tiny() if args.preset == "tiny" else paper.Config()
        config, self.recipe = models.override(dataclasses.replace(config, pretrained="none"), paper.RECIPE, args.set)
        torch.manual_seed(0)
        self.model = models.build(args.model, config).to(self.device).train()
        self.backbones = BACKBONES[args.model]
        # One for the model and its bare backbones: it moves what has a gradient, at a rate of zero.
        groups = [{**group, "lr": 0.0} for group in self.model.param_groups(self.recipe)]
        self.optimizer = torch.optim.AdamW(groups, fused=self.device.type == "cuda")

    def batch(self, images, expressions):
        c, generator = self.model.config, torch.Generator().manual_seed(0)
        square = (c.image_size, c.image_size)
        batch = {"images": torch.randint(0, 256, (images, 3, *square), dtype=torch.uint8, generator=generator),
                 "tokens": torch.randint(4, c.vocab_size, (expressions, c.text_length), generator=generator),
                 "text_mask": torch.ones(expressions, c.text_length, dtype=torch.bool),
                 "image_index": torch.arange(expressions) * images // expressions,
                 "masks": torch.rand(expressions, *square, generator=generator) > 0.9,
                 "instance": torch.arange(expressions)}
        return evaluate.to_device(batch, self.device)

    def forward(self, batch):
        with evaluate.autocast(self.device, self.args.precision):
            outputs = self.model(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
        return {key: value.float() if value.is_floating_point() else value for key, value in outputs.items()}

    def objective(self, batch):
        return sum(self.model.criterion(self.forward(batch), batch, 0.5).values())

    def bare_objective(self, batch):
        with evaluate.autocast(self.device, self.args.precision):
            return self.backbones(self.model, batch)

    def step_of(self, objective, batch):
        objective(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, works):
        """Median seconds of each of `works`, run in turn after one warm-up each."""
        times = [[] for _ in works]
        for round_ in range(self.args.repeat + 1):
            for work, kept in zip(works, times, strict=True):
                begun = time.perf_counter()
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if round_:
                    kept.append(time.perf_counter() - begun)
        return [statistics.median(kept) for kept in times]

    def report(self, name, works, labels, count_flops=True):
        full, bare = self.seconds(works)
        line = f"{name:<34}{labels[0]} {full:8.3f} s   {labels[1]} {bare:8.3f} s   measured ratio {full / bare:5.2f}"
        if count_flops:
            demanded = []
            for work in works:
                with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
                    work()
                demanded.append(counter.get_total_flops())
            ratio = demanded[0] / demanded[1]
            line += (f"   demanded {ratio:5.2f} ({demanded[0] / 1e9:.1f} / {demanded[1] / 1e9:.1f} GFLOP)"
                     f"   measured/demanded {full / bare / ratio:4.2f}")
        print(line, flush=True)

    # ---- the parts

    def step(self):
        batch = self.batch(self.args.images, self.args.images * self.args.per_image)
        self.report("training step / bare backbones",
                    [lambda: self.step_of(self.objective, batch), lambda: self.step_of(self.bare_objective, batch)],
                    ("step", "bare"))

    def inference(self):
        self.model.eval()
        batch = self.batch(self.args.images, self.args.images * self.args.per_image)
        with torch.no_grad():
            self.report("inference / bare backbones",
                        [lambda: self.forward(batch), lambda: self.bare_objective(batch)], ("model", "bare"))

    def expressions(self):
        self.model.eval()
        many, one = self.batch(1, 15), self.batch(1, 1)
        with torch.no_grad():
            self.report("15 expressions of an image / 1", [lambda: self.forward(many), lambda: self.forward(one)],
                        ("15", "1"))

    def loader(self):
        side = self.model.config.image_size
        with tempfile.TemporaryDirectory() as folder:
            layouts.write("risbench", folder, scenes=4, size=512)
            samples = data.read("risbench", folder, "train")
            tokens = torch.zeros(1, self.model.config.text_length, dtype=torch.long)
            dataset = data.ReferringDataset(
                samples, side, lambda texts: (tokens.expand(len(texts), -1), tokens.expand(len(texts), -1) > 0))

            def bare():
                for sample in samples:
                    with Image.open(sample.image) as image:
                        np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
                    with Image.open(sample.mask) as mask:
                        np.asarray(mask.resize((side, side), Image.Resampling.NEAREST))

            self.report("bare decode and resize / loader",
                        [bare, lambda: data.collate([dataset[(number,)] for number in range(len(samples))])],
                        ("bare", "loader"), count_flops=False)

    def metrics(self):
        """An evaluation beside its forward passes, and the share of it that counting and summing up take."""
        self.model.eval()
        spent = {"forward": [], "counts": [], "records": [], "summarize": []}
        places = {name: metrics if name in ("records", "summarize") else evaluate for name in spent}
        real = {name: getattr(place, name) for name, place in places.items()}

        def timed(name):
            def call(*args, **options):
                begun = time.perf_counter()
                result = real[name](*args, **options)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                spent[name].append(time.perf_counter() - begun)
                return result
            return call

        config = dataclasses.replace(self.model.config, vocab_size=100)
        tokenizer = models.word_tokenizer(self.args.model, config, data.vocabulary("synthetic", []))
        for name, place in places.items():
            setattr(place, name, timed(name))
        begun = time.perf_counter()
        lines = evaluate.evaluate(self.model, data.read("synthetic", "", "test", limit=24),
                                  evaluate.Processes(0, 1, self.device), tokenizer=tokenizer, protocol="resized",
                                  workers=0, precision=self.args.precision, micro_batch=12)
        metrics.summarize(lines, bootstrap=0)
        total = time.perf_counter() - begun
        for name, place in places.items():
            setattr(place, name, real[name])
        forward, *rest = (sum(times) for times in spent.values())
        print(f"{'evaluation / its forward passes':<34}{total:8.3f} s   forward {forward:8.3f} s   ratio "
              f"{total / forward:5.2f}   counting and summing up {sum(rest) / total:.1%}")

    def memory(self):
        """Peak of one training step in a process of its own (on cuda: of this one)."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            peak = torch.cuda.max_memory_allocated()
        else:
            command = [sys.executable, __file__, *sys.argv[1:], "--only-step"]
            peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        c, expressions = self.model.config, self.args.images * self.args.per_image
        *_, fixed, kept = train.count(self.args.model, c, {**self.recipe, "per_image": self.args.per_image},
                                      self.args.precision, expressions)
        print(f"{'peak memory of a training step':<34}{peak / 2 ** 30:8.2f} GiB   by the count of train.py --plan "
              f"{(fixed + kept) / 2 ** 30:.2f} GiB")

    def card(self):
        """What a step makes of the card: its rate beside that of a large product, and where its time goes."""
        if self.device.type != "cuda":
            return print("card: needs --device cuda")
        batch = self.batch(self.args.images, self.args.images * self.args.per_image)
        side, dtype = 8192, evaluate.PRECISIONS[self.args.precision] or torch.float32
        square = torch.randn(side, side, device=self.device, dtype=dtype)
        step, product = self.seconds([lambda: self.step_of(self.objective, batch), lambda: square @ square])
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            self.step_of(self.objective, batch)
        rate, most = counter.get_total_flops() / step / 1e12, 2 * side ** 3 / product / 1e12
        print(f"{'training step on the card':<34}{step:8.3f} s   {len(batch['tokens']) / step:.1f} sentences/s   "
              f"{rate:.0f} TFLOP/s, {rate / most:.0%} of the {most:.0f} of a matrix product")
        with torch.profiler.profile() as profile:
            self.step_of(self.objective, batch)
            torch.cuda.synchronize()
        spent = {one.key: one.self_device_time_total / 1e6 for one in profile.key_averages()
                 if one.device_type.name == "CPU"}
        print(f"  busy {sum(spent.values()) / step:.0%} of the step; by operator:")
        for name, seconds in sorted(spent.items(), key=lambda one: -one[1])[:10]:
            print(f"  {name:<60.60} {seconds:.4f} s  {seconds / step:6.1%}")


def arguments(argv=None):
    parts = "\n".join(f"  {name:<13}{meaning}" for name, meaning in PARTS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"what the parts divide by what:\n{parts}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="crobim_u", choices=BACKBONES, help="the paper (default crobim_u)")
    parser.add_argument("--preset", default="paper", choices=["paper", "tiny"], help="size (default paper)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"],
                        help="default: cuda where there is one")
    parser.add_argument("--precision", default="fp32", choices=evaluate.PRECISIONS, help="default fp32")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images of a batch (default 1)")
    parser.add_argument("--per-image", type=int, default=1, metavar="N", help="sentences of each image (default 1)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="timed rounds (default 3)")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help="default: all")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of Config or recipe")
    parser.add_argument("--only-step", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = arguments()
    if not os.environ.keys() >= KEEP_FREED_MEMORY.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})
    bench = Bench(args)
    if args.only_step:
        for _ in range(2):              # from the second on the optimiser holds its moments
            bench.step_of(bench.objective, bench.batch(args.images, args.images * args.per_image))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    count = sum(parameter.numel() for parameter in bench.model.parameters())
    print(f"{args.model} {args.preset} {' '.join(args.set)}: {count / 1e6:.2f} M parameters, {args.images} image(s) x "
          f"{args.per_image} sentence(s) at {bench.model.config.image_size}, {args.precision} on {args.device}, "
          f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in args.part:
        getattr(bench, part)()


if __name__ == "__main__":
    main()
