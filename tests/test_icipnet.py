"""ICIPNet against its paper: every equation re-derived with plain loops, shapes, counts, gradients, weights."""

import contextlib
import dataclasses
import inspect
import json
import math
import pickle
import re
import runpy
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertTokenizer,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
)

import data
from models import icipnet
from models.icipnet import (
    ABLATIONS,
    RECIPE,
    BilateralInformationFusion,
    Config,
    CrossScaleAttention,
    CrossScaleInteraction,
    Decoder,
    ICIPNet,
    ImageConditionedInstancePrompt,
    IntraScaleInteraction,
    MultiModalFeatureReconstruction,
    PixelWordAttention,
    RotatedConv,
    rotation,
)

TINY = dataclasses.replace(
    Config.tiny(), image_size=64, vocab_size=40, embed=16, depths=(1, 1, 1, 1), window=4, width=32, bert_ffn=32,
    prompts=2, token_hidden=16, cross_heads=2, cross_key=4, decoder_width=16,
    **{field: getattr(Config(), field) for field in ("dice_weight", "background_weight", "foreground_weight")})
PLAIN = {"intra_scale": False, "cross_scale": False, "rotated": False}


def count(*modules):
    return sum(parameter.numel() for module in modules if module is not None for parameter in module.parameters())


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return ICIPNet(dataclasses.replace(TINY, **changes))


def awake(module):
    """Xavier-uniform linear layers: the starts of std 0.02 let hardly anything through so narrow layers."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def inputs(images=2, per_image=1, size=64, length=7, vocab=40, seed=1):
    torch.manual_seed(seed)
    expressions = images * per_image
    text_mask = torch.arange(length) < torch.randint(3, length + 1, (expressions, 1))
    tokens = torch.randint(4, vocab, (expressions, length)) * text_mask
    pictures = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
    return pictures, tokens, text_mask, torch.arange(images).repeat_interleave(per_image)


def masks(expressions=2, size=64):
    result = torch.zeros(expressions, size, size, dtype=torch.bool)
    for number in range(expressions):
        result[number, 5 + 9 * number:25 + 9 * number, 8:40 - 5 * number] = True
    return result


def numpy(tensor):
    return tensor.detach().double().numpy()


def near(result, expected, tolerance=1e-4):
    return result.shape == expected.shape and (result - expected).abs().max() <= tolerance * expected.abs().max()


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def linear(layer, x):
    return numpy(layer.weight) @ x + (0 if layer.bias is None else numpy(layer.bias))


def mlp(layers, x):
    return linear(layers[2], np.array([gelu(value) for value in linear(layers[0], x)]))


def stirred(module):
    """In evaluation mode, with batch norms that have statistics and scales of their own: their place counts."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(layer.running_mean, std=0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias, std=0.3)
    return module.eval()


def batch_norm(layer, x):
    mean, var, weight, bias = (value.view(1, -1, *[1] * (x.ndim - 2)) for value in (
        layer.running_mean, layer.running_var, layer.weight, layer.bias))
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def conv(layer, x, **options):
    return nn.functional.conv2d(x, layer.weight, layer.bias, **options)


def conv_norm(layers, x, **options):
    return batch_norm(layers[1], conv(layers[0], x, **options))


# ------------------------------------------------------------------------------------------------ the paper's numbers

PAPER = {                                                      # what the paper prints, and where
    "image_size": (480, "III-B4: 480 x 480"), "protocol": ("resized", "III-B4: scored at that size"),
    "image_backbone": ("microsoft/swin-base-patch4-window12-384-in22k", "III, IV-A1: Swin-B, ImageNet-22K"),
    "text_backbone": ("google-bert/bert-base-uncased", "III: BERT"),
    "width": (768, "IV-A1: D"), "prompts": (8, "IV-B: M_i"), "icip": (True, "Table III"), "bif": (True, "Table III"),
    "dice_weight": (0.1, "III-B3: lambda"), "epochs": (40, "IV-A1"), "batch_size": (4, "IV-A1"),
    "lr": (3e-5, "IV-A1"), "weight_decay": (0.01, "IV-A1"), "schedule": ("poly", "IV-A1")}
BACKBONES = {                                                  # Swin-B of [15] at 384, BERT-base of [14]
    "embed": 128, "depths": (2, 2, 18, 2), "swin_heads": (4, 8, 16, 32), "window": 12, "init_std": 0.02,
    "vocab_size": 30522, "bert_layers": 12, "bert_heads": 12, "bert_ffn": 3072, "dropout": 0.1}
CODE = {                                                       # the official code, where the paper is silent
    "text_length": 20, "freeze": False, "bert_trained_layers": 10, "bert_embeddings": False, "drop_path": 0.3,
    "query_norm": True, "softmax": True, "sublayer_norm": True, "lambda_bias": (0.8, 0.8, 0.8, 0.8),
    "token_hidden": 256, "background_weight": 0.9, "foreground_weight": 1.1, "power": 0.9, "warmup": 0.0, "clip": 0.0,
    "per_image": 0, "empty": "zero", "select": "oIoU"}
RMSIN = {                                                      # the base model of IV-C, with LAVT's decoder
    "intra_scale": True, "cross_scale": True, "rotated": True, "cross_heads": 8, "cross_key": 32, "decoder_width": 512,
    "decoder_norm": "batch", "router_dropout": 0.2}
OURS = {                                                       # our choices, with their reason
    "bif_width": ("D", "IV-A1 knows one width"), "value_mult": (1, "Eqs. (12), (13) end D wide"),
    "raw_prompts": (False, "Eq. (4)"), "rmsin": (False, "its reshapes scramble the heads"),
    "align_corners": (False, "as evaluate.py enlarges"), "dice_sum": (False, "the sum grows with the batch"),
    "black_boxes": (0.0, "the paper names no augmentation"), "precision": ("bf16", "speed"),
    "micro_batch": (4, "the paper's batch at once"), "phases": (None, "one phase"),
    "pretrained": ("hub", "III: pre-trained"), "weights_dir": ("weights", "where Microsoft's file may lie")}


def test_every_number_is_the_papers_the_codes_or_ours_with_a_reason():
    stated = {**{field: value for field, (value, _) in (PAPER | OURS).items()}, **BACKBONES, **CODE, **RMSIN}
    resolved = {**dataclasses.asdict(Config()), **RECIPE}
    assert {field: value for field, value in resolved.items() if stated[field] != value} == {}
    assert set(stated) == set(resolved) and icipnet.RECIPE_FOR == {}           # IV-A1: one recipe for both data sets
    assert BilateralInformationFusion.__init__.__kwdefaults__ == {          # for whoever copies a module out
        field: resolved[field] for field in ("value_mult", "query_norm", "softmax", "sublayer_norm", "token_hidden")
    } | {"lambda_bias": 0.8}
    for kind, values in ((ImageConditionedInstancePrompt, (False,)), (MultiModalFeatureReconstruction, (256,)),
                         (CrossScaleAttention, (False,)), (CrossScaleInteraction, (8, 32, False)),
                         (Decoder, (True, nn.BatchNorm2d, 0.2)), (RotatedConv, (0.2,)), (icipnet.Gate, (0.02,))):
        assert kind.__init__.__defaults__ == values
    assert icipnet.MAPS == ()                                                  # Fig. 3 shows masks only
    assert icipnet.RETIRED == {"channel_mult": 2}
    assert icipnet.SPECIAL_TOKENS == {"pad": 0, "unknown": 1, "begin": 2, "end": 3}


TABLES = {                                                     # (ICIP, BIF, M_i); IV-C: M_i = 5 in Table III
    "III": {"Base": (False, False, 5), "+ICIP": (True, False, 5), "+BIF": (False, True, 5), "Full": (True, True, 5)},
    "IV": {"Base": (False, False, 8), "+ICIP M=3": (True, False, 3), "+ICIP M=5": (True, False, 5),
           "+ICIP M=8": (True, False, 8)}}
OFFICIAL = {"rmsin": True, "raw_prompts": True, "bif_width": "stage", "value_mult": 2, "decoder_norm": "tanh",
            "align_corners": True, "dice_sum": True, "black_boxes": 0.2, "precision": "fp32"}


@pytest.mark.parametrize("table, row", [(table, row) for table in TABLES for row in TABLES[table]])
def test_rows_have_the_modules_that_the_paper_ticks(table, row):
    icip, bif, prompts = TABLES[table][row]
    changed = dataclasses.replace(Config(), **ABLATIONS[table][row])
    assert changed == dataclasses.replace(Config(), icip=icip, bif=bif, prompts=prompts, rmsin=True)   # IV-C: the base
    model = build(**ABLATIONS[table][row]).eval()
    names = " ".join(model.state_dict())
    assert ("icip" in names) is icip and ("lambda_" in names) is bif and ("P_token" in names) is bif
    seen = []
    for stage in model.stages:
        kind = BilateralInformationFusion if bif else PixelWordAttention
        assert type(stage.attention) is kind
        stage.attention.register_forward_hook(lambda m, args, out: seen.append(args[1].shape[1]))
    assert model.cross_scale.as_released and [one.as_released for one in model.cross_scale.attentions] == [True, True]
    assert model(*inputs()[:3])["logits"].isfinite().all()
    assert seen == [7 + (prompts if icip else 0)] * 4          # what is read: 7 words, behind the prompts, if any


def test_rows_are_those_of_the_paper():
    assert {table: list(rows) for table, rows in ABLATIONS.items()} == {
        **{table: list(rows) for table, rows in TABLES.items()}, "official": ["all"]}
    assert ABLATIONS["official"]["all"] == OFFICIAL
    printed = {"III": "81.58/74.06 82.97/76.27 83.53/77.62 83.77/78.21",       # oIoU/mIoU in the order of the rows
               "IV": "74.64/60.23 75.60/62.72 75.85/63.40 75.77/63.07"}
    figures = {table: {row: "oIoU {}, mIoU {}".format(*pair.split("/"))
                       for row, pair in zip(TABLES[table], pairs.split(), strict=True)}
               for table, pairs in printed.items()}
    assert figures == icipnet.FIGURES


# ------------------------------------------------------------------------------------------------- ICIP, Eqs. (1)-(4)


