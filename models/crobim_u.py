"""CroBIM-U: where is the referred object likely to be got wrong, and what is done about it there.

Paper
    Sun, Dong, Jiang, Liu, Gu. CroBIM-U: Uncertainty-Driven Referring Remote Sensing Image Segmentation.
    arXiv:2601.03490, 2026, https://arxiv.org/abs/2601.03490
Official
    none released, nor is the code of its base, CroBIM (arXiv:2410.08613). No code was copied.
Idea
    A scorer (RUS) reads the coarsest visual tokens and the words and predicts a map U of where the mask will be wrong;
    the model's own current errors supervise it. A gate (UGF) lets the words act on the visual tokens where U is high,
    before decoding; a small head (UDLR) corrects the decoded logits where U is high.
Shapes
    N images, B expressions (M in the shared files), S image side, s stride (4, 8, 16, 32), h,w = S/s, C width 256,
    L tokens with padding, D a text tower's width
    V, T        visual tokens (B,h*w,C) of a level, words (B,L,C);  V_plus: V^+
    m           the paper's padding mask, 1 = ignored; here text_mask (B,L), True = a real token, its inverse
    U, U_tilde  uncertainty logits (B,1,S/32,S/32); at S x S
    U_p         sigmoid of U_tilde
    F           mask feature (B,C,S/4,S/4)
    P_fg, P_ref logits before and after refinement (B,1,S,S);  M the refinement mask (B,1,S,S);  y the true masks
Equations
    Eq. (1)                             MultiScaleEncoder.forward, one Phi is EncoderLayer
    Eq. (2)                             CroBIMU.decode, by resize; its first line is (10)
    Eq. (3)                             ReferringUncertaintyScorer.forward
    Eq. (4), Eq. (5)                    online_error; (5) again in losses.py, where it trains
    Eq. (6), Eq. (7), Eq. (8)           losses.py, uncertainty_loss, called by CroBIMU.criterion
    Eq. (9), Eq. (10), Eq. (11), Eq. (12)   UncertaintyGatedFusion.forward
    Eq. (13), Eq. (14), Eq. (15), Eq. (16)  UncertaintyDrivenLocalRefinement.forward
    Eq. (17), Eq. (18)                  CroBIMU.criterion
    Eq. (19), Eq. (20)                  metrics.py
Where the paper is departed from or silent: Notes, at the end of this file.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer, ConvNextConfig, ConvNextModel

from losses import binary_cross_entropy, dice_loss, uncertainty_loss

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # ImageNet's: our choice, ConvNeXt's usual ones
MAPS = ("uncertainty", "refine_mask", "coarse")
AT_ONCE = 2 ** 26                                   # width * S * S of what a CPU decodes together: the caches' limit


@dataclass(frozen=True)
class Config:
    image_size: int = 480                           # IV-B1
    text_length: int = 20                           # IV-B1
    pretrained: str = "hub"                         # "hub", "none", or a folder with one entry per backbone
    weights_dir: str = "weights"                    # where files lie that are on no hub
    image_backbone: str = "pretrained_convnext_base.pth"        # IV-B1: SMLFR; or Meta's .pth, or a hub name
    text_backbone: str = "google-bert/bert-base-uncased"        # IV-B1; uncased: our choice
    freeze: bool = False                            # our choice: both towers learn

    convnext_depths: tuple[int, ...] = (3, 3, 27, 3)            # IV-B1: ConvNeXt-Base
    convnext_widths: tuple[int, ...] = (128, 256, 512, 1024)    # Departs: channels
    layer_scale: float = 1e-6                       # ConvNeXt's
    drop_path: float = 0.3                          # our choice: LAVT's
    vocab_size: int = 30522                         # IV-B1: BERT-base
    bert_width: int = 768                           # IV-B1
    bert_layers: int = 12                           # IV-B1
    bert_heads: int = 12                            # BERT-base's
    bert_ffn: int = 3072                            # BERT-base's
    dropout: float = 0.1                            # BERT's; in Eq. (9) our choice

    width: int = 256                                # III-B, C
    norm_groups: int = 32                           # our choice: Mask2Former's
    encoder_layers: int = 6                         # III-B
    heads: int = 8                                  # III-B
    ffn_width: int = 1024                           # our choice: Mask2Former's
    points: int = 4                                 # our choice: Mask2Former's, per level
    prior: float = 0.05                             # our choice: about the foreground's share of the pixels

    rus: bool = True                                # Table V's switches; ugf and udlr need rus
    ugf: bool = True
    udlr: bool = True
    tau: float = 0.5                                # our choice, Eq. (13)
    temperature: float = 0.1                        # our choice, t of Eq. (13)
    blur: int = 0                                   # our choice, side of the mean in Eq. (13), odd; 0 = none
    refine: str = "literal"                         # or "cheap", Departs: refine
    refine_hidden: int = 64                         # our choice, Eq. (15)
    refine_init: float = 0.0                        # Eq. (15): std of the last layer, "near-zero"

    seg_weights: tuple[float, ...] = (0.9, 0.1)     # our choice: RMSIN's cross-entropy and Dice
    class_weights: tuple[float, ...] = (0.9, 1.1)   # our choice: LAVT's background and foreground
    dice_sum: int = 0                               # RMSIN's Dice: both classes, summed over a card's expressions, 4
    seg_on_refined: bool = False                    # True: L_seg, too, sees P_ref, see Silent: (17) (18)
    lambda_seg: float = 1.0                         # Eq. (18) has no such factor; 2: the control rows
    lambda_unc: float = 0.1                         # our choice, Eq. (18)
    lambda_ref: float = 1.0                         # our choice, Eq. (18)
    unc_warmup: float = 0.05                        # our choice: share of the run before L_unc counts
    lambda_s: float = 1.0                           # Eq. (7)
    delta: float = 0.5                              # Eq. (7)
    clamp: float | None = None                      # Eq. (8) as printed; a number bounds it, see Silent: clamp
    error_blur: bool = False                        # Eq. (5): z = Blur(e)

    def __post_init__(self):
        if (self.ugf or self.udlr) and not self.rus:
            raise ValueError("ugf and udlr read the uncertainty of rus; set rus=True, or ugf=False and udlr=False")
        if self.refine not in ("literal", "cheap") or self.blur and self.blur % 2 == 0:
            raise ValueError(f"refine={self.refine}, blur={self.blur}: expected literal or cheap; 0 or an odd number")
        if self.width % 4 or self.width % self.heads or self.width % self.norm_groups:
            raise ValueError(f"width={self.width}: expected a multiple of 4, of heads={self.heads} "
                             f"and of norm_groups={self.norm_groups}")

    @classmethod
    def tiny(cls):
        return cls(image_size=128, pretrained="none", vocab_size=256,               # U_p at stride 32 has 4x4 cells
                   convnext_depths=(1, 1, 2, 1), convnext_widths=(24, 48, 72, 96), layer_scale=1.0, drop_path=0.0,
                   bert_width=48, bert_layers=2, bert_heads=4, bert_ffn=96, dropout=0.0,
                   width=48, norm_groups=8, encoder_layers=2, heads=4, ffn_width=96, refine="cheap", refine_hidden=4,
                   points=2, seg_weights=(1.0, 1.0), class_weights=(1.0, 1.0),      # Dice finds small objects sooner
                   clamp=100.0)                     # Silent: clamp; the preset was tuned with it


# ------------------------------------------------------------------------ III-B: interaction stages and mask decoder


def resize(maps, size):
    """(B,C,h,w) -> (B,C,*size), bilinear; uncertainty is resized as logits, III-B."""
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)  # Silent: resizing


def xavier(*layers):
    """Start linear layers after Mask2Former."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)                                 # Silent: start
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class Attention(nn.Module):
    """Multi-head attention: queries (B,Q,C), keys and values (B,K,D) -> (B,Q,C); mask (B,K) bool, True = may be read.

    width: C, a multiple of heads; context_width: D where it is not C. Takes along: xavier.
    """

    def __init__(self, width, heads, context_width=None):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width}: expected a multiple of heads={heads}")
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width or width, width, bias=False)      # a key bias cancels in the softmax
        self.to_v = nn.Linear(context_width or width, width)
        self.to_out = nn.Linear(width, width)
        xavier(self.to_q, self.to_k, self.to_v, self.to_out)

    def forward(self, queries, keys, values, mask=None):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask of words: expected bool, True = a real token, got {mask.dtype}; "
                             "say .bool() where 1 is a real token, == 0 where 1 is padding")
        q, k, v = (rearrange(tokens, "b n (a d) -> b a n d", a=self.heads)
                   for tokens in (self.to_q(queries), self.to_k(keys), self.to_v(values)))
        mixed = functional.scaled_dot_product_attention(                      # (B,heads,Q,C/heads)
            q, k, v, attn_mask=None if mask is None else mask[:, None, None])
        return self.to_out(rearrange(mixed, "b a n d -> b n (a d)"))


