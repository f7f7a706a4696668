"""ICIPNet: prompts made from the image join the words; the difference of two attentions brings them to the pixels.

Paper
    Ren, Wang, Xu, Yang, Wang. Image-Conditioned Instance Prompt Network for Referring Remote Sensing Image
    Segmentation. arXiv:2605.24532, 2026, https://arxiv.org/abs/2605.24532
Official
    github.com/Ren-by/ICIPNet; it cannot be built: the class of (10)-(13), the lines of (2)-(4) and several attributes
    are missing. What the Notes at the foot of this file mark (code) follows it. No code was copied.
Idea
    At each stage of a Swin Transformer, prompts gather what the image shows (ICIP) and stand before the words. The
    visual tokens read both through two attention maps, one subtracted from the other, and what was read is mixed over
    tokens and over channels (BIF). A convolutional decoder draws the mask from the four fused maps.
Shapes
    N images, M expressions, B whichever of the two, S image side
    i           stage 1..4 of stride s = 4, 8, 16, 32; h,w = S/s; P = h*w positions; C its channels 128, 256, 512, 1024
    D           width 768 of words and prompts;  m prompts per stage, the paper's M_i
    L           as a size, words with padding, the paper's N; as a tensor, the words themselves (B,L,D);  n = m+L
    V, V_hat    visual tokens (B,P,C) and (B,P,D);  T, T_o prompts (B,m,D);  L_o prompts and words (B,n,D)
    A, alpha    (B,P,m);  Q (B,P,2D), K (B,n,2D), H (B,n,D);  F (B,P,n);  V_o, O_TM, V_E, O_CM, O (B,P,D)
    lambda_v    one number per stage;  G the width of a half of Q
Equations
    Eq. (1)             ImageConditionedInstancePrompt.forward, with the concatenation [T_o; L]
    Eq. (2) - Eq. (4)   ImageConditionedInstancePrompt.look: Eq. (2), Eq. (3), Eq. (4)
    Eq. (5), Eq. (6)    BilateralInformationFusion.forward
    Eq. (7)             BilateralInformationFusion.balance
    Eq. (8), Eq. (9)    BilateralInformationFusion.forward, a map of (8) in .scores
    Eq. (10) - Eq. (13) MultiModalFeatureReconstruction.forward: Eq. (10), Eq. (11), Eq. (12), Eq. (13)
    Eq. (14)            ICIPNet.criterion
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel, BertTokenizer, SwinConfig, SwinModel

from losses import binary_cross_entropy, dice_loss

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))       # mean, std
MAPS = ()                                           # the paper draws masks only


@dataclass(frozen=True)
class Config:
    image_size: int = 480                           # III-B4; the weights of Eq. (10) are tied to it
    text_length: int = 20                           # official code
    pretrained: str = "hub"                         # "hub", "none", or a folder with one entry per backbone
    weights_dir: str = "weights"                    # where files lie that are on no hub
    image_backbone: str = "microsoft/swin-base-patch4-window12-384-in22k"   # III, IV-A1: 22K; or Microsoft's .pth
    text_backbone: str = "google-bert/bert-base-uncased"                    # III: BERT
    freeze: bool = False                            # True: BERT is frozen, Fig. 2; False: as the next two say
    bert_trained_layers: int = 10                   # official code: the first 10 of 12 layers learn,
    bert_embeddings: bool = False                   # the embeddings do not

    embed: int = 128                                # Swin-B: width of stage 1, doubled at each further one
    depths: tuple[int, ...] = (2, 2, 18, 2)
    swin_heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 12
    drop_path: float = 0.3                          # official code
    init_std: float = 0.02                          # of random weights: Swin's, BERT's, the gates'
    vocab_size: int = 30522                         # BERT-base
    bert_layers: int = 12
    bert_heads: int = 12
    bert_ffn: int = 3072
    dropout: float = 0.1                            # BERT's

    width: int = 768                                # IV-A1: D, also BERT's width
    icip: bool = True                               # Table III
    bif: bool = True                                # Table III
    prompts: int = 8                                # IV-B: M_i, the same at each stage
    raw_prompts: bool = False                       # True: T joins the words in the place of T_o (official code)
    bif_width: str = "D"                            # of a half of Q and K; "stage": C_i (official code)
    value_mult: int = 1                             # H and O are so many halves wide; 2: Eq. (5) as printed, the code
    query_norm: bool = True                         # official code: instance norm on Q
    softmax: bool = True                            # False: Eq. (8) as printed
    sublayer_norm: bool = True                      # official code, [16]: RMS norm, 1 - lambda^i after Eq. (9)
    lambda_bias: tuple[float, ...] = (0.8, 0.8, 0.8, 0.8)       # official code: lambda^i of Eq. (7), one per stage
    token_hidden: int = 256                         # official code, Eq. (10)

    intra_scale: bool = True                        # RMSIN's parts, the base model of IV-C
    cross_scale: bool = True
    rotated: bool = True
    rmsin: bool = False                             # True: cross_scale as RMSIN released it, see Notes
    cross_heads: int = 8                            # RMSIN's
    cross_key: int = 32                             # RMSIN's: key width of a head, its values are twice as wide
    decoder_width: int = 512                        # LAVT's
    decoder_norm: str = "batch"                     # RMSIN's; "tanh": DyT, official code
    align_corners: bool = False                     # True: logits enlarged to S so (official code)
    router_dropout: float = 0.2                     # RMSIN's rotated convolution

    dice_weight: float = 0.1                        # III-B3: lambda of Eq. (14)
    dice_sum: bool = False                          # True: official code's sum, see Notes
    background_weight: float = 0.9                  # official code: classes of the cross-entropy
    foreground_weight: float = 1.1

    def __post_init__(self):
        for field, choices in (("bif_width", ("D", "stage")), ("decoder_norm", NORMS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)}: expected {' or '.join(choices)}")
        for field in ("depths", "swin_heads", "lambda_bias"):
            if len(getattr(self, field)) != 4:
                raise ValueError(f"{field}={getattr(self, field)}: expected four numbers, one per stage")
        if self.icip and self.prompts < 1:
            raise ValueError(f"prompts={self.prompts}: expected at least 1, or icip=False")

    @property
    def channels(self):
        """C of the four stages."""
        return [self.embed * 2 ** i for i in range(4)]

    @property
    def sides(self):
        """h = w of the four stages."""
        return [math.ceil(self.image_size / 4 / 2 ** i) for i in range(4)]

    @classmethod
    def tiny(cls):
        # Windows that do not fit the maps, as in the paper preset's last two stages, tell the tokens where they are.
        return cls(image_size=96, pretrained="none", vocab_size=256, embed=24, depths=(2, 1, 2, 1),
                   swin_heads=(1, 2, 4, 8), window=7, drop_path=0.0, init_std=0.1, bert_layers=2, bert_heads=4,
                   bert_ffn=96, bert_trained_layers=2, bert_embeddings=True, dropout=0.0, width=48, prompts=4,
                   token_hidden=64, cross_heads=4, cross_key=8, decoder_width=32, router_dropout=0.0,
                   dice_weight=0.5, background_weight=1.0, foreground_weight=1.0)   # Dice finds small objects sooner


# ------------------------------------------------------------------------------------------- the paper's modules, III


def mlp(inputs, hidden, outputs):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def xavier(module):
    """Xavier-uniform weights and zero biases in all linear layers of `module`, which is returned."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return module


