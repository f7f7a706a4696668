"""RS2-SAM 2 against its paper: every equation by plain loops, BEiT-3 against its description, DESIGN's contract."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import pickle
import re
import zlib

import numpy as np
import pytest
import safetensors.torch
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Sam2VideoConfig, Sam2VideoModel

import data
import models
from losses import boundary_loss
from models import rs2sam2
from models.rs2sam2 import BEiT3, BidirectionalHierarchicalFusion, Config, MaskPromptGenerator, RS2SAM2, TextGate

SMALL = dataclasses.replace(
    Config.tiny(), image_size=64, text_length=8, vocab_size=20, beit_size=32, beit_width=16, beit_layers=2, beit_ffn=32,
    beit_patch=8, beit_positions=12, hiera_width=16, hiera_blocks=(1, 1, 2, 1), hiera_global=(3,), fusion_reduction=4,
    fusion_heads=4, sam_width=16, sam_heads=2, sam_mlp=24, gate_heads=2, mpg_heads=2, lambda_dice=0.1,
    background_weight=0.9, foreground_weight=1.1, lambda_mpg=0.0, neck_norm=False)
RECIPE = {**rs2sam2.RECIPE, **rs2sam2.RECIPE_TINY}
M, L = 3, 8


def build(seed=0, lively=False, **changes):
    """A small model; lively: weights so large that attention is far from uniform, so small that none is saturated."""
    torch.manual_seed(seed)
    model = RS2SAM2(dataclasses.replace(SMALL, **changes)).eval()
    if lively:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (model.sam.prompt_encoder.mask_embed.conv1, model.sam.prompt_encoder.mask_embed.conv3):
                layer.weight /= 8                   # as they were before they were enlarged
            for parameter in model.parameters():
                scale = 0.15 if parameter.ndim > 1 else 0.05
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
            if model.config.boundary_loss:
                model.text_weight.bias.fill_(3.0)
    return model


def example(seed=0, size=64):
    """images (M,3,S,S), tokens and text_mask (M,L) with 8, 5 and 3 words, masks (M,S,S)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (M, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(4, 20, (M, L), generator=generator)
    text_mask = torch.arange(L) < torch.tensor([8, 5, 3])[:, None]
    masks = torch.zeros(M, size, size, dtype=torch.bool)
    for m in range(M):
        masks[m, 8 * m:8 * m + 20, 10:34] = True
    return images, tokens.where(text_mask, 1), text_mask, masks


def randomised(module, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def linear(layer, x):
    """One vector through a Linear by loops."""
    return torch.stack([sum(w * v for w, v in zip(row, x, strict=True)) + b
                        for row, b in zip(layer.weight, layer.bias, strict=True)])


def attention(layer, queries, keys, values, allowed=None):
    """Multi-head attention of one sample, Q vectors over K, by loops over heads, queries and keys."""
    q, k, v = ([linear(to, x) for x in xs] for to, xs in
               ((layer.to_q, queries), (layer.to_k, keys), (layer.to_v, values)))
    d = len(q[0]) // layer.heads
    read = []
    for query in q:
        heads = []
        for a in range(layer.heads):
            part = slice(a * d, (a + 1) * d)
            weights = [math.exp(query[part].dot(key[part]).item() / math.sqrt(d))
                       if allowed is None or allowed[j] else 0.0 for j, key in enumerate(k)]
            heads.append(sum(w / sum(weights) * value[part] for w, value in zip(weights, v, strict=True)))
        read.append(linear(layer.to_out, torch.cat(heads)))
    return torch.stack(read)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


# ------------------------------------------------------------------------------------------------------------- BEiT-3


def small_beit3(seed=0):
    torch.manual_seed(seed)
    beit3 = BEiT3(size=8, patch=4, width=8, layers=2, heads=2, ffn=12, positions=12, vocab_size=20)
    return randomised(beit3, seed).double()


@torch.no_grad()
def test_eq01_the_stream_is_class_token_patches_and_words_each_at_its_place():
    beit3 = small_beit3()
    pixels, (_, tokens, text_mask, _) = torch.randn(M, 3, 8, 8, dtype=torch.double), example()
    U_0 = beit3.embed(pixels, tokens, text_mask)
    assert list(U_0) == ["A", "B"] and U_0["A"].shape == (M, 5, 8) and U_0["B"].shape == (M, L, 8)
    proj, tables = beit3.vision_embed.proj, beit3.encoder.embed_positions
    for m in range(M):
        expected = [beit3.vision_embed.cls_token[0, 0] + tables["A"].weight[2]]
        for n in range(4):                                                    # patches row by row
            y, x = 4 * (n // 2), 4 * (n % 2)
            patch = pixels[m, :, y:y + 4, x:x + 4]
            projected = torch.stack([(w * patch).sum() for w in proj.weight]) + proj.bias
            expected.append(projected + tables["A"].weight[3 + n])
        torch.testing.assert_close(U_0["A"][m], torch.stack(expected))
        for n in range(L):                                                    # words start at row 2 of their own table
            word = beit3.text_embed.weight[tokens[m, n]] + tables["B"].weight[2 + n]
            torch.testing.assert_close(U_0["B"][m, n], word if text_mask[m, n] else 0 * word)


def described_beit3(state, streams, masks, heads=2):
    """BEiT-3 as its description has it, position by position. streams {"A", "B"}: lists of vectors; -> the same."""
    def norm(name, x):
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def dense(name, x):
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    tokens = [(branch, x) for branch in streams for x in streams[branch]]
    allowed = [keep for branch in streams for keep in masks[branch]]
    d = len(tokens[0][1]) // heads
    for layer in range(2):
        at = f"encoder.layers.{layer}."
        normed = [norm(f"{at}self_attn_layer_norm.{b}", x) for b, x in tokens]
        q, k, v = ([dense(f"{at}self_attn.{p}_proj.{b}", x) for (b, _), x in zip(tokens, normed, strict=True)]
                   for p in "qkv")
        after = []
        for (branch, x), query in zip(tokens, q, strict=True):
            mixed = []
            for a in range(heads):
                part = slice(a * d, (a + 1) * d)
                weights = [math.exp(query[part].dot(key[part]).item() / math.sqrt(d)) * keep
                           for key, keep in zip(k, allowed, strict=True)]
                mixed.append(sum(w * value[part] for w, value in zip(weights, v, strict=True)) / sum(weights))
            mixed = norm(f"{at}self_attn.inner_attn_ln.{branch}", torch.cat(mixed))
            x = x + dense(f"{at}self_attn.out_proj.{branch}", mixed)
            hidden = gelu(dense(f"{at}ffn.{branch}.fc1", norm(f"{at}final_layer_norm.{branch}", x)))
            hidden = norm(f"{at}ffn.{branch}.ffn_layernorm", hidden)
            after.append((branch, x + dense(f"{at}ffn.{branch}.fc2", hidden)))
        tokens = after
    return {branch: torch.stack([norm(f"encoder.layer_norm.{b}", x) for b, x in tokens if b == branch])
            for branch in streams}


@torch.no_grad()
@pytest.mark.parametrize("given", ["AB", "A", "B"], ids=["joint", "image only", "text only"])
def test_beit3_is_what_its_description_says(given):
    beit3 = small_beit3()
    pixels, (_, tokens, text_mask, _) = torch.randn(M, 3, 8, 8, dtype=torch.double), example()
    inputs = {"pixels": pixels} if "A" in given else {}
    inputs |= {"tokens": tokens, "text_mask": text_mask} if "B" in given else {}
    image, words = beit3(**inputs)
    assert (image is None) == ("A" not in given) and (words is None) == ("B" not in given)
    U_0 = beit3.embed(**inputs)
    for m in range(M):
        keep = {"A": [True] * 5, "B": text_mask[m].tolist()}
        expected = described_beit3(beit3.state_dict(), {b: U_0[b][m] for b in given}, {b: keep[b] for b in given})
        if image is not None:
            torch.testing.assert_close(image[m], expected["A"], rtol=1e-4, atol=1e-4)
        if words is not None:
            real = text_mask[m]
            torch.testing.assert_close(words[m][real], expected["B"][real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_has_no_influence_on_real_positions_of_beit3():
    beit3 = small_beit3()
    pixels, (_, tokens, text_mask, _) = torch.randn(M, 3, 8, 8, dtype=torch.double), example()
    image, words = beit3(pixels, tokens, text_mask)
    other_image, other_words = beit3(pixels, tokens.where(text_mask, 7), text_mask)
    torch.testing.assert_close(image, other_image, rtol=0, atol=0)
    torch.testing.assert_close(words[text_mask], other_words[text_mask], rtol=0, atol=0)
    alone, alone_words = beit3(pixels[1:2], tokens[1:2, :5])
    torch.testing.assert_close(image[1:2], alone)
    torch.testing.assert_close(words[1:2, :5], alone_words)


def official_shapes(layers=24, D=1024, ffn=4096, vocab=64010, patch=16, rows=199, positions=1024):
    """The published file's tensors, from the pattern list of its description."""
    shapes = {"text_embed.weight": (vocab, D),
              "vision_embed.cls_token": (1, 1, D), "vision_embed.mask_token": (1, 1, D),
              "vision_embed.proj.weight": (D, 3, patch, patch), "vision_embed.proj.bias": (D,),
              "encoder.embed_positions.A.weight": (rows, D), "encoder.embed_positions.B.weight": (positions, D)}
    for w in "AB":
        norms, dense = [f"encoder.layer_norm.{w}"], []
        for n in range(layers):
            at = f"encoder.layers.{n}."
            dense += [(f"{at}self_attn.{p}_proj.{w}", D, D) for p in ("q", "k", "v", "out")]
            dense += [(f"{at}ffn.{w}.fc1", ffn, D), (f"{at}ffn.{w}.fc2", D, ffn)]
            norms += [f"{at}self_attn.inner_attn_ln.{w}", f"{at}self_attn_layer_norm.{w}", f"{at}final_layer_norm.{w}"]
            shapes |= {f"{at}ffn.{w}.ffn_layernorm.{kind}": (ffn,) for kind in ("weight", "bias")}
        shapes |= {f"{name}.{kind}": (D,) for name in norms for kind in ("weight", "bias")}
        for name, rows_out, columns in dense:
            shapes |= {f"{name}.weight": (rows_out, columns), f"{name}.bias": (rows_out,)}
    return {f"beit3.{name}": shape for name, shape in shapes.items()}


def test_beit3_has_the_published_files_names_shapes_and_size():
    with torch.device("meta"):
        large = BEiT3()
    assert {f"beit3.{name}": tuple(value.shape) for name, value in large.state_dict().items()} == official_shapes()
    assert len(official_shapes()) == 971
    assert sum(parameter.numel() for parameter in large.parameters()) == 672_702_464
    tiny = {f"beit3.{name}": tuple(value.shape) for name, value in small_beit3().state_dict().items()}
    assert tiny == official_shapes(2, 8, 12, 20, 4, 7, 12)


# ----------------------------------------------------------------------------------------------------------- equations


def small_fusion(**options):
    torch.manual_seed(0)
    return randomised(BidirectionalHierarchicalFusion(8, 6, reduction=2, heads=2, **options), scale=0.4)


def fusion_inputs():
    generator = torch.Generator().manual_seed(1)
    F_in, F_i = torch.randn(2, M, 2, 3, 8, generator=generator)
    T_i = torch.randn(M, 5, 6, generator=generator)
    text_mask = torch.arange(5) < torch.tensor([5, 3, 2])[:, None]
    return F_in, F_i, T_i, text_mask


@torch.no_grad()
@pytest.mark.parametrize("official", [False, True], ids=["paper", "official"])
def test_eq02_image_and_words_read_each_other(official):
    layer, (_, F_i, T_i, text_mask) = small_fusion(official=official), fusion_inputs()
    F2, T2 = layer.interact(F_i, T_i, text_mask)
    assert F2.shape == (M, 2, 3, 4) and T2.shape == (M, 5, 4)
    for m in range(M):
        F1 = [gelu(linear(layer.down, x)) for x in F_i[m].flatten(0, 1)]
        T1 = [linear(layer.text_in, t) for t in T_i[m]]
        expected = attention(layer.image_reads_text, F1, T1, T1, text_mask[m]) + torch.stack(F1)
        torch.testing.assert_close(F2[m].flatten(0, 1), expected)
        image = list(expected) if official else F1
        torch.testing.assert_close(T2[m], attention(layer.text_reads_image, T1, image, image) + torch.stack(T1))


@torch.no_grad()
@pytest.mark.parametrize("official", [False, True], ids=["paper", "official"])
def test_eq03_text_is_blended_and_image_takes_two_branches(official):
    layer = small_fusion(official=official, alpha_text=0.3, alpha_image=0.7)
    F_in, F_i, T_i, text_mask = fusion_inputs()
    norm, mlp = randomised(nn.LayerNorm(8)), randomised(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), seed=2)
    F_out, T_next = layer(F_in, F_i, T_i, text_mask, norm, mlp)
    F2, T2 = layer.interact(F_i, T_i, text_mask)
    for m in range(M):
        for n in range(5):
            expected = (1 - 0.3) * T_i[m, n] + 0.3 * linear(layer.text_out, T2[m, n])
            torch.testing.assert_close(T_next[m, n], expected)
        for y in range(2):
            for x in range(3):
                F3 = F_in[m, y, x] + linear(layer.up, F2[m, y, x]) + F_i[m, y, x]
                side = gelu(linear(layer.side[0], norm(F3) if official else F3))
                expected = F3 + mlp(norm(F3)) + 0.7 * linear(layer.side[2], side)
                torch.testing.assert_close(F_out[m, y, x], expected)


def test_eq03_coefficients_are_the_papers():
    assert Config().alpha_text == 0.2 and Config().alpha_image == 0.5
    layer = build().fusion[0]
    assert layer.alpha_text == 0.2 and layer.alpha_image == 0.5


@torch.no_grad()
def test_structures_of_table_4_drop_the_text_update_and_the_text():
    F_in, F_i, T_i, text_mask = fusion_inputs()
    norm, mlp = nn.LayerNorm(8), nn.Linear(8, 8)
    uni = small_fusion(structure="uni")
    bi = small_fusion(structure="bi")
    bi.load_state_dict(uni.state_dict(), strict=False)
    F_uni, T_uni = uni(F_in, F_i, T_i, text_mask, norm, mlp)
    F_bi, T_bi = bi(F_in, F_i, T_i, text_mask, norm, mlp)
    torch.testing.assert_close(F_uni, F_bi)
    assert T_uni is T_i and (T_bi - T_i).abs().max() > 0.01
    linear_only = small_fusion(structure="linear")
    F1 = F.gelu(linear_only.down(F_i))
    torch.testing.assert_close(linear_only.interact(F_i, None, None)[0], F1)
    assert not [name for name, _ in linear_only.named_parameters() if "text" in name]


@torch.no_grad()
@pytest.mark.parametrize(("size", "wide"), [(64, 64), (96, 96), (64, 160)])
def test_hand_run_hiera_with_closed_fusion_is_transformers_own(size, wide):
    model = build(lively=True, image_size=size, hiera_windows=(8, 4, 6, 2))
    for layer in model.fusion:
        for closed in (layer.up, layer.side[-1]):
            nn.init.zeros_(closed.weight)
            nn.init.zeros_(closed.bias)
    pixels, T = torch.randn(M, 3, size, wide), torch.randn(M, L, 16)
    features = model.encode_image(pixels, T, example()[2])
    expected = model.sam.vision_encoder(pixels).fpn_hidden_states
    for feature, other, stride in zip(features, expected, (4, 8, 16), strict=True):
        assert feature.shape == (M, 16, size // stride, wide // stride)
        torch.testing.assert_close(feature, other, rtol=0, atol=0)
    without = build(image_size=size, hiera_windows=(8, 4, 6, 2), fusion="none")
    without.load_state_dict(model.state_dict(), strict=False)
    for feature, other in zip(features, without.encode_image(pixels, None, None), strict=True):
        torch.testing.assert_close(feature, other, rtol=0, atol=0)


@torch.no_grad()
def test_fusion_layers_pass_the_words_on_from_block_to_block():
    model = build(lively=True)
    seen = []
    for layer in model.fusion:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs))
    T = torch.randn(M, L, 16)
    model.encode_image(torch.randn(M, 3, 64, 64), T, example()[2])
    for layer, (F_in, F_i, T_i, text_mask, norm, mlp), block in zip(
            model.fusion, list(seen), model.sam.vision_encoder.backbone.blocks, strict=True):
        torch.testing.assert_close(T_i, T)
        assert F_in.shape == F_i.shape and F_i.shape[-1] == block.dim_out
        assert norm is block.layer_norm2 and mlp is block.mlp
        T = layer(F_in, F_i, T_i, text_mask, norm, mlp)[1]


@torch.no_grad()
def test_eq04_the_feature_is_multiplied_by_what_it_read():
    torch.manual_seed(0)
    gate = randomised(TextGate(6, 2))
    feature, positions, T = torch.randn(M, 6, 2, 3), torch.randn(1, 6, 2, 3), torch.randn(M, 5, 6)
    text_mask = torch.arange(5) < torch.tensor([5, 3, 2])[:, None]
    F_en = gate(feature, positions, T, text_mask)
    assert F_en.shape == feature.shape
    for m in range(M):
        queries = [feature[m, :, y, x] + positions[0, :, y, x] for y in range(2) for x in range(3)]
        read = attention(gate.attention, queries, T[m], T[m], text_mask[m])
        for n in range(6):
            y, x = divmod(n, 3)
            torch.testing.assert_close(F_en[m, :, y, x], read[n] * feature[m, :, y, x])


@torch.no_grad()
@pytest.mark.parametrize("with_attention", [True, False], ids=["w MHCA", "w/o MHCA"])
def test_eq05_pseudo_mask_of_class_token_and_patches(with_attention):
    torch.manual_seed(0)
    generator = randomised(MaskPromptGenerator(6, heads=2, attention=with_attention))
    V_cls, V = torch.randn(M, 1, 6), torch.randn(M, 6, 6)
    M_p = generator(V_cls, V, (2, 3))
    assert M_p.shape == (M, 1, 2, 3)
    for m in range(M):
        token = V_cls[m, 0]
        if with_attention:
            token = attention(generator.attention, [token], V[m], V[m])[0] * token
        token = linear(generator.linear, token)
        for n in range(6):                                                    # R(V) lays the patches out row by row
            value = linear(generator.mlp[0], V[m, n] * token)
            torch.testing.assert_close(M_p[m, 0, n // 3, n % 3], 1 / (1 + torch.exp(-value[0])))


def test_eq01_to_eq05_have_the_gradients_of_finite_differences():
    """In float64, towards every input and parameter: what the formulas differentiate is not cut."""
    def check(module, *inputs, call=None):
        module = randomised(module, scale=0.4).double()
        inputs = [x.double().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(
            lambda *values: (call or module)(*values[:len(inputs)]), (*inputs, *module.parameters()), fast_mode=True)

    generator = torch.Generator().manual_seed(0)
    text_mask = torch.tensor([[True, True, False], [True, True, True]])
    F_in, F_i, V = torch.randn(3, 2, 2, 3, 8, generator=generator)
    T_i, V_cls = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 1, 8, generator=generator)
    norm, mlp = nn.LayerNorm(8).double(), nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 8)).double()
    for structure, official in (("bi", False), ("bi", True), ("uni", False), ("linear", False)):
        layer = BidirectionalHierarchicalFusion(8, 6, reduction=2, heads=2, structure=structure, official=official)
        check(layer, F_in, F_i, T_i, call=lambda *values, own=layer: own(*values, text_mask, norm, mlp))
    gate, feature = TextGate(6, 2), torch.randn(2, 6, 2, 2, generator=generator)
    check(gate, feature, feature[:1], T_i, call=lambda F, positions, T: gate(F, positions, T, text_mask))
    for with_attention in (True, False):
        mpg = MaskPromptGenerator(8, heads=2, attention=with_attention)
        check(mpg, V_cls, V.flatten(1, 2), call=lambda V_cls, V, own=mpg: own(V_cls, V, (2, 3)))
    beit3 = BEiT3(size=4, patch=2, width=4, layers=2, heads=2, ffn=6, positions=5, vocab_size=6)
    tokens = torch.tensor([[0, 5, 1], [0, 4, 2]])
    check(beit3, torch.randn(2, 3, 4, 4, generator=generator),
          call=lambda pixels: (beit3(pixels, tokens, text_mask)[0], beit3(pixels, tokens)[1]))


@pytest.mark.parametrize("changes", [{}, {"fusion": "uni", "official_fusion": True, "official_logits": True},
                                     {"fusion": "none", "mpg_attention": False}], ids=str)
def test_the_whole_model_has_the_gradient_of_finite_differences(changes, monkeypatch):
    """From every output to the picture and every part of the model, in float64: no wire between two parts is cut."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model, generator = build(lively=True, freeze=False, **changes).double(), torch.Generator().manual_seed(4)
    model.param_groups(RECIPE)
    images, *texts = example()[:3]
    picture = nn.Parameter(images.double() / 255)
    probe = {name: torch.randn(value.shape, generator=generator, dtype=torch.double)
             for name, value in model(255 * picture, *texts).items()}
    parts = [model.beit3, model.sam.vision_encoder.backbone, model.sam.vision_encoder.neck, model.sam.mask_decoder,
             model.sam.prompt_encoder, model.gate, model.prompt_generator, model.token_mlp, model.text_projection,
             model.text_weight, nn.ParameterList([model.sam.no_memory_embedding]),
             *(model.fusion if "fusion" in model._modules else []), nn.ParameterList([picture])]
    for name, weights in probe.items():
        def value(name=name, weights=weights):
            return (model(255 * picture, *texts)[name] * weights).mean()

        learning = [picture, *(p for p in model.parameters() if p.requires_grad)]
        gradients = dict(zip(map(id, learning), torch.autograd.grad(value(), learning, allow_unused=True), strict=True))
        with torch.no_grad():
            for part in parts:
                own = [p for p in part.parameters() if p.requires_grad]
                steps = [1e-8 * torch.randn(p.shape, generator=generator, dtype=torch.double) for p in own]
                ends = []
                for sign in (1, -2):
                    for p, step in zip(own, steps, strict=True):
                        p.add_(sign * step)
                    ends.append(value().item())
                for p, step in zip(own, steps, strict=True):
                    p.add_(step)
                expected = sum((gradients[id(p)] * step).sum().item() for p, step in zip(own, steps, strict=True)
                               if gradients[id(p)] is not None)
                assert (ends[0] - ends[1]) / 2 == pytest.approx(expected, rel=1e-4, abs=1e-16), (name, type(part))


def test_eq06_terms_carry_the_papers_weights():
    model = build()
    generator = torch.Generator().manual_seed(0)
    logits, weight = torch.randn(M, 1, 16, 16, generator=generator), torch.randn(M, generator=generator)
    logits.requires_grad_()
    weight.requires_grad_()
    masks = example()[3]
    losses = model.criterion({"logits": logits, "text_weight": weight}, {"masks": masks}, 0.5)
    assert set(losses) == {"ce", "dice", "tbl"}
    full = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)[:, 0]
    ce = dice = tbl = 0.0
    for m in range(M):
        p, y = full[m].sigmoid(), masks[m].float()
        w = 1.1 * y + 0.9 * (1 - y)
        ce += -(w * (y * p.log() + (1 - y) * (1 - p).log())).sum() / w.sum() / M
        dice += (1 - (2 * (p * y).sum() + 1) / ((p * p).sum() + (y * y).sum() + 1)) / M
        tbl += boundary_loss(full[m][None, None], masks[m][None, None], weight[m:m + 1])[0] / M
    torch.testing.assert_close(losses["ce"], 1.0 * ce)
    torch.testing.assert_close(losses["dice"], 0.1 * dice)
    torch.testing.assert_close(losses["tbl"], 0.2 * tbl)
    for ours, theirs in zip(torch.autograd.grad(sum(losses.values()), (logits, weight)),
                            torch.autograd.grad(ce + 0.1 * dice + 0.2 * tbl, (logits, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert set(build(boundary_loss=False).criterion({"logits": logits}, {"masks": masks}, 0.5)) == {"ce", "dice"}


def test_the_pseudo_mask_may_have_a_loss_of_its_own():
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2, :3] = True                                                   # covers a cell, and half of the next
    M_p = torch.tensor([[0.7, 0.4, 0.2, 0.1], [0.03, 0.005, 0.01, 0.02]], requires_grad=True)   # squares near eps
    y = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = 0.0
    for p, share in zip(M_p, y, strict=True):
        ce = -sum(t * a.log() + (1 - t) * (1 - a).log() for a, t in zip(p, share, strict=True)) / 4
        overlap, squares = sum(a * t for a, t in zip(p, share, strict=True)), (p ** 2).sum() + (share ** 2).sum()
        expected = expected + (ce + 1 - (2 * overlap + 1e-4) / (squares + 1e-4)) / 2
    outputs = {"logits": torch.zeros(2, 1, 4, 4), "pseudo_mask": M_p.view(2, 1, 2, 2)}
    terms = build(boundary_loss=False, lambda_mpg=0.3).criterion(outputs, {"masks": masks}, 0.0)
    assert set(terms) == {"ce", "dice", "mpg"}
    torch.testing.assert_close(terms["mpg"], 0.3 * expected)
    torch.testing.assert_close(torch.autograd.grad(terms["mpg"], M_p), torch.autograd.grad(0.3 * expected, M_p))
    sure = {**outputs, "pseudo_mask": (M_p > 0.5).float().view(2, 1, 2, 2)}    # 0 and 1 are bounded by 1e-4
    assert build(lambda_mpg=1.0, boundary_loss=False).criterion(sure, {"masks": masks}, 0.0)["mpg"].item() < 5
    assert "mpg" not in build(mpg=False, boundary_loss=False, lambda_mpg=1.0).criterion(outputs, {"masks": masks}, 0.0)


def test_a_random_tower_is_held_where_the_pseudo_mask_can_be_read():
    images, tokens, text_mask, _ = example()
    plain, normed = (build(lively=True, neck_norm=on) for on in (False, True))
    pixels, words = torch.randn(M, 3, 64, 64, requires_grad=True), torch.randn(M, L, 16)
    (*fine, F_16), (*same, normed_16) = (model.encode_image(pixels, words, text_mask) for model in (plain, normed))
    torch.testing.assert_close(fine, same, rtol=0, atol=0)
    expected = (F_16 - F_16.mean(1, keepdim=True)) / (F_16.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed_16, expected, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(normed_16.square().mul(normed_16).sum(), pixels)[0].abs().max() > 1e-6

    here, there = torch.full((2, 1, 1, 24, 24), 0.05)
    here[..., 4:12, 4:12] = there[..., 12:20, 12:20] = 0.8
    told = []
    for seed in range(8):                                      # without the enlargement 0.2 on average
        torch.manual_seed(seed)
        model, given = RS2SAM2(Config.tiny()), {}
        decoder, embed = model.sam.mask_decoder, model.sam.prompt_encoder.mask_embed
        decoder.register_forward_pre_hook(lambda module, args, inputs, to=given: to.update(inputs), with_kwargs=True)
        with torch.no_grad():
            model(torch.randint(256, (M, 3, 96, 96), dtype=torch.uint8), tokens, text_mask)
            told.append((embed(here) - embed(there)).std() / given["image_embeddings"].std())
    assert sum(told) / len(told) > 0.6


def test_eq07_the_weight_is_a_linear_of_the_first_word_and_the_boundary_moves_the_mask():
    model = build(lively=True)
    images, tokens, text_mask, masks = example()
    outputs = model(images, tokens, text_mask)
    T = model.beit3(rs2sam2.to_pixels(images, 32, *model.beit_statistics, "bicubic"), tokens, text_mask)[1]
    T_s = model.text_projection(T[:, 0])
    torch.testing.assert_close(outputs["text_weight"], model.text_weight(T_s)[:, 0])
    logits = outputs["logits"].detach().requires_grad_()
    for hard, reached in ((False, True), (True, False)):
        model.config = dataclasses.replace(model.config, hard_boundary=hard)
        weight = torch.ones(M, requires_grad=True)
        term = model.criterion({"logits": logits, "text_weight": weight}, {"masks": masks}, 0.0)["tbl"]
        gradients = torch.autograd.grad(term, (logits, weight), allow_unused=True)
        assert (gradients[0] is not None and gradients[0].abs().max() > 1e-6) == reached
        assert gradients[1].abs().min() > 1e-6


def test_diagnose_reports_the_text_weight_and_the_pseudo_mask():
    model = build()
    masks = example()[3]
    pseudo = F.interpolate(masks[:, None].float(), (16, 16))
    outputs = {"logits": torch.where(masks[:, None], 9.0, -9.0), "pseudo_mask": pseudo,
               "text_weight": torch.tensor([0.5, -0.25, 0.0])}
    figures = model.diagnose(outputs, masks)
    assert {name: value.shape for name, value in figures.items()} == dict.fromkeys(
        ("text_weight", "boundary", "pseudo_mask_iou"), (M,))
    torch.testing.assert_close(figures["text_weight"], torch.tensor([0.5, 0.25, 0.0]))
    assert (figures["boundary"] < 1e-5).all() and (figures["pseudo_mask_iou"] > 0.7).all()
    half = torch.tensor([[[[0.4, 0.6], [0.4, 0.6]]]]).expand(M, -1, -1, -1)   # above 0.5: the right half, 32 x 64
    cells = masks[:, :, 32:].sum((1, 2))
    expected = cells / (32 * 64 + masks.sum((1, 2)) - cells)
    torch.testing.assert_close(model.diagnose({**outputs, "pseudo_mask": half}, masks)["pseudo_mask_iou"], expected)
    assert model.diagnose({**outputs, "pseudo_mask": half * 0.5}, masks & False)["pseudo_mask_iou"].tolist() == [0] * M
    edge = {**outputs, "pseudo_mask": torch.full((M, 1, 2, 2), 0.5)}          # at 0.5 it is background
    assert model.diagnose(edge, masks)["pseudo_mask_iou"].tolist() == [0] * M
    assert (model.diagnose({**outputs, "logits": -outputs["logits"]}, masks)["boundary"] < 1e-5).all()
    shifted = {**outputs, "logits": outputs["logits"].roll(9, 2)}
    ones = torch.ones(M)                                                      # (7) at weight 1
    torch.testing.assert_close(model.diagnose(shifted, masks)["boundary"],
                               boundary_loss(shifted["logits"], masks[:, None], ones))
    assert (model.diagnose(shifted, masks)["boundary"] > 1e-3).all()


# --------------------------------------------------------------------------------------------------------- copying out


IMPORTS = ("import torch\nfrom einops import rearrange\nfrom torch import nn\nfrom torch.nn import functional\n"
           "from torch.utils.checkpoint import checkpoint\n\n\n")
TAKEN = {BEiT3: ("multiway", "BEiT3Attention", "BEiT3FeedForward", "BEiT3Layer", "run"), TextGate: ("Attention",),
         BidirectionalHierarchicalFusion: ("Attention",), MaskPromptGenerator: ("Attention",)}


@pytest.fixture(scope="module", params=["here", "copied"])
def parts(request, tmp_path_factory):
    """The four modules, and as an engineer copies them: their source and what they take along in a file of its own."""
    if request.param == "here":
        return list(TAKEN)
    path = tmp_path_factory.mktemp("copied") / "mine.py"
    names = dict.fromkeys(name for module in TAKEN for name in (*TAKEN[module], module.__name__))
    path.write_text(IMPORTS + "\n\n".join(inspect.getsource(getattr(rs2sam2, name)) for name in names))
    space = {}
    exec(compile(path.read_text(), path, "exec"), space)
    return [space[module.__name__] for module in TAKEN]


@pytest.mark.parametrize("module", TAKEN)
def test_docstring_names_arguments_and_what_is_taken_along(module):
    text = inspect.getdoc(module)
    assert tuple(re.search(r"Takes along: ([\w, ]+)\.", text).group(1).split(", ")) == TAKEN[module]
    arguments = list(inspect.signature(module.__init__).parameters)[1:]
    assert all(re.search(rf"\b{name}\b", text) for name in arguments), arguments


def test_copied_modules_start_with_the_papers_numbers():
    for module, expected in (
            (BidirectionalHierarchicalFusion, {"alpha_text": 0.2, "alpha_image": 0.5,              # 4.2
                                               "reduction": 4, "heads": 4, "structure": "bi", "official": False}),
            (MaskPromptGenerator, {"heads": 8, "attention": True}),
            (BEiT3, {"size": 224, "patch": 16, "width": 1024, "layers": 24, "heads": 16, "ffn": 4096, "positions": 1024,
                     "vocab_size": 64010, "checkpointing": False})):
        parameters = inspect.signature(module.__init__).parameters.values()
        assert {p.name: p.default for p in parameters if p.default is not p.empty} == expected


@torch.no_grad()
def test_modules_run_on_maps_of_any_sides_and_with_bfloat16_weights(parts):
    torch.manual_seed(0)
    beit3 = parts[0](size=8, patch=4, width=8, layers=2, heads=2, ffn=12, positions=12, vocab_size=20)
    gate, fusion, generator = parts[1](6, 2), parts[2](8, 6, reduction=2, heads=2), parts[3](8, heads=2)
    F_in, F_i, T_i, text_mask = fusion_inputs()
    pixels, feature, V = torch.randn(M, 3, 8, 8), torch.randn(M, 6, 3, 5), torch.randn(M, 6, 8)

    def outputs(kind):
        for module in (beit3, gate, fusion, generator):
            module.to(kind)
        norm = nn.LayerNorm(8).to(kind)
        image, words = beit3(pixels.to(kind), torch.full((M, 5), 7), text_mask)
        return (image, words[text_mask], *fusion(F_in.to(kind), F_i.to(kind), T_i.to(kind), text_mask, norm, norm),
                gate(feature.to(kind), feature[:1].to(kind), T_i.to(kind), text_mask),
                generator(image[:, :1], V.to(kind), (3, 2)))

    full, half = outputs(torch.float32), outputs(torch.bfloat16)
    assert [tuple(value.shape[1:]) for value in full[2:]] == [(2, 3, 8), (5, 6), (6, 3, 5), (1, 3, 2)]
    for one, other in zip(full, half, strict=True):
        assert other.dtype == torch.bfloat16 and (one - other.float()).abs().max() < 0.1 * one.abs().max()


def test_modules_refuse_what_they_would_read_wrongly(parts):
    beit3 = parts[0](size=8, patch=4, width=8, layers=1, heads=2, ffn=12, positions=12, vocab_size=20)
    gate, fusion, generator = parts[1](6, 2), parts[2](8, 6, reduction=2, heads=2), parts[3](8, heads=2)
    F_in, F_i, T_i, text_mask = fusion_inputs()
    feature, tokens, norm = torch.randn(M, 6, 3, 5), torch.full((M, 5), 7), nn.LayerNorm(8)
    for numbers in (text_mask.long(), text_mask.float()):
        for call in (lambda m=numbers: beit3(None, tokens, m), lambda m=numbers: gate(feature, feature, T_i, m),
                     lambda m=numbers: fusion(F_in, F_i, T_i, m, norm, norm)):
            with pytest.raises(ValueError, match="mask.*: expected bool, True = a real token, got torch"):
                call()
    for call, message in (
            (lambda: beit3(torch.randn(M, 3, 4, 16)), r"expected \(B,3,8,8\), got \(3, 3, 4, 16\)"),
            (lambda: beit3(torch.randn(M, 8, 8, 3)), r"expected \(B,3,8,8\), got \(3, 8, 8, 3\)"),
            (lambda: gate(feature.movedim(1, -1), feature, T_i, text_mask), r"\(M,6,h,w\) .*got \(3, 3, 5, 6\)"),
            (lambda: fusion(*(x.movedim(-1, 1) for x in (F_in, F_i)), T_i, text_mask, norm, norm),
             r"\(M,h,w,8\), channels last, got \(3, 8, 2, 3\)"),
            (lambda: fusion(F_in.flatten(1, 2), F_i.flatten(1, 2), T_i, text_mask, norm, norm),
             r"\(M,h,w,8\), channels last, got \(3, 6, 8\)"),
            (lambda: fusion(F_in[:, :1], F_i, T_i, text_mask, norm, norm), r"got \(3, 1, 3, 8\) and \(3, 2, 3, 8\)"),
            (lambda: gate(feature.flatten(2), feature[:1].flatten(2), T_i, text_mask), r"got \(3, 6, 15\)"),
            (lambda: gate(feature, feature[:1, ..., :1], T_i, text_mask), r"got \(3, 6, 3, 5\) and \(1, 6, 3, 1\)"),
            (lambda: generator(torch.randn(M, 1, 8), torch.randn(M, 36, 8), (6, 7)), r"\(M,6\*7,8\), got .*36"),
            (lambda: generator(torch.randn(M, 8), torch.randn(M, 6, 8), (2, 3)), r"\(M,1,8\) .*got \(3, 8\)"),
            (lambda: parts[2](8, 6, structure="Bi"), "structure=Bi.*: expected bi, uni or linear"),
            (lambda: parts[2](8, 6, reduction=3), "width=8: .*a multiple of reduction=3"),
            (lambda: parts[2](8, 6, reduction=2, heads=3), "width=4: expected a multiple of heads=3"),
            (lambda: parts[1](6, 4), "width=6: expected a multiple of heads=4"),
            (lambda: parts[3](8, heads=3), "width=8: expected a multiple of heads=3"),
            (lambda: parts[0](size=9, patch=4), "size=9.*expected multiples of patch=4"),
            (lambda: parts[0](width=9, heads=2), "width=9: expected multiples of .*heads=2")):
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------------- forward


@torch.no_grad()
def test_decoder_gets_gated_feature_one_token_and_the_embedded_pseudo_mask():
    model = build(lively=True)
    images, tokens, text_mask, _ = example()
    got = {}
    model.sam.mask_decoder.register_forward_pre_hook(lambda _, args, kwargs: got.update(kwargs), with_kwargs=True)
    outputs = model(images, tokens, text_mask)
    V, T = model.beit3(rs2sam2.to_pixels(images, 32, *model.beit_statistics, "bicubic"), tokens, text_mask)
    words = model.text_projection(T)
    pixels = rs2sam2.to_pixels(images, 64, *model.sam_statistics, "bilinear")
    feature4, feature8, feature16 = model.encode_image(pixels, words, text_mask)
    feature16 = feature16 + model.sam.no_memory_embedding.reshape(1, 16, 1, 1)
    positions = model.sam.get_image_wide_positional_embeddings()
    torch.testing.assert_close(got["image_embeddings"], model.gate(feature16, positions, words, text_mask))
    torch.testing.assert_close(got["image_positional_embeddings"], positions)
    torch.testing.assert_close(got["sparse_prompt_embeddings"], model.token_mlp(V[:, 0])[:, None, None])
    M_p = model.prompt_generator(V[:, :1], V[:, 1:], (4, 4))
    torch.testing.assert_close(outputs["pseudo_mask"], M_p)
    up = F.interpolate(M_p, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got["dense_prompt_embeddings"], model.sam.prompt_encoder.mask_embed(up))
    for feature, conv, other in zip(got["high_resolution_features"], ("conv_s0", "conv_s1"), (feature4, feature8),
                                    strict=True):
        torch.testing.assert_close(feature, getattr(model.sam.mask_decoder, conv)(other))
    assert got["multimask_output"] is False
    without = build(lively=True, mpg=False, gate=False)
    without.sam.mask_decoder.register_forward_pre_hook(lambda _, args, kwargs: got.update(kwargs), with_kwargs=True)
    without(images, tokens, text_mask)
    dense = without.sam.prompt_encoder.no_mask_embed.weight.reshape(1, 16, 1, 1).expand(1, 16, 4, 4)
    torch.testing.assert_close(got["dense_prompt_embeddings"], dense)


@torch.no_grad()
def test_outputs_have_the_documented_shapes_and_training_mode_changes_nothing():
    model = build(lively=True)
    images, tokens, text_mask, _ = example()
    outputs = model(images, tokens, text_mask)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "logits": (M, 1, 16, 16), "pseudo_mask": (M, 1, 4, 4), "text_weight": (M,)}
    assert all(name in outputs for name in rs2sam2.MAPS)
    assert outputs["pseudo_mask"].min() >= 0 and outputs["pseudo_mask"].max() <= 1
    for name, value in model.train()(images, tokens, text_mask).items():
        torch.testing.assert_close(value, outputs[name], rtol=0, atol=0)


@torch.no_grad()
def test_switches_for_released_weights():
    images, tokens, text_mask, _ = example()
    plain = build(lively=True)
    logits = plain(images, tokens, text_mask)["logits"]
    pair = build(lively=True, official_logits=True)(images, tokens, text_mask)["logits"]
    torch.testing.assert_close(pair, 2 * logits - 1)                          # arg max of (1-m, m) is m > 0.5
    assert (build(lively=True, official_fusion=True)(images, tokens, text_mask)["logits"] - logits).abs().max() > 1e-3
    imagenet = build(official_pixels=True)
    torch.testing.assert_close(imagenet.beit_statistics, plain.sam_statistics)
    assert not any(getattr(Config(), name) for name in (
        "official_fusion", "official_logits", "official_pixels", "official_unknown", "official_precision",
        "official_dice", "hard_boundary"))


@torch.no_grad()
def test_pixels_of_the_two_encoders():
    model = build()
    grey = torch.full((1, 3, 64, 64), 51, dtype=torch.uint8)
    beit = rs2sam2.to_pixels(grey, 32, *model.beit_statistics, "bicubic")
    assert beit.shape == (1, 3, 32, 32)
    torch.testing.assert_close(beit, torch.full_like(beit, (0.2 - 0.5) / 0.5))
    sam = rs2sam2.to_pixels(grey, 64, *model.sam_statistics, "bilinear")
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        torch.testing.assert_close(sam[:, channel], torch.full((1, 64, 64), (0.2 - mean) / std))
    edge = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    edge[..., 30:] = 255
    sharp = rs2sam2.to_pixels(edge, 32, *model.beit_statistics, "bicubic")
    assert sharp.min() == -1 and sharp.max() == 1                             # bicubic overshoot is cut as PIL cuts it


@torch.no_grad()
@pytest.mark.parametrize(("official", "small"), [(False, "BICUBIC"), (True, "BILINEAR")])
def test_both_encoders_are_shown_what_pil_shrinks_without_aliasing(official, small):
    model, seen = build(official_pixels=official), {}
    model.beit3.register_forward_pre_hook(lambda _, args: seen.update(beit=args[0]))
    model.sam.vision_encoder.backbone.patch_embed.register_forward_pre_hook(lambda _, args: seen.update(sam=args[0]))
    images, tokens, text_mask, _ = example(size=144)
    model(images, tokens, text_mask)
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)    # SAM 2, official code
    half = torch.full((2, 3, 1, 1), 0.5)                                      # BEiT-3's own
    for name, side, how, (mean, std) in (("beit", 32, small, imagenet if official else half),
                                         ("sam", 64, "BILINEAR", imagenet)):
        for m in range(M):
            picture = Image.fromarray(images[m].permute(1, 2, 0).numpy())
            picture = picture.resize((side, side), getattr(Image.Resampling, how))
            levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            assert ((seen[name][m] * std + mean) * 255 - levels).abs().max() < 9          # PIL rounds twice


class OnlyOnMeta(TorchFunctionMode):
    """Refuses every call that gives a tensor of another device than the model's, also where PyTorch would let it in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.is_meta, function
        return result


@pytest.mark.parametrize("changes", [{}, {"mpg": False, "official_unknown": True, "official_pixels": True,
                                          "official_dice": True, "hard_boundary": True}], ids=["paper", "official"])
def test_what_is_made_on_the_way_is_on_the_models_device(changes, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())     # it knows no meta
    model = build(official_precision=bool(changes), **changes).to("meta").train()
    images, tokens, text_mask, masks, index = (x.to("meta") for x in (*example(), torch.tensor([0, 0, 1])))
    with OnlyOnMeta():
        for given in ((images, tokens, text_mask), (images[:2], tokens, text_mask, index)):
            outputs = model(*given)
            model.criterion(outputs, {"masks": masks}, 0.0)
            model.diagnose(outputs, masks)


def test_checkpointing_leaves_outputs_and_gradients_as_they_are():
    images, tokens, text_mask, masks = example()
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = build(lively=True, checkpointing=checkpointing).train()
        for part in (model.fusion[0].down, model.beit3.encoder.layers[0].ffn["A"].fc1):
            part.register_forward_hook(lambda *_, on=checkpointing: calls.append(on))
        model.param_groups(RECIPE)
        sum(model.criterion(model(images, tokens, text_mask), {"masks": masks}, 0.0).values()).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert [calls.count(on) for on in (False, True)] == [2, 4]                # each is computed anew
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- what learns


def reached(model, term=None):
    """Names of the parameters whose gradient exceeds 1e-6, and of those that have one at all."""
    images, tokens, text_mask, masks = example()
    losses = model.criterion(model(images, tokens, text_mask), {"masks": masks}, 0.0)
    model.zero_grad(set_to_none=True)
    (losses[term] if term else sum(losses.values())).backward()
    have = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name for name, gradient in have.items() if gradient.abs().max() > 1e-6}, set(have)


def cancels(name):
    """A key bias shifts all scores of a query alike where every key has it: the softmax does not see it."""
    return name.endswith(("to_k.bias", "k_proj.bias")) and not name.startswith("beit3")


ALL_LOUD = {"lambda_ce": 10.0, "lambda_dice": 10.0, "lambda_tbl": 10.0}    # gradients ten times above the threshold
VARIANTS = [{}, {"fusion": "uni"}, {"fusion": "linear"}, {"fusion": "none"}, {"gate": False}, {"mpg": False},
            {"mpg_attention": False}, {"official_fusion": True}, {"official_precision": True, "mpg": False},
            {"boundary_loss": False}, *({"fusion": fusion, "gate": False, "boundary_loss": False}
                                        for fusion in ("bi", "uni", "linear")),
            {"fusion": "none", "gate": False, "mpg": False, "boundary_loss": False}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("freeze", [True, False], ids=["freeze", "all"])
def test_all_that_learns_gets_a_gradient_and_nothing_else(changes, freeze):
    model = build(lively=True, freeze=freeze, **ALL_LOUD, **changes).train()
    groups = model.param_groups(RECIPE)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(
        id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    large, have = reached(model)
    assert not have ^ learning, sorted(have ^ learning)
    silent = {name for name in learning - large if not cancels(name)}
    assert not silent, sorted(silent)
    assert not [name for name in learning if name.startswith("sam.vision_encoder")] or not freeze
    assert model.sam.vision_encoder.training != freeze and model.beit3.training


def test_every_loss_term_reaches_what_it_should():
    model = build(seed=1, lively=True, freeze=False, **ALL_LOUD).train()
    model.param_groups(RECIPE)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for term in ("ce", "dice", "tbl"):
        silent = {name for name in learning - reached(model, term)[0] if not cancels(name)}
        expected = set() if term == "tbl" else {"text_weight.weight", "text_weight.bias"}     # they weigh (7) alone
        assert not silent ^ expected, (term, sorted(silent ^ expected))


def test_two_learning_rates_and_what_is_frozen():
    model = build(freeze=True)
    recipe = {**rs2sam2.RECIPE, **rs2sam2.RECIPE_FOR["refsegrs"]}
    low, high = model.requires_grad_(False).param_groups(recipe)              # as models.load leaves it
    assert (low["lr"], high["lr"]) == (5e-5, 1e-4)
    assert low["weight_decay"] == high["weight_decay"] == 0.01
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in high["params"]} == {"fusion", "gate", "prompt_generator"}
    assert {names[id(p)].split(".")[0] for p in low["params"]} == {"beit3", "sam", "text_projection", "token_mlp",
                                                                   "text_weight"}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name in frozen if not name.startswith("sam.vision_encoder.")} == {
        name for name in names.values() if name.startswith((
            "beit3.vision_embed.mask_token", "sam.prompt_encoder.point_embed", "sam.prompt_encoder.not_a_point_embed",
            "sam.prompt_encoder.no_mask_embed", "sam.mask_decoder.iou_prediction_head",
            "sam.mask_decoder.pred_obj_score_head", "sam.mask_decoder.output_hypernetworks_mlps.1",
            "sam.mask_decoder.output_hypernetworks_mlps.2", "sam.mask_decoder.output_hypernetworks_mlps.3",
            "fusion.4.text_reads_image", "fusion.4.text_out"))}


def test_recipes_are_the_papers():
    assert rs2sam2.RECIPE == {
        "epochs": 40, "lr": 1e-5, "lr_modules": 5e-5,                         # 4.2, RRSIS-D
        "schedule": "step", "drop_epochs": 10, "drop_factor": 0.1,            # 4.2: "0.1 times ... the last 10 epochs"
        "batch_size": 8, "micro_batch": 1,                                    # 4.2: a batch of 1 on each of 8 cards
        "weight_decay": 0.01, "warmup": 0.0, "clip": 0.0, "precision": "bf16",          # official code
        "black_boxes": 0.0,                                                   # the paper names no augmentation
        "per_image": 0, "protocol": "resized", "empty": "zero", "select": "mIoU+oIoU",  # official code
        "phases": None}
    assert rs2sam2.RECIPE_FOR == {"refsegrs": {"epochs": 60, "lr": 5e-5, "lr_modules": 1e-4}}       # 4.2
    fields = {field.name for field in dataclasses.fields(Config)}
    assert not fields & set(rs2sam2.RECIPE) and set(rs2sam2.RECIPE_TINY) <= set(rs2sam2.RECIPE)


def test_configuration_is_the_papers():
    assert dataclasses.asdict(Config()) == {
        "image_size": 1024, "beit_size": 224, "sam_width": 256, "beit_width": 1024,                 # 4.2
        "sam_backbone": "facebook/sam2-hiera-large", "beit_backbone": "beit3_large_patch16_224.pth",    # 4.2
        "alpha_text": 0.2, "alpha_image": 0.5,                                # 4.2
        "lambda_ce": 1.0, "lambda_dice": 0.1, "lambda_tbl": 0.2,              # 4.2
        "lambda_mpg": 0.0, "neck_norm": False,                                # ours: the paper has neither
        "freeze": True,                                                       # 1, 3.3: "the frozen SAM 2 image encoder"
        "fusion": "bi", "gate": True, "mpg": True, "mpg_attention": True, "boundary_loss": True,    # 3.3 to 3.6
        "background_weight": 0.9, "foreground_weight": 1.1,                   # [19], RMSIN's class weights
        "beit_patch": 16, "beit_layers": 24, "beit_heads": 16, "beit_ffn": 4096, "beit_positions": 1024,
        "vocab_size": 64010, "beit_words": "beit3.spm",                       # BEiT-3 large
        "hiera_width": 144, "hiera_heads": 2, "hiera_blocks": (2, 6, 36, 4),  # Hiera-L
        "hiera_windows": (8, 4, 16, 8),
        "hiera_global": (23, 33, 43), "hiera_background": 7,
        "sam_heads": 8, "sam_mlp": 2048, "sam_mask_channels": 16,             # SAM 2's decoder and mask prompt
        "fusion_reduction": 4, "fusion_heads": 4, "gate_heads": 8, "mpg_heads": 8,      # official code
        "text_length": 64, "pretrained": "hub", "weights_dir": "weights", "checkpointing": False,   # our choice
        "official_fusion": False, "official_logits": False, "official_pixels": False, "official_unknown": False,
        "official_precision": False, "official_dice": False, "hard_boundary": False}


def test_sam2_is_the_published_large_one():
    published = rs2sam2.sam2_config(Config())
    trunk, vision = published.vision_config.backbone_config, published.vision_config
    assert trunk.embed_dim_per_stage == [144, 288, 576, 1152] and trunk.num_attention_heads_per_stage == [2, 4, 8, 16]
    assert trunk.blocks_per_stage == [2, 6, 36, 4] and trunk.window_size_per_stage == [8, 4, 16, 8]
    assert trunk.global_attention_blocks == [23, 33, 43] and trunk.hidden_size == 144 and trunk.num_attention_heads == 2
    assert trunk.window_positional_embedding_background_size == [7, 7]
    assert vision.backbone_channel_list == [1152, 576, 288, 144] and vision.fpn_hidden_size == 256
    prompts, decoder = published.prompt_encoder_config, published.mask_decoder_config
    assert (prompts.hidden_size, prompts.image_size, prompts.mask_input_channels) == (256, 1024, 16)
    assert (decoder.hidden_size, decoder.mlp_dim, decoder.num_attention_heads, decoder.iou_head_hidden_dim) == (
        256, 2048, 8, 256)
    assert decoder.dynamic_multimask_via_stability is False                   # token 0 in training and evaluation alike


FULL = {"L_tbl", "MPG", "MHCA", "BL", "text to image", "image to text", "BC"}
WORDS_OF_BL = {"text to image", "image to text"}
ROWS = {        # of Tables 3 and 4: what each has; 4.4: "Linear ... without interacting with text", "Uni ... without
                # back-propagating visual information", BC "after encoding", BL "the layer" in the encoder
    ("3", "Baseline"): set(), ("3", "L_tbl"): {"L_tbl"}, ("3", "L_tbl+MMP"): {"L_tbl", "MPG", "MHCA"},
    ("3", "L_tbl+DHF"): FULL - {"MPG", "MHCA"}, ("3", "L_tbl+MMP+DHF"): FULL,
    ("4", "MPG w/o MHCA"): FULL - {"MHCA"}, ("4", "MPG w MHCA"): FULL,
    ("4", "Linear"): FULL - WORDS_OF_BL, ("4", "Uni"): FULL - {"image to text"}, ("4", "Bi"): FULL,
    ("4", "w/o BC"): FULL - {"BC"}, ("4", "w/o BL"): FULL - WORDS_OF_BL - {"BL"}, ("4", "w BC&BL"): FULL}


@torch.no_grad()
@pytest.mark.parametrize(("table", "row"), ROWS)
def test_rows_of_tables_3_and_4_have_what_the_paper_says(table, row):
    """Found in what the model does: which part an output depends on, and on which it does not."""
    changes = rs2sam2.ABLATIONS[table][row]
    model = build(lively=True, **changes)
    images, tokens, text_mask, masks = example()
    got = {}
    model.sam.mask_decoder.register_forward_pre_hook(lambda _, args, kwargs: got.update(kwargs), with_kwargs=True)
    outputs = model(images, tokens, text_mask)
    pixels, generator = torch.randn(M, 3, 64, 64), torch.Generator().manual_seed(0)
    words, others = torch.randn(2, M, L, 16, generator=generator)
    given = []
    for layer in model.fusion if "fusion" in model._modules else ():
        layer.register_forward_pre_hook(lambda _, args: given.append(args[2]))
    features = model.encode_image(pixels, words, text_mask)
    stock = model.sam.vision_encoder(pixels).fpn_hidden_states
    has = {"image to text"} if given and not torch.equal(given[0], given[-1]) else set()
    has |= {"L_tbl"} if "tbl" in model.criterion(outputs, {"masks": masks}, 0.0) else set()
    if not torch.allclose(features[2], stock[2], atol=1e-4):
        has.add("BL")
    if not torch.equal(features[2], model.encode_image(pixels, others, text_mask)[2]):
        has.add("text to image")
    ungated = build(lively=True, **changes | {"gate": False})
    ungated.load_state_dict(model.state_dict(), strict=False)
    plain = {}
    ungated.sam.mask_decoder.register_forward_pre_hook(lambda _, args, kwargs: plain.update(kwargs), with_kwargs=True)
    ungated(images, tokens, text_mask)
    if not torch.equal(got["image_embeddings"], plain["image_embeddings"]):
        has.add("BC")
    empty = model.sam.prompt_encoder(None, None, None, None)[1]
    if not torch.equal(got["dense_prompt_embeddings"], empty):
        has.add("MPG")
        if model.prompt_generator.attention is not None:
            has.add("MHCA")
    assert has == ROWS[table, row]
    assert ("pseudo_mask" in outputs) == ("MPG" in has) and ("text_weight" in outputs) == ("L_tbl" in has)


PRINTED = {     # Tables 3 and 4: oIoU, mIoU in the order of ROWS
    "3": ("55.51 36.64", "57.36 38.63", "70.89 60.20", "78.36 68.71", "80.87 73.90"),
    "4": ("79.89 71.59", "80.87 73.90", "77.39 68.19", "78.93 70.10", "80.87 73.90", "77.54 67.61", "72.33 61.08",
          "80.87 73.90")}


def test_figures_stand_at_their_rows():
    for table, figures in PRINTED.items():
        rows = [row for name, row in ROWS if name == table]
        assert rs2sam2.FIGURES[table] == {row: "oIoU {}, mIoU {}".format(*pair.split())
                                          for row, pair in zip(rows, figures, strict=True)}
    assert set(rs2sam2.FIGURES) == set(PRINTED)


def test_rows_with_everything_are_the_full_model():
    full = Config()
    for (table, row), has in ROWS.items():
        assert (dataclasses.replace(full, **rs2sam2.ABLATIONS[table][row]) == full) == (has == FULL), row
    assert set(ROWS) == {(table, row) for table in ("3", "4") for row in rs2sam2.ABLATIONS[table]}
    baseline = build(**rs2sam2.ABLATIONS["3"]["Baseline"])                     # SAM 2 and the union encoder
    assert {name for name, _ in baseline.named_children()} == {"beit3", "sam", "token_mlp"}


def test_paper_size_counts():
    with torch.device("meta"):
        model = RS2SAM2(Config())
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())
    assert count(model.fusion) == 30_331_560
    assert sum(count(layer.side) for layer in model.fusion) == 8_929_944
    assert count(model.prompt_generator) == 5_249_025 and count(model.gate) == 263_168
    encoder = model.sam.vision_encoder
    assert count(encoder.backbone) == 212_149_296 and count(encoder.neck) == 553_984
    assert count(model.sam.prompt_encoder) == 6_220 and count(model.sam.mask_decoder) == 4_215_109
    assert [layer.down.out_features for layer in model.fusion] == [36] * 2 + [72] * 6 + [144] * 36 + [288] * 4
    learning = [parameter for group in model.param_groups(rs2sam2.RECIPE) for parameter in group["params"]]
    assert not {id(parameter) for parameter in learning} & {id(parameter) for parameter in encoder.parameters()}
    assert sum(parameter.numel() for parameter in learning) == 713_249_110


# ------------------------------------------------------------------------------------------- tokenizers, files, errors


@pytest.fixture(scope="module")
def words_file(tmp_path_factory):
    """A SentencePiece file of 60 pieces, trained here."""
    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text.txt"
    text.write_text("\n".join(f"The {colour} {thing} on the {side} side of the harbour" for colour in (
        "red", "blue", "white") for thing in ("Ship", "plane", "bridge", "tank") for side in ("left", "right")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "beit3"), vocab_size=60, model_type="unigram", minloglevel=2,
        hard_vocab_limit=False)
    return folder / "beit3.model"


def folder_config(folder, words_file, **changes):
    (folder / "beit3.spm").write_bytes(words_file.read_bytes())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(words_file)).get_piece_size()
    return dataclasses.replace(SMALL, pretrained=str(folder), vocab_size=pieces + 2 + 8, **changes), pieces


