"""RSRefSeg 2: CLIP says where the referred object is, SAM says how far it reaches.

Paper
    Chen, Liu, Chen, Zhang, Zou, Shi. RSRefSeg 2: Decoupling Referring Remote Sensing Image Segmentation with Foundation
    Models. arXiv:2507.06231, 2025, https://arxiv.org/abs/2507.06231
Official
    https://github.com/KyanChen/RSRefSeg2 (on mmseg, DeepSpeed and peft). No code was copied.
Idea
    SigLIP 2 reads a small copy of the image and the sentence. A prompter splits the sentence into two subspaces, lets
    the image read one and then the other, and turns what it found into prompts: n_p vectors and one coarse map.
    SAM 2.1 sees the large image and these prompts, never the sentence. Its mask decoder learns, the towers by LoRA.
Shapes
    N images, M expressions, L tokens with EOS and padding; I_1, I_2 the image at H_1 = 512 and H_2 = 1024
    v           image tokens (N,g*g,D_v), g = H_1 / patch, rounded down; v'_1, v'_2 (M,g*g,D_v) once they have read the
                words of the first, of both subspaces
    t_word      words (M,L,D_t); t_sent sentence (M,D_v); t_1, t_2 subspaces (M,n_t,D_t), t'_1, t'_2 after interaction
    p_sparse    (M,n_p,C), C SAM's prompt width; p_dense (M,1,H_2/4,H_2/4), cosines in [-1,1]
    F_img       SAM's image feature (N,C,H_2/16,H_2/16); the decoder also takes strides 4 and 8, (N,C/8,..), (N,C/4,..)
    D_t = D_v = 1152 (paper's d_1) but for the giant image towers; C = 256 (d_2)
Equations
    Eq. (1)             RSRefSeg2.forward
    Eq. (2)             LoRALinear.forward
    Eq. (3)             CascadedPrompter.forward
    Eq. (4)             ReferringSemanticDecomposition.forward
    Eq. (5)             TextVisualInteraction.forward
    Eq. (6)             SparsePromptGeneration.forward
    Eq. (7)             DensePromptGeneration.forward, cosine_maps
    Eq. (8)             RSRefSeg2.generate
    Eq. (9), Eq. (10), Eq. (12)     RSRefSeg2.criterion
    Eq. (11), Eq. (13)              losses.py, orthogonal_loss; metrics.py
"""

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, Sam2Config, Sam2Model
from transformers import SiglipConfig, SiglipModel, SiglipTextModel, SiglipVisionModel

from losses import binary_cross_entropy, contrast, dice_loss, mask_pooled, multi_instance_loss
from losses import on_grid, orthogonal_loss, processes

SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)       # SAM 2's; SigLIP's are 0.5 and 0.5
MAPS = ("dense_prompt",)


@dataclass(frozen=True)
class Config:
    image_size: int = 1024                          # IV-C2: H_2 = W_2
    clip_size: int | None = None                    # IV-C2: H_1 = W_1; None: the tower's; other: positions interpolated
    text_length: int = 64                           # SigLIP's
    pretrained: str = "hub"                         # "hub", "none", or a folder with one entry per backbone
    clip: str = "google/siglip2-so400m-patch16-512"             # IV-C
    sam: str = "facebook/sam2.1-hiera-large"                    # IV-C
    freeze: bool = True                             # IV-C2: of the towers only LoRA and SAM's mask decoder learn
    train_prompt_encoder: bool = False              # True: the official code, and the no-memory vector's
    checkpointing: bool = False                     # recompute each block in the backward pass: less memory, more time

    vocab_size: int = 256000                        # the towers' numbers, read for pretrained="none" only:
    vision_size: int = 512                          # otherwise each tower's own configuration has them
    patch: int = 16
    vision_width: int = 1152
    vision_layers: int = 27
    vision_heads: int = 16
    vision_mlp: int = 4304
    text_width: int = 1152
    text_layers: int = 27
    text_heads: int = 16
    text_mlp: int = 4304
    sam_width: int = 144                            # doubles, as do the heads, from stage to stage
    sam_heads: int = 2
    sam_blocks: tuple[int, ...] = (2, 6, 36, 4)
    sam_windows: tuple[int, ...] = (8, 4, 16, 8)
    sam_global: tuple[int, ...] = (23, 33, 43)
    sam_background: int = 7
    prompt_width: int = 256
    decoder_heads: int = 8
    decoder_mlp: int = 2048

    lora_text: int = 16                             # IV-C1, like the next seven; 0 = frozen
    lora_vision: int = 16
    lora_sam: int = 16
    n_t: int = 3
    n_p: int = 9
    decomposition_blocks: int = 2                   # 0: Table X's single stage in the official code, reads raw words
    interaction_blocks: int = 2
    prompt_blocks: int = 2
    attention_width: int = 512                      # official code
    heads: int = 8
    mlp_width: int = 512

    subspace_init: str = "textpool"                 # Table IX: or zero, learnable
    subspace_positions: bool = True
    image_positions: str = "learnable"              # or sine, none; fourier: the official code's sine
    prompt_init: str = "learnable"                  # or zero
    prompt_positions: bool = True
    cascade: bool = True                            # Table X
    dense: bool = True
    intra_attention: bool = True                    # Table XI
    inter_attention: bool = True
    self_attention: bool = True                     # Table XII
    cross_attention: bool = True
    dense_text: str = "sent"                        # Table XIII: or t2, t2_prime, sparse
    dense_pool: str = "mean"                        # of t2, t2_prime; learned: the official code
    dense_soft_text: bool = False
    dense_image: str = "v2"                         # or v
    dense_conv: str = "relu"                        # III-C; or none, or official: two layers with GELU
    dense_upsample: str = "pre"                     # or post

    interleave: bool = False                        # True: the official code, prompt block k reads interaction block k
    dense_scale: bool = False                       # True: the official code, SigLIP's scale and bias on p_dense
    align_corners: bool = False                     # True: the official code, in Eq. (7)
    antialias: bool = True                          # False: the official code, I_1 is only interpolated
    lower_case: bool = True                         # False: the official code
    pad_to_longest: bool = False                    # True: the official code, t_sent depends on the batch mates
    dynamic_multimask: bool = False                 # True: the official code, at test another mask may win
    enlarge_twice: bool = False                     # True: the official code, logits are scored by way of image_size
    official_losses: bool = False                   # True: the official code's L_samp, L_spat and L_dense

    alpha_ce: float = 1.0                           # Eq. (10) has no such factor
    alpha_dice: float = 1.0                         # IV-C2
    alpha_ortho: float = 0.5
    alpha_dense: float = 0.0
    alpha_spat: float = 0.0
    alpha_samp: float = 0.5
    spat: str = "CE"                                # Table XV: or MIL
    spat_text: str = "sent"                         # or t2
    spat_image: str = "v"                           # or v2
    nce_text: str = "t2"                            # Table XV's best row; sent as printed in Eq. (12)
    nce_image: str = "v"

    def __post_init__(self):
        for field, words in WORDS.items():
            one_of(field, getattr(self, field), words)
        if self.interleave and self.interaction_blocks != self.prompt_blocks:
            raise ValueError(f"interleave=True pairs the blocks: interaction_blocks={self.interaction_blocks} and "
                             f"prompt_blocks={self.prompt_blocks} must be equal")
        if not self.decomposition_blocks and (self.cascade or self.subspace_positions or not self.pad_to_longest):
            raise ValueError("decomposition_blocks=0 hands on all words in place of subspaces: set cascade=False, "
                             "subspace_positions=False and pad_to_longest=True")
        if not self.cascade and self.alpha_ortho:
            raise ValueError(f"cascade=False leaves one subspace: set alpha_ortho=0, got {self.alpha_ortho}")
        if not self.dense and self.alpha_dense:
            raise ValueError(f"dense=False leaves nothing to supervise: set alpha_dense=0, got {self.alpha_dense}")
        if self.image_size % 32:
            raise ValueError(f"image_size={self.image_size}: SAM's image encoder takes multiples of 32")

    @classmethod
    def tiny(cls):
        return cls(image_size=128, pretrained="none", freeze=False, text_length=20, vocab_size=256, vision_size=96,
                   patch=8, vision_width=64, vision_layers=3, vision_heads=4, vision_mlp=128, text_width=64,
                   text_layers=2, text_heads=4, text_mlp=128, sam_width=16, sam_heads=1, sam_blocks=(1, 1, 2, 1),
                   sam_windows=(8, 4, 4, 2), sam_global=(3,), sam_background=4, prompt_width=64, decoder_heads=4,
                   decoder_mlp=128, lora_text=0, lora_vision=0, lora_sam=0, attention_width=64, heads=4, mlp_width=64,
                   alpha_dense=1.0)             # without pretrained alignment p_dense may settle low in the object

    @property
    def aligned(self):
        """The texts that the active terms L_samp and L_spat of Eq. (12) read: some of sent, t2."""
        return {text for text, alpha in ((self.nce_text, self.alpha_samp), (self.spat_text, self.alpha_spat)) if alpha}