def feed_forward(width, hidden):
    """(B,n,C) -> (B,n,C), each token by itself."""
    layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
    xavier(layers[0], layers[2])
    return layers


def grid_centres(size, device):
    """Centres (x, y) of the cells of an h x w grid over the unit square -> (h*w,2)."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in size)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def sine_positions(centres, width):
    """Points (n,2) of the unit square -> (n,width): sines and cosines of x and of y at width/4 frequencies."""
    steps = torch.arange(width // 4, device=centres.device) / (width // 4)
    angles = centres[:, :, None] * (2 * math.pi * 10000 ** -steps)            # (n,2,C/4)
    return torch.cat((angles.sin(), angles.cos()), -1).flatten(1)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021): each head reads `points` places per level and weighs them."""

    def __init__(self, width, heads, levels, points):
        super().__init__()
        self.heads, self.levels = heads, levels
        self.value, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        xavier(self.value, self.to_out)
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(parameter)
        # Each head starts out looking in a direction of its own, its points 1, 2, ... cells away.
        angles = torch.arange(heads) * (2 * math.pi / heads)
        ring = torch.stack((angles.cos(), angles.sin()), -1)                  # (heads,2)
        steps = torch.arange(1, points + 1).view(1, 1, points, 1)
        ring = (ring / ring.abs().amax(-1, keepdim=True)).view(heads, 1, 1, 2) * steps              # (heads,1,points,2)
        self.offsets.bias.data.copy_(ring.expand(-1, levels, -1, -1).flatten())

    def forward(self, queries, tokens, centres, sizes):
        """queries, tokens (B,n,C), n = sum of h*w over sizes; centres (n,2) -> (B,n,C). Samples in float32."""
        value = rearrange(self.value(tokens), "b n (a d) -> (b a) d n", a=self.heads)
        offsets = rearrange(self.offsets(queries), "b n (a l p c) -> l c (b a) p n", a=self.heads, l=self.levels, c=2)
        weights = rearrange(self.weights(queries), "b n (a p) -> (b a) 1 p n", a=self.heads).float().softmax(2)
        weights = weights.chunk(self.levels, 2)                               # for each level (B*heads,1,points,n)
        values = value.float().split([h * w for h, w in sizes], -1)
        centre_x, centre_y = (2 * centres - 1).unbind(-1)                     # (n,) in [-1,1]
        mixed = 0
        for level, (h, w), (x, y), weight in zip(values, sizes, offsets.float(), weights, strict=True):
            where = torch.stack((centre_x + x * (2 / w), centre_y + y * (2 / h)), -1)           # (B*heads,points,n,2)
            sampled = functional.grid_sample(level.unflatten(-1, (h, w)), where, align_corners=False)
            mixed = mixed + (sampled * weight).sum(2)                         # (B*heads,C/heads,n)
        return self.to_out(rearrange(mixed, "(b a) d n -> b n (a d)", a=self.heads).to(self.to_out.weight.dtype))