def test_pretrained_tokenizer_numbers_pieces_as_the_embedding_expects(tmp_path, words_file):
    config, pieces = folder_config(tmp_path, words_file)
    tokenize = pickle.loads(pickle.dumps(rs2sam2.tokenizer(config)))
    raw = sentencepiece.SentencePieceProcessor(model_file=str(words_file))
    tokens, text_mask = tokenize(["red", "the Ship 漢 on the left side of the harbour"])
    assert tokens.shape == text_mask.shape == (2, 8) and tokens.dtype == torch.int64 and text_mask.dtype == torch.bool
    ids = raw.encode("red")
    assert tokens[0, :len(ids) + 2].tolist() == [0, *[piece + 1 for piece in ids], 2]
    assert (tokens[0, len(ids) + 2:] == 1).all()                              # <pad>
    assert torch.equal(text_mask, tokens != 1)
    assert tokens[1, 0] == 0 and tokens[1, -1] == 2                           # cut, with </s> kept
    assert 0 in raw.encode("漢") and 3 in tokenize(["漢"])[0]                  # <unk>
    upper, lower = ([piece + 1 for piece in raw.encode(word)] for word in ("The", "the"))
    assert upper != lower and tokenize(["The"])[0][0, 1:len(upper) + 1].tolist() == upper          # case kept
    with pytest.raises(ValueError, match=r"beit3\.spm: \d+ tokens, expected vocab_size - 8 = 64002"):
        rs2sam2.tokenizer(dataclasses.replace(config, vocab_size=64010))
    (tmp_path / "beit3.spm").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"beit3\.spm: damaged"):
        rs2sam2.tokenizer(config)