WORDS = {"subspace_init": ("textpool", "zero", "learnable"), "prompt_init": ("learnable", "zero"),
         "image_positions": ("learnable", "sine", "none", "fourier"), "dense_pool": ("mean", "learned"),
         "dense_text": ("sent", "t2", "t2_prime", "sparse"), "dense_conv": ("relu", "none", "official"),
         "dense_image": ("v2", "v"), "dense_upsample": ("pre", "post"), "spat": ("CE", "MIL"),
         "spat_text": ("sent", "t2"), "spat_image": ("v", "v2"), "nce_text": ("sent", "t2"), "nce_image": ("v", "v2")}


# --------------------------------------------------------------- III-B: dual-modality aligned semantic feature encoder


class LoRALinear(nn.Module):
    """Eq. (2): a linear layer (..., d_in) -> (..., d_out) and its low-rank addition, at first none. Stands alone.

    linear: the plain nn.Linear, whose `weight` and `bias` keep their names; rank: r of A (d_out,r) and B (d_in,r).
    """

    def __init__(self, linear, rank):
        super().__init__()
        if type(linear) is not nn.Linear:
            raise ValueError(f"LoRALinear: expected a plain nn.Linear, got {type(linear).__name__}; where another "
                             "module reads its weight, as nn.MultiheadAttention does, nothing would be added")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.in_features, rank))
        nn.init.uniform_(self.lora_B, -linear.in_features ** -0.5, linear.in_features ** -0.5)

    def forward(self, x):
        W, A, B = self.weight, self.lora_A, self.lora_B
        return functional.linear(x, W, self.bias) + (x @ B) @ A.T  # Eq. (2)


# ---------------------------------------------------------------------- III-C: cascaded second-order referring prompter


class CascadedPrompter(nn.Module):
    """Eq. (3): image tokens v (M,g*g,D_v), words (M,L,D_t), text_mask (M,L), sentence (M,D_v) -> a dict.

    p_sparse (M,n_p,C), t1, t2 (M,n_t,D_t), v2 (M,g*g,D_v) and, with dense, p_dense (M,1,size,size) float32. Tied to
    side x side image tokens; reads Config's fields from n_t to align_corners. Brings all this section.
    """

    def __init__(self, vision_width, text_width, prompt_width, side, size, config):
        super().__init__()
        self.config, self.side = config, side
        c, subspaces = config, 2 if config.cascade else 1
        layer = {"inner": c.attention_width, "heads": c.heads, "hidden": c.mlp_width}
        self.text_positions = nn.ParameterList(
            torch.randn(c.n_t, text_width) for _ in range(subspaces if c.subspace_positions else 0))
        if c.image_positions in ("sine", "fourier"):
            make = sine_positions if c.image_positions == "sine" else fourier_positions
            self.register_buffer("image_position", make(side, vision_width), persistent=make is fourier_positions)
        else:
            places = side * side, vision_width
            self.image_position = nn.Parameter(torch.randn(places)) if c.image_positions == "learnable" else 0.0
        self.decompose = ReferringSemanticDecomposition(text_width, c.n_t, c.decomposition_blocks, subspaces,
                                                        c.subspace_init, c.intra_attention, c.inter_attention, **layer)
        interaction = partial(TextVisualInteraction, text_width, vision_width, c.interaction_blocks,
                              cross_attention=c.cross_attention, **layer)
        if c.cascade:           # t'_1 leaves the first order only through v'_1
            self.first = interaction(self_attention=c.self_attention and c.cross_attention)
        self.second = interaction(self_attention=c.self_attention)
        count = c.n_p + 1 if c.dense and c.dense_text == "sparse" else c.n_p   # Silent: Table XIII
        self.sparse = SparsePromptGeneration(prompt_width, text_width, vision_width, count, c.prompt_blocks,
                                             c.prompt_init, c.prompt_positions, **layer)
        if c.dense_pool == "learned":               # official code, the widths ours
            self.pool = nn.Sequential(nn.Linear(text_width, text_width), nn.GELU(), nn.Conv1d(c.n_t, c.n_t, 1),
                                      nn.BatchNorm1d(c.n_t), nn.Conv1d(c.n_t, 1, 1), nn.Flatten())      # -> (M,D_t)
        if c.dense:
            source = {"sent": vision_width, "t2": text_width, "t2_prime": text_width, "sparse": prompt_width}
            soft = c.mlp_width if c.dense_soft_text else 0
            self.dense = DensePromptGeneration(vision_width, source[c.dense_text], size, c.dense_conv, c.dense_upsample,
                                               c.align_corners, soft, c.dense_scale)

    def forward(self, v, words, text_mask, sentence):
        c = self.config
        expect("v", v, len(words), self.side ** 2, None)
        pe_t, pe_v = list(self.text_positions) or [0.0] * self.decompose.count, self.image_position
        subspaces = self.decompose(words, text_mask, pe_t) if c.decomposition_blocks else [words]
        t1, t2, pe_1, pe_2 = subspaces[0], subspaces[-1], pe_t[0], pe_t[-1]   # in a single stage t1 is t2
        v1 = self.first(t1, v, pe_1, pe_v)[-1][1] if c.cascade else v         # (M,g*g,D_v)
        stages = self.second(t2, v1, pe_2, pe_v)
        t2_prime, v2 = stages[-1]                                             # (M,n_t,D_t), (M,g*g,D_v)
        read = stages if c.interleave else stages[-1:] * c.prompt_blocks
        p_sparse = self.sparse(read, pe_2, pe_v)                              # (M,Q,C)
        prompts = {"p_sparse": p_sparse[:, :c.n_p], "t1": t1, "t2": t2, "v2": v2}
        if c.dense:
            text = {"sent": sentence, "t2": t2, "t2_prime": t2_prime, "sparse": p_sparse[:, -1]}[c.dense_text]
            if c.dense_text in ("t2", "t2_prime"):
                text = self.pool(text) if c.dense_pool == "learned" else text.mean(1)         # (M,D_t)
            image = rearrange(v2 if c.dense_image == "v2" else v, "m (y x) d -> m d y x", y=self.side)
            prompts["p_dense"] = self.dense(image, text)                      # (M,1,size,size)
        return prompts  # Eq. (3)


def one_of(name, value, words):
    """ValueError for an argument that is none of `words`."""
    if value not in words:
        raise ValueError(f"{name}={value}: expected {' or '.join(words)}")


def expect(name, tensor, *sizes, dtype=None):
    """ValueError unless the tensor is of these sizes, None standing for any, and of this type."""
    if tensor.ndim != len(sizes) or any(size not in (None, n) for size, n in zip(sizes, tensor.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name}: expected a tensor of size ({wanted}), got {tuple(tensor.shape)}")
    if dtype not in (None, tensor.dtype):
        raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")


class AttentionLayer(nn.Module):
    """LN(x + attention(x, context)): x (B,Q,C), context (B,K,D), mask (B,K) True = may be read -> (B,Q,C).

    width C, context_width D, inner: of queries, keys and values. Positions, 0.0 or (..,C) and (..,D), are added to
    queries and keys, not to values. Brings expect.
    """

    def __init__(self, width, context_width, inner=512, heads=8):
        super().__init__()
        if inner % heads:
            raise ValueError(f"inner={inner}: expected a multiple of heads={heads}")
        self.heads = heads
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(context_width, inner)
        self.to_v = nn.Linear(context_width, inner)
        self.to_out = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x, context, position, context_position, mask=None):
        expect("x", x, None, None, self.to_q.in_features)
        expect("context", context, len(x), None, self.to_k.in_features)
        if mask is not None:
            expect("mask", mask, *context.shape[:2], dtype=torch.bool)
            mask = mask[:, None, None]                                        # (B,1,1,K)
        q, k, v = self.to_q(x + position), self.to_k(context + context_position), self.to_v(context)
        q, k, v = (rearrange(tokens, "b n (a d) -> b a n d", a=self.heads) for tokens in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)      # (B,heads,Q,inner/heads)
        return self.norm(x + self.to_out(rearrange(mixed, "b a n d -> b n (a d)")))   # Departs: (4)-(6)


def mlp(width, hidden):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MlpLayer(nn.Module):
    """LN(x + MLP(x)): (B,n,C) -> (B,n,C). Brings mlp."""

    def __init__(self, width, hidden=512):
        super().__init__()
        self.mlp = mlp(width, hidden)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.mlp(x))                                     # Departs: (4)-(6)