@pytest.fixture
def icip():
    torch.manual_seed(0)
    module = ImageConditionedInstancePrompt(channels=5, width=4, prompts=3)
    nn.init.normal_(module.prompts)
    V, L = torch.randn(2, 6, 5), torch.randn(2, 3, 4)
    return module, V, L, torch.tensor([[True, True, False], [True, True, True]])


def test_eq01_one_table_of_prompts_is_copied_for_every_image(icip):
    module, V, L, mask = icip
    assert module.prompts.shape == (3, 4)
    assert 0.015 < ImageConditionedInstancePrompt(4, 768, 8).prompts.std() < 0.025
    nn.init.zeros_(module.f[2].weight)
    L_o, _ = module(V, L, mask)                                # V_hat = 0: what stays of T_o is T
    for b in range(2):
        for m in range(3):
            assert torch.equal(L_o[b, m], module.prompts[m])


def test_eq02_eq03_eq04_prompts_gather_the_image_and_precede_the_words(icip):
    module, V, L, mask = icip
    L_o, mask_o = module(V, L, mask)
    assert L_o.shape == (2, 3 + 3, 4)
    assert mask_o.tolist() == [[True] * 5 + [False], [True] * 6]
    T = numpy(module.prompts)
    for b in range(2):
        V_hat = [mlp(module.f, numpy(V[b, p])) for p in range(6)]
        for m in range(3):
            A = [math.tanh(sum(V_hat[p][d] * T[m, d] for d in range(4))) for p in range(6)]
            alpha = [math.exp(A[p]) / sum(math.exp(A[q]) for q in range(6)) for p in range(6)]
            assert abs(sum(alpha) - 1) < 1e-12
            for d in range(4):
                T_o = sum(alpha[p] * V_hat[p][d] for p in range(6)) + T[m, d]
                assert abs(L_o[b, m, d].item() - T_o) < 1e-5
    assert torch.equal(L_o[:, 3:], L)


def test_eq04_zero_prompts_take_the_mean_and_change_with_the_image(icip):
    module, V, L, mask = icip
    nn.init.zeros_(module.prompts)
    T_o = module(V, L, mask)[0][:, :3]
    assert torch.allclose(T_o, module.f(V).mean(1, keepdim=True).expand(-1, 3, -1), atol=1e-6)
    assert (T_o[0] - T_o[1]).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------- BIF, Eqs. (5)-(9)


def fusion(**options):
    torch.manual_seed(0)
    options = {"query_norm": False, "sublayer_norm": False, **options}
    module = BilateralInformationFusion(channels=5, width=4, positions=6, half=3, **options)
    for layer in (module.f_q, module.f_k, module.f_v):
        nn.init.normal_(layer.bias)
    module.reconstruct = nn.Identity()
    V, L_o = torch.randn(2, 6, 5), torch.randn(2, 5, 4)
    return module, V, L_o, torch.tensor([[True] * 4 + [False], [True] * 5])


class Rows(nn.Module):
    """In the place of f_v: the k-th value is the k-th unit vector, so that V_o is F itself."""

    def forward(self, L_o):
        return torch.eye(L_o.shape[1]).expand(len(L_o), -1, -1)


def loops_F(module, V, L_o, mask, softmax=True, query_norm=False):
    """Eqs. (5)-(8) with loops -> F (B,P,K)."""
    D, tokens = 3, L_o.shape[1]
    first, second = ((numpy(a)[0] * numpy(b)[0]).sum() for a, b in
                     ((module.lambda_q1, module.lambda_k1), (module.lambda_q2, module.lambda_k2)))
    lam = math.exp(first) - math.exp(second) + 0.8
    F = np.zeros((2, 6, tokens))
    for b in range(2):
        Q = np.array([linear(module.f_q, numpy(V[b, p])) for p in range(6)])
        K = np.array([linear(module.f_k, numpy(L_o[b, k])) for k in range(tokens)])
        if query_norm:
            Q = (Q - Q.mean(0)) / np.sqrt(Q.var(0) + 1e-5)
        for p in range(6):
            maps = []
            for half in (range(D), range(D, 2 * D)):
                S = [sum(Q[p, d] * K[k, d] for d in half) / math.sqrt(D) for k in range(tokens)]
                if softmax:
                    total = sum(math.exp(S[k]) for k in range(tokens) if mask[b, k])
                    S = [math.exp(s) / total for s in S]
                maps.append([s if mask[b, k] else 0 for k, s in enumerate(S)])
            F[b, p] = np.array(maps[0]) - lam * np.array(maps[1])
    return F


def test_eq05_rows_and_widths():
    module, V, L_o, mask = fusion(value_mult=2)
    shapes = {}
    for name in ("f_q", "f_k", "f_v"):
        getattr(module, name).register_forward_hook(lambda m, x, y, name=name: shapes.update({name: tuple(y.shape)}))
    assert module(V, L_o, mask).shape == (2, 6, 6)
    assert shapes == {"f_q": (2, 6, 6), "f_k": (2, 5, 6), "f_v": (2, 5, 6)}
    assert fusion()[0].f_v.out_features == 3                   # the default: H is as wide as one half


def test_eq05_eq06_halves_of_queries_and_keys_meet_in_order(monkeypatch):
    module, V, L_o, mask = fusion()
    seen = []
    plain = module.scores
    monkeypatch.setattr(module, "scores", lambda Q, K, m: seen.append((Q, K)) or plain(Q, K, m))
    module(V, L_o, mask)
    for (Q, K), half in zip(seen, (slice(0, 3), slice(3, 6)), strict=True):
        for b in range(2):
            for p in range(6):
                assert np.allclose(numpy(Q[b, p]), linear(module.f_q, numpy(V[b, p]))[half], atol=1e-5)
            for k in range(5):
                assert np.allclose(numpy(K[b, k]), linear(module.f_k, numpy(L_o[b, k]))[half], atol=1e-5)


def test_eq07_lambda_is_the_difference_of_exponentials_plus_the_bias():
    module = fusion(lambda_bias=0.3)[0]
    for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
        assert vector.shape == (1, 3)
        nn.init.normal_(vector)
    first = sum(module.lambda_q1[0, d].item() * module.lambda_k1[0, d].item() for d in range(3))
    second = sum(module.lambda_q2[0, d].item() * module.lambda_k2[0, d].item() for d in range(3))
    assert abs(module.balance().item() - (math.exp(first) - math.exp(second) + 0.3)) < 1e-5


@pytest.mark.parametrize("width", [128, 256, 512, 768, 1024])
def test_eq07_lambda_stays_finite_and_moderate(width):
    module = BilateralInformationFusion(1, 1, 1, width, token_hidden=1)
    vectors = [module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2]
    values = []
    torch.manual_seed(0)
    for _ in range(1000):
        for vector in vectors:
            vector.data = torch.randn(1, width) * 0.1
        values.append(module.balance().item())
    assert np.isfinite(values).all() and np.abs(values).max() < 10
    assert 0.5 < np.median(values) < 1.1
    fresh = torch.cat([BilateralInformationFusion(1, 1, 1, width, token_hidden=1).lambda_q1
                       for _ in range(8)])
    assert 0.09 < fresh.std() < 0.11                           # what a new module draws is what was drawn here
    module.half()                                              # products and sums of halves are not rounded to halves
    q1, k1, q2, k2 = (vector.detach().double() for vector in vectors)
    exact = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + 0.8
    assert module.balance().dtype == torch.float32 and abs(module.balance().item() - exact.item()) < 2e-5


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("query_norm", [True, False])
def test_eq08_difference_of_two_maps(softmax, query_norm):
    module, V, L_o, mask = fusion(softmax=softmax, query_norm=query_norm)
    for vector in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
        nn.init.normal_(vector)
    module.f_v = Rows()
    F = module(V, L_o, mask)
    assert np.allclose(numpy(F), loops_F(module, V, L_o, mask, softmax, query_norm), atol=1e-4)
    if softmax:
        assert torch.allclose(F.sum(-1), 1 - module.balance(), atol=1e-5)


def test_eq09_values_are_weighted_by_F():
    module, V, L_o, mask = fusion()
    V_o, F = module(V, L_o, mask), loops_F(module, V, L_o, mask)
    for b in range(2):
        H = [linear(module.f_v, numpy(L_o[b, k])) for k in range(5)]
        for p in range(6):
            assert np.allclose(numpy(V_o[b, p]), sum(F[b, p, k] * H[k] for k in range(5)), atol=1e-5)


def test_eq09_then_rms_norm_and_scale():
    plain, V, L_o, mask = fusion()
    normed = fusion(sublayer_norm=True, lambda_bias=0.8)[0]
    normed.load_state_dict(plain.state_dict(), strict=False)
    nn.init.normal_(normed.norm.weight)
    V_o = numpy(plain(V, L_o, mask))
    expected = V_o / np.sqrt((V_o ** 2).mean(-1, keepdims=True) + 1e-5) * numpy(normed.norm.weight) * 0.2
    assert np.allclose(numpy(normed(V, L_o, mask)), expected, atol=1e-5)