def test_word_tokenizer():
    words = data.WordTokenizer(["red", "ship", "the"], SMALL.text_length, rs2sam2.SPECIAL_TOKENS)
    tokenize = pickle.loads(pickle.dumps(words))
    assert len(tokenize) == 7 and tokenize.words == ["red", "ship", "the"]
    tokens, text_mask = tokenize(["The red ship", "blue " * 20])
    assert tokens.tolist() == [[0, 6, 4, 5, 2, 1, 1, 1], [0, 3, 3, 3, 3, 3, 3, 2]]
    assert text_mask.sum(1).tolist() == [5, 8]


def video_model(sam):
    """SAM 2 as the hub holds it, with the memory that the image model leaves out, and with the weights of `sam`."""
    c = sam.config
    video = Sam2VideoModel(Sam2VideoConfig(
        vision_config=c.vision_config, prompt_encoder_config=c.prompt_encoder_config.to_dict(),
        mask_decoder_config=c.mask_decoder_config.to_dict(), memory_attention_hidden_size=16,
        memory_attention_feed_forward_hidden_size=16, memory_attention_num_layers=1,
        memory_attention_num_attention_heads=1, memory_encoder_hidden_size=16, memory_encoder_output_channels=8,
        mask_downsampler_embed_dim=16, memory_fuser_embed_dim=16, memory_fuser_intermediate_dim=16))
    extra, missing = video.load_state_dict(sam.state_dict(), strict=False)
    assert extra and not missing
    return video


