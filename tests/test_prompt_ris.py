"""models/prompt_ris.py against the paper: Eqs. (1)-(6) and (9) here, Eqs. (7)-(8) in test_losses.py."""

import inspect
import math
import re
import runpy
from dataclasses import asdict, fields, replace

import layouts
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig, SamConfig, SamModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import data
import evaluate
import models
import train
from losses import instance_contrastive_loss
from models import prompt_ris
from models.prompt_ris import ABLATIONS, RECIPE, Config, PromptRIS

WORDS = ["the", "red", "ship", "left", "of", "harbour"]
ONE = evaluate.Processes(0, 1, torch.device("cpu"))
SENTENCES = ["the red ship", "ship", "red ship left of the harbour", "harbour", "left ship", "the ship", "red", "of"]


@pytest.fixture
def double(monkeypatch):
    """Model and losses in float64, also where they ask for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


KEY_BIASES = ("k_proj.bias",)                       # they cancel in the softmax


def small(**changes):
    """The tiny architecture once more shrunk; CLIP's position table is for another grid than the image's."""
    return replace(Config.tiny(), **{
        "image_size": 32, "clip_size": 24, "clip_native": 16, "text_length": 8, "clip_text_positions": 10,
        "vocab_size": 10, "clip_width": 16, "clip_heads": 2, "clip_ffn": 24, "clip_layers": 2, "clip_text_width": 12,
        "clip_text_heads": 2, "clip_text_ffn": 20, "sam_patch": 8, "sam_width": 16, "sam_heads": 2, "sam_ffn": 24,
        "sam_layers": 2, "sam_window": 3, "sam_global": (1,), "sam_prompt_width": 16, "sam_mask_channels": 8,
        "sam_decoder_heads": 2, "sam_decoder_ffn": 24, "prompts": 3, "cmp_heads": 2, "decoder_width": 8,
        "decoder_heads": 2, "decoder_ffn": 16, "text_heads": 2, "text_ffn": 16, "icl_warmup": 0.0, **changes})


def build(seed=0, **changes):
    torch.manual_seed(seed)
    model = PromptRIS(small(**changes))
    for name, parameter in model.named_parameters():        # nothing may hide behind a norm that does nothing yet
        if parameter.ndim == 1 and "sam" not in name:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    model.requires_grad_(True)
    return model.eval()


def batch_of(config, images=2, each=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    side, count = config.image_size, images * each
    words = data.WordTokenizer(WORDS, config.text_length, prompt_ris.SPECIAL_TOKENS)
    tokens, text_mask = words((SENTENCES * count)[:count])
    masks = torch.zeros(count, side, side, dtype=torch.bool)
    for i in range(count):
        y, x = (torch.randint(0, side // 2, (2,), generator=generator)).tolist()
        masks[i, y:y + side // 2, x:x + side // 3] = True
    return {"images": torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=generator),
            "tokens": tokens, "text_mask": text_mask, "masks": masks,
            "image_index": torch.arange(count) // each, "instance": torch.arange(count) // 2}


def run(model, batch):
    return model(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])


def softmax(values):
    exps = [math.exp(value - max(values)) for value in values]
    return [value / sum(exps) for value in exps]


def attend(module, queries, keys, values, mask=None):
    """Multi-head attention of one sequence, (Q,C) on (K,D), one query, head and key at a time."""
    q, k, v = module.to_q(queries), module.to_k(keys), module.to_v(values)
    width = q.shape[1] // module.heads
    mixed = torch.zeros_like(q)
    for a in range(module.heads):
        part = slice(a * width, (a + 1) * width)
        for i in range(len(q)):
            open_keys = [j for j in range(len(k)) if mask is None or mask[j]]
            weights = softmax([(q[i, part] @ k[j, part]).item() / math.sqrt(width) for j in open_keys])
            mixed[i, part] = sum(w * v[j, part] for w, j in zip(weights, open_keys, strict=True))
    return module.to_out(mixed)


def cross_block(block, queries, keys, values, mask=None):
    x = block.norm1(queries + attend(block.attention, queries, keys, values, mask))
    return block.norm2(x + block.ffn[2](block.ffn[0](x).clamp(min=0)))


# --------------------------------------------------------------------------------------------------- paper's equations


@torch.no_grad()
def test_eq01_both_directions_read_what_came_in():
    model = build()
    F_I, F_T = torch.randn(2, 9, 16), torch.randn(2, 8, 12)
    text_mask = torch.arange(8) < torch.tensor([[5], [8]])
    S = model.decoder(F_I, F_T, text_mask, (3, 3))
    assert S.shape == (2, 1, 3, 3)
    for m in range(2):
        image, text = F_I[m] @ model.decoder.image_projection.weight.T, F_T[m] @ model.decoder.text_projection.weight.T
        new_image = cross_block(model.decoder.to_image, image, text, text, text_mask[m])
        new_text = cross_block(model.decoder.to_text, text, image, image)
        expected = [(new_image[n] @ new_text[text_mask[m].sum() - 1]).item() / math.sqrt(8) for n in range(9)]
        assert S[m].flatten().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_eq02_response_is_the_inner_product_with_eos():
    decoder = build().decoder

    class Through(nn.Module):
        def forward(self, queries, keys, values, mask=None):
            return queries

    decoder.to_image, decoder.to_text = Through(), Through()
    F_I, F_T = torch.randn(1, 12, 16)[:, :9], torch.randn(1, 8, 12)
    for length in (2, 6):
        S = decoder(F_I, F_T, (torch.arange(8) < length)[None], (3, 3))
        for y in range(3):
            for x in range(3):
                patch = decoder.image_projection.weight @ F_I[0, 3 * y + x]
                eos = decoder.text_projection.weight @ F_T[0, length - 1]
                product = sum(a * b for a, b in zip(patch.tolist(), eos.tolist(), strict=True))
                assert S[0, 0, y, x].item() == pytest.approx(product / math.sqrt(8), rel=1e-4, abs=1e-6)


def test_eq03_point_is_drawn_by_gumbel_softmax_and_its_gradient_is_the_soft_one():
    model = build(tau=0.7).train()
    S_C = (2 * torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))).requires_grad_()
    torch.manual_seed(5)
    P_point, M = model.point_prompt(S_C)
    torch.manual_seed(5)
    noise = -torch.empty(3, 256).exponential_().log()
    soft = torch.stack([torch.tensor(softmax(row)) for row in ((S_C.detach().flatten(1) + noise) / 0.7).tolist()])
    chosen = soft.argmax(1)
    E = model.encoded_cells()
    for m in range(3):
        assert M[m].argmax() == chosen[m] and M[m].sum().item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(M[m].detach().round(), F.one_hot(chosen[m], 256).float())
        e_p = sum(M[m, i].item() * E[i] for i in range(256))
        torch.testing.assert_close(P_point[m, 0] - model.sam.prompt_encoder.point_embed[1].weight[0], e_p,
                                   rtol=1e-4, atol=1e-5)
    v = torch.randn(16)
    (P_point[1, 0] @ v).backward()
    value = (E @ v).double()
    p = soft[1].double()
    expected = p * (value - (p * value).sum()) / 0.7                            # softmax's Jacobian
    torch.testing.assert_close(S_C.grad[1].flatten().double(), expected, rtol=1e-3, atol=1e-6)
    assert S_C.grad[0].abs().max() == 0


@torch.no_grad()
def test_eq03_inference_takes_the_highest_cell_as_sam_itself_encodes_it():
    model = build()
    for row, column in ((2, 11), (15, 0)):
        S_C = torch.zeros(1, 1, 16, 16)
        S_C[0, 0, row, column] = 1.0
        P_point, M = model.point_prompt(S_C)
        assert M.sum() == 1 and M[0, row * 16 + column] == 1
        # cell (row, column) of the 16 x 16 grid over 32 pixels; SAM adds half a pixel to what it is given
        pixel = torch.tensor([[[[2 * column + 0.5, 2 * row + 0.5]]]])
        box = torch.zeros(1, 1, 4)                          # with a box SAM appends no padding point
        sparse, _ = model.sam.prompt_encoder(pixel, torch.ones(1, 1, 1, dtype=torch.long), box, None)
        torch.testing.assert_close(P_point[0, 0], sparse[0, 0, 0], rtol=1e-4, atol=1e-5)


def test_eq03_rounding_does_not_choose_among_equally_high_cells():
    """A coarse map that is highest at the lower right border, as resized, with the noise of another batch."""
    coarse = torch.zeros(1, 1, 3, 3)
    coarse[0, 0, 2, 2] = 3.3
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    for size in (-2e-6, 0.0, 3e-6):
        S_C = prompt_ris.resize(coarse, 16) + size * noise
        row, column = divmod(prompt_ris.point_map(S_C.flatten(1), 1.0, sample=False).argmax().item(), 16)
        assert (row, column) == (13, 13)                     # the first of 3 x 3


def test_eq03_cells_within_a_ten_thousandth_are_equally_high():
    """Ours: rounding moves a logit by 1e-6 of its size, objects differ by far more than 1e-4."""
    for gap, chosen in ((0.95e-4, 0), (1.05e-4, 1)):
        assert prompt_ris.point_map(torch.tensor([[0.0, gap]]), 1.0, sample=False).argmax() == chosen


def test_eq03_sharp_logits_make_training_and_inference_agree():
    model = build()
    S_C = torch.randn(2, 1, 16, 16) * 1000
    sampled = prompt_ris.point_map(S_C.flatten(1), 1.0, sample=True)
    assert torch.equal(sampled.argmax(1), prompt_ris.point_map(S_C.flatten(1), 1.0, sample=False).argmax(1))
    torch.testing.assert_close(model.train().point_prompt(S_C)[0], model.eval().point_prompt(S_C)[0])


@torch.no_grad()
def test_eq04_tokens_and_the_first_mask():
    model = build()
    F_IS, positions = torch.randn(2, 16, 4, 4), torch.randn(1, 16, 4, 4)
    P_mask, P_point, P_text = torch.randn(2, 16, 4, 4), torch.randn(2, 1, 16), torch.randn(2, 8, 16)
    sam, seen = model.sam.mask_decoder, {}
    sam.register_forward_pre_hook(lambda module, _, given: seen.update(given), with_kwargs=True)
    S = model.decode(F_IS, positions, P_mask, P_point, P_text)
    assert torch.equal(seen["sparse_prompt_embeddings"][:, 0, 0], P_point[:, 0])       # the point before the words
    assert torch.equal(seen["sparse_prompt_embeddings"][:, 0, 1:], P_text)
    for m in range(2):
        tokens = torch.cat((sam.iou_token.weight, sam.mask_tokens.weight, P_point[m], P_text[m]))
        out, image = sam.transformer(point_embeddings=tokens[None, None], image_positional_embeddings=positions,
                                     image_embeddings=(P_mask[m] + F_IS[m])[None], attention_similarity=None)[:2]
        image = image[0, 0].T.reshape(1, 16, 4, 4)
        image = F.gelu(sam.upscale_layer_norm(sam.upscale_conv1(image)))
        image = F.gelu(sam.upscale_conv2(image))[0]                              # (2,16,16)
        weights = sam.output_hypernetworks_mlps[0](out[0, 0, 1])                 # the first mask token follows T_iou
        S_low = sum(weights[c] * image[c] for c in range(2))
        expected = F.interpolate(S_low[None, None], (32, 32), mode="bilinear", align_corners=False)
        torch.testing.assert_close(S[m:m + 1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_eq04_reads_the_prompts_that_fig2_draws():
    """S'_C, enlarged, as logits, is the mask prompt as SAM itself reads one, its peak the point, F_T the words."""
    model = build()
    batch = batch_of(model.config)
    outputs, index, text_mask = run(model, batch), batch["image_index"], batch["text_mask"]
    F_T, F_I = model.encode(batch["images"], batch["tokens"], text_mask, index)
    S_coarse = model.decoder(F_I, F_T, text_mask, (3, 3))
    torch.testing.assert_close(outputs["coarse_logits"], S_coarse)
    torch.testing.assert_close(outputs["coarse"], 1 / (1 + (-S_coarse).exp()))
    S_C = F.interpolate(S_coarse, (16, 16), mode="bilinear", align_corners=False)
    pixels = prompt_ris.normalised(batch["images"], 32, prompt_ris.SAM_MEAN, prompt_ris.SAM_STD)
    F_S, positions = model.sam.get_image_embeddings(pixels)[index], model.sam.get_image_wide_positional_embeddings()
    _, P_mask = model.sam.prompt_encoder(None, None, None, S_C)
    chosen = prompt_ris.point_map(S_C.flatten(1), 1.0, sample=False)
    assert torch.equal(outputs["point"], chosen.view(8, 1, 16, 16))
    P_point = chosen @ model.encoded_cells() + model.sam.prompt_encoder.point_embed[1].weight
    P_text = model.text_prompts(F_T, F_S.flatten(2).mT, positions.flatten(2).mT, text_mask)
    P_text[~text_mask] = model.sam.prompt_encoder.not_a_point_embed.weight
    S = model.decode(F_S, positions, P_mask, P_point[:, None], P_text)
    torch.testing.assert_close(outputs["logits"], S, rtol=1e-4, atol=1e-5)


