"""Prompt-RIS: CLIP finds the object and SAM draws it, joined end to end by prompts.

Paper
    Shang, Song, Qiu, Wang, Meng, Li. Prompt-Driven Referring Image Segmentation with Instance Contrasting. CVPR 2024,
    https://openaccess.thecvf.com/content/CVPR2024/html/Shang_Prompt-Driven_Referring_Image_Segmentation_with_Instance_Contrasting_CVPR_2024_paper.html
    At every layer CLIP's two towers send each other prompts (CMP); the response of the patches to the sentence is a
    coarse mask. It becomes SAM's mask and point prompts, the words its text prompts. Masks of sentences about one
    object are pulled together, those of different objects of an image pushed apart (ICL).
Official
    none released. No code was copied.
Shapes
    N images, M expressions, L tokens with [SOS], [EOS] and padding (the paper's L + 2), n = 16 prompts per direction
    H,W         side of the image as SAM sees it and of the final mask, 1024; H_S,W_S SAM's grid, 64 x 64
    H_C,W_C     CLIP's grid, 30 x 30 at 480 px, N_C its 900 cells
    D_I, D_T    widths of CLIP's towers, 768 (the paper's D_IC) and 512; D_C the tiny decoder's, 512; D_S SAM's, 256
    F_I, F_T    CLIP's features (M,N_C,D_I), between its layers (M,1+N_C,D_I) with [CLS] first, and words (M,L,D_T)
    F_IS        SAM's features (N,D_S,H_S,W_S), taken to (M,D_S,H_S,W_S)
    t_g         the sentence, F'_T at [EOS]; S_coarse the paper's S'_C (M,1,H_C,W_C); S_C the same at 4H_S x 4W_S
    E, e_p      SAM's position encoding of the cells (4H_S*4W_S,D_S), the chosen one; in (3), M is the one-hot point map
    S_low, S    the paper's S' (M,1,4H_S,4W_S) and the final logits (M,1,H,W)
    O, Y, w     overlap of two masks, 1 where they mean the same object, IoU of a mask with its truth
Equations
    Eq. (1), Eq. (2)    TinyDecoder.forward
    Eq. (3)             PromptRIS.point_prompt, point_map
    Eq. (4)             PromptRIS.decode
    Eq. (5), Eq. (6)    CrossModalPrompting.forward
    Eq. (7), Eq. (8)    losses.py, instance_contrastive_loss
    Eq. (9)             PromptRIS.criterion
Departs
    (2)         divided by sqrt(D_C): a plain sum of 512 products starts saturated; the net can grow it
    (3)         E is computed anew in each call, not stored: so it is always that of the weights in use
    (4)         always L text prompts: where a sentence is shorter, the padding is SAM's "not a point"
    (6)         its layer is the image tower's; the printed E_L2V is a slip
    (8)         log(eps + (1-eps) O), and so for 1-O, eps 1e-4: finite, and flat only where two masks are equal
    P@X         counts IoU >= X, as the field does; 4.1 says "higher than"
    numbers     Table 3's CLIP+CMP+SAM and Table 5's mask+text are the same five numbers: one is a slip. 4.4's gains of
                ICL on P@0.9, 1.87 and 3.32, are 1.78 and 3.23 by Table 3
Silent
    CLIP        frozen, as 1 and 2 say of prompt learning; but 4.2 says "train CLIP with CMP", and 3.1 "frozen" of SAM
                alone (freeze_clip=False: CLIP learns). Its positions are resized bicubically to 30 x 30
    sizes       both towers see the image squashed, bilinear, antialiased; CLIP's is made of SAM's. L is 22
    CMP         (5) and (6) start from the embeddings (image: after its first norm): 12 prompters each way, none shared;
                8 heads, together as wide as what they read (cmp_width: narrower), norms before, no residual; tokens
                start with deviation 0.02, have no positions; padded words are not read, here, in (1) and in P_text
    order       the causal mask stays among the words; the prompts stand before them, as (5) writes, so every word reads
                all. The prompts' own rows, which (5) and (6) drop, are not computed: nothing else reads them
    F_T, F_I    after CLIP's last norms; the decoder starts from copies of CLIP's projections, D_C = 512, and has one
                block each way: 8 heads, a feed-forward net 2048, residuals, norm after; (2) has no bias, is no cosine
    S_C         bilinear, stays logits, as SAM's own mask prompts are
    (3)         temperature 1, float32; e_p gets SAM's embedding of a foreground point; no second, padding point; of
                equally high cells (within 1e-4) the first
    P_text      linear to 256, then twice: words, SAM's features with its position encoding, feed-forward net 1024;
                8 heads, residuals, norm after
    dropout     each kind of prompt of each expression with 0.2, independently (0.8 % lose all three): a point or word
                becomes "not a point", a mask "no mask"; so too in Table 5, which drops them at inference
    mask        the decoder's first output is number 0, its single-mask one
    (7)-(9)     S_coarse is taken at 30 x 30, S at 1024 x 1024 (icl_size: (7) takes S smaller, which saves memory), the
                truth nearest-resized; Dice has squares in its denominator, as (7), and 1e-4 above and below
    (8)         w is hard, of each map its own, without gradient: else a lower IoU would lower the loss; L_icl is the
                sum over both maps; each expression counts 1/M, so that any micro-batches give one objective
    training    weight decay 0.01, not on vectors; one polynomial over both phases; an epoch is every image once; of a
                repeated sentence each word is lost with probability 0.25, one stays
    start       Xavier for every linear layer that is not loaded
    data        refcoco-union of data.py: the three sets without images of any validation or test split. Table 2: of its
                seen expressions, scored on seen and unseen; "test" is testA and testB as one (--split testA+testB)
    testing     logits resized to the image's own size, cut at probability 0.5; one sentence at a time; metrics.py has
                ImgAcc and InstAcc
    Tables 3, 4 rows without SAM score S_coarse, which they train for all 50 epochs; Table 4 has no ICL, as its CMP row
                is Table 3's
    other data  remote-sensing sets give one expression per image: no groups, ICL off
Omits
    none
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import (
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from losses import binary_cross_entropy, dice_loss, instance_contrastive_loss

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAPS = ("coarse",)


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
    cmp_width: int = 0                              # our choice: inner width of a prompter; 0: that of what it reads
    decoder_width: int = 512                        # our choice, D_C: the width of CLIP's joint space
    decoder_heads: int = 8                          # our choice
    decoder_ffn: int = 2048                         # our choice
    text_blocks: int = 2                            # 3.1
    text_heads: int = 8                             # our choice
    text_ffn: int = 1024                            # our choice
    tau: float = 1.0                                # our choice: temperature of Eq. (3)
    prompt_dropout: float = 0.2                     # our choice: 4.2 gives no rate
    icl_size: int = 0                               # side of the final masks in Eq. (7); 0: that of S, as in the paper
    icl_epsilon: float = 1e-4                       # our choice, Eq. (8)

    v2l: bool = True                                # Tables 3 and 4: prompting vision-to-language, language-to-vision
    l2v: bool = True
    icl: bool = True                                # Table 3
    sam: bool = True                                # Table 3
    mask_prompt: bool = True                        # Table 5, for evaluate.py; set in training, they hold there too
    point_prompt: bool = True
    text_prompt: bool = True

    def __post_init__(self):
        if self.image_size % self.sam_patch or self.clip_size % self.clip_patch:
            raise ValueError(f"image_size={self.image_size} and clip_size={self.clip_size} must be multiples of "
                             f"sam_patch={self.sam_patch} and clip_patch={self.clip_patch}")
        if self.text_length > self.clip_text_positions:
            raise ValueError(f"text_length={self.text_length}: CLIP has {self.clip_text_positions} positions")

    @property
    def clip_grid(self):
        return self.clip_size // self.clip_patch

    @property
    def sam_grid(self):
        return self.image_size // self.sam_patch

    @classmethod
    def tiny(cls):
        return cls(image_size=96, clip_size=96, pretrained="none", freeze=False, vocab_size=256,
                   clip_patch=8, clip_native=96, clip_width=64, clip_heads=4, clip_ffn=128, clip_layers=3,
                   clip_text_width=48, clip_text_heads=4, clip_text_ffn=96, clip_text_positions=22,
                   sam_patch=6, sam_width=64, sam_heads=4, sam_ffn=128, sam_layers=3, sam_window=4, sam_global=(1,),
                   sam_prompt_width=48, sam_mask_channels=16, sam_decoder_heads=4, sam_decoder_ffn=96,
                   prompts=4, cmp_heads=4, decoder_width=64, decoder_heads=4, decoder_ffn=128,
                   text_heads=4, text_ffn=96, prompt_dropout=0.05)


RECIPE = {                                          # 4.2 where not marked
    "epochs": 50, "batch_size": 64, "lr": 1e-4, "schedule": "poly", "power": 0.9,
    "phases": {"clip": 0.4, "joint": 0.6},          # 20 and 30 epochs
    "per_image": 4,                                 # b: 16 images x 4 expressions, masked repeats where there are fewer
    "repeat_mask": 0.25,                            # our choice: probability that a repeat loses a word
    "weight_decay": 0.01, "warmup": 0.0, "clip": 0.0,           # our choice: no warm-up, no gradient clipping
    "micro_batch": 16, "precision": "bf16", "protocol": "original", "empty": "zero", "select": "mIoU",    # our choice
}
RECIPE_FOR = {name: {"per_image": 0, "icl": False}               # one expression per image: no groups
              for name in ("refsegrs", "rrsisd", "risbench")}
RECIPE_TINY = {"epochs": 72, "batch_size": 32, "micro_batch": 32, "lr": 1.2e-3, "schedule": "cosine", "warmup": 1.0,
               "clip": 1.0, "phases": {"clip": 0.15, "joint": 0.85}}
ABLATIONS = {
    "3": {row: {"v2l": cmp, "l2v": cmp, "icl": icl, "sam": sam, **({} if sam else {"phases": None})}
          for row, cmp, icl, sam in (
              ("CLIP", False, False, False), ("CLIP+CMP", True, False, False), ("CLIP+CMP+ICL", True, True, False),
              ("CLIP+CMP+SAM", True, False, True), ("CLIP+CMP+ICL+SAM", True, True, True))},
    "4": {row: {"v2l": v2l, "l2v": l2v, "icl": False, "sam": False, "phases": None} for row, v2l, l2v in (
        ("Baseline", False, False), ("V2LP", True, False), ("L2VP", False, True), ("CMP", True, True))},
    # of one trained model: evaluate.py --set mask_prompt=... point_prompt=... text_prompt=...
    "5": {row: {f"{kind}_prompt": kind in row.split("+") for kind in ("mask", "point", "text")} for row in (
        "none", "mask", "point", "text", "mask+point", "mask+text", "point+text", "mask+point+text")},
    "ICL": {"without": {"icl": False}, "with": {"icl": True}},
}


# --------------------------------------------------------------------------------------- tokenizer, published weights


SPECIAL_TOKENS = {"pad": 0, "unknown": 1, "begin": 2, "end": 3}      # as CLIP marks a sentence: [SOS] words [EOS]


class ClipWords:
    """CLIP's own tokenizer, padded and cut to `length` with [SOS] and [EOS] kept: strings -> tokens, text_mask.

    It pads with [EOS] itself, so only its mask tells where a sentence ends.
    """

    def __init__(self, tokenizer, length):
        self.tokenizer, self.length = tokenizer, length

    def __len__(self):
        return len(self.tokenizer)

    def __call__(self, expressions):
        batch = self.tokenizer(list(expressions), padding="max_length", truncation=True, max_length=self.length,
                               return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"].bool()


def tokenizer(config):
    """The published tokenizer: a callable, list of strings -> tokens (M,L) int64, text_mask (M,L) bool."""
    source = find_weights(config, config.clip_backbone)
    words = from_hub(clip_vocabulary, source)
    if len(words) != config.vocab_size:
        raise ValueError(f"{source}: a vocabulary of {len(words)} words, expected vocab_size={config.vocab_size}")
    return ClipWords(words, config.text_length)


def clip_vocabulary(source):
    words = CLIPTokenizer.from_pretrained(source)
    if len(words) <= 2:                             # transformers' answer to a missing file is its two special words
        raise OSError("neither vocab.json with merges.txt nor tokenizer.json found")
    return words


def find_weights(config, name):
    """What `pretrained` makes of a backbone's name: the hub name itself, or the path of its folder."""
    if config.pretrained == "hub":
        return name
    path = Path(config.pretrained) / name.split("/")[-1]
    if path.is_dir():
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
                             f"({str(error).strip().splitlines()[0]})") from error
        raise FileNotFoundError(
            f"{source}: not reached on the hub and not in its cache; set the variable HF_ENDPOINT to a mirror, "
            f"or put its files in DIR/{source.split('/')[-1]} and say --set pretrained=DIR") from error