class ImageConditionedInstancePrompt(nn.Module):
    """III-A, ICIP: prompts that have looked at the image stand before the words.

    Fits any pair of encoders: ImageConditionedInstancePrompt(channels=C, width=D, prompts=m).
    V (B,P,C) visual tokens of a map of any size; L (B,L,D) words; text_mask (B,L) bool, True = a real token
    -> L_o (B,m+L,D) and its mask (B,m+L). raw: T stands in the place of T_o, V is not read.
    To copy it out, bring along mlp, xavier, check_tokens.
    As A lies in [-1,1], no position weighs more than e^2 times another: T_o is T + a tilted mean of the whole image.
    """

    def __init__(self, channels, width, prompts, raw=False):
        super().__init__()
        self.channels, self.width = channels, width
        self.prompts = nn.Parameter(torch.randn(prompts, width) * 0.02)         # Silent: (1)
        self.f = None if raw else xavier(mlp(channels, channels, width))        # Silent: f

    def look(self, V, T):
        """Prompts that take in the tokens V (B,P,C): T (B,m,D) -> T_o (B,m,D)."""
        V_hat = self.f(V)                                                       # (B,P,D)
        # alpha differs little from place to place while the prompts are small: float32, or the differences are lost
        with torch.autocast(V.device.type, enabled=False):
            V_hat, T = V_hat.float(), T.float()
            A = torch.tanh(V_hat @ T.mT)  # Eq. (2)                             # (B,P,m)
            alpha = A.softmax(1)  # Eq. (3)                                     # (B,P,m)
            return alpha.mT @ V_hat + T  # Eq. (4)                              # (B,m,D)

    def forward(self, V, L, text_mask):
        check_tokens(V, L, text_mask, self.channels, self.width)
        T = self.prompts.expand(len(V), -1, -1)  # Eq. (1)                      # (B,m,D)  # Departs: (1)
        T_o = T if self.f is None else self.look(V, T)                          # (B,m,D)  # Departs: (4)
        L_o = torch.cat((T_o.to(L.dtype), L), 1)                                # (B,m+L,D)
        return L_o, functional.pad(text_mask, (T_o.shape[1], 0), value=True)


def check_tokens(V, L, text_mask, channels, width):
    """ValueError, in one line, for what would be misread: V (B,P,channels), L (B,n,width), text_mask (B,n) bool."""
    if V.dim() != 3 or V.shape[-1] != channels:
        raise ValueError(f"got visual tokens {tuple(V.shape)}, expected (B,P,{channels}): a map's places in one row, "
                         f"its {channels} channels last")
    if L.dim() != 3 or L.shape[::2] != (len(V), width):
        raise ValueError(f"got words {tuple(L.shape)}, expected ({len(V)},n,{width}), channels last")
    if text_mask.shape != L.shape[:2] or text_mask.dtype != torch.bool:
        raise ValueError(f"got a text_mask {tuple(text_mask.shape)} of {text_mask.dtype}, expected "
                         f"{tuple(L.shape[:2])} of torch.bool, True = a real token (text_mask.bool(), or ~padding)")


def norm_over_positions(tokens):
    """Instance norm: each channel of (B,P,C) to mean 0 and variance 1 over the positions."""
    return functional.instance_norm(tokens.mT).mT