def prompts_by_hand(prompter, features, mask=None):
    tokens, features = prompter.norm_tokens(prompter.tokens), prompter.norm_features(features)
    return attend(prompter.attention, tokens, features, features, mask)


@torch.no_grad()
def test_eq05_words_read_what_the_patches_say():
    model = build()
    cmp, text, image = model.cmp[0], model.clip_text.encoder.layers[0], model.clip_image.encoder.layers[0]
    F_T, F_I, text_mask = torch.randn(2, 8, 12), torch.randn(2, 10, 16), torch.arange(8) < torch.tensor([[5], [8]])
    new_T, _ = cmp(F_T, F_I, text, image, text_mask)
    for m in range(2):
        T_V2L = prompts_by_hand(cmp.v2l, F_I[m, 1:])                             # patches, without [CLS]
        assert T_V2L.shape == (3, 12)
        mask = torch.zeros(11, 11)
        for i in range(11):
            for j in range(11):
                if j >= 3 and j > i:
                    mask[i, j] = -math.inf                                       # causal among the words alone
        whole = text(torch.cat((T_V2L, F_T[m]))[None], mask[None, None])         # CLIP's own layer
        torch.testing.assert_close(new_T[m], whole[0, 3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_eq06_patches_read_what_the_words_say():
    model = build()
    cmp, text, image = model.cmp[0], model.clip_text.encoder.layers[0], model.clip_image.encoder.layers[0]
    F_T, F_I, text_mask = torch.randn(2, 8, 12), torch.randn(2, 10, 16), torch.arange(8) < torch.tensor([[5], [8]])
    _, new_I = cmp(F_T, F_I, text, image, text_mask)
    for m in range(2):
        T_L2V = prompts_by_hand(cmp.l2v, F_T[m], text_mask[m])
        assert T_L2V.shape == (3, 16)
        whole = image(torch.cat((T_L2V, F_I[m]))[None], None)                    # [T_L2V; c; F_I]
        torch.testing.assert_close(new_I[m], whole[0, 3:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_eq05_eq06_chain_through_every_layer_from_the_embeddings():
    """Eqs. (5)-(6): F^0 are the embeddings; each layer has prompters of its own and both read the states before it."""
    model = build()
    assert len(model.cmp) == model.config.clip_layers == 2
    batch = batch_of(model.config, images=1, each=2)
    pixels = prompt_ris.normalised(batch["images"], 24, prompt_ris.CLIP_MEAN, prompt_ris.CLIP_STD)
    F_T = model.clip_text.embeddings(batch["tokens"])
    F_I = model.clip_image.pre_layrnorm(model.clip_image.embeddings(pixels, interpolate_pos_encoding=True))
    F_I = F_I.expand(2, -1, -1)
    causal = torch.full((8, 8), -math.inf).triu(1)
    causal = torch.cat((torch.zeros(8, 3), causal), 1)
    causal = torch.cat((torch.zeros(3, 11), causal))
    for i in range(2):
        T_V2L = torch.stack([prompts_by_hand(model.cmp[i].v2l, F_I[m, 1:]) for m in range(2)])
        T_L2V = torch.stack([prompts_by_hand(model.cmp[i].l2v, F_T[m], batch["text_mask"][m]) for m in range(2)])
        F_T = model.clip_text.encoder.layers[i](torch.cat((T_V2L, F_T), 1), causal[None, None])[:, 3:]
        F_I = model.clip_image.encoder.layers[i](torch.cat((T_L2V, F_I), 1), None)[:, 3:]
    got_T, got_I = model.encode(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
    torch.testing.assert_close(got_T, model.clip_text.final_layer_norm(F_T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_I, model.clip_image.post_layernorm(F_I[:, 1:]), rtol=1e-4, atol=1e-5)


def seg_by_hand(logits, truth):
    """Mean over expressions of cross-entropy plus Dice with squares, pixel by pixel."""
    total = 0.0
    for S, y in zip(logits.flatten(1).tolist(), truth.flatten(1).tolist(), strict=True):
        p = [1 / (1 + math.exp(-s)) for s in S]
        bce = -sum(math.log(a) if b else math.log(1 - a) for a, b in zip(p, y, strict=True)) / len(p)
        overlap, squares = sum(a * b for a, b in zip(p, y, strict=True)), sum(a * a for a in p) + sum(y)
        total += bce + 1 - (2 * overlap + 1e-4) / (squares + 1e-4)
    return total / len(logits)


@pytest.mark.parametrize("changes", [{}, {"icl_epsilon": 0.01}, {"icl_weight": 0.3}, {"icl": False},
                                     {"sam": False}])
def test_eq09_sum_of_three_losses_on_the_maps_that_the_paper_names(changes):
    model = build(**changes)
    batch = batch_of(model.config)
    draw = torch.Generator().manual_seed(1)
    outputs = {"coarse_logits": 2 * torch.randn(8, 1, 3, 3, generator=draw),
               "logits": 2 * torch.randn(8, 1, 32, 32, generator=draw)}
    for S in outputs.values():
        S[3] = -8                                           # squares of the order of Dice's eps
    batch["masks"][3] = False
    terms = model.criterion(outputs, batch, 0.0)
    rows = [(2 * i + 1) * 32 // 6 for i in range(3)]                             # centres of the 3 x 3 cells
    coarse = batch["masks"][:, rows][:, :, rows]
    expected = {"clip_seg": seg_by_hand(outputs["coarse_logits"], coarse)}

    def contrast(S, y):
        return instance_contrastive_loss(S, y[:, None], batch["image_index"], batch["instance"],
                                         eps=model.config.icl_epsilon).mean().item()

    icl = contrast(outputs["coarse_logits"], coarse)
    if model.config.sam:
        expected["sam_seg"] = seg_by_hand(outputs["logits"], batch["masks"])
        icl += contrast(outputs["logits"], batch["masks"])
    if model.config.icl:
        expected["icl"] = model.config.icl_weight * icl
        assert icl > 0.001
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(expected, rel=1e-4)


def test_eq09_instance_contrasting_may_wait():
    model = build(icl_warmup=0.5)
    batch = batch_of(model.config)
    outputs = {"coarse_logits": torch.randn(8, 1, 3, 3).requires_grad_(), "logits": torch.randn(8, 1, 32, 32)}
    early, late = (model.criterion(outputs, batch, progress)["icl"] for progress in (0.49, 0.5))
    assert early.item() == 0 and early.requires_grad and late.item() > 0.001


# ----------------------------------------------------------------------------------- gradients by finite differences


def check_slopes(function, tensors, step=1e-5, seed=0):
    """Along a random direction of each group of tensors, a random sum of the outputs rises as autograd says it does.

    A gradient that is cut or scaled in one operand fails it, whatever the values are.
    """
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(one.shape, generator=draw) for one in function()]

    def value():
        return sum((one * weight).sum() for one, weight in zip(function(), weights, strict=True))

    for name, group in tensors.items():
        directions = [torch.randn(one.shape, generator=draw) for one in group]
        gradients = torch.autograd.grad(value(), group)
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
        ends = []
        with torch.no_grad():
            for sign in (1, -2):
                for one, direction in zip(group, directions, strict=True):
                    one += sign * step * direction
                ends.append(value().item())
            for one, direction in zip(group, directions, strict=True):
                one += step * direction
        assert abs(slope) > 1e-6, name
        assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-7), name


def by_part(module, depth):
    """Its parameters, but for key biases, which cancel in a softmax, by the first `depth` words of their names."""
    parts = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not name.endswith(KEY_BIASES):
            parts.setdefault(".".join(name.split(".")[:depth]), []).append(parameter)
    return parts


def learnable(*shape):
    return torch.randn(shape).requires_grad_()


def test_gradients_of_the_blocks(double):
    """Eqs. (1), (2), (4), (5), (6), the text prompts: into every input and parameter."""
    model = build()
    F_T, F_I = learnable(2, 8, 12), learnable(2, 10, 16)
    features, positions = learnable(2, 16, 16), learnable(1, 16, 16)
    text_mask = torch.arange(8) < torch.tensor([[5], [8]])
    inputs = {"F_T": [F_T], "F_I": [F_I]}
    layers = model.clip_text.encoder.layers[0], model.clip_image.encoder.layers[0]
    check_slopes(lambda: model.cmp[0](F_T, F_I, *layers, text_mask), inputs | by_part(model.cmp[0], 3) | {
        f"{k}.{name}": part for k, layer in enumerate(layers) for name, part in by_part(layer, 2).items()})
    check_slopes(lambda: [model.decoder(F_I[:, :9], F_T, text_mask, (3, 3))], inputs | by_part(model.decoder, 3))
    check_slopes(lambda: [model.text_prompts(F_T, features, positions, text_mask)],
                 {"F_T": [F_T], "F_S": [features], "positions": [positions]} | by_part(model.text_prompts, 3))
    F_S, P_mask = learnable(2, 16, 4, 4), learnable(2, 16, 4, 4)
    P_point, P_text = learnable(2, 1, 16), learnable(2, 8, 16)
    encoding = torch.randn(1, 16, 4, 4)
    check_slopes(lambda: [model.decode(F_S, encoding, *model.drop(P_mask, P_point, P_text, text_mask))],
                 {"F_S": [F_S], "P_mask": [P_mask], "P_point": [P_point], "P_text": [P_text]})


def test_gradients_of_the_whole(double):
    """Eq. (9) by every part, in evaluation mode, where the point is the highest cell and has no slope."""
    model = build(freeze=False)
    model.param_groups(RECIPE)
    batch = batch_of(model.config)
    parts = by_part(model, 3)
    del parts["sam.prompt_encoder.no_mask_embed"]                               # no mask is missing here
    # Where no unit of a ReLU and no cell of the point map changes sides.
    check_slopes(lambda: model.criterion(run(model, batch), batch, 0.0).values(), parts, step=1e-6, seed=2)


# ------------------------------------------------------------------------------------------ what else the paper claims


@torch.no_grad()
def test_each_tower_sees_the_image_at_its_size_in_its_colours():
    """4.2: 480 for CLIP, 1024 for SAM (here 24 and 32); each with the colours that it was trained in, red first."""
    assert (tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD)) == (prompt_ris.CLIP_MEAN, prompt_ris.CLIP_STD)
    assert (tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)) == (prompt_ris.SAM_MEAN, prompt_ris.SAM_STD)
    model, seen = build(), {}
    model.clip_image.embeddings.register_forward_pre_hook(lambda module, given: seen.update(clip=given[0]))
    model.sam.vision_encoder.register_forward_pre_hook(lambda module, given: seen.update(sam=given[0]))
    batch = batch_of(model.config)
    run(model, batch)
    for channel, (mean, std) in enumerate(zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, strict=True)):
        torch.testing.assert_close(seen["sam"][:, channel], (batch["images"][:, channel] / 255 - mean) / std)
    smaller = F.interpolate(batch["images"] / 255, (24, 24), mode="bilinear", antialias=True)
    for channel, (mean, std) in enumerate(zip(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, strict=True)):
        torch.testing.assert_close(seen["clip"][:, channel], (smaller[:, channel] - mean) / std)


def test_every_part_has_the_size_that_its_field_says():
    model = build(cmp_heads=4, decoder_heads=2, text_heads=8, text_blocks=3, decoder_ffn=20, text_ffn=28, prompts=5,
                  sam_decoder_heads=4, sam_decoder_ffn=36, clip_text_heads=3)
    heads = {name: {part.heads for part in module.modules() if isinstance(part, prompt_ris.Attention)}
             for name, module in model.named_children() if name in ("cmp", "decoder", "text_prompts")}
    assert heads == {"cmp": {4}, "decoder": {2}, "text_prompts": {8}}
    assert len(model.text_prompts.self_attentions) == len(model.text_prompts.cross_blocks) == 3
    assert model.decoder.to_image.ffn[0].out_features == model.decoder.to_text.ffn[0].out_features == 20
    assert {block.ffn[0].out_features for block in model.text_prompts.cross_blocks} == {28}
    assert [tuple(prompter.tokens.shape) for prompter in (model.cmp[0].v2l, model.cmp[0].l2v)] == [(5, 16), (5, 12)]
    sam = model.sam.config
    for part, sizes in (
            (model.clip_image.config, {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2,
                                       "intermediate_size": 24, "num_hidden_layers": 2}),
            (model.clip_text.config, {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20,
                                      "num_hidden_layers": 2, "vocab_size": 10, "max_position_embeddings": 10}),
            (sam.vision_config, {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_attention_heads": 2,
                                 "mlp_dim": 24, "num_hidden_layers": 2, "window_size": 3, "output_channels": 16,
                                 "num_pos_feats": 8}),
            (sam.prompt_encoder_config, {"image_size": 32, "patch_size": 8, "hidden_size": 16,
                                         "mask_input_channels": 8}),
            (sam.mask_decoder_config, {"hidden_size": 16, "num_attention_heads": 4, "mlp_dim": 36,
                                       "iou_head_hidden_dim": 16})):
        assert {name: getattr(part, name) for name in sizes} == sizes
    assert [layer.window_size for layer in model.sam.vision_encoder.layers] == [3, 0]       # the second sees all


def test_position_tables_that_are_not_loaded_tell_places():
    """Row by row, y in the first half; a cell's place is a linear function of its row, which no random table gives."""
    table = prompt_ris.sine_table(12, 64)
    assert table.std() == pytest.approx(0.5) and table.mean(0).abs().max() < 1e-6
    y, x = table.view(12, 12, 2, 32).unbind(2)
    for one, line in ((y, y[:, :1]), (x, x[:1]), (y[:, 0], x[0])):
        torch.testing.assert_close(one, line.expand_as(one), rtol=0, atol=1e-5)
    places = torch.cartesian_prod(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 12)).double()
    weights = torch.linalg.lstsq(table[::2].double(), places[::2], driver="gelsd").solution         # from half of them
    assert (table[1::2].double() @ weights - places[1::2]).abs().max() < 0.05
    model = PromptRIS(Config.tiny())
    assert torch.equal(model.clip_image.embeddings.position_embedding.weight[1:], table)
    assert torch.equal(model.sam.vision_encoder.pos_embed.flatten(0, 2), prompt_ris.sine_table(16, 64))


def test_start_of_what_is_not_loaded():
    """Xavier's bounds for every linear layer, PyTorch's for SAM's convolutions, prompt tokens of deviation 0.02."""
    torch.manual_seed(0)
    model = PromptRIS(small(prompts=60))
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.8 * bound < layer.weight.abs().max() <= bound, name
            assert layer.bias is None or not layer.bias.any(), name
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and name.startswith("sam"):
            inputs = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.weight[:, 0].numel()
            assert layer.weight.abs().max() <= 1 / math.sqrt(inputs) * (1 if isinstance(layer, nn.Conv2d) else 2), name
            assert layer.weight.std() > 0.2 / math.sqrt(inputs), name
    for cmp in model.cmp:
        assert [round(p.tokens.std().item(), 2) for p in (cmp.v2l, cmp.l2v)] == [0.02, 0.02]
    assert model.sam.prompt_encoder.not_a_point_embed.weight.std() > 0.5
    assert 0.5 < model.sam.shared_image_embedding.positional_embedding.std() < 1.5
    assert model.sam.shared_image_embedding.positional_embedding is (
        model.sam.prompt_encoder.shared_embedding.positional_embedding)


@torch.no_grad()
def test_the_point_map_is_given_out_without_a_graph():
    with torch.enable_grad():
        outputs = run(build().train(), batch_of(small()))
    assert not outputs["point"].requires_grad and outputs["logits"].requires_grad


def test_paper_size_counts_and_shapes():
    with FakeTensorMode():
        model = PromptRIS(Config()).eval()
        of_sam, published = model.sam.config.to_dict(), SamConfig().to_dict()               # SAM ViT-B
        assert of_sam == published
        for ours, published in ((model.clip_image.config, CLIPVisionConfig(patch_size=16)),
                                (model.clip_text.config, CLIPTextConfig(bos_token_id=None, eos_token_id=None))):
            assert ours.to_dict() == published.to_dict()

        def count(*parts):
            return sum(parameter.numel() for part in parts for parameter in part.parameters())

        assert (count(model.clip_image), count(model.clip_text)) == (85_799_424, 63_165_952)
        assert (count(model.sam), count(model.sam.vision_encoder)) == (93_735_728, 89_670_912)
        assert (count(model.cmp), count(model.decoder), count(model.text_prompts)) == (40_461_312, 6_959_104, 2_237_184)
        learn = {}
        for phase in ("clip", "joint"):
            model.start_phase(phase)
            learn[phase] = sum(p.numel() for group in model.param_groups(RECIPE) for p in group["params"])
        assert learn == {"clip": 40_461_312 + 6_959_104, "joint": 40_461_312 + 6_959_104 + 2_237_184}
        outputs = model(torch.zeros(1, 3, 1024, 1024, dtype=torch.uint8), torch.zeros(4, 22, dtype=torch.long),
                        torch.ones(4, 22, dtype=torch.bool), torch.zeros(4, dtype=torch.long))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "logits": (4, 1, 1024, 1024), "coarse": (4, 1, 30, 30), "coarse_logits": (4, 1, 30, 30),
        "image_index": (4,), "point": (4, 1, 256, 256)}