def read_huggingface(kind, source, extra):
    """Tensors of a published checkpoint in float32; names that begin with one of `extra` may be in it besides."""
    _, info = loaded = from_hub(kind.from_pretrained, source, dtype=torch.float32, output_loading_info=True)
    unknown = [name for name in info["unexpected_keys"] if not name.startswith(extra)]
    if info["missing_keys"] or unknown:
        raise ValueError(f"{source}: not the weights of a {kind.__name__}: missing {sorted(info['missing_keys'])[:3]}, "
                         f"unknown {sorted(unknown)[:3]}")
    return {name: value for name, value in loaded[0].state_dict().items() if not name.startswith(extra)}


def load_strictly(module, tensors, source, fields):
    """All of `tensors` into `module` and nothing left over; `fields` are named if it does not fit."""
    own = module.state_dict()
    wrong = [*sorted(set(own) - set(tensors)), *sorted(set(tensors) - set(own))]
    wrong += [name for name in own if not wrong and own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(f"{source}: does not fit {fields}: {len(wrong)} of {len(own)} tensors are missing, unknown or "
                         f"of another shape, the first {wrong[:2]}")
    module.load_state_dict(tensors)
    print(f"{source}: {len(tensors)} tensors loaded")


def build_clip(config):
    """CLIP's image and text towers with random weights."""
    image = CLIPVisionConfig(hidden_size=config.clip_width, intermediate_size=config.clip_ffn,
                             num_hidden_layers=config.clip_layers, num_attention_heads=config.clip_heads,
                             image_size=config.clip_native, patch_size=config.clip_patch)
    text = CLIPTextConfig(vocab_size=config.vocab_size, hidden_size=config.clip_text_width,
                          intermediate_size=config.clip_text_ffn, num_hidden_layers=config.clip_layers,
                          num_attention_heads=config.clip_text_heads,
                          max_position_embeddings=config.clip_text_positions, bos_token_id=None, eos_token_id=None)
    return xavier(CLIPVisionModel(image)), xavier(CLIPTextModel(text))


def build_sam(config):
    """SAM with random weights; transformers' defaults pass hardly any signal."""
    sam = SamModel(SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=config.sam_width, mlp_dim=config.sam_ffn, num_hidden_layers=config.sam_layers,
            num_attention_heads=config.sam_heads, image_size=config.image_size, patch_size=config.sam_patch,
            window_size=config.sam_window, global_attn_indexes=config.sam_global, initializer_range=0.02,
            output_channels=config.sam_prompt_width, num_pos_feats=config.sam_prompt_width // 2),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=config.sam_prompt_width, image_size=config.image_size, patch_size=config.sam_patch,
            mask_input_channels=config.sam_mask_channels),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=config.sam_prompt_width, mlp_dim=config.sam_decoder_ffn,
            num_attention_heads=config.sam_decoder_heads, iou_head_hidden_dim=config.sam_prompt_width)))
    for module in sam.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
            module.reset_parameters()
    nn.init.normal_(sam.shared_image_embedding.positional_embedding)          # one tensor with the prompt encoder's
    return xavier(sam)


