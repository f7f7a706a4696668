"""Prompt-RIS: CLIP finds the object and SAM draws it, joined end to end by prompts.

Paper
    Shang, Song, Qiu, Wang, Meng, Li. Prompt-Driven Referring Image Segmentation with Instance Contrasting. CVPR 2024,
    https://openaccess.thecvf.com/content/CVPR2024/html/Shang_Prompt-Driven_Referring_Image_Segmentation_with_Instance_Contrasting_CVPR_2024_paper.html
Official
    none released. No code was copied. What the paper leaves open, and where this file departs: Notes, at the foot.
Idea
    At every layer CLIP's two towers send each other prompts (CMP); the response of the patches to the sentence is a
    coarse mask. It becomes SAM's mask and point prompts, the words its text prompts. Masks of sentences about one
    object are pulled together, those of different objects of an image pushed apart (ICL).
Shapes
    N images, M expressions, L tokens with [SOS], [EOS] and padding (the paper's L + 2), n = 16 prompts per direction
    H,W         side of the image as SAM sees it and of the final mask, 1024; H_S,W_S SAM's grid, 64 x 64
    H_C,W_C     CLIP's grid, 30 x 30 at 480 px, N_C its 900 cells
    D_I, D_T    widths of CLIP's towers, 768 (the paper's D_IC) and 512; D_C the tiny decoder's, 512; D_S SAM's, 256
    F_I, F_T    CLIP's features (M,N_C,D_I), between its layers (M,1+N_C,D_I) with [CLS] first, and words (M,L,D_T);
                the paper's F_IC; with _new the paper's primed ones, D_C wide
    F_S         SAM's features (N,D_S,H_S,W_S), taken to (M,D_S,H_S,W_S); the paper's F_IS
    t_g         the sentence, F'_T at [EOS]; S_coarse the paper's S'_C (M,1,H_C,W_C); S_C the same at 4H_S x 4W_S
    point       the paper's M', the one-hot point map, flat (M,4H_S*4W_S)
    E, e_p      SAM's position encoding of that map's cells (4H_S*4W_S,D_S), and that of the chosen one
    S_low, S    the paper's S' (M,1,4H_S,4W_S) and the final logits (M,1,H,W)
    O, Y, w     overlap of two masks, 1 where they mean the same object, IoU of a mask with its truth
Equations
    Eq. (1), Eq. (2)    TinyDecoder.forward
    Eq. (3)             PromptRIS.point_prompt, point_map
    Eq. (4)             PromptRIS.decode
    Eq. (5), Eq. (6)    CrossModalPrompting.forward
    Eq. (7), Eq. (8)    losses.py, instance_contrastive_loss
    Eq. (9)             PromptRIS.criterion
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel, SamConfig,
    SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig,
)

from losses import binary_cross_entropy, dice_loss, instance_contrastive_loss

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAPS = ("coarse",)                                  # what evaluate.py draws beside the mask


@dataclass(frozen=True)
class Config:
    image_size: int = 1024                          # 4.2: SAM's side, and that of the final mask
    clip_size: int = 480                            # 4.2
    text_length: int = 22                           # our choice, ETRIS's for the longest sentences, G-Ref's
    pretrained: str = "hub"                         # "hub", "none", or a folder with one subfolder per backbone
    clip_backbone: str = "openai/clip-vit-base-patch16"         # 4.2
    sam_backbone: str = "facebook/sam-vit-base"     # 4.2
    freeze: bool = True                             # SAM (3.1) and, our choice, CLIP
    freeze_clip: bool = True                        # our choice; False: CLIP learns although SAM is frozen

    clip_patch: int = 16                            # CLIP ViT-B/16
    clip_native: int = 224                          # side that its position table was made for
    clip_width: int = 768
    clip_heads: int = 12
    clip_ffn: int = 3072
    clip_layers: int = 12                           # of both towers
    vocab_size: int = 49408
    clip_text_width: int = 512
    clip_text_heads: int = 8
    clip_text_ffn: int = 2048
    clip_text_positions: int = 77
    sam_patch: int = 16                             # SAM ViT-B
    sam_width: int = 768
    sam_heads: int = 12
    sam_ffn: int = 3072
    sam_layers: int = 12
    sam_window: int = 14
    sam_global: tuple[int, ...] = (2, 5, 8, 11)
    sam_prompt_width: int = 256                     # D_S
    sam_mask_channels: int = 16
    sam_decoder_heads: int = 8
    sam_decoder_ffn: int = 2048

    prompts: int = 16                               # 4.2, n
    cmp_heads: int = 8                              # our choice
    decoder_width: int = 512                        # our choice, D_C: the width of CLIP's joint space
    decoder_heads: int = 8                          # our choice
    decoder_ffn: int = 2048                         # our choice
    text_blocks: int = 2                            # 3.1
    text_heads: int = 8                             # our choice
    text_ffn: int = 1024                            # our choice
    tau: float = 1.0                                # our choice: temperature of Eq. (3)
    prompt_dropout: float = 0.2                     # our choice: 4.2 gives no rate
    icl_epsilon: float = 1e-4                       # our choice, Eq. (8)
    icl_weight: float = 1.0                         # Eq. (9), a plain sum
    icl_warmup: float = 0.0                         # share of the run before L_icl counts; the paper has none

    v2l: bool = True                                # Tables 3 and 4: prompting vision-to-language, language-to-vision
    l2v: bool = True
    icl: bool = True                                # Table 3
    sam: bool = True                                # Table 3
    mask_prompt: bool = True                        # Table 5, for evaluate.py --set; in training they would hold too
    point_prompt: bool = True
    text_prompt: bool = True

    def __post_init__(self):
        if self.image_size % self.sam_patch or self.clip_size % self.clip_patch:
            raise ValueError(f"image_size={self.image_size} and clip_size={self.clip_size} must be multiples of "
                             f"sam_patch={self.sam_patch} and clip_patch={self.clip_patch}")
        if self.text_length > self.clip_text_positions:
            raise ValueError(f"text_length={self.text_length}: CLIP has {self.clip_text_positions} positions")

    @classmethod
    def tiny(cls):
        return cls(image_size=96, clip_size=96, pretrained="none", freeze=False, vocab_size=256,
                   clip_patch=8, clip_native=96, clip_width=64, clip_heads=4, clip_ffn=128, clip_layers=3,
                   clip_text_width=48, clip_text_heads=4, clip_text_ffn=96, clip_text_positions=22,
                   sam_patch=6, sam_width=64, sam_heads=4, sam_ffn=128, sam_layers=3, sam_window=4, sam_global=(1,),
                   sam_prompt_width=48, sam_mask_channels=16, sam_decoder_heads=4, sam_decoder_ffn=96,
                   prompts=4, cmp_heads=4, decoder_width=64, decoder_heads=4, decoder_ffn=128,
                   text_heads=4, text_ffn=96, prompt_dropout=0.05, icl_warmup=0.5)


# ----------------------------------------------------------------------------------- CLIP-based Prompting, section 3.1


def expect_tokens(name, tokens, width):
    """ValueError unless `tokens` is (B,n,width): channels last, and not a map."""
    if tokens.ndim != 3 or tokens.shape[2] != width:
        raise ValueError(f"{name} is {tuple(tokens.shape)}, expected (batch, tokens, {width}), channels last")


class Attention(nn.Module):
    """Multi-head attention: queries (B,Q,width), keys and values (B,K,width) -> (B,Q,out or width).

    mask (B,K) bool, True = may be read. To copy it out, bring along expect_tokens.
    """

    def __init__(self, width, heads, out=None):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads} do not divide a width of {width}")
        self.width, self.heads = width, heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width, bias=False)                       # a key bias cancels in the softmax
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, out or width)

    def forward(self, queries, keys, values, mask=None):
        for name, tokens in (("queries", queries), ("keys", keys), ("values", values)):
            expect_tokens(name, tokens, self.width)
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != keys.shape[:2]:
                raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(keys.shape[:2])}, "
                                 "True = may be read")
            mask = mask[:, None, None]                                        # (B,1,1,K)
        q, k, v = (rearrange(tokens, "b n (a d) -> b a n d", a=self.heads)
                   for tokens in (self.to_q(queries), self.to_k(keys), self.to_v(values)))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)        # (B,heads,Q,width/heads)
        return self.to_out(rearrange(mixed, "b a n d -> b n (a d)"))


class CrossBlock(nn.Module):
    """Queries (B,Q,width) read keys and values (B,K,width) -> (B,Q,width), then a net of `hidden` units.

    A residual and a norm after each. To copy it out, bring along Attention.
    """

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attention = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, queries, keys, values, mask=None):
        queries = self.norm1(queries + self.attention(queries, keys, values, mask))
        return self.norm2(queries + self.ffn(queries))


class TinyDecoder(nn.Module):
    """CLIP's features and words look at each other once; what the patches answer to the sentence is the coarse mask.

    image_width D_I, text_width D_T, width D_C, its heads and hidden units. To copy it out, bring along CrossBlock.
    """

    def __init__(self, image_width, text_width, width, heads, hidden):
        super().__init__()
        self.image_projection = nn.Linear(image_width, width, bias=False)
        self.text_projection = nn.Linear(text_width, width, bias=False)
        self.to_image = CrossBlock(width, heads, hidden)
        self.to_text = CrossBlock(width, heads, hidden)

    def forward(self, F_I, F_T, text_mask, grid):
        """F_I (M,H_C*W_C,D_I) row by row, F_T (M,L,D_T), text_mask (M,L) bool with [EOS] its last True, grid (H_C,W_C)
        -> S_coarse (M,1,H_C,W_C), float32 logits."""
        expect_tokens("F_I", F_I, self.image_projection.in_features)
        expect_tokens("F_T", F_T, self.text_projection.in_features)
        if F_I.shape[1] != grid[0] * grid[1]:
            raise ValueError(f"F_I has {F_I.shape[1]} cells, which are not a grid of {grid[0]} x {grid[1]}")
        image, words = self.image_projection(F_I), self.text_projection(F_T)                # (M,N_C,D_C) (M,L,D_C)
        F_I_new, F_T_new = self.to_image(image, words, words, text_mask), self.to_text(words, image, image)  # Eq. (1)
        eos = text_mask.sum(1) - 1
        t_g = F_T_new[torch.arange(len(F_T), device=F_T.device), eos]                       # (M,D_C)
        S_coarse = (F_I_new.float() * t_g[:, None]).sum(2) / math.sqrt(t_g.shape[1])  # Departs: (2)  # Eq. (2)
        return rearrange(S_coarse, "m (h w) -> m 1 h w", h=grid[0])


def point_map(S_C, tau, sample):
    """Logits (M,h*w) -> the one-hot map (M,h*w), float32: drawn with straight-through gradients, or the highest cell.

    Resizing leaves cells at the border equal but for rounding, which must not choose: the first of them is taken.
    """
    if sample:
        return functional.gumbel_softmax(S_C.float(), tau=tau, hard=True)
    highest = S_C.amax(1, keepdim=True) - S_C <= 1e-4  # Departs: (3)
    return functional.one_hot(highest.int().argmax(1), S_C.shape[1]).float()


class TextPrompts(nn.Module):
    """CLIP's words, conditioned on SAM's image features, are text prompts.

    text_width D_T, width D_S, blocks, heads and units of each. To copy it out, bring along Attention, CrossBlock.
    """

    def __init__(self, text_width, width, blocks, heads, hidden):
        super().__init__()
        self.projection = nn.Linear(text_width, width)
        self.self_attentions = nn.ModuleList(Attention(width, heads) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, heads, hidden) for _ in range(blocks))

    def forward(self, F_T, features, positions, text_mask):
        """F_T (M,L,D_T), features and their position encoding (M or 1,H_S*W_S,D_S), text_mask (M,L) -> (M,L,D_S)."""
        expect_tokens("F_T", F_T, self.projection.in_features)
        words = self.projection(F_T)                                                        # (M,L,D_S)
        for attention, norm, cross in zip(self.self_attentions, self.norms, self.cross_blocks, strict=True):
            words = norm(words + attention(words, words, words, text_mask))
            words = cross(words, features + positions, features)
        return words


# ---------------------------------------------------------------------------------- Cross-Modal Prompting, section 3.2


class Prompter(nn.Module):
    """Learnable tokens read the features (B,n,width) of one tower and become prompts (B,prompts,out) for the other.

    mask (B,n) bool, True = may be read. To copy it out, bring along Attention, expect_tokens.
    """

    def __init__(self, width, out, prompts, heads):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(prompts, width) * 0.02)  # Silent: CMP
        self.norm_tokens, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, out=out)

    def forward(self, features, mask=None):
        expect_tokens("features", features, self.attention.width)
        tokens = self.norm_tokens(self.tokens).expand(len(features), -1, -1)                # (B,prompts,width)
        features = self.norm_features(features)
        return self.attention(tokens, features, features, mask)                             # (B,prompts,out)


def prompted_layer(layer, tokens, prompts=None, causal=False):
    """One of CLIP's layers on tokens (B,n,C) that also read prompts (B,p,C) -> (B,n,C).

    layer: a CLIPEncoderLayer of transformers. causal: no token reads a later one; all read every prompt. Equal to the
    layer on [prompts; tokens] with the prompts' rows dropped.
    """
    attention, mask = layer.self_attn, None
    normed = context = layer.layer_norm1(tokens)
    if prompts is not None:
        context = torch.cat((layer.layer_norm1(prompts), normed), 1)                        # (B,p+n,C)
    if causal:
        n, every = tokens.shape[1], context.shape[1]
        mask = torch.ones(n, every, dtype=torch.bool, device=tokens.device).tril(every - n)  # Silent: order
    q, k, v = (rearrange(part, "b n (a d) -> b a n d", a=attention.num_heads) for part in (
        attention.q_proj(normed), attention.k_proj(context), attention.v_proj(context)))
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)                # (B,heads,n,C/heads)
    tokens = tokens + attention.out_proj(rearrange(mixed, "b a n d -> b n (a d)"))
    return tokens + layer.mlp(layer.layer_norm2(tokens))


class CrossModalPrompting(nn.Module):
    """One step of both towers, each reading prompts made from the other's state, Eqs. (5) and (6).

    image_width D_I, text_width D_T, n prompts each way, heads of a prompter; v2l, l2v: which way there are prompts.
    To copy it out, bring along Prompter, prompted_layer.
    """

    def __init__(self, image_width, text_width, prompts, heads, v2l=True, l2v=True):
        super().__init__()
        self.v2l = Prompter(image_width, text_width, prompts, heads) if v2l else None
        self.l2v = Prompter(text_width, image_width, prompts, heads) if l2v else None

    def forward(self, F_T, F_I, text_layer, image_layer, text_mask):
        """F_T (M,L,D_T), F_I (M,1+N_C,D_I) with [CLS] first, one layer of each of CLIP's towers, text_mask (M,L) bool
        -> both after that layer."""
        T_V2L = self.v2l(F_I[:, 1:]) if self.v2l else None                                  # (M,n,D_T)
        T_L2V = self.l2v(F_T, text_mask) if self.l2v else None                              # (M,n,D_I)
        F_T = prompted_layer(text_layer, F_T, T_V2L, causal=True)  # Eq. (5)
        F_I = prompted_layer(image_layer, F_I, T_L2V)  # Departs: (6)  # Eq. (6)
        return F_T, F_I


# ---------------------------------------------------------------------------------------------------------- the model


def resize(maps, size):
    """(B,C,h,w) -> (B,C,size,size), bilinear, in float32."""
    return functional.interpolate(maps.float(), (size, size), mode="bilinear", align_corners=False)


def nearest(masks, size):
    """bool (M,h,w) -> (M,1,size,size): the pixel at each cell's centre."""
    centres = torch.arange(size, device=masks.device) + 0.5
    rows, columns = ((centres * (side / size)).long() for side in masks.shape[1:])
    return masks[:, None, rows[:, None], columns]