class CrossLayer(nn.Module):
    """An AttentionLayer and an MlpLayer, with their arguments: x (B,n,C), context (B,k,D) -> (B,n,C)."""

    def __init__(self, width, context_width, inner=512, heads=8, hidden=512):
        super().__init__()
        self.attention = AttentionLayer(width, context_width, inner, heads)
        self.mlp = MlpLayer(width, hidden)

    def forward(self, x, context, position, context_position, mask=None):
        return self.mlp(self.attention(x, context, position, context_position, mask))


def repeated(count, make, *sizes):
    """A ModuleList of `count` modules make(*sizes)."""
    return nn.ModuleList(make(*sizes) for _ in range(count))


class ReferringSemanticDecomposition(nn.Module):
    """Eq. (4): words (M,L,D_t), text_mask (M,L) bool, True at one word or more of each -> [t_1, t_2], each (M,n_t,D_t).

    width D_t; subspaces: 1 in a single-stage prompter; start of the t^q: "textpool", "zero", "learnable"; intra, inter:
    Table XI; inner, heads, hidden: CrossLayer's. pe: positions (n_t,D_t) or 0.0, one for each subspace.
    Brings one_of, expect, repeated, mlp, AttentionLayer, MlpLayer, CrossLayer.
    """

    def __init__(self, width, n_t=3, blocks=2, subspaces=2, start="textpool", intra=True, inter=True,
                 inner=512, heads=8, hidden=512):
        super().__init__()
        one_of("start", start, ("textpool", "zero", "learnable"))
        self.width, self.count, self.n_t, self.init = width, subspaces, n_t, start
        self.queries = nn.Parameter(torch.randn(subspaces, 1, n_t, width)) if start == "learnable" else 0.0
        layer, pair = (width, width, inner, heads), inter and subspaces == 2
        self.intra = repeated(blocks, repeated, subspaces if intra else 0, AttentionLayer, *layer)
        self.cross = repeated(blocks, repeated, subspaces, CrossLayer, *layer, hidden)
        self.inter = repeated(blocks, repeated, 2 if pair else 0, CrossLayer, *layer, hidden)

    def pooled(self, words, text_mask):
        """Adaptive average pooling of each expression's words to n_t vectors -> (M,n_t,D_t)."""
        n = text_mask.sum(1)[:, None]                                         # (M,1)
        k = torch.arange(self.n_t, device=words.device)
        first, end = k * n // self.n_t, -(-(k + 1) * n // self.n_t)           # (M,n_t)
        place = torch.arange(words.shape[1], device=words.device)
        run = (place >= first[..., None]) & (place < end[..., None])          # (M,n_t,L)
        return (run / (end - first)[..., None]).to(words.dtype) @ words

    def forward(self, words, text_mask, pe=(0.0, 0.0)):
        expect("words", words, None, None, self.width)
        expect("text_mask", text_mask, *words.shape[:2], dtype=torch.bool)
        if self.init == "textpool":
            t = [self.pooled(words, text_mask)] * self.count                  # (M,n_t,D_t) each
        else:
            t = list(words.new_zeros(self.count, len(words), self.n_t, self.width) + self.queries)
        for intra, cross, inter in zip(self.intra, self.cross, self.inter, strict=True):
            for k, layer in enumerate(intra):
                t[k] = layer(t[k], t[k], pe[k], pe[k])
            for k, layer in enumerate(cross):
                t[k] = layer(t[k], words, pe[k], 0.0, text_mask)
            for k, layer in enumerate(inter):                                 # t_1 reads t_2, t_2 the new t_1
                t[k] = layer(t[k], t[1 - k], pe[k], pe[1 - k])  # Eq. (4)  # Departs: (4) line 3
        return t


class TextVisualInteraction(nn.Module):
    """Eq. (5): t (M,n_t,D_t), v (M,n,D_v) -> [(t', v') after each block], of the same shapes.

    text_width D_t, vision_width D_v; self_attention, cross_attention: Table XII; inner, heads, hidden: CrossLayer's.
    pe_t (n_t,D_t), pe_v (n,D_v) or 0.0. Brings expect, repeated, mlp, AttentionLayer, MlpLayer, CrossLayer.
    """

    def __init__(self, text_width, vision_width, blocks=2, self_attention=True, cross_attention=True,
                 inner=512, heads=8, hidden=512):
        super().__init__()
        self.attends = cross_attention
        cross = (CrossLayer, vision_width, text_width, inner, heads, hidden)
        self.intra = repeated(blocks if self_attention else 0, AttentionLayer, text_width, text_width, inner, heads)
        self.cross = repeated(blocks, *(cross if cross_attention else (MlpLayer, vision_width, hidden)))

    def forward(self, t, v, pe_t=0.0, pe_v=0.0):
        stages = []
        for k, cross in enumerate(self.cross):
            t = self.intra[k](t, t, pe_t, pe_t) if self.intra else t
            v = cross(v, t, pe_v, pe_t) if self.attends else cross(v)  # Eq. (5)
            stages.append((t, v))
        return stages


class SparsePromptGeneration(nn.Module):
    """Eq. (6): stages, the (t'_2, v'_2) that each block reads, (M,n_t,D_t) and (M,n,D_v) -> (M,count,C).

    width C, text_width D_t, vision_width D_v; count: n_p; start of p^q: "learnable", "zero"; positions: it has its own;
    inner, heads, hidden: CrossLayer's. pe_t (n_t,D_t), pe_v (n,D_v) or 0.0.
    Brings one_of, expect, repeated, mlp, AttentionLayer, MlpLayer, CrossLayer.
    """

    def __init__(self, width, text_width, vision_width, count=9, blocks=2, start="learnable", positions=True,
                 inner=512, heads=8, hidden=512):
        super().__init__()
        one_of("start", start, ("learnable", "zero"))
        self.shape = count, width
        self.queries = nn.Parameter(torch.randn(count, width)) if start == "learnable" else 0.0
        self.position = nn.Parameter(torch.randn(count, width)) if positions else 0.0
        self.intra = repeated(blocks, AttentionLayer, width, width, inner, heads)
        self.cross_text = repeated(blocks, CrossLayer, width, text_width, inner, heads, hidden)
        self.cross_image = repeated(blocks, CrossLayer, width, vision_width, inner, heads, hidden)
        self.out = mlp(width, hidden)

    def forward(self, stages, pe_t=0.0, pe_v=0.0):
        if len(stages) != len(self.intra):
            raise ValueError(f"stages: expected a pair (t, v) for each of {len(self.intra)} blocks, got {len(stages)}")
        t, _ = stages[0]
        p, pe = t.new_zeros(len(t), *self.shape) + self.queries, self.position
        for intra, text, image, (t, v) in zip(self.intra, self.cross_text, self.cross_image, stages, strict=True):
            p = intra(p, p, pe, pe)
            p = text(p, t, pe, pe_t)
            p = image(p, v, pe, pe_v)  # Eq. (6)  # Departs: (6) line 3
        return self.out(p)


def resize(maps, size, align_corners=False):
    """(B,C,h,w) -> (B,C,H,W), bilinear; size: (H,W), or H where W = H."""
    return functional.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def cosine_maps(features, text, size, align_corners=False, eps=1e-6):
    """Cosines of text (M,D) with bilinearly upsampled features (M,D,h,w) -> (M,1,H,W) float32; size as in resize.

    With Y and X the weights of linear interpolation, an upsampled vector is the sum of Y_ia X_jb f_ab over four
    neighbours: its dot product is the upsampled dot product, its squared norm a sum of the neighbours' inner products.
    So nothing of D channels is upsampled; exact but for rounding, and float32 whatever the autocast. Stands alone.
    """
    size = (size, size) if isinstance(size, int) else size
    with torch.autocast(features.device.type, enabled=False):
        f, text = features.float(), functional.normalize(text.float(), dim=-1)
        eyes = (torch.eye(n, device=f.device)[None] for n in f.shape[-2:])
        Y, X = (functional.interpolate(eye, n, mode="linear", align_corners=align_corners)[0].T
                for eye, n in zip(eyes, size, strict=True))                   # (H,h), (W,w)
        (Y_same, Y_next), (X_same, X_next) = ((W * W, W * functional.pad(W[:, 1:], (0, 1))) for W in (Y, X))
        below, right, across = (functional.pad(f, (0, x, 0, y))[..., y:, x:] for y, x in ((1, 0), (0, 1), (1, 1)))
        norm = (Y_same @ (f * f).sum(1) @ X_same.T + 2 * Y_next @ (f * below).sum(1) @ X_same.T
                + 2 * Y_same @ (f * right).sum(1) @ X_next.T
                + 2 * Y_next @ (f * across + below * right).sum(1) @ X_next.T)                      # (M,H,W)
        dot = Y @ torch.einsum("mdyx,md->myx", f, text) @ X.T
        return (dot / norm.clamp(min=eps * eps).sqrt())[:, None]