def xavier(module):
    """Linear layers as Transformers usually start; PyTorch's own start lets the words in weakly."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


# -------------------------------------------------------------------------------------------------------------- parts


def resize(maps, size):
    """(B,C,h,w) -> (B,C,size,size), bilinear, in float32."""
    return F.interpolate(maps.float(), (size, size), mode="bilinear", align_corners=False)


def nearest(masks, size):
    """bool (M,H,W) -> (M,1,size,size): the pixel at each cell's centre."""
    centres = ((torch.arange(size, device=masks.device) + 0.5) * (masks.shape[-1] / size)).long()
    return masks[:, None, centres[:, None], centres]


def normalised(images, size, mean, std):
    """uint8 (N,3,H,W) -> pixels (N,3,size,size), antialiased where it shrinks."""
    pixels = images.float() / 255
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


class Attention(nn.Module):
    """Multi-head attention: queries (B,Q,C), keys and values (B,K,C) -> (B,Q,out); mask (B,K), True = may be read."""

    def __init__(self, width, heads, inner=None, out=None):
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.to_q = nn.Linear(width, inner)
        self.to_k = nn.Linear(width, inner, bias=False)                       # a key bias cancels in the softmax
        self.to_v = nn.Linear(width, inner)
        self.to_out = nn.Linear(inner, out or width)

    def forward(self, queries, keys, values, mask=None):
        q, k, v = (rearrange(tokens, "b n (a d) -> b a n d", a=self.heads)
                   for tokens in (self.to_q(queries), self.to_k(keys), self.to_v(values)))
        mask = None if mask is None else mask[:, None, None]                  # (B,1,1,K)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)       # (B,heads,Q,inner/heads)
        return self.to_out(rearrange(mixed, "b a n d -> b n (a d)"))


