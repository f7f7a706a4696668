"""Losses: pure functions of tensors, one per formula.

Every function takes logits (M,1,h,w) float and masks (M,1,h,w) bool, computes in float32 also under autocast, and
returns one value per expression, (M,). The mean over the expressions is the loss of a batch, so micro-batches and
processes of unequal size can weight what they hold by the expressions in it.
An equation ends on the line that carries its number, with the paper's name where a paper has one for it.
"""

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------- shared


def binary_cross_entropy(logits, masks, background=1.0, foreground=1.0):
    """Class-weighted cross-entropy: sum(w * bce) / sum(w) over the pixels of an expression -> (M,).

    w is `foreground` inside the mask and `background` outside; LAVT and its descendants take (0.9, 1.1). Two softmax
    classes with logits (l0, l1) are the one logit l1 - l0. They divide by the sum of w over the batch instead.
    """
    w = torch.where(masks, foreground, background)                                      # (M,1,h,w)
    bce = F.binary_cross_entropy_with_logits(logits.float(), masks.float(), reduction="none")
    return (w * bce).sum((1, 2, 3)) / w.sum((1, 2, 3))


def dice_loss(logits, masks, squared=False, eps=1.0):
    """1 - (2 sum(p y) + eps) / (sum(p) + sum(y) + eps) with p = sigmoid(logits) -> (M,).

    squared: sum(p^2) and sum(y^2) in the denominator (V-Net's form). eps keeps an empty mask finite.
    """
    p, y = logits.float().sigmoid(), masks.float()
    overlap = (p * y).sum((1, 2, 3))
    total = (p * p + y if squared else p + y).sum((1, 2, 3))
    return 1 - (2 * overlap + eps) / (total + eps)


# ----------------------------------------------------------------------------------------------------------- CroBIM-U


def uncertainty_loss(uncertainty, prediction, masks, *, sample_weight=1.0, threshold=0.5, eps=1.0, clamp=100.0,
                     blur=False, symmetric=False):
    """CroBIM-U's supervision of the uncertainty by the model's own errors, Eqs. (5)-(8) -> (M,), Eq. (6) is its mean.

    uncertainty (M,1,H,W) logits, already at the masks' size; prediction (M,1,H,W) bool, Eq. (4); the gradient goes to
    `uncertainty` only. sample_weight is lambda_s and threshold delta of Eq. (7); an empty union is not a hard sample.
    clamp bounds Eq. (8)'s weight, which reaches H*W/2 for a single wrong pixel (None: as printed).
    blur: z is the 3x3 mean of e; Eq. (8) is defined for a hard z only, so its cases and counts stay those of e.
    symmetric: the rarer side is weighted up, whichever it is. As printed, the loss fades when nearly all is wrong.
    """
    U = uncertainty.float()
    e = prediction ^ masks  # CroBIM-U Eq. (5)
    z = F.avg_pool2d(e.float(), 3, stride=1, padding=1, count_include_pad=False) if blur else e.float()

    intersection, union = (prediction & masks).sum((1, 2, 3)), (prediction | masks).sum((1, 2, 3))
    hard = intersection < threshold * union
    w_sample = 1 + sample_weight * hard.float()  # CroBIM-U Eq. (7)

    n1 = e.sum((1, 2, 3), keepdim=True).float()
    n0 = e[0].numel() - n1
    on_error, elsewhere = (n0 + eps) / (n1 + eps), torch.ones_like(n1)                  # (M,1,1,1)
    if symmetric:
        on_error, elsewhere = on_error.clamp(min=1), (1 / on_error).clamp(min=1)
    if clamp is not None:
        on_error, elsewhere = on_error.clamp(max=clamp), elsewhere.clamp(max=clamp)
    w_pixel = torch.where(e, on_error, elsewhere)  # CroBIM-U Eq. (8)

    bce = F.binary_cross_entropy_with_logits(U, z, reduction="none")
    return w_sample * (w_pixel * bce).mean((1, 2, 3))  # CroBIM-U Eq. (6)
