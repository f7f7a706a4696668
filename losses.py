"""Losses: pure functions of tensors, one per formula.

A loss takes logits (M,1,h,w) float and masks (M,1,h,w) bool, computes in float32 also under autocast, and returns one
value per expression, (M,). The mean over the expressions is the loss of a batch, so micro-batches and
processes of unequal size can weight what they hold by the expressions in it.
An equation ends on the line that carries its number, with the paper's name where a paper has one for it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------- shared


def check_masks(logits, *masks):
    """ValueError unless masks are bool and as large as the logits: 0/255 or (M,h,w) would count wrongly in silence."""
    for one in masks:
        if one.dtype != torch.bool or one.shape != logits.shape:
            raise ValueError(f"masks: expected bool {tuple(logits.shape)}, got {one.dtype} {tuple(one.shape)}")


def binary_cross_entropy(logits, masks, background=1.0, foreground=1.0):
    """Class-weighted cross-entropy: sum(w * bce) / sum(w) over the pixels of an expression -> (M,).

    w is `foreground` inside the mask and `background` outside; LAVT and its descendants take (0.9, 1.1). Two softmax
    classes with logits (l0, l1) are the one logit l1 - l0. They divide by the sum of w over the batch instead.
    """
    check_masks(logits, masks)
    w = torch.where(masks, foreground, background)                                      # (M,1,h,w)
    bce = F.binary_cross_entropy_with_logits(logits.float(), masks.float(), reduction="none")
    return (w * bce).sum((1, 2, 3)) / w.sum((1, 2, 3))


def dice_loss(logits, masks, squared=False, eps=1.0):
    """1 - (2 sum(p y) + eps) / (sum(p) + sum(y) + eps) with p = sigmoid(logits) -> (M,).

    squared: sum(p^2) and sum(y^2) in the denominator (V-Net's form). eps keeps an empty mask finite.
    """
    check_masks(logits, masks)
    p, y = logits.float().sigmoid(), masks
    overlap = (p * y).sum((1, 2, 3))
    total = (p * p + y if squared else p + y).sum((1, 2, 3))
    return 1 - (2 * overlap + eps) / (total + eps)


# ----------------------------------------------------------------------------------------------------------- CroBIM-U


def uncertainty_loss(uncertainty, prediction, masks, *, sample_weight=1.0, threshold=0.5, eps=1.0, clamp=None,
                     blur=False):
    """CroBIM-U's supervision of the uncertainty by the model's own errors, Eqs. (5)-(8) -> (M,), Eq. (6) is its mean.

    uncertainty (M,1,H,W) logits, already at the masks' size; prediction (M,1,H,W) bool, Eq. (4); the gradient goes to
    `uncertainty` only. sample_weight is lambda_s and threshold delta of Eq. (7); an empty union is not a hard sample.
    clamp bounds Eq. (8)'s weight, which reaches H*W/2 for a single wrong pixel; None: as printed.
    blur: z is the 3x3 mean of e; Eq. (8) is defined for a hard z only, so its cases and counts stay those of e.
    """
    check_masks(uncertainty, prediction, masks)
    U = uncertainty.float()
    e = prediction ^ masks  # CroBIM-U Eq. (5)
    z = F.avg_pool2d(e.float(), 3, stride=1, padding=1, count_include_pad=False) if blur else e.float()

    intersection, union = (prediction & masks).sum((1, 2, 3)), (prediction | masks).sum((1, 2, 3))
    hard = intersection < threshold * union
    w_sample = 1 + sample_weight * hard.float()  # CroBIM-U Eq. (7)

    n1 = e.sum((1, 2, 3), keepdim=True).float()
    n0 = e[0].numel() - n1
    on_error = (n0 + eps) / (n1 + eps)                                                  # (M,1,1,1)
    if clamp is not None:
        on_error = on_error.clamp(max=clamp)                                            # Silent: clamp
    w_pixel = torch.where(e, on_error, 1.0)  # CroBIM-U Eq. (8)

    bce = F.binary_cross_entropy_with_logits(U, z, reduction="none")
    return w_sample * (w_pixel * bce).mean((1, 2, 3))  # CroBIM-U Eq. (6)


# --------------------------------------------------------------------------------------------------------- RSRefSeg 2


def orthogonal_loss(t1, t2):
    """Squared cosine between the mean-pooled, normalised embeddings of two subspaces, t1 and t2 (M,n,C) -> (M,)."""
    pooled1, pooled2 = (F.normalize(t.float().mean(1)) for t in (t1, t2))                 # (M,C)
    return (pooled1 * pooled2).sum(-1) ** 2  # RSRefSeg 2 Eq. (11)


def on_grid(masks, size):
    """Masks (M,1,H,W) on a coarse grid as the official code cuts them, small objects may be lost -> (M,1,h,w) bool."""
    return F.interpolate(masks.float(), size, mode="bilinear", align_corners=True) > 0.5


def mask_pooled(features, masks, cut=False):
    """Mean of the features (M,C,h,w) over each mask (M,1,H,W), a cell counting by the share that it covers -> (M,C).

    cut: wholly or not at all, by on_grid; zero where nothing is left.
    """
    size = features.shape[-2:]
    share = on_grid(masks, size).float() if cut else F.interpolate(masks.float(), size, mode="area")    # (M,1,h,w)
    cells = share.sum((2, 3))                                                                           # (M,1)
    return (features.float() * share).sum((2, 3)) / (cells + (cells == 0))


def contrastive_loss(images, texts, every_image, every_text, first, scale):
    """Symmetric InfoNCE: each vector must find its partner among all K of the other kind -> (M,).

    images, texts (M,C) are rows first .. first + M of every_image, every_text (K,C); scale multiplies the cosines.
    """
    images, texts, every_image, every_text = (F.normalize(x.float()) for x in (images, texts, every_image, every_text))
    partner = torch.arange(first, first + len(images), device=images.device)
    to_text = F.cross_entropy(scale * images @ every_text.T, partner, reduction="none")
    to_image = F.cross_entropy(scale * texts @ every_image.T, partner, reduction="none")
    return (to_text + to_image) / 2


class GatherRows(torch.autograd.Function):
    """The rows of all processes (M,C) -> (K,C) in order of rank, and where one's own begin.

    The gradient of a row is summed over the processes, so that the sum of their losses is differentiated.
    """

    @staticmethod
    def forward(ctx, rows):
        counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(processes())]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        counts = torch.cat(counts).tolist()
        padded = F.pad(rows, (0, 0, 0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.first, ctx.count = sum(counts[:dist.get_rank()]), len(rows)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), ctx.first

    @staticmethod
    def backward(ctx, gradient, _):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient[ctx.first:ctx.first + ctx.count]


def processes():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def contrast(images, texts, scale, remote_gradient=True):
    """contrastive_loss of (M,C) and (M,C) within the vectors of all processes -> (M,).

    remote_gradient=False: the official code; each process takes the loss of all K rows, and its gradient to its own.
    Averaged over W processes that is 1/W of the gradient.
    """
    own, first = torch.cat((images, texts), -1), 0                            # (M,2C)
    every = own
    if processes() > 1:
        every, first = GatherRows.apply(own if remote_gradient else own.detach())       # (K,2C)
    if not remote_gradient:
        every = torch.cat((every[:first], own, every[first + len(own):]))
        images, texts = every.chunk(2, -1)
        return contrastive_loss(images, texts, images, texts, 0, scale).mean().expand(len(own))
    return contrastive_loss(images, texts, *every.chunk(2, -1), first, scale)


def multi_instance_loss(logits, masks):
    """-log of the softmax mass, over all cells, of the cells that the mask touches; 0 where it is empty -> (M,)."""
    touched = F.adaptive_max_pool2d(masks.float(), logits.shape[-2:]).flatten(1) > 0      # (M,h*w)
    touched = touched | ~touched.any(-1, keepdim=True)
    log_share = logits.float().flatten(1).log_softmax(-1)
    return -log_share.masked_fill(~touched, -torch.inf).logsumexp(-1)


# --------------------------------------------------------------------------------------------------------- RS2-SAM 2


def absolute_differences(maps):
    """|difference to the pixel above| + |to the one on the left|, 0 where there is none: (M,1,h,w) -> (M,1,h,w)."""
    return F.pad(maps.diff(dim=2).abs(), (0, 0, 1, 0)) + F.pad(maps.diff(dim=3).abs(), (1, 0, 0, 0))


def boundary_loss(logits, masks, weight, hard=False, cut=0.0):
    """Text-guided boundary loss: mean over the pixels of (weight * (gradient of p - gradient of the mask))^2 -> (M,).

    p = sigmoid(logits); weight (M,), a scalar per expression. hard: p is 1 where logits > cut and 0 elsewhere, as in
    the official code, and then no gradient reaches the logits.
    """
    check_masks(logits, masks)
    if weight.shape != logits.shape[:1]:
        raise ValueError(f"weight: expected ({len(logits)},), one number per expression, got {tuple(weight.shape)}")
    p = (logits > cut).float() if hard else logits.float().sigmoid()
    difference = absolute_differences(p) - absolute_differences(masks.float())
    return (weight.float()[:, None, None, None] * difference).square().mean((1, 2, 3))  # RS2-SAM 2 Eq. (7)


# --------------------------------------------------------------------------------------------------------- Prompt-RIS


def instance_contrastive_loss(logits, masks, image_index, instance, eps=1e-4):
    """Masks of one object should be alike, those of two objects of an image apart -> (M,).

    logits (M,1,h,w) float, before the sigmoid; masks (M,1,h,w) bool, the truth; image_index, instance (M,) int: equal
    numbers = same image, same object. An expression's value is the mean over the b expressions of its image, itself
    among them, so the mean over expressions is Prompt-RIS's 1/b^2 sum, averaged over images of equal b. eps keeps the
    logarithms finite. A clamp would, too, but is flat all around the point where two objects got one mask, the very
    case to repel. The weight is the hard IoU with the truth and carries no gradient.
    """
    fits = logits.ndim == 4 and logits.shape[1] == 1 and masks.shape == logits.shape
    if not fits or not logits.is_floating_point() or masks.dtype != torch.bool:
        raise ValueError(f"logits {logits.dtype} {tuple(logits.shape)}, masks {masks.dtype} {tuple(masks.shape)}: "
                         "expected float logits and bool masks, both (M,1,h,w)")
    if not image_index.shape == instance.shape == logits.shape[:1]:
        raise ValueError(f"image_index {tuple(image_index.shape)}, instance {tuple(instance.shape)}: expected "
                         f"({len(logits)},), one number per expression")
    with torch.autocast(logits.device.type, enabled=False):
        S = logits.float().sigmoid().flatten(1)                                             # (M,h*w)
        products = S @ S.T                                                                  # (M,M)
        squares = products.diagonal()
        floor = torch.finfo(S.dtype).tiny                                                   # two masks without mass
        O = 2 * products / (squares[:, None] + squares).clamp(min=floor)  # noqa: E741  # Prompt-RIS Eq. (7)
        d = 1 - O
        Y = instance[:, None] == instance
        prediction = logits > 0
        w = (prediction & masks).sum((1, 2, 3)) / (prediction | masks).sum((1, 2, 3)).clamp(min=1)
        like, unlike = torch.log(eps + (1 - eps) * O), torch.log(eps + (1 - eps) * d)       # Departs: (8)
        same_image = image_index[:, None] == image_index
        pairs = same_image * -w[:, None] * torch.where(Y, like, unlike)
        return pairs.sum(1) / same_image.sum(1)  # Prompt-RIS Eq. (8)