class FeedForward(nn.Sequential):
    """(B,n,C) -> (B,n,C), each token by itself."""

    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


# ------------------------------------------------------------------------------------------------ CLIP, 3.1 and 3.2


def prompted_layer(layer, tokens, prompts=None, mask=None):
    """One of CLIP's layers on tokens (B,n,C) that also read prompts (B,p,C) -> (B,n,C).

    mask (n,n), True = may be read, is among the tokens; all read every prompt. Equal to the layer on [prompts; tokens]
    with the prompts' rows dropped.
    """
    attention = layer.self_attn
    normed = layer.layer_norm1(tokens)
    context = normed
    if prompts is not None:
        context = torch.cat((layer.layer_norm1(prompts), normed), 1)                        # (B,p+n,C)
        mask = None if mask is None else F.pad(mask, (prompts.shape[1], 0), value=True)     # (n,p+n)
    q, k, v = (rearrange(part, "b n (a d) -> b a n d", a=attention.num_heads) for part in (
        attention.q_proj(normed), attention.k_proj(context), attention.v_proj(context)))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)                         # (B,heads,n,C/heads)
    tokens = tokens + attention.out_proj(rearrange(mixed, "b a n d -> b n (a d)"))
    return tokens + layer.mlp(layer.layer_norm2(tokens))


