"""What every file of models/ must do, whatever its paper says: DESIGN's contract, run over all of them and over a toy.

A sixth paper is held to it as soon as its file is in the folder. The papers' own tests keep the equations.
"""

import contextlib
import dataclasses
from pathlib import Path

import bench
import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import data
import models

FILES = sorted(path.stem for path in Path(models.__file__).parent.glob("*.py") if path.stem != "__init__")
NAMES = [*FILES, "toy"]
WORDS = sorted({"a", "the", "red", "blue", "green", "ship", "car", "left", "of", "right", "upper", "lower", "pier"})
SENTENCES = ("the red ship", "a blue car", "the upper ship left of the green pier", "ship", "the lower right car",
             "a green ship right of the car")
# What ties an expression to its company by the paper's own will, and is off where company must not matter.
ALONE = {"rsrefseg2": {"alpha_samp": 0.0}}
# Smaller pictures than tiny's: seconds for minutes.
SIDES = {"crobim_u": {"image_size": 64}, "icipnet": {"image_size": 64},
         "prompt_ris": {"image_size": 48, "clip_size": 48}, "rs2sam2": {"image_size": 64, "beit_size": 48},
         "rsrefseg2": {"image_size": 64, "vision_size": 64}}
# SigLIP's text tower was trained to read its padding, and every sentence has the same.
READS_PADDING = ("rsrefseg2",)
# RSRefSeg 2's rows name published towers and their sizes: the tiny ones have neither.
SIZES = {224: 32, 384: 48, 448: 64, 768: 96}

every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(models.PAPERS, "toy", "Toy")
    toy.register()


def tokenizer(name, config):
    return models.word_tokenizer(name, config, WORDS)


def settings(name, **changes):
    """(tiny Config, tiny recipe) of a paper, with this file's vocabulary and pictures."""
    paper = models.paper(name)
    config = dataclasses.replace(paper.Config.tiny(), **SIDES.get(name, {}) | changes)
    config = dataclasses.replace(config, vocab_size=len(tokenizer(name, config)))
    return config, paper.RECIPE | paper.RECIPE_TINY