class BilateralInformationFusion(nn.Module):
    """III-B, BIF: each position reads L_o by the difference of two attention maps, then MFR mixes what was read.

    Fits any pair of encoders: BilateralInformationFusion(channels=C, width=D, positions=P, half=D), where half is the
    width of a half of Q and of K, the paper's D, and value_mult*half that of H and O. V (B,P,C) visual tokens; L_o
    (B,n,D); text_mask (B,n) bool, True = may be read -> O (B,P,value_mult*half). Tied to maps of P = h*w places.
    To copy it out, bring along mlp, xavier, norm_over_positions, check_tokens, MultiModalFeatureReconstruction.
    """

    def __init__(self, channels, width, positions, half, *, value_mult=1, lambda_bias=0.8, query_norm=True,
                 softmax=True, sublayer_norm=True, token_hidden=256):
        super().__init__()
        self.channels, self.width, self.value_width = channels, width, value_mult * half
        self.lambda_bias, self.query_norm, self.softmax = lambda_bias, query_norm, softmax
        self.f_q = xavier(nn.Linear(channels, 2 * half))
        self.f_k = xavier(nn.Linear(width, 2 * half))
        self.f_v = xavier(nn.Linear(width, self.value_width))                   # Departs: (5), width of H
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(1, half) * 0.1) for _ in range(4))         # Departs: (7)
        self.norm = nn.RMSNorm(self.value_width, eps=1e-5) if sublayer_norm else None
        self.reconstruct = MultiModalFeatureReconstruction(positions, self.value_width, token_hidden)

    def balance(self):
        """lambda_v, a scalar; in float32, for the sake of exp()."""
        first = (self.lambda_q1.float() * self.lambda_k1).sum()
        second = (self.lambda_q2.float() * self.lambda_k2).sum()
        return first.exp() - second.exp() + self.lambda_bias  # Eq. (7)

    def scores(self, Q, K, text_mask):
        """One of the two maps of Eq. (8) of halves (B,P,G), (B,n,G) -> (B,P,n), its softmax in float32."""
        products = ((Q / math.sqrt(Q.shape[-1])) @ K.mT).float()
        if not self.softmax:
            return products.masked_fill(~text_mask[:, None], 0)
        return products.masked_fill(~text_mask[:, None], -math.inf).softmax(-1)             # Departs: (8)

    def forward(self, V, L_o, text_mask):
        check_tokens(V, L_o, text_mask, self.channels, self.width)
        Q, K, H = self.f_q(V), self.f_k(L_o), self.f_v(L_o)  # Eq. (5)          # (B,P,2D), (B,n,2D), (B,n,D)
        if self.query_norm:                                                     # Departs: (5), norm of Q
            Q = norm_over_positions(Q)
        (Q1, Q2), (K1, K2) = Q.chunk(2, -1), K.chunk(2, -1)  # Eq. (6)
        F = self.scores(Q1, K1, text_mask) - self.balance() * self.scores(Q2, K2, text_mask)  # Eq. (8)   # (B,P,n)
        V_o = F.to(H.dtype) @ H  # Eq. (9)                                      # (B,P,D)
        if self.norm is not None:                                               # Departs: (9)
            V_o = self.norm(V_o.to(self.norm.weight.dtype)) * (1 - self.lambda_bias)
        return self.reconstruct(V_o)                                            # (B,P,D)


class MultiModalFeatureReconstruction(nn.Module):
    """III-B2, MFR (there also BFR): mixes over the tokens, then over the channels.

    MultiModalFeatureReconstruction(positions=P, width=D): (B,P,D) -> (B,P,D), channels last. Tied to maps of P = h*w
    places, whatever their shape. To copy it out, bring along mlp.
    """

    def __init__(self, positions, width, token_hidden=256):
        super().__init__()
        self.positions, self.width = positions, width
        self.P_token = mlp(positions, token_hidden, positions)                  # Silent: (10)
        self.P_channel = mlp(width, 2 * width, width)                           # Silent: (12)

    def forward(self, V_o):
        if V_o.shape[1:] != (self.positions, self.width):
            raise ValueError(f"got {tuple(V_o.shape)}, expected (B,{self.positions},{self.width}): the token "
                             f"mixture of Eq. (10) has weights for {self.positions} visual tokens, channels last; "
                             "build it for the positions of this input size")
        O_TM = self.P_token(V_o.mT).mT  # Eq. (10)
        V_E = V_o + O_TM  # Eq. (11)
        O_CM = self.P_channel(V_E)  # Eq. (12)
        return V_E + O_CM  # Eq. (13)


# ------------------------------------------------------------------------------- the base: LAVT's shell, RMSIN's parts


class PixelWordAttention(nn.Module):
    """LAVT's fusion, for rows of the Tables without BIF: V (B,P,C), L_o (B,n,D), text_mask (B,n) bool -> (B,P,C)."""

    def __init__(self, channels, width):
        super().__init__()
        self.channels, self.width, self.value_width = channels, width, channels
        self.f_q = nn.Linear(channels, channels)
        self.f_k, self.f_v = nn.Linear(width, channels), nn.Linear(width, channels)

    def forward(self, V, L_o, text_mask):
        check_tokens(V, L_o, text_mask, self.channels, self.width)
        Q = norm_over_positions(self.f_q(V))
        return functional.scaled_dot_product_attention(Q, self.f_k(L_o), self.f_v(L_o), text_mask[:, None])


class Gate(nn.Module):
    """What of `tokens` (B,P,C) is let through: a factor in (-1,1) for each channel of each token."""

    def __init__(self, channels, init_std=0.02):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.ReLU(),
                                    nn.Linear(channels, channels, bias=False), nn.Tanh())
        for layer in self.layers[::2]:
            nn.init.trunc_normal_(layer.weight, std=init_std)

    def forward(self, tokens):
        return self.layers(tokens) * tokens


def conv_norm(inputs, outputs, kernel=1, **options):
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options), nn.BatchNorm2d(outputs))


class IntraScaleInteraction(nn.Module):
    """RMSIN's, within a stage: weighs each place by the channel mean of its surroundings. (B,C,h,w) -> (B,C,h,w)."""

    def __init__(self):
        super().__init__()
        self.rounds = nn.ModuleList(nn.ModuleList((
            conv_norm(1, 1, bias=False),
            nn.Sequential(conv_norm(1, 1, bias=False), conv_norm(1, 1, 3, bias=False)),
            nn.BatchNorm2d(1))) for _ in range(2))

    def forward(self, features):
        first, second = self.rounds
        weight = features.mean(1, keepdim=True)                                 # (B,1,h,w)
        weight = sum(branch(weight) for branch in first).relu()
        return sum(branch(weight) for branch in second).sigmoid() * features


