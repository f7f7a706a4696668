"""RS2-SAM 2: text inside SAM 2's image encoder; a pseudo-mask and a class token as SAM 2's prompts.

Paper
    Rong, Lan, Zhang, Zhang. Customized SAM 2 for Referring Remote Sensing Image Segmentation.
    arXiv:2503.07266, 2025, https://arxiv.org/abs/2503.07266
Official
    the authors' repository (commit 7321e75, no licence), below "the code"; weights huggingface.co/ReeF2025/RS2-SAM2.
    No code was copied. Where it or the paper is departed from: Notes, at the end of this file.
Idea
    A union encoder (BEiT-3) reads image and words together. In every block of SAM 2's frozen image encoder
    image and words read each other, and behind it the image reads the words (BHFM: layers and a gate). A generator
    (MPG) makes a pseudo-mask, SAM 2's dense prompt, of the union encoder's class token and patches; the class token
    itself is the sparse prompt; a boundary loss, weighted by the text, sharpens the mask.
Shapes
    N images, M expressions, S image side (H_s = W_s, 1024), C width of SAM 2 (256)
    H_u, p, N_p, D  side and patch of BEiT-3 (224, 16), the number of its patches (H_u/p)^2, its width (1024)
    L            the paper's N_t, words with <s> and </s>, and padding;  text_mask (M,L), True = a real word
    d, r         width of a block of Hiera, reduced width of its fusion layer, d/4;  h,w any map's sides
    U_0          the stream {"A": V_0 (M,1+N_p,D), "B": T_0 (M,L,D)} in front of the union encoder
    V_cls, V, T  class token (M,1,D), patches (M,N_p,D) and words (M,L,D) behind it
    words        Linear(T) (M,L,C): what fusion layers, gate and loss read of the text
    T_i          words in front of fusion layer i (M,L,C), before the first one `words`;  T_next  T_i+1
    F_in, F_i    a block's shortcut, as Hiera has it (where a stage begins, projected and pooled), and what its
                 attention gave, un-windowed (M,h,w,d)
    F1, F2, F3   F', F'', F''' of (2), (3);  T1, T2 likewise;  V_cls1, V1  V'_cls (times V_cls), V' of (5)
    F, F_en      neck map at stride 16 + no-memory embedding, before and behind the gate (4) (M,C,S/16,S/16)
    M_p          pseudo-mask (M,1,H_u/p,H_u/p) in [0,1]
Equations
    Eq. (1)             BEiT3.embed
    Eq. (2), Eq. (3)    BidirectionalHierarchicalFusion.interact, .forward
    Eq. (4)             TextGate.forward
    Eq. (5)             MaskPromptGenerator.forward
    Eq. (6)             RS2SAM2.criterion
    Eq. (7)             losses.py, boundary_loss; its Linear(T_s) in RS2SAM2.forward
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
from torch.utils.checkpoint import checkpoint
from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig
from transformers.models.sam2.configuration_sam2 import Sam2MaskDecoderConfig, Sam2PromptEncoderConfig
from transformers.models.sam2.modeling_sam2 import do_pool, window_partition, window_unpartition

from losses import binary_cross_entropy, boundary_loss, dice_loss

MAPS = ("pseudo_mask",)


@dataclass(frozen=True)
class Config:
    image_size: int = 1024                          # 4.2
    text_length: int = 64                           # our choice: cuts hardly any sentence of the data sets
    pretrained: str = "hub"                         # "hub", "none", or a folder with one entry per backbone
    weights_dir: str = "weights"                    # where files lie that are on no hub
    sam_backbone: str = "facebook/sam2-hiera-large"             # 4.2; official code: SAM 2.0
    beit_backbone: str = "beit3_large_patch16_224.pth"          # 4.2; official code: not the "indomain" file
    beit_words: str = "beit3.spm"
    freeze: bool = True                             # SAM 2's image encoder
    checkpointing: bool = False                     # recompute each block in the backward pass: less memory, more time

    beit_size: int = 224                            # 4.2
    beit_patch: int = 16                            # BEiT-3 large
    beit_width: int = 1024                          # 4.2, D
    beit_layers: int = 24
    beit_heads: int = 16
    beit_ffn: int = 4096
    beit_positions: int = 1024                      # rows of the text's table
    vocab_size: int = 64010

    hiera_width: int = 144                          # 4.2: Hiera-L; each stage doubles width and heads
    hiera_heads: int = 2
    hiera_blocks: tuple[int, ...] = (2, 6, 36, 4)
    hiera_windows: tuple[int, ...] = (8, 4, 16, 8)
    hiera_global: tuple[int, ...] = (23, 33, 43)
    hiera_background: int = 7
    sam_width: int = 256                            # 4.2, C
    sam_heads: int = 8
    sam_mlp: int = 2048
    sam_mask_channels: int = 16

    fusion: str = "bi"                              # BHFM layers: Table 4's "bi", "uni", "linear", or "none" (w/o BL)
    gate: bool = True                               # Eq. (4); False: Table 4's w/o BC
    mpg: bool = True                                # Table 3
    mpg_attention: bool = True                      # Table 4
    boundary_loss: bool = True                      # Table 3
    fusion_reduction: int = 4                       # official code
    fusion_heads: int = 4                           # official code
    gate_heads: int = 8                             # official code
    mpg_heads: int = 8                              # official code
    alpha_text: float = 0.2                         # 4.2
    alpha_image: float = 0.5                        # 4.2

    official_fusion: bool = False                   # forms of the code, see Notes; its weights need the first four
    official_logits: bool = False
    official_pixels: bool = False
    official_unknown: bool = False
    official_precision: bool = False
    official_dice: bool = False
    hard_boundary: bool = False

    lambda_ce: float = 1.0                          # 4.2
    lambda_dice: float = 0.1
    lambda_tbl: float = 0.2
    lambda_mpg: float = 0.0                         # our choice: a loss of the pseudo-mask's own; the paper has none
    neck_norm: bool = False                         # our choice, for a random tower, whose neck map grows without bound
    background_weight: float = 0.9                  # [19]
    foreground_weight: float = 1.1

    def __post_init__(self):
        if self.fusion not in ("bi", "uni", "linear", "none"):
            raise ValueError(f"fusion={self.fusion}: expected bi, uni, linear or none")
        if not len(self.hiera_blocks) == len(self.hiera_windows) == 4:
            raise ValueError(f"hiera_blocks={self.hiera_blocks}, hiera_windows={self.hiera_windows}: expected 4 each")
        if self.image_size % (unit := 4 * self.hiera_windows[0]) or self.image_size % 32:
            raise ValueError(f"image_size={self.image_size}: expected a multiple of 32 and of 4 windows, {unit}")
        if self.hiera_width % (unit := self.fusion_reduction * self.fusion_heads):
            raise ValueError(f"hiera_width={self.hiera_width}: expected a multiple of fusion_reduction * fusion_heads, "
                             f"{unit}")
        for field, unit in (("beit_size", "beit_patch"), ("beit_width", "beit_heads"), ("beit_width", "mpg_heads"),
                            ("sam_width", "gate_heads")):
            if (value := getattr(self, field)) % (least := getattr(self, unit)):
                raise ValueError(f"{field}={value}: expected a multiple of {unit}={least}")
        if self.text_length > (most := self.beit_positions - 2):
            raise ValueError(f"text_length={self.text_length}: expected at most beit_positions - 2, {most}")

    @property
    def reads_text(self):
        """Whether anything but BEiT-3 reads the words."""
        return self.fusion in ("bi", "uni") or self.gate or self.boundary_loss

    @classmethod
    def tiny(cls):
        return cls(image_size=96, pretrained="none", text_length=24, freeze=False, vocab_size=256,
                   beit_size=96, beit_patch=8, beit_width=64, beit_layers=3, beit_heads=4, beit_ffn=128,
                   beit_positions=32, hiera_width=32, hiera_heads=1, hiera_blocks=(1, 2, 3, 1),
                   hiera_windows=(8, 4, 6, 2), hiera_global=(5,), hiera_background=3, sam_width=96, sam_heads=4,
                   sam_mlp=192, fusion_reduction=2, fusion_heads=2, gate_heads=4, mpg_heads=4,
                   lambda_dice=1.0, background_weight=1.0, foreground_weight=1.0,      # Dice finds small objects sooner
                   lambda_mpg=1.0, neck_norm=True)  # SAM 2 as published reads masks, a random one has to learn it


# ------------------------------------------------------------------------------------------------ 3.2, union encoder
# A stream is {"A": image tokens (B,1+N_p,D), "B": words (B,L,D)}, in this order; either may be absent. Names of modules
# and parameters are those of Microsoft's file.


class BEiT3FeedForward(nn.Module):
    """(B,n,D) -> (B,n,D), with a norm in front of the last layer (sub-LN)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn_layernorm = nn.LayerNorm(hidden)

    def forward(self, x):
        return self.fc2(self.ffn_layernorm(functional.gelu(self.fc1(x))))