def build(name, config, seed=0):
    """A model whose every parameter was moved: no zero, one or identity hides a missing term."""
    torch.manual_seed(seed)
    model = models.build(name, config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def batch(name, config, index=(0, 1, 1), seed=0):
    """Random images; sentences of unlike lengths; each mask a rectangle of its own."""
    random = torch.Generator().manual_seed(seed)
    count, side = len(index), config.image_size
    tokens, text_mask = tokenizer(name, config)([SENTENCES[k % len(SENTENCES)] for k in range(count)])
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for k in range(count):
        masks[k, side // 8 * (k % 4):side // 8 * (k % 4) + side // 3, side // 4:side // 2 + side // 16 * (k % 3)] = True
    images = torch.randint(0, 256, (max(index) + 1, 3, side, side), dtype=torch.uint8, generator=random)
    return {"images": images, "tokens": tokens, "text_mask": text_mask, "image_index": torch.tensor(index),
            "masks": masks, "instance": torch.arange(count)}


def run(model, given):
    return model(given["images"], given["tokens"], given["text_mask"], given["image_index"])


def objective(model, given, progress=1.0):
    return sum(model.criterion(run(model, given), given, progress).values())


def phases(model, recipe):
    """The phases of the recipe one after the other, entered; [None] where there are none."""
    for phase in recipe["phases"] or [None]:
        if phase is not None:
            model.start_phase(phase)
        yield phase


def learning(model, recipe):
    """Names of the parameters in `param_groups`, after a check that they are those with requires_grad."""
    grouped = [id(parameter) for group in model.param_groups(recipe) for parameter in group["params"]]
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return names


# --------------------------------------------------------------------------------------------------- the file's tables


def test_every_file_is_known_by_name():
    assert set(FILES) == set(models.PAPERS) - {"toy"}


@every_model
def test_tables_name_fields_that_exist(name):
    paper = models.paper(name)
    fields = {field.name for field in dataclasses.fields(paper.Config)}
    assert {"image_size", "text_length", "vocab_size", "pretrained"} <= fields
    both = fields & set(paper.RECIPE)                       # a tower's name there, a number here: the value tells which
    assert both <= ({"clip"} if name == "rsrefseg2" else set())
    known = fields | set(paper.RECIPE)
    assert set(paper.RECIPE_FOR) <= set(data.DATASETS)
    rows = [changes for table in paper.ABLATIONS.values() for changes in table.values()]
    for changes in [paper.RECIPE_TINY, *paper.RECIPE_FOR.values(), *rows]:
        assert set(changes) <= known, set(changes) - known
    assert not set(getattr(paper, "RETIRED", {})) & known
    assert sorted(paper.SPECIAL_TOKENS.values()) == list(range(len(paper.SPECIAL_TOKENS)))
    for recipe in (paper.RECIPE, paper.RECIPE | paper.RECIPE_TINY,
                   *(paper.RECIPE | changes for changes in paper.RECIPE_FOR.values())):
        models.check_recipe(recipe)
        assert {"epochs", "batch_size", "micro_batch", "lr", "weight_decay", "schedule", "clip", "precision",
                "per_image", "protocol", "empty", "select", "phases"} <= set(recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        paper.Config.tiny().image_size = 3


# Rows that two papers' tables could not share by accident: oIoU, mIoU (ICIPNet III, IV; RS2-SAM 2 3, 4; Prompt-RIS 3-5;
# RSRefSeg 2 VI-XVI), as printed there.
PRINTED = {
    "icipnet": {"III/Base": (81.58, 74.06), "III/+ICIP": (82.97, 76.27), "III/+BIF": (83.53, 77.62),
                "III/Full": (83.77, 78.21), "IV/Base": (74.64, 60.23), "IV/+ICIP M=3": (75.60, 62.72),
                "IV/+ICIP M=5": (75.85, 63.40), "IV/+ICIP M=8": (75.77, 63.07)},
    "rs2sam2": {"3/Baseline": (55.51, 36.64), "3/L_tbl+MMP": (70.89, 60.20), "3/L_tbl+DHF": (78.36, 68.71),
                "4/MPG w/o MHCA": (79.89, 71.59), "4/Linear": (77.39, 68.19), "4/Uni": (78.93, 70.10),
                "4/w/o BC": (77.54, 67.61), "4/w/o BL": (72.33, 61.08), "4/w BC&BL": (80.87, 73.90)},
    "prompt_ris": {"3/CLIP": (65.24, 67.94), "3/CLIP+CMP+ICL": (72.57, 73.97), "3/CLIP+CMP+SAM": (75.86, 77.40),
                   "4/V2LP": (67.48, 69.53), "4/L2VP": (70.52, 72.44), "5/none": (42.88, 42.63),
                   "5/point": (55.34, 55.18), "5/text": (72.61, 75.11), "5/mask+point+text": (76.36, 78.10)},
    "rsrefseg2": {"VI/clip-t-0": (77.80, 63.40), "VI/clip-v-0": (75.96, 57.86), "VI/sam-v-64": (78.98, 65.44),
                  "VII/interac-6": (78.06, 64.29), "VIII/decomp-9": (77.96, 64.09), "VIII/prompt-12": (79.11, 65.22),
                  "IX/decomp-PE-zero": (79.34, 65.57), "IX/interac-sine": (77.90, 64.66),
                  "X/single-stage": (74.11, 60.06),
                  "XI/intra": (78.27, 64.86), "XII/self": (78.03, 64.54), "XIII/T-t2'": (76.33, 62.58),
                  "XIII/post-up": (77.47, 65.21), "XIV/768": (78.76, 66.14), "XV/MIL-t2-v": (78.80, 64.25),
                  "XV/NCE-t2-v+dice": (78.98, 67.06), "XVI/siglip2-p16-512+l": (79.45, 69.17)},
}


@pytest.mark.parametrize("name", PRINTED)
def test_figures_are_those_that_the_paper_prints(name):
    figures = models.paper(name).FIGURES
    for key, pair in PRINTED[name].items():
        table, _, row = key.partition("/")
        assert figures[table][row] == "oIoU {:.2f}, mIoU {:.2f}".format(*pair), key
    for table, rows in figures.items():
        assert list(rows) == list(models.paper(name).ABLATIONS[table])


# ------------------------------------------------------------------------------------------------- what a forward gives


@every_model
def test_outputs_are_logits_and_maps_of_every_expression(name):
    config, recipe = settings(name)
    model, given = build(name, config), batch(name, config)
    for _ in phases(model, recipe):
        outputs = run(model, given)
        height, width = outputs["logits"].shape[-2:]
        assert outputs["logits"].shape == (3, 1, height, width) and height == width <= config.image_size
        assert outputs["logits"].dtype == torch.float32
        assert all(value.isfinite().all() for value in outputs.values())
        for title in set(models.maps(model)) & set(outputs):
            shown = outputs[title]
            assert shown.shape[:2] == (3, 1) and shown.ndim == 4, title
            assert shown.min() >= 0 and shown.max() <= 1, title
        losses = model.criterion(outputs, given, 0.5)
        assert all(value.shape == () and value.dtype == torch.float32 and value.isfinite() for value in losses.values())
        if hasattr(model, "diagnose"):
            assert all(figure.shape == (3,) for figure in model.diagnose(outputs, given["masks"]).values())
    assert set(models.maps(model)) <= set(outputs)
    assert run(models.build(name, config).train(), given)["logits"].shape == outputs["logits"].shape


@pytest.mark.parametrize("name", [name for name in NAMES if name not in READS_PADDING])
@torch.no_grad()
def test_padding_cannot_change_the_output(name):
    config, _ = settings(name)
    model, given = build(name, config), batch(name, config)
    other = given | {"tokens": torch.where(given["text_mask"], given["tokens"], len(WORDS))}
    assert not torch.equal(other["tokens"], given["tokens"])
    for title, value in run(model, given).items():
        torch.testing.assert_close(run(model, other)[title], value, rtol=1e-5, atol=1e-5, msg=title)


@every_model
@torch.no_grad()
def test_words_change_the_output(name):
    config, _ = settings(name)
    model, given = build(name, config), batch(name, config)
    logits = run(model, given)["logits"]
    changed = tokenizer(name, config)(["the blue ship", *SENTENCES[1:3]])[0]
    other = run(model, given | {"tokens": changed})["logits"]
    assert (other[0] - logits[0]).abs().max() > 1e-4
    torch.testing.assert_close(other[1:], logits[1:], rtol=1e-4, atol=1e-4)


@every_model
@torch.no_grad()
def test_expressions_together_are_what_they_are_alone(name):
    config, _ = settings(name)
    model, given = build(name, config), batch(name, config, index=(1, 0, 1))
    together = run(model, given)
    repeated = run(model, given | {"images": given["images"][given["image_index"]], "image_index": None})
    for title, value in repeated.items():
        if title == "image_index" or len(together[title]) != 3:                 # a row an image, not an expression
            continue
        torch.testing.assert_close(together[title], value, rtol=1e-4, atol=1e-4, msg=title)
        for m, image in enumerate((1, 0, 1)):
            one = model(given["images"][image:image + 1], given["tokens"][m:m + 1], given["text_mask"][m:m + 1])
            torch.testing.assert_close(one[title], value[m:m + 1], rtol=1e-4, atol=1e-4, msg=title)


@every_model
def test_scoring_takes_no_other_way_than_training(name, monkeypatch):
    """Without gradients a model may divide its work; here into the smallest parts."""
    monkeypatch.setattr(models.paper(name), "AT_ONCE", 1, raising=False)
    config, _ = settings(name)
    model, given = build(name, config), batch(name, config, index=(1, 0, 1, 0))
    outputs = run(model, given)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            again = run(model, given)
        assert again.keys() == outputs.keys() and not again["logits"].requires_grad
        for title, value in outputs.items():
            torch.testing.assert_close(again[title], value.detach(), rtol=1e-4, atol=1e-4, msg=title)


@every_model
@torch.no_grad()
def test_an_exported_program_gives_the_same_numbers(name):
    config, _ = settings(name)
    model, given = build(name, config), batch(name, config)
    inputs = [given[key] for key in ("images", "tokens", "text_mask", "image_index")]
    outputs, again = run(model, given), torch.export.export(model, tuple(inputs)).module()(*inputs)
    assert outputs.keys() == again.keys()
    for title, value in outputs.items():
        atol = 1e-4 * max(1.0, value.float().abs().max().item())
        torch.testing.assert_close(again[title], value, rtol=1e-4, atol=atol, msg=title)


# What half precision may cost: of the loss, of the gradient's direction (1 - cosine), of the logits (relative length).
BOUNDS = {torch.bfloat16: (0.1, 0.5, 0.6), torch.float16: (0.01, 0.03, 0.12)}


@every_model
@pytest.mark.parametrize("precision", BOUNDS, ids=["bf16", "fp16"])
def test_half_precision_steps_and_scores_near_the_whole_one(name, precision):
    config, recipe = settings(name)
    model, given = build(name, config), batch(name, config)
    learning(model, recipe)
    found = []
    for half in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=half):
            outputs = run(model, given)
            with torch.no_grad():
                scored = run(model, given)["logits"].float()
        outputs = {title: value.float() if value.is_floating_point() else value for title, value in outputs.items()}
        loss = sum(model.criterion(outputs, given, 1.0).values())
        loss.backward()
        gradient = torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])
        assert loss.dtype == gradient.dtype == torch.float32
        assert loss.isfinite() and gradient.isfinite().all() and scored.isfinite().all()
        found.append((loss.item(), gradient, scored))
    (loss, gradient, scored), (half_loss, half_gradient, half_scored) = found
    of_loss, of_direction, of_logits = BOUNDS[precision]
    assert half_loss == pytest.approx(loss, rel=of_loss)
    assert 1 - F.cosine_similarity(half_gradient, gradient, 0) < of_direction
    assert (half_scored - scored).norm() < of_logits * (scored - scored.mean()).norm()