class StageFusion(nn.Module):
    """Fig. 2, one stage: ICIP (or None) and BIF, LAVT's shell round them; gated on to the next stage, if any."""

    def __init__(self, channels, icip, attention, *, last, intra_scale, init_std):
        super().__init__()
        self.icip, self.attention = icip, attention
        W = nn.Linear(attention.value_width, channels)
        self.W = xavier(W) if isinstance(attention, BilateralInformationFusion) else W      # Silent: starts
        self.visual = nn.Linear(channels, channels)
        self.project = nn.Linear(channels, channels)
        self.gate = None if last else Gate(channels, init_std)                  # Departs: stage 4
        self.intra_scale = IntraScaleInteraction() if intra_scale and not last else None
        self.visual_gate = Gate(channels, init_std) if intra_scale and not last else None

    def forward(self, V, size, L, text_mask):
        """V (M,P,C), size (h,w), L (M,L,D), text_mask (M,L) -> V for the next stage, the fused map, both (M,P,C)."""
        L_o = L
        if self.icip is not None:
            L_o, text_mask = self.icip(V, L, text_mask)                         # (M,m+L,D), (M,m+L)
        O = self.attention(V, L_o, text_mask)  # noqa: E741                     # (M,P,D), without BIF (M,P,C)
        language = norm_over_positions(self.W(O))                               # (M,P,C)
        fused = functional.gelu(self.project(functional.gelu(self.visual(V)) * language))           # (M,P,C)
        after = V
        if self.gate is not None:
            after = after + self.gate(fused)
        if self.intra_scale is not None:
            features = rearrange(V, "b (h w) c -> b c h w", h=size[0])
            after = after + self.visual_gate(rearrange(self.intra_scale(features), "b c h w -> b (h w) c"))
        return after, fused


class CrossScaleAttention(nn.Module):
    """RMSIN's: the tokens of a map and of two coarser copies of it attend to each other. (B,C,h,w) -> (B,C,h,w).

    Tied to maps of side x side. A copy of one place only is left out: a batch norm cannot learn from one value.
    as_released: heads, places and widths in the order in which RMSIN's two reshapes leave them, and its starts.
    """

    def __init__(self, channels, side, heads, key, as_released=False):
        super().__init__()
        self.side, self.heads, self.key, self.as_released = side, heads, key, as_released
        self.norm = nn.BatchNorm2d(channels)
        strides = [stride for stride in (2, 3) if side > stride]
        self.coarser = nn.ModuleList(conv_norm(channels, channels, 2 * stride - 1, stride=stride, groups=channels)
                                     for stride in strides)
        tokens = side ** 2 + sum(((side - 1) // stride + 1) ** 2 for stride in strides)
        self.qkv = nn.Linear(channels, 4 * heads * key, bias=False)
        self.qkv_norm = nn.BatchNorm1d(4 * heads * key)
        self.to_map = nn.Linear(tokens, side ** 2)
        self.local = nn.Conv2d(2 * heads * key, 2 * heads * key, 3, padding=1, groups=2 * heads * key)
        self.to_out = nn.Linear(2 * heads * key, channels)
        self.out = nn.Sequential(nn.BatchNorm2d(channels), nn.Hardswish(), nn.Conv2d(channels, channels, 1))
        if as_released:
            for layer in (self.qkv, self.to_map, self.to_out):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(self.to_map.bias)
            nn.init.zeros_(self.to_out.bias)

    def forward(self, features):
        x = self.norm(features)
        maps = [x, *(layer(x) for layer in self.coarser)]
        tokens = torch.cat([rearrange(one, "b c h w -> b (h w) c") for one in maps], 1)             # (B,n,C)
        qkv = self.qkv_norm(self.qkv(tokens).mT).mT
        q, k, v = rearrange(qkv, "b n (a d) -> b a n d", a=self.heads).split([self.key, self.key, 2 * self.key], -1)
        mixed = functional.scaled_dot_product_attention(q, k, v)                                    # (B,heads,n,d)
        finest = v[:, :, :self.side ** 2]                                                           # (B,heads,h*w,d)
        if self.as_released:                                                    # Departs: cross-scale
            mixed = mixed.transpose(1, 2).reshape(len(x), -1, mixed.shape[2])                       # (B,heads*d,n)
            finest = finest.reshape(len(x), -1, self.side, self.side)                               # (B,heads*d,h,w)
        else:
            mixed = rearrange(mixed, "b a n d -> b (a d) n")
            finest = rearrange(finest, "b a (h w) d -> b (a d) h w", h=self.side)
        mixed = self.to_map(mixed) + self.local(functional.hardswish(finest)).flatten(2)            # (B,heads*d,h*w)
        return self.out(rearrange(self.to_out(mixed.mT), "b (h w) c -> b c h w", h=self.side))


def conv_feed_forward(channels):
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels),
                         nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=channels), nn.ReLU6(),
                         nn.Conv2d(2 * channels, channels, 1))


def resize(maps, like, align_corners=False):
    """(B,C,h,w) bilinearly to the size of `like`."""
    return functional.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=align_corners)