def normalised(images, size, mean, std):
    """uint8 (N,3,h,w) -> pixels (N,3,size,size), antialiased where it shrinks."""
    pixels = functional.interpolate(images / 255, (size, size), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


class PromptRIS(nn.Module):
    """Images and expressions -> one mask per expression: CLIP's coarse one, drawn anew by SAM."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.clip_grid, self.sam_grid = c.clip_size // c.clip_patch, c.image_size // c.sam_patch        # H_C, H_S
        self.phase = "joint"
        self.clip_image, self.clip_text = build_clip(c)
        self.cmp = nn.ModuleList(
            xavier(CrossModalPrompting(c.clip_width, c.clip_text_width, c.prompts, c.cmp_heads, c.v2l, c.l2v))
            for _ in range(c.clip_layers))
        self.decoder = xavier(TinyDecoder(c.clip_width, c.clip_text_width, c.decoder_width, c.decoder_heads,
                                          c.decoder_ffn))
        if c.sam:
            self.sam = build_sam(c)
            self.text_prompts = xavier(TextPrompts(c.clip_text_width, c.sam_prompt_width, c.text_blocks, c.text_heads,
                                                   c.text_ffn))

    @property
    def coarse_only(self):
        return self.phase == "clip" or not self.config.sam

    def start_phase(self, name):
        """"clip": CLIP, CMP and ICL; "joint": the whole model, 4.2."""
        if name not in ("clip", "joint"):
            raise ValueError(f"phases: {name} is unknown; Prompt-RIS has clip and joint")
        self.phase = name

    def get_extra_state(self):
        """The phase travels with the weights: in those of the first one the text prompts are untrained."""
        return torch.tensor(self.phase == "joint")

    def set_extra_state(self, state):
        self.phase = "joint" if state.item() else "clip"

    def train(self, mode=True):
        super().train(mode)
        for tower in self.frozen_towers():
            tower.eval()
        return self

    def frozen_towers(self):
        clip = [self.clip_image, self.clip_text] if self.config.freeze and self.config.freeze_clip else []
        return clip + ([self.sam] if self.config.freeze and self.config.sam else [])

    def load_pretrained(self):
        """CLIP and SAM from the hub or a folder, CLIP's projections also for the decoder -> {prefix: source}."""
        c = self.config
        source = find_weights(c, c.clip_backbone)
        load_tower(nn.ModuleDict({
            "vision_model": self.clip_image, "visual_projection": self.decoder.image_projection,
            "text_model": self.clip_text, "text_projection": self.decoder.text_projection}),
            read_huggingface(CLIPModel, source), source, "logit_scale", "decoder_width and the clip_ fields")
        sources = {"clip_image.": source, "clip_text.": source}
        if c.sam:
            source = sources["sam."] = find_weights(c, c.sam_backbone)
            load_tower(self.sam, read_huggingface(SamModel, source), source, (), "image_size and the sam_ fields")
        return sources

    def choose_what_learns(self):
        """CMP, the tiny decoder, in the joint phase the text prompts, and the towers that are not frozen."""
        self.requires_grad_(False)
        learning = [self.cmp, self.decoder, self.clip_image, self.clip_text]
        if not self.coarse_only:
            learning += [self.text_prompts, self.sam]
        for module in learning:
            module.requires_grad_(all(module is not tower for tower in self.frozen_towers()))
        if self.config.sam:
            for fixed in (self.sam.shared_image_embedding, self.sam.mask_decoder.iou_prediction_head,
                          self.sam.mask_decoder.output_hypernetworks_mlps[1:],
                          self.sam.prompt_encoder.point_embed[:1], self.sam.prompt_encoder.point_embed[2:]):
                fixed.requires_grad_(False)

    def param_groups(self, recipe):
        """What learns in this phase, and nothing else does from now on. Vectors do not decay."""
        self.choose_what_learns()
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        return [{"params": matrices, "lr": recipe["lr"], "weight_decay": recipe["weight_decay"]},
                {"params": vectors, "lr": recipe["lr"], "weight_decay": 0.0}]

    def forward(self, images, tokens, text_mask, image_index=None):
        """images uint8 (N,3,H,W), tokens and text_mask (M,L), image_index (M,), None: one each, M = N -> dict.

        logits (M,1,H,W) final mask; coarse (M,1,H_C,W_C) in [0,1] and coarse_logits; point (M,1,4H_S,4W_S) one-hot;
        image_index (M,). In the first phase and without SAM, logits are coarse_logits and there is no point.
        """
        index = torch.arange(len(images), device=images.device) if image_index is None else image_index
        F_T, F_I = self.encode(images, tokens, text_mask, index)                            # (M,L,D_T) (M,N_C,D_I)
        S_coarse = self.decoder(F_I, F_T, text_mask, (self.clip_grid, self.clip_grid))      # (M,1,H_C,W_C)
        outputs = {"logits": S_coarse, "coarse": S_coarse.sigmoid(), "coarse_logits": S_coarse, "image_index": index}
        if self.coarse_only:
            return outputs
        pixels = normalised(images, self.config.image_size, SAM_MEAN, SAM_STD)              # (N,3,H,W)
        F_S = self.sam.vision_encoder(pixels).last_hidden_state                             # (N,D_S,H_S,W_S)
        F_S = F_S[index]                                                                    # (M,D_S,H_S,W_S)
        S_C = resize(S_coarse, 4 * self.sam_grid)  # Silent: S_C, S                         # (M,1,4H_S,4W_S)
        positions = self.sam.get_image_wide_positional_embeddings()                         # (1,D_S,H_S,W_S)

        P_point, point = self.point_prompt(S_C)                                             # (M,1,D_S)
        features, places = (rearrange(maps, "m c h w -> m (h w) c") for maps in (F_S, positions))
        P_text = self.text_prompts(F_T, features, places, text_mask)                        # (M,L,D_S)
        P_mask = self.sam.prompt_encoder.mask_embed(S_C)                                    # (M,D_S,H_S,W_S)
        P_mask, P_point, P_text = self.drop(P_mask, P_point, P_text, text_mask)
        S = self.decode(F_S, positions, P_mask, P_point, P_text)                            # (M,1,H,W)
        return outputs | {"logits": S, "point": point.detach().view_as(S_C)}

    def encode(self, images, tokens, text_mask, index):
        """CLIP's towers in lock-step -> F_T (M,L,D_T), F_I (M,N_C,D_I) without [CLS], after CLIP's last norms."""
        pixels = normalised(images, self.config.clip_size, CLIP_MEAN, CLIP_STD)             # (N,3,s,s), s clip_size
        F_I = self.clip_image.embeddings(pixels, interpolate_pos_encoding=True)             # (N,1+N_C,D_I)
        F_I = self.clip_image.pre_layrnorm(F_I)[index]  # Silent: CMP                       # (M,1+N_C,D_I)
        F_T = self.clip_text.embeddings(tokens)                                             # (M,L,D_T)
        for cmp, text_layer, image_layer in zip(self.cmp, self.clip_text.encoder.layers, self.clip_image.encoder.layers,
                                                strict=True):
            F_T, F_I = cmp(F_T, F_I, text_layer, image_layer, text_mask)
        return self.clip_text.final_layer_norm(F_T), self.clip_image.post_layernorm(F_I[:, 1:])  # Silent: F_T, F_I

    def encoded_cells(self):
        """E (4H_S*4W_S,D_S): SAM's encoding of the centres of the point map's cells, row by row."""
        side = 4 * self.sam_grid
        centres = (torch.arange(side, device=self.sam.shared_image_embedding.positional_embedding.device) + 0.5) / side
        points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)           # (4H_S,4W_S,2), x first
        return self.sam.shared_image_embedding(points).flatten(0, 1)

    def point_prompt(self, S_C):
        """S_C (M,1,4H_S,4W_S) -> P_point (M,1,D_S), the one-hot map (M,4H_S*4W_S)."""
        with torch.autocast(S_C.device.type, enabled=False):
            point = point_map(S_C.flatten(1), self.config.tau, self.training)
            E = self.encoded_cells()  # Departs: (3)
            e_p = point @ E  # Eq. (3)
        foreground = self.sam.prompt_encoder.point_embed[1].weight  # Silent: (3)
        return (e_p + foreground)[:, None], point

    def drop(self, P_mask, P_point, P_text, text_mask):
        """The prompts with SAM's "no mask" and "not a point" where one is dropped, and at padded words."""
        def kept(enabled):
            keep = torch.full((len(P_mask),), enabled, device=P_mask.device)
            if self.training:
                drawn = torch.rand(len(P_mask), device=P_mask.device)
                keep = keep & (drawn >= self.config.prompt_dropout)  # Silent: dropout
            return keep

        no_mask = self.sam.prompt_encoder.no_mask_embed.weight                              # (1,D_S)
        no_point = self.sam.prompt_encoder.not_a_point_embed.weight                         # (1,D_S)
        mask, point, text = (kept(kind) for kind in (
            self.config.mask_prompt, self.config.point_prompt, self.config.text_prompt))
        P_mask = torch.where(mask[:, None, None, None], P_mask, no_mask[:, :, None, None])
        P_point = torch.where(point[:, None, None], P_point, no_point)
        P_text = torch.where((text[:, None] & text_mask)[..., None], P_text, no_point)  # Departs: (4)
        return P_mask, P_point, P_text

    def decode(self, F_S, positions, P_mask, P_point, P_text):
        """SAM's mask decoder on all prompts -> S (M,1,H,W), float32 logits."""
        sparse = torch.cat((P_point, P_text), 1)[:, None]                                   # (M,1,1+L,D_S)
        S_low = self.sam.mask_decoder(image_embeddings=F_S, image_positional_embeddings=positions.expand_as(F_S),
                                      sparse_prompt_embeddings=sparse, dense_prompt_embeddings=P_mask,
                                      multimask_output=False)[0]  # Silent: mask  # Eq. (4)
        return resize(S_low[:, 0], self.config.image_size)                                  # from (M,1,4H_S,4W_S)

    def criterion(self, outputs, batch, progress):
        """The terms whose sum is the objective, on the coarse and, where there is one, the final mask."""
        maps = {"clip_seg": outputs["coarse_logits"]}
        if not self.coarse_only:
            maps["sam_seg"] = outputs["logits"]
        truths = {name: nearest(batch["masks"], S.shape[-1]) for name, S in maps.items()}
        seg = {name: (binary_cross_entropy(S, truths[name]) + dice_loss(S, truths[name], squared=True, eps=1e-4)).mean()
               for name, S in maps.items()}
        if not self.config.icl:
            return seg
        icl = sum(instance_contrastive_loss(S, truths[name], batch["image_index"], batch["instance"],
                                            eps=self.config.icl_epsilon).mean() for name, S in maps.items())
        weight = 0.0 if progress < self.config.icl_warmup else self.config.icl_weight
        return seg | {"icl": weight * icl}  # Eq. (9)

    def diagnose(self, outputs, masks):
        """Per expression: the coarse mask's IoU, if the final one fits another object better, if the point is on it."""
        side = masks.shape[-1]
        truth = masks.flatten(1).float()                                                    # (M,H*W)
        index = outputs["image_index"]

        def ious(logits):
            prediction = (resize(logits, side) > 0).flatten(1).float()
            shared = prediction @ truth.T                                                   # (M,M)
            return shared / (prediction.sum(1)[:, None] + truth.sum(1) - shared).clamp(min=1)

        final = ious(outputs["logits"]).masked_fill(index[:, None] != index, 0)
        figures = {"coarse_iou": ious(outputs["coarse_logits"]).diagonal(),
                   "mistaken": (final.amax(1) > final.diagonal()).float()}
        if "point" in outputs:
            hit = outputs["point"] * nearest(masks, outputs["point"].shape[-1])
            figures["point_hit"] = hit.sum((1, 2, 3))
        return figures