@pytest.mark.parametrize("name", FILES)
def test_the_bench_divides_by_a_part_of_the_model(name):
    """tests/bench.py reaches into each model for its published towers: they run, learn, and are not all of it."""
    sides = [f"{field}={side}" for field, side in SIDES[name].items()]
    timed = bench.Bench(bench.arguments(["--model", name, "--preset", "tiny", "--device", "cpu", "--set", *sides]))
    given, operations = timed.batch(2, 3), []
    for objective in (timed.bare_objective, timed.objective):
        with FlopCounterMode(display=False, custom_mapping=bench.FLOPS) as counter:
            objective(given).backward()
        operations.append(counter.get_total_flops())
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in timed.model.parameters())
        timed.optimizer.zero_grad(set_to_none=True)
    assert 0 < operations[0] < operations[1]


# ----------------------------------------------------------------------------------------------------------- learning


def step(model, recipe, given, progress=1.0):
    """A step in training mode as DDP needs it: exactly what `param_groups` names gets a gradient."""
    learn = learning(model, recipe)
    model.train().zero_grad()
    outputs = run(model, given)
    loss = sum(model.criterion(outputs, given, progress).values())
    assert loss.isfinite()
    loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == learn, sorted(reached ^ learn)
    return outputs


@every_model
@pytest.mark.parametrize("freeze", [False, True])
def test_exactly_what_learns_gets_a_gradient(name, freeze):
    config, recipe = settings(name)
    fields = {field.name for field in dataclasses.fields(config)}
    config = dataclasses.replace(config, **({"freeze": freeze} if "freeze" in fields else {}))
    model, given = build(name, config), batch(name, config)
    for _ in phases(model, recipe):
        for progress in (0.0, 1.0):
            step(model, recipe, given, progress)