class CrossScaleInteraction(nn.Module):
    """RMSIN's: the maps of all stages meet at the size of the coarsest, then each is gated by what came of it.

    features fine to coarse, (B,C_i,h_i,w_i) -> the same shapes; the coarsest is side x side, to which it is tied.
    """

    def __init__(self, channels, side, heads=8, key=32, as_released=False):
        super().__init__()
        self.side, self.as_released = side, as_released
        self.channels, self.reduced = channels, [one // 4 for one in channels]
        total, inner = sum(self.channels), sum(self.reduced)
        self.reduce = nn.Conv2d(total, inner, 1)
        self.attentions = nn.ModuleList(CrossScaleAttention(inner, side, heads, key, as_released) for _ in range(2))
        self.per_scale = nn.ModuleList(conv_feed_forward(one) for one in self.reduced)
        self.across = conv_feed_forward(inner)
        self.expand = nn.Sequential(nn.BatchNorm2d(inner), nn.Conv2d(inner, total, 1))
        self.local, self.weight, self.shift = (
            nn.ModuleList(conv_norm(one, one) for one in self.channels) for _ in range(3))

    def forward(self, features):
        size = tuple(features[-1].shape[-2:])
        if size != (self.side, self.side):
            raise ValueError(f"got a coarsest map of {size[0]} x {size[1]}, expected {self.side} x {self.side}: the "
                             "cross-scale interaction has weights for one size; build it for this one")
        x = self.reduce(torch.cat([functional.adaptive_avg_pool2d(feature, size) for feature in features], 1))
        x = x + self.attentions[0](x)
        scales = [layer(part) for layer, part in zip(self.per_scale, x.split(self.reduced, 1), strict=True)]
        x = (2 * x if self.as_released else x) + torch.cat(scales, 1)           # Departs: cross-scale
        x = x + self.attentions[1](x)
        x = x + self.across(x)
        shared = self.expand(x).split(self.channels, 1)                         # four of (B,C_i,h_4,w_4)
        return [self.local[i](feature) * resize(functional.hardsigmoid(self.weight[i](part)), feature)
                + resize(self.shift[i](part), feature)
                for i, (feature, part) in enumerate(zip(features, shared, strict=True))]


def rotation(theta):
    """theta (B,) within 45 degrees -> (B,9,9): weights that read a 3x3 kernel, rotated, bilinearly, border repeated."""
    y, x = torch.meshgrid(*[torch.arange(-1.0, 2, device=theta.device)] * 2, indexing="ij")
    y, x = y.flatten(), x.flatten()                                             # (9,)
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    from_x, from_y = (cos * x - sin * y).clamp(-1, 1), (sin * x + cos * y).clamp(-1, 1)             # (B,9)
    near_x, near_y = (1 - (place[..., None] - grid).abs() for place, grid in ((from_x, x), (from_y, y)))
    return near_x.relu() * near_y.relu()                                        # (B,9 to,9 from)


class RotatedConv(nn.Module):
    """Adaptive rotated 3x3 convolution (Pu et al. 2023): each image turns and scales the kernel. Keeps (B,C,h,w)."""

    def __init__(self, channels, dropout=0.2):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)
        self.alpha = nn.Linear(channels, 1)
        self.theta = nn.Linear(channels, 1, bias=False)
        nn.init.kaiming_normal_(self.kernel)
        for layer in (self.local, self.alpha, self.theta):
            nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.alpha.bias)

    def forward(self, features):
        route = self.norm(self.local(features).permute(0, 2, 3, 1)).relu().mean((1, 2))             # (B,C)
        alpha = self.alpha(self.dropout(route)).sigmoid()                       # (B,1)
        theta = functional.softsign(self.theta(self.dropout(route)).float())[:, 0] * math.radians(40)
        with torch.autocast(features.device.type, enabled=False):
            turned = torch.einsum("bts,ois->boit", alpha[..., None] * rotation(theta), self.kernel.flatten(2).float())
        turned = rearrange(turned, "b o i (y x) -> (b o) i y x", y=3)
        rows = rearrange(features, "b c h w -> 1 (b c) h w")
        result = functional.conv2d(rows, turned.to(rows.dtype), padding=1, groups=len(features))
        return rearrange(result, "1 (b c) h w -> b c h w", b=len(features))