class Prompter(nn.Module):
    """Learnable tokens read the features (B,n,C) of one tower and become prompts (B,prompts,out) for the other."""

    def __init__(self, config, width, out):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(config.prompts, width) * 0.02)
        self.norm_tokens, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, config.cmp_heads, inner=config.cmp_width or width, out=out)

    def forward(self, features, mask=None):
        tokens = self.norm_tokens(self.tokens).expand(len(features), -1, -1)                # (B,prompts,C)
        features = self.norm_features(features)
        return self.attention(tokens, features, features, mask)                             # (B,prompts,out)


class CrossModalPrompting(nn.Module):
    """One step of both towers, each reading prompts made from the other's state, Eqs. (5) and (6)."""

    def __init__(self, config):
        super().__init__()
        self.v2l = Prompter(config, config.clip_width, config.clip_text_width) if config.v2l else None
        self.l2v = Prompter(config, config.clip_text_width, config.clip_width) if config.l2v else None

    def forward(self, F_T, F_I, text_layer, image_layer, text_mask):
        """F_T (M,L,D_T), F_I (M,1+N_C,D_I) with [CLS] first, text_mask (M,L) -> both after one layer more."""
        T_V2L = self.v2l(F_I[:, 1:]) if self.v2l else None                                  # (M,n,D_T)
        T_L2V = self.l2v(F_T, text_mask) if self.l2v else None                              # (M,n,D_I)
        length = F_T.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=F_T.device).tril()
        F_T = prompted_layer(text_layer, F_T, T_V2L, causal)  # Eq. (5)
        F_I = prompted_layer(image_layer, F_I, T_L2V)  # Eq. (6)
        return F_T, F_I