RECIPE = {                                          # 4.2 where not marked
    "epochs": 50, "batch_size": 64, "lr": 1e-4, "schedule": "poly", "power": 0.9,
    "phases": {"clip": 0.4, "joint": 0.6},          # 20 and 30 epochs
    "per_image": 4,                                 # b: 16 images x 4 expressions, masked repeats where there are fewer
    "repeat_mask": 0.25,                            # our choice: with what chance a repeat loses each of its words
    "weight_decay": 0.01, "warmup": 0.0, "clip": 0.0,           # our choice: no warm-up, no gradient clipping
    "micro_batch": 16, "precision": "bf16", "protocol": "original", "empty": "zero", "select": "mIoU",    # our choice
}
RECIPE_FOR = {"rrsisd": {"per_image": 0, "icl": False}}          # one expression per image: nothing to contrast
RECIPE_TINY = {"epochs": 60, "batch_size": 32, "micro_batch": 32, "lr": 1.2e-3, "schedule": "cosine", "warmup": 1.0,
               "clip": 1.0, "phases": {"clip": 0.15, "joint": 0.85}}
RETIRED = {"cmp_width": 0, "icl_size": 0}           # fields of before, at the value that means what is done today
ABLATIONS = {
    "3": {row: {"v2l": "CMP" in row, "l2v": "CMP" in row, "icl": "ICL" in row, "sam": "SAM" in row}
          | ({} if "SAM" in row else {"phases": None})
          for row in ("CLIP", "CLIP+CMP", "CLIP+CMP+ICL", "CLIP+CMP+SAM", "CLIP+CMP+ICL+SAM")},
    "4": {row: {"v2l": v2l, "l2v": l2v, "icl": False, "sam": False, "phases": None} for row, v2l, l2v in (
        ("Baseline", False, False), ("V2LP", True, False), ("L2VP", False, True), ("CMP", True, True))},
    "5": {row: {f"{kind}_prompt": kind in row.split("+") for kind in ("mask", "point", "text")} for row in (
        "none", "mask", "point", "text", "mask+point", "mask+text", "point+text", "mask+point+text")},
    "ICL": {"without": {"icl": False}, "with": {"icl": True}},
}
FIGURES = {                                         # of the rows in their order, as the paper prints them
    table: {row: "oIoU {}, mIoU {}".format(*pair.split("/"))
            for row, pair in zip(ABLATIONS[table], pairs.split(), strict=True)}
    for table, pairs in {
        "3": "65.24/67.94 71.51/73.10 72.57/73.97 75.86/77.40 76.36/78.10",
        "4": "65.24/67.94 67.48/69.53 70.52/72.44 71.51/73.10",
        "5": "42.88/42.63 70.82/72.01 55.34/55.18 72.61/75.11 70.95/73.24 75.86/77.40 74.34/76.75 76.36/78.10"}.items()}