class EncoderLayer(nn.Module):
    """Phi of Eq. (1): the words act on the visual tokens, then the tokens of all levels mix."""

    def __init__(self, width, heads, levels, points, ffn_width):
        super().__init__()
        self.read_words = Attention(width, heads)
        self.mix = DeformableAttention(width, heads, levels, points)
        self.ffn = feed_forward(width, ffn_width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, V, T, text_mask, positions, centres, sizes):
        """V (B,n,C), the tokens of all levels; T (B,L,C); positions (n,C); centres (n,2) -> V_plus (B,n,C)."""
        read = self.norms[0](V + self.read_words(V + positions, T, T, text_mask))                   # Silent: Phi
        mixed = self.norms[1](read + self.mix(read + positions, read, centres, sizes))
        return self.norms[2](mixed + self.ffn(mixed))


class MultiScaleEncoder(nn.Module):
    """III-B: transformer-based interaction over strides 8, 16 and 32. Takes along: all from xavier to EncoderLayer."""

    def __init__(self, width, heads, layers, points, ffn_width, levels=3):
        super().__init__()
        self.level_embedding = nn.Parameter(torch.randn(levels, width))
        self.layers = nn.ModuleList(EncoderLayer(width, heads, levels, points, ffn_width) for _ in range(layers))

    def forward(self, features, T, text_mask):
        """features, a list of (B,C,h,w); T (B,L,C) -> the features, updated; positions, a list of (h*w,C)."""
        sizes = [tuple(feature.shape[-2:]) for feature in features]
        centres = [grid_centres(size, T.device) for size in sizes]
        positions = [(sine_positions(centre, T.shape[-1]) + embedding).to(embedding.dtype)          # Silent: positions
                     for centre, embedding in zip(centres, self.level_embedding, strict=True)]
        V = torch.cat([rearrange(feature, "b c h w -> b (h w) c") for feature in features], 1)      # Departs: (1)
        where = torch.cat(positions), torch.cat(centres)                                            # (n,C), (n,2)
        for Phi in self.layers:
            V = Phi(V, T, text_mask, *where, sizes)                                                 # (B,n,C)
        tokens = zip(V.split([h * w for h, w in sizes], 1), sizes, strict=True)
        features = [rearrange(V_plus, "b (h w) c -> b c h w", h=h) for V_plus, (h, w) in tokens]  # Eq. (1)
        return features, positions


class MaskDecoder(nn.Module):
    """III-E's mask feature F and III-B's logits at stride 4. Takes along: resize, xavier, Attention, feed_forward."""

    def __init__(self, width, heads, groups, prior, levels=3):
        super().__init__()
        self.smooth = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(groups, width),
                                    nn.ReLU())
        self.read_image = nn.ModuleList(Attention(width, heads) for _ in range(levels))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(levels))
        self.embed = feed_forward(width, width)
        self.bias = nn.Parameter(torch.tensor(math.log(prior / (1 - prior))))                       # Silent: start

    def forward(self, feature4, features, positions, T):
        """feature4 (B,C,S/4,S/4); features, positions from the encoder; T (B,L,C) -> F (B,C,S/4,S/4), (B,1,S/4,S/4)."""
        F = self.smooth(feature4 + resize(features[0], feature4.shape[-2:]))  # (B,C,S/4,S/4)
        query = T[:, :1]                                                      # (B,1,C), Silent: P_fg, the word at [CLS]
        for read, norm, level, places in zip(self.read_image, self.norms, features[::-1], positions[::-1], strict=True):
            tokens = rearrange(level, "b c h w -> b (h w) c")                 # coarse to fine
            query = norm(query + read(query, tokens + places, tokens))
        logits = torch.einsum("bqc,bchw->bqhw", self.embed(query), F).float()                       # (B,1,S/4,S/4)
        return F, logits / math.sqrt(query.shape[-1]) + self.bias


# ----------------------------------------------------------- III-C to III-E: the paper's three plug-and-play modules


class ReferringUncertaintyScorer(nn.Module):
    """III-C, RUS: where the mask is likely to be wrong, as logits. Fits any two-tower model.

    width: C of the features; text_width: D of the words where it is not C.
    forward: features (B,C,h,w), the coarsest level, channels first; words (B,L,D); text_mask (B,L) bool, True = a real
    token -> U (B,1,h,w). losses.uncertainty_loss trains it on the model's own mask. Takes nothing along.
    """

    def __init__(self, width, text_width=None):
        super().__init__()
        self.W_v = nn.Linear(width, width, bias=False)
        self.W_t = nn.Linear(text_width or width, width, bias=False)
        self.gamma = nn.Parameter(torch.tensor(width ** -0.5))
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))       # Silent: (3)
        nn.init.eye_(self.W_v.weight)
        nn.init.eye_(self.W_t.weight)
        nn.init.normal_(self.mlp[-1].weight, std=0.01)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, features, words, text_mask):
        if features.ndim != 4 or features.shape[1] != self.W_v.in_features:
            raise ValueError(f"features: expected (B,{self.W_v.in_features},h,w), got {tuple(features.shape)}")
        if text_mask.dtype != torch.bool:
            raise ValueError(f"text_mask: expected bool, True = a real token, got {text_mask.dtype}; "
                             "say .bool() where 1 is a real token, == 0 where 1 is padding")
        V = rearrange(features, "b c h w -> b (h w) c")                       # (B,h*w,C)
        V_prime, T_prime = self.W_v(V), self.W_t(words)                       # (B,h*w,C), (B,L,C)
        # T~ = A T' with A = Softmax(gamma V' T'^T); Departs: (3), over the real words
        T_tilde = functional.scaled_dot_product_attention(
            self.gamma * V_prime, T_prime, T_prime, text_mask[:, None], scale=1.0)                  # (B,h*w,C)
        u = self.mlp(torch.cat((V, T_tilde), -1))  # Eq. (3)
        return rearrange(u, "b (h w) 1 -> b 1 h w", h=features.shape[-2])     # (B,1,h,w)


