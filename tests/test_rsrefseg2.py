"""RSRefSeg 2: each equation against plain loops, the towers against transformers, and what the head promises."""

import contextlib
import dataclasses
import inspect
import math
import re
import runpy
import shutil
import time
import zlib
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from transformers import GemmaTokenizer, Sam2Model, SiglipModel, SiglipTextModel, SiglipVisionModel

import data
import evaluate
import losses
import metrics
import models
import train
from models import rsrefseg2
from models.rsrefseg2 import ABLATIONS, RECIPE, Config, LoRALinear, RSRefSeg2

N, M, L, G = 2, 3, 10, 4           # images, expressions, tokens, side of the small image's grid
D_V, D_T, C, S = 32, 24, 16, 64    # widths: image and sentence, words, SAM's prompts; side of the large image


SMALL = Config(                    # smaller than tiny, and no two widths equal that could be mistaken for each other
    image_size=S, pretrained="none", text_length=L, vocab_size=30, vision_size=G * 8, patch=8, vision_width=D_V,
    vision_layers=2, vision_heads=2, vision_mlp=48, text_width=D_T, text_layers=2, text_heads=2, text_mlp=40,
    sam_width=8, sam_heads=1, sam_blocks=(1, 1, 2, 1), sam_windows=(4, 4, 2, 2), sam_global=(3,), sam_background=2,
    prompt_width=C, decoder_heads=2, decoder_mlp=24, lora_text=2, lora_vision=3, lora_sam=4,
    attention_width=12, heads=2, mlp_width=20, n_t=3, n_p=4)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def build(config=None, seed=0):
    """A model in eval mode with every parameter drawn anew, so that no zero hides a term."""
    torch.manual_seed(seed)
    model = RSRefSeg2(config or small()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias") or "lora_A" in name or "no_memory" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
    return model


def inputs(config=None, lengths=(4, 7, 3), index=(0, 1, 1), seed=1):
    config = config or small()
    generator = torch.Generator().manual_seed(seed)
    side = config.image_size
    images = torch.randint(0, 256, (max(index) + 1, 3, side, side), generator=generator, dtype=torch.uint8)
    tokens = torch.zeros(len(lengths), config.text_length, dtype=torch.long)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = torch.randint(3, 30, (length,), generator=generator)
        row[length] = 2
    return images, tokens, tokens != 0, torch.tensor(index)


def batch_for(config=None, index=(0, 1, 1), seed=2):
    side = (config or small()).image_size
    masks = torch.zeros(len(index), side, side, dtype=torch.bool)
    for k, mask in enumerate(masks):
        mask[5 + 7 * k:23 + 9 * k, 3 + 5 * k:31] = True
    return {"masks": masks, "image_index": torch.tensor(index)}


@pytest.fixture(scope="module")
def model():
    return build()


def close(a, b, tolerance=2e-5):
    a, b = (torch.as_tensor(np.asarray(x.detach() if isinstance(x, torch.Tensor) else x)).double() for x in (a, b))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------ plain numpy versions of the layers, one item


def array(tensor):
    return tensor.detach().double().numpy()


def linear(layer, x):
    return x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))


def norm(layer, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + layer.eps) * array(layer.weight) + array(layer.bias)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def perceptron(layers, x):
    return linear(layers[2], gelu(linear(layers[0], x)))


def attention_layer(layer, x, context, position, context_position, mask=None):
    """One item by loops over heads, queries and keys."""
    queries, keys = x + position, context + context_position
    q, k, v = linear(layer.to_q, queries), linear(layer.to_k, keys), linear(layer.to_v, context)
    width = q.shape[-1] // layer.heads
    mixed = np.zeros_like(q)
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        for i in range(len(q)):
            weights = np.array([math.exp(q[i, part] @ k[j, part] / math.sqrt(width)) if mask is None or mask[j] else 0.0
                                for j in range(len(k))])
            mixed[i, part] = sum(w * v[j, part] for j, w in enumerate(weights / weights.sum()))
    return norm(layer.norm, x + linear(layer.to_out, mixed))


def self_layer(layer, x, position):
    return attention_layer(layer, x, x, position, position)


def mlp_layer(layer, x):
    return norm(layer.norm, x + perceptron(layer.mlp, x))


def cross_layer(layer, x, context, position, context_position, mask=None):
    return mlp_layer(layer.mlp, attention_layer(layer.attention, x, context, position, context_position, mask))


def upsampled(values, size):
    """(g,g,...) -> (size,size,...), bilinear between cell centres, by loops."""
    g = len(values)
    result = np.zeros((size, size, *values.shape[2:]))
    for y in range(size):
        for x in range(size):
            py, px = (max((k + 0.5) * g / size - 0.5, 0) for k in (y, x))
            y0, x0 = int(py), int(px)
            y1, x1 = min(y0 + 1, g - 1), min(x0 + 1, g - 1)
            b, d = py - y0, px - x0
            result[y, x] = ((1 - b) * (1 - d) * values[y0, x0] + (1 - b) * d * values[y0, x1]
                            + b * (1 - d) * values[y1, x0] + b * d * values[y1, x1])
    return result


# --------------------------------------------------------------------------------------------------------- equations


def test_eq01_the_sentence_reaches_sam_only_through_the_prompts(model):
    images, tokens, text_mask, index = inputs()
    outputs = model(images, tokens, text_mask, index)
    pixels = images.double().numpy() / 255
    with torch.no_grad():
        small_pixels = F.interpolate(torch.tensor(pixels).float(), (G * 8, G * 8), mode="bilinear", antialias=True)
        v = model.vision((small_pixels - 0.5) / 0.5).last_hidden_state
        read = model.text(tokens)
        words_only = torch.tensor([[k < n for k in range(L)] for n in (4, 7, 3)])
        prompts = model.prompter(v[index], read.last_hidden_state, words_only, read.pooler_output)
        normalised = [(pixels[:, k] - mean) / std for k, (mean, std) in enumerate(
            [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)])]
        masks = model.generate(torch.tensor(np.stack(normalised, 1)).float(), index, prompts["p_sparse"],
                               prompts["p_dense"])
    close(outputs["logits"], masks, 1e-4)
    close(outputs["p_dense"], prompts["p_dense"], 1e-4)


def test_eq02_lora_adds_a_b_transposed(model):
    layer = model.vision.encoder.layers[0].self_attn.q_proj
    assert layer.lora_A.shape == (D_V, 3) and layer.lora_B.shape == (D_V, 3)
    x = torch.randn(2, D_V)
    W, A, B = array(layer.weight), array(layer.lora_A), array(layer.lora_B)
    adapted = np.zeros_like(W)
    for i in range(D_V):
        for j in range(D_V):
            adapted[i, j] = W[i, j] + sum(A[i, r] * B[j, r] for r in range(3))
    close(layer(x), array(x) @ adapted.T + array(layer.bias))
    fresh = LoRALinear(torch.nn.Linear(5, 7), 2)
    assert not fresh.lora_A.any() and fresh.lora_B.any()


@pytest.mark.parametrize("changes", [{}, {"subspace_positions": False, "image_positions": "none"},
                                     {"interaction_blocks": 1, "prompt_blocks": 1}])