class TanhNorm(nn.Module):
    """DyT, in the place of a batch norm: scale * tanh(alpha x) + shift, per channel of (B,C,h,w)."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.scale, self.shift = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, features):
        return self.scale * torch.tanh(self.alpha * features) + self.shift


NORMS = {"batch": nn.BatchNorm2d, "tanh": TanhNorm}         # Config.decoder_norm


class Decoder(nn.Module):
    """LAVT's, with RMSIN's rotated convolutions: maps of four `channels`, fine to coarse -> logits (B,1,S/4,S/4)."""

    def __init__(self, channels, hidden, rotated=True, norm=nn.BatchNorm2d, dropout=0.2):
        super().__init__()
        self.merge, self.refine = nn.ModuleList(), nn.ModuleList()
        for finer, coarser in zip(channels[-2::-1], (channels[-1], hidden, hidden), strict=True):
            conv = RotatedConv(hidden, dropout) if rotated else nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)
            self.merge.append(nn.Sequential(nn.Conv2d(coarser + finer, hidden, 3, padding=1, bias=False), norm(hidden),
                                            nn.ReLU()))
            self.refine.append(nn.Sequential(conv, norm(hidden), nn.ReLU()))
        self.classify = nn.Conv2d(hidden, 2, 1)

    def forward(self, features):
        x = features[-1]
        for feature, merge, refine in zip(features[-2::-1], self.merge, self.refine, strict=True):
            x = refine(merge(torch.cat((resize(x, feature, align_corners=True), feature), 1)))
        background, foreground = self.classify(x).float().chunk(2, 1)
        return foreground - background                                          # their softmax is the sigmoid of this


# ---------------------------------------------------------------------------------------------------------- the model


class DroppedMLP(nn.Module):
    """Swin's MLP with its block's drop-path, which transformers gives to the attention alone; keeps (B,P,C)."""

    def __init__(self, block):
        super().__init__()
        self.fc1, self.activation, self.fc2 = block.mlp.fc1, block.mlp.activation_fn, block.mlp.fc2
        self.drop_path = block.drop_path

    def forward(self, tokens):
        return self.drop_path(self.fc2(self.activation(self.fc1(tokens))))


class ICIPNet(nn.Module):
    """Fig. 2: Swin stages, each followed by fusion with the prompts and words; the decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.register_buffer("statistics", torch.tensor(IMAGENET).view(2, 3, 1, 1), persistent=False)
        self.bert = BertModel(BertConfig(
            vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.bert_layers,
            num_attention_heads=c.bert_heads, intermediate_size=c.bert_ffn, hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=c.dropout, initializer_range=c.init_std), add_pooling_layer=False)
        self.swin = SwinModel(SwinConfig(
            window_size=c.window, embed_dim=c.embed, depths=list(c.depths), num_heads=list(c.swin_heads),
            drop_path_rate=c.drop_path, initializer_range=c.init_std), add_pooling_layer=False)
        self.swin.layernorm = nn.Identity()                                     # it serves the classifier only
        for block in (block for stage in self.swin.encoder.layers for block in stage.blocks):
            block.mlp = DroppedMLP(block)
        self.stages = nn.ModuleList(self.fusion(i) for i in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in c.channels)
        if c.cross_scale:
            self.cross_scale = CrossScaleInteraction(c.channels, c.sides[-1], c.cross_heads, c.cross_key, c.rmsin)
        self.decoder = Decoder(c.channels, c.decoder_width, c.rotated, NORMS[c.decoder_norm], c.router_dropout)

    def fusion(self, i):
        """What follows stage i of Swin; the rows of Tables III and IV differ in it."""
        c, channels = self.config, self.config.channels[i]
        icip = ImageConditionedInstancePrompt(channels, c.width, c.prompts, c.raw_prompts) if c.icip else None
        if c.bif:
            half = c.width if c.bif_width == "D" else channels                  # Departs: width
            attention = BilateralInformationFusion(
                channels, c.width, c.sides[i] ** 2, half, value_mult=c.value_mult, lambda_bias=c.lambda_bias[i],
                query_norm=c.query_norm, softmax=c.softmax, sublayer_norm=c.sublayer_norm, token_hidden=c.token_hidden)
        else:
            attention = PixelWordAttention(channels, c.width)                   # Silent: tables
        return StageFusion(channels, icip, attention, last=i == 3, intra_scale=c.intra_scale, init_std=c.init_std)

    def load_pretrained(self):
        """Published weights into Swin and BERT, strictly -> {state-dict prefix: source}."""
        c = self.config
        if c.pretrained == "none":
            return {}
        load_tower(self.swin, find_weights(c, c.image_backbone), "embed, depths, swin_heads, window", HEADS)
        load_tower(self.bert, find_weights(c, c.text_backbone), "width, bert_layers, bert_ffn, vocab_size", HEADS)
        return {"swin.": c.image_backbone, "bert.": c.text_backbone}

    def frozen(self):
        """The parts of BERT that do not learn."""
        c = self.config
        if c.freeze:
            return [self.bert]
        embeddings = [] if c.bert_embeddings else [self.bert.embeddings]
        return [*embeddings, *self.bert.encoder.layer[c.bert_trained_layers:]]

    def train(self, mode=True):                                                 # Departs: BERT
        super().train(mode)
        for part in self.frozen():
            part.eval()
        return self

    def forward(self, images, tokens, text_mask, image_index=None):
        """images (N,3,S,S) uint8, tokens, text_mask (M,L), image_index (M,) -> {"logits": float32, (M,1,S/4,S/4)}.

        With align_corners they are (M,1,S,S).
        """
        c, size = self.config, tuple(images.shape[-2:])
        if (c.bif or c.cross_scale) and size != (c.image_size, c.image_size):
            tied = "the token mixture of Eq. (10)" if c.bif else "the cross-scale interaction"
            raise ValueError(f"got images of {size[0]} x {size[1]}: {tied} ties the model to image_size="
                             f"{c.image_size}; resize them, or build and train a model for another image_size")
        # A mask per query and key is taken as it is; of a plain one transformers asks the device if it is full.
        L = self.bert(tokens, attention_mask=text_mask[:, None, None]).last_hidden_state            # (M,L,D)
        mean, std = self.statistics
        pixels = ((images / 255 - mean) / std).to(mean.dtype)                   # (N,3,S,S)
        V, (h, w) = self.swin.embeddings(pixels)                                # (N,P,C)
        features = []
        for i, stage in enumerate(self.swin.encoder.layers):
            for block in stage.blocks:
                V = block(V, (h, w), always_partition=True)[0]                  # (M,P,C), in stage 1 (N,P,C)
            if i == 0 and image_index is not None:                              # the words come in here
                V = V[image_index]                                              # (M,P,C)
            V, fused = self.stages[i](V, (h, w), L, text_mask)                  # (M,P,C) twice
            features.append(rearrange(self.norms[i](fused), "b (h w) c -> b c h w", h=h))           # (M,C,h,w)
            if stage.downsample is not None:
                V = stage.downsample(V, (h, w))                                 # (M,P/4,2C)
                h, w = (h + 1) // 2, (w + 1) // 2
        if c.cross_scale:
            features = self.cross_scale(features)                               # four of (M,C,h,w)
        logits = self.decoder(features)                                         # (M,1,S/4,S/4)
        if c.align_corners:                                                     # Departs: logits
            logits = resize(logits, images, align_corners=True)                 # (M,1,S,S)
        return {"logits": logits}

    def criterion(self, outputs, batch, progress):
        """Cross-entropy and Dice of the logits, resized to masks (M,S,S) -> weighted scalars; their sum is L_total."""
        c, masks = self.config, batch["masks"][:, None]                         # (M,1,S,S)
        logits = resize(outputs["logits"], masks)                               # (M,1,S,S)
        ce = binary_cross_entropy(logits, masks, c.background_weight, c.foreground_weight).mean()   # Departs: CE
        dice = dice_loss(logits, masks, eps=1e-6).mean()
        if c.dice_sum:                                                          # Departs: Dice
            dice = RECIPE["batch_size"] * (dice + dice_loss(-logits, ~masks, eps=1e-6).mean())
        lam = c.dice_weight
        return {"ce": (1 - lam) * ce, "dice": lam * dice}  # Eq. (14)

    def param_groups(self, recipe):
        """All that learns, at one rate; Swin's norms, its position biases and the four output norms without decay."""
        self.requires_grad_(True)
        for part in self.frozen():
            part.requires_grad_(False)
        plain, decayed = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                in_swin = name.startswith("swin.") and ("norm" in name or "bias_table" in name)
                (plain if in_swin or name.startswith("norms.") else decayed).append(parameter)
        return [{"params": decayed, "lr": recipe["lr"], "weight_decay": recipe["weight_decay"]},
                {"params": plain, "lr": recipe["lr"], "weight_decay": 0.0}]