def online_error(logits, masks):
    """P_fg and y, (B,1,H,W) -> the present prediction and where it errs, bool (B,1,H,W)."""
    prediction = logits.sigmoid() > 0.5  # StopGrad: a comparison has no gradient  # Eq. (4)
    return prediction, prediction != masks  # Eq. (5)


class UncertaintyGatedFusion(nn.Module):
    """III-D, UGF: the words act on the visual tokens as strongly as they are needed there. Fits any two-tower model.

    width: C of the features, a multiple of heads; text_width: D of the words where it is not C; dropout: of Proj.
    forward, between encoder and decoder, one module for all levels: features (B,C,h,w), channels first; words (B,L,D);
    text_mask (B,L) bool, True = a real token; uncertainty logits (B,1,any,any) -> features (B,C,h,w).
    Takes along: Attention, resize, xavier.
    """

    def __init__(self, width, text_width=None, heads=8, dropout=0.1):
        super().__init__()
        self.attention = Attention(width, heads, text_width)                  # Silent: (9)
        self.proj = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.alpha = nn.Parameter(torch.tensor(1.0))                          # Silent: (11)
        self.beta = nn.Parameter(torch.tensor(0.0))
        self.norm = nn.LayerNorm(width)

    def forward(self, features, words, text_mask, uncertainty):
        if features.ndim != 4 or features.shape[1] != self.proj[0].in_features:
            raise ValueError(f"features: expected (B,{self.proj[0].in_features},h,w), got {tuple(features.shape)}")
        h, w = features.shape[-2:]
        V = rearrange(features, "b c h w -> b (h w) c")                       # (B,h*w,C)
        Delta_V = self.proj(self.attention(V, words, words, text_mask))  # Eq. (9)
        u = rearrange(resize(uncertainty, (h, w)), "b 1 h w -> b (h w) 1")  # Eq. (10)
        g = torch.sigmoid(self.alpha * u + self.beta)  # Eq. (11)
        V_plus = self.norm((V + g * Delta_V).to(self.norm.weight.dtype))  # Eq. (12)
        return rearrange(V_plus, "b (h w) c -> b c h w", h=h)                 # (B,C,h,w)


def resize_convolve(maps, size, weight):
    """(B,C,h,w), (D,C,3,3) -> (B,D,*size): conv2d(resize(maps, size), weight, padding=1), never C channels at size.

    Resizing and each tap of the kernel are linear along one axis, so the channels are mixed at the small size.
    """
    def taps(small, large):
        """(small,3,large): what each place of the small axis gives to each tap at each place of the large one."""
        one = torch.eye(small, dtype=torch.promote_types(maps.dtype, torch.float32), device=maps.device)
        weights = functional.interpolate(one[None], large, mode="linear", align_corners=False)[0]   # (small,large)
        return functional.pad(weights, (1, 1)).unfold(-1, large, 1).to(maps.dtype)

    mixed = torch.einsum("bchw,dcyx->bdhywx", maps, weight.to(maps.dtype))
    rows = torch.einsum("bdhywx,hyH->bdHwx", mixed, taps(maps.shape[2], size[0]))
    return torch.einsum("bdHwx,wxW->bdHW", rows, taps(maps.shape[3], size[1]))