@every_model
def test_micro_batches_give_the_gradient_of_the_whole(name):
    """In evaluation mode, where nothing is drawn and batch norms do not mix; cut at an image's border."""
    config, recipe = settings(name, **ALONE.get(name, {}))
    model, given = build(name, config), batch(name, config, index=(0, 0, 1, 1, 1))
    learning(model, recipe)
    gradients = []
    for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
        model.zero_grad()
        for part in parts:
            index = given["image_index"][part]
            some = {title: value[part] for title, value in given.items() if title != "images"}
            some |= {"images": given["images"][index.min():index.max() + 1], "image_index": index - index.min()}
            (objective(model, some) * len(index) / 5).backward()
        gradients.append({title: value.grad for title, value in model.named_parameters() if value.grad is not None})
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for title, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][title], gradient, rtol=1e-3, atol=1e-4 * largest.item(), msg=title)


def distinct_rows():
    """(paper, table/row) of every ablation row that changes something else than those before it."""
    found = []
    for name in FILES:
        seen = []
        for table, rows in models.paper(name).ABLATIONS.items():
            for row, changes in rows.items():
                if changes not in seen:
                    seen.append(changes)
                    found.append((name, f"{table}/{row}"))
    return found


def changes_of(name, row):
    """A row's changes, of the Config and of the recipe, as the tiny preset can bear them."""
    table, _, row = row.partition("/")
    changes = dict(models.paper(name).ABLATIONS[table][row])
    fields = {field.name for field in dataclasses.fields(models.paper(name).Config)}
    if name == "rsrefseg2":
        changes |= {"clip_size": SIZES.get(changes.get("clip_size"))}
    return ({field: value for field, value in changes.items() if field in fields},
            {field: value for field, value in changes.items() if field not in fields})