def test_official_files_are_read_back_strictly(tmp_path, words_file, capsys):
    config, _ = folder_config(tmp_path, words_file)
    torch.manual_seed(1)
    source = RS2SAM2(dataclasses.replace(config, pretrained="none"))
    video_model(source.sam).save_pretrained(tmp_path / "sam2-hiera-large")
    tensors = {f"beit3.{name}": value.half() for name, value in source.beit3.state_dict().items()}
    heads = {"mlm_head.weight": torch.zeros(2), "mim_head.bias": torch.zeros(2)}
    path = tmp_path / "beit3_large_patch16_224.pth"
    torch.save({"model": {**tensors, **heads}}, path)
    model = build(pretrained=str(tmp_path), vocab_size=config.vocab_size)
    sources = model.load_pretrained()
    assert sources == {"beit3.": "beit3_large_patch16_224.pth", "sam.": "facebook/sam2-hiera-large"}
    assert f"{path}: {len(tensors)} tensors loaded" in capsys.readouterr().out
    for name, value in model.beit3.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, tensors[f"beit3.{name}"].float(), rtol=0, atol=0)
    for name, value in model.sam.state_dict().items():
        torch.testing.assert_close(value, source.sam.state_dict()[name], rtol=0, atol=0)
    settings, weights = (tmp_path / "sam2-hiera-large" / name for name in ("config.json", "model.safetensors"))
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "dtype": "float16"}))      # a file may say so
    assert model.load_pretrained() == sources
    for name, value in model.sam.state_dict().items():
        torch.testing.assert_close(value, source.sam.state_dict()[name], rtol=0, atol=0)
    file, name = safetensors.torch.load_file(weights), "no_memory_embedding"
    for changed in ({**file, name + "s": torch.zeros(3)}, {key: value for key, value in file.items() if key != name}):
        safetensors.torch.save_file(changed, weights, {"format": "pt"})       # one too many, one too few
        with pytest.raises(ValueError, match=rf"sam2-hiera-large: does not fit hiera_width.*1 of \d+ tensors.*{name}"):
            model.load_pretrained()
    safetensors.torch.save_file(file, weights, {"format": "pt"})
    missing = {name: value for name, value in tensors.items() if name != "beit3.encoder.layers.1.ffn.B.fc2.weight"}
    torch.save({"model": missing}, path)
    with pytest.raises(ValueError, match=r"patch16_224\.pth: does not fit .*encoder\.layers\.1\.ffn\.B\.fc2\.weight"):
        model.load_pretrained()
    torch.save([1], path)
    with pytest.raises(ValueError, match=r"patch16_224\.pth: expected tensors by name.*under model; found list"):
        model.load_pretrained()
    torch.save(tensors, path)                       # plain
    assert model.load_pretrained() == sources
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"patch16_224\.pth: damaged or no PyTorch weights file"):
        model.load_pretrained()