class UncertaintyDrivenLocalRefinement(nn.Module):
    """III-E, UDLR: a residual on the coarse logits, let through where the uncertainty is high. Fits any decoder.

    width: C of the feature; hidden: channels of the head; tau, temperature, blur (side of the mean, odd, 0 = none): of
    Eq. (13); cheap: F is reduced to `hidden` channels first; init_std: of the last layer's weight.
    forward: F (B,C,h,w), the decoder's finest feature, channels first; P_fg, logits (B,1,H,W); uncertainty logits
    (B,1,any,any) -> P_ref, refined logits (B,1,H,W), and M, the refinement mask (B,1,H,W) in [0,1].
    Takes along: resize, resize_convolve.
    """

    def __init__(self, width, hidden=64, tau=0.5, temperature=0.1, blur=0, cheap=False, init_std=0.0):
        super().__init__()
        if blur and blur % 2 == 0:
            raise ValueError(f"blur={blur}: expected 0 or an odd number")
        self.width, self.tau, self.temperature, self.blur = width, tau, temperature, blur
        self.reduce = nn.Conv2d(width, hidden, 1) if cheap else nn.Identity()                       # Departs: refine
        self.head = nn.Sequential(nn.Conv2d((hidden if cheap else width) + 2, hidden, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, 1, 1))
        nn.init.normal_(self.head[-1].weight, std=init_std)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, F, P_fg, uncertainty):
        if F.ndim != 4 or F.shape[1] != self.width or P_fg.ndim != 4 or P_fg.shape[1] != 1:
            raise ValueError(f"F, P_fg: expected (B,{self.width},h,w) and (B,1,H,W), "
                             f"got {tuple(F.shape)} and {tuple(P_fg.shape)}")
        size, t, blur = P_fg.shape[-2:], self.temperature, self.blur
        U_p = resize(uncertainty, size).sigmoid()                             # (B,1,H,W)
        blurred = functional.avg_pool2d(U_p, blur, 1, blur // 2, count_include_pad=False) if blur else U_p
        M = torch.sigmoid((blurred - self.tau) / t)  # Eq. (13)
        M = M.detach()  # Eq. (14)
        # The first layer takes F and [P_fg, U_p] one after the other: F never stands at full resolution.
        reduced = self.reduce(F)                                              # (B,C,h,w), cheap (B,hidden,h,w)
        first, *rest = self.head
        on_feature, on_maps = first.weight.split((reduced.shape[1], 2), 1)
        hidden = resize_convolve(reduced, size, on_feature) + functional.conv2d(
            torch.cat((P_fg, U_p), 1).to(reduced.dtype), on_maps, first.bias, padding=1)            # (B,hidden,H,W)
        Delta = nn.Sequential(*rest)(hidden)  # Eq. (15)
        P_ref = P_fg + M * Delta  # Eq. (16)
        return P_ref, M


# ---------------------------------------------------------------------------------------------------------- the model


class CroBIMU(nn.Module):
    """Fig. 1: towers, uncertainty, gated fusion, multi-scale encoder, mask logits, refinement."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)
        self.convnext = ConvNextModel(ConvNextConfig(
            depths=c.convnext_depths, hidden_sizes=c.convnext_widths, drop_path_rate=c.drop_path,
            layer_scale_init_value=c.layer_scale))
        self.convnext.layernorm = nn.Identity()                               # it serves the classifier only
        self.bert = BertModel(BertConfig(
            vocab_size=c.vocab_size, hidden_size=c.bert_width, num_hidden_layers=c.bert_layers,
            num_attention_heads=c.bert_heads, intermediate_size=c.bert_ffn, hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout), add_pooling_layer=False)
        self.visual_projections = nn.ModuleList(                              # Silent: projections
            nn.Sequential(nn.Conv2d(width, c.width, 1, bias=False), nn.GroupNorm(c.norm_groups, c.width))
            for width in c.convnext_widths)
        self.text_projection = nn.Sequential(nn.Linear(c.bert_width, c.width), nn.LayerNorm(c.width))
        if c.rus:
            self.scorer = ReferringUncertaintyScorer(c.width)
        if c.ugf:
            self.fusion = UncertaintyGatedFusion(c.width, heads=c.heads, dropout=c.dropout)
        self.encoder = MultiScaleEncoder(c.width, c.heads, c.encoder_layers, c.points, c.ffn_width)
        self.decoder = MaskDecoder(c.width, c.heads, c.norm_groups, c.prior)
        if c.udlr:
            self.refinement = UncertaintyDrivenLocalRefinement(
                c.width, c.refine_hidden, c.tau, c.temperature, c.blur, c.refine == "cheap", c.refine_init)
        self.convnext.requires_grad_(not c.freeze)
        self.bert.requires_grad_(not c.freeze)

    def load_pretrained(self):
        """Published weights into both towers, strictly -> {state-dict prefix: source}."""
        c = self.config
        if c.pretrained == "none":
            return {}
        source = find_weights(c, c.image_backbone)
        tensors = read_meta_convnext(source) if source.endswith(".pth") else read_huggingface(ConvNextModel, source)
        load_tower(self.convnext, tensors, source, ("layernorm.", "classifier.", "norm", "head."),
                   "convnext_depths, convnext_widths")
        source = find_weights(c, c.text_backbone)
        tensors = read_huggingface(BertModel, source)
        load_tower(self.bert, tensors, source, ("pooler.", "cls."), "bert_width, bert_layers, bert_ffn, vocab_size")
        return {"convnext.": c.image_backbone, "bert.": c.text_backbone}

    def train(self, mode=True):
        super().train(mode)
        for tower in (self.convnext, self.bert):
            tower.train(mode and not self.config.freeze)
        return self

    def encode_images(self, images):
        """images (N,3,S,S) uint8 -> V_4, V_8, V_16, V_32 (N,C,S/s,S/s)."""
        pixels = (images / 255 - self.mean) / self.std                        # (N,3,S,S)
        feature, projected = self.convnext.embeddings(pixels), []
        for stage, project in zip(self.convnext.encoder.stages, self.visual_projections, strict=True):
            feature = stage(feature)                                          # (N,width of the stage,S/s,S/s)
            projected.append(project(feature))
        return projected

    def encode_text(self, tokens, text_mask):
        """tokens, text_mask (B,L) -> T (B,L,C)."""
        # A mask with an axis for queries is taken as it is; about a plain one transformers asks the device.
        words = self.bert(tokens, attention_mask=text_mask[:, None, None]).last_hidden_state
        return self.text_projection(words)

    def forward(self, images, tokens, text_mask, image_index=None):
        """images (N,3,S,S) uint8, tokens, text_mask (B,L), image_index (B,) -> dict of (B,1,S,S) float32.

        logits: above 0 is the mask. coarse, uncertainty, refine_mask: maps in [0,1]. coarse_logits, uncertainty_logits:
        for the criterion. What is switched off is absent.
        """
        size = images.shape[2:]
        features = self.encode_images(images)                                 # four of (N,C,S/s,S/s)
        T = self.encode_text(tokens, text_mask)                               # (B,L,C)
        index = torch.arange(len(T), device=T.device) if image_index is None else image_index
        at_once = len(T)                                                      # expressions decoded together
        if T.device.type == "cpu" and not torch.is_grad_enabled():
            at_once = max(1, AT_ONCE // (self.config.width * size.numel()))
        parts = [self.decode([feature[rows] for feature in features], words, mask, size)
                 for rows, words, mask in zip(*(one.split(at_once) for one in (index, T, text_mask)), strict=True)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def decode(self, features, T, text_mask, size):
        """features, four of (B,C,S/s,S/s); T (B,L,C); text_mask (B,L) -> what `forward` gives."""
        feature4, feature8, feature16, feature32 = features
        levels = [feature8, feature16, feature32]
        if self.config.rus:
            U = self.scorer(feature32, T, text_mask).float()                  # (B,1,S/32,S/32), Silent: (6)
        if self.config.ugf:
            levels = [self.fusion(level, T, text_mask, U) for level in levels]                      # Silent: UGF
        levels, positions = self.encoder(levels, T, text_mask)
        F, logits = self.decoder(feature4, levels, positions, T)              # (B,C,S/4,S/4), (B,1,S/4,S/4)
        P_fg = resize(logits, size)                                           # (B,1,S,S)
        outputs = {"logits": P_fg, "coarse_logits": P_fg, "coarse": P_fg.detach().sigmoid()}
        if self.config.rus:
            U_tilde = resize(U, size)  # Eq. (2)
            outputs |= {"uncertainty_logits": U_tilde, "uncertainty": U_tilde.detach().sigmoid()}
        if self.config.udlr:
            outputs["logits"], outputs["refine_mask"] = self.refinement(F, P_fg, U_tilde)
        return outputs

    def segmentation_loss(self, logits, masks):
        """L_seg of logits and masks (B,1,S,S)."""
        c = self.config
        ce = binary_cross_entropy(logits, masks, *c.class_weights).mean()     # Silent: L_seg
        if c.dice_sum:
            dice = c.dice_sum * (dice_loss(logits, masks, eps=1e-6) + dice_loss(-logits, ~masks, eps=1e-6)).mean()
        else:
            dice = dice_loss(logits, masks).mean()
        return c.seg_weights[0] * ce + c.seg_weights[1] * dice

    def criterion(self, outputs, batch, progress):
        """outputs, batch["masks"] (B,S,S) bool, progress in [0,1] -> weighted scalars; their sum is the objective."""
        c, masks = self.config, batch["masks"][:, None]                       # (B,1,S,S)
        P_fg = outputs["coarse_logits"]
        L_seg = self.segmentation_loss(outputs["logits"] if c.seg_on_refined else P_fg, masks)
        losses = {"seg": c.lambda_seg * L_seg}
        if c.rus:
            prediction, _ = online_error(P_fg, masks)
            L_unc = uncertainty_loss(
                outputs["uncertainty_logits"], prediction, masks, sample_weight=c.lambda_s, threshold=c.delta,
                clamp=c.clamp, blur=c.error_blur).mean()
            losses["unc"] = (0.0 if progress < c.unc_warmup else c.lambda_unc) * L_unc              # Silent: warm-up
        if c.udlr:
            L_ref = self.segmentation_loss(outputs["logits"], masks)  # Eq. (17)
            losses["ref"] = c.lambda_ref * L_ref
        return losses  # Eq. (18)

    def param_groups(self, recipe):
        """What learns: all but frozen towers; vectors and scalars (norms, biases, scales) without decay."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": [p for p in learning if (p.ndim > 1) == matrix], "lr": recipe["lr"], "weight_decay": decay}
                for matrix, decay in ((True, recipe["weight_decay"]), (False, 0.0))]

    @torch.no_grad()
    def diagnose(self, outputs, masks):
        """Is U_p what V-A says it is? masks (B,S,S) -> figures (B,), NaN where nothing is to be found.

        uncertainty_auroc: the chance that U_p is higher at a wrong pixel than at a right one. errors_refined: the share
        of wrong pixels with M > 0.5; refined_area: the share of all pixels, what a blind M would score.
        """
        if not self.config.rus:
            return {}
        _, e = online_error(outputs["coarse_logits"], masks[:, None])
        figures = {"uncertainty_auroc": auroc(outputs["uncertainty"], e)}
        if self.config.udlr:
            inside = outputs["refine_mask"] > 0.5
            figures["errors_refined"] = (inside & e).sum((1, 2, 3)) / e.sum((1, 2, 3))
            figures["refined_area"] = inside.float().mean((1, 2, 3))
        return figures