def test_lambda_zero_is_ordinary_attention():
    module, V, L_o, mask = fusion(lambda_bias=0.0)
    module.lambda_q2.data, module.lambda_k2.data = module.lambda_q1.data, module.lambda_k1.data
    Q, K, H = module.f_q(V), module.f_k(L_o), module.f_v(L_o)
    expected = nn.functional.scaled_dot_product_attention(Q[..., :3], K[..., :3], H, mask[:, None])
    assert torch.allclose(module(V, L_o, mask), expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------- MFR, Eqs. (10)-(13)


@pytest.fixture
def mfr():
    torch.manual_seed(0)
    return MultiModalFeatureReconstruction(positions=6, width=4, token_hidden=5), torch.randn(2, 6, 4)


def test_eq10_eq11_tokens_mix_within_each_channel(mfr):
    module, V_o = mfr
    nn.init.zeros_(module.P_channel[2].weight)
    nn.init.zeros_(module.P_channel[2].bias)
    V_E = module(V_o)
    for b in range(2):
        for d in range(4):
            O_TM = mlp(module.P_token, numpy(V_o[b, :, d]))
            assert np.allclose(numpy(V_E[b, :, d]), numpy(V_o[b, :, d]) + O_TM, atol=1e-5)


def test_eq12_eq13_channels_mix_within_each_token(mfr):
    module, V_o = mfr
    assert module.P_channel[0].out_features == 8               # "first increases channels": twice, our choice
    O_loops = np.zeros((2, 6, 4))
    for b in range(2):
        V_E = np.stack([numpy(V_o[b, :, d]) + mlp(module.P_token, numpy(V_o[b, :, d])) for d in range(4)], 1)
        for p in range(6):
            O_loops[b, p] = V_E[p] + mlp(module.P_channel, V_E[p])
    assert np.allclose(numpy(module(V_o)), O_loops, atol=1e-5)


def test_reconstruction_without_its_output_layers_is_the_identity(mfr):
    module, V_o = mfr
    for layers in (module.P_token, module.P_channel):
        nn.init.zeros_(layers[2].weight)
        nn.init.zeros_(layers[2].bias)
    assert torch.equal(module(V_o), V_o)


# ------------------------------------------------------------------------------------------------------ loss, Eq. (14)


@pytest.mark.parametrize("dice_sum", [False, True])
def test_eq14_cross_entropy_and_dice(dice_sum):
    model = build(dice_sum=dice_sum)
    truth = masks(2)
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 64, 64)
    terms = model.criterion({"logits": logits}, {"masks": truth}, 0.0)
    ce, dice = [], []
    for b in range(2):
        weighted = weights = 0.0
        overlap, total = [0.0, 0.0], [0.0, 0.0]
        for logit, y in zip(logits[b, 0].flatten().tolist(), truth[b].flatten().tolist(), strict=True):
            p = 1 / (1 + math.exp(-logit))
            w = 1.1 if y else 0.9
            weighted += -w * math.log(p if y else 1 - p)
            weights += w
            for side, (q, z) in enumerate(((p, y), (1 - p, not y))):
                overlap[side] += q * z
                total[side] += q + z
        ce.append(weighted / weights)
        losses = [1 - (2 * o + 1e-6) / (t + 1e-6) for o, t in zip(overlap, total, strict=True)]
        dice.append(sum(losses) if dice_sum else losses[0])
    assert abs(terms["ce"].item() - 0.9 * np.mean(ce)) < 1e-5
    assert abs(terms["dice"].item() - 0.1 * np.mean(dice) * (4 if dice_sum else 1)) < 1e-5
    assert set(terms) == {"ce", "dice"}


@pytest.mark.parametrize("dice_sum", [False, True])
def test_eq14_epsilon_of_dice_is_the_codes(dice_sum):
    """1e-6 decides where nothing is drawn and nothing there: p is e^-23 at each of 64 x 64 pixels."""
    model, p = build(dice_sum=dice_sum), math.exp(-23) * 64 ** 2
    for empty, sign in ((torch.zeros(1, 64, 64, dtype=torch.bool), -1), (torch.ones(1, 64, 64, dtype=torch.bool), 1)):
        loss = 1 - 1e-6 / (p + 1e-6) if sign < 0 or dice_sum else 0.0
        term = model.criterion({"logits": torch.full((1, 1, 64, 64), 23.0 * sign)}, {"masks": empty}, 0.0)["dice"]
        assert abs(term.item() - 0.1 * loss * (4 if dice_sum else 1)) < 1e-5


def test_eq14_logits_are_resized_to_the_masks():
    model, logits = build(), torch.randn(2, 1, 16, 16)
    resized = nn.functional.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
    for name, term in model.criterion({"logits": logits}, {"masks": masks(2)}, 0.0).items():
        assert torch.allclose(term, model.criterion({"logits": resized}, {"masks": masks(2)}, 0.0)[name])


def test_eq14_any_division_into_micro_batches_is_the_same():
    model, truth = build(dice_sum=True), masks(3)
    logits = torch.randn(3, 1, 16, 16)
    whole = sum(model.criterion({"logits": logits}, {"masks": truth}, 0.0).values())
    parts = [sum(model.criterion({"logits": logits[part]}, {"masks": truth[part]}, 0.0).values())
             for part in (slice(0, 1), slice(1, 3))]
    assert torch.allclose(whole, parts[0] / 3 + parts[1] * 2 / 3, atol=1e-6)


# ------------------------------------------------------------------------------------------------- the base's modules


def test_pixel_word_attention():
    torch.manual_seed(0)
    module, V, L = PixelWordAttention(5, 4), torch.randn(2, 6, 5), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    out = module(V, L, mask)
    for b in range(2):
        Q = np.array([linear(module.f_q, numpy(V[b, p])) for p in range(6)])
        Q = (Q - Q.mean(0)) / np.sqrt(Q.var(0) + 1e-5)
        K, H = ([linear(layer, numpy(L[b, k])) for k in range(3)] for layer in (module.f_k, module.f_v))
        for p in range(6):
            weights = [math.exp(Q[p] @ K[k] / math.sqrt(5)) * mask[b, k].item() for k in range(3)]
            assert np.allclose(numpy(out[b, p]), sum(w * h for w, h in zip(weights, H, strict=True)) / sum(weights),
                               atol=1e-4)


@pytest.mark.parametrize("bif", [True, False])
def test_stage_brings_prompts_and_words_to_the_tokens(bif):
    """LAVT's shell round ICIP and BIF: what the stage hands on is put together by hand from its parts."""
    stage = stirred(awake(build(bif=bif).stages[1]))
    torch.manual_seed(0)
    V, L = torch.randn(2, 64, 32), torch.randn(2, 5, 32)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    after, fused = stage(V, (4, 16), L, mask)
    L_o = torch.cat((stage.icip(V, L, mask)[0][:, :2], L), 1)
    read = stage.attention(V, L_o, torch.cat((torch.ones(2, 2, dtype=torch.bool), mask), 1))
    if bif:
        assert isinstance(stage.attention.reconstruct, MultiModalFeatureReconstruction)
        stage.attention.reconstruct = nn.Identity()
        assert not torch.allclose(stage(V, (4, 16), L, mask)[1], fused, atol=1e-2)
    gated, gelu_ = V, nn.functional.gelu
    language = stage.W(read)
    language = (language - language.mean(1, keepdim=True)) / (language.var(1, False, keepdim=True) + 1e-5).sqrt()
    expected = gelu_(stage.project(gelu_(stage.visual(V)) * language))
    assert torch.allclose(fused, expected, atol=1e-4)
    local = stage.intra_scale(V.mT.reshape(2, 32, 4, 16)).flatten(2).mT
    for gate, tokens in ((stage.gate, expected), (stage.visual_gate, local)):
        first, _, second, _ = gate.layers
        gated = gated + torch.tanh(second(first(tokens).relu())) * tokens
    assert torch.allclose(after, gated, atol=1e-4)