class DensePromptGeneration(nn.Module):
    """Eq. (7): image features (M,D_v,h,w), channels first, and text (M,D) -> p_dense (M,1,H,W) float32.

    vision_width D_v, text_width D; size: (H,W), or H of a square; conv: "relu", "none", "official"; upsample: "pre",
    "post"; soft: hidden width of an MLP on the text, 0 for none; scale: SigLIP's factor and bias on the cosines.
    Brings one_of, expect, mlp, resize, cosine_maps.
    """

    def __init__(self, vision_width, text_width, size, conv="relu", upsample="pre", align_corners=False, soft=0,
                 scale=False):
        super().__init__()
        one_of("conv", conv, ("relu", "none", "official"))
        one_of("upsample", upsample, ("pre", "post"))
        self.size, self.align_corners, self.upsample = size, align_corners, upsample
        self.widths, D = (vision_width, text_width), vision_width
        if conv == "relu":
            self.conv = nn.Sequential(nn.Conv2d(D, D, 3, padding=1, bias=False), nn.BatchNorm2d(D), nn.ReLU())
        elif conv == "official":
            self.conv = nn.Sequential(nn.Conv2d(D, D // 2, 3, padding=1), nn.BatchNorm2d(D // 2), nn.GELU(),
                                      nn.Conv2d(D // 2, D, 3, padding=1))
        else:
            self.conv = nn.Identity()
        self.soft = mlp(text_width, soft) if soft else nn.Identity()
        self.match = nn.Identity() if text_width == D else nn.Linear(text_width, D)
        self.logit_scale, self.logit_bias = (
            nn.Parameter(torch.tensor([value])) if scale else None for value in (math.log(10), -10.0))

    def forward(self, v, text):
        D_v, D = self.widths
        expect("image features", v, None, D_v, None, None)
        expect("text", text, len(v), D)
        F_dense, t_sent = self.conv(v), self.match(self.soft(text))           # Phi_up, Phi_norm in cosine_maps
        size = self.size if self.upsample == "pre" else v.shape[-2:]
        p_dense = cosine_maps(F_dense, t_sent, size, self.align_corners)  # Eq. (7)
        if self.logit_scale is not None:
            p_dense = p_dense * self.logit_scale.exp() + self.logit_bias
        return resize(p_dense, self.size, self.align_corners)


def sine_positions(side, width):
    """Sines and cosines of x and of y at width/4 frequencies, at the centres of side x side cells -> (side^2,width)."""
    centres = (torch.arange(side) + 0.5) / side
    angles = centres[:, None] * 2 * math.pi * 10000 ** -(torch.arange(width // 4) / (width // 4))  # (side,width/4)
    waves = torch.cat((angles.sin(), angles.cos()), -1)                                            # (side,width/2)
    return torch.cat((waves.repeat(side, 1), waves.repeat_interleave(side, 0)), -1)


def fourier_positions(side, width):
    """SAM's: sines and cosines of width/2 random projections of the centres, from -1 to 1 -> (side^2,width)."""
    axis = (2 * torch.arange(side) + 1) / side - 1
    centres = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)             # (side^2,2), x and y
    angles = 2 * math.pi * centres @ torch.randn(2, width // 2)
    return torch.cat((angles.sin(), angles.cos()), -1)


# --------------------------------------------------------------------- III-D, III-E: decoupled segmentation, the losses


def tower_configs(config):
    """SigLIP's and SAM 2's configurations: from Config's own numbers for pretrained="none", else published."""
    c = config
    if c.pretrained == "none":
        vision, text = ({"hidden_size": getattr(c, f"{kind}_width"), "intermediate_size": getattr(c, f"{kind}_mlp"),
                         "num_hidden_layers": getattr(c, f"{kind}_layers"),
                         "num_attention_heads": getattr(c, f"{kind}_heads")} for kind in ("vision", "text"))
        clip = SiglipConfig(
            text_config=text | {"vocab_size": c.vocab_size, "max_position_embeddings": c.text_length, "pad_token_id": 0,
                                "projection_size": c.vision_width, "eos_token_id": 2, "bos_token_id": 2},
            vision_config=vision | {"image_size": c.vision_size, "patch_size": c.patch})
        widths, heads = ([base * 2 ** stage for stage in range(4)] for base in (c.sam_width, c.sam_heads))
        backbone = {
            "model_type": "sam2_hiera_det_model", "hidden_size": c.sam_width, "embed_dim_per_stage": widths,
            "num_attention_heads_per_stage": heads, "blocks_per_stage": list(c.sam_blocks),
            "window_size_per_stage": list(c.sam_windows), "global_attention_blocks": list(c.sam_global),
            "window_positional_embedding_background_size": [c.sam_background] * 2}
        sam = Sam2Config(
            vision_config={"model_type": "sam2_vision_model", "backbone_config": backbone,
                           "backbone_channel_list": widths[::-1], "fpn_hidden_size": c.prompt_width},
            prompt_encoder_config={"hidden_size": c.prompt_width},
            mask_decoder_config={"hidden_size": c.prompt_width, "num_attention_heads": c.decoder_heads,
                                 "mlp_dim": c.decoder_mlp, "iou_head_hidden_dim": c.prompt_width})
    else:
        (clip, _), (sam, _) = published(SiglipConfig, c, c.clip), published(Sam2Config, c, c.sam)
        clip.vision_config.dtype = clip.text_config.dtype = sam.dtype = torch.float32         # whatever is said there
        if c.text_length > (longest := clip.text_config.max_position_embeddings):
            raise ValueError(f"text_length={c.text_length}: {c.clip} has positions for {longest} tokens")
    clip.vision_config.vision_use_head = False      # III-B: the pooling layer goes, the map stays
    sam.prompt_encoder_config.image_size = c.image_size
    sam.mask_decoder_config.dynamic_multimask_via_stability = c.dynamic_multimask
    return clip, sam


class RSRefSeg2(nn.Module):
    """Images and expressions to mask logits; see Config for the switches, forward for the outputs."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        clip, sam = tower_configs(c)
        self.vision = SiglipVisionModel._from_config(clip.vision_config)
        self.text = SiglipTextModel._from_config(clip.text_config)
        self.sam = Sam2Model._from_config(sam)
        attention = "q_proj", "k_proj", "v_proj", "out_proj"                  # Silent: LoRA
        for tower, rank, ends in ((self.vision, c.lora_vision, attention), (self.text, c.lora_text, attention),
                                  (self.sam.vision_encoder, c.lora_sam, ("attn.qkv", "attn.proj"))):
            for path, layer in tower.named_modules():
                if rank and path.endswith(ends):
                    parent, _, name = path.rpartition(".")
                    setattr(tower.get_submodule(parent), name, LoRALinear(layer, rank))
        self.small = c.clip_size or clip.vision_config.image_size             # H_1
        D_v, D_t = clip.vision_config.hidden_size, clip.text_config.hidden_size
        self.prompter = CascadedPrompter(D_v, D_t, sam.prompt_encoder_config.hidden_size,
                                         self.small // clip.vision_config.patch_size, c.image_size // 4, c)
        self.match_t2 = nn.Linear(D_t, D_v) if "t2" in c.aligned and D_t != D_v else nn.Identity()
        used = {"samp": c.alpha_samp, "spat": c.alpha_spat, "dense": c.alpha_dense and not c.dense_scale}
        self.scales = nn.ParameterDict({name: torch.tensor(1 / 0.07).log() for name in used if used[name]})
        self.biases = nn.ParameterDict({name: torch.zeros(()) for name in self.scales
                                        if name == "dense" or (name, c.spat) == ("spat", "CE")})
        if c.pretrained == "none":
            self.start_from_scratch()
        self.choose_what_learns()
        if c.checkpointing:
            for tower in (self.vision, self.text, self.sam):
                tower._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))

    def start_from_scratch(self):
        """From SAM's own 0.02 narrow layers hardly learn: its encoder by fan-in, what reads the text by Xavier.

        The towers' positions start as sines: from random tables places are hardly read.
        """
        for part in (self.sam.vision_encoder, self.prompter, self.sam.prompt_encoder, self.sam.mask_decoder):
            for module in part.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
                    module.reset_parameters()
                    if part is not self.sam.vision_encoder and not isinstance(module, nn.Embedding):
                        nn.init.xavier_uniform_(module.weight)
                        if module.bias is not None:
                            nn.init.zeros_(module.bias)
        with torch.no_grad():
            for table in (self.vision.embeddings.position_embedding.weight,                   # (side^2,width) each
                          self.sam.vision_encoder.backbone.pos_embed[0].flatten(1).mT):
                places = sine_positions(math.isqrt(len(table)), table.shape[1])
                places = places - places.mean(0)
                table.copy_(0.5 * places / places.std())

    def choose_what_learns(self):
        """With freeze LoRA, prompter, factors and SAM's mask decoder, else all; of SAM never what no loss reaches."""
        c, decoder, prompts = self.config, self.sam.mask_decoder, self.sam.prompt_encoder
        if c.freeze:
            learning = ["prompter.", "scales.", "biases.", "match_t2.", "sam.mask_decoder."]
            if c.train_prompt_encoder:
                learning += ["sam.prompt_encoder.", "sam.no_memory_embedding"]
            for name, parameter in self.named_parameters():
                parameter.requires_grad_("lora_" in name or name.startswith(tuple(learning)))
        unreached = [decoder.iou_prediction_head, decoder.pred_obj_score_head, *decoder.output_hypernetworks_mlps[1:],
                     prompts.point_embed, prompts.not_a_point_embed,
                     prompts.no_mask_embed if c.dense else prompts.mask_embed]       # Departs: decoder
        if "sent" not in c.aligned and not (c.dense and c.dense_text == "sent"):
            unreached.append(self.text.head)
        for module in unreached:
            module.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        for module in (self.vision, self.text, self.sam.vision_encoder, self.sam.prompt_encoder):
            module.train(mode and any(parameter.requires_grad for parameter in module.parameters()))
        return self

    def load_pretrained(self):
        """SigLIP and SAM 2 as published, from the hub or the folder `pretrained` -> {state-dict prefix: source}."""
        c = self.config
        (siglip, clip), (sam2, sam) = published_model(SiglipModel, c, c.clip), published_model(Sam2Model, c, c.sam)
        if c.dense and c.dense_scale:
            self.prompter.dense.logit_scale.data.copy_(siglip.logit_scale)
            self.prompter.dense.logit_bias.data.copy_(siglip.logit_bias)
        for own, theirs in ((self.vision, siglip.vision_model), (self.text, siglip.text_model), (self.sam, sam2)):
            missing, unknown = own.load_state_dict(theirs.state_dict(), strict=False)
            assert all("lora_" in name for name in missing) and all(name.startswith("head.") for name in unknown)
        return {"vision.": clip, "text.": clip, "sam.": sam}

    def forward(self, images, tokens, text_mask, image_index=None):
        """images (N,3,S,S) uint8, tokens and text_mask (M,L), image_index (M,) -> dict.

        logits (M,1,S/4,S/4); with dense, p_dense (M,1,S/4,S/4) raw and dense_prompt, each map stretched to [0,1]; for
        losses sentence (M,D_v), t1, t2 (M,n_t,D_t), v (N,D_v,g,g) and v2 (M,D_v,g,g).
        """
        c, side = self.config, self.prompter.side
        index = torch.arange(len(images), device=images.device) if image_index is None else image_index
        I_1, I_2 = self.two_sizes(images)                                     # (N,3,H_1,H_1), (N,3,H_2,H_2)
        v, words, read, sentence = self.encode(I_1, tokens, text_mask)        # F: (N,g*g,D_v), (M,L,D_t), .., (M,D_v)
        P = self.prompter(v[index], words, read, sentence)
        logits = self.generate(I_2, index, P["p_sparse"], P.get("p_dense"))  # Eq. (1)
        outputs = {"logits": logits, "sentence": sentence, "t1": P["t1"], "t2": P["t2"]}
        outputs |= {name: rearrange(one, "b (y x) d -> b d y x", y=side) for name, one in (("v", v), ("v2", P["v2"]))}
        if c.dense:
            p_dense = P["p_dense"].detach()
            low, high = p_dense.amin((2, 3), True), p_dense.amax((2, 3), True)
            outputs |= {"p_dense": P["p_dense"], "dense_prompt": (p_dense - low) / (high - low).clamp(min=1e-6)}
        return outputs

    def two_sizes(self, images):
        """uint8 (N,3,S,S) -> SigLIP's small input, reduced, and SAM's, each normalised as its tower was trained."""
        large = images.float() / 255
        small = functional.interpolate(large, self.small, mode="bilinear", antialias=self.config.antialias)
        mean, std = (large.new_tensor(value)[:, None, None] for value in (SAM_MEAN, SAM_STD))
        return (small - 0.5) / 0.5, (large - mean) / std

    def encode(self, I_1, tokens, text_mask):
        """-> v (N,g*g,D_v), words (M,L,D_t), which of them are read (M,L), sentence (M,D_v)."""
        if self.config.pad_to_longest:
            longest = tokens.shape[1] if tokens.is_meta else int(text_mask.sum(1).max())
            tokens = tokens[:, :longest]
            read = torch.ones_like(tokens, dtype=torch.bool)
        else:
            read = functional.pad(text_mask[:, 1:], (0, 1))                   # Departs: t_word; EOS is each row's last
            read = read | (text_mask & ~read.any(1, keepdim=True))            # unless there is nothing else
        v = self.vision(I_1, interpolate_pos_encoding=True).last_hidden_state                 # without its pooling
        text = self.text(tokens)                    # it reads the padding, as it was trained to; Departs: t_sent
        return v, text.last_hidden_state, read, text.pooler_output

    def generate(self, I_2, index, p_sparse, p_dense):
        """Eq. (8), SAM: I_2 (N,3,S,S) once per image, prompts of M expressions -> logits (M,1,S/4,S/4)."""
        sam = self.sam
        feature4, feature8, F_img = sam.vision_encoder(I_2).fpn_hidden_states                 # (N,C,S/s,S/s)
        feature4, feature8 = sam.mask_decoder.conv_s0(feature4), sam.mask_decoder.conv_s1(feature8)
        F_img = F_img + sam.no_memory_embedding.reshape(1, -1, 1, 1)          # (N,C,S/16,S/16)
        _, F_dense = sam.prompt_encoder(input_points=None, input_labels=None, input_boxes=None, input_masks=p_dense)
        with torch.autocast(I_2.device.type, enabled=False):                  # its sines need more than 8 bits
            positions = sam.get_image_wide_positional_embeddings()            # (1,C,S/16,S/16)
        masks, *_ = sam.mask_decoder(                                         # Departs: (8)
            image_embeddings=F_img[index], image_positional_embeddings=positions,
            sparse_prompt_embeddings=p_sparse[:, None], dense_prompt_embeddings=F_dense, multimask_output=False,
            high_resolution_features=[feature4[index], feature8[index]])      # F_img + F_dense and F_out within
        return masks[:, 0]  # Eq. (8)

    def criterion(self, outputs, batch, progress):
        """The terms of Eq. (9), weighted; their sum is the loss. Terms with weight zero are left out."""
        c, masks = self.config, batch["masks"][:, None]                       # (M,1,S,S)
        scale = {name: value.exp().clamp(max=math.inf if c.official_losses else 100)
                 for name, value in self.scales.items()}
        images = {"v": outputs["v"][batch["image_index"]], "v2": outputs["v2"]}                   # (M,D_v,g,g)
        texts = {"sent": outputs["sentence"], "t2": self.match_t2(outputs["t2"].mean(1))}         # (M,D_v)
        dice = partial(dice_loss, squared=True, eps=1e-3)

        def cross_entropy(logits, masks):           # of L_spat and L_dense
            logits = resize(logits, masks.shape[-1])
            ce = binary_cross_entropy(logits, masks)
            return ce + dice(logits, masks) if c.official_losses else ce

        logits = resize(outputs["logits"], masks.shape[-1])
        terms = {"ce": binary_cross_entropy(logits, masks), "dice": dice(logits, masks)}  # Eq. (10)
        if c.alpha_ortho:
            terms["ortho"] = orthogonal_loss(outputs["t1"], outputs["t2"])
        if c.alpha_dense:
            p = outputs["p_dense"]
            terms["dense"] = cross_entropy(p if c.dense_scale else p * scale["dense"] + self.biases["dense"], masks)
        if c.alpha_spat:
            v, t = (functional.normalize(x, dim=1) for x in (images[c.spat_image], texts[c.spat_text]))
            coarse = torch.einsum("mdyx,md->myx", v, t)[:, None] * scale["spat"]                   # (M,1,g,g)
            target = on_grid(masks, coarse.shape[-2:]) if c.official_losses else masks
            terms["spat"] = (multi_instance_loss(coarse, target) if c.spat == "MIL" else
                             cross_entropy(coarse + self.biases["spat"], target))
        if c.alpha_samp:
            pooled = mask_pooled(images[c.nce_image], masks, cut=c.official_losses)                # (M,D_v)
            terms["samp"] = contrast(pooled, texts[c.nce_text], scale["samp"],
                                     remote_gradient=not c.official_losses)  # Eq. (12)  # Departs: (12)
        alphas = {name: getattr(c, f"alpha_{name}") for name in terms}        # of (10), (11), (12)
        return {name: alphas[name] * loss.mean() for name, loss in terms.items() if alphas[name]}  # Eq. (9)

    @torch.no_grad()
    def diagnose(self, outputs, masks):
        """Where is a bad mask's fault? masks (M,S,S) -> {name: (M,)}, NaN without an object; {} without a dense prompt.

        dense_peak: dense_prompt is highest within the object; dense_mass: its share within; localisation_error,
        boundary_error: the IoU is below 0.5, and the peak is outside, within the object.
        """
        if not self.config.dense:
            return {}
        side = masks.shape[-1]
        dense = resize(outputs["dense_prompt"].float(), side)[:, 0].flatten(1)          # (M,S*S)
        prediction, truth = resize(outputs["logits"], side)[:, 0].flatten(1) > 0, masks.flatten(1)
        peak = truth.gather(1, dense.argmax(1, keepdim=True))[:, 0]
        bad = (prediction & truth).sum(1) < 0.5 * (prediction | truth).sum(1)
        figures = {"dense_peak": peak, "dense_mass": (dense * truth).sum(1) / dense.sum(1).clamp(min=1e-6),
                   "localisation_error": bad & ~peak, "boundary_error": bad & peak}
        return {name: torch.where(truth.any(1), value.float(), torch.nan) for name, value in figures.items()}

    def param_groups(self, recipe):
        """One group for AdamW: all that learns."""
        at_once = recipe["micro_batch"] * processes()
        if self.config.alpha_samp and at_once < recipe["batch_size"] and (processes() == 1 or dist.get_rank() == 0):
            print(f"L_samp contrasts the {at_once} expressions or so that are taken at once, not the batch of "
                  f"{recipe['batch_size']}; a larger --micro-batch or more processes contrast more")
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": learning, "lr": recipe["lr"], "weight_decay": recipe["weight_decay"]}]


# ----------------------------------------------------------------------------------------------------- training, tables


RECIPE = {
    "epochs": 300, "batch_size": 64, "lr": 1e-4, "schedule": "cosine", "precision": "bf16",     # IV-C2
    "weight_decay": 0.05, "warmup": 5.0, "clip": 3.0, "micro_batch": 8,         # official code
    "protocol": "original", "plateau": 0.0, "t_max": 0.0, "floor": 0.0,         # official code; the rest off
    "per_image": 0, "empty": "zero", "select": "mIoU", "phases": None,          # our choice
}
RECIPE_FOR = {}                                     # IV-C2 names no other
RECIPE_TINY = {"epochs": 40, "batch_size": 32, "micro_batch": 32, "lr": 1e-3, "weight_decay": 0.01, "warmup": 1.0,
               "clip": 1.0, "per_image": 4}


def grid(row, field, values):
    """Rows `row-value` that change one field."""
    return {f"{row}-{value}": {field: value} for value in values}


BASE = {"clip": "google/siglip2-so400m-patch14-384", "sam": "facebook/sam2.1-hiera-small", "lora_sam": 32,
        "alpha_dice": 0.0}                          # IV-E, IV-E1, IV-E9
BLOCKS, RANKS = (1, 2, 4, 6), (0, 4, 8, 16, 32, 64)
NO_DENSE = {"dense": False, "alpha_dense": 0.0}
ONLY_CE = {"alpha_ortho": 0.0, "alpha_dense": 0.0, "alpha_samp": 0.0}
ORTHO = ONLY_CE | {"alpha_ortho": 0.5}              # for the others that Table XV adds 0.5 is our choice
ABLATIONS = {
    "VI": grid("clip-t", "lora_text", RANKS) | grid("clip-v", "lora_vision", RANKS) | grid("sam-v", "lora_sam", RANKS),
    "VII": grid("decomp", "decomposition_blocks", BLOCKS) | grid("interac", "interaction_blocks", BLOCKS)
    | grid("prompt", "prompt_blocks", BLOCKS),
    "VIII": grid("decomp", "n_t", (1, 3, 6, 9)) | grid("prompt", "n_p", (1, 3, 6, 9, 12)),
    "IX": {f"decomp-{pe}{init}": {"subspace_positions": bool(pe), "subspace_init": init} for pe, init in (
        ("", "learnable"), ("", "textpool"), ("PE-", "zero"), ("PE-", "learnable"), ("PE-", "textpool"))}
    | grid("interac", "image_positions", ("none", "sine", "learnable"))
    | {f"prompt-{pe}{init}": {"prompt_positions": bool(pe), "prompt_init": init} for pe, init in (
        ("", "learnable"), ("PE-", "zero"), ("PE-", "learnable"))},
    "X": {"single-stage": NO_DENSE | {"cascade": False, "alpha_ortho": 0.0}, "cascaded": NO_DENSE,
          "cascaded+dense": {}},
    "XI": {"none": {"intra_attention": False, "inter_attention": False}, "intra": {"inter_attention": False},
           "intra+inter": {}},
    "XII": {"none": {"self_attention": False, "cross_attention": False}, "self": {"cross_attention": False},
            "self+cross": {}},
    "XIII": {"T-t2": {"dense_text": "t2"}, "T-t2'": {"dense_text": "t2_prime"}, "T-sparse": {"dense_text": "sparse"},
             "T-sent": {}, "T-soft": {"dense_soft_text": True}, "no-T-soft": {}, "V-v": {"dense_image": "v"},
             "V-v2'": {}, "no-V-soft": {"dense_conv": "none"}, "V-soft": {}, "post-up": {"dense_upsample": "post"},
             "pre-up": {}},
    "XIV": {str(size): {} if size == 384 else {"clip_size": size} for size in (224, 384, 448, 768)},
    "XV": {"ce": ONLY_CE, "ortho": ORTHO, "dense": ORTHO | {"alpha_dense": 0.5}}
    | {f"{kind}-{text}-{image}": ORTHO | {"alpha_spat": 0.5, "spat": kind, "spat_text": text, "spat_image": image}
       for image in ("v", "v2") for text in ("sent", "t2") for kind in ("CE", "MIL")}
    | {f"NCE-{text}-{image}": ORTHO | {"alpha_samp": 0.5, "nce_text": text, "nce_image": image}
       for image in ("v", "v2") for text in ("sent", "t2")}
    | {"NCE-t2-v+dice": ORTHO | {"alpha_samp": 0.5, "alpha_dice": 1.0}},
    "XVI": {f"{clip}+{sam[0]}{again}": {
        "clip": "google/" + re.sub("(siglip2?)-p", r"\1-so400m-patch", clip).replace("giant-p", "giant-opt-patch"),
        "sam": f"facebook/sam2.1-hiera-{sam}", "lora_sam": 16 if sam == "large" else 32, "alpha_dice": 1.0}
        for clip, sam, again in (                   # two rows are printed twice
            ("siglip-p14-384", "small", ""), ("siglip2-p14-224", "small", ""), ("siglip2-p14-224", "small", "+again"),
            ("siglip2-p14-384", "small", ""), ("siglip2-p16-384", "small", ""), ("siglip2-p16-512", "small", ""),
            ("siglip2-giant-p16-256", "small", ""), ("siglip2-giant-p16-384", "small", ""),
            ("siglip2-p16-512", "tiny", ""), ("siglip2-p16-512", "small", "+again"),
            ("siglip2-p16-512", "base-plus", ""), ("siglip2-p16-512", "large", ""))},
}
ABLATIONS = {table: {row: BASE | changes for row, changes in rows.items()} for table, rows in ABLATIONS.items()}
OFFICIAL = {                                        # not of the paper: the forms of the authors' code
    "interleave": True, "dense_conv": "official", "dense_scale": True, "align_corners": True, "antialias": False,
    "lower_case": False, "pad_to_longest": True, "dynamic_multimask": True, "enlarge_twice": True,
    "official_losses": True, "train_prompt_encoder": True, "alpha_ce": 5.0, "alpha_dice": 5.0,
    "plateau": 30.0, "t_max": 1.3, "floor": 0.01}
ABLATIONS["official"] = {
    "all": OFFICIAL, "refsegrs": OFFICIAL | {"epochs": 600, "lr": 2e-4, "plateau": 60.0, "t_max": 2.0}} | {
    f"{table}-{row}": OFFICIAL | ABLATIONS[table][row] | changes for table, row, changes in (
        ("IX", "interac-sine", {"image_positions": "fourier"}),
        ("X", "single-stage", {"decomposition_blocks": 0, "subspace_positions": False}),
        ("XIII", "T-t2", {"dense_pool": "learned"}), ("XIII", "T-t2'", {"dense_pool": "learned"}),
        *(("XV", row, {}) for row in ABLATIONS["XV"] if re.match("dense|CE|MIL|NCE-t2-v2?$", row)))}
FIGURES = {                                         # of the rows in their order; cIoU and gIoU there
    table: {row: "oIoU {}, mIoU {}".format(*pair.split("/"))
            for row, pair in zip(ABLATIONS[table], pairs.split(), strict=True)}
    for table, pairs in {
        "VI": "77.80/63.40 78.65/64.61 78.44/64.82 78.15/66.01 79.01/64.53 78.43/64.14 75.96/57.86 78.44/64.64 "
              "78.64/64.33 78.15/66.01 79.36/65.39 78.96/64.88 76.91/60.82 78.60/64.64 78.38/64.67 78.62/65.05 "
              "78.15/66.01 78.98/65.44",
        "VII": "78.36/64.72 78.15/66.01 78.91/65.20 78.73/65.14 78.51/64.86 78.15/66.01 78.77/64.65 78.06/64.29 "
               "78.95/65.04 78.15/66.01 78.43/65.00 78.49/64.88",
        "VIII": "78.28/65.26 78.15/66.01 78.96/65.18 77.96/64.09 78.66/64.49 78.30/64.51 78.33/64.72 78.15/66.01 "
                "79.11/65.22",
        "IX": "77.72/64.09 78.27/64.82 79.34/65.57 78.27/64.86 78.15/66.01 77.94/64.80 77.90/64.66 78.15/66.01 "
              "79.11/64.98 78.85/65.12 78.15/66.01",
        "X": "74.11/60.06 79.22/64.13 78.15/66.01",
        "XI": "78.16/64.08 78.27/64.86 78.15/66.01",
        "XII": "77.82/64.39 78.03/64.54 78.15/66.01",
        "XIII": "77.79/64.44 76.33/62.58 76.60/63.08 78.15/66.01 77.86/64.74 78.15/66.01 78.67/64.93 78.15/66.01 "
                "78.58/65.02 78.15/66.01 77.47/65.21 78.15/66.01",
        "XIV": "78.06/65.85 78.15/66.01 78.57/66.10 78.76/66.14",
        "XV": "78.32/63.16 78.37/64.21 78.91/64.08 77.03/63.12 78.27/63.01 77.54/63.65 78.80/64.25 76.88/63.77 "
              "77.93/64.02 77.83/63.95 78.52/64.65 78.78/65.18 78.15/66.01 77.32/63.13 77.16/63.52 78.98/67.06",
        "XVI": "78.05/66.13 77.55/65.36 77.55/65.36 78.98/67.06 78.29/66.73 78.43/67.79 77.17/65.62 77.52/66.94 "
               "78.48/67.63 78.43/67.79 78.52/68.07 79.45/69.17"}.items()}
RETIRED = {"dense_kernel": 3}
RENAMED = {f"prompter.{old}.": f"prompter.{new}." for old, new in (("decompose.words", "decompose.cross"),
           ("sparse.text", "sparse.cross_text"), ("sparse.image", "sparse.cross_image"))}       # in older state dicts


# ----------------------------------------------------------------------- tokenizer, published weights, the authors' own

SPECIAL_TOKENS = {"pad": 0, "unknown": 1, "end": 2}     # as SigLIP's: words [EOS], nothing before them


class SiglipWords:
    """SigLIP's tokenizer: strings -> tokens (M,L) int64, padded right, cut with EOS kept, text_mask (M,L) bool."""

    def __init__(self, config):
        self.tokenizer, _ = published(AutoTokenizer, config, config.clip)
        self.tokenizer.padding_side = "right"
        self.length, self.lower_case = config.text_length, config.lower_case

    def __call__(self, expressions):
        texts = [text.lower() if self.lower_case else text for text in expressions]
        batch = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.length,
                               return_attention_mask=True, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].bool()


tokenizer = SiglipWords


def published(kind, config, name, **options):
    """What transformers' `kind` reads of a backbone, from the hub or the folder `pretrained` -> it, where from."""
    folder = Path(config.pretrained) / name.split("/")[-1]
    source = name if config.pretrained == "hub" else str(folder)
    if source != name and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; put the files of huggingface.co/{name} there, "
                                "or say --set pretrained=hub")
    try:
        found = kind.from_pretrained(source, **options)
        if kind is AutoTokenizer and len(found) <= len(found.all_special_ids):       # its answer to missing files
            raise OSError("neither tokenizer.json nor tokenizer.model found")
        return found, source
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if source != name:
            raise ValueError(f"{source}: not a folder as transformers saves it, or of another architecture "
                             f"({(str(error).strip() or type(error).__name__).splitlines()[0]})") from error
        raise FileNotFoundError(
            f"{source}: not reached on the hub and not in its cache; set the variable HF_ENDPOINT to a mirror, "
            f"or put its files in DIR/{folder.name} and say --set pretrained=DIR") from error


def published_model(kind, config, name):
    """A published model in float32, all of its file used -> it, where from."""
    (model, info), source = published(kind, config, name, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"{source}: not the weights of a {kind.__name__}: missing {sorted(info['missing_keys'])[:3]}, "
                         f"unknown {sorted(info['unexpected_keys'])[:3]}")
    print(f"{source}: {len(model.state_dict())} tensors loaded")
    return model, source


UNUSED = r"vision\.head\.|decode_head\.(logit_scale1|logit_bias[12])$"          # pooling; of other losses, a constant
WITH_LORA = r"(text|vision)\.encoder\..*_proj$|sam\.vision_encoder\.backbone\..*\.attn\.\w+$"
LAYERS = [("two_queries_text", *layer) for k in (1, 2) for layer in (      # stack, attention, norm; ours
    (f"self_attn_query_query{k}", f"query{k}", 1, f"decompose.intra.#.{k - 1}"),
    (f"cross_attn_query_text_query{k}_text", f"query{k}", 2, f"decompose.cross.#.{k - 1}"),
    (f"cross_attn_query_query_query{k}_query{3 - k}", f"query{k}", 4, f"decompose.inter.#.{k - 1}"))] + [
    ("queries1_to_img", "self_attn_text_text_1", "text", 1, "first.intra.#"),
    ("queries1_to_img", "cross_attn_img_text_1", "img", 1, "first.cross.#"),
    ("prompt_queries2_img", "self_attn_text_1", "text", 1, "second.intra.#"),
    ("prompt_queries2_img", "cross_attn_img_text_1", "img", 1, "second.cross.#"),
    ("prompt_queries2_img", "self_attn_prompt_1", "prompt", 1, "sparse.intra.#"),
    ("prompt_queries2_img", "cross_attn_prompt_text_1", "prompt", 2, "sparse.cross_text.#"),
    ("prompt_queries2_img", "cross_attn_prompt_img_1", "prompt", 4, "sparse.cross_image.#")]


def their_names():
    """[(pattern, replacement)], to be applied in turn, from the names of mmseg, peft and Meta to ours."""
    rules, encoder = {}, r"^backbone\.model\.image_encoder\.base_model\.model\."
    for stack, attention, who, n, ours in LAYERS:
        stack, ours = rf"^prompter\.{stack}_attn_layers\.(\d+)\.", "prompter." + ours.replace("#", r"\1")
        inner = ours if attention.startswith("self") else f"{ours}.attention"
        own = {attention: inner, f"norm_{who}_{n}": f"{inner}.norm"}
        if inner != ours:
            own |= {f"mlp_{who}_{n // 2 + 1}": f"{ours}.mlp.mlp", f"norm_{who}_{n + 1}": f"{ours}.mlp.norm"}
        rules |= {stack + theirs: name for theirs, name in own.items()}
    rules |= {r"\.base_layer\.bias": ".bias", r"^decode_head\.logit_scale2": "scales.samp",
              r"^clip_text_encoder\.base_model\.model\.(logit_\w+)": r"prompter.dense.\1",
              r"^clip_(text|vision)_encoder\.base_model\.model\.model": r"\1",
              rf"{encoder}trunk": "sam.vision_encoder.backbone",
              rf"{encoder}(neck\..*)\.conv": r"sam.vision_encoder.\1",
              r"^backbone\.model\.sam_(prompt_encoder|mask_decoder)": r"sam.\1",
              r"^backbone\.model\.no_mem_embed": "sam.no_memory_embedding", r"^(sam\..*)\.out_proj": r"\1.o_proj",
              r"^(sam\..*)\.norm(\d|_final_attn)": r"\1.layer_norm\2", r"^(sam\..*embed)\.proj": r"\1.projection",
              r"^(sam\..*)\.pe_layer\.\w+": r"\1.shared_embedding.positional_embedding",
              r"^prompter\.img_pe": "prompter.image_position", r"^prompter\.sparse_prompt_mlp": "prompter.sparse.out",
              r"^prompter\.prompt_embedding": "prompter.sparse.queries", r"^(prompter\..*)\.out_proj": r"\1.to_out",
              r"^prompter\.prompt_pe_embedding": "prompter.sparse.position",
              r"^(prompter\..*)\.([qkv])_proj": r"\1.to_\2", r"^prompter\.dense_prompt_conv": "prompter.dense.conv"}
    numbered = {r"(sam\..*\.mlp)\.layers\.": ("proj_in", "proj_out"), r"(prompter\..*)\.layers\.": ("0", "2"),
                r"(sam\..*(?:_head|_mlps\.\d+))\.layers\.": ("proj_in", "layers.0", "proj_out"),
                r"(sam\..*)\.output_upscaling\.": ("upscale_conv1", "upscale_layer_norm", "", "upscale_conv2"),
                r"(sam\..*)\.mask_downscaling\.": ("mask_embed.conv1", "mask_embed.layer_norm1", "", "mask_embed.conv2",
                                                   "mask_embed.layer_norm2", "", "mask_embed.conv3"),
                r"(prompter)\.text_query_pe_embedding": ("", "text_positions.0", "text_positions.1")}
    for theirs, parts in numbered.items():
        rules |= {f"^{theirs}{k}": rf"\1.{ours}" for k, ours in enumerate(parts) if ours}
    return [(re.compile(theirs + r"(?=\.|$)"), ours) for theirs, ours in rules.items()]


def read_official(path):
    """The authors' file, a state dict or one under "state_dict" or "module" -> {our name: float32 tensor}.

    LoRA that our model has not, on SAM's neck and SigLIP's text head, is folded into the weight.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                      # whatever a damaged file, or one that wants code run, provokes
        raise ValueError(f"{path}: not a whole file of plain tensors ({type(error).__name__})") from error
    for key in ("state_dict", "module"):
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    tensors, rules = {}, their_names()
    for name, tensor in found.items() if isinstance(found, dict) else ():
        for theirs, ours in rules:
            name = theirs.sub(ours, str(name))
        if isinstance(tensor, torch.Tensor) and not re.match(UNUSED, name):
            tensors[name] = tensor.float() if tensor.is_floating_point() else tensor
    for layer in [name.removesuffix(".base_layer.weight") for name in tensors if name.endswith(".base_layer.weight")]:
        parts = [f"{layer}.{part}.weight" for part in ("base_layer", "lora_B.default", "lora_A.default")]
        if tensors.keys() >= set(parts):
            weight, A, B = (tensors.pop(part) for part in parts)
            if re.match(WITH_LORA, layer):
                tensors |= {f"{layer}.weight": weight, f"{layer}.lora_A": A, f"{layer}.lora_B": B.T.contiguous()}
            else:
                tensors[f"{layer}.weight"] = weight + (A.flatten(1) @ B.flatten(1)).view_as(weight)
    points = sorted(name for name in tensors if ".point_embeddings." in name)
    if len(points) == 4:
        tensors["sam.prompt_encoder.point_embed.weight"] = torch.cat([tensors.pop(name) for name in points])
    if (name := "sam.prompt_encoder.shared_embedding.positional_embedding") in tensors:
        tensors["sam.shared_image_embedding.positional_embedding"] = tensors[name]
    if (name := "prompter.image_position") in tensors:
        tensors[name] = tensors[name].flatten(2)[0].T.contiguous()            # (1,D_v,g,g) -> (g*g,D_v)
    unknown = [name for name in tensors if not re.match(r"(text|vision|sam|prompter|scales)\.", name)
               or re.search(r"attn_layers\.|\.default\.|base_layer|point_embeddings", name)]
    absent = [part for part in ("text", "vision", "sam.vision_encoder", "sam.prompt_encoder", "sam.mask_decoder",
                                "prompter", "scales") if not any(name.startswith(f"{part}.") for name in tensors)]
    if unknown or absent:
        raise ValueError(f"{path}: not the authors' file of RSRefSeg 2 as it is known: of {len(tensors)} tensors "
                         f"{len(unknown)} have other names, as {unknown[:3]}, and none is of {absent}")
    return tensors


# Notes
#
# Departs from the paper
#   (4) line 3   printed with t_1 as the query of t_2; "alternately serve as queries": t_1 reads t_2, t_2 the new t_1
#   (4)-(6)      each attention and MLP has a residual before its norm (code); none is printed
#   (6) line 3   queries are what line 2 made of them ("sequentially"); printed with the query of line 2 again
#   (7)          the 3x3 form of III-C, which IV-E8 calls 1x1; cosines, though the text speaks of a probability map
#   (8)          SAM 2.1's: token order, score token, no-memory embedding, strides 4 and 8; logits enlarged from H_2/4
#   (12)         L_samp contrasts t_2 with v: Table XV's best row (code); printed with t_sent
#   I_1          is shrunk from I_2, since the loader hands over one size; III-A shrinks the original
#   (13)         its N images are the expressions: each is a sample; Pr@X counts IoU >= X, IV-B and the official code: >
#   batch        L_samp sees --micro-batch times the processes, (7)'s batch norm too, not the 64 of IV-C2
#   t_word       without EOS (III-A), so [t_word, t_sent] of III-B is kept apart; an expression without words reads EOS
#   t_sent       SigLIP has no feature at EOS: its text head reads the last of 64 positions, which it was trained on
#   decoder      heads for IoU, object score and masks 2 to 4 stay frozen: no loss reaches them
# Departs from the official code, even with all of ABLATIONS["official"]
#   LoRA         not on SAM's neck and SigLIP's text head; read_official folds what theirs learned there
#   batch norm   over all processes, there of each card
#   BF16         of products only, there also of weights, statistics and losses
#   training     the best epoch is chosen on validation, there on test; warm-up begins at a step's share, there at 0.01
#   L_samp       without the constant on all its cosines, which no softmax sees
#   text         cut to the tower's positions, there to 128, which it has not
#   I_2          enlarged by PIL, there by OpenCV; what is not square is squashed, there padded
#   refsegrs     T_max is 2 times the epochs; a reading of another of their files says 1.8
# Silent (code: as the official code has it; unmarked: our choice)
#   attention    8 heads, internal width 512 with biases, MLP 512 with GELU, no dropout; (6) ends in such an MLP (code)
#   start        PyTorch's own for the prompter (code); with pretrained=none Xavier for it, SAM's decoder and its
#                prompt encoder, the start by fan-in for SAM's image encoder, sines for the towers' positions
#   textpool     adaptive average pooling of the words to n_t, for both subspaces (code, there with pads)
#   positions    N(0,1), as learned queries are, on queries and keys, not values: t_1's in (4), (5),
#                t_2's in (4)-(6), the image's in (5), (6), p_sparse's in (6) (code); a row of Table IX without one has
#                none wherever it would serve
#   LoRA         on q, k, v, out of every attention of the three towers, in SAM's on q, k, v as one layer, alpha = r
#                (code); A starts at zero
#   L_dice       squared denominator, epsilon 1e-3 above and below (code)
#   L_samp       v averaged over the mask's area, so that no small object is lost; t_2 over its n_t vectors; a learnable
#                factor on the cosines, from 1/0.07 (code), at most 100; gathered over processes with gradient; another
#                row is a negative even where it is of the same object
#   L_spat       cosines times such a factor, plus a bias for CE, which is taken at the mask's size; MIL: -log of the
#                softmax mass, over v's cells, of those that the mask touches. v_2 in Table XV is taken for v'_2
#   L_dense      like CE in L_spat (a cosine as a logit stays in 0.27 .. 0.73), at the mask's size; IV-E10 may say H_2/4
#   text         lower case, padded to 64, no mask in the tower, as SigLIP 2 was trained; the prompter masks pads
#   Table IX     zero: a constant, beside IV-E4's "learnable" one; sine: base 10000, 2 pi, cell centres
#   Tables VI-XV SigLIP 2 p14-384, SAM 2.1 small, no L_dice: their common 66.01 is Table XV's row NCE-t2-v
#   Table X      the single-stage prompter: one subspace, one interaction, no L_ortho
#   Tables XI, XII   what is switched off leaves its block; without cross-attention v passes an MLP and reads no text
#   Table XIII   T-t2, T-t2': the mean over n_t; T-sparse: one query more in (6), mapped to D_v; T-soft: an MLP D-512-D
#   Table XIV    each size with the tower published for it, no positions interpolated
#   Table XVI    rank of SAM 32 up to base-plus, 16 for large; widths that differ are matched by a linear layer
# Omits
#   ZeRO-2       one process holds all weights; they are few enough