@pytest.mark.parametrize("name, row", distinct_rows())
def test_every_ablation_row_steps(name, row):
    changes, of_recipe = changes_of(name, row)
    config, recipe = settings(name, **changes)
    recipe |= of_recipe
    torch.manual_seed(0)
    model, given = models.build(name, config), batch(name, config, index=(0, 0))
    for _ in phases(model, recipe):
        outputs = step(model, recipe, given)
        if hasattr(model, "diagnose"):
            model.diagnose(outputs, given["masks"])


@pytest.mark.parametrize("name", FILES)
def test_tiny_overfits_a_handful(name):
    """Three objects of one picture, told apart by the words alone."""
    config, recipe = settings(name)
    side = config.image_size
    given = batch(name, config, index=(0, 0, 0))
    given["images"] = torch.full((1, 3, side, side), 60, dtype=torch.uint8)
    given["masks"] = torch.zeros(3, side, side, dtype=torch.bool)
    for k in range(3):
        rows = slice(side // 3 * k + 2, side // 3 * k + side // 4)
        given["masks"][k, rows, side // 5 * k:side // 5 * k + side // 2] = True
        given["images"][0, k][given["masks"][k]] = 250
    torch.manual_seed(0)
    model = models.build(name, config)
    for _ in phases(model, recipe):
        optimizer = torch.optim.AdamW(model.param_groups(recipe))
        for count in range(60):
            for group in optimizer.param_groups:
                group["lr"] = recipe["lr"] * min(1, (count + 1) / 10)
            objective(model.train(), given).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        logits = run(model.eval(), given)["logits"]
    prediction = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)[:, 0] > 0
    overlap = (prediction & given["masks"]).sum((1, 2)) / (prediction | given["masks"]).sum((1, 2))
    assert overlap.min() > 0.6, overlap


# --------------------------------------------------------------------------------------------------------- paper's size


def paper_size_step(model, recipe, given, precision):
    """Forward, criterion, backward and diagnosis in every phase -> all tensors that came out."""
    made = []
    for _ in phases(model, recipe):
        learn = learning(model, recipe)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = run(model, given)
        assert outputs["logits"].shape[:2] == (3, 1)
        outputs = {title: value.float() if value.is_floating_point() else value for title, value in outputs.items()}
        losses = model.criterion(outputs, given, 1.0)
        assert all(loss.dtype == torch.float32 and loss.shape == () for loss in losses.values())
        sum(losses.values()).backward()
        assert {title for title, parameter in model.named_parameters() if parameter.grad is not None} == learn
        figures = model.diagnose(outputs, given["masks"]) if hasattr(model, "diagnose") else {}
        assert all(figure.shape == (3,) for figure in figures.values())
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        made += [*outputs.values(), *losses.values(), *figures.values(), *gradients]
    return made


def paper_size_batch(config, device):
    side, length = config.image_size, config.text_length
    shapes = {"images": (2, 3, side, side), "tokens": (3, length), "text_mask": (3, length), "image_index": (3,),
              "instance": (3,), "masks": (3, side, side)}
    kinds = {"images": torch.uint8, "text_mask": torch.bool, "masks": torch.bool}
    return {key: torch.zeros(shape, dtype=kinds.get(key, torch.long), device=device) for key, shape in shapes.items()}


@pytest.mark.parametrize("name", FILES)
def test_paper_size_steps_without_memory(name, monkeypatch):
    """On the meta device, where a tensor made elsewhere shows and nothing can be read back; then under autocast.

    Autocast knows no meta device: there the same tensors are fake, answer as a processor's, and cannot be read either.
    """
    paper = models.paper(name)
    config = dataclasses.replace(paper.Config(), pretrained="none")
    with torch.device("meta"):
        model = models.build(name, config).train()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
        made = paper_size_step(model, paper.RECIPE, paper_size_batch(config, "meta"), "fp32")
    assert all(tensor.device.type == "meta" for tensor in made)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for title, tensor in tensors.items():
                    if tensor is not None:
                        fake = torch.empty_like(tensor, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        tensors[title] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        made = paper_size_step(model, paper.RECIPE, paper_size_batch(config, "cpu"), "bf16")
    assert all(isinstance(tensor, FakeTensor) for tensor in made)