@pytest.mark.parametrize("pretrained", ["hub", "folder"])
def test_missing_weights_are_named_with_their_place(tmp_path, pretrained):
    config = dataclasses.replace(SMALL, pretrained="hub" if pretrained == "hub" else str(tmp_path),
                                 weights_dir=str(tmp_path))
    field = "weights_dir" if pretrained == "hub" else "pretrained"
    with pytest.raises(FileNotFoundError, match=rf"beit3_large_patch16_224\.pth.*addf400/files.*--set {field}=DIR"):
        RS2SAM2(config).load_pretrained()
    with pytest.raises(FileNotFoundError, match=r"beit3\.spm.*github\.com/addf400/files"):
        rs2sam2.tokenizer(config)
    if pretrained == "hub":
        with pytest.raises(FileNotFoundError, match="facebook/sam2-hiera-large: not reached.*HF_ENDPOINT.*=DIR"):
            rs2sam2.load_tower(build().sam, config.sam_backbone, "")
    else:
        with pytest.raises(FileNotFoundError, match="sam2-hiera-large: no such folder; download facebook/"):
            rs2sam2.find_weights(config, config.sam_backbone)


@pytest.mark.parametrize(("field", "value"), [
    ("fusion", "both"), ("hiera_blocks", (1, 1, 1)), ("hiera_windows", (8, 4, 16)), ("image_size", 1000),
    ("hiera_windows", (12, 4, 16, 8)), ("beit_size", 220), ("hiera_width", 100), ("hiera_width", 104),
    ("text_length", 1023), ("beit_width", 1000), ("gate_heads", 3), ("mpg_heads", 5)])