def auroc(scores, positive):
    """scores, positive (B,1,H,W) -> (B,): area under the ROC curve, ties counting half; NaN where a class is absent."""
    scores, positive = scores.flatten(1), positive.flatten(1)
    ordered = scores.sort(1).values
    rank = (torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True) + 1).double() / 2
    n1, n0 = positive.sum(1).double(), (~positive).sum(1)
    return (((rank * positive).sum(1) - n1 * (n1 + 1) / 2) / (n1 * n0)).float()


# -------------------------------------------------------------------------------------------------------- the recipe


RECIPE = {                                          # IV-B2 where not marked
    "epochs": 40, "batch_size": 32, "lr": 5e-5, "weight_decay": 0.01,
    "schedule": "poly", "power": 0.9, "warmup": 0.0,            # power, no warm-up: our choice, LAVT's
    "micro_batch": 4, "clip": 0.0, "precision": "bf16",         # our choice; the paper's 32 are 4 on each of 8 cards
    "per_image": 0, "protocol": "resized", "empty": "zero", "select": "mIoU", "phases": None,      # our choice
}
RECIPE_FOR = {}                                     # IV-B2: one recipe for all data sets
RECIPE_TINY = {"epochs": 14, "batch_size": 32, "micro_batch": 32, "lr": 2e-3, "schedule": "cosine", "warmup": 0.5,
               "clip": 1.0, "per_image": 4}