@torch.no_grad()
def test_documented_shapes_and_one_pass_of_sam_per_image():
    model, seen = build(), []
    model.sam.vision_encoder.register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    batch = batch_of(model.config)
    outputs = run(model, batch)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "logits": (8, 1, 32, 32), "coarse": (8, 1, 3, 3), "coarse_logits": (8, 1, 3, 3), "image_index": (8,),
        "point": (8, 1, 16, 16)}
    assert seen == [(2, 3, 32, 32)]
    for name in prompt_ris.MAPS:
        assert outputs[name].min() >= 0 and outputs[name].max() <= 1
    model.start_phase("clip")
    outputs = run(model, batch)
    assert torch.equal(outputs["logits"], outputs["coarse_logits"]) and "point" not in outputs and len(seen) == 1
    assert set(model.diagnose(outputs, batch["masks"])) == {"coarse_iou", "mistaken"}


@torch.no_grad()
def test_without_prompting_the_towers_are_clip():
    model = build(v2l=False, l2v=False)
    assert not list(model.cmp.parameters())
    batch = batch_of(model.config, images=2, each=1)
    F_T, F_I = model.encode(batch["images"], batch["tokens"], batch["text_mask"], batch["image_index"])
    model.clip_text.eos_token_id = 3
    text = model.clip_text(batch["tokens"], attention_mask=batch["text_mask"].long()).last_hidden_state
    pixels = prompt_ris.normalised(batch["images"], 24, prompt_ris.CLIP_MEAN, prompt_ris.CLIP_STD)
    image = model.clip_image(pixels, interpolate_pos_encoding=True).last_hidden_state
    real = batch["text_mask"]
    torch.testing.assert_close(F_T[real], text[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F_I, model.clip_image.post_layernorm(image[:, 1:]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_text_prompts_read_words_and_then_the_image():
    model = build()
    F_T, features, positions = torch.randn(2, 8, 12), torch.randn(2, 16, 16), torch.randn(1, 16, 16)
    text_mask = torch.arange(8) < torch.tensor([[5], [8]])
    P_text = model.text_prompts(F_T, features, positions, text_mask)
    part = model.text_prompts
    assert P_text.shape == (2, 8, 16) and len(part.cross_blocks) == 2
    for m in range(2):
        words = part.projection(F_T[m])
        for k in range(2):
            words = part.norms[k](words + attend(part.self_attentions[k], words, words, words, text_mask[m]))
            words = cross_block(part.cross_blocks[k], words, features[m] + positions[0], features[m])
        torch.testing.assert_close(P_text[m], words, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_any_prompt_it_is_sam_with_no_mask():
    """Table 5's first row: the words cannot matter, and SAM's own decoder gives the same."""
    model = build(mask_prompt=False, point_prompt=False, text_prompt=False)
    batch = batch_of(model.config)
    logits = run(model, batch)["logits"]
    torch.testing.assert_close(logits[:1].expand(4, -1, -1, -1), logits[:4])
    features = model.sam.vision_encoder(prompt_ris.normalised(batch["images"], 32, prompt_ris.SAM_MEAN,
                                                              prompt_ris.SAM_STD)).last_hidden_state
    _, no_mask = model.sam.prompt_encoder(None, None, None, None)
    nothing = model.sam.prompt_encoder.not_a_point_embed.weight.expand(2, 1, 1 + 8, -1)
    low = model.sam.mask_decoder(features, model.sam.get_image_wide_positional_embeddings().expand(2, -1, -1, -1),
                                 nothing, no_mask.expand(2, -1, -1, -1), multimask_output=False)[0][:, 0]
    torch.testing.assert_close(logits[::4], prompt_ris.resize(low, 32), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_prompt_dropout_is_per_kind_and_expression():
    model = build(prompt_dropout=0.3).train()
    P_mask, P_point, P_text = torch.ones(4000, 16, 4, 4), torch.ones(4000, 1, 16), torch.ones(4000, 8, 16)
    text_mask = (torch.arange(8) < 5).expand(4000, -1)
    dropped = model.drop(P_mask, P_point, P_text, text_mask)
    no_mask, no_point = model.sam.prompt_encoder.no_mask_embed.weight, model.sam.prompt_encoder.not_a_point_embed.weight
    gone = [(kind == nothing).flatten(1).all(1) for kind, nothing in (
        (dropped[0], no_mask[:, :, None, None]), (dropped[1], no_point), (dropped[2], no_point))]
    for k, one in enumerate(gone):
        assert abs(one.float().mean() - 0.3) < 0.04
        assert abs((one & gone[k - 1]).float().mean() - 0.09) < 0.03
    assert (dropped[2][:, 5:] == no_point).all() and (dropped[2][~gone[2]][:, :5] == 1).all()
    kept = model.eval().drop(P_mask, P_point, P_text, text_mask)
    assert all((kind == 1).all() for kind in (kept[0], kept[1], kept[2][:, :5]))
    switched_off = build(mask_prompt=False).train().drop(P_mask, P_point, P_text, text_mask)
    assert (switched_off[0] == no_mask[:, :, None, None]).all() and (switched_off[1] == 1).any()


def test_the_final_mask_teaches_the_response_map_through_the_point_alone():
    model = build(freeze=True, mask_prompt=False, text_prompt=False, prompt_dropout=0.0)
    model.param_groups(RECIPE)
    model.train()
    batch = batch_of(model.config)
    outputs = run(model, batch)
    outputs["coarse_logits"].retain_grad()
    model.criterion(outputs, batch, 0.0)["sam_seg"].backward()
    assert outputs["coarse_logits"].grad.abs().max() > 1e-9
    assert all(parameter.grad is None for tower in (model.clip_image, model.clip_text, model.sam)
               for parameter in tower.parameters())
    assert not model.sam.training and not model.clip_text.training and model.decoder.training


@pytest.mark.parametrize(("phase", "term", "reached"), [
    ("clip", "clip_seg", ("clip_image", "clip_text", "cmp", "decoder")),
    ("clip", "icl", ("clip_image", "clip_text", "cmp", "decoder")),
    ("joint", "sam_seg", ("clip_image", "clip_text", "cmp", "decoder", "sam", "text_prompts")),
    ("joint", "icl", ("clip_image", "clip_text", "cmp", "decoder", "sam", "text_prompts")),
])
def test_every_term_reaches_what_it_should(phase, term, reached):
    model = build(seed=1, prompt_dropout=0.4)
    model.start_phase(phase)
    model.param_groups(RECIPE)
    model.train()
    batch = batch_of(model.config)
    if term == "icl":
        batch["masks"] = torch.ones_like(batch["masks"])                         # no weight is zero
    torch.manual_seed(2)
    (1e3 * model.criterion(run(model, batch), batch, 0.0)[term]).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif name.startswith(reached) and not name.endswith(KEY_BIASES):
            assert parameter.grad.abs().max() > 1e-6, name
    learn = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learn == set(reached)


def test_what_learns_and_what_is_frozen():
    towers = {"clip_image", "clip_text", "sam"}
    for changes, expected in (({"freeze": True}, set()), ({"freeze": False}, towers),
                              ({"freeze": True, "freeze_clip": False}, {"clip_image", "clip_text"})):
        model = build(**changes)
        groups = model.param_groups({"lr": 1e-4, "weight_decay": 0.01})
        learn = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {name.split(".")[0] for name in learn} & towers == expected
        assert sum(len(group["params"]) for group in groups) == len(learn)
        assert all(p.ndim > 1 for p in groups[0]["params"]) and all(p.ndim <= 1 for p in groups[1]["params"])
        assert [group["weight_decay"] for group in groups] == [0.01, 0]
        assert [group["lr"] for group in groups] == [1e-4, 1e-4]
        # in a step of the run each of them has a gradient, as DDP needs it
        batch = batch_of(model.config)
        sum(model.train().criterion(run(model, batch), batch, 0.0).values()).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (name in learn), name
        # of SAM all but what its decoder does not read here: three of four masks, the score, points of other kinds
        unread = re.compile(r"shared_image_embedding|mask_decoder\.iou_prediction_head|"
                            r"mask_decoder\.output_hypernetworks_mlps\.[123]|prompt_encoder\.point_embed\.[023]")
        for name, parameter in model.sam.named_parameters():
            assert parameter.requires_grad == ("sam" in expected and not unread.match(name)), name


@torch.no_grad()
def test_diagnose_tells_when_one_object_is_taken_for_another():
    model = build()
    masks = torch.zeros(4, 32, 32, dtype=torch.bool)
    masks[0, :8], masks[1, 8:16], masks[2, :8], masks[3, 16, 3] = True, True, True, True         # the last is one pixel
    answers = torch.stack([masks[1], masks[1], masks[0], masks[0]])             # another's, right, right, nothing of it
    coarse = masks.clone()
    coarse[0, 4:12] = True                                                      # 256 of 384 pixels
    outputs = {"logits": answers[:, None].float(), "coarse_logits": coarse[:, None].float(),    # 0 is not above 0
               "image_index": torch.tensor([0, 0, 0, 1]), "point": torch.zeros(4, 1, 16, 16)}
    for i, row in enumerate((0, 6, 4, 9)):                                      # cells of two pixels, read at (1, 1)
        outputs["point"][i, 0, row, 3] = 1
    figures = model.diagnose(outputs, masks)
    assert figures["mistaken"].tolist() == [1, 0, 0, 0]
    assert figures["point_hit"].tolist() == [1, 1, 0, 0]
    assert figures["coarse_iou"].tolist() == pytest.approx([256 / 384, 1, 1, 1])
    outputs = {name: torch.full_like(outputs[name], -1.0) for name in ("logits", "coarse_logits")}
    figures = model.diagnose(outputs | {"image_index": torch.arange(4)}, torch.zeros_like(masks))
    assert figures["coarse_iou"].tolist() == figures["mistaken"].tolist() == [0, 0, 0, 0]   # an empty union is no hit


def test_low_precision_keeps_the_response_map_in_float32():
    model = build().train()
    batch = batch_of(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = run(model, batch)
        S_C = outputs["coarse_logits"].repeat(1, 1, 6, 6)[:, :, :16, :16]
        low, point = model.eval().point_prompt(S_C)
    whole = model.encoded_cells()[point.argmax(1)] + model.sam.prompt_encoder.point_embed[1].weight
    assert low.dtype == torch.float32
    torch.testing.assert_close(low[:, 0], whole, rtol=1e-6, atol=1e-6)          # no digit of e_p is lost
    assert outputs["coarse_logits"].dtype == outputs["logits"].dtype == outputs["point"].dtype == torch.float32
    assert prompt_ris.point_map(torch.randn(2, 9).bfloat16(), 1.0, sample=True).dtype == torch.float32
    assert sum(model.criterion(outputs, batch, 0.0).values()).isfinite()


# -------------------------------------------------------------------------------------------------------- copying out


def copied_out(path, *names):
    """The source of these classes and of what their docstrings bring along, in a file of its own, imported."""
    wanted, parts = list(names), {}
    while wanted:
        part = getattr(prompt_ris, wanted.pop())
        parts[part.__name__] = inspect.getsource(part)
        along = re.search(r"To copy it out, bring along ([^.]*)\.", " ".join(part.__doc__.split()))
        wanted += along[1].split(", ") if along else []
    imports = ["import math", "import torch", "from einops import rearrange", "from torch import nn",
               "from torch.nn import functional"]
    path.write_text("\n\n".join([*imports, *parts.values()]))
    return runpy.run_path(str(path))


def test_two_modules_copied_into_a_file_of_their_own_do_the_same(tmp_path):
    copied = copied_out(tmp_path / "copied.py", "TinyDecoder", "TextPrompts")
    assert "Prompter" not in copied and "PromptRIS" not in copied
    text_mask = torch.arange(8) < torch.tensor([[5], [8]])
    for name, numbers, given in (
            ("TinyDecoder", (16, 12, 8, 2, 24), (torch.randn(2, 36, 16), torch.randn(2, 8, 12), text_mask, (4, 9))),
            ("TextPrompts", (12, 16, 2, 4, 24), (torch.randn(2, 8, 12), torch.randn(2, 36, 16), torch.randn(1, 36, 16),
                                                 text_mask))):
        ours, theirs = getattr(prompt_ris, name)(*numbers), copied[name](*numbers)
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours(*given), theirs(*given))


def test_the_third_copied_module_prompts_published_towers(tmp_path):
    model = build()
    copied = copied_out(tmp_path / "copied.py", "CrossModalPrompting")["CrossModalPrompting"](16, 12, 3, 2)
    copied.load_state_dict(model.cmp[0].state_dict())
    given = (torch.randn(2, 8, 12), torch.randn(2, 10, 16), model.clip_text.encoder.layers[0],
             model.clip_image.encoder.layers[0], torch.arange(8) < torch.tensor([[5], [8]]))
    for ours, theirs in zip(model.cmp[0](*given), copied(*given), strict=True):
        assert torch.equal(ours, theirs)


def test_a_map_that_is_not_square_keeps_its_rows():
    """Two sentences of the same words, one patch marked: the response stands where the patch does, on 4 x 9."""
    decoder = prompt_ris.TinyDecoder(16, 12, 8, 2, 24).eval()
    F_I, F_T = torch.zeros(1, 36, 16), torch.randn(1, 8, 12)
    F_I[0, 2 * 9 + 5] = 3.0
    S = decoder(F_I, F_T, torch.ones(1, 8, dtype=torch.bool), (4, 9))[0, 0]
    assert S.shape == (4, 9)
    other = (S - S[0, 0]).abs() > 1e-4
    assert other[2, 5] and other.sum() == 1


def test_masks_of_any_sides_are_read_at_the_centres_of_the_cells():
    masks = torch.zeros(1, 4, 12, dtype=torch.bool)
    masks[0, 1, 6] = True                                    # cell (0, 1) of 2 x 2 has its centre at row 1, column 9
    assert not prompt_ris.nearest(masks, 2).any()
    masks[0, 1, 9] = True
    assert prompt_ris.nearest(masks, 2)[0, 0].tolist() == [[False, True], [False, False]]
    pixels = prompt_ris.normalised(torch.zeros(1, 3, 12, 24, dtype=torch.uint8), 24, (0, 0, 0), (1, 1, 1))
    assert pixels.shape == (1, 3, 24, 24)


@torch.no_grad()
def test_modules_work_in_bfloat16():
    model, results = build(), []
    text_mask = torch.arange(8) < torch.tensor([[5], [8]])
    given = torch.randn(2, 8, 12), torch.randn(2, 10, 16), torch.randn(2, 16, 16)
    layers = model.clip_text.encoder.layers[0], model.clip_image.encoder.layers[0]
    for dtype in (torch.float32, torch.bfloat16):
        F_T, F_I, features = (one.to(dtype) for one in given)
        model.to(dtype)
        results.append([*model.cmp[0](F_T, F_I, *layers, text_mask), model.decoder(F_I[:, 1:], F_T, text_mask, (3, 3)),
                        model.text_prompts(F_T, features, features[:1], text_mask)])
    assert results[1][2].dtype == torch.float32                                 # the response map stays whole
    for whole, low in zip(*results, strict=True):
        torch.testing.assert_close(low.float(), whole, rtol=0, atol=0.1 * whole.abs().max().item())


DECODER, PROMPTS = (16, 12, 8, 2, 9), (12, 16, 2, 4, 9)      # widths, then blocks, heads, units
EIGHT = torch.ones(1, 8, dtype=torch.bool)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: prompt_ris.Attention(10, 4), "heads=4 do not divide a width of 10"),
    (lambda: prompt_ris.Prompter(10, 6, 3, 4), "heads=4 do not divide"),
    (lambda: prompt_ris.Prompter(8, 6, 3, 4)(torch.randn(2, 8, 5)), "features is .2, 8, 5., expected .*, 8., channels"),
    (lambda: prompt_ris.Prompter(8, 6, 3, 4)(torch.randn(2, 8, 8, 8)), "features is .2, 8, 8, 8., expected"),
    (lambda: prompt_ris.Prompter(8, 6, 3, 4)(torch.randn(2, 5, 8), torch.ones(2, 5)), "mask is torch.float32.*bool"),
    (lambda: prompt_ris.Prompter(8, 6, 3, 4)(torch.randn(2, 5, 8), torch.ones(2, 5).long()), "mask is torch.int64"),
    (lambda: prompt_ris.Prompter(8, 6, 3, 4)(torch.randn(2, 5, 8), torch.ones(5) > 0), "mask is torch.bool .5,."),
    (lambda: prompt_ris.TinyDecoder(*DECODER)(torch.randn(1, 36, 16), torch.randn(1, 8, 12), EIGHT, (6, 7)),
     "36 cells, which are not a grid of 6 x 7"),
    (lambda: prompt_ris.TinyDecoder(*DECODER)(torch.randn(1, 16, 36), torch.randn(1, 8, 12), EIGHT, (6, 6)),
     "F_I is .1, 16, 36., expected"),
    (lambda: prompt_ris.TinyDecoder(*DECODER)(torch.randn(1, 36, 16), torch.randn(1, 12, 8), EIGHT, (6, 6)),
     "F_T is .1, 12, 8., expected"),
    (lambda: prompt_ris.TinyDecoder(*DECODER)(torch.randn(1, 36, 16), torch.randn(1, 8, 12), EIGHT.float(), (6, 6)),
     "mask is torch.float32"),
    (lambda: prompt_ris.TextPrompts(*PROMPTS)(torch.randn(1, 8, 12), torch.randn(1, 16, 36), torch.zeros(1), EIGHT),
     "keys is .1, 16, 36., expected"),
    (lambda: prompt_ris.Attention(8, 4)(torch.randn(1, 8, 5), *[torch.randn(1, 5, 8)] * 2), "queries is .1, 8, 5."),
    (lambda: prompt_ris.Attention(8, 4)(*[torch.randn(1, 5, 8)] * 2, torch.randn(1, 8, 5)), "values is .1, 8, 5."),
    (lambda: prompt_ris.TextPrompts(*PROMPTS)(torch.randn(1, 8), torch.randn(1, 36, 16), torch.randn(1, 36, 16), EIGHT),
     "F_T is .1, 8., expected"),
])
def test_modules_refuse_what_they_would_misread(call, message):
    with pytest.raises(ValueError, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)


# -------------------------------------------------------------------------------------------------- tables and training


NUMBERS = {     # of Config: where the paper, or what it builds on, has them
    "4.2, the two resolutions": {"clip_size": 480, "image_size": 1024},
    "4.2, ViT-B/16 both": {"clip_backbone": "openai/clip-vit-base-patch16", "sam_backbone": "facebook/sam-vit-base"},
    "4.2, n": {"prompts": 16},
    "3.1, two transformer blocks": {"text_blocks": 2},
    "3.1, SAM is frozen": {"freeze": True},
    "Tables 3 and 4, the full model": {"v2l": True, "l2v": True, "icl": True, "sam": True},
    "Table 5, the full model": {"mask_prompt": True, "point_prompt": True, "text_prompt": True},
    "CLIP ViT-B/16": {"clip_patch": 16, "clip_native": 224, "clip_width": 768, "clip_heads": 12, "clip_ffn": 4 * 768,
                      "clip_layers": 12, "vocab_size": 49408, "clip_text_width": 512, "clip_text_heads": 8,
                      "clip_text_ffn": 4 * 512, "clip_text_positions": 77},
    "SAM ViT-B": {"sam_patch": 16, "sam_width": 768, "sam_heads": 12, "sam_ffn": 4 * 768, "sam_layers": 12,
                  "sam_window": 14, "sam_global": (2, 5, 8, 11), "sam_prompt_width": 256, "sam_mask_channels": 16,
                  "sam_decoder_heads": 8, "sam_decoder_ffn": 2048},
    "ours: CLIP's joint space; heads of 64; four times the width": {
        "decoder_width": 512, "decoder_heads": 512 // 64, "decoder_ffn": 4 * 512},
    "ours: heads as CLIP's text tower; four times D_S": {"cmp_heads": 8, "text_heads": 8, "text_ffn": 4 * 256},
    "ours: G-Ref's longest sentences as ETRIS cuts them": {"text_length": 22},
    "ours: 4.2 gives no rate": {"prompt_dropout": 0.2},
    "ours: plain softmax in (3)": {"tau": 1.0},
    "Eq. (9), a plain sum from the start": {"icl_weight": 1.0, "icl_warmup": 0.0},
    "ours: Eq. (8) finite at equal masks": {"icl_epsilon": 1e-4},
    "ours: as the paper's prompt learning": {"freeze_clip": True},
    "ours: published weights": {"pretrained": "hub"},
}
TRAINING = {    # of RECIPE
    "4.2": {"epochs": 50, "phases": {"clip": 20 / 50, "joint": 30 / 50}, "lr": 1e-4, "schedule": "poly", "power": 0.9,
            "batch_size": 16 * 4, "per_image": 4},
    "ours: LAVT's, whose schedule it is": {"weight_decay": 0.01, "warmup": 0.0, "clip": 0.0},
    "ours: 4.2 says a portion of the words": {"repeat_mask": 0.25},
    "ours: REFER's metrics at the image's own size": {"protocol": "original", "empty": "zero"},
    "ours: the best of the validation split": {"select": "mIoU"},
    "ours: fits a card": {"micro_batch": 16, "precision": "bf16"},
}


def test_every_number_is_the_papers_or_named_as_ours():
    assert asdict(Config()) == {field: value for part in NUMBERS.values() for field, value in part.items()}
    assert {field: value for part in TRAINING.values() for field, value in part.items()} == RECIPE
    assert prompt_ris.SPECIAL_TOKENS == {"pad": 0, "unknown": 1, "begin": 2, "end": 3}
    assert prompt_ris.MAPS == ("coarse",)                                       # Fig. 4: coarse and final masks


TABLES = {      # what a row of Tables 3 and 4 ticks, which prompts one of Table 5 keeps
    ("3", "CLIP"): set(), ("3", "CLIP+CMP"): {"v2l", "l2v"}, ("3", "CLIP+CMP+ICL"): {"v2l", "l2v", "icl"},
    ("3", "CLIP+CMP+SAM"): {"v2l", "l2v", "sam"}, ("3", "CLIP+CMP+ICL+SAM"): {"v2l", "l2v", "icl", "sam"},
    ("4", "Baseline"): set(), ("4", "V2LP"): {"v2l"}, ("4", "L2VP"): {"l2v"}, ("4", "CMP"): {"v2l", "l2v"},
    ("5", "none"): set(), ("5", "mask"): {"mask"}, ("5", "point"): {"point"}, ("5", "text"): {"text"},
    ("5", "mask+point"): {"mask", "point"}, ("5", "mask+text"): {"mask", "text"},
    ("5", "point+text"): {"point", "text"}, ("5", "mask+point+text"): {"mask", "point", "text"},
    ("ICL", "without"): {"v2l", "l2v", "sam"}, ("ICL", "with"): {"v2l", "l2v", "sam", "icl"},
}
SCORES = {      # oIoU, mIoU of these rows, from top to bottom
    "3": [(65.24, 67.94), (71.51, 73.10), (72.57, 73.97), (75.86, 77.40), (76.36, 78.10)],
    "4": [(65.24, 67.94), (67.48, 69.53), (70.52, 72.44), (71.51, 73.10)],
    "5": [(42.88, 42.63), (70.82, 72.01), (55.34, 55.18), (72.61, 75.11), (70.95, 73.24), (75.86, 77.40),
          (74.34, 76.75), (76.36, 78.10)],
}


def test_the_rows_are_those_of_the_papers_tables():
    """Tables 3, 4 and 5, in their order, with their figures; 4.4's ICL with and without."""
    assert [(table, row) for table, rows in ABLATIONS.items() for row in rows] == list(TABLES)
    assert {table: list(rows.values()) for table, rows in prompt_ris.FIGURES.items()} == {
        table: [f"oIoU {oiou:.2f}, mIoU {miou:.2f}" for oiou, miou in pairs] for table, pairs in SCORES.items()}
    assert prompt_ris.EVALUATION_ONLY == ("5",)                                 # 4.4: "in inference"


@torch.no_grad()
@pytest.mark.parametrize(("table", "row"), [key for key in TABLES if key[0] != "5"])
def test_a_row_has_what_the_table_ticks_and_is_blind_to_the_rest(table, row):
    has, recipe = TABLES[table, row], dict(RECIPE)
    changes = dict(ABLATIONS[table][row])
    recipe["phases"] = changes.pop("phases", recipe["phases"])
    assert recipe["phases"] == ({"clip": 0.4, "joint": 0.6} if "sam" in has else None)      # nothing is left to join
    model = build(**changes)
    batch = batch_of(model.config, images=2, each=1)

    def features(images=None, tokens=None):
        given = [batch["images"] if images is None else images, batch["tokens"] if tokens is None else tokens]
        return model.encode(*given, batch["text_mask"], batch["image_index"])

    words, patches = features()
    assert ("v2l" in has) != torch.equal(features(images=255 - batch["images"])[0], words)
    assert ("l2v" in has) != torch.equal(features(tokens=batch["tokens"].clamp(max=4))[1], patches)
    outputs = run(model, batch)
    assert outputs["logits"].shape[2:] == ((32, 32) if "sam" in has else (3, 3))
    assert ("icl" in has) == ("icl" in model.criterion(outputs, batch, 0.0))


@torch.no_grad()
@pytest.mark.parametrize("row", [row for table, row in TABLES if table == "5"])
def test_a_row_of_table_5_is_blind_to_the_prompts_it_lacks(row):
    """4.4: the prompts of one trained model, dropped at inference."""
    model = build()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    dropped = build(**ABLATIONS["5"][row])
    assert {name: value.shape for name, value in dropped.state_dict().items()} == shapes
    text_mask = torch.ones(2, 8, dtype=torch.bool)
    given = {"mask": torch.randn(2, 16, 4, 4), "point": torch.randn(2, 1, 16), "text": torch.randn(2, 8, 16)}
    before = dropped.drop(*given.values(), text_mask)
    for kind in given:
        after = dropped.drop(*(given | {kind: given[kind] + 1}).values(), text_mask)
        seen = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        assert seen == [kind == one and kind in TABLES["5", row] for one in given]


def test_recipe_is_the_papers():
    assert train.phase_starts(RECIPE) == {0: "clip", 20: "joint"}               # 4.2: 20 epochs, then 30
    steps = [train.factor(RECIPE, epoch, 50) for epoch in (0, 20, 49)]
    assert steps == pytest.approx([1, 0.6 ** 0.9, 0.02 ** 0.9])
    for dataset in ("refsegrs", "rrsisd", "risbench", "refcoco-union"):
        config, recipe, _ = train.settle(train.arguments(["--model", "prompt_ris", "--dataset", dataset]))
        groups = dataset != "rrsisd"                                            # it has one sentence a picture
        assert (config.icl, recipe["per_image"]) == ((True, 4) if groups else (False, 0))
        assert asdict(config) == asdict(Config()) | {"icl": groups}
        assert recipe == RECIPE | {"per_image": recipe["per_image"]}
    assert prompt_ris.RETIRED == {"cmp_width": 0, "icl_size": 0}                # as wide as what it reads; S as it is


def test_table_5_is_not_trained():
    """4.4, "in inference": a row of it drops prompts of the one trained model."""
    args = train.arguments(["--model", "prompt_ris", "--dataset", "refcoco", "--ablation", "5/mask+text"])
    with pytest.raises(ValueError, match=r"^--ablation 5/mask\+text: .* python evaluate.py --checkpoint RUN --set "
                                         r"mask_prompt=True point_prompt=False text_prompt=True$"):
        train.settle(args)


def test_phase_change_keeps_the_optimiser_state_of_what_goes_on_learning():
    model = build()
    model.start_phase("clip")
    device = torch.device("cpu")
    first = train.make_optimizer(model, RECIPE, device, known={})
    batch = batch_of(model.config)
    sum(model.train().criterion(run(model, batch), batch, 0.0).values()).backward()
    first.step()
    model.start_phase("joint")
    second = train.make_optimizer(model, RECIPE, device, known=first.state)
    went_on = dict(first.state)
    assert len(went_on) > 50 and not any(name.startswith("sam") for name, p in model.named_parameters() if p in went_on)
    for parameter, state in went_on.items():
        assert second.state[parameter] is state
    learning = [p for group in second.param_groups for p in group["params"]]
    assert len(learning) > len(went_on)
    with pytest.raises(ValueError, match="phases: sam is unknown"):
        model.start_phase("sam")


def test_the_phase_travels_with_the_weights():
    model, other = build(), build(seed=1)
    assert model.phase == "joint" and model.get_extra_state().item()            # of the whole model, until told
    model.start_phase("clip")
    models.load_own_state(other, *models.own_state(model), "here")
    assert other.phase == "clip" and other.coarse_only
    model.start_phase("joint")
    models.load_own_state(other, *models.own_state(model), "here")
    assert other.phase == "joint" and not other.coarse_only


class StopAt(train.StopRequest):
    """Asks to stop once `steps` steps have asked."""

    steps = 1

    def __init__(self):
        self.count = 0

    @property
    def asked(self):
        self.count += 1
        return self.count if self.count >= self.steps else None


def test_interrupted_and_resumed_in_each_phase_equals_uninterrupted(tmp_path, monkeypatch):
    shapes = [f"{field.name}={getattr(small(), field.name)!r}" for field in fields(Config)
              if getattr(small(), field.name) != getattr(Config.tiny(), field.name) and field.name != "vocab_size"]

    def go(name, *words):
        args = train.arguments(["--model", "prompt_ris", "--device", "cpu", "--workers", "0", "--limit", "24",
                                "--output", str(tmp_path / name), "--epochs", "4", "--batch-size", "4", *words,
                                "--set", *shapes, "text_length=10", "phases={'clip': 0.5, 'joint': 0.5}"])
        train.train(args, ONE)

    def state(name):
        return torch.load(tmp_path / name / "resume.pt", weights_only=True)

    go("whole")
    monkeypatch.setattr(train, "StopRequest", StopAt)
    for words, phase in (((), False), (("--resume",), True)):
        with pytest.raises(train.Stopped):
            go("parts", *words)
        assert state("parts")["model"]["_extra_state"].item() is phase
        monkeypatch.setattr(StopAt, "steps", 6)                     # the second stop is in the second phase
    monkeypatch.undo()
    torch.manual_seed(99)
    go("parts", "--resume")
    whole, parts = state("whole"), state("parts")
    for name, value in whole["model"].items():
        assert torch.equal(value, parts["model"][name]), name
    for number, moments in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][number][key]) for key, value in moments.items())
    batch, results = batch_of(small()), []                          # Table 5: a row is --set at evaluation
    for row in ABLATIONS["5"].values():
        model = models.load(tmp_path / "whole", [f"{name}={value}" for name, value in row.items()])
        assert model.phase == "joint"
        results.append(run(model, batch)["logits"])
    assert all(not torch.equal(one, other) for one, other in zip(results, results[1:], strict=False))