def multiway(kind, *sizes):
    """Two layers of a kind: A for the image's positions, B for the words."""
    return nn.ModuleDict({branch: kind(*sizes) for branch in "AB"})


class BEiT3Attention(nn.Module):
    """Self-attention over the whole stream with projections per branch and a norm in front of the last (sub-LN)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (multiway(nn.Linear, width, width) for _ in range(4))
        self.inner_attn_ln = multiway(nn.LayerNorm, width)

    def forward(self, stream, mask):
        """stream, mask (B,1,1,n) or None -> stream."""
        q, k, v = (torch.cat([layer[branch](x) for branch, x in stream.items()], 1)     # [V_0; T_0] of Eq. (1)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))                # (B,n,D)
        q, k, v = (rearrange(x, "b n (a d) -> b a n d", a=self.heads) for x in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)        # (B,heads,n,D/heads)
        parts = rearrange(mixed, "b a n d -> b n (a d)").split([x.shape[1] for x in stream.values()], 1)
        return {branch: self.out_proj[branch](self.inner_attn_ln[branch](part))
                for branch, part in zip(stream, parts, strict=True)}


class BEiT3Layer(nn.Module):
    """Joint attention, then a feed-forward net per branch; both behind a norm and beside a shortcut."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.self_attn = BEiT3Attention(width, heads)
        self.self_attn_layer_norm = multiway(nn.LayerNorm, width)
        self.ffn = multiway(BEiT3FeedForward, width, hidden)
        self.final_layer_norm = multiway(nn.LayerNorm, width)

    def forward(self, stream, mask):
        mixed = self.self_attn({branch: self.self_attn_layer_norm[branch](x) for branch, x in stream.items()}, mask)
        stream = {branch: x + mixed[branch] for branch, x in stream.items()}
        return {branch: x + self.ffn[branch](self.final_layer_norm[branch](x)) for branch, x in stream.items()}


def run(function, *inputs, checkpointing):
    """function(*inputs); with `checkpointing` its inner activations are computed anew in the backward pass."""
    if checkpointing:
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