def test_wrong_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}=|image_size=1024: expected a multiple of .*48"):
        dataclasses.replace(Config(), **{field: value})


def test_settings_at_the_edge_are_taken():
    assert dataclasses.replace(Config(), text_length=1022).beit_positions == 1024
    assert dataclasses.replace(Config(), image_size=960, hiera_windows=(12, 4, 16, 8))
    with pytest.raises(ValueError, match="image_size=112: expected a multiple of 32"):         # of 4 windows it is
        dataclasses.replace(Config(), image_size=112, hiera_windows=(7, 4, 16, 8))


def test_settings_reach_the_modules():
    """Each number of heads, rows and weights another one, none of them a default."""
    model = build(fusion_reduction=2, fusion_heads=2, gate_heads=16, mpg_heads=1, beit_heads=2, sam_heads=4,
                  sam_mask_channels=8, alpha_text=0.3, alpha_image=0.7, official_fusion=True)
    for layer, block in zip(model.fusion, model.sam.vision_encoder.backbone.blocks, strict=True):
        assert layer.down.out_features == block.dim_out // 2 and layer.image_reads_text.heads == 2
        assert (layer.alpha_text, layer.alpha_image, layer.official) == (0.3, 0.7, True)
        assert layer.text_reads_image.heads == 2 and layer.text_in.in_features == 16
    assert (model.gate.attention.heads, model.prompt_generator.attention.heads) == (16, 1)
    assert {layer.self_attn.heads for layer in model.beit3.encoder.layers} == {2}
    decoder, prompts = model.sam.mask_decoder.config, model.sam.prompt_encoder
    assert (decoder.num_attention_heads, decoder.mlp_dim, decoder.iou_head_hidden_dim) == (4, 24, 16)
    assert prompts.mask_embed.conv2.out_channels == 8 and prompts.mask_input_size == (16, 16)


def test_attention_is_pytorchs_from_its_start_on():
    torch.manual_seed(0)
    ours, theirs = rs2sam2.Attention(32, 4).double(), nn.MultiheadAttention(32, 4, batch_first=True).double()
    for layer in (ours.to_q, ours.to_k, ours.to_v):
        largest = layer.weight.abs().max()                                    # both uniform, so with the same bound
        torch.testing.assert_close(largest, theirs.in_proj_weight.abs().max(), rtol=0.01, atol=0)
    for layer in (ours.to_q, ours.to_k, ours.to_v, ours.to_out):
        assert not layer.bias.any()
    theirs.in_proj_weight.data = torch.cat([layer.weight.data for layer in (ours.to_q, ours.to_k, ours.to_v)])
    theirs.out_proj.weight.data = ours.to_out.weight.data
    queries, keys, values = torch.randn(3, 2, 5, 32, dtype=torch.double)
    mask = torch.arange(5) < torch.tensor([5, 2])[:, None]
    torch.testing.assert_close(ours(queries, keys, values, mask), theirs(queries, keys, values, ~mask)[0])


@torch.no_grad()
def test_small_towers_start_able_to_tell_words_and_mask_prompts_apart():
    torch.manual_seed(0)
    model = RS2SAM2(Config.tiny())
    words = model.beit3(tokens=torch.tensor([[0, 9, 2], [0, 17, 2]]))[1]
    assert (words[0, 1] - words[1, 1]).std() > 0.5 * words.std()
    low, high = (model.sam.prompt_encoder.mask_embed(torch.full((1, 1, 24, 24), p)) for p in (0.2, 0.8))
    assert (high - low).abs().max() > 0.01
    published = RS2SAM2(dataclasses.replace(Config.tiny(), pretrained="hub"))  # will be filled: left as it is
    small, large = (which.sam.vision_encoder.neck.convs[0].weight.std() for which in (published, model))
    assert small < 0.03 < large
    assert published.token_mlp[0].bias.any() and not model.token_mlp[0].bias.any()


def test_settings_of_older_runs_load(capsys):
    values = {**dataclasses.asdict(Config()), "mpg_layers": 1, "zero_init": False, "dice_squared": True}
    for field in ("official_unknown", "official_precision", "official_dice"):
        del values[field]
    assert models.config_from("rs2sam2", values) == Config()
    assert "official_dice=False" in capsys.readouterr().out
    for field, value in (("mpg_layers", 2), ("zero_init", True), ("dice_squared", False)):
        with pytest.raises(ValueError, match=field):
            models.config_from("rs2sam2", {**values, field: value})


# ------------------------------------------------------------------------- the authors' weights and the code's forms


STAND_IN = Config(
    pretrained="none", beit_width=64, beit_layers=2, beit_heads=4, beit_ffn=128, vocab_size=200, hiera_width=16,
    hiera_heads=1, hiera_blocks=(1, 2, 3, 2), hiera_global=(4,),
    official_fusion=True, official_logits=True, official_pixels=True, official_unknown=True, official_precision=True)