RECIPE = {
    "epochs": 40, "batch_size": 4, "lr": 3e-5, "weight_decay": 0.01,            # IV-A1, for AdamW
    "schedule": "poly", "power": 0.9, "warmup": 0.0, "clip": 0.0,               # IV-A1: poly; the rest official code
    "per_image": 0, "protocol": "resized", "empty": "zero", "select": "oIoU",   # official code
    "micro_batch": 4, "precision": "bf16", "phases": None, "black_boxes": 0.0,  # ours; boxes: 0.2 in the official code
}
RECIPE_FOR = {}                                     # IV-A1: one recipe for both data sets
RECIPE_TINY = {"epochs": 48, "batch_size": 32, "micro_batch": 32, "lr": 1e-3, "schedule": "cosine", "warmup": 0.5,
               "clip": 1.0, "per_image": 4}
ABLATIONS = {                                       # III, IV on RefSegRS: its val split, its test split
    "III": {row: {"rmsin": True, "icip": icip, "bif": bif, "prompts": 5} for row, icip, bif in (       # IV-C
        ("Base", False, False), ("+ICIP", True, False), ("+BIF", False, True), ("Full", True, True))},
    "IV": {"Base": {"rmsin": True, "icip": False, "bif": False},
           **{f"+ICIP M={m}": {"rmsin": True, "icip": True, "bif": False, "prompts": m} for m in (3, 5, 8)}},
    "official": {"all": {"rmsin": True, "raw_prompts": True, "bif_width": "stage", "value_mult": 2,
                         "decoder_norm": "tanh", "align_corners": True, "dice_sum": True, "black_boxes": 0.2,
                         "precision": "fp32"}},
}
FIGURES = {                                         # as the paper prints them
    "III": {"Base": "oIoU 81.58, mIoU 74.06", "+ICIP": "oIoU 82.97, mIoU 76.27", "+BIF": "oIoU 83.53, mIoU 77.62",
            "Full": "oIoU 83.77, mIoU 78.21"},
    "IV": {"Base": "oIoU 74.64, mIoU 60.23", "+ICIP M=3": "oIoU 75.60, mIoU 62.72",
           "+ICIP M=5": "oIoU 75.85, mIoU 63.40", "+ICIP M=8": "oIoU 75.77, mIoU 63.07"}}
RETIRED = {"channel_mult": 2}                       # fields of older runs, at the value that is built in now


# --------------------------------------------------------------------------------------- tokenizer, published weights

SPECIAL_TOKENS = {"pad": 0, "unknown": 1, "begin": 2, "end": 3}      # for words of one's own; BERT has its own numbers
MICROSOFT = {r"^patch_embed\.proj": "embeddings.patch_embeddings.projection", r"^patch_embed\.norm": "embeddings.norm",
             r"^layers": "encoder.layers", r"\.norm1": ".layernorm_before", r"\.norm2": ".layernorm_after",
             r"\.attn\.(relative_position_bias_table)": r".attention.relative_position_bias.\1",
             r"\.attn\.proj": ".attention.o_proj", r"\.attn\.qkv": ".attention.qkv_proj"}
HEADS = ("layernorm.", "pooler.", "classifier.", "cls.", "head.", "norm.")      # what published files hold besides
PLACE = "the link in the README of github.com/microsoft/Swin-Transformer"


class BertWords:
    """BERT's own tokenizer, padded and cut to `length` with [CLS] and [SEP] kept: strings -> tokens, text_mask."""

    def __init__(self, words, length):
        self.words, self.length = words, length

    def __call__(self, expressions):
        batch = self.words(expressions, padding="max_length", truncation=True, max_length=self.length,
                           return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].bool()


def tokenizer(config):
    """The published tokenizer: a callable, list of strings -> tokens (M,L) int64, text_mask (M,L) bool."""
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
    """What `pretrained` makes of a backbone's name: the hub name itself, or the path of its folder or file."""
    hub, is_file = config.pretrained == "hub", name.endswith(".pth")
    if hub and not is_file:
        return name
    path = Path(config.weights_dir if hub else config.pretrained) / name.split("/")[-1]
    if path.exists():
        return str(path)
    raise FileNotFoundError(f"{path}: no such {'file' if is_file else 'folder'}; download {name} from "
                            f"{PLACE if is_file else 'huggingface.co'} to there, or name its folder with "
                            f"--set {'weights_dir' if hub else 'pretrained'}=DIR")


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


def load_tower(tower, source, fields, extra=()):
    """A published tower into `tower`, float32: all but names that begin with `extra`; `fields` decide on the shapes."""
    if source.endswith(".pth"):
        tensors = read_pth(source)
    else:
        model, info = from_hub(type(tower).from_pretrained, source, dtype=torch.float32, output_loading_info=True)
        tensors = dict.fromkeys(info["unexpected_keys"]) | model.state_dict()
        extra = (*extra, *info["missing_keys"])     # what is not in the file was drawn at random
    tensors = {name: value for name, value in tensors.items() if not name.startswith(extra)}
    own = tower.state_dict()
    wrong = sorted(own.keys() ^ tensors) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(f"{source}: does not fit {fields}: {len(wrong)} of {len(own)} tensors are missing, unknown or "
                         f"of another shape, the first {wrong[:2]}")
    tower.load_state_dict(tensors)
    print(f"{source}: {len(tensors)} tensors loaded")