def test_eq03_first_subspace_then_second(changes):
    prompter = build(small(**changes)).prompter
    v, words, sentence = torch.randn(M, G * G, D_V), torch.randn(M, L, D_T), torch.randn(M, D_V)
    mask = torch.arange(L) < torch.tensor([[4], [7], [3]])
    P = prompter(v, words, mask, sentence)
    pe1, pe2 = [0.0, 0.0] if "subspace_positions" in changes else prompter.text_positions
    pe_v = 0.0 if "image_positions" in changes else prompter.image_position                     # Table IX: none
    t1, t2 = prompter.decompose(words, mask, [pe1, pe2])
    _, v1 = prompter.first(t1, v, pe1, pe_v)[-1]
    t2_prime, v2 = prompter.second(t2, v1, pe2, pe_v)[-1]
    p_sparse = prompter.sparse([(t2_prime, v2)] * prompter.config.prompt_blocks, pe2, pe_v)
    p_dense = prompter.dense(v2.transpose(1, 2).unflatten(2, (G, G)), sentence)
    for name, value in {"t1": t1, "t2": t2, "v2": v2, "p_sparse": p_sparse, "p_dense": p_dense}.items():
        close(P[name], value)
    assert P["t1"].shape == (M, 3, D_T) and P["v2"].shape == (M, G * G, D_V)
    assert P["p_sparse"].shape == (M, 4, C) and P["p_dense"].shape == (M, 1, S // 4, S // 4)


@pytest.mark.parametrize("start", ["textpool", "zero", "learnable"])
def test_eq04_decomposition(start):
    model = build(small(subspace_init=start))
    module = model.prompter.decompose
    words, n = torch.randn(1, L, D_T), 7
    mask = torch.arange(L)[None] < n
    pe1, pe2 = (array(pe) for pe in model.prompter.text_positions)
    W, read = array(words[0]), [k < n for k in range(L)]
    t1 = t2 = np.stack([W[0:3].mean(0), W[2:5].mean(0), W[4:7].mean(0)])     # three runs of seven words: 0-2, 2-4, 4-6
    if start != "textpool":                                                  # Table IX
        t1, t2 = array(module.queries)[:, 0] if start == "learnable" else np.zeros((2, 3, D_T))
    for k in range(2):
        t1, t2 = self_layer(module.intra[k][0], t1, pe1), self_layer(module.intra[k][1], t2, pe2)
        t1 = cross_layer(module.cross[k][0], t1, W, pe1, 0, read)
        t2 = cross_layer(module.cross[k][1], t2, W, pe2, 0, read)
        t1 = cross_layer(module.inter[k][0], t1, t2, pe1, pe2)
        t2 = cross_layer(module.inter[k][1], t2, t1, pe2, pe1)
    got = module(words, mask, list(model.prompter.text_positions))
    close(got[0][0], t1)
    close(got[1][0], t2)


@pytest.mark.parametrize("n, runs", [(1, [(0, 1)] * 3), (2, [(0, 1), (0, 2), (1, 2)]), (5, [(0, 2), (1, 4), (3, 5)])])
def test_eq04_runs_of_few_words(model, n, runs):
    words = torch.randn(1, L, D_T)
    pooled = model.prompter.decompose.pooled(words, torch.arange(L)[None] < n)
    close(pooled[0], torch.stack([words[0, a:b].mean(0) for a, b in runs]))
    adaptive = F.adaptive_avg_pool1d(words[0, :n].T, 3).T
    close(pooled[0], adaptive)


@pytest.mark.parametrize("order, changes", [
    ("first", {}), ("second", {}), ("second", {"self_attention": False}), ("first", {"cross_attention": False}),
    ("second", {"cross_attention": False})])
def test_eq05_interaction(order, changes):
    """Table XII: what is switched off leaves its block; without cross-attention t'_1 is not needed, v passes an MLP."""
    model = build(small(**changes))
    module, which = getattr(model.prompter, order), int(order == "second")
    pe_t, pe_v = model.prompter.text_positions[which], model.prompter.image_position
    t, v = torch.randn(1, 3, D_T), torch.randn(1, G * G, D_V)
    stages = module(t, v, pe_t, pe_v)
    t, v = array(t[0]), array(v[0])
    for k, stage in enumerate(stages):
        if not changes or changes == {"cross_attention": False} and order == "second":
            t = self_layer(module.intra[k], t, array(pe_t))
        v = mlp_layer(module.cross[k], v) if "cross_attention" in changes else cross_layer(
            module.cross[k], v, t, array(pe_v), array(pe_t))
        close(stage[0][0], t)
        close(stage[1][0], v)


@pytest.mark.parametrize("changes", [{}, {"prompt_init": "zero"}, {"prompt_positions": False}])
def test_eq06_sparse_prompts(changes):
    model = build(small(**changes))
    module, pe_t, pe_v = model.prompter.sparse, model.prompter.text_positions[1], model.prompter.image_position
    t, v = torch.randn(1, 3, D_T), torch.randn(1, G * G, D_V)
    got = module([(t, v)] * 2, pe_t, pe_v)
    p = np.zeros((4, C)) if "prompt_init" in changes else array(module.queries)                 # Table IX
    position = 0 if "prompt_positions" in changes else array(module.position)
    for k in range(2):
        p = self_layer(module.intra[k], p, position)
        p = cross_layer(module.cross_text[k], p, array(t[0]), position, array(pe_t))
        p = cross_layer(module.cross_image[k], p, array(v[0]), position, array(pe_v))
    close(got[0], perceptron(module.out, p))


def test_eq07_dense_prompt(model):
    module = model.prompter.dense
    v, text = torch.randn(1, D_V, G, G), torch.randn(1, D_V)
    conv, bn, _ = module.conv
    weight, padded = array(conv.weight), np.pad(array(v[0]), ((0, 0), (1, 1), (1, 1)))
    features = np.zeros((G, G, D_V))
    for y in range(G):
        for x in range(G):
            features[y, x] = np.einsum("oikl,ikl->o", weight, padded[:, y:y + 3, x:x + 3])
    features = (features - array(bn.running_mean)) / np.sqrt(array(bn.running_var) + bn.eps)
    features = np.maximum(features * array(bn.weight) + array(bn.bias), 0)
    F_dense = upsampled(features, S // 4)
    F_dense = F_dense / np.linalg.norm(F_dense, axis=-1, keepdims=True)
    t_sent = array(text[0]) / np.linalg.norm(array(text[0]))
    close(module(v, text)[0, 0], F_dense @ t_sent)
    assert module(v, text).abs().max() <= 1


def test_eq07_variants_of_table_xiii():
    """w/ T-soft, w/o V-soft and post-up: an MLP on the text, no convolution, the cosines upsampled."""
    v, text, module = torch.randn(2, 6, 3, 3), torch.randn(2, 5), rsrefseg2.DensePromptGeneration
    dense = module(6, 5, 8, conv="none", upsample="post", soft=4).eval()
    mapped = dense.match(dense.soft(text))
    assert dense.soft[0].weight.shape == (4, 5) and not torch.allclose(mapped, dense.match(text))
    cosines = F.cosine_similarity(v, mapped[:, :, None, None], dim=1)[:, None]
    for dense.align_corners in (False, True):
        close(dense(v, text), F.interpolate(cosines, (8, 8), mode="bilinear", align_corners=dense.align_corners))
    assert not torch.allclose(module(6, 5, 8, conv="none").eval()(v, text), dense(v, text), atol=1e-2)
    wired = build(small(dense_soft_text=True, dense_upsample="post", align_corners=True)).prompter.dense
    assert wired.soft[0].out_features == SMALL.mlp_width and (wired.upsample, wired.align_corners) == ("post", True)


@pytest.mark.parametrize("g, size", [(4, 16), (3, 32), (5, 8), (4, 4)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_eq07_cheap_norm_equals_upsampling_all_channels(g, size, align_corners):
    features, text = torch.randn(2, 6, g, g, requires_grad=True), torch.randn(2, 6)
    direct = F.interpolate(features, (size, size), mode="bilinear", align_corners=align_corners)
    direct = torch.einsum("mdyx,md->myx", F.normalize(direct, dim=1), F.normalize(text, dim=-1))[:, None]
    cheap = rsrefseg2.cosine_maps(features, text, size, align_corners)
    close(cheap, direct)
    weights = torch.randn_like(direct)
    ours, theirs = (torch.autograd.grad((maps * weights).sum(), features)[0] for maps in (cheap, direct))
    close(ours, theirs, 1e-4)


def test_eq07_lengths_below_a_millionth_count_as_one():
    """Our choice, so that a cell of zeros has no direction and no gradient that is not finite."""
    short = torch.full((1, 4, 2, 2), 1e-8)                      # of length 2e-8
    close(rsrefseg2.cosine_maps(short, torch.ones(1, 4), 3), torch.full((1, 1, 3, 3), 0.02))


def test_eq07_cells_of_zeros_stay_finite():
    features = torch.zeros(1, 4, 3, 3, requires_grad=True)
    maps = rsrefseg2.cosine_maps(features.relu(), torch.ones(1, 4), 8)
    maps.sum().backward()
    assert not maps.any() and torch.isfinite(features.grad).all()


def two_way(decoder, tokens, image, positions):
    """SAM's two-way transformer in the order of its paper, on one expression: tokens (T,C), image (P,C)."""
    def attention(layer, q, k, v):
        q, k, v = layer.q_proj(q), layer.k_proj(k), layer.v_proj(v)
        heads = [torch.softmax(a @ b.T / math.sqrt(a.shape[-1]), -1) @ c for a, b, c in zip(
            *(x.chunk(layer.num_attention_heads, -1) for x in (q, k, v)), strict=True)]
        return layer.o_proj(torch.cat(heads, -1))

    queries, keys = tokens, image
    for i, layer in enumerate(decoder.transformer.layers):
        if i == 0:
            queries = layer.layer_norm1(attention(layer.self_attn, queries, queries, queries))
        else:
            q = queries + tokens
            queries = layer.layer_norm1(queries + attention(layer.self_attn, q, q, queries))
        read = attention(layer.cross_attn_token_to_image, queries + tokens, keys + positions, keys)
        queries = layer.layer_norm2(queries + read)
        queries = layer.layer_norm3(queries + layer.mlp(queries))
        keys = layer.layer_norm4(keys + attention(layer.cross_attn_image_to_token, keys + positions, queries + tokens,
                                                  queries))
    last = attention(decoder.transformer.final_attn_token_to_image, queries + tokens, keys + positions, keys)
    return decoder.transformer.layer_norm_final_attn(queries + last), keys


@torch.no_grad()
def test_eq08_the_first_mask_of_the_tokens_in_the_papers_order(model):
    """T_filter, T_IoU, p_sparse concatenated as printed (and SAM 2.1's score token): the order makes no difference."""
    sam, decoder = model.sam, model.sam.mask_decoder
    I_2, index = torch.randn(N, 3, S, S), torch.tensor([0, 1, 1])
    p_sparse, p_dense = torch.randn(M, 4, C), torch.rand(M, 1, S // 4, S // 4) * 2 - 1
    logits = model.generate(I_2, index, p_sparse, p_dense)
    assert logits.shape == (M, 1, S // 4, S // 4)
    feature4, feature8, F_img = sam.vision_encoder(I_2).fpn_hidden_states
    positions = sam.get_image_wide_positional_embeddings()[0].flatten(1).T
    for m, n in enumerate(index):
        F_dense = sam.prompt_encoder.mask_embed(p_dense[m:m + 1])[0]
        image = F_img[n] + sam.no_memory_embedding.reshape(-1, 1, 1) + F_dense
        F_out = torch.cat((decoder.mask_tokens.weight, decoder.iou_token.weight, p_sparse[m],
                           decoder.obj_score_token.weight))
        tokens, image = two_way(decoder, F_out, image.flatten(1).T, positions)
        image = image.T.reshape(1, C, S // 16, S // 16)
        image = decoder.upscale_conv1(image) + decoder.conv_s1(feature8[n:n + 1])
        image = decoder.upscale_conv2(F.gelu(decoder.upscale_layer_norm(image))) + decoder.conv_s0(feature4[n:n + 1])
        filters = decoder.output_hypernetworks_mlps[0](tokens[0])
        close(logits[m, 0], torch.einsum("c,cyx->yx", filters, F.gelu(image[0])), 1e-4)


def test_eq08_without_a_dense_prompt_sam_takes_its_own(model):
    model = build(small(dense=False))
    seen = {}
    model.sam.mask_decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(*inputs())
    own = model.sam.prompt_encoder.no_mask_embed.weight[0]
    close(seen["dense_prompt_embeddings"][0], own[:, None, None].expand(-1, S // 16, S // 16))


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def test_eq09_terms_with_their_weights(model):
    torch.manual_seed(3)
    outputs, batch = model(*inputs()), batch_for()
    terms = model.criterion(outputs, batch, 0.5)
    assert list(terms) == ["ce", "dice", "ortho", "samp"]
    alphas = {"ce": 2.0, "dice": 3.0, "ortho": 5.0, "dense": 7.0, "spat": 11.0, "samp": 13.0}
    weighted, plain = (build(small(**{f"alpha_{name}": value(alpha) for name, alpha in alphas.items()})).criterion(
        outputs, batch, 0.5) for value in (float, lambda alpha: 1.0))
    assert weighted.keys() == alphas.keys()
    for name, alpha in alphas.items():
        close(weighted[name], alpha * plain[name])


def test_eq10_cross_entropy_and_dice(model):
    outputs, batch = model(*inputs()), batch_for()
    terms = model.criterion(outputs, batch, 0.5)
    ce, dice = [], []
    for logits, mask in zip(array(outputs["logits"]), batch["masks"].numpy(), strict=True):
        z = upsampled(logits[0], S)
        p, y = 1 / (1 + np.exp(-z)), mask.astype(float)
        ce.append(np.mean([softplus(a) - a * b for a, b in zip(z.ravel(), y.ravel(), strict=True)]))
        dice.append(1 - (2 * (p * y).sum() + 1e-3) / ((p ** 2).sum() + (y ** 2).sum() + 1e-3))
    close(terms["ce"], np.mean(ce))
    close(terms["dice"], np.mean(dice))
    faint = model.criterion(outputs | {"logits": torch.full_like(outputs["logits"], -8.0)},
                            batch | {"masks": torch.zeros_like(batch["masks"])}, 0.5)
    close(faint["dice"], 1 - 1e-3 / (S * S / (1 + math.exp(8)) ** 2 + 1e-3))        # epsilon is ours to see here


def test_eq11_squared_cosine_of_the_pooled_subspaces(model):
    outputs = model(*inputs())
    cosines = []
    for t1, t2 in zip(array(outputs["t1"]), array(outputs["t2"]), strict=True):
        a, b = t1.mean(0), t2.mean(0)
        cosines.append((a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2)
    close(model.criterion(outputs, batch_for(), 0.5)["ortho"], 0.5 * np.mean(cosines))


def unit(x):
    return x / np.linalg.norm(x)


def text_vectors(model, outputs, name):
    if name == "sent":
        return array(outputs["sentence"])
    return linear(model.match_t2, array(outputs["t2"]).mean(1))


def image_features(outputs, name, index):
    return array(outputs["v"])[index.numpy()] if name == "v" else array(outputs["v2"])


@pytest.mark.parametrize("image", ["v", "v2"])
@pytest.mark.parametrize("text", ["t2", "sent"])
def test_eq12_samples_are_contrasted_within_the_batch(text, image):
    model = build(small(nce_text=text, nce_image=image))
    outputs, batch = model(*inputs()), batch_for()
    side = S // G
    shares = batch["masks"].double().numpy().reshape(M, G, side, G, side).mean((2, 4))
    pooled = [unit(np.einsum("dyx,yx->d", v, share) / share.sum()) for v, share in zip(
        image_features(outputs, image, batch["image_index"]), shares, strict=True)]
    texts = [unit(t) for t in text_vectors(model, outputs, text)]
    s = np.array([[a @ b for b in texts] for a in pooled]) / 0.07
    losses = [(np.log(np.exp(s[i]).sum()) + np.log(np.exp(s[:, i]).sum())) / 2 - s[i, i] for i in range(M)]
    close(model.criterion(outputs, batch, 0.5)["samp"], 0.5 * np.mean(losses), 1e-4)


def test_eq12_the_temperature_is_bounded():
    model = build()
    outputs, batch = model(*inputs()), batch_for()
    values = []
    for scale in (100.0, 1e4):
        with torch.no_grad():
            model.scales["samp"].fill_(math.log(scale))
        values.append(model.criterion(outputs, batch, 0.5)["samp"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("text, image", [("sent", "v"), ("t2", "v2")])
@pytest.mark.parametrize("kind", ["CE", "MIL"])
def test_eq12_spatial_alignment(kind, text, image):
    model = build(small(alpha_spat=0.5, spat=kind, spat_text=text, spat_image=image))
    outputs, batch = model(*inputs()), batch_for()
    losses = []
    assert (set(model.scales), set(model.biases)) == ({"samp", "spat"}, {"spat"} if kind == "CE" else set())
    for v, t, mask in zip(image_features(outputs, image, batch["image_index"]), text_vectors(model, outputs, text),
                          batch["masks"].numpy(), strict=True):
        coarse = np.array([[unit(v[:, y, x]) @ unit(t) for x in range(G)] for y in range(G)]) / 0.07
        if kind == "CE":
            z = upsampled(coarse + model.biases["spat"].item(), S)
            losses.append(np.mean([softplus(a) - a * b for a, b in zip(z.ravel(), mask.ravel(), strict=True)]))
        else:
            side = S // G
            touched = mask.reshape(G, side, G, side).any((1, 3))
            losses.append(-math.log(np.exp(coarse)[touched].sum() / np.exp(coarse).sum()))
    close(model.criterion(outputs, batch, 0.5)["spat"], 0.5 * np.mean(losses), 1e-4)


@pytest.mark.parametrize("official", [False, True])
def test_eq12_dense_prompt(official):
    """Its cosines with scale and bias as a logit; the official code's p_dense has them already."""
    model = build(small(alpha_dense=0.5, dense_scale=official))
    outputs, batch = model(*inputs()), batch_for()
    losses = []
    assert (set(model.scales), set(model.biases)) == (({"samp"}, set()) if official else ({"samp", "dense"}, {"dense"}))
    for p_dense, mask in zip(array(outputs["p_dense"]), batch["masks"].numpy(), strict=True):
        z = upsampled(p_dense[0] if official else p_dense[0] / 0.07 + model.biases["dense"].item(), S)
        losses.append(np.mean([softplus(a) - a * b for a, b in zip(z.ravel(), mask.ravel(), strict=True)]))
    close(model.criterion(outputs, batch, 0.5)["dense"], 0.5 * np.mean(losses))


def test_eq13_giou_is_the_mean_and_ciou_the_ratio_of_sums():
    counts = [(10, 40), (30, 40), (90, 100)]
    lines = [{"id": str(k), "image": str(k), "expression": "", "instance": str(k), "category": None,
              "category_source": None, "intersection": a, "union": b, "iou": a / b} for k, (a, b) in enumerate(counts)]
    summary = metrics.summarize(lines, bootstrap=0)
    assert summary["mIoU"] == pytest.approx(100 * (0.25 + 0.75 + 0.9) / 3)
    assert summary["oIoU"] == pytest.approx(100 * 130 / 180)


# ------------------------------------------------------------------------------------------------------------- towers


@torch.no_grad()
def test_i1_of_another_size_than_the_towers_own_reads_interpolated_positions(model):
    images, tokens, text_mask, _ = inputs()
    assert model.two_sizes(images)[0].shape == (N, 3, G * 8, G * 8)
    v, _, _, _ = model.encode(torch.zeros(1, 3, 48, 48), tokens, text_mask)
    own = model.vision.embeddings.position_embedding.weight.T.reshape(1, D_V, G, G)
    position = F.interpolate(own, (6, 6), mode="bicubic")[0].flatten(1).T
    x = model.vision.embeddings.patch_embedding.bias + position                   # the image is zero
    for layer in model.vision.encoder.layers:
        x = layer(x[None] if x.ndim == 2 else x, None)
    close(v, model.vision.post_layernorm(x))
    assert build(small(clip_size=48))(*inputs())["v"].shape == (N, D_V, 6, 6)                   # Table XIV


def test_recomputing_changes_no_gradient():
    """With checkpointing each block of the three towers runs twice."""
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = build(small(checkpointing=checkpointing)).train()
        model.param_groups(RECIPE)
        runs.append(Counter())
        for name in ("vision.encoder.layers.1", "text.encoder.layers.1", "sam.vision_encoder.backbone.blocks.1"):
            model.get_submodule(f"{name}.layer_norm1").register_forward_pre_hook(
                lambda module, given, name=name, count=runs[-1]: count.update([name]))
        sum(model.criterion(model(*inputs()), batch_for(), 0).values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert [sorted(count.values()) for count in runs] == [[1, 1, 1], [2, 2, 2]]
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6)


def test_lora_on_every_attention_and_nothing_else(model):
    paths = {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    expected = {f"{tower}.encoder.layers.{i}.self_attn.{name}" for tower in ("vision", "text") for i in range(2)
                for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    expected |= {f"sam.vision_encoder.backbone.blocks.{i}.attn.{name}" for i in range(5) for name in ("qkv", "proj")}
    assert paths == expected


def count(module, learning=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning)


def test_parameters_at_paper_size():
    """Against the counts measured on the official prompter and on transformers' own towers."""
    with torch.device("meta"):
        model = RSRefSeg2(Config(pretrained="none"))
        official = RSRefSeg2(Config(pretrained="none", **OFFICIAL))
    lora = {tower: sum(p.numel() for name, p in getattr(model, tower).named_parameters() if "lora" in name)
            for tower in ("vision", "text", "sam")}
    assert lora == {"vision": 3_981_312, "text": 3_981_312, "sam": 2_610_432}
    siglip = count(model.vision) + count(model.text) - lora["vision"] - lora["text"]
    head = 15_238_352 + 2                   # SigLIP's image pooling, which III-B removes; its scale and bias
    assert siglip + head == 1_136_555_698
    assert count(model.sam.vision_encoder) - lora["sam"] == 212_703_280
    assert count(model.sam.mask_decoder) == 4_215_109
    assert count(official.prompter) == 82_773_312 + 2
    assert count(model.prompter.decompose) == 37_840_384
    model.param_groups(RECIPE)
    decoder = model.sam.mask_decoder
    silent = sum(map(count, (decoder.iou_prediction_head, decoder.pred_obj_score_head,
                             *decoder.output_hypernetworks_mlps[1:])))
    conv = 1152 * 1152 * 9 + 2 * 1152
    prompter = 82_773_312 - (576 * 1152 * 9 * 2 + 576 + 1152 + 2 * 576) + conv
    assert count(model.prompter) == prompter
    assert count(model, True) == sum(lora.values()) + prompter + 4_215_109 - silent + 1


def test_documented_shapes():
    model = build()
    shapes = {name: tuple(value.shape) for name, value in model(*inputs()).items()}
    q = S // 4
    assert shapes == {"logits": (M, 1, q, q), "p_dense": (M, 1, q, q), "dense_prompt": (M, 1, q, q),
                      "sentence": (M, D_V), "t1": (M, 3, D_T), "t2": (M, 3, D_T), "v": (N, D_V, G, G),
                      "v2": (M, D_V, G, G)}
    dense = model(*inputs())["dense_prompt"]
    assert not dense.amin((1, 2, 3)).any() and (dense.amax((1, 2, 3)) == 1).all() and not dense.requires_grad


# ---------------------------------------------------------------------------------------------------------- learning


def gradients(model, *terms):
    """{name: largest gradient} of what learns, from the given terms of the criterion."""
    model.zero_grad()
    values = model.criterion(model(*inputs()), batch_for(), 0)
    sum(values[term] for term in terms or values).backward()
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in model.named_parameters()}


PROMPTS = ("sam.", "prompter.first", "prompter.second", "prompter.sparse", "prompter.dense", "prompter.image_position")
SCALES = ("scales.", "biases.", "match_t2")


@pytest.mark.parametrize("term, unreached", [
    ("ce", SCALES), ("dice", SCALES), ("ortho", ("vision.", *PROMPTS, *SCALES)),
    ("samp", (*PROMPTS, "scales.spat", "scales.dense", "biases.")),
    ("dense", ("sam.", "prompter.sparse", "scales.samp", "scales.spat", "biases.spat", "match_t2")),
    ("spat", ("sam.", "prompter.", "scales.samp", "scales.dense", "biases.dense", "match_t2"))])
def test_each_term_reaches_what_it_should_and_nothing_frozen(term, unreached):
    model = build(small(alpha_ce=10.0, alpha_dice=10.0, alpha_dense=1.0, alpha_spat=1.0))
    got = gradients(model, term)
    for name, p in model.named_parameters():
        if not p.requires_grad or name.startswith(unreached):
            assert got[name] == 0, name
        elif not name.endswith(("to_k.bias", "k_proj.bias")):          # cancels in the softmax
            assert got[name] > 1e-6, (name, got[name])


def test_what_learns_is_lora_the_prompter_and_sams_decoder(model):
    for tower in (model.vision, model.text, model.sam.vision_encoder):
        assert all(p.requires_grad == ("lora" in name) for name, p in tower.named_parameters())
    assert not any(p.requires_grad for p in model.sam.prompt_encoder.parameters())
    assert not model.sam.no_memory_embedding.requires_grad
    every = build(small(alpha_dense=1.0, alpha_spat=1.0))
    for part in (model.prompter, every.scales, every.biases, every.match_t2):
        assert list(part.parameters()) and all(p.requires_grad for p in part.parameters())
    assert isinstance(build(small(nce_text="sent")).match_t2, torch.nn.Identity)        # t_2 is read by no loss
    silent = {name for name, p in model.sam.mask_decoder.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in silent} == {
        "iou_prediction_head", "pred_obj_score_head", "output_hypernetworks_mlps"}
    assert not any(name.startswith("output_hypernetworks_mlps.0") for name in silent)
    [group] = model.param_groups(RECIPE)
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0.05)


@pytest.mark.parametrize("frozen", ["vision", "text", "sam"])
def test_lora_of_rank_zero_freezes_a_tower(frozen):
    """It stays in eval mode, and no graph is made of it."""
    model, seen = build(small(**{f"lora_{frozen}": 0})), {}
    model.sam.mask_decoder.conv_s0.register_forward_pre_hook(lambda module, given: seen.update(feature=given[0]))
    outputs = model.train()(*inputs())
    needs = {"vision": outputs["v"], "text": outputs["sentence"], "sam": seen["feature"]}
    towers = {"vision": model.vision, "text": model.text, "sam": model.sam.vision_encoder}
    assert {name: value.requires_grad for name, value in needs.items()} == {name: name != frozen for name in needs}
    assert {name: tower.training for name, tower in towers.items()} == {name: name != frozen for name in towers}
    assert model.prompter.training and model.sam.mask_decoder.training and not model.sam.prompt_encoder.training
    assert not any(module.training for module in model.eval().modules())
    assert build(small(train_prompt_encoder=True)).train().sam.prompt_encoder.training


def test_prompt_encoder_may_learn():
    model = build(small(train_prompt_encoder=True))
    model.param_groups(RECIPE)
    got = gradients(model)
    assert all(p.requires_grad for part in (model.prompter, model.scales) for p in part.parameters())
    reached = [name for name in got if name.startswith("sam.prompt_encoder") and got[name] > 0]
    for dense in (True, False):                 # SAM's own embedding is read where no dense prompt is
        prompts = build(small(train_prompt_encoder=True, dense=dense)).sam.prompt_encoder
        assert (prompts.mask_embed.conv1.weight.requires_grad, prompts.no_mask_embed.weight.requires_grad) == (
            dense, not dense)
    assert reached and all("mask_embed" in name for name in reached) and got["sam.no_memory_embedding"] > 0


PAPER = {       # field: value, with the section that has it; IV-C1, IV-C2 and the footnotes of IV-C where not said
    "clip": "google/siglip2-so400m-patch16-512", "sam": "facebook/sam2.1-hiera-large", "image_size": 1024,
    "vision_size": 512, "lora_text": 16, "lora_vision": 16, "lora_sam": 16, "n_t": 3, "n_p": 9,
    "decomposition_blocks": 2, "interaction_blocks": 2, "prompt_blocks": 2, "freeze": True,
    "train_prompt_encoder": False,
    "subspace_init": "textpool", "subspace_positions": True, "prompt_init": "learnable", "prompt_positions": True,
    "image_positions": "learnable", "cascade": True, "dense": True, "intra_attention": True, "inter_attention": True,
    "self_attention": True, "cross_attention": True,                                            # IV-E4 to IV-E7
    "dense_text": "sent", "dense_soft_text": False, "dense_image": "v2", "dense_upsample": "pre",     # IV-E8
    "dense_conv": "relu",                                                                       # III-C
    "alpha_ce": 1.0,                                                                            # III-E, Eq. (10)
    "alpha_dice": 1.0, "alpha_ortho": 0.5, "alpha_samp": 0.5, "alpha_dense": 0.0, "alpha_spat": 0.0,
    "nce_text": "t2", "nce_image": "v",                                                         # Table XV's best row
    "spat": "CE", "spat_text": "sent", "spat_image": "v"}                                       # III-E, Eq. (12)
OURS = {        # the paper is silent; the reasons stand in the Notes of the file
    "attention_width": 512, "heads": 8, "mlp_width": 512, "text_length": 64, "lower_case": True, "antialias": True,
    "pad_to_longest": False, "dynamic_multimask": False, "interleave": False, "dense_scale": False,
    "dense_pool": "mean", "align_corners": False, "enlarge_twice": False, "official_losses": False,
    "clip_size": None, "pretrained": "hub",
    "checkpointing": False}
TOWERS = {      # as published: SigLIP 2 so400m patch 16 at 512, SAM 2.1 large
    "vocab_size": 256000, "patch": 16, "vision_width": 1152, "vision_layers": 27, "vision_heads": 16,
    "vision_mlp": 4304, "text_width": 1152, "text_layers": 27, "text_heads": 16, "text_mlp": 4304,
    "sam_width": 144, "sam_heads": 2,
    "sam_blocks": (2, 6, 36, 4), "sam_windows": (8, 4, 16, 8), "sam_global": (23, 33, 43), "sam_background": 7,
    "prompt_width": 256, "decoder_heads": 8, "decoder_mlp": 2048}


def test_every_setting_is_the_papers_or_ours():
    assert dataclasses.asdict(Config()) == PAPER | OURS | TOWERS
    assert RECIPE == {
        "epochs": 300, "batch_size": 64, "lr": 1e-4, "schedule": "cosine", "precision": "bf16",         # IV-C2
        "weight_decay": 0.05, "warmup": 5.0, "clip": 3.0, "micro_batch": 8, "protocol": "original",     # official code
        "plateau": 0.0, "t_max": 0.0, "floor": 0.0, "per_image": 0, "empty": "zero", "select": "mIoU", "phases": None}
    assert rsrefseg2.RECIPE_FOR == {} and rsrefseg2.MAPS == ("dense_prompt",)                         # Fig. 7
    assert rsrefseg2.RETIRED == {"dense_kernel": 3}             # III-C's; IV-E8 calls it 1x1


def test_the_schedule_of_the_paper_and_of_the_official_code():
    """IV-C2: linear warm-up, cosine. There: constant to epoch 30, T_max 1.3 times 300 epochs, never below 0.01."""
    per_epoch = 10
    paper = [train.factor(RECIPE, step, 300 * per_epoch) for step in range(300 * per_epoch)]
    assert paper[24] == pytest.approx(0.5) and paper[49] == pytest.approx(1) == pytest.approx(paper[50])
    assert paper[50 + 2950 // 2] == pytest.approx(0.5) and paper[-1] < 1e-5 and paper[50:] == sorted(paper[50:])[::-1]
    official = RECIPE | {field: value for field, value in ABLATIONS["official"]["all"].items() if field in RECIPE}
    theirs = [train.factor(official, step, 300 * per_epoch) for step in range(300 * per_epoch)]
    assert theirs[49:301] == pytest.approx([1.0] * 252)
    assert theirs[1300] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * 100 / 390)) / 2)
    assert theirs[2990] == pytest.approx(0.23, abs=0.005)       # of the rate is left in the last epoch
    twice = [train.factor(official | {"t_max": 2.0}, step, 300 * per_epoch) for step in (299, 2990)]
    assert twice == pytest.approx([1.0, 0.58], abs=0.006)


BASE = {"clip": "google/siglip2-so400m-patch14-384", "sam": "facebook/sam2.1-hiera-small", "lora_sam": 32,
        "alpha_dice": 0.0}                                      # IV-E, IV-E1, IV-E9; Table XV's last row adds Dice
ORTHO = {"alpha_ortho": 0.5, "alpha_dense": 0.0, "alpha_samp": 0.0}


def clip(name):
    family, *giant, patch, size = name.split("-")
    return f"google/{family}-{'giant-opt' if giant else 'so400m'}-patch{patch[1:]}-{size}"


def ticks(*rows):
    """Three rows as Tables X, XI and XII print them: neither of two parts, the first, both."""
    return zip(rows, ((False, False), (True, False), (True, True)), strict=True)


ROWS = {
    "VI": {f"{part}-{rank}": {field: rank} for part, field in (
        ("clip-t", "lora_text"), ("clip-v", "lora_vision"), ("sam-v", "lora_sam")) for rank in (0, 4, 8, 16, 32, 64)},
    "VII": {f"{part}-{count}": {field: count} for part, field in (
        ("decomp", "decomposition_blocks"), ("interac", "interaction_blocks"), ("prompt", "prompt_blocks"))
        for count in (1, 2, 4, 6)},
    "VIII": {f"decomp-{n}": {"n_t": n} for n in (1, 3, 6, 9)} | {f"prompt-{n}": {"n_p": n} for n in (1, 3, 6, 9, 12)},
    "IX": {
        "decomp-learnable": {"subspace_positions": False, "subspace_init": "learnable"},
        "decomp-textpool": {"subspace_positions": False, "subspace_init": "textpool"},
        "decomp-PE-zero": {"subspace_positions": True, "subspace_init": "zero"},
        "decomp-PE-learnable": {"subspace_positions": True, "subspace_init": "learnable"},
        "decomp-PE-textpool": {"subspace_positions": True, "subspace_init": "textpool"},
        "interac-none": {"image_positions": "none"}, "interac-sine": {"image_positions": "sine"},
        "interac-learnable": {"image_positions": "learnable"},
        "prompt-learnable": {"prompt_positions": False, "prompt_init": "learnable"},
        "prompt-PE-zero": {"prompt_positions": True, "prompt_init": "zero"},
        "prompt-PE-learnable": {"prompt_positions": True, "prompt_init": "learnable"}},
    "X": {row: {"cascade": cascaded, "dense": dense, "alpha_dense": 0.0} | ({} if cascaded else {"alpha_ortho": 0.0})
          for row, (cascaded, dense) in ticks("single-stage", "cascaded", "cascaded+dense")},
    "XI": {row: {"intra_attention": intra, "inter_attention": inter}
           for row, (intra, inter) in ticks("none", "intra", "intra+inter")},
    "XII": {row: {"self_attention": own, "cross_attention": cross}
            for row, (own, cross) in ticks("none", "self", "self+cross")},
    "XIII": {row: dict(zip(("dense_text", "dense_soft_text", "dense_image", "dense_conv", "dense_upsample"), has,
                           strict=True)) for row, has in {
        "T-t2": ("t2", False, "v2", "relu", "pre"), "T-t2'": ("t2_prime", False, "v2", "relu", "pre"),
        "T-sparse": ("sparse", False, "v2", "relu", "pre"), "T-sent": ("sent", False, "v2", "relu", "pre"),
        "T-soft": ("sent", True, "v2", "relu", "pre"), "no-T-soft": ("sent", False, "v2", "relu", "pre"),
        "V-v": ("sent", False, "v", "relu", "pre"), "V-v2'": ("sent", False, "v2", "relu", "pre"),
        "no-V-soft": ("sent", False, "v2", "none", "pre"), "V-soft": ("sent", False, "v2", "relu", "pre"),
        "post-up": ("sent", False, "v2", "relu", "post"), "pre-up": ("sent", False, "v2", "relu", "pre")}.items()},
    "XIV": {"224": {"clip_size": 224}, "384": {}, "448": {"clip_size": 448}, "768": {"clip_size": 768}},
    "XV": {"ce": ORTHO | {"alpha_ortho": 0.0}, "ortho": ORTHO, "dense": ORTHO | {"alpha_dense": 0.5},
           **{f"{kind}-{text}-{image}": ORTHO | {
              "alpha_spat": 0.5, "spat": kind, "spat_text": text, "spat_image": image}
              for kind in ("CE", "MIL") for text in ("sent", "t2") for image in ("v", "v2")},
           **{f"NCE-{text}-{image}": ORTHO | {"alpha_samp": 0.5, "nce_text": text, "nce_image": image}
              for text in ("sent", "t2") for image in ("v", "v2")},
           "NCE-t2-v+dice": ORTHO | {"alpha_samp": 0.5, "alpha_dice": 1.0}},
    "XVI": {f"{name}+{size[0]}{again}": {
        "clip": clip(name), "sam": f"facebook/sam2.1-hiera-{size}", "lora_sam": rank, "alpha_dice": 1.0}
        for name, size, rank, again in (
            ("siglip-p14-384", "small", 32, ""), ("siglip2-p14-224", "small", 32, ""),
            ("siglip2-p14-224", "small", 32, "+again"), ("siglip2-p14-384", "small", 32, ""),
            ("siglip2-p16-384", "small", 32, ""), ("siglip2-p16-512", "small", 32, ""),
            ("siglip2-giant-p16-256", "small", 32, ""), ("siglip2-giant-p16-384", "small", 32, ""),
            ("siglip2-p16-512", "tiny", 32, ""), ("siglip2-p16-512", "small", 32, "+again"),
            ("siglip2-p16-512", "base-plus", 32, ""), ("siglip2-p16-512", "large", 16, ""))},
}
THEIRS = {      # the authors' code, as the Notes tell it
    "interleave": True, "dense_conv": "official", "dense_scale": True, "align_corners": True, "antialias": False,
    "lower_case": False, "pad_to_longest": True, "dynamic_multimask": True, "enlarge_twice": True,
    "official_losses": True, "train_prompt_encoder": True, "alpha_ce": 5.0, "alpha_dice": 5.0,
    "plateau": 30.0, "t_max": 1.3, "floor": 0.01}


def test_rows_are_those_printed():
    """Tables VI to XVI; the rows marked with a dagger are one and the same setting, two of XVI are printed twice."""
    settings = RECIPE | Config().__dict__
    for table, rows in ROWS.items():
        assert set(ABLATIONS[table]) == set(rows)
        for row, changes in rows.items():
            assert settings | ABLATIONS[table][row] == settings | BASE | changes, (table, row)
    official = ABLATIONS["official"]
    assert settings | official["all"] == settings | THEIRS
    refsegrs = {"epochs": 600, "lr": 2e-4, "plateau": 60.0, "t_max": 2.0}
    assert settings | official["refsegrs"] == settings | THEIRS | refsegrs
    theirs = {"IX-interac-sine": {"image_positions": "fourier"}, "XIII-T-t2": {"dense_pool": "learned"},
              "XIII-T-t2'": {"dense_pool": "learned"},
              "X-single-stage": {"decomposition_blocks": 0, "subspace_positions": False}}
    same = ("ce", "ortho", "NCE-sent-v", "NCE-sent-v2", "NCE-t2-v+dice")    # or not in their code, t_sent of L_samp
    theirs |= {f"XV-{row}": {} for row in ROWS["XV"] if row not in same}
    assert set(official) == {"all", "refsegrs", *theirs}
    for name, changes in theirs.items():
        table, _, row = name.partition("-")
        own = {field: value for field, value in ROWS[table][row].items() if value != settings[field]}
        assert settings | official[name] == settings | THEIRS | BASE | own | changes, name
    configs = [dataclasses.replace(Config(), **changes) for table in ROWS for changes in ABLATIONS[table].values()]
    assert (len(configs), len(set(configs))) == (103, 80)
    assert dataclasses.replace(Config(), **ABLATIONS["XVI"]["siglip2-p16-512+l"]) == Config()


def test_figures_are_those_of_the_papers_tables():
    """Rows, and cIoU and gIoU of each table, every figure times its row's place in the table, added up."""
    printed = {"VI": (18, 13401.67, 11024.23), "VII": (12, 6120.29, 5079.15), "VIII": (9, 3531.90, 2926.79),
               "IX": (11, 5174.39, 4311.56), "X": (3, 467.00, 386.35), "XI": (3, 469.15, 391.83),
               "XII": (3, 468.33, 391.50), "XIII": (12, 6085.63, 5099.94), "XIV": (4, 785.11, 660.73),
               "XV": (16, 10611.40, 8769.86), "XVI": (12, 6111.84, 5261.80)}
    sums = {}
    for table, rows in rsrefseg2.FIGURES.items():
        pairs = [re.fullmatch(r"oIoU (\d+\.\d\d), mIoU (\d+\.\d\d)", shown).groups() for shown in rows.values()]
        sums[table] = len(pairs), *(round(sum(place * float(one) for place, one in enumerate(column, 1)), 2)
                                    for column in zip(*pairs, strict=True))
        assert list(rows) == list(ABLATIONS[table])
    assert sums == printed


def prompts_of(**changes):
    """A prompter, its inputs as leaves of the graph, and what it makes of them."""
    model = build(small(**changes))
    random = torch.Generator().manual_seed(4)
    leaves = {name: torch.randn(M, *size, generator=random).requires_grad_() for name, size in {
        "v": (G * G, D_V), "words": (L, D_T), "sentence": (D_V,)}.items()}
    prompts = model.prompter(leaves["v"], leaves["words"], torch.ones(M, L, dtype=torch.bool), leaves["sentence"])
    return model.prompter, leaves, prompts


def reaches(output, leaf):
    gradient, = torch.autograd.grad(output.pow(2).sum(), leaf, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.abs().max() > 1e-6)


@pytest.mark.parametrize("changes, output, seen, unseen", [
    ({}, "t1", ("words", "text_positions.0", "text_positions.1"), ("v", "sentence", "image_position")),
    ({}, "v2", ("v", "words", "image_position", "text_positions.0", "text_positions.1"), ("sentence",)),
    ({}, "p_sparse", ("v", "words", "sparse.queries", "sparse.position"), ("sentence",)),
    ({}, "p_dense", ("v", "words", "sentence"), ("sparse.queries",)),                           # Table XIII: T-sent
    ({"subspace_positions": False, "subspace_init": "learnable"}, "t1", ("words", "decompose.queries"), ()),    # IX
    ({"prompt_init": "zero"}, "p_sparse", ("sparse.position",), ()),
    ({"prompt_positions": False}, "p_sparse", ("sparse.queries",), ()),
    ({"inter_attention": False}, "t1", ("words", "text_positions.0"), ("text_positions.1",)),   # XI
    ({"inter_attention": False}, "t2", ("words", "text_positions.1"), ("text_positions.0",)),
    ({"cross_attention": False}, "v2", ("v",), ("words", "text_positions.0")),                  # XII
    ({"cross_attention": False}, "p_sparse", ("v", "words"), ()),
    ({"dense_text": "t2"}, "p_dense", ("words", "v"), ("sentence", "sparse.queries")),          # XIII
    ({"dense_text": "t2_prime"}, "p_dense", ("words", "v"), ("sentence", "sparse.queries")),
    ({"dense_text": "sparse"}, "p_dense", ("words", "v", "sparse.queries"), ("sentence",)),
    ({"dense_image": "v"}, "p_dense", ("v", "sentence"), ("words",)),
    ({"cascade": False, "alpha_ortho": 0.0}, "v2", ("v", "words", "text_positions.0"), ("sentence",))])         # X
def test_each_prompt_sees_what_the_papers_variant_gives_it(changes, output, seen, unseen):
    prompter, leaves, prompts = prompts_of(**changes)
    leaves |= dict(prompter.named_parameters())
    assert [name for name in seen if not reaches(prompts[output], leaves[name])] == []
    assert [name for name in unseen if reaches(prompts[output], leaves[name])] == []


@pytest.mark.parametrize("changes, parts", [
    ({}, {"first.intra": 2, "first.cross": 2, "second.intra": 2, "second.cross": 2, "sparse.intra": 2}),
    ({"decomposition_blocks": 4, "interaction_blocks": 1, "prompt_blocks": 3},
     {"decompose.intra": 4, "decompose.cross": 4, "decompose.inter": 4, "first.cross": 1, "second.cross": 1,
      "sparse.cross_text": 3, "sparse.cross_image": 3, "sparse.intra": 3}),
    ({"intra_attention": False, "inter_attention": False}, {"decompose.intra.0": 0, "decompose.inter.0": 0}),
    ({"inter_attention": False}, {"decompose.intra.0": 2, "decompose.cross.0": 2, "decompose.inter.0": 0}),
    ({"self_attention": False, "cross_attention": False}, {"first.intra": 0, "second.intra": 0, "second.cross": 2}),
    ({"self_attention": False}, {"first.intra": 0, "second.intra": 0, "first.cross": 2, "second.cross": 2}),
    ({"cross_attention": False}, {"first.intra": 0, "second.intra": 2}),       # t'_1 leads nowhere without it
    ({"cascade": False, "alpha_ortho": 0.0}, {"decompose.intra.0": 1, "decompose.inter.0": 0, "second.cross": 2})])
def test_each_variant_has_the_layers_that_the_paper_gives_it(changes, parts):
    prompter = build(small(**changes)).prompter
    assert {path: len(prompter.get_submodule(path)) for path in parts} == parts
    assert hasattr(prompter, "first") == changes.get("cascade", True)
    assert len(prompter.text_positions) == (2 if changes.get("cascade", True) else 1)


@pytest.mark.parametrize("source", ["t2", "t2_prime", "sparse"])
def test_the_text_of_the_dense_prompt(source):
    """Table XIII: t_2 or t'_2 "pooled", ours the mean; T-sparse a "dedicated additional token", of n_p + 1 queries."""
    for dense, count in ((True, 5 if source == "sparse" else 4), (False, 4)):
        assert len(build(small(dense_text=source, dense=dense)).prompter.sparse.queries) == count
    prompter, _, _ = prompts_of(dense_text=source)
    seen = {}
    prompter.second.register_forward_hook(lambda module, given, out: seen.update(t2=given[0], t2_prime=out[-1][0]))
    prompter.sparse.register_forward_hook(lambda module, given, out: seen.update(sparse=out))
    prompter.dense.register_forward_hook(lambda module, given, out: seen.update(text=given[1]))
    prompts = prompter(torch.randn(M, G * G, D_V), torch.randn(M, L, D_T), torch.ones(M, L).bool(), torch.randn(M, D_V))
    close(seen["text"], seen["sparse"][:, 4] if source == "sparse" else sum(seen[source][:, k] for k in range(3)) / 3)
    assert torch.equal(prompts["p_sparse"], seen["sparse"][:, :4])


def test_defaults_of_the_modules_are_those_of_the_config():
    """A module that is copied out is the paper's without a further word; positions are then none."""
    c = Config()
    sizes = {"inner": c.attention_width, "heads": c.heads, "hidden": c.mlp_width}
    for module, expected in {
            rsrefseg2.AttentionLayer: {"inner": sizes["inner"], "heads": sizes["heads"]},
            rsrefseg2.MlpLayer: {"hidden": sizes["hidden"]}, rsrefseg2.CrossLayer: sizes,
            rsrefseg2.ReferringSemanticDecomposition: sizes | {
                "n_t": c.n_t, "blocks": c.decomposition_blocks, "subspaces": 2, "start": c.subspace_init,
                "intra": c.intra_attention, "inter": c.inter_attention},
            rsrefseg2.TextVisualInteraction: sizes | {
                "blocks": c.interaction_blocks, "self_attention": c.self_attention,
                "cross_attention": c.cross_attention},
            rsrefseg2.SparsePromptGeneration: sizes | {
                "count": c.n_p, "blocks": c.prompt_blocks, "start": c.prompt_init, "positions": c.prompt_positions},
            rsrefseg2.DensePromptGeneration: {
                "conv": c.dense_conv, "upsample": c.dense_upsample, "align_corners": c.align_corners, "soft": 0,
                "scale": c.dense_scale},
            rsrefseg2.ReferringSemanticDecomposition.forward: {"pe": (0.0, 0.0)},
            rsrefseg2.TextVisualInteraction.forward: {"pe_t": 0.0, "pe_v": 0.0},
            rsrefseg2.SparsePromptGeneration.forward: {"pe_t": 0.0, "pe_v": 0.0}}.items():
        options = inspect.signature(module).parameters.values()
        assert {one.name: one.default for one in options if one.default is not one.empty} == expected, module


def test_the_towers_have_the_published_sizes():
    """Of SigLIP 2 so400m patch 16 at 512 and SAM 2.1 large, as their configurations on the hub have them."""
    clip, sam = rsrefseg2.tower_configs(Config(pretrained="none"))
    for part, layers in ((clip.vision_config, 27), (clip.text_config, 27)):
        assert (part.hidden_size, part.intermediate_size, part.num_hidden_layers, part.num_attention_heads) == (
            1152, 4304, layers, 16)
    assert (clip.vision_config.image_size, clip.vision_config.patch_size) == (512, 16)
    text = clip.text_config
    assert (text.vocab_size, text.max_position_embeddings, text.projection_size) == (256000, 64, 1152)
    backbone, neck, decoder = sam.vision_config.backbone_config, sam.vision_config, sam.mask_decoder_config
    assert [list(value) for value in (
        backbone.embed_dim_per_stage, backbone.num_attention_heads_per_stage, backbone.blocks_per_stage,
        backbone.window_size_per_stage, backbone.global_attention_blocks, neck.backbone_channel_list)] == [
        [144, 288, 576, 1152], [2, 4, 8, 16], [2, 6, 36, 4], [8, 4, 16, 8], [23, 33, 43], [1152, 576, 288, 144]]
    assert backbone.hidden_size == 144 and list(backbone.window_positional_embedding_background_size) == [7, 7]
    assert (neck.fpn_hidden_size, sam.prompt_encoder_config.hidden_size, sam.prompt_encoder_config.image_size) == (
        256, 256, 1024)
    assert (decoder.hidden_size, decoder.num_attention_heads, decoder.mlp_dim, decoder.iou_head_hidden_dim) == (
        256, 8, 2048, 256)
    assert rsrefseg2.tower_configs(small())[0].text_config.max_position_embeddings == L


@pytest.mark.parametrize("changes, message", [
    ({"interleave": True, "prompt_blocks": 1}, "must be equal"), ({"cascade": False}, "set alpha_ortho=0"),
    ({"dense_text": "t3"}, "expected sent or t2"), ({"dense": False, "alpha_dense": 1.0}, "set alpha_dense=0"),
    ({"image_size": 100}, "multiples of 32"),
    *[({"cascade": False, "alpha_ortho": 0.0, "decomposition_blocks": 0, "subspace_positions": False,
        "pad_to_longest": True} | wrong, "in place of subspaces")
      for wrong in ({"cascade": True}, {"subspace_positions": True}, {"pad_to_longest": False})]])
def test_contradicting_switches_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_interleaved_prompts_read_each_block_of_the_interaction():
    paper, official = build(), build(small(interleave=True))
    assert paper.state_dict().keys() == official.state_dict().keys()
    seen = []
    official.prompter.sparse.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    a, b = paper(*inputs()), official(*inputs())
    assert torch.equal(a["t2"], b["t2"]) and not torch.allclose(a["logits"], b["logits"])
    assert not torch.equal(seen[0][0][1], seen[0][1][1])


def test_official_scale_and_bias():
    plain, scaled = build(), build(small(dense_scale=True))
    scaled.load_state_dict(plain.state_dict(), strict=False)
    a, b = (model(*inputs())["p_dense"] for model in (plain, scaled))
    dense = scaled.prompter.dense
    close(b, a * dense.logit_scale.exp() + dense.logit_bias, 1e-4)


def test_weights_under_the_names_of_before_load():
    """The layers that read words, t'_2 and v'_2 were called words, text and image."""
    model, other = build(), build(seed=1)
    tensors = model.state_dict()
    for new, name in (("decompose.cross", "decompose.words"), ("sparse.cross_text", "sparse.text"),
                      ("sparse.cross_image", "sparse.image")):
        tensors = {key.replace(f"prompter.{new}.", f"prompter.{name}."): value for key, value in tensors.items()}
    assert sum(key.startswith("prompter.decompose.words.") for key in tensors) == 2 * 2 * 16
    models.load_own_state(other, tensors, {}, "a run of before")
    assert torch.equal(other(*inputs())["logits"], model(*inputs())["logits"])


def test_official_scores_are_taken_by_way_of_the_square():
    images, tokens, text_mask, index = inputs()
    batch = {"images": images, "tokens": tokens, "text_mask": text_mask, "image_index": index}
    for twice in (False, True):
        model = build(small(enlarge_twice=twice))
        with torch.no_grad():
            logits, expected = (evaluate.forward(model, batch, torch.device("cpu"), "fp32")[0]["logits"],
                                model(*inputs())["logits"])
        if twice:
            expected = F.interpolate(expected, (S, S), mode="bilinear", align_corners=False)
        assert torch.equal(logits, expected)


def test_dynamic_multimask_is_off_unless_asked_for():
    assert not build().sam.mask_decoder.dynamic_multimask_via_stability
    assert build(small(dynamic_multimask=True)).sam.mask_decoder.dynamic_multimask_via_stability


# ---------------------------------------------------------------------------------- gradients by finite differences


@pytest.fixture
def double(monkeypatch):
    """Everything that asks for float32 gets float64, in which differences are exact to ten digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(6)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(*size):
    return torch.randn(size).requires_grad_()


POSITIVE = torch.tensor([[True, True, False, False], [True] * 4])
MASKS = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
MASKS[0, :, 1:4, 2:7], MASKS[1, :, 5:, :3] = True, True


def tensors_of(value):
    """The tensors in what a module or a loss gives, in order."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(one for part in (value.values() if isinstance(value, dict) else value) for one in tensors_of(part))


def gradients_are_right(module, given, arrange=lambda *given: given, parts=("",)):
    """Gradients of what comes out, each number times one drawn at random, against small steps along random directions.

    By its parameters in `parts` and by all that is given; arrange: from that to the module's arguments.
    """
    own = {name: p for name, p in module.named_parameters() if name.startswith(parts)}
    start = [*((p + 0.3 * torch.randn_like(p)).detach().requires_grad_() for p in own.values()), *given]

    def output(*tensors):
        moved = dict(zip(own, tensors[:len(own)], strict=True))
        found = torch.func.functional_call(module, moved, arrange(*tensors[len(own):]))
        random = torch.Generator().manual_seed(9)
        return sum((one * torch.randn(one.shape, generator=random)).sum() for one in tensors_of(found))

    gradients = torch.autograd.grad(output(*start), start, materialize_grads=True, allow_unused=True)
    for _ in range(3):
        directions = [torch.randn_like(one) for one in start]
        with torch.no_grad():
            ahead, behind = (output(*(one + sign * 1e-6 * d for one, d in zip(start, directions, strict=True)))
                             for sign in (1, -1))
        expected = sum((gradient * d).sum() for gradient, d in zip(gradients, directions, strict=True))
        assert (ahead - behind).item() / 2e-6 == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


LAYER = {"inner": 4, "heads": 2, "hidden": 5}


@pytest.mark.parametrize("make", [
    lambda: (rsrefseg2.AttentionLayer(6, 5, 4, 2),
             [leaf(2, 3, 6), leaf(2, 4, 5), leaf(3, 6), leaf(4, 5)], lambda *given: (*given, POSITIVE)),
    lambda: (rsrefseg2.CrossLayer(6, 5, **LAYER),
             [leaf(2, 3, 6), leaf(2, 4, 5), leaf(3, 6), leaf(4, 5)], lambda *given: (*given, POSITIVE)),
    lambda: (rsrefseg2.MlpLayer(6, 7), [leaf(2, 3, 6)]),
    lambda: (LoRALinear(torch.nn.Linear(5, 4), 2), [leaf(3, 5)]),
    *[lambda start=start: (rsrefseg2.ReferringSemanticDecomposition(6, 2, 2, start=start, **LAYER),
                           [leaf(2, 4, 6), leaf(2, 6), leaf(2, 6)], lambda words, a, b: (words, POSITIVE, (a, b)))
      for start in ("textpool", "learnable")],
    lambda: (rsrefseg2.TextVisualInteraction(6, 5, 2, **LAYER),
             [leaf(2, 3, 6), leaf(2, 4, 5), leaf(3, 6), leaf(4, 5)]),
    lambda: (rsrefseg2.SparsePromptGeneration(4, 6, 5, 3, 2, **LAYER),
             [leaf(2, 3, 6), leaf(2, 4, 5), leaf(3, 6), leaf(4, 5)],
             lambda t, v, a, b: ([(t, v), (2 * t, v * v)], a, b)),
    *[lambda options=options: (rsrefseg2.DensePromptGeneration(4, 5, (6, 7), **options).eval(),
                               [leaf(2, 4, 3, 3), leaf(2, 5)])
      for options in ({"conv": "official", "soft": 3, "scale": True}, {"conv": "none", "upsample": "post"}, {})],
    *[lambda changes=changes: (rsrefseg2.CascadedPrompter(4, 6, 5, 2, 7, small(
        attention_width=4, heads=2, mlp_width=3, n_t=2, n_p=2, **changes)).eval(),
        [leaf(2, 4, 4), leaf(2, 4, 6), leaf(2, 4)], lambda v, words, sentence: (v, words, POSITIVE, sentence))
      for changes in ({}, {"interleave": True, "dense_text": "t2", "dense_pool": "learned"}, {"dense_text": "t2_prime"},
                      {"dense_text": "sparse", "dense_image": "v"}, {"cascade": False, "alpha_ortho": 0.0})]])
def test_the_gradient_of_each_block_is_its_own(make, double):
    gradients_are_right(*make())


class Terms(torch.nn.Module):
    """The criterion as a module of the outputs; in the order of GIVEN."""

    GIVEN = ("logits", "p_dense", "sentence", "t1", "t2", "v", "v2")

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        return self.model.criterion(dict(zip(self.GIVEN, tensors, strict=True)), batch_for(), 0)


@pytest.mark.parametrize("changes", [{}, {"nce_text": "sent", "nce_image": "v2", "spat_text": "t2", "spat_image": "v2"},
                                     {"spat": "MIL"}, {"official_losses": True}])
def test_the_gradient_of_each_term_is_its_own(changes, double):
    """Eqs. (9) to (12): what each term reads, its scale and bias, and the map of t_2 to v's width."""
    model = build(small(alpha_dense=0.7, alpha_spat=0.3, **changes))
    sizes = (M, 1, 8, 8), (M, 1, 8, 8), (M, D_V), (M, 3, D_T), (M, 3, D_T), (N, D_V, G, G), (M, D_V, G, G)
    gradients_are_right(Terms(model), [leaf(*size) for size in sizes],
                        parts=("model.scales", "model.biases", "model.match_t2"))


@pytest.mark.parametrize("block, given", [
    (losses.orthogonal_loss, [(2, 3, 4), (2, 3, 4)]), (lambda x: losses.mask_pooled(x, MASKS), [(2, 3, 4, 4)]),
    (losses.contrast, [(3, 4), (3, 4), ()]),
    (lambda *x: losses.contrast(*x, remote_gradient=False), [(3, 4), (3, 4), ()]),
    (lambda x: losses.multi_instance_loss(x, MASKS), [(2, 1, 4, 4)])])
def test_the_gradient_of_each_loss_is_its_own(block, given, double):
    assert torch.autograd.gradcheck(block, [leaf(*size) for size in given], eps=1e-6, atol=1e-6, rtol=1e-4)


class Objective(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return self.model.criterion(self.model(*inputs()), batch_for(), 0)


@pytest.mark.parametrize("changes", [
    {}, {"nce_text": "sent", "nce_image": "v2", "spat_text": "t2", "spat_image": "v2", "dense_text": "t2_prime"}])
def test_the_gradient_of_the_whole_is_its_own(changes, double):
    """Every term and every part; SAM's image encoder adds in float32 in any case, so its parts take a longer step."""
    model = build(small(freeze=False, alpha_dense=0.7, alpha_spat=0.3, lora_sam=0, **changes))
    rest = ("vision.", "text.", "prompter.", "sam.mask_decoder.", "sam.prompt_encoder.", "sam.no_memory", "scales.",
            "biases.", "match_t2.")
    gradients_are_right(Objective(model), [], parts=tuple(f"model.{part}" for part in rest))
    objective = Objective(model)
    sum(objective().values()).backward()
    for part in ("backbone", "neck"):
        moved = [p for p in getattr(model.sam.vision_encoder, part).parameters() if p.requires_grad]
        length = sum(p.grad.pow(2).sum() for p in moved).sqrt().item()
        values = []
        with torch.no_grad():
            for step in (2e-4, -4e-4):
                for p in moved:
                    p.add_(step * p.grad / length)
                values.append(sum(objective().values()).item())
        assert (values[0] - values[1]) / 4e-4 == pytest.approx(length, rel=0.01) and length > 1e-4, part


# --------------------------------------------------------------------------------------- starts, official forms


def test_starts():
    """IV-C1, Table IX: drawn queries and positions; PyTorch's own layers (official code); scratch: ours."""
    torch.manual_seed(0)
    model = RSRefSeg2(small(n_t=40, n_p=60, prompt_width=32, alpha_spat=0.5, alpha_dense=0.5, lora_vision=8))
    prompter = model.prompter
    for drawn in (*prompter.text_positions, prompter.image_position, prompter.sparse.queries, prompter.sparse.position):
        assert drawn.mean().abs() < 0.15 and 0.9 < drawn.std() < 1.1                    # of 500 draws or more
    lora = model.vision.encoder.layers[0].self_attn.k_proj
    bound = D_V ** -0.5
    assert not lora.lora_A.any()
    assert -bound <= lora.lora_B.min() < -0.9 * bound and 0.9 * bound < lora.lora_B.max() <= bound
    assert {name: scale.item() for name, scale in model.scales.items()} == pytest.approx(
        dict.fromkeys(("samp", "spat", "dense"), math.log(1 / 0.07)))
    assert {name: bias.item() for name, bias in model.biases.items()} == {"spat": 0, "dense": 0}
    dense = rsrefseg2.DensePromptGeneration(4, 4, 8, scale=True)
    assert dense.logit_scale.item() == pytest.approx(math.log(10)) and dense.logit_bias.item() == -10       # SigLIP's
    for part in (prompter, model.sam.mask_decoder, model.sam.prompt_encoder):
        for module in part.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
                out, into, *window = module.weight.shape
                bound = (6 / (out + into) / math.prod(window)) ** 0.5                   # Xavier
                assert module.weight.abs().max() <= bound and (module.bias is None or not module.bias.any())
                assert module.weight.numel() < 200 or module.weight.abs().max() > 0.9 * bound
    tokens = torch.cat([model.sam.mask_decoder.mask_tokens.weight, model.sam.prompt_encoder.point_embed.weight])
    assert 0.8 < tokens.std() < 1.2
    for module in model.sam.vision_encoder.modules():
        if type(module) in (torch.nn.Linear, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            assert 0.8 < module.weight.abs().max() * fan_in ** 0.5 <= 1                 # by fan-in, PyTorch's own
            assert module.bias.any()
    for table in (model.vision.embeddings.position_embedding.weight,                    # Table IX's sines
                  model.sam.vision_encoder.backbone.pos_embed[0].flatten(1).mT):
        sines = rsrefseg2.sine_positions(math.isqrt(len(table)), table.shape[1])
        ratio = 0.5 / (sines - sines.mean(0)).std()
        torch.testing.assert_close(table.detach() - table[0], ratio * (sines - sines[0]), rtol=0, atol=1e-5)
        assert table.mean(0).abs().max() < 1e-6


def test_special_tokens_of_the_towers_built_here_are_those_of_the_word_tokenizer():
    text = rsrefseg2.tower_configs(small())[0].text_config
    assert (text.pad_token_id, text.eos_token_id, text.bos_token_id) == (0, 2, 2)
    assert rsrefseg2.SPECIAL_TOKENS == {"pad": 0, "unknown": 1, "end": 2}


def test_maps_of_almost_no_range_and_prompts_of_almost_no_mass():
    """Our choice: ranges and sums below a millionth count as one, so that nothing is divided by zero."""
    model = build()
    flat = torch.zeros(M, 1, S // 4, S // 4)
    flat[:, :, 3, 3] = 2e-7
    hook = model.prompter.register_forward_hook(lambda module, given, prompts: prompts | {"p_dense": flat})
    outputs = model(*inputs())
    hook.remove()
    close(outputs["dense_prompt"].amax((1, 2, 3)), [0.2] * M)
    mass = torch.zeros(1, 1, 4, 4)
    mass[0, 0, 1, 1] = 1e-7
    got = model.diagnose({"dense_prompt": mass, "logits": torch.ones(1, 1, 4, 4)}, torch.ones(1, 4, 4).bool())
    close(got["dense_mass"], [0.1])


def test_images_are_normalised_as_each_tower_was_trained():
    """SigLIP 2: mean and deviation 0.5; SAM 2: ImageNet's. I_1 is reduced with antialiasing, there without."""
    images = torch.randint(0, 256, (1, 3, S, S), dtype=torch.uint8)
    for antialias in (True, False):
        I_1, I_2 = build(small(antialias=antialias)).two_sizes(images)
        large = F.interpolate(images / 255, (G * 8, G * 8), mode="bilinear", antialias=antialias)
        close(I_1, large * 2 - 1)
    for k, (mean, deviation) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        close(I_2[:, k], (images[:, k] / 255 - mean) / deviation)
    halves = F.avg_pool2d(images / 255, 2)                      # between four pixels, unfiltered: their mean
    close(build(small(antialias=False)).two_sizes(images)[0], halves * 2 - 1)


def test_sine_and_fourier_positions():
    """Table IX: of x and y at frequencies 1 to 1/10000; in the official code SAM's, random projections of -1 .. 1."""
    prompter = build(small(image_positions="sine")).prompter
    for cell in (0, 6, 13):
        y, x = (cell // G + 0.5) / G, (cell % G + 0.5) / G
        waves = [f(2 * math.pi * place * 10000 ** (-k / (D_V // 4))) for place in (x, y) for f in (math.sin, math.cos)
                 for k in range(D_V // 4)]
        close(prompter.image_position[cell], waves, 2e-6)
    assert "prompter.image_position" not in build(small(image_positions="sine")).state_dict()
    torch.manual_seed(8)
    drawn = rsrefseg2.fourier_positions(3, 8)
    torch.manual_seed(8)
    projection = torch.randn(2, 4)
    for cell in range(9):
        centre = [2 * (cell % 3 + 0.5) / 3 - 1, 2 * (cell // 3 + 0.5) / 3 - 1]
        angles = [2 * math.pi * (centre[0] * a + centre[1] * b) for a, b in projection.T.tolist()]
        close(drawn[cell], [math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    assert "prompter.image_position" in build(small(image_positions="fourier")).state_dict()


@pytest.mark.parametrize("source", ["t2", "t2_prime"])
def test_official_pooling_of_the_text_of_the_dense_prompt(source):
    """Table XIII there: linear, GELU, two convolutions over the n_t vectors with a batch norm between."""
    model = build(small(dense_text=source, dense_pool="learned"))
    linear_, _, first, norm_, second, _ = model.prompter.pool
    seen = {}
    model.prompter.pool.register_forward_hook(lambda module, given, out: seen.update(given=given[0], out=out))
    model.prompter.second.register_forward_hook(
        lambda module, given, out: seen.update(t2=given[0], t2_prime=out[-1][0]))
    model(*inputs())
    assert torch.equal(seen["given"], seen[source])
    for t, out in zip(seen[source], seen["out"], strict=True):
        hidden = gelu(linear(linear_, array(t)))
        hidden = array(first.weight)[:, :, 0] @ hidden + array(first.bias)[:, None]
        hidden = (hidden - array(norm_.running_mean)[:, None]) / np.sqrt(array(norm_.running_var) + norm_.eps)[:, None]
        hidden = hidden * array(norm_.weight)[:, None] + array(norm_.bias)[:, None]
        close(out, (array(second.weight)[:, :, 0] @ hidden + array(second.bias))[0])


def test_official_single_stage_hands_on_the_words():
    """Table X there: no decomposition, the second stage reads all words."""
    config = small(cascade=False, alpha_ortho=0.0, decomposition_blocks=0, subspace_positions=False,
                   pad_to_longest=True)
    model = build(config)
    outputs = model(*inputs())
    assert outputs["t2"].shape == (M, 8, D_T)                   # seven words and EOS, the longest sentence
    close(outputs["t2"], model.text(inputs()[1][:, :8]).last_hidden_state)
    assert not model.prompter.text_positions
    images, tokens, text_mask, _ = (one.to("meta") for one in inputs())      # for --plan, where lengths are not known
    _, words, read, _ = RSRefSeg2(config).to("meta").encode(images[..., :32, :32].float(), tokens, text_mask)
    assert words.shape == (M, L, D_T) and read.shape == (M, L)


def test_official_contrast_cuts_the_mask_on_the_grid_and_has_no_bound():
    model = build(small(official_losses=True))
    outputs, batch = model(*inputs()), batch_for()
    batch["masks"][2] = False
    batch["masks"][2, 10:13, 50:53] = True                      # lost on the grid: a vector of zeros
    with torch.no_grad():
        model.scales["samp"].fill_(math.log(150.0))
    pooled = []
    for v, mask in zip(array(outputs["v"])[[0, 1, 1]], batch["masks"].numpy().astype(float), strict=True):
        cells = np.zeros((G, G), bool)                          # corners of mask and grid coincide
        for y in range(G):
            for x in range(G):
                py, px = y * (S - 1) / (G - 1), x * (S - 1) / (G - 1)
                y0, x0 = min(int(py), S - 2), min(int(px), S - 2)
                b, d = py - y0, px - x0
                cells[y, x] = ((1 - b) * ((1 - d) * mask[y0, x0] + d * mask[y0, x0 + 1])
                               + b * ((1 - d) * mask[y0 + 1, x0] + d * mask[y0 + 1, x0 + 1])) > 0.5
        pooled.append(v[:, cells].sum(-1))
    assert np.any(pooled[0]) and not np.any(pooled[2])
    pooled = [p / max(np.linalg.norm(p), 1e-12) for p in pooled]
    texts = [unit(t) for t in text_vectors(model, outputs, "t2")]
    s = 150 * np.array([[a @ b for b in texts] for a in pooled])
    losses_ = [(np.log(np.exp(s[i]).sum()) + np.log(np.exp(s[:, i]).sum())) / 2 - s[i, i] for i in range(M)]
    close(model.criterion(outputs, batch, 0.5)["samp"], 0.5 * np.mean(losses_), 1e-4)


@pytest.mark.parametrize("official", [False, True])
def test_rows_of_other_processes_get_their_gradient_unless_as_in_the_official_code(official, monkeypatch):
    model, seen = build(small(official_losses=official)), []
    monkeypatch.setattr(rsrefseg2, "contrast", lambda *given, **options: seen.append(options) or given[0].sum())
    model.criterion(model(*inputs()), batch_for(), 0.5)
    assert seen == [{"remote_gradient": not official}]


@pytest.mark.parametrize("kind", ["CE", "MIL"])
def test_official_alignment_adds_dice_and_stays_on_the_grid(kind):
    """L_spat is taken at 32 x 32 (here G x G), L_dense at the mask's size; both with Dice beside the cross-entropy."""
    model = build(small(official_losses=True, alpha_spat=0.5, spat=kind, alpha_dense=0.5, dense_scale=True))
    outputs, batch = model(*inputs()), batch_for()

    def both(z, y):
        p, y = 1 / (1 + np.exp(-z)), y.astype(float)
        ce = np.mean([softplus(a) - a * b for a, b in zip(z.ravel(), y.ravel(), strict=True)])
        return ce + 1 - (2 * (p * y).sum() + 1e-3) / ((p ** 2).sum() + (y ** 2).sum() + 1e-3)

    spat, dense = [], []
    cut = losses.on_grid(batch["masks"][:, None], (G, G))[:, 0].numpy()
    for v, t, p_dense, mask, cells in zip(
            image_features(outputs, "v", batch["image_index"]), text_vectors(model, outputs, "sent"),
            array(outputs["p_dense"]), batch["masks"].numpy(), cut, strict=True):
        coarse = np.array([[unit(v[:, y, x]) @ unit(t) for x in range(G)] for y in range(G)]) / 0.07
        if kind == "CE":
            spat.append(both(coarse + model.biases["spat"].item(), cells))
        else:
            spat.append(-math.log(np.exp(coarse)[cells].sum() / np.exp(coarse).sum()))
        dense.append(both(upsampled(p_dense[0], S), mask))
    terms = model.criterion(outputs, batch, 0.5)
    close(terms["spat"], 0.5 * np.mean(spat), 1e-4)
    close(terms["dense"], 0.5 * np.mean(dense), 1e-4)


# ----------------------------------------------------------------------------------------------- batches, processes


def test_padding_changes_nothing_in_the_prompter(model):
    words = torch.randn(M, L, D_T)
    mask = torch.arange(L) < torch.tensor([[4], [7], [3]])
    v, sentence = torch.randn(M, G * G, D_V), torch.randn(M, D_V)
    noisy = torch.where(mask[..., None], words, 1e3 * torch.randn_like(words))
    a, b = (model.prompter(v, w, mask, sentence) for w in (words, noisy))
    for name in a:
        close(a[name], b[name], 1e-6)


def test_eos_is_no_word(model):
    """Each row is read up to its EOS, also where that is the last of all tokens; EOS only where nothing else is."""
    images, tokens, text_mask, index = inputs(lengths=(4, 9, 0))
    _, _, read, _ = model.encode(torch.randn(1, 3, G * 8, G * 8), tokens, text_mask)
    assert read.sum(1).tolist() == [4, 9, 1] and read[1, 8] and not read[1, 9] and read[2, 0]
    assert all(value.isfinite().all() for value in model(images, tokens, text_mask, index).values())


def test_padding_to_the_longest_makes_neighbours_matter():
    model = build(small(pad_to_longest=True))
    images, tokens, text_mask, index = inputs()
    together = model(images, tokens, text_mask, index)
    alone = model(images[:1], tokens[:1], text_mask[:1])
    assert not torch.allclose(alone["sentence"], together["sentence"][:1], atol=1e-3)


@torch.no_grad()
def test_half_precision_stays_near_and_cosines_in_float32(model):
    positions = []
    hook = model.sam.mask_decoder.register_forward_pre_hook(
        lambda module, given, options: positions.append(options["image_positional_embeddings"]), with_kwargs=True)
    full = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*inputs())
    assert half["p_dense"].dtype == torch.float32
    hook.remove()
    assert torch.equal(*positions)                              # SAM's sines need more than eight bits
    for name in ("logits", "p_dense", "t2", "sentence"):
        assert (half[name].float() - full[name]).norm() < 0.05 * full[name].norm(), name


class OnlyOnMeta(TorchFunctionMode):
    """Refuses every call that gives a tensor of another device than the model's, also where PyTorch would let it in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.is_meta, function
        return result


@pytest.mark.parametrize("changes", [
    {}, {"official_losses": True, "spat": "MIL", "pad_to_longest": True},
    {"subspace_init": "zero", "prompt_init": "zero", "image_positions": "sine", "dense_scale": True}], ids=str)
def test_what_is_made_on_the_way_is_on_the_models_device(changes, monkeypatch):
    """With each image's own expression, and with an image_index; losses and diagnosis too."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())     # it knows no meta
    model = build(small(alpha_dense=0.5, alpha_spat=0.5, **changes)).to("meta").train()
    images, tokens, text_mask, index = (one.to("meta") for one in inputs())
    batch = {name: one.to("meta") for name, one in batch_for().items()}
    with OnlyOnMeta():
        outputs = model(images, tokens, text_mask, index)
        model.criterion(outputs, batch, 0.0)
        model.diagnose(outputs, batch["masks"])
        model(images, tokens[:N], text_mask[:N])


def test_images_are_encoded_once(model):
    images, tokens, text_mask, index = inputs()
    sizes = []
    hooks = [module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
             for module in (model.vision.embeddings, model.sam.vision_encoder.backbone.patch_embed)]
    model(images, tokens, text_mask, index)
    for hook in hooks:
        hook.remove()
    assert sizes == [N, N]


def shared_step(rank, world, folder):
    """One process's part of a training step on five expressions of three images; its gradients go to a file."""
    torch.set_num_threads(1)
    model = build()
    model.param_groups({**RECIPE, "batch_size": 5, "micro_batch": 5})
    images, tokens, text_mask, index = inputs(lengths=(4, 7, 3, 5, 6), index=(0, 1, 1, 2, 2))
    masks = batch_for(index=index.tolist())["masks"]
    network, rows = model, slice(0, 5)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                                timeout=timedelta(seconds=240))
        network, rows = DistributedDataParallel(model), (slice(0, 3), slice(3, 5))[rank]
    first = int(index[rows].min())
    for _ in range(2):                      # the second forward is where DDP complains of parameters without gradient
        model.zero_grad()
        here = index[rows] - first
        outputs = network(images[first:int(index[rows].max()) + 1], tokens[rows], text_mask[rows], here)
        terms = model.criterion(outputs, {"masks": masks[rows], "image_index": here}, 0)
        (sum(terms.values()) * len(here) * world / 5).backward()              # as train.py weights an unequal share
    found = {"terms": {name: value.item() * len(here) / 5 for name, value in terms.items()},
             "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad}}
    torch.save(found, folder / f"{world}-{rank}.pt")


def test_two_processes_step_like_one(tmp_path):
    """The objective and every gradient, with three expressions on one process and two on the other."""
    running = torch.multiprocessing.start_processes(shared_step, (2, tmp_path), nprocs=2, join=False,
                                                    start_method="spawn")
    shared_step(0, 1, tmp_path)
    deadline = time.monotonic() + 300
    while not running.join(timeout=5):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            pytest.fail("the two processes still run after five minutes")
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, value in one["terms"].items():
        assert sum(part["terms"][name] for part in two) == pytest.approx(value, rel=1e-5), name
    for name, gradient in one["gradients"].items():
        for part in two:
            close(part["gradients"][name], gradient, 1e-5)


def test_the_log_says_what_accumulation_does_to_the_contrast(capsys, monkeypatch):
    model = build()
    model.param_groups({**RECIPE, "batch_size": 8, "micro_batch": 8})
    assert capsys.readouterr().out == ""
    model.param_groups({**RECIPE, "batch_size": 64, "micro_batch": 8})
    assert "contrasts the 8 expressions" in capsys.readouterr().out
    build(small(alpha_samp=0.0)).param_groups({**RECIPE, "batch_size": 64, "micro_batch": 8})
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(rsrefseg2, "processes", lambda: 4)
    for rank, said in ((0, 1), (1, 0)):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        model.param_groups({**RECIPE, "batch_size": 64, "micro_batch": 8})
        assert capsys.readouterr().out.count("contrasts the 32 expressions") == said


# -------------------------------------------------------------------------------------------------------- copying out


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The prompter's modules with the helpers that their docstrings name, in a file of their own."""
    parts = [getattr(rsrefseg2, name) for name in (
        "one_of", "expect", "repeated", "mlp", "resize", "cosine_maps", "AttentionLayer",
        "MlpLayer", "CrossLayer", "LoRALinear", "ReferringSemanticDecomposition", "TextVisualInteraction",
        "SparsePromptGeneration", "DensePromptGeneration")]
    imports = ("import math\nimport torch\nfrom einops import rearrange\nfrom torch import nn\n"
               "from torch.nn import functional\n\n\n")
    path = tmp_path_factory.mktemp("copied") / "theirs.py"
    path.write_text(imports + "\n\n".join(map(inspect.getsource, parts)))
    return runpy.run_path(str(path))


SIZES = {"inner": 12, "heads": 2, "hidden": 20}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_work_in_a_file_of_their_own_with_maps_that_are_not_square(copied, model, dtype):
    own = model.prompter
    decompose = copied["ReferringSemanticDecomposition"](D_T, **SIZES)
    interact = copied["TextVisualInteraction"](D_T, D_V, **SIZES)
    sparse = copied["SparsePromptGeneration"](C, D_T, D_V, count=4, **SIZES)
    dense = copied["DensePromptGeneration"](D_V, D_V, (10, 14)).eval()
    for part, ours in ((decompose, own.decompose), (interact, own.second), (sparse, own.sparse), (dense, own.dense)):
        part.load_state_dict(ours.state_dict())
        part.to(dtype)
    words, mask, v = torch.randn(M, L, D_T), torch.arange(L) < torch.tensor([[4], [7], [3]]), torch.randn(M, 4 * 9, D_V)
    t1, t2 = decompose(words.to(dtype), mask)
    t, seen = interact(t2, v.to(dtype))[-1]
    prompts = sparse([(t, seen)] * 2)
    maps = dense(seen.transpose(1, 2).unflatten(2, (4, 9)), torch.ones(M, D_V, dtype=dtype))
    assert (t1.dtype, seen.dtype, prompts.dtype, maps.dtype) == (dtype, dtype, dtype, torch.float32)
    assert (seen.shape, prompts.shape, maps.shape) == ((M, 36, D_V), (M, 4, C), (M, 1, 10, 14))
    if dtype == torch.float32:
        assert all(torch.equal(a, b) for a, b in zip((t1, t2), own.decompose(words, mask), strict=True))
        direct = F.interpolate(own.dense.conv(seen.mT.unflatten(2, (4, 9))), (10, 14), mode="bilinear")
        close(maps, F.cosine_similarity(direct, torch.ones(M, D_V, 1, 1), dim=1)[:, None])
    else:
        assert all(value.isfinite().all() for value in (t1, prompts, maps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_of_a_linear_layer_of_any_type(copied, dtype):
    linear = torch.nn.Linear(5, 7).to(dtype)
    adapted, x = copied["LoRALinear"](linear, 2), torch.randn(3, 4, 5, dtype=dtype)
    assert adapted.lora_A.dtype == dtype and torch.equal(adapted(x), linear(x))


@pytest.mark.parametrize("wrong, message", [
    (lambda m: LoRALinear(torch.nn.MultiheadAttention(8, 2).out_proj, 2), "got NonDynamicallyQuantizableLinear"),
    (lambda m: LoRALinear(torch.nn.Conv2d(4, 4, 1), 2), "expected a plain nn.Linear, got Conv2d"),
    (lambda m: rsrefseg2.AttentionLayer(8, 8, inner=12, heads=5), "inner=12: expected a multiple of heads=5"),
    (lambda m: rsrefseg2.ReferringSemanticDecomposition(8, start="Textpool"), "start=Textpool: expected textpool or"),
    (lambda m: rsrefseg2.SparsePromptGeneration(8, 8, 8, start="textpool"), "start=textpool: expected learnable or"),
    (lambda m: rsrefseg2.DensePromptGeneration(8, 8, 8, conv="ReLU"), "conv=ReLU: expected relu or none or official"),
    (lambda m: rsrefseg2.DensePromptGeneration(8, 8, 8, upsample="up"), "upsample=up: expected pre or post"),
    (lambda m: m.decompose(torch.randn(2, L, D_T), torch.ones(2, L)), "^text_mask: expected torch.bool, got"),
    (lambda m: m.decompose.cross[0][0](*[torch.randn(2, 3, D_T)] * 2, 0.0, 0.0, torch.ones(2, 3)), "^mask: expected t"),
    (lambda m: m.decompose(torch.randn(2, L, D_T), torch.ones(2, 5).bool()), r"text_mask: .* size \(2, 10\)"),
    (lambda m: m.decompose(torch.randn(2, D_T, L), torch.ones(2, D_T).bool()), r"words: .*\(any, any, 24\), got"),
    (lambda m: m.second(torch.randn(2, 3, D_T), torch.randn(2, D_V, G, G)), r"x: .*, 32\), got \(2, 32, 4, 4\)"),
    (lambda m: m.second(torch.randn(2, 3, D_T), torch.randn(3, 16, D_V)), r"context: .* size \(3, any, 24\)"),
    (lambda m: m.sparse([(torch.randn(2, 3, D_T), torch.randn(2, 16, D_V))]), "for each of 2 blocks, got 1"),
    (lambda m: m.dense(torch.randn(2, G, G, D_V), torch.randn(2, D_V)), r"image features: .*\(any, 32, any, any\)"),
    (lambda m: m.dense(torch.randn(2, D_V, G, G), torch.randn(2, 1, D_V)), r"text: .* size \(2, 32\)"),
    (lambda m: m(torch.randn(2, 4 * 9, D_V), torch.randn(2, L, D_T), torch.ones(2, L).bool(), torch.randn(2, D_V)),
     r"v: expected a tensor of size \(2, 16, any\), got \(2, 36, 32\)")])
def test_what_a_module_would_misread_is_refused(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(model.prompter)


# ------------------------------------------------------------------------------------------------ text, files, pictures


def test_words_to_tokens():
    tokenizer = data.WordTokenizer(["red", "ship", "the"], small().text_length, rsrefseg2.SPECIAL_TOKENS)
    assert len(tokenizer) == 6 and tokenizer.words == ["red", "ship", "the"]
    tokens, text_mask = tokenizer(["The red ship", "ship, " * 20])
    assert tokens[0, :5].tolist() == [5, 3, 4, 2, 0] and text_mask.sum(1).tolist() == [4, 10]
    assert tokens[1, -1] == 2 and tokens[1, 1] == 1


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as `pretrained` takes it: SigLIP with its tokenizer and SAM 2, tiny, as transformers saves them."""
    folder = tmp_path_factory.mktemp("published")
    source = small(lora_text=0, lora_vision=0, lora_sam=0, vision_width=40, text_width=24, text_length=16)
    clip, sam = rsrefseg2.tower_configs(source)
    clip.vision_config.vision_use_head = True
    torch.manual_seed(5)
    SiglipModel(clip).bfloat16().save_pretrained(folder / "clip")                  # float32 is asked for all the same
    Sam2Model(sam).save_pretrained(folder / "sam")
    settings = folder / "sam/config.json"
    settings.write_text(settings.read_text().replace('"float32"', '"bfloat16"'))            # here too
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{k:02X}>" for k in range(256)), "▁",
              *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    words = GemmaTokenizer(vocab=vocabulary, merges=[], padding_side="left", add_bos_token=False, add_eos_token=True,
                           model_input_names=["input_ids"])
    words.save_pretrained(folder / "clip")
    return folder


def test_published_towers_are_loaded_whole(published, capsys):
    config = small(pretrained=str(published), clip="any/clip", sam="any/sam", dense_scale=True)
    model = RSRefSeg2(config).eval()
    sources = model.load_pretrained()
    assert sources == {"vision.": str(published / "clip"), "text.": str(published / "clip"),
                       "sam.": str(published / "sam")}
    assert capsys.readouterr().out.count("tensors loaded") == 2
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    clip = SiglipModel.from_pretrained(published / "clip", dtype=torch.float32)
    sam = load_file(published / "sam/model.safetensors")
    pixels = torch.randn(1, 3, G * 8, G * 8)
    close(model.vision(pixels).last_hidden_state, clip.vision_model(pixels).last_hidden_state)
    assert torch.equal(model.prompter.dense.logit_scale, clip.logit_scale)
    assert torch.equal(model.prompter.dense.logit_bias, clip.logit_bias)
    own = model.sam.state_dict()
    for name, tensor in sam.items():
        assert torch.equal(own[name], tensor), name
    for changes in ({"dense": False}, {"dense_scale": False}):
        RSRefSeg2(dataclasses.replace(config, **changes)).load_pretrained()
    assert model.prompter.image_position.shape == (G * G, 40)      # the width of the tower, not of Config
    assert all(p.any() for name, p in model.prompter.named_parameters() if name.endswith("to_q.bias"))   # not Xavier
    model.param_groups(RECIPE)
    models.remember_sources(model, sources)
    kept, left_out = models.own_state(model)
    assert {name for name in kept if name.startswith(("vision.", "text."))} == {
        name for name in model.state_dict() if "lora" in name and name.startswith(("vision.", "text."))}
    assert "sam.mask_decoder.conv_s0.weight" in kept and "sam.prompt_encoder.mask_embed.conv1.weight" in left_out


def test_published_tokenizer_lower_case_right_padding_eos_kept(published):
    tokenizer = rsrefseg2.tokenizer(small(pretrained=str(published), clip="any/clip"))
    tokens, text_mask = tokenizer(["Ab", "the ship at the pier"])
    assert tokens.shape == (2, L) and text_mask.sum(1).tolist() == [3, L]
    assert tokens[0, 2] == 1 and tokens[1, -1] == 1 and not tokens[0, 3:].any()
    assert torch.equal(tokens[:1], tokenizer(["aB"])[0])
    theirs = rsrefseg2.tokenizer(small(pretrained=str(published), clip="any/clip", lower_case=False))
    assert torch.equal(tokens[:1], theirs(["ab"])[0]) and not torch.equal(tokens[:1], theirs(["aB"])[0])


def test_missing_weights_are_named(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="put the files of huggingface.co/any/other there"):
        RSRefSeg2(small(pretrained=str(published), clip="any/other"))
    with pytest.raises(FileNotFoundError, match="HF_ENDPOINT"):
        RSRefSeg2(small(pretrained="hub", clip="nobody/nothing-of-this-name"))
    with pytest.raises(ValueError, match="text_length=17: any/clip has positions for 16 tokens"):
        RSRefSeg2(small(pretrained=str(published), clip="any/clip", sam="any/sam", text_length=17))
    RSRefSeg2(small(pretrained=str(published), clip="any/clip", sam="any/sam", text_length=16))


def test_a_folder_of_something_else_is_refused(published, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/config.json").write_text("{")
    with pytest.raises(ValueError, match="clip: not a folder as transformers saves it, or of another architecture"):
        RSRefSeg2(small(pretrained=str(tmp_path), clip="any/clip"))


@pytest.mark.parametrize("gone, more, message", [
    ("no_memory_embedding", "mask_decoder.extra", "missing .'no_memory_embedding'., unknown .'mask_decoder.extra'."),
    ("no_memory_embedding", None, "missing .'no_memory_embedding'., unknown .."),
    (None, "mask_decoder.extra", "missing .., unknown .'mask_decoder.extra'.")])
def test_a_file_with_other_weights_is_refused(published, tmp_path, gone, more, message):
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    model = RSRefSeg2(small(pretrained=str(tmp_path), clip="any/clip", sam="any/sam"))
    path = tmp_path / "sam/model.safetensors"
    tensors = load_file(path)
    tensors |= {more: tensors["no_memory_embedding"].clone()} if more else {}
    tensors.pop(gone, None)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"sam: not the weights of a Sam2Model: {message}"):
        model.load_pretrained()


def test_a_folder_without_the_tokenizer_is_refused(published, tmp_path):
    """transformers answers with the special words alone, or with an advice to install something."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "clip" / file).unlink()
        with pytest.raises(ValueError, match="clip: not a folder as transformers saves it"):
            rsrefseg2.tokenizer(small(pretrained=str(tmp_path), clip="any/clip"))


def test_diagnose_tells_where_from_how(model):
    side = S // 4
    dense, logits = torch.zeros(4, 1, side, side), torch.full((4, 1, side, side), -1.0)
    masks = torch.zeros(4, S, S, dtype=torch.bool)
    masks[:, 16:32, 16:32] = True
    dense[:, :, 5, 5] = 1                                   # within the object, but for the second
    dense[1] = 0
    dense[1, :, 12, 12] = 1
    logits[0, :, 4:8, 4:8] = 1                              # right; elsewhere a small part of the object
    logits[1:, :, 4:6, 4:6] = 1
    dense[3, :, 12, 4] = 0.5                                # half as much lies outside
    got = model.diagnose({"dense_prompt": dense, "logits": logits}, masks)
    assert got["dense_peak"].tolist() == [1, 0, 1, 1]
    assert got["localisation_error"].tolist() == [0, 1, 0, 0]
    assert got["boundary_error"].tolist() == [0, 0, 1, 1]
    close(got["dense_mass"], [1, 0, 1, 2 / 3], 1e-3)
    half = torch.full((4, 1, S, S), 0.0)                        # a logit of zero is background
    half[:, :, 16:32, 16:24] = 1                                # half of the object: an IoU of 0.5 is not below 0.5
    edge = model.diagnose({"dense_prompt": dense, "logits": half}, masks)
    assert not edge["localisation_error"].any() and not edge["boundary_error"].any()
    nothing = model.diagnose({"dense_prompt": dense, "logits": logits}, torch.zeros_like(masks))
    assert all(value.isnan().all() for value in nothing.values())
    assert build(small(dense=False)).diagnose({}, masks) == {}


# --------------------------------------------------------------------------------------------- the authors' weights


def fill(name, shape, seed=0):
    """A stand-in for a weight, drawn from its name: more than one axis by fan-in, one axis near 1 (weight) or 0."""
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    normal = torch.randn(tuple(shape), generator=random)
    if not shape:
        return 0.5 * normal
    if name.endswith("running_var"):
        return 1 + 0.1 * normal.abs()
    if len(shape) == 1:
        return 1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal
    return normal / math.sqrt(math.prod(shape[1:]))


def peft(shapes, adapted, rank):
    """Names and shapes after peft wrapped the layers whose name ends so."""
    wrapped = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if not layer.endswith(adapted):
            wrapped[name] = shape
            continue
        wrapped[f"{layer}.base_layer.{kind}"] = shape
        if kind == "weight":
            wrapped[f"{layer}.lora_A.default.weight"] = (rank, *shape[1:])
            wrapped[f"{layer}.lora_B.default.weight"] = (shape[0], rank, *(1 for _ in shape[2:]))
    return wrapped


def their_prompter(c):
    """Operations in the order of their configuration files, blocks stacked."""
    D, A, H = c.text_width, c.attention_width, c.mlp_width
    shapes = {}

    def layers(stack, blocks, *operations):
        for i in range(blocks):
            for name, width, context in operations:
                path = f"{stack}_attn_layers.{i}.{name}"
                if name.startswith("norm"):
                    sizes = {"": (width, None)}
                elif name.startswith("mlp"):
                    sizes = {".layers.0": (H, width), ".layers.1": (width, H)}
                else:
                    sizes = {".q_proj": (A, width), ".k_proj": (A, context), ".v_proj": (A, context),
                             ".out_proj": (width, A)}
                for part, (out, into) in sizes.items():
                    shapes[f"{path}{part}.weight"] = (out,) if into is None else (out, into)
                    shapes[f"{path}{part}.bias"] = (out,)

    def ops(width, context, *names):
        return [(name, width, context) for name in names]

    two = [op for k in (1, 2) for op in ops(
        D, D, f"self_attn_query_query{k}", f"norm_query{k}_1", f"cross_attn_query_text_query{k}_text",
        f"norm_query{k}_2", f"mlp_query{k}_2", f"norm_query{k}_3",
        f"cross_attn_query_query_query{k}_query{3 - k}", f"norm_query{k}_4", f"mlp_query{k}_3", f"norm_query{k}_5")]
    image = ops(c.vision_width, D, "cross_attn_img_text_1", "norm_img_1", "mlp_img_1", "norm_img_2")
    P = c.prompt_width
    prompt = (ops(P, P, "self_attn_prompt_1", "norm_prompt_1")
              + ops(P, D, "cross_attn_prompt_text_1", "norm_prompt_2", "mlp_prompt_2", "norm_prompt_3")
              + ops(P, c.vision_width, "cross_attn_prompt_img_1", "norm_prompt_4", "mlp_prompt_3", "norm_prompt_5"))
    layers("two_queries_text", c.decomposition_blocks, *two)
    layers("queries1_to_img", c.interaction_blocks, *ops(D, D, "self_attn_text_text_1", "norm_text_1"), *image)
    layers("prompt_queries2_img", c.prompt_blocks, *ops(D, D, "self_attn_text_1", "norm_text_1"), *image, *prompt)
    g, V = (c.clip_size or c.vision_size) // c.patch, c.vision_width
    shapes |= {"text_query_pe_embedding1": (c.n_t, D), "text_query_pe_embedding2": (c.n_t, D), "img_pe": (1, V, g, g),
               "prompt_pe_embedding": (c.n_p, P), "prompt_embedding": (c.n_p, P)}
    for path, (out, *into) in {"sparse_prompt_mlp.layers.0": (H, P), "sparse_prompt_mlp.layers.1": (P, H),
                               "dense_prompt_conv.0": (V // 2, V, 3, 3), "dense_prompt_conv.1": (V // 2,),
                               "dense_prompt_conv.3": (V, V // 2, 3, 3)}.items():
        shapes |= {f"{path}.weight": (out, *into), f"{path}.bias": (out,)}
    return shapes | {f"dense_prompt_conv.1.{kind}": (V // 2,) for kind in ("running_mean", "running_var")} | {
        "dense_prompt_conv.1.num_batches_tracked": ()}


META = ((r"(_mlps\.\d|_head)\.layers\.0", r"\1.layers.1"), (r"(_mlps\.\d|_head)\.proj_in", r"\1.layers.0"),
        (r"(_mlps\.\d|_head)\.proj_out", r"\1.layers.2"), (r"mlp\.proj_in", "mlp.layers.0"),
        (r"mlp\.proj_out", "mlp.layers.1"), ("layer_norm", "norm"), ("o_proj", "out_proj"),
        ("upscale_conv1", "output_upscaling.0"),
        ("upscale_norm", "output_upscaling.1"), ("upscale_conv2", "output_upscaling.3"),
        ("mask_embed.conv1", "mask_downscaling.0"), ("mask_embed.norm1", "mask_downscaling.1"),
        ("mask_embed.conv2", "mask_downscaling.3"), ("mask_embed.norm2", "mask_downscaling.4"),
        ("mask_embed.conv3", "mask_downscaling.6"), ("patch_embed.projection", "patch_embed.proj"),
        ("shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
        (r"^vision_encoder\.backbone\.", "trunk."), (r"^vision_encoder\.(neck\.convs\.\d)\.", r"\1.conv."),
        (r"^(prompt_encoder|mask_decoder)\.", r"sam_\1."), (r"^no_memory_embedding$", "no_mem_embed"))


def their_shapes(c):
    """{name: shape} of the authors' file at the sizes of Config c: SigLIP's names, Meta's for SAM, peft's, theirs."""
    clip, sam = rsrefseg2.tower_configs(c)
    clip.vision_config.vision_use_head = True
    with torch.device("meta"):
        text, vision, sam = ({name: tuple(value.shape) for name, value in tower.state_dict().items()} for tower in (
            SiglipTextModel(clip.text_config), SiglipVisionModel(clip.vision_config), Sam2Model(sam)))
    attention = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
    found = {f"clip_text_encoder.base_model.model.{name}": (1,) for name in ("logit_scale", "logit_bias")}
    for kind, shapes, ends, rank in (("text", text, (*attention, "head"), c.lora_text), ("vision", vision, (
            *attention, "head.attention.out_proj", "head.mlp.fc1", "head.mlp.fc2"), c.lora_vision)):
        found |= {f"clip_{kind}_encoder.base_model.model.model.{name}": shape
                  for name, shape in peft(shapes, ends, rank).items()}
    found |= {f"prompter.{name}": shape for name, shape in their_prompter(c).items()}
    encoder, rest = {}, {}
    for name, shape in sam.items():
        for ours, theirs in META:
            name = re.sub(ours, theirs, name)
        if name.startswith(("trunk.", "neck.")):
            encoder[name] = shape
        elif name.endswith(".point_embed.weight"):
            rest |= {f"sam_prompt_encoder.point_embeddings.{k}.weight": (1, shape[1]) for k in range(4)}
        elif name.startswith(("sam_", "no_mem")):
            rest[name] = shape
    encoder = peft(encoder, ("attn.qkv", "attn.proj", ".conv"), c.lora_sam)
    found |= {f"backbone.model.image_encoder.base_model.model.{name}": shape for name, shape in encoder.items()}
    found |= {f"backbone.model.{name}": shape for name, shape in rest.items()}
    return found | {f"decode_head.logit_{kind}{k}": () for kind in ("scale", "bias") for k in (1, 2)}


OFFICIAL = {field: value for field, value in THEIRS.items() if field not in RECIPE}
STAND_IN = dataclasses.replace(Config.tiny(), freeze=True, decoder_heads=8, lora_text=2, lora_vision=2, lora_sam=2,
                               alpha_dense=0.0, **OFFICIAL)


def their_file(path, config=STAND_IN, seed=0, wrap=lambda tensors: {"state_dict": tensors}, change=None):
    tensors = {name: fill(name, shape, seed) for name, shape in their_shapes(config).items()}
    if change:
        change(tensors)
    torch.save(wrap(tensors), path)
    return tensors


def test_the_authors_weights_give_the_authors_outputs(tmp_path):
    """The outputs are those of the authors' own modules, with the weights that `fill` gives for their names."""
    theirs = their_file(tmp_path / "theirs.pth")
    assert len(theirs) == 785                                   # as many as their code saves at this size
    expected = load_file(Path(__file__).parent / "official_rsrefseg2.safetensors")
    model = RSRefSeg2(STAND_IN).eval()
    model.load_state_dict(rsrefseg2.read_official(tmp_path / "theirs.pth"))
    tokens = F.pad(expected["tokens"], (0, STAND_IN.text_length - 9))
    with torch.no_grad():
        outputs = model(expected["images"], tokens, torch.arange(STAND_IN.text_length)[None] < 9)
    for name in ("sentence", "t1", "t2", "p_dense", "logits"):
        error = (outputs[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 2e-5, (name, error)                     # rounding alone gives a tenth of it


OTHER = dataclasses.replace(SMALL, vision_width=D_T, decomposition_blocks=3, interaction_blocks=1, prompt_blocks=1,
                            n_t=2, n_p=5, lora_text=3, lora_vision=1, lora_sam=5, **OFFICIAL)


@pytest.mark.parametrize("wrap", [lambda tensors: tensors | {"epoch": 3}, lambda tensors: {
    "module": dict(reversed(tensors.items())), "step": 3}])
def test_a_file_of_other_sizes_goes_where_it_belongs(tmp_path, wrap):
    theirs = their_file(tmp_path / "theirs.pth", OTHER, seed=7, wrap=wrap)
    ours = rsrefseg2.read_official(tmp_path / "theirs.pth")
    model = RSRefSeg2(OTHER)
    model.load_state_dict(ours)
    encoder = "backbone.model.image_encoder.base_model.model."
    for path, their_path, folded in (
            ("vision.encoder.layers.1.self_attn.out_proj",
             "clip_vision_encoder.base_model.model.model.encoder.layers.1.self_attn.out_proj", False),
            ("text.encoder.layers.0.self_attn.q_proj",
             "clip_text_encoder.base_model.model.model.encoder.layers.0.self_attn.q_proj", False),
            ("text.head", "clip_text_encoder.base_model.model.model.head", True),
            ("sam.vision_encoder.backbone.blocks.2.attn.qkv", f"{encoder}trunk.blocks.2.attn.qkv", False),
            ("sam.vision_encoder.neck.convs.3", f"{encoder}neck.convs.3.conv", True)):
        base, A, B = (theirs[f"{their_path}.{part}.weight"] for part in (
            "base_layer", "lora_A.default", "lora_B.default"))
        whole = ours[f"{path}.weight"]
        if not folded:
            whole = whole + ours[f"{path}.lora_A"] @ ours[f"{path}.lora_B"].T
        assert (f"{path}.lora_A" in ours) != folded
        close(whole, (base.flatten(1) + B.flatten(1) @ A.flatten(1)).view_as(base))
        assert torch.equal(ours[f"{path}.bias"], theirs[f"{their_path}.base_layer.bias"])
    sam = "backbone.model.sam_mask_decoder."                    # parts that the first mask does not show
    for name, their_name in (
            ("sam.mask_decoder.iou_prediction_head.layers.0.weight", f"{sam}iou_prediction_head.layers.1.weight"),
            ("sam.mask_decoder.pred_obj_score_head.proj_out.bias", f"{sam}pred_obj_score_head.layers.2.bias"),
            ("sam.mask_decoder.output_hypernetworks_mlps.2.proj_in.weight",
             f"{sam}output_hypernetworks_mlps.2.layers.0.weight"),
            ("scales.samp", "decode_head.logit_scale2")):
        assert torch.equal(ours[name], theirs[their_name]), name
    for k in range(4):
        point = theirs[f"backbone.model.sam_prompt_encoder.point_embeddings.{k}.weight"]
        assert torch.equal(ours["sam.prompt_encoder.point_embed.weight"][k:k + 1], point)


def test_files_written_on_a_card_are_read_where_there_is_none(tmp_path, monkeypatch):
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: seen.append(options) or load(*given, **options))
    their_file(tmp_path / "theirs.pth")
    rsrefseg2.read_official(tmp_path / "theirs.pth")
    assert seen == [{"map_location": "cpu", "weights_only": True}]


def test_half_precision_weights_become_float32(tmp_path):
    """Their engine keeps weights in BF16."""
    def halve(tensors):
        tensors |= {name: value.bfloat16() for name, value in tensors.items() if value.is_floating_point()}

    their_file(tmp_path / "theirs.pth", change=halve)
    tensors = rsrefseg2.read_official(tmp_path / "theirs.pth")
    assert {value.dtype for value in tensors.values()} == {torch.float32, torch.int64}


class Code:
    def __reduce__(self):
        return print, ("code ran",)


def broken(path, kind):
    their_file(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "code":
        torch.save({"state_dict": {"a": Code()}}, path)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "other":
        torch.save({"backbone.layers.0.weight": torch.zeros(2), "head.bias": torch.zeros(2)}, path)
    elif kind == "split":
        their_file(path, change=lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("clip_t")])
    elif kind == "half a layer":
        their_file(path, change=lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)))
    elif kind == "points":
        their_file(path, change=lambda tensors: tensors.pop(
            "backbone.model.sam_prompt_encoder.point_embeddings.3.weight"))
    elif kind == "operation":
        their_file(path, change=lambda tensors: tensors.update({
            "prompter.queries1_to_img_attn_layers.0.norm_img_7.weight": torch.zeros(3)}))


@pytest.mark.parametrize("kind, message", [
    ("truncated", "not a whole file of plain tensors"), ("text", "not a whole file of plain tensors"),
    ("code", "not a whole file of plain tensors"), ("empty", "not a whole file of plain tensors"),
    ("list", r"of 0 tensors .* none is of \['text', 'vision'"),
    ("other", r"of 2 tensors 2 have other names, as \['backbone.layers.0.weight', 'head.bias'\]"),
    ("split", r"0 have other names, as \[\], and none is of \['text'\]"), ("half a layer", r"2 have other names"),
    ("points", "3 have other names"),
    ("operation", r"1 have other names, as \['prompter.queries1_to_img_attn_layers.0.norm_img_7.weight'\]")])
def test_a_file_that_is_not_theirs_is_answered_with_one_line(tmp_path, kind, message, capsys):
    broken(tmp_path / "theirs.pth", kind)
    with pytest.raises(ValueError, match=message) as error:
        rsrefseg2.read_official(tmp_path / "theirs.pth")
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "theirs.pth"))
    assert "code ran" not in capsys.readouterr().out