@pytest.mark.parametrize(("dataset", "line"), [("refcoco", "groups   4 expressions of each image"),
                                               ("risbench", "groups   4 expressions of each image"),
                                               ("rrsisd", "contrastive learning (ICL) is off")])
def test_groups_by_the_recipe_and_the_log_says_where_there_are_none(dataset, line, tmp_path, capsys):
    """3.3, 4.2: 16 images x 4 expressions in a step, also where a picture is there once per object; RRSIS-D has one."""
    layouts.write(dataset, tmp_path / "data", splits={"train": 5, "val": 1})
    job = train.begin(train.arguments([
        "--model", "prompt_ris", "--dataset", dataset, "--data-root", str(tmp_path / "data"), "--preset", "tiny",
        "--output", str(tmp_path / "run"), "--batch-size", "20", "--micro-batch", "6"]), ONE)
    train.print_settings(job, train.build(job).model)
    assert line in capsys.readouterr().out
    groups = [numbers for micro in job.sampler.plan(0, 0)[0] for numbers in micro]
    assert {len(numbers) for numbers in groups} == ({1} if dataset == "rrsisd" else {4})
    images = [{job.samples[number].picture for number in numbers} for numbers in groups]
    assert all(len(image) == 1 for image in images) and len(set.union(*images)) == len(groups)