class CrossBlock(nn.Module):
    """Queries (B,Q,C) read keys and values (B,K,C): attention and a feed-forward net, residual and norm after each."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attention, self.ffn = Attention(width, heads), FeedForward(width, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, queries, keys, values, mask=None):
        queries = self.norm1(queries + self.attention(queries, keys, values, mask))
        return self.norm2(queries + self.ffn(queries))


class TinyDecoder(nn.Module):
    """CLIP's features and words look at each other once; what the patches answer to the sentence is the coarse mask."""

    def __init__(self, config):
        super().__init__()
        self.image_projection = nn.Linear(config.clip_width, config.decoder_width, bias=False)
        self.text_projection = nn.Linear(config.clip_text_width, config.decoder_width, bias=False)
        self.to_image = CrossBlock(config.decoder_width, config.decoder_heads, config.decoder_ffn)
        self.to_text = CrossBlock(config.decoder_width, config.decoder_heads, config.decoder_ffn)

    def forward(self, F_I, F_T, text_mask):
        """F_I (M,N_C,D_I), F_T (M,L,D_T), text_mask (M,L) -> S_coarse (M,1,H_C,W_C), float32 logits."""
        F_I, F_T = self.image_projection(F_I), self.text_projection(F_T)                    # (M,N_C,D_C) (M,L,D_C)
        # from here on they are the paper's primed ones
        F_I, F_T = self.to_image(F_I, F_T, F_T, text_mask), self.to_text(F_T, F_I, F_I)  # Eq. (1)
        eos = text_mask.sum(1) - 1
        t_g = F_T[torch.arange(len(F_T), device=F_T.device), eos]                           # (M,D_C)
        S_coarse = (F_I.float() * t_g.float()[:, None]).sum(2) / math.sqrt(t_g.shape[1])  # Eq. (2)
        return rearrange(S_coarse, "m (h w) -> m 1 h w", h=math.isqrt(F_I.shape[1]))


# ----------------------------------------------------------------------------------------------------------- SAM, 3.1


def point_map(S_C, tau, sample):
    """Logits (M,h*w) -> one-hot M (M,h*w), float32: drawn with straight-through gradients, or the highest one.

    Resizing leaves cells at the border equal but for rounding, which must not choose: the first of them is taken.
    """
    if sample:
        return F.gumbel_softmax(S_C.float(), tau=tau, hard=True)
    highest = S_C.amax(1, keepdim=True) - S_C <= 1e-4
    return F.one_hot(highest.int().argmax(1), S_C.shape[1]).float()


class TextPrompts(nn.Module):
    """CLIP's words (M,L,D_T) conditioned on SAM's image features (M,H_S*W_S,D_S) -> text prompts (M,L,D_S)."""

    def __init__(self, config):
        super().__init__()
        width, heads = config.sam_prompt_width, config.text_heads
        self.projection = nn.Linear(config.clip_text_width, width)
        self.self_attentions = nn.ModuleList(Attention(width, heads) for _ in range(config.text_blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.text_blocks))
        self.cross_blocks = nn.ModuleList(CrossBlock(width, heads, config.text_ffn) for _ in range(config.text_blocks))

    def forward(self, F_T, features, positions, text_mask):
        words = self.projection(F_T)                                                        # (M,L,D_S)
        for attention, norm, cross in zip(self.self_attentions, self.norms, self.cross_blocks, strict=True):
            words = norm(words + attention(words, words, words, text_mask))
            words = cross(words, features + positions, features)
        return words


# ---------------------------------------------------------------------------------------------------------- the model