ABLATIONS = {"V": {row: {"rus": rus, "ugf": ugf, "udlr": udlr} for row, rus, ugf, udlr in (
    ("Base", False, False, False), ("+UGF", True, True, False), ("+UDLR", True, False, True),
    ("Full", True, True, True), ("RUS only", True, False, False))}}
ABLATIONS["V"] |= {f"{row} L_seg twice": ABLATIONS["V"][row] | {"lambda_seg": 2.0} for row in ("RUS only", "+UGF")}
FIGURES = {"V": {"Base": "mIoU 69.33, Pr@0.9 34.07", "+UGF": "mIoU 69.44, Pr@0.9 34.45",        # RISBench, test
                 "+UDLR": "mIoU 69.53, Pr@0.9 35.10", "Full": "mIoU 69.62, Pr@0.9 35.52"}}
RETIRED = {"detach_gate": False, "symmetric": False}      # fields of older runs, at what is done today


# --------------------------------------------------------------------------------------- tokenizer, published weights


SPECIAL_TOKENS = {"pad": 0, "unknown": 1, "begin": 2, "end": 3}      # [PAD] [UNK] [CLS] [SEP], as BERT has them


class BertWords:
    """BERT's own tokenizer: strings -> tokens (B,L) int64, text_mask (B,L) bool; cut to L with [CLS] and [SEP] kept."""

    def __init__(self, words, length):
        self.words, self.length = words, length

    def __call__(self, expressions):
        batch = self.words(expressions, padding="max_length", truncation=True, max_length=self.length,
                           return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].bool()


def tokenizer(config):
    source = find_weights(config, config.text_backbone)
    words = from_hub(read_words, source)
    if len(words) != config.vocab_size:
        raise ValueError(f"{source}: a vocabulary of {len(words)} words, expected vocab_size={config.vocab_size}")
    return BertWords(words, config.text_length)


def read_words(source):
    """The tokenizer there. Where its files are missing, transformers answers with one of the special words alone."""
    words = BertTokenizer.from_pretrained(source)
    if len(words) == len(words.all_special_tokens):
        raise OSError("neither vocab.txt nor tokenizer.json found")
    return words


def find_weights(config, name):
    """A backbone's hub name or, as `pretrained` says, the path of its folder or file."""
    if config.pretrained == "hub" and not name.endswith(".pth"):
        return name
    path = Path(config.weights_dir if config.pretrained == "hub" else config.pretrained) / name.split("/")[-1]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such " + (META_ADVICE if name.endswith(".pth") else
                                f"folder; put huggingface.co/{name} there, or say --set pretrained=hub"))
    return str(path)


def from_hub(load, source, **options):
    """`load(source)` of transformers, with an answer that helps if it fails."""
    try:
        return load(source, **options)
    except (OSError, ValueError, RuntimeError) as error:
        if Path(source).is_dir():
            raise ValueError(f"{source}: not a folder as transformers saves it, or of another architecture "
                             f"({(str(error).strip() or type(error).__name__).splitlines()[0]})") from error
        raise FileNotFoundError(
            f"{source}: not reached on the hub and not in its cache; set the variable HF_ENDPOINT to a mirror, "
            f"or put its files in DIR/{source.split('/')[-1]} and say --set pretrained=DIR") from error


def read_huggingface(kind, source):
    """A published `kind` -> {name: tensor} of its file; None under a name that `kind` does not know."""
    model, info = from_hub(kind.from_pretrained, source, output_loading_info=True)
    tensors = dict.fromkeys(info["unexpected_keys"]) | model.state_dict()
    return {name: tensor for name, tensor in tensors.items() if name not in info["missing_keys"]}


def load_tower(tower, tensors, source, extra, fields):
    """The tensors into `tower`, as float32, exactly its own; those whose names begin with `extra` are left aside."""
    tensors, own = {name: tensors[name] for name in tensors if not name.startswith(extra)}, tower.state_dict()
    wrong = sorted(own.keys() ^ tensors) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(f"{source}: does not fit {fields}: {len(wrong)} of {len(own)} tensors are missing, unknown or "
                         f"of another shape, the first {wrong[:2]}")
    tower.load_state_dict(tensors)
    print(f"{source}: {len(tensors)} tensors loaded")


# ------------------------------------------------------------- ConvNeXt files in Meta's names, SMLFR's among them


META_ADVICE = ("file; SMLFR's is linked (Baidu) in the README of github.com/HIT-SIRS/SMLFR, "
               "Meta's in that of github.com/facebookresearch/ConvNeXt: put one there under this name, "
               "or say --set image_backbone=facebook/convnext-base-224-22k")