class BEiT3(nn.Module):
    """3.2, the union encoder: image alone, words alone or both (Wang et al., CVPR 2023). Stands by itself.

    size, patch: sides of the image, to which it is tied, and of a patch; width: D, a multiple of heads; layers, heads;
    ffn: hidden width; positions: rows of the words' table, two more than words; vocab_size; checkpointing: less memory,
    more time. forward: pixels (B,3,size,size), channels first; tokens (B,L); text_mask (B,L) bool, True = a real token.
    Its state dict is that of Microsoft's file without the prefix "beit3." and the pretraining heads.
    Takes along: multiway, BEiT3Attention, BEiT3FeedForward, BEiT3Layer, run.
    """

    def __init__(self, *, size=224, patch=16, width=1024, layers=24, heads=16, ffn=4096, positions=1024,
                 vocab_size=64010, checkpointing=False):
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(f"size={size}, width={width}: expected multiples of patch={patch}, heads={heads}")
        self.size, self.checkpointing = size, checkpointing
        self.text_embed = nn.Embedding(vocab_size, width)
        self.vision_embed = nn.Module()
        self.vision_embed.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.vision_embed.mask_token = nn.Parameter(torch.zeros(1, 1, width))         # served the pretraining
        self.vision_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.encoder = nn.Module()
        # Both tables are read from row 2 on, as in the file; the image's first place is the class token's.
        self.encoder.embed_positions = nn.ModuleDict(
            {"A": nn.Embedding((size // patch) ** 2 + 3, width), "B": nn.Embedding(positions, width)})
        self.encoder.layers = nn.ModuleList(BEiT3Layer(width, heads, ffn) for _ in range(layers))
        self.encoder.layer_norm = multiway(nn.LayerNorm, width)
        for table in self.encoder.embed_positions.values():                           # words' own: 1, untouched
            nn.init.normal_(table.weight, std=0.02)

    def embed(self, pixels=None, tokens=None, text_mask=None):
        """pixels (B,3,H_u,W_u), tokens and text_mask (B,L) -> U_0, the stream in front of the first layer."""
        positions = {branch: table.weight[2:] for branch, table in self.encoder.embed_positions.items()}
        U_0 = {}
        if pixels is not None:
            if pixels.shape[1:] != (3, self.size, self.size):
                raise ValueError(f"pixels: expected (B,3,{self.size},{self.size}), got {tuple(pixels.shape)}")
            P_v = rearrange(self.vision_embed.proj(pixels), "b d h w -> b (h w) d")
            V_cls = self.vision_embed.cls_token.expand(len(pixels), -1, -1)           # (B,1,D)
            U_0["A"] = torch.cat((V_cls, P_v), 1) + positions["A"]                    # V_0 (B,1+N_p,D)
        if tokens is not None:
            T_0 = self.text_embed(tokens) + positions["B"][:tokens.shape[1]]          # (B,L,D)
            U_0["B"] = T_0 if text_mask is None else T_0 * text_mask[..., None]       # Departs: padding
        return U_0  # Eq. (1)

    def forward(self, pixels=None, tokens=None, text_mask=None):
        """-> image tokens (B,1+N_p,D), the class token first, and words (B,L,D); None for what was not given."""
        if text_mask is not None and text_mask.dtype != torch.bool:
            raise ValueError(f"text_mask: expected bool, True = a real token, got {text_mask.dtype}; "
                             "say .bool() where 1 is a real token, == 0 where 1 is padding")
        stream = self.embed(pixels, tokens, text_mask)
        mask = None
        if text_mask is not None:
            mask = text_mask if pixels is None else functional.pad(text_mask, (stream["A"].shape[1], 0), value=True)
            mask = mask[:, None, None]                                                # (B,1,1,1+N_p+L), or L alone
        for layer in self.encoder.layers:
            stream = run(layer, stream, mask, checkpointing=self.checkpointing)
        stream = {branch: self.encoder.layer_norm[branch](x) for branch, x in stream.items()}
        return stream.get("A"), stream.get("B")


# ------------------------------------------------------------------------ 3.3, bidirectional hierarchical fusion module


class Attention(nn.Module):
    """Multi-head attention: queries (B,Q,C), keys and values (B,K,C) -> (B,Q,C); mask (B,K) bool, True = is read."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width}: expected a multiple of heads={heads}")
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        for layer in (self.to_q, self.to_k, self.to_v):                       # starts as nn.MultiheadAttention does
            nn.init.xavier_uniform_(layer.weight, gain=2 ** -0.5)
        for layer in (self.to_q, self.to_k, self.to_v, self.to_out):
            nn.init.zeros_(layer.bias)

    def forward(self, queries, keys, values, mask=None):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"mask of words: expected bool, True = a real token, got {mask.dtype}; "
                             "say .bool() where 1 is a real token, == 0 where 1 is padding")
        q, k, v = (rearrange(tokens, "b n (a d) -> b a n d", a=self.heads)
                   for tokens in (self.to_q(queries), self.to_k(keys), self.to_v(values)))
        allowed = None if mask is None else mask[:, None, None]               # (B,1,1,K)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)     # (B,heads,Q,C/heads)
        return self.to_out(rearrange(mixed, "b a n d -> b n (a d)"))


class BidirectionalHierarchicalFusion(nn.Module):
    """3.3, BHFM's layer (BL) for one block of Hiera: image and words read each other in a reduced width.

    width: d of the block, a multiple of reduction * heads; text_width: C; structure: "bi", "uni" (the words stay as
    they were) or "linear" (an adapter, no words are read); alpha_text, alpha_image: of Eq. (3); official: the code's
    forms. forward: F_in, F_i (M,h,w,d), channels last, any sides; T_i (M,L,C); text_mask (M,L) bool, True = a real
    word, or None; norm, mlp: the block's own -> F_out (M,h,w,d), T_i+1 (M,L,C).
    Takes along: Attention.
    """

    def __init__(self, width, text_width, *, reduction=4, heads=4, structure="bi", alpha_text=0.2, alpha_image=0.5,
                 official=False):
        super().__init__()
        if structure not in ("bi", "uni", "linear") or width % reduction:
            raise ValueError(f"structure={structure}, width={width}: expected bi, uni or linear, and a multiple of "
                             f"reduction={reduction}")
        self.structure, self.official = structure, official
        self.alpha_text, self.alpha_image = alpha_text, alpha_image
        reduced = width // reduction
        self.down, self.up = nn.Linear(width, reduced), nn.Linear(reduced, width)
        self.side = nn.Sequential(nn.Linear(width, reduced), nn.GELU(), nn.Linear(reduced, width))
        if structure != "linear":
            self.text_in = nn.Linear(text_width, reduced)
            self.image_reads_text = Attention(reduced, heads)
        if structure == "bi":
            self.text_reads_image = Attention(reduced, heads)
            self.text_out = nn.Linear(reduced, text_width)

    def interact(self, F_i, T_i, text_mask):
        """F_i (M,h,w,d), T_i (M,L,C), text_mask (M,L) -> F2 (M,h,w,r), T2 (M,L,r) or None where words stay."""
        F1 = functional.gelu(self.down(F_i))                                  # (M,h,w,r)
        if self.structure == "linear":
            return F1, None
        h = F1.shape[1]
        F1, T1 = rearrange(F1, "m h w r -> m (h w) r"), self.text_in(T_i)     # (M,h*w,r), (M,L,r)
        F2 = self.image_reads_text(F1, T1, T1, text_mask) + F1                # (M,h*w,r)
        T2 = None
        if self.structure == "bi":
            image = F2 if self.official else F1                               # Departs: (2)
            T2 = self.text_reads_image(T1, image, image) + T1  # Eq. (2)
        return rearrange(F2, "m (h w) r -> m h w r", h=h), T2

    def forward(self, F_in, F_i, T_i, text_mask, norm, mlp):
        if F_i.ndim != 4 or F_i.shape[-1] != self.down.in_features or F_in.shape != F_i.shape:
            raise ValueError(f"F_in, F_i: expected (M,h,w,{self.down.in_features}), channels last, "
                             f"got {tuple(F_in.shape)} and {tuple(F_i.shape)}")
        F2, T2 = self.interact(F_i, T_i, text_mask)
        T_next = T_i if T2 is None else (1 - self.alpha_text) * T_i + self.alpha_text * self.text_out(T2)
        F3 = F_in + self.up(F2) + F_i
        normed = norm(F3)
        side = self.side(normed if self.official else F3)                     # Departs: (3)
        F_out = F3 + mlp(normed) + self.alpha_image * side  # Eq. (3)
        return F_out, T_next


def attend(block, hidden):
    """The first half of a Hiera block of transformers: hidden (M,h,w,d) -> F_in, F_i (M,h',w',d')."""
    normed = block.layer_norm1(hidden)
    F_in = hidden if block.dim == block.dim_out else do_pool(block.proj(normed), block.query_stride)
    if not block.window_size:
        return F_in, block.attn(normed)
    windows = block.attn(window_partition(normed, block.window_size)[0])      # (M*windows,side,side,d')
    (h, w), side = F_in.shape[1:3], windows.shape[1]
    return F_in, window_unpartition(windows, side, (h + -h % side, w + -w % side), (h, w))


class TextGate(nn.Module):
    """3.3, BHFM behind the encoder (BC): the feature reads the words, times what it read.

    width: C of feature and words, a multiple of heads. forward: F (M,C,h,w) and positions (1,C,h,w), channels first,
    any sides; words (M,L,C); text_mask (M,L) bool, True = a real word, or None -> F_en (M,C,h,w).
    Takes along: Attention.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.attention = Attention(width, heads)

    def forward(self, F, positions, words, text_mask):
        width = self.attention.to_q.in_features
        if F.ndim != 4 or F.shape[1] != width or positions.shape[1:] != F.shape[1:]:
            raise ValueError(f"F, positions: expected (M,{width},h,w) and (1,{width},h,w), "
                             f"got {tuple(F.shape)} and {tuple(positions.shape)}")
        queries = rearrange(F + positions, "m c h w -> m (h w) c")            # (M,h*w,C); Departs: (4)
        read = self.attention(queries, words, words, text_mask)               # (M,h*w,C)
        return rearrange(read, "m (h w) c -> m c h w", h=F.shape[-2]) * F  # Eq. (4)


# ---------------------------------------------------------------------------------------- 3.4, mask prompt generator


class MaskPromptGenerator(nn.Module):
    """3.4, MPG: class token and patches of the union encoder -> a pseudo-mask on the patches' grid.

    width: D, a multiple of heads; attention: False leaves V_cls as it is (Table 4's w/o MHCA). forward: V_cls (M,1,D);
    V (M,h*w,D), row by row; grid: its sides (h, w) -> M_p (M,1,h,w) in [0,1].
    Takes along: Attention.
    """

    def __init__(self, width, *, heads=8, attention=True):
        super().__init__()
        self.attention = Attention(width, heads) if attention else None
        self.linear = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 1))                         # Departs: (5)

    def forward(self, V_cls, V, grid):
        (h, w), width = grid, self.linear.in_features
        if V.shape[1:] != (h * w, width) or V_cls.shape != (len(V), 1, width):
            raise ValueError(f"V_cls, V: expected (M,1,{width}) and (M,{h}*{w},{width}), "
                             f"got {tuple(V_cls.shape)} and {tuple(V.shape)}")
        V_cls1 = V_cls
        if self.attention is not None:
            V_cls1 = self.attention(V_cls, V, V) * V_cls                      # (M,1,D); Departs: (5)
        R_V = rearrange(V, "m (h w) d -> m h w d", h=h)                       # (M,h,w,D)
        V1 = R_V * self.linear(V_cls1)[:, None]                               # (M,h,w,D)
        M_p = self.mlp(V1).sigmoid()  # Eq. (5)
        return rearrange(M_p, "m h w 1 -> m 1 h w")


def pseudo_mask_loss(M_p, masks, eps=1e-4):
    """Cross-entropy and Dice of M_p (M,1,h,w) in [0,1] with the share of each cell in masks (M,1,H,W) bool -> (M,).

    Ours, for lambda_mpg: the paper's M_p learns through SAM 2 alone, which reads masks from the start.
    """
    y = functional.interpolate(masks.float(), M_p.shape[-2:], mode="area")    # (M,1,h,w)
    p = M_p.float().clamp(eps, 1 - eps)
    cross_entropy = -(y * p.log() + (1 - y) * (1 - p).log()).mean((1, 2, 3))
    overlap, squares = (p * y).sum((1, 2, 3)), (p * p + y * y).sum((1, 2, 3))
    return cross_entropy + 1 - (2 * overlap + eps) / (squares + eps)


# ------------------------------------------------------------------------------------------------------------ the model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))       # mean, std
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))                       # BEiT-3's


def resize(maps, size):
    """(B,C,h,w) -> (B,C,*size), bilinear."""
    return functional.interpolate(maps, size, mode="bilinear", align_corners=False)


def to_pixels(images, size, mean, std, mode):
    """images (N,3,S,S) uint8 -> (N,3,size,size) float, normalised; shrinks without aliasing."""
    pixels = images.float()
    if pixels.shape[-2:] != (size, size):
        pixels = functional.interpolate(pixels, (size, size), mode=mode, antialias=True).clamp(0, 255)
    return (pixels / 255 - mean) / std


def start_from_scratch(model):
    """Start a model that no published weights will fill: with transformers' own, std 0.02, a small one hardly learns.

    Convolutions keep biases: without them SAM 2's mask embedding, which normalises, would not see how high a mask is.
    Its weights are enlarged: else its output is so faint beside the image embedding that nothing learns to read it.
    Positions start as sines: from random tables places are hardly read.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.reset_parameters()
    with torch.no_grad():
        for layer in (model.sam.prompt_encoder.mask_embed.conv1, model.sam.prompt_encoder.mask_embed.conv3):
            layer.weight *= 8
        patches = model.beit3.encoder.embed_positions["A"].weight[3:]         # rows 0, 1 are not read, 2 is [CLS]
        patches.copy_(sine_table(math.isqrt(len(patches)), patches.shape[1]))
        background = model.sam.vision_encoder.backbone.pos_embed              # (1,d,side,side)
        side, d = background.shape[-1], background.shape[1]
        background.copy_(rearrange(sine_table(side, d), "(h w) d -> 1 d h w", h=side))


def sine_table(side, width):
    """Where side x side cells lie, row by row -> (side*side,width), y in the first half: a table that is smooth."""
    centres = (torch.arange(side) + 0.5) / side
    angles = centres[:, None] * 2 * math.pi * 10000 ** -(torch.arange(width // 4) / (width // 4))
    waves = torch.cat((angles.sin(), angles.cos()), 1)                        # (side,width/2)
    table = torch.cat((waves.repeat_interleave(side, 0), waves.repeat(side, 1)), 1)
    table = table - table.mean(0)
    return 0.5 * table / table.std()


def sam2_config(c):
    """transformers' configuration of SAM 2 for a Config."""
    widths = [c.hiera_width * 2 ** stage for stage in range(4)]
    backbone = Sam2HieraDetConfig(
        hidden_size=c.hiera_width, num_attention_heads=c.hiera_heads, blocks_per_stage=list(c.hiera_blocks),
        embed_dim_per_stage=widths, num_attention_heads_per_stage=[c.hiera_heads * 2 ** stage for stage in range(4)],
        window_size_per_stage=list(c.hiera_windows), global_attention_blocks=list(c.hiera_global),
        window_positional_embedding_background_size=[c.hiera_background] * 2)
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=widths[::-1], fpn_hidden_size=c.sam_width)
    prompts = Sam2PromptEncoderConfig(hidden_size=c.sam_width, image_size=c.image_size,
                                      mask_input_channels=c.sam_mask_channels)
    # By default transformers picks another mask in eval mode than in training where it finds mask 0 unstable.
    decoder = Sam2MaskDecoderConfig(hidden_size=c.sam_width, mlp_dim=c.sam_mlp, num_attention_heads=c.sam_heads,
                                    iou_head_hidden_dim=c.sam_width, dynamic_multimask_via_stability=False)
    return Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)


class RS2SAM2(nn.Module):
    """Fig. 2: union encoder, image encoder with fusion layers, gate, mask prompt generator, mask decoder."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        for name, statistics in (("sam", IMAGENET), ("beit", IMAGENET if c.official_pixels else HALF)):
            self.register_buffer(f"{name}_statistics", torch.tensor(statistics).view(2, 3, 1, 1), persistent=False)
        self.beit3 = BEiT3(size=c.beit_size, patch=c.beit_patch, width=c.beit_width, layers=c.beit_layers,
                           heads=c.beit_heads, ffn=c.beit_ffn, positions=c.beit_positions, vocab_size=c.vocab_size,
                           checkpointing=c.checkpointing)
        self.sam = Sam2Model(sam2_config(c))
        if c.reads_text:
            self.text_projection = nn.Linear(c.beit_width, c.sam_width)
        if c.fusion != "none":
            self.fusion = nn.ModuleList(BidirectionalHierarchicalFusion(
                block.dim_out, c.sam_width, reduction=c.fusion_reduction, heads=c.fusion_heads, structure=c.fusion,
                alpha_text=c.alpha_text, alpha_image=c.alpha_image, official=c.official_fusion)
                for block in self.sam.vision_encoder.backbone.blocks)
        if c.gate:
            self.gate = TextGate(c.sam_width, c.gate_heads)
        if c.mpg:
            self.prompt_generator = MaskPromptGenerator(c.beit_width, heads=c.mpg_heads, attention=c.mpg_attention)
        self.token_mlp = nn.Sequential(nn.Linear(c.beit_width, c.beit_width), nn.ReLU(),
                                       nn.Linear(c.beit_width, c.sam_width))
        if c.boundary_loss:
            self.text_weight = nn.Linear(c.sam_width, 1)
        if c.pretrained == "none":
            start_from_scratch(self)

    def load_pretrained(self):
        """Published weights into both towers, strictly -> {state-dict prefix: source}."""
        c = self.config
        if c.pretrained == "none":
            return {}
        load_tower(self.beit3, find_weights(c, c.beit_backbone),
                   "beit_size, beit_patch, beit_width, beit_layers, beit_ffn, beit_positions, vocab_size")
        load_tower(self.sam, find_weights(c, c.sam_backbone),
                   "hiera_width, hiera_blocks, hiera_windows, hiera_background, sam_width, sam_mlp")
        return {"beit3.": c.beit_backbone, "sam.": c.sam_backbone}

    def train(self, mode=True):
        super().train(mode)
        if self.config.freeze:
            self.sam.vision_encoder.eval()
        return self

    def block(self, number, hidden, T_i, text_mask):
        """Hiera's block with its fusion layer: hidden (M,h,w,d), T_i (M,L,C) -> hidden (M,h',w',d'), T_i+1 (M,L,C)."""
        block = self.sam.vision_encoder.backbone.blocks[number]
        if self.config.fusion == "none":
            return block(hidden), T_i
        F_in, F_i = attend(block, hidden)                                     # (M,h',w',d') each
        return self.fusion[number](F_in, F_i, T_i, text_mask, block.layer_norm2, block.mlp)

    def encode_image(self, pixels, words, text_mask):
        """pixels (M,3,S,S), words (M,L,C) -> SAM 2's features at strides 4, 8, 16, (M,C,S/s,S/s)."""
        hiera, neck = self.sam.vision_encoder.backbone, self.sam.vision_encoder.neck
        hidden = hiera.patch_embed(pixels)                                    # (M,S/4,S/4,d)
        hidden = hidden + hiera._get_pos_embed(hidden.shape[1:3])
        T_i, stages = words, []
        for number in range(len(hiera.blocks)):
            hidden, T_i = run(self.block, number, hidden, T_i, text_mask, checkpointing=self.config.checkpointing)
            if number in hiera.stage_ends:
                stages.append(rearrange(hidden, "m h w d -> m d h w"))        # (M,d,S/s,S/s)
        # The neck's own forward also makes the positions of every level, which SAM 2 needs for its memory only.
        feature32, feature16, feature8, feature4 = (
            conv(stage) for conv, stage in zip(neck.convs, reversed(stages), strict=True))
        feature16 = feature16 + functional.interpolate(feature32, scale_factor=2.0, mode="nearest")
        if self.config.neck_norm:
            feature16 = functional.layer_norm(feature16.movedim(1, -1), (self.config.sam_width,)).movedim(-1, 1)
        return feature4, feature8, feature16

    def segment(self, pixels, text_mask, words, sparse_prompts, M_p):
        """SAM 2 on pixels (M,3,S,S), with fusion layers, gate and both prompts, (M,1,C) and M_p -> m (M,1,S/4,S/4)."""
        sam, decoder = self.sam, self.sam.mask_decoder
        feature4, feature8, feature16 = self.encode_image(pixels, words, text_mask)
        F = feature16 + sam.no_memory_embedding.view(1, -1, 1, 1)             # (M,C,S/16,S/16)
        positions = sam.get_image_wide_positional_embeddings()                # (1,C,S/16,S/16)
        F_en = self.gate(F, positions, words, text_mask) if self.config.gate else F
        mask_prompt = None
        if M_p is not None:
            mask_prompt = resize(M_p, sam.prompt_encoder.mask_input_size)     # (M,1,S/4,S/4); Departs: M_p
        _, dense_prompt = sam.prompt_encoder(None, None, None, mask_prompt)   # (M,C,S/16,S/16), or (1,...)
        return decoder(image_embeddings=F_en, image_positional_embeddings=positions,
                       sparse_prompt_embeddings=sparse_prompts[:, None], dense_prompt_embeddings=dense_prompt,
                       multimask_output=False,
                       high_resolution_features=[decoder.conv_s0(feature4), decoder.conv_s1(feature8)])[0][:, 0]

    def forward(self, images, tokens, text_mask, image_index=None):
        """images (N,3,S,S) uint8, tokens, text_mask (M,L), image_index (M,) -> dict.

        logits (M,1,S/4,S/4), above 0 is the mask. pseudo_mask (M,1,H_u/p,H_u/p) in [0,1]. text_weight (M,), for (7).
        What is switched off is absent.
        """
        c = self.config
        sam_pixels = to_pixels(images, c.image_size, *self.sam_statistics, "bilinear")
        beit_pixels = to_pixels(images, c.beit_size, *self.beit_statistics,             # Departs: BEiT-3, pixels
                                "bilinear" if c.official_pixels else "bicubic")
        if image_index is not None:
            sam_pixels, beit_pixels = sam_pixels[image_index], beit_pixels[image_index]

        seen = text_mask & (tokens != SPECIAL_TOKENS["unknown"]) if c.official_unknown else text_mask  # Departs: <unk>
        image_tokens, T = self.beit3(beit_pixels, tokens, seen)               # (M,1+N_p,D), (M,L,D)
        V_cls, V = image_tokens[:, :1], image_tokens[:, 1:]                   # (M,1,D), (M,N_p,D)
        words = self.text_projection(T) if c.reads_text else None             # (M,L,C); Silent: T_i
        grid = (c.beit_size // c.beit_patch, c.beit_size // c.beit_patch)
        M_p = self.prompt_generator(V_cls, V, grid) if c.mpg else None        # (M,1,H_u/p,H_u/p)
        prompts = [words, self.token_mlp(V_cls), M_p]                         # the second (M,1,C)
        if c.official_precision:                                              # Departs: precision
            with torch.autocast(images.device.type, enabled=False):
                kind = self.sam.no_memory_embedding.dtype
                m = self.segment(sam_pixels, text_mask, *(x if x is None else x.to(kind) for x in prompts))
        else:
            m = self.segment(sam_pixels, text_mask, *prompts)

        outputs = {"pseudo_mask": M_p} if c.mpg else {}
        outputs["logits"] = 2 * m - 1 if c.official_logits else m             # (M,1,S/4,S/4); Departs: logits
        if c.boundary_loss:
            T_s = words[:, 0]                                                 # (M,C); Silent: (7)
            outputs["text_weight"] = self.text_weight(T_s)[:, 0]              # (M,), Linear(T_s) of Eq. (7)
        return outputs

    def criterion(self, outputs, batch, progress):
        """outputs, batch["masks"] (M,S,S) bool, progress in [0,1] -> weighted scalars; their sum is the objective."""
        c, masks = self.config, batch["masks"][:, None]                       # (M,1,S,S)
        logits = resize(outputs["logits"], masks.shape[-2:])
        losses = {"ce": binary_cross_entropy(logits, masks, c.background_weight, c.foreground_weight)}
        if c.official_dice:                                                   # Departs: (6)
            losses["dice"] = dice_loss(logits, masks, eps=1e-6) + dice_loss(-logits, ~masks, eps=1e-6)
        else:
            losses["dice"] = dice_loss(logits, masks, squared=True)
        if c.boundary_loss:
            cut = -1.0 if c.official_logits else 0.0                          # m > 0; Departs: (7)
            losses["tbl"] = boundary_loss(logits, masks, outputs["text_weight"], hard=c.hard_boundary, cut=cut)
        if c.mpg and c.lambda_mpg:
            losses["mpg"] = pseudo_mask_loss(outputs["pseudo_mask"], masks)
        lam = {"ce": c.lambda_ce, "dice": c.lambda_dice, "tbl": c.lambda_tbl, "mpg": c.lambda_mpg}
        return {name: lam[name] * loss.mean() for name, loss in losses.items()}  # Eq. (6)

    def choose_what_learns(self):
        """All but SAM 2's image encoder, where it is frozen, and what no loss reaches."""
        c, sam, prompts = self.config, self.sam, self.sam.prompt_encoder
        silent = [self.beit3.vision_embed.mask_token, prompts.point_embed, prompts.not_a_point_embed,
                  prompts.no_mask_embed if c.mpg else prompts.mask_embed,
                  sam.mask_decoder.iou_prediction_head, sam.mask_decoder.pred_obj_score_head,
                  sam.mask_decoder.output_hypernetworks_mlps[1:]]
        if c.fusion == "bi":
            silent += [self.fusion[-1].text_reads_image, self.fusion[-1].text_out]
        if not c.reads_text:
            last = self.beit3.encoder.layers[-1]
            silent += [part["B"] for part in (
                last.self_attn.q_proj, last.self_attn.inner_attn_ln, last.self_attn.out_proj, last.final_layer_norm,
                last.ffn, self.beit3.encoder.layer_norm)]
        self.requires_grad_(True)
        for part in silent:
            part.requires_grad_(False)
        sam.vision_encoder.requires_grad_(not c.freeze)

    def param_groups(self, recipe):
        """What learns, at two rates: the paper's modules, and the rest."""
        self.choose_what_learns()
        groups = {"lr": [], "lr_modules": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                high = name.startswith(("fusion.", "gate.", "prompt_generator."))
                groups["lr_modules" if high else "lr"].append(parameter)
        return [{"params": parameters, "lr": recipe[rate], "weight_decay": recipe["weight_decay"]}
                for rate, parameters in groups.items() if parameters]

    @torch.no_grad()
    def diagnose(self, outputs, masks):
        """masks (M,S,S) -> figures (M,). text_weight: |Linear(T_s)|, 0 is (7)'s trivial optimum; boundary: (7), soft,
        at weight 1; pseudo_mask_iou: of M_p, cut at 0.5, with the mask."""
        masks, figures = masks[:, None], {}                                   # (M,1,S,S)
        if "text_weight" in outputs:
            figures["text_weight"] = outputs["text_weight"].abs()
        logits = resize(outputs["logits"], masks.shape[-2:])
        figures["boundary"] = boundary_loss(logits, masks, torch.ones_like(logits[:, 0, 0, 0]))
        if "pseudo_mask" in outputs:
            pseudo = resize(outputs["pseudo_mask"], masks.shape[-2:]) > 0.5
            union = (pseudo | masks).sum((1, 2, 3))
            figures["pseudo_mask_iou"] = (pseudo & masks).sum((1, 2, 3)) / union.clamp(min=1)
        return figures


RECIPE = {                                          # 4.2 where not marked; RRSIS-D's. Departs: batch, rates
    "epochs": 40, "batch_size": 8, "micro_batch": 1, "lr": 1e-5, "lr_modules": 5e-5,
    "schedule": "step", "drop_epochs": 10, "drop_factor": 0.1,
    "weight_decay": 0.01, "warmup": 0.0, "clip": 0.0, "per_image": 0, "protocol": "resized", "empty": "zero",
    "select": "mIoU+oIoU",                          # this and the line above: official code
    "precision": "bf16", "black_boxes": 0.0, "phases": None,                  # ours; boxes: 0.2 in the official code
}
RECIPE_FOR = {"refsegrs": {"epochs": 60, "lr": 5e-5, "lr_modules": 1e-4}}
RECIPE_TINY = {"epochs": 45, "batch_size": 32, "micro_batch": 32, "lr": 2e-3, "lr_modules": 2e-3, "schedule": "cosine",
               "warmup": 0.5, "clip": 1.0, "per_image": 4}
ABLATIONS = {
    "3": {row: {"boundary_loss": tbl, "mpg": mmp, "fusion": "bi" if dhf else "none", "gate": dhf}
          for row, tbl, mmp, dhf in (
              ("Baseline", False, False, False), ("L_tbl", True, False, False), ("L_tbl+MMP", True, True, False),
              ("L_tbl+DHF", True, False, True), ("L_tbl+MMP+DHF", True, True, True))},
    "4": {"MPG w/o MHCA": {"mpg_attention": False}, "MPG w MHCA": {"mpg_attention": True},
          "Linear": {"fusion": "linear"}, "Uni": {"fusion": "uni"}, "Bi": {"fusion": "bi"},
          "w/o BC": {"gate": False}, "w/o BL": {"fusion": "none"}, "w BC&BL": {"gate": True, "fusion": "bi"}},
    "official": {"all": {                           # not of the paper: the forms of the code, its script for RRSIS-D
        "official_fusion": True, "official_logits": True, "official_pixels": True, "official_unknown": True,
        "official_precision": True, "official_dice": True, "hard_boundary": True, "lambda_ce": 0.9,
        "black_boxes": 0.2, "lr": 5e-5, "lr_modules": 1e-4, "schedule": "constant"}},
}
FIGURES = {                                         # as the paper prints them
    "3": {"Baseline": "oIoU 55.51, mIoU 36.64", "L_tbl": "oIoU 57.36, mIoU 38.63",
          "L_tbl+MMP": "oIoU 70.89, mIoU 60.20", "L_tbl+DHF": "oIoU 78.36, mIoU 68.71",
          "L_tbl+MMP+DHF": "oIoU 80.87, mIoU 73.90"},
    "4": {"MPG w/o MHCA": "oIoU 79.89, mIoU 71.59", "MPG w MHCA": "oIoU 80.87, mIoU 73.90",
          "Linear": "oIoU 77.39, mIoU 68.19", "Uni": "oIoU 78.93, mIoU 70.10", "Bi": "oIoU 80.87, mIoU 73.90",
          "w/o BC": "oIoU 77.54, mIoU 67.61", "w/o BL": "oIoU 72.33, mIoU 61.08", "w BC&BL": "oIoU 80.87, mIoU 73.90"}}
RETIRED = {"mpg_layers": 1, "zero_init": False, "dice_squared": True}      # of older runs, at what is built in now


# --------------------------------------------------------------------------------------- tokenizer, published weights

SPECIAL_TOKENS = {"begin": 0, "pad": 1, "end": 2, "unknown": 3}      # as BEiT-3's: <s> <pad> </s> <unk>
UNUSED_WORDS = 8                                    # BEiT-3's table ends on rows that no piece has
PLACE = "github.com/addf400/files/releases/tag/beit3"


class BEiT3Words:
    """BEiT-3's SentencePiece file in XLM-R's numbers: strings -> tokens, text_mask (M,L); case kept, cut to length."""

    def __init__(self, path, length):
        from sentencepiece import SentencePieceProcessor
        try:
            self.pieces, self.length = SentencePieceProcessor(model_file=path), length
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: damaged or no SentencePiece file; copy it again from {PLACE}") from error

    def __call__(self, expressions):
        tokens = torch.ones(len(expressions), self.length, dtype=torch.long)
        for row, expression in zip(tokens, expressions, strict=True):
            numbers = [piece + 1 if piece else 3 for piece in self.pieces.encode(expression)][:self.length - 2]
            row[:len(numbers) + 2] = torch.tensor([0, *numbers, 2])
        return tokens, tokens != 1


def tokenizer(config):
    """The published tokenizer: a callable, list of strings -> tokens (M,L) int64, text_mask (M,L) bool."""
    words = BEiT3Words(source := find_weights(config, config.beit_words), config.text_length)
    found, expected = words.pieces.get_piece_size() + 2, config.vocab_size - UNUSED_WORDS       # with <pad>, <mask>
    if found != expected:
        raise ValueError(f"{source}: {found} tokens, expected vocab_size - {UNUSED_WORDS} = {expected}; take the file "
                         f"beit3.spm from {PLACE}")
    return words


def find_weights(config, name):
    """What `pretrained` makes of a backbone's name: the hub name itself, or the path of its folder or file."""
    hub, is_file = config.pretrained == "hub", name.endswith((".pth", ".spm"))
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


def load_tower(tower, source, fields):
    """A published tower into `tower`, float32, exactly its own tensors; `fields` decide on the shapes."""
    if source.endswith(".pth"):
        tensors = read_pth(source)
    else:
        model, info = from_hub(type(tower).from_pretrained, source, dtype=torch.float32, output_loading_info=True)
        tensors = dict.fromkeys(info["unexpected_keys"]) | model.state_dict()
        for name in info["missing_keys"]:           # not in the file: drawn at random
            tensors.pop(name, None)
    own = tower.state_dict()
    wrong = sorted(own.keys() ^ tensors) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(f"{source}: does not fit {fields}: {len(wrong)} of {len(own)} tensors are missing, unknown or "
                         f"of another shape, the first {wrong[:2]}")
    tower.load_state_dict(tensors)
    print(f"{source}: {len(tensors)} tensors loaded")


def read_pth(path):
    """Microsoft's BEiT-3 -> its tensors, without the heads of its pretraining."""
    tensors = read_file(path, "model")
    return {name.removeprefix("beit3."): value for name, value in tensors.items() if name.startswith("beit3.")}


def read_file(path, *wrappers):
    """Tensors by name, plain or under one of `wrappers`, from a file of torch.save."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            file = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # a flipped bit raises anything from AssertionError to struct.error
        raise ValueError(f"{path}: damaged or no PyTorch weights file of plain tensors; one that asks to run code is "
                         "not opened") from error
    for wrapper in wrappers:
        if isinstance(file, dict) and isinstance(file.get(wrapper), dict):
            file = file[wrapper]
    if not isinstance(file, dict) or not all(isinstance(value, torch.Tensor) for value in file.values()):
        raise ValueError(f"{path}: expected tensors by name, plain or under {' or '.join(wrappers)}; found "
                         f"{sorted(map(str, file))[:9] if isinstance(file, dict) else type(file).__name__}")
    return file


# --------------------------------------------------------------------------------------------- the authors' own weights

POSITIONS = "sam.prompt_encoder.shared_embedding.positional_embedding"
OFFICIAL_PARTS = (                                  # the beginnings of ours; their file must have something for each
    "beit3.", "fusion.", "gate.", "prompt_generator.", "token_mlp.", "text_projection.", "text_weight.",
    "sam.vision_encoder.", "sam.mask_decoder.", "sam.no_memory_embedding", "sam.prompt_encoder.mask_embed.",
    "sam.prompt_encoder.point_embeddings.", POSITIONS)
OFFICIAL_UNUSED = ("meo_linear.", *(f"visual_model.{name}" for name in (        # their forward does not read these
    "memory_", "mask_downsample.", "maskmem", "no_mem_pos_enc", "no_obj_", "obj_ptr")))
OFFICIAL = {                                        # patterns of their names, SAM 2's in Meta's words -> ours, in turn
    r"multihead_attn\.out_proj\.": "multihead_attn.to_out.", r"(transformer\..*)\.out_proj\.": r"\1.o_proj.",
    r"\.norm(\d|_final_attn)\.": r".layer_norm\1.", r"\.patch_embed\.proj\.": ".patch_embed.projection.",
    r"\.mlp\.layers\.0\.": ".mlp.proj_in.", r"\.mlp\.layers\.1\.": ".mlp.proj_out.",
    r"(mlps\.\d+|_head)\.layers\.0\.": r"\1.proj_in.", r"(mlps\.\d+|_head)\.layers\.2\.": r"\1.proj_out.",
    r"(mlps\.\d+|_head)\.layers\.1\.": r"\1.layers.0.",
    r"output_upscaling\.0\.": "upscale_conv1.", r"output_upscaling\.1\.": "upscale_layer_norm.",
    r"output_upscaling\.3\.": "upscale_conv2.", r"mask_downscaling\.0\.": "mask_embed.conv1.",
    r"mask_downscaling\.1\.": "mask_embed.layer_norm1.", r"mask_downscaling\.3\.": "mask_embed.conv2.",
    r"mask_downscaling\.4\.": "mask_embed.layer_norm2.", r"mask_downscaling\.6\.": "mask_embed.conv3.",
    r"pe_layer\.positional_encoding_gaussian_matrix$": "shared_embedding.positional_embedding",
    r"^visual_model\.image_encoder\.trunk\.blocks\.(\d+)\.(MLP|Space)_Adapter\.": r"fusion.\1.\2.",
    r"\.MLP\.D_fc1\.": ".side.0.", r"\.MLP\.D_fc2\.": ".side.2.", r"\.Space\.D_fc1\.": ".down.",
    r"\.Space\.D_fc2\.": ".up.", r"\.Space\.text_(in|out)_linear\.": r".text_\1.",
    r"\.Space\.vlfusion_module\.multihead_attn\.": ".image_reads_text.",
    r"\.Space\.lvfusion_module\.multihead_attn\.": ".text_reads_image.",
    r"^visual_model\.sam_mask_decoder\.vlfusion_module\.multihead_attn\.": "gate.attention.",
    r"^visual_model\.image_encoder\.trunk\.": "sam.vision_encoder.backbone.",
    r"^visual_model\.image_encoder\.(neck\.convs\.\d+)\.conv\.": r"sam.vision_encoder.\1.",
    r"^visual_model\.sam_(prompt_encoder|mask_decoder)\.": r"sam.\1.",
    r"^visual_model\.no_mem_embed$": "sam.no_memory_embedding", r"^mm_extractor\.beit3\.": "beit3.",
    r"^vmtoken\.multihead_attn\.": "prompt_generator.attention.", r"^mask_linear\.": "prompt_generator.linear.",
    r"^mask_product\.": "prompt_generator.mlp.0.", r"^text_hidden_fcs\.0\.": "token_mlp.",
    r"^text_feat_linear\.": "text_projection.", r"^text2one_linear\.": "text_weight."}


def read_official(path):
    """The authors' weights, DeepSpeed's file or a plain state dict -> {our name: tensor}, float32; none left over."""
    file = read_file(path, "module", "state_dict")
    tensors, unknown = {}, []
    for name, value in file.items():
        ours = name = name.removeprefix("module.")
        for pattern, replacement in OFFICIAL.items():
            ours = re.sub(pattern, replacement, ours)
        if ours != name and ours.startswith(("sam.prompt_encoder.", *OFFICIAL_PARTS)):
            tensors[ours] = value.float()
        elif not name.startswith(OFFICIAL_UNUSED):
            unknown.append(name)
    missing = [part for part in OFFICIAL_PARTS if not any(name.startswith(part) for name in tensors)]
    if unknown or missing:
        found = sorted({".".join(name.split(".")[:-1][:2]) for name in file})
        raise ValueError(f"{path}: not the authors' RS2-SAM 2: {len(unknown)} unknown as {unknown[:3]}, none of "
                         f"{missing}; found {', '.join(found[:20])}")
    for name in [name for name in tensors if ".in_proj_" in name]:
        begin, kind = name.split("in_proj_")
        q, k, v = tensors.pop(name).chunk(3)
        tensors |= {f"{begin}to_q.{kind}": q, f"{begin}to_k.{kind}": k, f"{begin}to_v.{kind}": v}
    points = sorted(name for name in tensors if ".point_embeddings." in name)
    tensors["sam.prompt_encoder.point_embed.weight"] = torch.cat([tensors.pop(name) for name in points])
    return tensors | {"sam.shared_image_embedding.positional_embedding": tensors[POSITIONS]}


# Notes
#
# Departs (from the paper: padding, (4), (5), M_p, BEiT-3, batch; else from the code, whose form the field
#         in brackets gives; the row official/all sets all of these fields)
#   padding      is masked wherever words are read: a batch changes nothing (the code: batch 1, no padding)
#   <unk>        is read; the code takes it for padding in the union encoder, not in (2) and (4) (official_unknown)
#   (2)          the code's T2 attends to F2 (official_fusion)
#   (3)          the code's linear branch reads LN(F3) (official_fusion)
#   (4)          the query is F + SAM 2's dense positions, as in the code; T is `words`, the one projection from D to C
#   (5)          ends in a sigmoid, and "MLP layers" is one Linear, as in the code; V'_cls is multiplied by V_cls, as
#                3.4's text and the code have it and the formula has not
#   (6)          lambda_ce is 0.9 in the code (lambda_ce); Dice of [22], V-Net's, with squares, in the code the sum over
#                both classes, without squares, eps 1e-6 (official_dice)
#   (7)          M_pre is the soft probability; the code cuts m at 0, though its mask is m > 0.5: no gradient reaches
#                the logits, only the text weight learns (hard_boundary; without official_logits both cut m at 0)
#   M_p          is resized at once to 4 * S/16, the prompt encoder's input; by way of H_s x W_s, read as S x S, it
#                differs by <= 0.02
#   BEiT-3       is shown the S x S image, shrunk without aliasing, not the original: the loader hands over one size
#   pixels       BEiT-3 gets its own statistics, 0.5/0.5, bicubic; in the code ImageNet's, bilinear (official_pixels)
#   logits       one logit m, cut at 0; in the code the pair (1-m, m), which is the logit 2m-1 (official_logits)
#   precision    bf16, scoring too; the code has SAM 2, fusion and gate in float32 (official_precision), and scores
#                wholly in it (--precision fp32)
#   boxes        none; in the code 20-60 black squares of 32 x 32 on a fixed fifth of RRSIS-D's pictures (black_boxes)
#   batch        4.2's "unified batch size of 1" is read as 1 on each of its 8 cards
#   rates        as 4.2; the code's script for RRSIS-D has those of RefSegRS and never lets them fall (lr, lr_modules,
#                schedule; its script for RefSegRS: official/all with --set black_boxes=0 --set schedule=step)
# Silent (the code's choice unless marked "ours")
#   BHFM         in all 48 blocks; F_i is what a block's attention gave, F_in its shortcut; r = d/4, 4 heads, each
#                attention of (2) with its own weights, biases, exact GELU; no norm, positions or dropout; LN and MLP of
#                (3) are the block's own, frozen; (4) and (5) have 8 heads
#   T_i          C wide in every stage, with projections of each layer's own; the last layer's T is read by nobody
#   (7)          differences to the pixel above and on the left, 0 where there is none; T_s is the word <s> of `words`.
#                Weight 0 is an optimum: `diagnose` reports |weight|; near 0 the loss does nothing
#   neck         its map as it is (neck_norm: normalised over the channels, without weights), plus SAM 2's no-memory
#                embedding, as for every image; those at strides 4 and 8 reach the decoder ungated
#   M_p          has no loss of its own (lambda_mpg: one); its probabilities enter where SAM 2 expects logits
#   token MLP    Linear, ReLU, Linear on V_cls; the one sparse token: the "sparse embeddings" have no length
#   decoder      single mask, its token 0; IoU and object scores are not read
#   (6), (7)     at S x S; cross-entropy weighted 0.9/1.1 as in [19]; Dice eps 1, all per expression (ours)
#   learning     all but SAM 2's image encoder, backbone and neck, and what gets no gradient: `choose_what_learns`
#   rates        the high one: fusion layers, gate, MPG; the two Linears on the text have the base rate
#   training     weight decay 0.01 on everything, bf16, no warm-up, no clipping; other data: RRSIS-D's recipe (ours)
#   selection    best mIoU + oIoU on val; scored at S x S; an empty union counts 0
#   text         BEiT-3's own pieces in XLM-R's numbering, case kept, at most 64 (ours; the code has no limit)
#   init         PyTorch's defaults; without published weights start_from_scratch (ours)
#   Tables 3, 4  are of RefSegRS's test split: --dataset refsegrs brings its recipe. MMP = MPG; DHF = BHFMM = BHFM, its
#                layers BL and its gate BC. Without MPG: SAM 2's no-mask embedding; w/o MHCA: V_cls for V'_cls * V_cls;
#                Linear: no words in (2), the rest of (3) as it is; Uni: T_i is Linear(T). Baseline: recipe and loss (6)
#                less L_tbl (all ours; its numbers in the paper are EVF-SAM's, L_tbl+DHF's Pr@0.7 and Pr@0.9 FIANet's)
# Omits
#   memory       SAM 2's, as the paper does; the tower is SAM 2.0's Hiera-L in the image model of transformers