class PromptRIS(nn.Module):
    """Images and expressions -> one mask per expression: CLIP's coarse one, drawn anew by SAM."""

    MAPS = MAPS

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.phase = "joint"
        self.clip_image, self.clip_text = build_clip(config)
        self.cmp = nn.ModuleList(xavier(CrossModalPrompting(config)) for _ in range(config.clip_layers))
        self.decoder = xavier(TinyDecoder(config))
        if config.sam:
            self.sam = build_sam(config)
            self.text_prompts = xavier(TextPrompts(config))

    @property
    def coarse_only(self):
        return self.phase == "clip" or not self.config.sam

    def start_phase(self, name):
        """"clip": CLIP, CMP and ICL; "joint": the whole model, 4.2."""
        if name not in ("clip", "joint"):
            raise ValueError(f"phases: {name} is unknown; Prompt-RIS has clip and joint")
        self.phase = name

    def get_extra_state(self):
        """The phase travels with the weights: in those of the first one nothing that feeds SAM has been trained."""
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
        clip, sam = (find_weights(self.config, name) for name in (self.config.clip_backbone, self.config.sam_backbone))
        extra = ("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
        tensors = read_huggingface(CLIPModel, clip, extra)
        projections = (self.decoder.image_projection, self.decoder.text_projection)
        for prefix, module, fields in (("vision_model.", self.clip_image, "the clip_ fields"),
                                       ("text_model.", self.clip_text, "the clip_text_ fields"),
                                       ("visual_projection.", projections[0], "decoder_width"),
                                       ("text_projection.", projections[1], "decoder_width")):
            part = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            load_strictly(module, part, f"{clip} {prefix[:-1]}", fields)
        sources = {"clip_image.": clip, "clip_text.": clip}
        if self.config.sam:
            load_strictly(self.sam, read_huggingface(SamModel, sam, ("vision_encoder.position_ids",)), sam,
                          "image_size and the sam_ fields")
            sources["sam."] = sam
        return sources

    def param_groups(self, recipe):
        """CMP, the tiny decoder, in the joint phase the text prompts, and the towers that are not frozen.

        Vectors do not decay.
        """
        self.requires_grad_(False)
        learning = [self.cmp, self.decoder]
        if not self.coarse_only:
            learning += [self.text_prompts, self.sam] if self.config.text_prompt else [self.sam]
        learning += [self.clip_image, self.clip_text]
        for module in learning:
            module.requires_grad_(all(module is not tower for tower in self.frozen_towers()))
        if self.config.sam:
            for unread in (self.sam.shared_image_embedding, self.sam.mask_decoder.iou_prediction_head,
                           self.sam.mask_decoder.output_hypernetworks_mlps[1:],
                           self.sam.prompt_encoder.point_embed[:1], self.sam.prompt_encoder.point_embed[2:]):
                unread.requires_grad_(False)
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [{"params": [one for one in parameters if (one.ndim > 1) == decays], "lr": recipe["lr"],
                 "weight_decay": recipe["weight_decay"] * decays} for decays in (True, False)]

    def forward(self, images, tokens, text_mask, image_index=None):
        """images uint8 (N,3,H,W), tokens and text_mask (M,L), image_index (M,) -> dict.

        logits (M,1,H,W) final mask; coarse (M,1,H_C,W_C) in [0,1] and coarse_logits; point (M,1,4H_S,4W_S) one-hot;
        image_index (M,). In the first phase and without SAM, logits are coarse_logits and there is no point.
        """
        index = torch.arange(len(images), device=images.device) if image_index is None else image_index
        F_T, F_I = self.encode(images, tokens, text_mask, index)                            # (M,L,D_T) (M,N_C,D_I)
        S_coarse = self.decoder(F_I, F_T, text_mask)                                        # (M,1,H_C,W_C)
        outputs = {"logits": S_coarse, "coarse": S_coarse.sigmoid(), "coarse_logits": S_coarse, "image_index": index}
        if self.coarse_only:
            return outputs
        with torch.no_grad() if self.config.freeze else contextlib.nullcontext():
            pixels = normalised(images, self.config.image_size, SAM_MEAN, SAM_STD)          # (N,3,H,W)
            F_IS = self.sam.vision_encoder(pixels).last_hidden_state                        # (N,D_S,H_S,W_S)
        F_IS = F_IS[index]                                                                  # (M,D_S,H_S,W_S)
        S_C = resize(S_coarse, 4 * self.config.sam_grid)                                    # (M,1,4H_S,4W_S)
        positions = self.sam.get_image_wide_positional_embeddings().detach()                # (1,D_S,H_S,W_S)

        P_point, M = self.point_prompt(S_C)                                                 # (M,1,D_S)
        P_text = self.text_prompts(F_T, *(rearrange(one, "m c h w -> m (h w) c") for one in (F_IS, positions)),
                                   text_mask)                                               # (M,L,D_S)
        P_mask = self.sam.prompt_encoder.mask_embed(S_C)                                    # (M,D_S,H_S,W_S)
        P_mask, P_point, P_text = self.drop(P_mask, P_point, P_text, text_mask)
        S = self.decode(F_IS, positions, P_mask, P_point, P_text)                           # (M,1,H,W)
        return outputs | {"logits": S, "point": M.detach().view_as(S_C)}

    def encode(self, images, tokens, text_mask, index):
        """CLIP's towers in lock-step -> F_T (M,L,D_T), F_I (M,N_C,D_I) without [CLS], after CLIP's last norms."""
        pixels = normalised(images, self.config.clip_size, CLIP_MEAN, CLIP_STD)             # (N,3,480,480)
        F_I = self.clip_image.embeddings(pixels, interpolate_pos_encoding=True)             # (N,1+N_C,D_I)
        F_I = self.clip_image.pre_layrnorm(F_I)[index]                                      # (M,1+N_C,D_I)
        F_T = self.clip_text.embeddings(tokens)                                             # (M,L,D_T)
        for cmp, text_layer, image_layer in zip(self.cmp, self.clip_text.encoder.layers, self.clip_image.encoder.layers,
                                                strict=True):
            F_T, F_I = cmp(F_T, F_I, text_layer, image_layer, text_mask)
        return self.clip_text.final_layer_norm(F_T), self.clip_image.post_layernorm(F_I[:, 1:])

    @torch.no_grad()
    def positions(self):
        """E (4H_S*4W_S,D_S): SAM's encoding of the centres of a grid's cells, row by row."""
        side = 4 * self.config.sam_grid
        centres = (torch.arange(side, device=self.sam.shared_image_embedding.positional_embedding.device) + 0.5) / side
        points = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)           # (4H_S,4W_S,2), x first
        return self.sam.shared_image_embedding(points).flatten(0, 1)

    def point_prompt(self, S_C):
        """S_C (M,1,4H_S,4W_S) -> P_point (M,1,D_S), one-hot M (M,4H_S*4W_S)."""
        with torch.autocast(S_C.device.type, enabled=False):
            M, E = point_map(S_C.flatten(1), self.config.tau, self.training), self.positions()
            e_p = M @ E  # Eq. (3)
        foreground = self.sam.prompt_encoder.point_embed[1].weight
        return (e_p + foreground)[:, None], M

    def drop(self, P_mask, P_point, P_text, text_mask):
        """The prompts with SAM's "no mask" and "not a point" where one is dropped, and at padded words."""
        def kept(enabled):
            keep = torch.full((len(P_mask),), enabled, device=P_mask.device)
            if self.training:
                keep = keep & (torch.rand(len(P_mask), device=P_mask.device) >= self.config.prompt_dropout)
            return keep

        no_mask = self.sam.prompt_encoder.no_mask_embed.weight                              # (1,D_S)
        no_point = self.sam.prompt_encoder.not_a_point_embed.weight                         # (1,D_S)
        mask, point, text = (kept(kind) for kind in (
            self.config.mask_prompt, self.config.point_prompt, self.config.text_prompt))
        P_mask = torch.where(mask[:, None, None, None], P_mask, no_mask[:, :, None, None])
        P_point = torch.where(point[:, None, None], P_point, no_point)
        P_text = torch.where((text[:, None] & text_mask)[..., None], P_text, no_point)
        return P_mask, P_point, P_text

    def decode(self, F_IS, positions, P_mask, P_point, P_text):
        """SAM's mask decoder on all prompts -> S (M,1,H,W), float32 logits."""
        sparse = torch.cat((P_point, P_text), 1)[:, None]                                   # (M,1,1+L,D_S)
        S_low = self.sam.mask_decoder(image_embeddings=F_IS, image_positional_embeddings=positions.expand_as(F_IS),
                                      sparse_prompt_embeddings=sparse, dense_prompt_embeddings=P_mask,
                                      multimask_output=False)[0]  # Eq. (4)
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
        if "sam_seg" in maps and self.config.icl_size:
            maps["sam_seg"] = resize(maps["sam_seg"], self.config.icl_size)
            truths["sam_seg"] = nearest(batch["masks"], self.config.icl_size)
        icl = sum(instance_contrastive_loss(S, truths[name], batch["image_index"], batch["instance"],
                                            eps=self.config.icl_epsilon).mean() for name, S in maps.items())
        return seg | {"icl": icl}  # Eq. (9)

    def diagnose(self, outputs, masks):
        """Per expression: the coarse mask's IoU, whether the final mask meets another object of the image better than
        its own, and whether the point lies on the object."""
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