EVALUATION_ONLY = ("5",)                            # 4.4: prompts of one trained model, dropped at inference


# ----------------------------------------------------------------------------------- CLIP and SAM with random weights


def build_clip(c):
    """CLIP's image and text towers of a Config `c` with random weights."""
    image = CLIPVisionConfig(
        hidden_size=c.clip_width, intermediate_size=c.clip_ffn, num_hidden_layers=c.clip_layers,
        num_attention_heads=c.clip_heads, image_size=c.clip_native, patch_size=c.clip_patch)
    text = CLIPTextConfig(
        vocab_size=c.vocab_size, hidden_size=c.clip_text_width, intermediate_size=c.clip_text_ffn,
        num_hidden_layers=c.clip_layers, num_attention_heads=c.clip_text_heads,
        max_position_embeddings=c.clip_text_positions, bos_token_id=None, eos_token_id=None)
    image, text = xavier(CLIPVisionModel(image)), xavier(CLIPTextModel(text))
    with torch.no_grad():
        image.embeddings.position_embedding.weight[1:] = sine_table(c.clip_native // c.clip_patch, c.clip_width)
    return image, text


def build_sam(c):
    """SAM of a Config `c` with random weights; those that transformers starts with pass hardly any signal."""
    sides = {"image_size": c.image_size, "patch_size": c.sam_patch}
    vision = SamVisionConfig(
        **sides, hidden_size=c.sam_width, mlp_dim=c.sam_ffn, num_hidden_layers=c.sam_layers,
        num_attention_heads=c.sam_heads, window_size=c.sam_window, global_attn_indexes=c.sam_global,
        output_channels=c.sam_prompt_width, num_pos_feats=c.sam_prompt_width // 2)
    prompts = SamPromptEncoderConfig(**sides, hidden_size=c.sam_prompt_width, mask_input_channels=c.sam_mask_channels)
    decoder = SamMaskDecoderConfig(
        hidden_size=c.sam_prompt_width, mlp_dim=c.sam_decoder_ffn, num_attention_heads=c.sam_decoder_heads,
        iou_head_hidden_dim=c.sam_prompt_width)
    sam = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    for module in sam.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
            module.reset_parameters()
    nn.init.normal_(sam.shared_image_embedding.positional_embedding)          # one tensor with the prompt encoder's
    with torch.no_grad():
        positions = sam.vision_encoder.pos_embed                                                    # (1,H_S,W_S,width)
        positions[:] = sine_table(c.image_size // c.sam_patch, c.sam_width).view_as(positions)
    return xavier(sam)


def sine_table(side, width):
    """Where side x side cells lie, row by row -> (side*side,width), y in the first half: a table that is smooth."""
    centres = (torch.arange(side) + 0.5) / side
    angles = centres[:, None] * 2 * math.pi * 10000 ** -(torch.arange(width // 4) / (width // 4))
    waves = torch.cat((angles.sin(), angles.cos()), 1)                                              # (side,width/2)
    table = torch.cat((waves.repeat_interleave(side, 0), waves.repeat(side, 1)), 1)
    table = table - table.mean(0)
    return 0.5 * table / table.std()


def xavier(module):
    """Linear layers as Transformers usually start; PyTorch's own start lets the words in weakly."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


# --------------------------------------------------------------------------------------- tokenizer, published weights


SPECIAL_TOKENS = {"pad": 0, "unknown": 1, "begin": 2, "end": 3}      # as CLIP marks a sentence: [SOS] words [EOS]


class ClipWords:
    """CLIP's own tokenizer, cut inside its marks or padded with [EOS] to `length`: strings -> tokens, text_mask."""

    def __init__(self, words, length):
        self.words, self.length = words, length

    def __call__(self, expressions):
        batch = self.words(expressions, padding="max_length", truncation=True, max_length=self.length,
                           return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].bool()


def tokenizer(config):
    """The published tokenizer: a callable, list of strings -> tokens (M,L) int64, text_mask (M,L) bool."""
    source = find_weights(config, config.clip_backbone)
    words = from_hub(read_words, source)
    if len(words) != config.vocab_size:
        raise ValueError(f"{source}: a vocabulary of {len(words)} words, expected vocab_size={config.vocab_size}")
    return ClipWords(words, config.text_length)


def read_words(source):
    """The tokenizer there. Where its files are missing, transformers answers with one of the special words alone."""
    words = CLIPTokenizer.from_pretrained(source)
    if len(words) == len(words.all_special_tokens):
        raise OSError("neither vocab.json with merges.txt nor tokenizer.json found")
    return words


def find_weights(config, name):
    """What `pretrained` makes of a backbone's name: the hub name itself, or the path of its folder."""
    if config.pretrained == "hub":
        return name
    path = Path(config.pretrained) / name.split("/")[-1]
    if path.exists():
        return str(path)
    raise FileNotFoundError(f"{path}: no such folder; put the files of huggingface.co/{name} there, "
                            "or say --set pretrained=hub")


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


# Notes
# Departs
#   (2)         divided by sqrt(D_C): a plain sum of 512 products starts saturated; the net can grow it
#   (3)         E is computed anew in each call, not stored: so it is always that of the weights in use. At inference
#               the first of the cells within 1e-4 of the highest: those at the border are equal but for rounding
#   (4)         always L text prompts: where a sentence is shorter, the padding is SAM's "not a point"
#   (6)         its layer is the image tower's; the printed E_L2V is a slip
#   (8)         log(eps + (1-eps) O), and so for 1-O, eps 1e-4: finite, and flat only where two masks are equal
#   P@X         counts IoU >= X, as the field does; 4.1 says "higher than". Scored at the image's own size, cut at 0.5
#   sizes       CLIP's 480 x 480 is made of SAM's 1024 x 1024, not of the original: the loader hands over one size
#   numbers     Table 3's CLIP+CMP+SAM and Table 5's mask+text are one row of numbers. 4.4's gains of ICL on
#               P@0.9, 1.87 and 3.32, are 1.78 and 3.23 by Table 3
# Silent
#   CLIP        frozen, as 1 and 2 say of prompt learning; but 4.2 says "train CLIP with CMP", and 3.1 "frozen" of SAM
#               alone (freeze_clip=False: CLIP learns). Its positions are resized bicubically to 30 x 30
#   sizes       both towers see the image squashed, bilinear, antialiased. L is 22
#   CMP         (5) and (6) start from the embeddings (image: after its first norm): 12 prompters each way, none shared;
#               8 heads, together as wide as what they read, norms before, no residual; tokens start with deviation
#               0.02, have no positions; padded words are not read, here, in (1) and in P_text
#   order       the causal mask stays among the words; the prompts stand before them, as (5) writes, so every word reads
#               all. The prompts' own rows, which (5) and (6) drop, are not computed: nothing else reads them
#   F_T, F_I    after CLIP's last norms; the decoder starts from copies of CLIP's projections, D_C = 512, and has one
#               block each way: 8 heads, a feed-forward net 2048, residuals, norm after; (2) has no bias, is no cosine
#   S_C, S      bilinear, as S from S'; S_C stays logits, as SAM's own mask prompts are
#   (3)         temperature 1, float32; e_p gets SAM's embedding of a foreground point; no second, padding point
#   P_text      linear to 256, then twice: words, SAM's features (positions on keys), a net of 1024; 8 heads, norm after
#   dropout     each kind of prompt of each expression with 0.2, independently (0.8 % lose all three): a point or word
#               becomes "not a point", a mask "no mask"; so too in Table 5, which drops them at inference
#   mask        the decoder's first output is number 0, its single-mask one
#   (7)-(9)     S_coarse at 30 x 30, S at 1024 x 1024, the truth nearest-resized; Dice has squares below, as (7), eps
#               1e-4; w is hard, of each map its own, without gradient: else a lower IoU would lower the loss; L_icl is
#               the sum over both maps; each expression counts 1/M: micro-batches that keep an
#               image's expressions together give one objective; cross-entropy and Dice count alike
#   training    weight decay 0.01, not on vectors; one polynomial over both phases; an epoch is every image once, by
#               its group; of a repeated sentence each word is deleted with probability 0.25, one stays; AdamW, as 4.2;
#               Xavier and sines for positions where nothing is loaded: from random tables places are hardly read
#   data        RRSIS-D, with one expression per image, has neither groups nor L_icl. Table 2: refcoco-union of data.py,
#               the three sets without images of any validation or test split; of its seen expressions, scored on seen
#               and unseen; "test" is testA and testB as one (--split testA+testB)
#   Tables 3, 4 rows without SAM train S_coarse for all 50 epochs and score it; Table 4 has no ICL, as in Table 3's CMP
# Omits
#   none; 4.4's ImgAcc and InstAcc are in metrics.py, its figures: 77.61 / 76.02 without ICL, 79.34 / 77.74 with