def read_pth(path):
    """Microsoft's Swin -> its tensors under the names of transformers."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        file, tensors = file.get("model", file), {}
    except Exception as error:                      # a damaged file raises anything
        raise ValueError(f"{path}: damaged, or not as Microsoft has it; download it again from {PLACE}") from error
    for name, value in file.items():
        for pattern, replacement in MICROSOFT.items():
            name = re.sub(pattern, replacement, name)
        if ".qkv_proj." in name:
            tensors |= {name.replace("qkv", part): third for part, third in zip("qkv", value.chunk(3), strict=True)}
        elif not name.endswith(("position_index", "attn_mask")):
            tensors[name] = value
    return tensors


# Notes
# Departs from the paper
#   network      the text names ICIP, BIF and a "lightweight", a "standard" decoder; the base of Tables III and IV is
#                RMSIN, so its parts are on: intra_scale, cross_scale, rotated; all False: the text's, LAVT's decoder
#   (1)          a vector t is D wide, as (2) and the concatenation need, and so is L; the text says C_i and C
#   (5) (13)     Q has P rows, K and H have n, not M_i; O has P rows, not M_i+N
#   (5)          width of H: D, as (12) and (13) need; value_mult=2: 2D, as (5) prints it, and O likewise
#   (5)          norm of Q: an instance norm over positions (code); query_norm=False: none, as printed
#   (7)          lambda^i, "layer-wise dynamic": fixed, 0.8 at each stage (code); [16]: 0.2, 0.356, 0.471, 0.556
#   (8)          each map a softmax over prompts and real words (code, [16]); softmax=False: as printed, padded words 0
#   (9)          V_o passes an RMS norm and the factor 1 - lambda^i (code, [16]); sublayer_norm=False: as printed
# Departs from the official code (where a switch is named, --ablation official/all turns it)
#   width        D per half of Q and K, and in H and O, at every stage; bif_width="stage", value_mult=2: C, 2C, as there
#   (1)          8 prompts (IV-B), also in official/all; there the number is missing, comments say 5
#   (4)          T_o joins the words; raw_prompts=True: the raw T does, as there, without the f that is idle there
#   (7)          std 0.1, as in [16]; there 1, with which exp() overflows in 1 of 200 draws at width 1024
#   (8)          padded words are left out; there a score of -1e4 does it, and K and H are zero at them: the same
#   (10)-(13)    built once and learned; there built, with random weights, in every forward
#   Dice         a mean over expressions, of the foreground; dice_sum=True: the sum over both classes and a batch of 4
#   CE           a mean of per-expression means, the same for any division into micro-batches; there over the batch
#   logits       a quarter of S, enlarged with align_corners=False by who reads them; align_corners=True: as there
#   decoder      batch norms, the base's; decoder_norm="tanh": DyT, as there
#   stage 4      no gates and no intra-scale interaction: what they feed is not read (4,194,342 weights there)
#   BERT         no dropout in what does not learn
#   text         a sentence longer than 20 tokens keeps its [SEP], which the cut takes there
#   images       as they are; black_boxes=0.2: 20 to 60 black squares on a fifth of the images, there of the objects
#   precision    mixed; precision="fp32": as there
#   selection    on all expressions of the validation split; there on one of each object, drawn at random
# Departs from RMSIN's code
#   cross-scale  heads and tokens keep their axes, so that `to_map` mixes tokens, which two reshapes there scramble; one
#                residual round the feed-forward of each scale, there two; PyTorch's starts, there std 0.02.
#                rmsin=True: all as there, which the rows of Tables III and IV set
#   sizes        the coarsest map's, there 15 x 15; a coarser copy of one place only is left out
# Silent (code: as the official code has it; LAVT, RMSIN: as theirs; unmarked: our choice)
#   tables       ICIP alone (III, IV): the base's pixel-word attention reads [T_o; L]; BIF alone: BIF reads L. IV-B sets
#                M_i = 8, IV-C 5: 8 is the default, III's rows have 5
#   backbones    Swin-B (Tables I, II) at window 12, 384 and uncased BERT-base: LAVT's
#   f            two linear layers C-C-D with GELU, Xavier-uniform, zero biases
#   (1)          a normal draw with std 0.02, so that A neither saturates nor vanishes
#   (7) (8)      the four vectors and lambda_v are each stage's own; one head (code); G_i is the width of one half, [16]
#   (10) (12)    hidden widths 256 (code) and 2D; GELU also in (12); no norms, no dropout
#   starts       Xavier-uniform and zero biases in BIF's f_q, f_k, f_v and the W behind it (code); std 0.02 in gates
#                (LAVT); PyTorch's in MFR and, like LAVT's convolutions, in the base's pixel-word attention
#   O to V       linear W D-C, instance norm, times GELU(linear V), linear, GELU: the fused map. V, the gated fused map
#                and the gated intra-scale V, summed, go on to the next stage; LayerNorm(fused) goes through the
#                cross-scale interaction to the decoder (LAVT, RMSIN, code)
#   drop-path    0.3, rising from 0 over Swin's blocks, on attention and MLP (code)
#   BERT         frozen in Fig. 2: freeze=True; by default layers 0-9 learn, 10, 11 and the embeddings do not (code)
#   training     20 tokens, power 0.9, class weights 0.9/1.1, Dice's eps 1e-6, decay by group, best oIoU, each object
#                once an epoch, scored at 480, an empty union 0, ImageNet's mean and std (code)
# Omits
#   none