def test_rotation_of_the_kernel_is_the_published_closed_form():
    for degrees in (0.0, 10.0, 40.0, -25.0):
        R = numpy(rotation(torch.tensor([math.radians(degrees)]).float())[0])
        assert np.allclose(R.sum(1), 1)
        x, y = math.cos(math.radians(abs(degrees))), math.sin(math.radians(abs(degrees)))
        a, b, c = x - y, x * y, x + y
        corner, edge = R[0].reshape(3, 3), R[1].reshape(3, 3)       # what the top left, the top middle place reads
        if degrees < 0:                                             # the other way round: the mirrored picture
            corner, edge = corner.T, edge[:, ::-1]
        assert np.allclose(corner, [[a, 1 - a, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)
        assert np.allclose(edge, [[0, x - b, b], [0, 1 - c + b, y - b], [0, 0, 0]], atol=1e-6)
        for quarter in range(4):                                    # all corners and all edges are turned copies
            place = np.rot90(np.arange(9).reshape(3, 3), -quarter)
            assert np.allclose(R[place[0, 0]][place].ravel(), R[0])
            assert np.allclose(R[place[0, 1]][place].ravel(), R[1])
        assert R[4, 4] == 1


def test_rotated_convolution_turns_and_scales_by_image():
    torch.manual_seed(0)
    module, features = RotatedConv(4).eval(), torch.randn(2, 4, 5, 6)
    route = module.norm(module.local(features).permute(0, 2, 3, 1)).relu().mean((1, 2))
    nn.init.normal_(module.theta.weight, std=5)
    out = module(features)
    for b in range(2):
        alpha = 1 / (1 + math.exp(-(module.alpha.weight @ route[b] + module.alpha.bias).item()))
        raw = (module.theta.weight @ route[b]).item()
        theta = raw / (1 + abs(raw)) * math.radians(40)
        assert abs(theta) > 0.05
        kernel = torch.einsum("ts,ois->oit", rotation(torch.tensor([theta]))[0], module.kernel.flatten(2))
        expected = alpha * nn.functional.conv2d(features[b:b + 1], kernel.view(4, 4, 3, 3), padding=1)
        assert torch.allclose(out[b:b + 1], expected, atol=1e-5)


def test_rotated_convolution_drops_what_decides_and_keeps_the_kernel_exact(monkeypatch):
    """RMSIN's router drops before alpha and before theta: without anything left, alpha is its bias' and theta 0."""
    torch.manual_seed(0)
    module, features = RotatedConv(4, dropout=1.0).train(), torch.randn(2, 4, 5, 6)
    nn.init.normal_(module.theta.weight, std=5)
    nn.init.constant_(module.alpha.bias, 0.7)
    plain = nn.functional.conv2d(features, module.kernel, padding=1) / (1 + math.exp(-0.7))
    assert torch.allclose(module(features), plain, atol=1e-5)
    nn.init.zeros_(module.alpha.bias)
    kernels, conv2d = [], nn.functional.conv2d

    def seen(x, weight, *rest, **options):
        kernels.append(weight)
        return conv2d(x, weight, *rest, **options)

    monkeypatch.setattr(nn.functional, "conv2d", seen)
    with torch.autocast("cpu", torch.bfloat16):                # halved, by alpha, and not rounded to bfloat16
        module(features)
    assert torch.equal(kernels[-1], module.kernel.repeat(2, 1, 1, 1) / 2)
    module.eval()
    raw, angles = [], []
    module.theta.register_forward_hook(lambda m, args, out: raw.append(out[:, 0]))
    monkeypatch.setattr(icipnet, "rotation", lambda theta: angles.append(theta) or rotation(theta))
    with torch.autocast("cpu", torch.bfloat16):                # nor is the angle, which comes of a product of halves
        module(features)
    expected = [value / (1 + abs(value)) * math.radians(40) for value in raw[0].tolist()]
    assert raw[0].dtype == torch.bfloat16 and angles[0].dtype == torch.float32
    assert np.allclose(numpy(angles[0]), expected, rtol=1e-5, atol=0)


def test_intra_scale_interaction_weighs_places():
    torch.manual_seed(0)
    module, features = stirred(IntraScaleInteraction()), torch.randn(2, 5, 4, 6)
    out = module(features)
    weight = out / features
    assert out.shape == features.shape
    assert torch.allclose(weight, weight[:, :1].expand_as(weight), atol=1e-4)
    assert (weight > 0).all() and (weight < 1).all()
    x = features.sum(1, keepdim=True) / 5
    for k, last in ((0, torch.relu), (1, torch.sigmoid)):
        point, deep, own = module.rounds[k]
        surroundings = conv_norm(deep[1], conv_norm(deep[0], x), padding=1)
        x = last(conv_norm(point, x) + surroundings + batch_norm(own, x))
        assert x.std() > 0.01
    assert torch.allclose(weight[:, :1], x, atol=1e-4)


def tokens_of(module, features):
    """The three maps of a cross-scale attention, side by side: (B,C,n)."""
    x = batch_norm(module.norm, features)
    maps = [x, *(conv_norm(layer, x, stride=stride, padding=stride - 1, groups=x.shape[1])
                 for layer, stride in zip(module.coarser, (2, 3), strict=True))]
    return torch.cat([one.flatten(2) for one in maps], 2)


def out_of(module, rows):
    """What leaves a cross-scale attention, of rows (h*w,C)."""
    return conv(module.out[2], nn.functional.hardswish(batch_norm(module.out[0], rows.T.reshape(1, -1, 5, 5))))[0]


def test_cross_scale_attention_keeps_heads_and_tokens_apart():
    torch.manual_seed(0)
    module, features = stirred(CrossScaleAttention(6, side=5, heads=2, key=3)), torch.randn(2, 6, 5, 5)
    assert module.to_map.in_features == 25 + 9 + 4
    out, tokens = module(features), tokens_of(module, features)                                     # (2,6,38)
    for b in range(2):
        heads = []
        qkv = batch_norm(module.qkv_norm, (module.qkv.weight @ tokens[b])[None])[0].T               # (38,24)
        for a in range(2):
            q, k, v = qkv[:, 12 * a:12 * a + 12].split([3, 3, 6], 1)
            own = slice(6 * a, 6 * a + 6)
            mixed = (q @ k.T / math.sqrt(3)).softmax(-1) @ v                                        # (38,6)
            mixed = module.to_map.weight @ mixed + module.to_map.bias[:, None]                      # (25,6)
            image = nn.functional.hardswish(v[:25]).T.reshape(1, 6, 5, 5)
            local = nn.functional.conv2d(image, module.local.weight[own], module.local.bias[own], padding=1, groups=6)
            heads.append(mixed + local[0].flatten(1).T)
        assert near(out[b], out_of(module, module.to_out(torch.cat(heads, 1))))


@pytest.mark.parametrize("as_released", [False, True])
def test_cross_scale_interaction_gates_each_map_by_the_shared_one(as_released):
    torch.manual_seed(0)
    widths = [8, 16, 32, 64]
    module = stirred(CrossScaleInteraction(widths, side=2, heads=2, key=4, as_released=as_released))

    def feed_forward(layers, x):
        first, wider, second, deep, _, narrower = layers
        x = batch_norm(second, conv(wider, batch_norm(first, x)))
        x = conv(deep, x, padding=1, groups=len(first.weight))
        assert x.max() > 6                                     # where ReLU6 ends
        return conv(narrower, x.clamp(0, 6))

    for layers in (*module.per_scale, module.across):
        layers[3].weight.data *= 30
    features = [3 * torch.randn(1, width, side, side) for width, side in zip(widths, (16, 8, 4, 2), strict=True)]
    out = module(features)
    assert [f.shape for f in out] == [f.shape for f in features]
    x = module.reduce(torch.cat([nn.functional.avg_pool2d(f, f.shape[-1] // 2) for f in features], 1))
    x = x + module.attentions[0](x)
    own = [feed_forward(*pair) for pair in zip(module.per_scale, x.split([2, 4, 8, 16], 1), strict=True)]
    x = x + torch.cat(own, 1) + (x if as_released else 0)      # RMSIN's feed-forward adds its input itself as well
    x = x + module.attentions[1](x)
    x = x + feed_forward(module.across, x)
    x = conv(module.expand[1], batch_norm(module.expand[0], x)).split(widths, 1)
    for i in range(4):
        weight = (conv_norm(module.weight[i], x[i]) / 6 + 0.5).clamp(0, 1)
        weight, shift = (nn.functional.interpolate(m, features[i].shape[-2:], mode="bilinear")
                         for m in (weight, conv_norm(module.shift[i], x[i])))
        assert near(out[i], conv_norm(module.local[i], features[i]) * weight + shift)


def test_cross_scale_as_released_reshapes_straight():
    """RMSIN's code: values, and what was attended, are read in another order of heads, places and widths."""
    torch.manual_seed(0)
    module, features = stirred(CrossScaleAttention(6, 5, 2, 3, as_released=True)), torch.randn(2, 6, 5, 5)
    for layer in (module.qkv, module.to_map, module.to_out):
        nn.init.normal_(layer.weight)
    out, tokens = module(features), tokens_of(module, features)                                     # (2,6,38)
    for b in range(2):
        qkv = batch_norm(module.qkv_norm, module.qkv(tokens[b].T)).detach().numpy()                 # (38,24)
        q, k, v = (np.stack([qkv[:, 12 * a + first:12 * a + last] for a in range(2)])               # (2,38,d)
                   for first, last in ((0, 3), (3, 6), (6, 12)))
        flat = [v[a, place, d] for a in range(2) for place in range(25) for d in range(6)]
        image = torch.tensor(flat).reshape(1, 12, 5, 5)
        local = module.local(nn.functional.hardswish(image))[0].flatten(1)                          # (12,25)
        weights = torch.tensor(q @ k.transpose(0, 2, 1) / math.sqrt(3)).softmax(-1).numpy()
        attended = weights @ v                                                                      # (2,38,6)
        flat = [attended[a, place, d] for place in range(38) for a in range(2) for d in range(6)]
        mixed = module.to_map(torch.tensor(flat).reshape(12, 38))                                   # (12,25)
        assert near(out[b], out_of(module, module.to_out((mixed + local).T)))


def test_decoder_goes_from_coarse_to_fine():
    torch.manual_seed(0)
    decoder = stirred(Decoder([4, 8, 16, 32], 6, rotated=False))
    features = [torch.randn(2, width, side, side) for width, side in ((4, 9), (8, 5), (16, 3), (32, 2))]
    x = features[3]
    for k, feature in enumerate(features[2::-1]):
        x = nn.functional.interpolate(x, feature.shape[-2:], mode="bilinear", align_corners=True)
        x = conv_norm(decoder.merge[k], torch.cat((x, feature), 1), padding=1).relu()
        x = conv_norm(decoder.refine[k], x, padding=1).relu()
    background, foreground = decoder.classify(x).unbind(1)
    logits = decoder(features)
    assert near(logits[:, 0], foreground - background)
    assert torch.allclose(logits[:, 0].sigmoid(), torch.stack((background, foreground)).softmax(0)[1], atol=1e-5)


def test_decoder_norms():
    features = [torch.randn(2, width, side, side) for width, side in ((4, 16), (8, 8), (16, 4), (32, 2))]
    for norm, kind in (("batch", nn.BatchNorm2d), ("tanh", icipnet.TanhNorm)):
        decoder = build(decoder_norm=norm).decoder
        assert sum(isinstance(module, kind) for module in decoder.modules()) == 6
        decoder = Decoder([4, 8, 16, 32], 8, norm=kind)
        assert decoder(features).shape == (2, 1, 16, 16)
    layer, x = icipnet.TanhNorm(3), torch.randn(1, 3, 2, 2)
    assert torch.equal(layer(x), torch.tanh(x))                # official code: starts at alpha 1, scale 1, shift 0
    for parameter, value in ((layer.alpha, 0.5), (layer.scale, 2.0), (layer.shift, 1.0)):
        nn.init.constant_(parameter, value)
    assert torch.allclose(layer(x), 2 * torch.tanh(x / 2) + 1)


# ------------------------------------------------------------------------------ gradients against finite differences


@pytest.fixture
def exact(monkeypatch):
    """Everything in float64, also where the code asks for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.manual_seed(0)


def check_gradients(function, groups, least=1e-3, step=1e-6):
    """Each group of tensors is moved along a random direction: the change of sum(R * out) is what backward says."""
    with torch.no_grad():
        weights = [torch.randn_like(one) for one in function()]

    def value():
        return sum((one * weight).sum() for one, weight in zip(function(), weights, strict=True))

    for tensors in groups.values():
        for tensor in tensors:
            tensor.requires_grad_(True).grad = None
    value().backward()
    for name, tensors in groups.items():
        directions = [torch.randn_like(tensor) for tensor in tensors]
        length = math.sqrt(sum(d.square().sum() for d in directions))
        directions = [d / length for d in directions]
        analytic = sum((tensor.grad * d).sum() for tensor, d in zip(tensors, directions, strict=True)).item()
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                for tensor, d in zip(tensors, directions, strict=True):
                    tensor += sign * step * d
                ends.append(value().item())
                for tensor, d in zip(tensors, directions, strict=True):
                    tensor -= sign * step * d
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert abs(analytic - numeric) < 1e-5 * abs(numeric) + 1e-8, (name, analytic, numeric)
        assert abs(numeric) > least, f"{name}: nothing depends on it, {numeric}"


def lively(module, spread=0.7):
    """float64, every parameter drawn anew, so that each path counts."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=spread)
    return module


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


MASK = torch.tensor([[True, True, False], [True] * 3])
V5, L4 = draw(2, 6, 5), draw(2, 3, 4)
TOKENS = {                                                      # module, its inputs, what a norm or a softmax undoes
    "ICIP": (lambda: ImageConditionedInstancePrompt(5, 4, 3), (V5, L4), ()),
    "BIF": (lambda: BilateralInformationFusion(5, 4, 6, 3, value_mult=2), (V5, L4), ("f_q.bias", "f_k.bias")),
    "BIF as printed": (lambda: BilateralInformationFusion(5, 4, 6, 3, query_norm=False, softmax=False,
                                                          sublayer_norm=False), (V5, L4), ()),
    "PWAM": (lambda: PixelWordAttention(5, 4), (V5, L4), ("f_q.bias", "f_k.bias"))}
ON_MAPS = {
    "MFR": (lambda: MultiModalFeatureReconstruction(6, 5), (V5,), ()),
    "gate": (lambda: icipnet.Gate(5), (V5,), ()),
    "intra-scale": (IntraScaleInteraction, (draw(2, 5, 4, 4),), ()),
    "cross-scale": (lambda: CrossScaleAttention(6, 5, 2, 3), (draw(2, 6, 5, 5),), ()),
    "cross-scale as released": (lambda: CrossScaleAttention(6, 5, 2, 3, as_released=True), (draw(2, 6, 5, 5),), ()),
    "rotated": (lambda: RotatedConv(4, dropout=0.0), (draw(2, 4, 5, 5),), ()),
    "DyT": (lambda: icipnet.TanhNorm(4), (draw(2, 4, 5, 5),), ())}


@pytest.mark.parametrize("name", [*TOKENS, *ON_MAPS])
def test_every_operand_gets_its_gradient(name, exact):
    """No path of a block is cut: derivatives by its inputs and by each of its parameters are the true ones."""
    make, tensors, inert = (TOKENS | ON_MAPS)[name]
    module, tensors = lively(make()).eval(), [tensor.clone() for tensor in tensors]

    def function():
        out = module(*tensors, MASK) if name in TOKENS else module(*tensors)
        return [out[0]] if isinstance(out, tuple) else [out]

    groups = {f"input {k}": [tensor] for k, tensor in enumerate(tensors)}
    groups |= {key: [value] for key, value in module.named_parameters() if key not in inert}
    check_gradients(function, groups)


@pytest.mark.parametrize("as_released", [False, True])
def test_every_map_and_scale_gets_its_gradient(as_released, exact):
    features = [draw(2, 4 * 2 ** k, side, side) for k, side in enumerate((16, 8, 4, 2))]
    module = lively(CrossScaleInteraction([4, 8, 16, 32], 2, 2, 4, as_released), 0.3).eval()
    maps = {f"map {k}": [one] for k, one in enumerate(features)}
    parts = {name: list(part.parameters()) for name, part in module.named_modules()
             if name.count(".") == 1 or name in ("reduce", "across")}
    check_gradients(lambda: module(features), {name: part for name, part in parts.items() if part} | maps, 1e-5)
    decoder = lively(Decoder([4, 8, 16, 32], 6, dropout=0.0)).eval()
    parts = {name: [value] for name, value in decoder.named_parameters()}
    check_gradients(lambda: [decoder(features)], parts | maps)


def test_a_stage_hands_every_gradient_back(exact):
    V, L = draw(2, 64, 32), draw(2, 5, 32)
    mask = torch.tensor([[True, True, False, False, False], [True] * 5])
    for changes in ({}, {"bif": False}):
        stage = build(**changes).stages[1].double().eval()
        awake(stage)
        for number in (0, 1):                                  # V for the next stage, the fused map
            groups = {"V": [V], "L": [L], "f": list(stage.icip.f.parameters()), "prompts": [stage.icip.prompts],
                      "attention": list(stage.attention.parameters()), "W": [stage.W.weight],
                      **{name: list(getattr(stage, name).parameters()) for name in ("visual", "project")}}
            if number == 0:
                groups |= {name: list(getattr(stage, name).parameters()) for name in ("gate", "visual_gate")}
            check_gradients(lambda stage=stage, number=number: [stage(V, (8, 8), L, mask)[number]], groups)


@pytest.mark.parametrize("depth, changes", [(4, {}), (1, {"dice_sum": True, "align_corners": True})])
def test_the_loss_differentiates_the_whole_model(depth, changes, exact):
    """Finite differences of L_total by every part of the network: no gradient is cut between words, image and mask."""
    model = build(**changes, depths=(1, 2, 1, 1)).double().train()
    awake(model)
    pictures, tokens, text_mask, image_index = inputs(images=2, per_image=2)
    pictures, batch = pictures.double() / 255, {"masks": masks(4)}

    def function():
        terms = model.criterion(model(255 * pictures, tokens, text_mask, image_index), batch, 0.0)
        return [terms["ce"], terms["dice"]]

    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = re.sub(r"^((norms|decoder|cross_scale)\.\w+|stages\.\d\.\w+)\..*", r"\1", name)
            groups.setdefault(".".join(part.split(".")[:depth]), []).append(parameter)
    check_gradients(function, groups, least=-1)                # inert: see INERT
    check_gradients(function, {"pictures": [pictures]}, least=1e-5)


# ------------------------------------------------------------------------------------------------------- copying out


def test_modules_live_in_a_file_of_their_own(tmp_path, icip):
    """What the docstrings of ICIP and BIF tell an engineer to bring along is all that they need."""
    parts = (icipnet.mlp, icipnet.xavier, icipnet.norm_over_positions, icipnet.check_tokens,
             ImageConditionedInstancePrompt, BilateralInformationFusion, MultiModalFeatureReconstruction)
    for part in parts[4:]:
        helpers = re.search(r"bring along ([\w\s,]+)\.", part.__doc__)[1]
        assert set(re.findall(r"\w+", helpers)) <= {one.__name__ for one in parts}
    imports = "import math\nimport torch\nfrom torch import nn\nfrom torch.nn import functional\n\n"
    path = tmp_path / "copied.py"
    path.write_text(imports + "\n\n".join(map(inspect.getsource, parts)))
    copied = runpy.run_path(str(path))
    module, V, L, mask = icip
    theirs = copied["ImageConditionedInstancePrompt"](channels=5, width=4, prompts=3)
    theirs.load_state_dict(module.state_dict())
    L_o, mask_o = module(V, L, mask)
    for mine, copy in zip((L_o, mask_o), theirs(V, L, mask), strict=True):
        assert torch.equal(mine, copy)
    fusion_, copy = (kind(5, 4, 6, 3) for kind in (BilateralInformationFusion, copied["BilateralInformationFusion"]))
    copy.load_state_dict(fusion_.state_dict())
    assert torch.equal(fusion_(V, L_o, mask_o), copy(V, L_o, mask_o))


def readers():
    """The modules that read visual tokens (B,6,5) and words (B,n,4)."""
    torch.manual_seed(0)
    return [ImageConditionedInstancePrompt(5, 4, 3), BilateralInformationFusion(5, 4, 6, 3), PixelWordAttention(5, 4)]


@pytest.mark.parametrize("module", readers(), ids=lambda module: type(module).__name__)
def test_what_would_be_misread_is_refused_in_one_line(module):
    V, L, mask = torch.randn(2, 6, 5), torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    wrong = {"visual tokens (2, 5, 6), expected (B,P,5)": (V.mT, L, mask),
             "visual tokens (2, 5, 2, 3), expected (B,P,5)": (V.mT.reshape(2, 5, 2, 3), L, mask),
             "visual tokens (2, 2, 3, 5), expected (B,P,5)": (V.reshape(2, 2, 3, 5), L, mask),
             "words (2, 4, 3), expected (2,n,4)": (V, L.mT, mask),
             "words (1, 3, 4), expected (2,n,4)": (V, L[:1], mask),
             "words (2, 3, 4, 1), expected (2,n,4)": (V, L[..., None], mask),
             "text_mask (2, 3) of torch.int64, expected (2, 3) of torch.bool": (V, L, mask.long()),
             "text_mask (2, 3) of torch.float32, expected (2, 3) of torch.bool": (V, L, mask.float()),
             "text_mask (2, 3, 1) of torch.bool, expected (2, 3) of torch.bool": (V, L, mask[..., None])}
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            module(*arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("module", readers(), ids=lambda module: type(module).__name__)
def test_modules_work_with_bfloat16_weights(module):
    V, L, mask = torch.randn(2, 6, 5), torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True] * 3])
    full = module(V, L, mask)
    half = module.bfloat16()(V.bfloat16(), L.bfloat16(), mask)
    full, half = (out[0] if isinstance(out, tuple) else out for out in (full, half))
    assert half.dtype == torch.bfloat16 and (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_the_whole_model_works_with_bfloat16_weights():
    model = build().eval().bfloat16()
    assert torch.isfinite(model(*inputs()[:3])["logits"]).all()


def test_what_must_be_exact_is_float32_under_autocast(icip):
    (module, V, L, mask), normed = icip, []
    with torch.autocast("cpu", torch.bfloat16):
        V_hat, L_o = module.f(V).float(), module(V, L, mask)[0]
        T = module.prompts
        fusion_ = BilateralInformationFusion(5, 4, 6, 3)
        assert fusion_.scores(V[..., :3].bfloat16(), L[..., :3].bfloat16(), mask).dtype == torch.float32
        fusion_.norm.register_forward_pre_hook(lambda m, args: normed.append(args[0].dtype))
        fusion_(V, L, mask)
        assert build()(*inputs()[:3])["logits"].dtype == torch.float32
    expected = torch.tanh(V_hat @ T.mT).softmax(1).mT @ V_hat + T
    assert L_o.dtype == torch.float32 and near(L_o[:, :3], expected, 2e-5) and normed == [torch.float32]


def test_modules_tied_to_a_size_say_so():
    with pytest.raises(ValueError, match=r"got \(2, 4, 6\), expected \(B,6,4\).*channels last"):
        MultiModalFeatureReconstruction(positions=6, width=4)(torch.randn(2, 4, 6))
    features = [torch.randn(1, channels, side, side + 1) for channels, side in ((4, 8), (8, 4), (16, 2), (32, 2))]
    with pytest.raises(ValueError, match="got a coarsest map of 2 x 3, expected 2 x 2.*build it for this one"):
        CrossScaleInteraction([4, 8, 16, 32], side=2, heads=2, key=4)(features)
    features[-1] = features[-1][..., :2]
    for module in (CrossScaleInteraction([4, 8, 16, 32], 2, 2, 4), Decoder([4, 8, 16, 32], 8)):
        with pytest.raises((ValueError, RuntimeError)):        # a map too few, a map too many
            module(features[1:])
        with pytest.raises((ValueError, RuntimeError)):
            module([torch.randn(1, 4, 16, 16), *features])
    with pytest.raises(ValueError):
        Decoder([4, 8, 16], 8)


# ---------------------------------------------------------------------------------------------------------- the model


def test_documented_shapes():
    model = build().eval()
    pictures, tokens, text_mask, image_index = inputs(images=2, per_image=3)
    seen = {}
    for i, stage in enumerate(model.stages):
        stage.register_forward_hook(lambda m, args, out, i=i: seen.update({i: (args[0].shape, args[1], out[1].shape)}))
    outputs = model(pictures, tokens, text_mask, image_index)
    assert list(outputs) == ["logits"]
    assert outputs["logits"].shape == (6, 1, 16, 16) and outputs["logits"].dtype == torch.float32
    for i, (channels, side) in enumerate(zip(TINY.channels, TINY.sides, strict=True)):
        assert seen[i] == ((6, side ** 2, channels), (side, side), (6, side ** 2, channels))
    assert TINY.sides == [16, 8, 4, 2] and dataclasses.replace(TINY, image_size=70).sides == [18, 9, 5, 3]
    assert build(image_size=72)(*inputs(size=72)[:3])["logits"].shape == (2, 1, 18, 18)
    assert "statistics" not in model.state_dict()       # as in every run that was written
    assert Config().sides == [120, 60, 30, 15] and Config().channels == [128, 256, 512, 1024]


@pytest.mark.parametrize("wide, changes", [(64, {}), (96, {"bif": False, "cross_scale": False})])
@torch.no_grad()
def test_fig2_put_together_by_hand(wide, changes):
    """The forward from its parts: pixels by ImageNet's statistics, BERT's words, Swin, fusion, norms, decoder."""
    model = stirred(awake(build(depths=(1, 2, 1, 1), bert_layers=2, **changes)))
    pictures, tokens, text_mask, image_index = inputs(images=2, per_image=2)
    pictures = torch.cat((pictures, pictures.flip(2)), 3)[..., :wide]
    mean, std = (torch.tensor(value)[:, None, None] for value in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (pictures[image_index].double() / 255 - mean) / std
    L = model.bert(tokens, attention_mask=text_mask.long()).last_hidden_state
    V, size = model.swin.embeddings(pixels.float())
    assert size == (16, wide // 4)
    features = []
    for i, layer in enumerate(model.swin.encoder.layers):
        for block in layer.blocks:
            V = block(V, size, always_partition=True)[0]
        V, fused = model.stages[i](V, size, L, text_mask)
        features.append(model.norms[i](fused).mT.unflatten(2, size))
        if i < 3:
            V, size = layer.downsample(V, size), (size[0] // 2, size[1] // 2)
    expected = model.decoder(features)
    if not changes:
        without, expected = expected, model.decoder(model.cross_scale(features))
        assert (without - expected).abs().max() > 0.1 * expected.abs().max()
    assert near(model(pictures, tokens, text_mask, image_index)["logits"], expected)


def test_official_all_takes_the_codes_forms():
    """What `official/all` turns, point by point as in the Notes."""
    settings = {field: value for field, value in OFFICIAL.items() if field not in RECIPE}
    model = build(**settings).eval()
    awake(model)
    pictures, tokens, text_mask, _ = inputs()
    low, seen = [], []
    model.decoder.register_forward_hook(lambda m, args, out: low.append(out))
    for stage in model.stages:
        stage.attention.register_forward_hook(lambda m, args, out: seen.append(args[1][:, :2]))
    logits = model(pictures, tokens, text_mask)["logits"]
    enlarged = nn.functional.interpolate(low[0], (64, 64), mode="bilinear", align_corners=True)
    assert torch.equal(logits, enlarged)                       # logits: enlarged with corners aligned
    for i, (stage, T) in enumerate(zip(model.stages, seen, strict=True)):
        assert stage.icip.f is None                            # (4): the raw T joins the words
        assert torch.equal(T, stage.icip.prompts.expand(2, -1, -1))
        C = 16 * 2 ** i                                        # width: C per half of Q and K, 2C in H and O
        widths = [getattr(stage.attention, name).out_features for name in ("f_q", "f_k", "f_v")]
        assert widths == [2 * C] * 3 and stage.attention.lambda_q1.shape == (1, C)
        assert stage.W.in_features == stage.attention.reconstruct.P_channel[0].in_features == 2 * C
        assert stage.attention.reconstruct.P_token[0].out_features == 16
    assert sum(isinstance(layer, icipnet.TanhNorm) for layer in model.decoder.modules()) == 6
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.decoder.modules())
    assert model.cross_scale.as_released
    model.param_groups(RECIPE)
    sum(model.criterion(model(pictures, tokens, text_mask), {"masks": masks()}, 0.0).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_swin_drops_attention_and_mlp_of_a_sample_each_on_its_own():
    """Swin, LAVT, RMSIN and the official code drop both branches; transformers' layer the attention alone."""
    model = build(drop_path=0.9).train()
    block = model.swin.encoder.layers[3].blocks[0]             # the last: its rate is the whole
    for layer, value in ((block.attention.o_proj, 1.0), (block.mlp.fc2, 3.0)):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, value)
    V = torch.zeros(2000, 4, 128)
    added = block(V, (2, 2), always_partition=True)[0]         # a survivor is divided by 1 - 0.9: 10 and 30
    assert torch.equal(added, added[:, :1, :1].expand_as(added))
    added = added[:, 0, 0].round()
    attention, whole = (added % 30 == 10).float(), (added >= 30).float()
    assert set(added.tolist()) == {0, 10, 30, 40}
    assert abs(attention.mean() - 0.1) < 0.03 and abs(whole.mean() - 0.1) < 0.03
    assert abs((attention * whole).mean() - 0.01) < 0.01
    block.eval()
    assert (block(V, (2, 2), always_partition=True)[0] == 4).all()
    torch.manual_seed(0)
    reference = SwinModel(SwinConfig(**SMALL_SWIN, drop_path_rate=0.0), add_pooling_layer=False)
    model.swin.load_state_dict({name: value for name, value in reference.state_dict().items()
                                if not name.startswith("layernorm.")})
    tokens = torch.randn(1, 4, 128)
    layers = (swin.eval().encoder.layers[3].blocks[0] for swin in (model.swin, reference))
    mine, theirs = (layer(tokens, (2, 2), always_partition=True)[0] for layer in layers)
    assert torch.equal(mine, theirs)


def test_rates_and_sizes_handed_to_the_backbones():
    model = on_meta()
    swin, bert = model.swin.config, model.bert.config
    rates = [block.drop_path.drop_prob if i + j else 0.0 for i, stage in enumerate(model.swin.encoder.layers)
             for j, block in enumerate(stage.blocks)]
    assert np.allclose(rates, np.linspace(0, 0.3, 24))         # official code: rising over the 2 + 2 + 18 + 2 blocks
    assert (swin.hidden_dropout_prob, swin.attention_probs_dropout_prob, swin.initializer_range) == (0, 0, 0.02)
    assert (swin.patch_size, swin.mlp_ratio, swin.qkv_bias, swin.window_size) == (4, 4, True, 12)
    assert (bert.hidden_dropout_prob, bert.attention_probs_dropout_prob, bert.initializer_range) == (0.1, 0.1, 0.02)
    assert (bert.num_hidden_layers, bert.num_attention_heads, bert.intermediate_size) == (12, 12, 3072)
    assert (bert.hidden_size, bert.vocab_size) == (768, 30522)
    dropouts = [layer.p for layer in model.decoder.modules() if isinstance(layer, nn.Dropout)]
    assert dropouts == [0.2] * 3                               # RMSIN's routers
    assert [attention.heads for attention in model.cross_scale.attentions] == [8, 8]


def std(tensor):
    return tensor.detach().std().item()


def test_starts():
    """Silent: starts; Departs: (7), cross-scale."""
    torch.manual_seed(0)
    model = ICIPNet(dataclasses.replace(TINY, width=64, embed=32, init_std=0.05))
    for i, stage in enumerate(model.stages):
        bif = stage.attention
        for layer in (stage.icip.f[0], stage.icip.f[2], bif.f_q, bif.f_k, bif.f_v, stage.W):      # Xavier-uniform
            bound = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.97 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0).all()
            assert abs(std(layer.weight) / (bound / math.sqrt(3)) - 1) < 0.1
        for layer in (*bif.reconstruct.P_token[::2], *bif.reconstruct.P_channel[::2], stage.visual, stage.project):
            bound = 1 / math.sqrt(layer.in_features)                                              # PyTorch's
            assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() > 0
        assert (bif.norm.weight == 1).all() and bif.norm.eps == 1e-5
        for gate in (stage.gate, stage.visual_gate) if i < 3 else ():
            assert all(0.045 < std(layer.weight) < 0.055 for layer in gate.layers[::2])
    assert (model.stages[3].gate, model.stages[3].visual_gate, model.stages[3].intra_scale) == (None, None, None)
    lambdas = torch.cat([getattr(BilateralInformationFusion(1, 1, 1, 768, token_hidden=1), f"lambda_{name}")
                         for name in ("q1", "k1", "q2", "k2") for _ in range(3)], 1)
    assert abs(std(lambdas) - 0.1) < 0.005 and abs(lambdas.mean()) < 0.005
    prompts = ImageConditionedInstancePrompt(4, 768, 8).prompts
    assert abs(std(prompts) - 0.02) < 0.001 and abs(prompts.mean()) < 0.002
    base = build(bif=False, embed=32, width=64).stages[1]
    for layer in (base.W, base.attention.f_q, base.attention.f_k, base.attention.f_v):      # LAVT's: Conv1d's
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.97 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() > 0


def test_starts_of_the_bases_parts():
    torch.manual_seed(0)
    released, own = (CrossScaleAttention(60, 8, 4, 16, as_released=flag) for flag in (True, False))
    for layer in (released.qkv, released.to_map, released.to_out):                                # RMSIN's code
        assert 0.018 < std(layer.weight) < 0.022
    assert (released.to_map.bias == 0).all() and (released.to_out.bias == 0).all()
    for layer in (own.qkv, own.to_map, own.to_out):                                               # PyTorch's
        assert 0.97 / math.sqrt(layer.in_features) < layer.weight.abs().max() <= 1 / math.sqrt(layer.in_features)
    conv = RotatedConv(48)
    assert abs(std(conv.kernel) / math.sqrt(2 / (48 * 9)) - 1) < 0.05                             # kaiming
    assert 0.018 < std(conv.local.weight) < 0.022 and conv.alpha.bias.item() == 0
    for name in ("alpha", "theta"):
        assert 0.018 < std(torch.cat([getattr(RotatedConv(48), name).weight for _ in range(20)])) < 0.022
    assert conv.theta.bias is None and conv.local.bias is None and conv.dropout.p == 0.2


def test_swin_stage_by_stage_is_transformers_own():
    model = build().eval()
    for stage in model.stages[:3]:
        for gate in (stage.gate, stage.visual_gate):
            nn.init.zeros_(gate.layers[2].weight)
    pictures, tokens, text_mask, _ = inputs()
    seen = []
    model.stages[3].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with torch.no_grad():
        model(pictures, tokens, text_mask)
        pixels = (pictures / 255 - model.statistics[0]) / model.statistics[1]
        assert torch.equal(seen[0], model.swin(pixels, always_partition=True).last_hidden_state)
    nn.init.ones_(model.stages[0].gate.layers[2].weight)           # the words act before the stages are merged
    model(pictures, tokens, text_mask)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


@pytest.mark.parametrize("changes", [{"softmax": False}, {"icip": False}, {"bif": False}])
@torch.no_grad()
def test_padding_changes_nothing_in_other_forms(changes):
    model = build(**changes).eval()
    pictures, tokens, text_mask, _ = inputs()
    logits = model(pictures, tokens, text_mask)["logits"]
    assert torch.allclose(model(pictures, torch.where(text_mask, tokens, 9), text_mask)["logits"], logits, atol=1e-5)
    longer = [nn.functional.pad(value, (0, 3)) for value in (tokens, text_mask)]
    assert torch.allclose(model(pictures, *longer)["logits"], logits, atol=1e-5)


# Zero by construction: a constant under a softmax over keys, or before a norm over positions or batch
INERT = [
    r"\.k_proj\.bias", r"\.attention\.self\.key\.bias", r"stages\.\d\.attention\.f_[qk]\.bias", r"stages\.\d\.W\.bias",
    r"stages\.\d\.attention\.reconstruct\.P_channel\.2\.bias",
    r"stages\.\d\.intra_scale\.rounds\.\d\.(0\.0|1\.0\.[01]|1\.1\.1)\.weight",     # one channel, scaled by batch norms
    r"cross_scale\.(reduce|expand\.[01])\.bias", r"cross_scale\.(local|weight|shift)\.\d\.0\.bias",
    r"cross_scale\.attentions\.\d\.(coarser\.\d\.0|local|to_out|out\.2)\.bias",
    r"cross_scale\.(across|per_scale\.\d)\.[015]\.bias"]
WITH_CROSS_SCALE = [r"norms\.\d\.bias"]                         # its batch norms take away what is the same everywhere
WITHOUT_BIF = [r"stages\.\d\.attention\.f_v\.bias", r"bert\.encoder\.layer\.1\.output\.LayerNorm\.bias"]


@pytest.mark.parametrize("changes, inert", [({}, INERT + WITH_CROSS_SCALE),
                                            ({"icip": False, "bif": False, **PLAIN}, INERT + WITHOUT_BIF)])
def test_every_parameter_learns_from_both_terms(changes, inert):
    model = build(image_size=96, dice_weight=0.5, **changes).train()
    awake(model)
    groups = model.param_groups(RECIPE)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    pictures, tokens, text_mask, _ = inputs(images=4, size=96)
    tokens[0, :3] = torch.tensor([2, 1, 3])
    outputs = model(pictures, tokens, text_mask)
    for term in model.criterion(outputs, {"masks": masks(4, 96)}, 0.5).values():
        model.zero_grad()
        term.backward(retain_graph=True)
        weak = {name for name, parameter in model.named_parameters() if parameter.grad.abs().max() < 1e-6}
        unexplained = {name for name in weak if not any(re.search(pattern + "$", name) for pattern in inert)}
        assert not unexplained, unexplained


class OnlyOnMeta(TorchFunctionMode):
    """Refuses every call that gives a tensor of another device than the model's, also where PyTorch would let it in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.is_meta, function
        return result


@pytest.mark.parametrize("changes", [{}, {"bif": False, "rmsin": True}, {"softmax": False, "dice_sum": True}], ids=str)
def test_what_is_made_on_the_way_is_on_the_models_device(changes, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())     # it knows no meta
    model = build(**changes).to("meta").train()
    pictures, tokens, text_mask, image_index, truth = (x.to("meta") for x in (*inputs(images=2, per_image=2), masks(4)))
    with OnlyOnMeta():
        for given in ((pictures, tokens, text_mask, image_index), (pictures, tokens[:2], text_mask[:2])):
            outputs = model(*given)
            model.criterion(outputs, {"masks": truth[:len(given[1])]}, 0.0)


def test_a_single_expression_trains():
    pictures, tokens, text_mask, _ = inputs(images=1, size=96)
    model = ICIPNet(dataclasses.replace(Config.tiny(), vocab_size=40)).train()
    sum(model.criterion(model(pictures, tokens, text_mask), {"masks": masks(1, 96)}, 0.0).values()).backward()
    assert [len(attention.coarser) for attention in model.cross_scale.attentions] == [1, 1]


def test_what_is_frozen():
    pictures, tokens, text_mask, _ = inputs()
    for freeze in (False, True):
        model = build(freeze=freeze, bert_layers=3, bert_trained_layers=2, bert_embeddings=False, dropout=0.1).train()
        model.requires_grad_(False).param_groups(RECIPE)        # whatever was said before, as by models.load
        learning = {name for name, parameter in model.bert.named_parameters() if parameter.requires_grad}
        assert {name.rsplit("layer.", 1)[-1][0] for name in learning} == (set() if freeze else {"0", "1"})
        assert not model.bert.encoder.layer[2].training and not model.bert.embeddings.training
        assert model.bert.encoder.layer[0].training is not freeze
        sum(model.criterion(model(pictures, tokens, text_mask), {"masks": masks()}, 0.0).values()).backward()
        for name, parameter in model.named_parameters():
            frozen = name.startswith("bert.") and name.removeprefix("bert.") not in learning
            assert (parameter.grad is None) is frozen, name


def test_another_input_size_is_refused_with_the_remedy():
    pictures, tokens, text_mask, _ = inputs(size=96)
    with pytest.raises(ValueError, match=r"96 x 96: the token mixture of Eq. \(10\) ties.*image_size=64.*build and"):
        build()(pictures, tokens, text_mask)
    with pytest.raises(ValueError, match=r"96 x 96: the token mixture of Eq. \(10\) ties"):
        build(**PLAIN)(pictures, tokens, text_mask)
    with pytest.raises(ValueError, match="96 x 96: the cross-scale interaction ties.*image_size=64; resize"):
        build(bif=False)(pictures, tokens, text_mask)
    with pytest.raises(ValueError, match=r"got \(1, 7, 4\), expected \(B,6,4\).*weights for 6 visual tokens"):
        MultiModalFeatureReconstruction(positions=6, width=4)(torch.randn(1, 7, 4))
    assert build(bif=False, **PLAIN)(pictures[..., :72, :], tokens, text_mask)["logits"].shape == (2, 1, 18, 24)
    assert build(bif=False, **PLAIN)(pictures[..., :68], tokens, text_mask)["logits"].shape == (2, 1, 24, 17)
    assert build(image_size=96)(pictures, tokens, text_mask)["logits"].shape == (2, 1, 24, 24)


def test_settings_reach_the_modules():
    biases = (0.2, 0.356, 0.471, 0.556)                        # [16]: 0.8 - 0.6 exp(-0.3 (l - 1))
    assert np.allclose(biases, [0.8 - 0.6 * math.exp(-0.3 * i) for i in range(4)], atol=1e-3)
    for k, field in enumerate(("query_norm", "softmax", "sublayer_norm")):
        bif = build(**{field: False}).stages[0].attention
        assert [bif.query_norm, bif.softmax, bif.norm is not None] == [k != 0, k != 1, k != 2]
    model = build(value_mult=3, lambda_bias=biases, prompts=3, token_hidden=5, cross_heads=4, cross_key=8,
                  decoder_width=6, router_dropout=0.3, intra_scale=False)
    for stage, bias in zip(model.stages, biases, strict=True):
        bif = stage.attention
        assert bif.lambda_bias == bias and bif.f_v.out_features == stage.W.in_features == 3 * 32
        assert bif.reconstruct.P_token[0].out_features == 5 and len(stage.icip.prompts) == 3
        assert stage.intra_scale is stage.visual_gate is None
    assert all(one.heads == 4 and one.qkv.out_features == 4 * 4 * 8 for one in model.cross_scale.attentions)
    assert model.decoder.classify.in_channels == 6 and model.decoder.refine[0][0].dropout.p == 0.3
    assert model.bert.config.initializer_range == model.swin.config.initializer_range == TINY.init_std == 0.1
    assert model(*inputs()[:3])["logits"].shape == (2, 1, 16, 16)
    plain = build(**PLAIN)
    assert not hasattr(plain, "cross_scale") and type(plain.decoder.refine[0][0]) is nn.Conv2d
    assert plain(*inputs()[:3])["logits"].shape == (2, 1, 16, 16)


@pytest.mark.parametrize("changes, message", [
    ({"bif_width": "C"}, "bif_width=C: expected D or stage"), ({"decoder_norm": "layer"}, "expected batch or tanh"),
    ({"depths": (1, 1)}, "expected four numbers"), ({"prompts": 0}, "expected at least 1, or icip=False")])
def test_impossible_settings_are_refused(changes, message):
    assert dataclasses.replace(TINY, prompts=1).prompts == 1 and dataclasses.replace(TINY, icip=False, prompts=0)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


# --------------------------------------------------------------------------------------------------------- paper size


def on_meta(**changes):
    with torch.device("meta"):
        return ICIPNet(Config(**changes))


# In the authors' code the last stage has gates (and the intra-scale block) that lead nowhere; here they are not built.
DEAD_GATE, DEAD_BLOCK = 2 * 1024 ** 2, 38


def test_parameter_counts_part_by_part():
    model = on_meta()
    base = [(stage.gate, stage.visual_gate, stage.intra_scale) for stage in model.stages]
    assert count(model.swin) == 86_876_536
    assert count(model.norms) == 3_840
    assert sum(count(gate) for gate, _, _ in base) == 2_785_280 - DEAD_GATE
    assert sum(count(gate) for _, gate, _ in base) == 2_785_280 - DEAD_GATE
    assert sum(count(block) for _, _, block in base) == 152 - DEAD_BLOCK
    assert count(model.cross_scale) == 9_492_246
    assert count(model.decoder) == 20_670_981
    assert count(model.bert) == 108_891_648
    assert count(model.stages) - sum(count(*parts) for parts in base) == 36_478_645
    assert count(model) - count(model.bert) == 159_092_960 - 2 * DEAD_GATE - DEAD_BLOCK
    assert [stage.attention.reconstruct.P_token[0].in_features for stage in model.stages] == [14400, 3600, 900, 225]


def test_parameter_counts_of_the_bases():
    lavt = on_meta(icip=False, bif=False, **PLAIN)
    assert count(lavt) - count(lavt.bert) == 118_847_866 - DEAD_GATE
    assert count(lavt.decoder) == 20_651_010
    assert sum(count(stage) - count(stage.gate) for stage in lavt.stages) == 8_531_200
    rmsin = on_meta(icip=False, bif=False)
    assert count(rmsin) - count(rmsin.bert) == 131_145_515 - 2 * DEAD_GATE - DEAD_BLOCK
    assert count(on_meta(decoder_norm="tanh").decoder) == 20_670_987


def test_parameter_groups_are_the_codes():
    model = on_meta()
    decayed, plain = model.param_groups(RECIPE)
    assert (len(plain["params"]), sum(p.numel() for p in plain["params"]), plain["weight_decay"]) == (136, 258_296, 0.0)
    assert decayed["weight_decay"] == 0.01 and decayed["lr"] == plain["lr"] == 3e-5
    layers = count(*model.bert.encoder.layer[:10])
    assert sum(p.numel() for p in decayed["params"]) == count(model) - count(model.bert) + layers - 258_296


# --------------------------------------------------------------------------------------- tokenizer, published weights


def test_word_tokenizer():
    words = data.WordTokenizer(["red", "ship", ","], 6, icipnet.SPECIAL_TOKENS)
    tokens, text_mask = words(["Red ship, zebra", "ship"])
    assert tokens.tolist() == [[2, 4, 5, 6, 1, 3], [2, 5, 3, 0, 0, 0]]
    assert text_mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert len(words) == 7 and words.words == ["red", "ship", ","]
    assert torch.equal(pickle.loads(pickle.dumps(words))(["ship"])[0], words(["ship"])[0])


SMALL_SWIN = {"window_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "ship", "##s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as a user would fill it: both backbones as published (Swin with classifier, BERT with its heads)."""
    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    SwinForImageClassification(SwinConfig(**SMALL_SWIN)).save_pretrained(root / "swin-base-patch4-window12-384-in22k")
    bert = BertConfig(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                      intermediate_size=32)
    BertForPreTraining(bert).half().save_pretrained(root / "bert-base-uncased")
    settings = root / "swin-base-patch4-window12-384-in22k/config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "dtype": "float16"}))       # a file may say so
    BertTokenizer(vocab={word: k for k, word in enumerate(VOCABULARY)}).save_pretrained(root / "bert-base-uncased")
    return root


def test_weights_from_a_folder(folder, capsys):
    model = build(pretrained=str(folder), vocab_size=len(VOCABULARY))
    assert model.load_pretrained() == {"swin.": "microsoft/swin-base-patch4-window12-384-in22k",
                                       "bert.": "google-bert/bert-base-uncased"}
    printed = capsys.readouterr().out
    assert f"{len(model.swin.state_dict())} tensors" in printed and f"{len(model.bert.state_dict())} tensors" in printed
    reference = SwinModel.from_pretrained(folder / "swin-base-patch4-window12-384-in22k", add_pooling_layer=False,
                                          dtype=torch.float32)
    for name, tensor in model.swin.state_dict().items():
        assert torch.equal(tensor, reference.state_dict()[name]), name
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    words = icipnet.tokenizer(model.config)
    long = data.Sample("0", 0, None, "red " * 19, "train", "0", "0", None, None)
    assert words.length == 20 and data.cut([long], words).startswith("1 of 1")
    assert words(["red " * 30])[0][0, [0, 1, 18, 19]].tolist() == [2, 5, 5, 3]   # Silent: text, [SEP] is kept
    tokens, text_mask = words(["Red ships", "red"])
    assert tokens.shape == (2, 20) and tokens[0, :5].tolist() == [2, 5, 6, 7, 3]
    assert text_mask.sum(1).tolist() == [5, 3]


def test_sentences_reach_berts_tokenizer_as_they_are():
    """It lower-cases by itself if it is the uncased one: another BERT may be named."""
    def tokenizer(texts, **options):
        return {"input_ids": torch.tensor([[len(text), text.count("R")] for text in texts]),
                "attention_mask": torch.tensor([[1, 0]])}

    tokens, text_mask = icipnet.BertWords(tokenizer, 2)(["Red"])
    assert tokens.tolist() == [[3, 1]] and text_mask.tolist() == [[True, False]]


def microsoft_names(swin):
    """The tensors of transformers' Swin under the names of Microsoft's files, with what those hold besides."""
    file, state = {}, swin.state_dict()
    for name, tensor in state.items():
        name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        name = name.replace("embeddings.norm", "patch_embed.norm").replace("encoder.layers", "layers")
        name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        name = name.replace("attention.relative_position_bias.", "attn.").replace("attention.o_proj", "attn.proj")
        name = re.sub("^layernorm", "norm", name)
        if ".attention.q_proj." in name:
            parts = [state[key] for part in "qkv" for key in
                     [name.replace("layers.", "encoder.layers.", 1).replace("q_proj", f"{part}_proj")]]
            file[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "_proj." not in name:
            file[name] = tensor
    file["head.weight"], file["head.bias"] = torch.zeros(9, 128), torch.zeros(9)
    file["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    file["layers.0.blocks.0.attn_mask"] = torch.zeros(4, 16, 16)
    return file


@pytest.mark.parametrize("wrap", [lambda tensors: {"model": tensors}, dict], ids=["model", "plain"])
def test_weights_in_microsofts_naming(wrap, folder, tmp_path):
    torch.manual_seed(4)
    source = SwinModel(SwinConfig(**SMALL_SWIN), add_pooling_layer=False)
    path = tmp_path / "swin_base_patch4_window12_384_22k.pth"
    torch.save(wrap(microsoft_names(source)), path)
    model = build(image_backbone=path.name, weights_dir=str(tmp_path), pretrained="hub",
                  text_backbone=str(folder / "bert-base-uncased"), vocab_size=len(VOCABULARY))
    model.load_pretrained()
    pixels = torch.randn(1, 3, 64, 64)
    source.layernorm = nn.Identity()
    with torch.no_grad():
        expected = source.eval()(pixels, always_partition=True).last_hidden_state
        assert torch.equal(model.swin.eval()(pixels, always_partition=True).last_hidden_state, expected)


def test_files_written_on_a_card_are_read_where_there_is_none(tmp_path, monkeypatch):
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *given, **options: seen.append(options) or load(*given, **options))
    torch.save({"a": torch.ones(1)}, tmp_path / "file.pth")
    icipnet.read_pth(tmp_path / "file.pth")
    assert seen == [{"map_location": "cpu", "weights_only": True}]


def test_wrong_weights_are_named(folder, tmp_path):
    def load(**changes):
        return build(**{"pretrained": str(folder), "vocab_size": len(VOCABULARY), **changes}).load_pretrained()

    with pytest.raises(ValueError, match="swin-base.*does not fit embed, depths, swin_heads, window: "):
        load(window=6)
    with pytest.raises(ValueError, match="bert-base-uncased.*does not fit width, bert_layers, bert_ffn, vocab_size: "):
        load(bert_layers=1, bert_trained_layers=1)
    with pytest.raises(FileNotFoundError, match="no such folder; download microsoft/swin.* from huggingface.co.*=DIR"):
        load(pretrained=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file; download swin_base.*README of github.*=DIR"):
        load(image_backbone="swin_base_patch4_window12_384_22k.pth")
    with pytest.raises(FileNotFoundError, match="nobody/nothing: not reached on the hub.*HF_ENDPOINT.*pretrained=DIR"):
        load(pretrained="hub", image_backbone="nobody/nothing")
    shutil.copytree(folder / "bert-base-uncased", tmp_path / "bert")
    file = tmp_path / "bert/model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "bert.encoder.layer.1.output.dense.bias"
    wrong = {**tensors, name + "es": torch.zeros(3)}, {key: value for key, value in tensors.items() if key != name}
    for changed in wrong:                                      # one too many, one too few
        safetensors.torch.save_file(changed, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"1 of \d+ tensors.*first .*encoder.layer.1.output.dense.bias"):
            load(pretrained="hub", text_backbone=str(tmp_path / "bert"),
                 image_backbone=str(folder / "swin-base-patch4-window12-384-in22k"))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "half.pth").write_bytes((tmp_path / "list.pth").read_bytes()[:300])
    for name in ("broken.pth", "list.pth", "empty.pth", "half.pth"):
        with pytest.raises(ValueError, match=f"{name}: damaged, or not as Microsoft has it; download"):
            load(pretrained=str(tmp_path), image_backbone=name)
    (tmp_path / "bert-base-uncased").mkdir()
    with pytest.raises(ValueError, match="bert-base-uncased: not a folder as transformers saves it.*neither vocab.txt"):
        icipnet.tokenizer(dataclasses.replace(TINY, pretrained=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no-such/model: not reached.*HF_ENDPOINT.*pretrained=DIR"):
        icipnet.tokenizer(dataclasses.replace(TINY, pretrained="hub", text_backbone="no-such/model"))
    with pytest.raises(ValueError, match="a vocabulary of 8 words, expected vocab_size=40"):
        icipnet.tokenizer(dataclasses.replace(TINY, pretrained=str(folder)))