META_TO_HUGGINGFACE = (
    (r"^((module|encoder|backbone)\.)+", ""), (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
    (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."), (r"\.gamma$", ".layer_scale_parameter"),
    (r"^downsample_layers\.(\d)\.", r"encoder.stages.\1.downsampling_layer."), (r"\.norm\.", ".layernorm."),
    (r"^stages\.(\d)\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
)


def read_meta_convnext(path):
    """A ConvNeXt file in Meta's naming, bare or as SMLFR wraps it -> tensors under HuggingFace's names."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # a flipped bit raises anything from AssertionError to struct.error
        raise ValueError(f"{path}: damaged or no PyTorch weights file of plain tensors; one that asks to run code is "
                         "not opened") from error
    if not isinstance(file, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(file).__name__}")
    file = next((file[key] for key in ("module", "state_dict", "model") if isinstance(file.get(key), dict)), file)
    # SMLFR's full file holds its decoder and settings beside the tower.
    tower = {name.split(".sp_cnn.")[1]: tensor for name, tensor in file.items() if ".sp_cnn." in name} or file
    for pattern, replacement in META_TO_HUGGINGFACE:
        tower = {re.sub(pattern, replacement, name): tensor for name, tensor in tower.items()}
    return tower


# Notes
# Departs
#     channels     256..2048 in III-B are not ConvNeXt-B's, which has 128..1024
#     (1)          one Phi takes the tokens of all three levels at once; printed, each Phi^(s) takes its own level's
#     (3)          padded words are masked out of the softmax; as printed they would take part
#     refine       "cheap" puts a 1x1 convolution C -> refine_hidden before the resize of (15); "literal", the default
#                  and as printed, costs hardly more: resize_convolve mixes the channels at stride 4 in either form
#     (3)          Fig. 2's "raw broadcasting" of the words, which neither III-C nor (3) has, is left out
#     Base         is CroBIM in the paper, of which no more is used than III-B describes: two towers, a projection per
#                  level, a multi-scale encoder, mask logits. FIGURES are of the paper's own
#     L_ref        is needed, since L_seg sees P_fg; in III-E it is optional. seg_on_refined=True with lambda_ref=0 is
#                  that reading: L_seg sees P_ref
#     Pr@X         counts IoU >= X, as the field does; IV-A2 says "exceeds"
# Silent
#     projections  1x1 convolution and group norm per level, linear and layer norm for the words
#     Phi          words first (attention, residual, norm), then deformable attention over all three levels and a
#                  feed-forward net: Mask2Former's pixel decoder, whose layer count and heads the paper quotes
#     UGF          stands between the towers and the multi-scale encoder, which III-B counts to the decoder
#     P_fg         F = conv(V_4 + resized V_8+), 3x3, group norm, ReLU; one query, the word at [CLS], attends to strides
#                  32, 16, 8 in turn; P_fg = <F, MLP(query)> / sqrt(C) + b, resized from stride 4: after Mask2Former's
#                  decoder, with one query
#     positions    sines and a level embedding join Phi's queries and the decoder's keys
#     start        Xavier and zero biases for attention and feed-forward layers: PyTorch's own start lets the words in
#                  weakly. Projections, convolutions, Proj of (9), the first layer of (3)'s MLP keep PyTorch's. No key
#                  biases in any attention: they cancel. b at logit(0.05): the first predictions are mostly background
#     (3)          MLP 2C-C-1 with GELU, its last layer near zero: U starts near 0; W_v, W_t have no bias
#     (6)          V and T enter RUS undetached, so L_unc also trains projections and towers
#     (5) (7) (8)  z = e, with error_blur its 3x3 mean, (8) counting e; an empty union is not hard; epsilon 1, of pixels
#     clamp        ours, off: as printed (epsilon 1), (8) makes a lone wrong pixel weigh half the image, and holds the
#                  U_p of a place that errs as often as its image at 0.5 however rare errors are, which tau = 0.5
#                  needs. clamp=100 ends both: where 1 %, 0.5 %, 0.2 %, 0.1 % are wrong, that U_p is 0.50, 0.33, 0.17,
#                  0.09 and M 0.50, 0.16, 0.03, 0.02: the better the model, the less is refined
#     warm-up      L_unc is multiplied by zero for the first 5 % of the run: an empty prediction's errors are the mask
#     (9)          8 heads with their own output layer before Proj, dropout 0.1; no positions
#     (11)         alpha 1, beta 0: g = U_p; the gradient of L_seg reaches RUS through g
#     (13)         tau 0.5: (8) puts U_p above 0.5 where errors are more frequent than on average in their image; t 0.1;
#                  no blur
#     (15)         64 channels, F enlarged to S x S (in effect, not in memory), the last layer zero; P_fg and U_p enter
#                  undetached
#     L_seg        0.9 x cross-entropy weighted 0.9/1.1 + 0.1 x Dice: RMSIN's terms and weights, whose code CroBIM's
#                  README thanks. Ours is a mean over expressions, its Dice the foreground's with epsilon 1; RMSIN's
#                  Dice sums both classes and a card's expressions (dice_sum=4: the paper's 32 are on 8 cards)
#     (17) (18)    (17) writes a sigmoid, the loss takes logits. With lambda_ref=0 the refinement stays zero, except
#                  with seg_on_refined=True. lambda_unc 0.1, lambda_ref 1
#     text         20 tokens, [CLS] and [SEP] among them and kept where a sentence is cut (LAVT's code cuts [SEP] away),
#                  lower case, padded to 20
#     training     polynomial power 0.9, drop-path 0.3, no decay on vectors and scalars. The paper names no frozen part:
#                  both towers learn, all of BERT; freeze=True keeps them as they were loaded. bf16, micro-batches of 4
#     resizing     bilinear, align_corners=False; scoring at S x S, an empty union 0, best epoch by validation mIoU
#     Table V      the rows are independent switches (V-B, V-C; "progressively" in V). Ours: "RUS only", L_unc as a mere
#                  second task; "... L_seg twice" beside +UDLR and Full, where L_ref trains P_fg a second time. V-B says
#                  that UGF gains most in Pr@0.5; in the table it gains 0.13 there, 0.38 in Pr@0.9
# Omits
#     CroBIM's own modules (context-aware prompts, language-guided aggregation, mutual interaction): unpublished code
#     Mask2Former's masked attention, self-attention and feed-forward nets of the query, its second and third round,
#     intermediate losses: the paper describes none