def test_accumulation_over_groups_gives_the_gradient_of_the_whole(double):
    """In eval mode, where nothing is drawn: the mean over two groups is that of each alone, ICL included."""
    model, grads = build(), []
    batch = batch_of(model.config)
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)]):
        model.zero_grad()
        for part in parts:
            rows = slice(0, 2) if part.stop - part.start == 8 else slice(part.start // 4, part.stop // 4)
            some = {name: value[rows] if name == "images" else value[part] for name, value in batch.items()}
            some["image_index"] = some["image_index"] - some["image_index"].min()
            (sum(model.criterion(run(model, some), some, 0.0).values()) / len(parts)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------- tokenizer, published weights


def test_word_tokenizer_marks_begin_end_and_padding():
    words = data.WordTokenizer(WORDS, small().text_length, prompt_ris.SPECIAL_TOKENS)
    tokens, text_mask = words(["The RED ship", "a ship of the red harbour left of the ship"])
    assert len(words) == 10 and words.words == WORDS
    assert tokens[0].tolist() == [2, 4, 5, 6, 3, 0, 0, 0] and text_mask.sum(1).tolist() == [5, 8]
    assert tokens[1].tolist() == [2, 1, 6, 8, 4, 5, 9, 3]                        # cut, [EOS] kept, an unknown word


@pytest.fixture
def folder(tmp_path):
    """Small CLIP and SAM as their authors' folders would be, with a tokenizer."""
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = {one: k for k, one in enumerate([*letters, *(f"{a}</w>" for a in letters), "<|startoftext|>",
                                                  "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path / "clip-vit-base-patch16")
    model = build(vocab_size=len(vocabulary))
    clip = CLIPModel(CLIPConfig(text_config=model.clip_text.config.to_dict(),
                                vision_config=model.clip_image.config.to_dict(), projection_dim=8))
    clip.save_pretrained(tmp_path / "clip-vit-base-patch16")
    file = tmp_path / "clip-vit-base-patch16" / "model.safetensors"             # as old files: with tables of numbers
    numbers = {f"{name}_model.embeddings.position_ids": torch.arange(5)[None] for name in ("text", "vision")}
    save_file(load_file(file) | numbers, file, metadata={"format": "pt"})
    torch.manual_seed(7)
    sam = SamModel(model.sam.config)
    nn.init.normal_(sam.prompt_encoder.no_mask_embed.weight)
    sam.save_pretrained(tmp_path / "sam-vit-base")
    return tmp_path, clip, sam, len(vocabulary)


def test_published_weights_load_strictly_and_stay_out_of_exports(folder, capsys):
    path, clip, sam, words = folder
    config = small(pretrained=str(path), vocab_size=words, freeze=True)
    model = PromptRIS(config)
    sources = model.load_pretrained()
    printed = capsys.readouterr().out
    for part, count in (("clip-vit-base-patch16", len(clip.state_dict()) - 1), ("sam-vit-base", len(sam.state_dict()))):
        assert f"{path / part}: {count} tensors loaded" in printed              # of CLIP all but its logit scale
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(model.clip_image.state_dict()[name], value)
    for name, value in clip.text_model.state_dict().items():
        assert torch.equal(model.clip_text.state_dict()[name], value)
    for name, value in sam.state_dict().items():
        assert torch.equal(model.sam.state_dict()[name], value)
    assert torch.equal(model.decoder.image_projection.weight, clip.visual_projection.weight)
    assert torch.equal(model.decoder.text_projection.weight, clip.text_projection.weight)
    model.param_groups(RECIPE)
    models.remember_sources(model, sources)
    kept, left_out = models.own_state(model)
    assert {name.split(".")[0] for name in kept} == {"cmp", "decoder", "text_prompts", "_extra_state"}
    assert {name.split(".")[0] for name in left_out} == {"clip_image", "clip_text", "sam"}
    for changes, named in (({"decoder_width": 16}, "decoder_width and the clip_ fields"),
                           ({"clip_ffn": 28}, "decoder_width and the clip_ fields"),
                           ({"sam_layers": 1}, "image_size and the sam_ fields"),
                           ({"sam_layers": 3}, "image_size and the sam_ fields"),
                           ({"image_size": 64}, "image_size and the sam_ fields")):
        with pytest.raises(ValueError, match=f"does not fit {named}: .* of another shape, the first"):
            PromptRIS(replace(config, **changes)).load_pretrained()
    clip.half().save_pretrained(path / "clip-vit-base-patch16")                 # half precision is read into float32
    model.load_pretrained()
    for name, value in clip.vision_model.state_dict().items():
        assert torch.equal(model.clip_image.state_dict()[name], value.float())


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_a_published_folder_with_other_tensors_is_refused(folder, change):
    path, _, _, words = folder
    file = path / "sam-vit-base" / "model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if name.startswith("vision_encoder"))
    tensors[first + "x"] = tensors[first].clone()
    if change == "missing":
        del tensors[first + "x"], tensors[first]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"does not fit image_size and the sam_ fields: 1 of .*{first}"):
        PromptRIS(small(pretrained=str(path), vocab_size=words)).load_pretrained()


def test_clips_own_tokenizer_is_read_by_its_mask(folder):
    path, _, _, words = folder
    config = small(pretrained=str(path), vocab_size=words)
    tokens, text_mask = prompt_ris.tokenizer(config)(["ab", "abcdefghijklm"])
    start, end = words - 2, words - 1
    assert tokens[0].tolist() == [start, 0, 26 + 1, end, end, end, end, end]     # it pads with [EOS]
    assert text_mask[0].tolist() == [True] * 4 + [False] * 4
    assert torch.equal(prompt_ris.tokenizer(config)(["AB"])[0][0], tokens[0])    # CLIP's is in lower case
    assert tokens[1][[0, -1]].tolist() == [start, end] and text_mask[1].all()
    with pytest.raises(ValueError, match="expected vocab_size=10"):
        prompt_ris.tokenizer(small(pretrained=str(path)))
    three = CLIPTokenizer(vocab={"a</w>": 0, "<|startoftext|>": 1, "<|endoftext|>": 2}, merges=[])
    three.save_pretrained(path / "three")           # one more than the two words that a missing file is answered with
    few = prompt_ris.tokenizer(replace(config, clip_backbone="three", vocab_size=3))
    assert few(["a"])[0].tolist() == [[1, 0, 2, 2, 2, 2, 2, 2]]


def test_missing_weights_are_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="clip-vit-base-patch16: no such folder; put the files of"):
        prompt_ris.tokenizer(small(pretrained=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="HF_ENDPOINT .* pretrained=DIR"):
        PromptRIS(small(pretrained="hub", clip_backbone="nobody/no-such-clip")).load_pretrained()
    with pytest.raises(FileNotFoundError, match="no-such-clip: not reached on the hub .* pretrained=DIR"):
        prompt_ris.tokenizer(small(pretrained="hub", clip_backbone="nobody/no-such-clip"))
    (tmp_path / "clip-vit-base-patch16").mkdir()
    with pytest.raises(ValueError, match="not a folder as transformers saves it.*vocab.json"):
        prompt_ris.tokenizer(small(pretrained=str(tmp_path)))
    for field in ("clip_size", "image_size"):
        with pytest.raises(ValueError, match=rf"{field}=25\b.*must be multiples of"):
            small(**{field: 25})
    with pytest.raises(ValueError, match="text_length=11"):
        small(text_length=11)