def fill(name, shape, seed):
    """Numbers for a tensor that follow from its name: N(0, 1/fan-in), 1 + 0.1 N for a vector "weight", else 0.1 N."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
    if len(shape) > 1:
        return normal / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal


def layers(at, *sizes):
    """Linear layers at[0], at[1], ... from sizes[0] to sizes[1], ..."""
    return {f"{name}.{kind}": (rows, columns) if kind == "weight" else (rows,)
            for name, columns, rows in zip(at, sizes, sizes[1:], strict=False) for kind in ("weight", "bias")}


def their_shapes(c):
    """Names and shapes of the tensors that the authors' code saves for a Config of ours."""
    C, D, shapes = c.sam_width, c.beit_width, {}

    def vectors(*names, size=C):
        shapes.update({f"{name}.{kind}": (size,) for name in names for kind in ("weight", "bias")})

    def convolution(name, *weight, out=0):
        shapes.update({f"{name}.weight": weight, f"{name}.bias": (out or weight[0],)})

    def attention(at, width):
        shapes.update({f"{at}.in_proj_weight": (3 * width, width), f"{at}.in_proj_bias": (3 * width,)})
        shapes.update(layers([f"{at}.out_proj"], width, width))

    trunk, d, place = "visual_model.image_encoder.trunk.", c.hiera_width, 0
    shapes |= {f"{trunk}pos_embed": (1, d, c.hiera_background, c.hiera_background),
               f"{trunk}pos_embed_window": (1, d, c.hiera_windows[0], c.hiera_windows[0])}
    convolution(f"{trunk}patch_embed.proj", d, 3, 7, 7)
    for stage, count in enumerate(c.hiera_blocks):
        out = c.hiera_width * 2 ** stage
        for n in range(place, place + count):
            at, r = f"{trunk}blocks.{n}.", out // c.fusion_reduction
            vectors(f"{at}norm1", size=d)
            vectors(f"{at}norm2", size=out)
            shapes |= layers([f"{at}attn.qkv"], d, 3 * out) | layers([f"{at}attn.proj"], out, out)
            shapes |= layers([f"{at}mlp.layers.0", f"{at}mlp.layers.1"], out, 4 * out, out)
            shapes |= layers([f"{at}proj"], d, out) if d != out else {}
            for adapter in ("MLP_Adapter", "Space_Adapter"):
                shapes |= layers([f"{at}{adapter}.D_fc1", f"{at}{adapter}.D_fc2"], out, r, out)
            shapes |= layers([f"{at}Space_Adapter.text_in_linear"], C, r)
            shapes |= layers([f"{at}Space_Adapter.text_out_linear"], r, C)
            for module in ("vlfusion_module", "lvfusion_module"):
                attention(f"{at}Space_Adapter.{module}.multihead_attn", r)
            d = out
        place += count
        convolution(f"visual_model.image_encoder.neck.convs.{3 - stage}.conv", C, out, 1, 1)
    shapes |= {f"visual_model.{name}": (1, 1, C) for name in ("no_mem_embed", "no_mem_pos_enc")}
    shapes |= {"visual_model.maskmem_tpos_enc": (7, 1, 1, C // 4), "visual_model.no_obj_ptr": (1, C)}
    convolution("visual_model.mask_downsample", 1, 1, 4, 4)
    convolution("visual_model.memory_encoder.out_proj", C // 4, C, 1, 1)
    shapes |= layers([f"visual_model.obj_ptr_proj.layers.{n}" for n in range(3)], C, C, C, C)
    for kind in ("self_attn", "cross_attn_image"):
        shapes |= layers([f"visual_model.memory_attention.layers.0.{kind}.out_proj"], C, C)
    vectors("visual_model.memory_attention.layers.0.norm1", "visual_model.memory_attention.norm")

    at, k = "visual_model.sam_prompt_encoder.", c.sam_mask_channels
    shapes |= {f"{at}pe_layer.positional_encoding_gaussian_matrix": (2, C // 2)}
    shapes |= {f"{at}{name}.weight": (1, C) for name in (
        "not_a_point_embed", "no_mask_embed", *(f"point_embeddings.{n}" for n in range(4)))}
    convolution(f"{at}mask_downscaling.0", k // 4, 1, 2, 2)
    vectors(f"{at}mask_downscaling.1", size=k // 4)
    convolution(f"{at}mask_downscaling.3", k, k // 4, 2, 2)
    vectors(f"{at}mask_downscaling.4", size=k)
    convolution(f"{at}mask_downscaling.6", C, k, 1, 1)

    at = "visual_model.sam_mask_decoder."
    for n, part, width in [(n, part, C if part == "self_attn" else C // 2) for n in range(2) for part in (
            "self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")] + [(-1, "", C // 2)]:
        place = f"{at}transformer." + (f"layers.{n}.{part}" if n >= 0 else "final_attn_token_to_image")
        shapes |= {name: shape for p in "qkv" for name, shape in layers([f"{place}.{p}_proj"], C, width).items()}
        shapes |= layers([f"{place}.out_proj"], width, C)
    for n in range(2):
        shapes |= layers([f"{at}transformer.layers.{n}.mlp.layers.{i}" for i in range(2)], C, c.sam_mlp, C)
        vectors(*(f"{at}transformer.layers.{n}.norm{i}" for i in range(1, 5)))
    vectors(f"{at}transformer.norm_final_attn")
    shapes |= {f"{at}{name}.weight": (rows, C) for name, rows in (
        ("iou_token", 1), ("mask_tokens", 4), ("obj_score_token", 1))}
    convolution(f"{at}output_upscaling.0", C, C // 4, 2, 2, out=C // 4)
    vectors(f"{at}output_upscaling.1", size=C // 4)
    convolution(f"{at}output_upscaling.3", C // 4, C // 8, 2, 2, out=C // 8)
    convolution(f"{at}conv_s0", C // 8, C, 1, 1)
    convolution(f"{at}conv_s1", C // 4, C, 1, 1)
    for head, out in [(f"output_hypernetworks_mlps.{n}", C // 8) for n in range(4)] + [
            ("iou_prediction_head", 4), ("pred_obj_score_head", 1)]:
        shapes |= layers([f"{at}{head}.layers.{n}" for n in range(3)], C, C, C, out)
    attention(f"{at}vlfusion_module.multihead_attn", C)

    beit3 = official_shapes(c.beit_layers, D, c.beit_ffn, c.vocab_size, c.beit_patch,
                            (c.beit_size // c.beit_patch) ** 2 + 3, c.beit_positions)
    shapes |= {f"mm_extractor.{name}": shape for name, shape in beit3.items()}
    attention("vmtoken.multihead_attn", D)
    shapes |= layers(["text_hidden_fcs.0.0", "text_hidden_fcs.0.2"], D, D, C) | layers(["text_feat_linear"], D, C)
    return shapes | layers(["mask_linear"], D, D) | layers(["mask_product"], D, 1) | layers(["meo_linear"], D, C) \
        | layers(["text2one_linear"], C, 1)


def their_file(path, c, seed=0, wrapper="module", change=dict):
    tensors = change({name: fill(name, shape, seed) for name, shape in their_shapes(c).items()})
    rest = {"ds_version": "0.14", "buffer_names": set(), "args": argparse.Namespace(lr=1.0)}     # and their arguments
    torch.save({wrapper: tensors} | rest if wrapper else tensors, path)
    return path


# The authors' own modules gave this with these weights: m1 - m0 at every 128th row and column of 1024 x 1024.
THEIR_LOGITS = """
    -4.66675 -4.57255 2.47016 -2.52964 0.47477 11.26539 -8.89774 -5.49748
    8.77593 -9.22237 -9.44030 -3.30203 -5.93438 2.83824 -10.47562 -6.67887
    -3.60566 4.88068 -1.25824 8.41553 -4.61969 -1.94577 -7.17884 -11.64469
    -3.21731 0.52944 -9.06425 -8.31817 1.06894 -0.78913 -10.04625 -6.47441
    -5.39776 -5.17966 -14.59619 -6.94102 -8.60212 -9.97885 1.29123 -11.07096
    0.65777 -14.19462 -6.29011 -10.24710 -6.44554 -7.82186 -8.73916 -1.80512
    -4.27990 11.31429 -10.30183 -6.87790 1.85269 -7.72500 -6.70355 -3.04443
    -2.48278 -8.25875 3.74765 5.84445 -8.10450 -7.60492 -9.93081 -2.21668"""
THEIR_PSEUDO_MASK = (               # its diagonal
    0.618175, 0.617975, 0.539814, 0.562446, 0.552973, 0.602019, 0.563205, 0.519921, 0.568714,
    0.556264, 0.558737, 0.502781, 0.550999, 0.600133)


@torch.no_grad()
def test_their_weights_give_their_numbers(tmp_path):
    model = RS2SAM2(STAND_IN).eval()
    model.load_state_dict(rs2sam2.read_official(their_file(tmp_path / "mp_rank_00_model_states.pt", STAND_IN)))
    cells = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(10)).float()
    image = F.interpolate(cells, 1024, mode="bicubic").round().clamp(0, 255).byte()
    tokens = torch.tensor([[0, 52, 88, 131, 99, 17, 2]])
    outputs = model(image, tokens, torch.ones_like(tokens, dtype=torch.bool))
    expected = torch.tensor([float(number) for number in THEIR_LOGITS.split()]).view(8, 8)
    logits = F.interpolate(outputs["logits"], (1024, 1024), mode="bilinear")[0, 0, ::128, ::128]
    error, scale = (logits - expected).abs(), expected.abs().max()
    assert error.square().mean().sqrt() < 1e-5 * scale and error.max() < 1e-4 * scale
    diagonal = outputs["pseudo_mask"][0, 0].diagonal()
    torch.testing.assert_close(diagonal, torch.tensor(THEIR_PSEUDO_MASK), rtol=0, atol=3e-5)
    torch.testing.assert_close(outputs["text_weight"], torch.tensor([-0.136008]), rtol=0, atol=3e-5)


SMALL_OFFICIAL = dataclasses.replace(SMALL, beit_size=40, hiera_blocks=(2, 1, 3, 1), hiera_global=(4,), sam_width=32)


@pytest.mark.parametrize("wrapper", ["", "module", "state_dict"])
def test_their_names_become_ours_by_rule(tmp_path, wrapper):
    def change(tensors):                            # as bf16, under data parallel's prefix
        return {f"module.{name}": value.bfloat16() for name, value in tensors.items()} if wrapper else tensors

    path, small = their_file(tmp_path / "file.pth", SMALL_OFFICIAL, 5, wrapper, change), SMALL_OFFICIAL
    ours, theirs = rs2sam2.read_official(path), their_shapes(small)
    model = RS2SAM2(small)
    model.load_state_dict(ours)
    assert all(value.dtype == torch.float32 for value in ours.values())
    read, total = sum(value.numel() for value in ours.values()), sum(math.prod(shape) for shape in theirs.values())
    unread = sum(math.prod(theirs[name]) for name in theirs if name.startswith("meo_linear") or re.match(
        r"visual_model\.(memory_|mask_downsample\.|maskmem|no_mem_pos|no_obj|obj_ptr)", name))
    assert read == total - unread + small.sam_width     # the positional matrix (2, C/2) stands in our model twice
    block, decoder = "visual_model.image_encoder.trunk.blocks.3.", "visual_model.sam_mask_decoder."
    width = 4 * small.hiera_width // small.fusion_reduction
    for name, other, rows in (
            ("fusion.3.down.weight", f"{block}Space_Adapter.D_fc1.weight", None),
            ("fusion.3.up.bias", f"{block}Space_Adapter.D_fc2.bias", None),
            ("fusion.3.side.0.weight", f"{block}MLP_Adapter.D_fc1.weight", None),
            ("fusion.3.side.2.weight", f"{block}MLP_Adapter.D_fc2.weight", None),
            ("fusion.3.text_in.weight", f"{block}Space_Adapter.text_in_linear.weight", None),
            ("fusion.3.text_out.weight", f"{block}Space_Adapter.text_out_linear.weight", None),
            *((f"fusion.3.image_reads_text.to_{p}.weight",
               f"{block}Space_Adapter.vlfusion_module.multihead_attn.in_proj_weight", (i, width))
              for i, p in enumerate("qkv")),
            ("fusion.3.text_reads_image.to_k.bias",
             f"{block}Space_Adapter.lvfusion_module.multihead_attn.in_proj_bias", (1, width)),
            ("fusion.3.text_reads_image.to_out.weight",
             f"{block}Space_Adapter.lvfusion_module.multihead_attn.out_proj.weight", None),
            ("gate.attention.to_v.weight", f"{decoder}vlfusion_module.multihead_attn.in_proj_weight",
             (2, small.sam_width)),
            ("prompt_generator.attention.to_q.weight", "vmtoken.multihead_attn.in_proj_weight", (0, small.beit_width)),
            ("prompt_generator.linear.weight", "mask_linear.weight", None),
            ("prompt_generator.mlp.0.bias", "mask_product.bias", None),
            ("token_mlp.0.bias", "text_hidden_fcs.0.0.bias", None),
            ("token_mlp.2.weight", "text_hidden_fcs.0.2.weight", None),
            ("text_projection.weight", "text_feat_linear.weight", None),
            ("text_weight.bias", "text2one_linear.bias", None),
            ("sam.vision_encoder.neck.convs.2.weight", "visual_model.image_encoder.neck.convs.2.conv.weight", None),
            ("sam.mask_decoder.transformer.layers.1.layer_norm3.bias",
             f"{decoder}transformer.layers.1.norm3.bias", None),
            ("sam.mask_decoder.output_hypernetworks_mlps.2.layers.0.weight",
             f"{decoder}output_hypernetworks_mlps.2.layers.1.weight", None),
            ("sam.mask_decoder.upscale_conv2.weight", f"{decoder}output_upscaling.3.weight", None),
            ("sam.no_memory_embedding", "visual_model.no_mem_embed", None)):
        expected = fill(other, theirs[other], 5)
        expected = expected.bfloat16().float() if wrapper else expected
        if rows:
            expected = expected[rows[0] * rows[1]:(rows[0] + 1) * rows[1]]
        assert torch.equal(ours[name], expected), name
    points = [fill(f"visual_model.sam_prompt_encoder.point_embeddings.{n}.weight", (1, 32), 5) for n in range(4)]
    torch.testing.assert_close(ours["sam.prompt_encoder.point_embed.weight"], torch.cat(points), rtol=0, atol=0.02)
    assert torch.equal(model.sam.shared_image_embedding.positional_embedding,
                       model.sam.prompt_encoder.shared_embedding.positional_embedding)


def test_files_written_on_a_card_are_read_where_there_is_none(tmp_path, monkeypatch):
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: seen.append(options) or load(*given, **options))
    torch.save({"a": torch.ones(1)}, tmp_path / "file.pth")
    rs2sam2.read_file(tmp_path / "file.pth")
    assert seen == [{"map_location": "cpu", "weights_only": True}]


def test_files_that_are_not_theirs_are_refused_in_one_line(tmp_path):
    path = tmp_path / "authors.pth"
    message = re.escape(str(path))
    with pytest.raises(FileNotFoundError, match=f"{message}: no such file"):
        rs2sam2.read_official(path)
    whole = their_file(path, SMALL_OFFICIAL).read_bytes()
    for damaged in (whole[:len(whole) // 2], b"<html>", b"", pickle.dumps(print, 2)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"^{message}: damaged or no PyTorch weights file") as error:
            rs2sam2.read_official(path)
        assert "\n" not in str(error.value)
    torch.save({"module": print}, path)             # asks to run code
    with pytest.raises(ValueError, match=f"^{message}: .*asks to run code is not opened"):
        rs2sam2.read_official(path)
    for content, found in (([1, 2], "found list"), ({"epoch": 3, "model": {}}, r"found \['epoch', 'model'\]"),
                           ({"epoch": 3, "x": torch.ones(1)}, r"found \['epoch', 'x'\]")):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"^{message}: expected tensors by name.*{found}"):
            rs2sam2.read_official(path)

    def without(begin):
        return lambda tensors: {name: value for name, value in tensors.items() if not name.startswith(begin)}

    for change, wrong in (
            (lambda tensors: tensors | {"visual_model.mask_decoder.x": torch.ones(1)},
             r"1 unknown as \['visual_model\.mask_decoder\.x'\]"),
            (lambda tensors: tensors | {"gate.attention.to_q.weight": torch.ones(1)},       # ours is not theirs
             r"1 unknown as \['gate\.attention\.to_q\.weight'\]"),
            (without("vmtoken"), None), (without("mm_extractor"), r"none of \['beit3\.'\]; found .*, vmtoken"),
            (without("visual_model"), r"none of \['fusion\.', 'gate\.', 'sam\.vision_encoder\."),
            *((without(begin), r"none of \['" + re.escape(part)) for begin, part in (
                ("text_hidden_fcs", "token_mlp."),
                ("text_feat_linear", "text_projection."), ("text2one_linear", "text_weight."),
                ("visual_model.sam_mask_decoder.vlfusion_module", "gate."),
                ("visual_model.no_mem_embed", "sam.no_memory_embedding"),
                ("visual_model.sam_prompt_encoder.mask_downscaling", "sam.prompt_encoder.mask_embed."),
                ("visual_model.sam_prompt_encoder.point_embeddings", "sam.prompt_encoder.point_embeddings."))),
            (without("visual_model.sam_prompt_encoder.pe_layer"), r"none of \['sam\.prompt_encoder\.shared_embedding"),
            (lambda tensors: {"backbone.model.neck.x": torch.ones(1), "prompter.y": torch.ones(1)},
             r"2 unknown as .*found backbone\.model, prompter$")):
        their_file(path, SMALL_OFFICIAL, change=change)
        if wrong is None:                           # what is half there is found by the model that it does not fill
            with pytest.raises(RuntimeError, match="prompt_generator.attention"):
                RS2SAM2(SMALL_OFFICIAL).load_state_dict(rs2sam2.read_official(path))
            continue
        with pytest.raises(ValueError, match=f"^{message}: not the authors' RS2-SAM 2: .*{wrong}") as error:
            rs2sam2.read_official(path)
        assert "\n" not in str(error.value)


def test_the_row_official_all_is_the_code():
    row = rs2sam2.ABLATIONS["official"]["all"]
    assert row == {
        **dict.fromkeys(("official_fusion", "official_logits", "official_pixels", "official_unknown",
                         "official_precision", "official_dice", "hard_boundary"), True),
        "lambda_ce": 0.9, "black_boxes": 0.2, "lr": 5e-5, "lr_modules": 1e-4, "schedule": "constant"}
    fields = {field.name for field in dataclasses.fields(Config)}
    assert {name for name in fields if name.startswith("official")} <= set(row) <= fields | set(rs2sam2.RECIPE)


@torch.no_grad()
def test_official_unknown_words_are_padding_to_the_union_encoder_alone():
    images, tokens, text_mask, _ = example()
    tokens[0, 2] = 3                                # <unk>
    logits = {}
    for switch in (False, True):
        model = build(lively=True, official_unknown=switch)
        before = model(images, tokens, text_mask)["logits"]
        model.beit3.text_embed.weight[3] = torch.randn(16)
        moved = (model(images, tokens, text_mask)["logits"] - before).abs().amax((1, 2, 3))
        assert (moved[0] > 1e-3) == (not switch) and (moved[1:] == 0).all()
        unread = text_mask & (tokens != 3)
        logits[switch] = model(images, tokens, text_mask)["logits"], model(images, tokens, unread)["logits"]
    assert (logits[True][0] - logits[True][1]).abs().max() > 1e-3              # (2) and (4) read it all the same
    torch.testing.assert_close(logits[True][1], logits[False][1], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("switch", [False, True])
def test_official_precision_keeps_sam_in_float32_under_autocast(switch):
    model, kinds = build(lively=True, official_precision=switch), {}
    for name in ("beit3.encoder.layers.0.ffn.A.fc1", "sam.vision_encoder.backbone.blocks.0.attn.qkv", "fusion.0.down",
                 "gate.attention.to_q", "sam.mask_decoder.conv_s0", "prompt_generator.linear", "token_mlp.0"):
        model.get_submodule(name).register_forward_hook(lambda _, args, out, n=name: kinds.update({n: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(*example()[:3])["logits"]
    half = {name for name, kind in kinds.items() if kind == torch.bfloat16}
    assert half == (set(kinds) if not switch else {name for name in kinds if name.startswith((
        "beit3", "prompt_generator", "token_mlp"))})
    assert logits.dtype == (torch.float32 if switch else torch.bfloat16)


def test_official_losses_are_the_codes():
    model = build(official_dice=True, official_logits=True, hard_boundary=True)
    masks, generator = example()[3], torch.Generator().manual_seed(0)
    m = torch.randn(M, 1, 64, 64, generator=generator).requires_grad_()       # their one channel, at full size
    weight = torch.randn(M, generator=generator)
    losses = model.criterion({"logits": 2 * m - 1, "text_weight": weight}, {"masks": masks}, 0.0)
    pair = torch.cat((1 - m, m), 1).softmax(1)
    dice = 0.0
    for n in range(M):
        for p, y in zip(pair[n], (~masks[n], masks[n]), strict=True):         # background and foreground, summed
            dice += (1 - (2 * (p * y).sum() + 1e-6) / (p.sum() + y.sum() + 1e-6)) / M
    torch.testing.assert_close(losses["dice"], 0.1 * dice, rtol=1e-5, atol=0)
    for ours, theirs in zip(torch.autograd.grad(losses["dice"], m), torch.autograd.grad(0.1 * dice, m), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-9)
    for n in range(M):                                                        # (7) cuts m at 0, not the pair at 0.5
        ones, y = (m[n, 0] > 0).float(), masks[n].float()
        error = torch.zeros(64, 64)
        error[1:] += ones.diff(dim=0).abs() - y.diff(dim=0).abs()
        error[:, 1:] += ones.diff(dim=1).abs() - y.diff(dim=1).abs()
        term = boundary_loss(2 * m[n:n + 1] - 1, masks[n:n + 1, None], weight[n:n + 1], hard=True, cut=-1.0)
        torch.testing.assert_close(term[0], weight[n] ** 2 * error.square().mean())
    each = boundary_loss(2 * m - 1, masks[:, None], weight, hard=True, cut=-1.0)
    torch.testing.assert_close(losses["tbl"], 0.2 * each.mean())
    assert (boundary_loss(2 * m - 1, masks[:, None], weight, hard=True) - each).abs().min() > 1e-3
    plain = build(hard_boundary=True).criterion({"logits": m, "text_weight": weight}, {"masks": masks}, 0.0)
    torch.testing.assert_close(plain["tbl"], losses["tbl"])                   # our one logit m is cut at 0 as well


@pytest.mark.parametrize("sign", [-1, 1])
def test_official_dice_has_the_codes_epsilon(sign):
    """1e-6 decides where a class is neither drawn nor there: its p is e^-23 at each of 64 x 64 pixels."""
    outputs = {"logits": torch.full((1, 1, 64, 64), 23.0 * sign), "text_weight": torch.ones(1)}
    batch = {"masks": torch.full((1, 64, 64), sign > 0)}
    loss = build(official_dice=True).criterion(outputs, batch, 0.0)["dice"]
    assert loss.item() == pytest.approx(0.1 * (1 - 1e-6 / (math.exp(-23) * 64 ** 2 + 1e-6)), rel=1e-3)


def test_starts_are_those_of_the_notes():
    torch.manual_seed(0)
    beit3 = BEiT3(size=32, patch=4, width=64, layers=1, heads=2, ffn=96, positions=64, vocab_size=64)
    for table, std in ((beit3.encoder.embed_positions["A"], 0.02), (beit3.encoder.embed_positions["B"], 0.02),
                       (beit3.text_embed, 1.0)):
        assert table.weight.std().item() == pytest.approx(std, rel=0.1)
    assert not beit3.vision_embed.cls_token.any() and not beit3.vision_embed.mask_token.any()
    layer = BidirectionalHierarchicalFusion(64, 48)
    for linear_layer in (layer.down, layer.up, layer.text_in, layer.text_out, layer.side[0], layer.side[2]):
        for values in (linear_layer.weight, linear_layer.bias):               # PyTorch's: uniform, 1/sqrt(fan in)
            bound = linear_layer.in_features ** -0.5
            assert 0.8 * bound < values.abs().max() <= bound
    scratch = RS2SAM2(Config.tiny())
    for linear_layer in (scratch.token_mlp[0], scratch.gate.attention.to_q,
                         scratch.beit3.encoder.layers[0].ffn["A"].fc1,
                         scratch.sam.mask_decoder.transformer.layers[0].mlp.proj_in):
        bound = (6 / (linear_layer.in_features + linear_layer.out_features)) ** 0.5     # Xavier's
        assert 0.95 * bound < linear_layer.weight.abs().max() <= bound and not linear_layer.bias.any()
    embed = scratch.sam.prompt_encoder.mask_embed
    for convolution, times in ((embed.conv1, 8), (embed.conv2, 1), (embed.conv3, 8),
                               (scratch.sam.mask_decoder.upscale_conv1, 1), (scratch.beit3.vision_embed.proj, 1)):
        bound = times * convolution.weight[0].numel() ** -0.5
        assert 0.5 * bound < convolution.weight.abs().max() <= bound and convolution.bias.any()
    positions = scratch.beit3.encoder.embed_positions["A"].weight
    assert positions[:3].std() < 0.03                                         # two unused rows and [CLS]
    hiera = scratch.sam.vision_encoder.backbone.pos_embed[0]                  # (d,side,side)
    for table, side in ((positions[3:], 12), (hiera.flatten(1).mT, 3)):
        assert table.std().item() == pytest.approx(0.5)
        y, x = table.view(side, side, 2, -1).unbind(2)                        # sines of the row, then of the column
        torch.testing.assert_close(y, y[:, :1].expand_as(y), rtol=0, atol=1e-5)
        torch.testing.assert_close(x, y.transpose(0, 1), rtol=0, atol=1e-5)
        assert len(y[:, 0].unique(dim=0)) == side


def test_tiny_builds_small():
    model = RS2SAM2(Config.tiny())
    assert sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert Config.tiny().freeze is False and Config.tiny().pretrained == "none" and Config().freeze is True
