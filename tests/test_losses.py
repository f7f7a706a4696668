"""losses.py against plain loops, and CroBIM-U's Eqs. (5)-(8) where their values are known by hand."""

import math

import pytest
import torch

import losses
from losses import (
    absolute_differences,
    binary_cross_entropy,
    boundary_loss,
    contrast,
    contrastive_loss,
    dice_loss,
    instance_contrastive_loss,
    mask_pooled,
    multi_instance_loss,
    on_grid,
    orthogonal_loss,
    uncertainty_loss,
)


def example(M=3, H=5, W=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(M, 1, H, W, generator=generator)
    prediction, masks = (torch.rand(M, 1, H, W, generator=generator) < 0.4 for _ in range(2))
    return logits, prediction, masks


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def bce(logit, target):
    p = sigmoid(logit)
    return -(target * math.log(p) + (1 - target) * math.log(1 - p))


def pixels(tensor):
    """The (H, W) values of each expression as lists of lists."""
    return tensor[:, 0].tolist()


# ------------------------------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize(("background", "foreground"), [(1.0, 1.0), (0.9, 1.1), (0.2, 3.0)])
def test_binary_cross_entropy_is_the_weighted_mean_over_pixels(background, foreground):
    logits, _, masks = example()
    loss = binary_cross_entropy(logits, masks, background, foreground)
    assert loss.shape == (3,)
    for m, (values, truth) in enumerate(zip(pixels(logits), pixels(masks), strict=True)):
        total = weight = 0.0
        for row, row_truth in zip(values, truth, strict=True):
            for value, inside in zip(row, row_truth, strict=True):
                w = foreground if inside else background
                total, weight = total + w * bce(value, float(inside)), weight + w
        assert loss[m].item() == pytest.approx(total / weight, rel=1e-5)


def test_binary_cross_entropy_weighs_alike_unless_told():
    logits, _, masks = example()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none")
    torch.testing.assert_close(binary_cross_entropy(logits, masks), plain.mean((1, 2, 3)))


def test_binary_cross_entropy_equals_two_class_cross_entropy():
    logits, _, masks = example(M=1)
    two = torch.stack([torch.full_like(logits[:, 0], 0.3), logits[:, 0] + 0.3], dim=1)
    expected = torch.nn.functional.cross_entropy(two, masks[:, 0].long(), weight=torch.tensor([0.9, 1.1]))
    torch.testing.assert_close(binary_cross_entropy(logits, masks, 0.9, 1.1)[0], expected)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("eps", [1.0, 1e-3])
def test_dice_loss_by_loops(squared, eps):
    logits, _, masks = example()
    loss = dice_loss(logits, masks, squared=squared, eps=eps)
    assert loss.shape == (3,)
    for m, (values, truth) in enumerate(zip(pixels(logits), pixels(masks), strict=True)):
        overlap = total = 0.0
        for row, row_truth in zip(values, truth, strict=True):
            for value, inside in zip(row, row_truth, strict=True):
                p, y = sigmoid(value), float(inside)
                overlap += p * y
                total += p * p + y * y if squared else p + y
        assert loss[m].item() == pytest.approx(1 - (2 * overlap + eps) / (total + eps), rel=1e-5)


def test_dice_loss_at_its_ends():
    masks = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, :2, :2] = True
    logits = torch.where(masks, 50.0, -50.0)
    for squared in (False, True):
        torch.testing.assert_close(dice_loss(logits, masks, squared), torch.zeros(2))       # right, and rightly empty
        wrong = dice_loss(-logits, masks, squared)
        torch.testing.assert_close(wrong, torch.tensor([1 - 1 / 17, 1 - 1 / 17]))           # 12 + 4, and 16 + 0 pixels


def test_masks_that_are_no_masks_are_refused():
    """Numbers for truth values, a missing axis and another size would be read wrongly, or broadcast, in silence."""
    logits, prediction, masks = example()
    for wrong in (masks.byte() * 255, masks.float(), masks[:, 0], masks[..., 1:]):
        for call in (lambda m=wrong: binary_cross_entropy(logits, m), lambda m=wrong: dice_loss(logits, m),
                     lambda m=wrong: uncertainty_loss(logits, prediction, m),
                     lambda m=wrong: uncertainty_loss(logits, m, masks)):
            with pytest.raises(ValueError, match=r"masks: expected bool \(3, 1, 5, 4\), got torch"):
                call()


@pytest.mark.parametrize("loss", [binary_cross_entropy, dice_loss])
def test_losses_compute_in_float32_and_per_expression(loss):
    logits, _, masks = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(logits.bfloat16(), masks)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(logits.bfloat16().float(), masks))
    alone = torch.cat([loss(logits[m:m + 1], masks[m:m + 1]) for m in range(3)])
    torch.testing.assert_close(loss(logits, masks), alone)


# ----------------------------------------------------------------------------------------------------------- CroBIM-U


def loops(uncertainty, prediction, masks, lam=1.0, delta=0.5, eps=1.0, clamp=math.inf):
    """Eq. (6) of CroBIM-U, written out over expressions b and pixels x -> the scalar loss."""
    total, count = 0.0, 0
    for U, y_hat, y in zip(pixels(uncertainty), pixels(prediction), pixels(masks), strict=True):
        H, W = len(y), len(y[0])
        positions = [(i, j) for i in range(H) for j in range(W)]
        error = {(i, j): y_hat[i][j] != y[i][j] for i, j in positions}
        intersection = sum(y_hat[i][j] and y[i][j] for i, j in positions)
        union = sum(y_hat[i][j] or y[i][j] for i, j in positions)
        iou = intersection / union if union else 1.0
        w_sample = 1 + lam * (iou < delta)
        n1 = sum(error.values())
        n0 = H * W - n1
        for i, j in positions:
            w_pixel = min((n0 + eps) / (n1 + eps), clamp) if error[i, j] else 1.0
            total += w_sample * w_pixel * bce(U[i][j], float(error[i, j]))
            count += 1
    return total / count


@pytest.mark.parametrize("options", [{}, {"sample_weight": 0.7, "threshold": 0.2}, {"eps": 1e-6}, {"clamp": 1.5}])
def test_eq06_mean_over_expressions_and_pixels(options):
    uncertainty, prediction, masks = example(M=4)
    masks[3] = prediction[3]                                                    # one expression without an error
    loss = uncertainty_loss(uncertainty, prediction, masks, **options)
    expected = loops(uncertainty, prediction, masks, options.get("sample_weight", 1.0), options.get("threshold", 0.5),
                     options.get("eps", 1.0), options.get("clamp", math.inf))
    assert loss.shape == (4,)
    assert loss.mean().item() == pytest.approx(expected, rel=1e-5)


def test_eq05_target_is_where_prediction_and_truth_differ():
    _, prediction, masks = example(M=1)
    error = prediction != masks
    right = uncertainty_loss(torch.where(error, 30.0, -30.0), prediction, masks)
    assert right.item() < 1e-6
    assert uncertainty_loss(torch.where(error, -30.0, 30.0), prediction, masks).item() > 20


def test_eq07_hard_samples_weigh_more():
    """IoU 2/5 is hard, 2/4 is not (strictly below), an empty union is not, a prediction beside an empty mask is."""
    masks, prediction = torch.zeros(2, 4, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0, :4], prediction[0, 0, 0, :2], prediction[0, 0, 1, 0] = True, True, True
    masks[1, 0, 0, :4], prediction[1, 0, 0, :2] = True, True
    prediction[3, 0, 0, 0] = True
    U = torch.linspace(-1, 1, 16).view(1, 1, 4, 4).expand(4, 1, 4, 4)
    plain = uncertainty_loss(U, prediction, masks, sample_weight=0.0)
    torch.testing.assert_close(uncertainty_loss(U, prediction, masks, sample_weight=0.6) / plain,
                               torch.tensor([1.6, 1.0, 1.0, 1.6]))
    torch.testing.assert_close(uncertainty_loss(U, prediction, masks, sample_weight=0.6, threshold=0.3) / plain,
                               torch.tensor([1.0, 1.0, 1.0, 1.6]))


@pytest.mark.parametrize(("errors", "options", "loss", "gradient"), [
    (0, {}, 0.693, 0.5),
    (1, {}, 1.04, 57_600),
    (1, {"eps": 1e-6}, 1.39, 115_200),
    (1, {"clamp": 100.0}, 0.693, 50),
    (230, {}, 1.38, 498),
    (230, {"clamp": 100.0}, 0.761, 50),
    (4608, {}, 1.36, 24.5),
    (115_200, {}, 0.693, 0.5),
    (225_792, {}, 0.028, 0.5),
    (230_400, {}, 0.0, 0.0),
])
def test_eq08_rebalancing_at_480(errors, options, loss, gradient):
    """U = 0 at 480 x 480: the loss, and the largest pixel gradient times H * W, from no error at all to all wrong."""
    U = torch.zeros(1, 1, 480, 480, requires_grad=True)
    masks = torch.zeros(1, 1, 480, 480, dtype=torch.bool)
    prediction = (torch.arange(480 * 480) < errors).view(1, 1, 480, 480)
    value = uncertainty_loss(U, prediction, masks, sample_weight=0.0, **options)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=6e-3, abs=5e-4)
    assert U.grad.abs().max().item() * 480 * 480 == pytest.approx(gradient, rel=6e-3, abs=5e-3)


@pytest.mark.parametrize(("wrong", "clamp", "U_p", "M"), [
    (400, None, 0.5, 0.5), (200, None, 0.5, 0.5), (80, None, 0.5, 0.5), (40, None, 0.5, 0.5),
    (400, 100.0, 0.50, 0.50), (200, 100.0, 0.33, 0.16), (80, 100.0, 0.17, 0.03), (40, 100.0, 0.09, 0.02)])
def test_eq08_what_the_uncertainty_of_an_average_place_comes_to(wrong, clamp, U_p, M):
    """Eq. (8) as printed weighs errors and the rest equally: U_p = 0.5 at any rate of errors; the clamp lowers it."""
    side = 200
    prediction = (torch.arange(side * side) < wrong).view(1, 1, side, side)
    rate = wrong / side ** 2
    weight = min((1 - rate) / rate, clamp or math.inf)
    best = rate * weight / (rate * weight + 1 - rate)       # where the weighted cross-entropy of one U for all is least
    assert best == pytest.approx(U_p, abs=0.005)
    assert sigmoid((best - 0.5) / 0.1) == pytest.approx(M, abs=0.005)                       # Eq. (13), tau 0.5, t 0.1
    slopes = []
    for place in (best - 0.02, best + 0.02):
        U = torch.tensor(math.log(place / (1 - place)), requires_grad=True)
        everywhere = U.expand(1, 1, side, side)
        uncertainty_loss(everywhere, prediction, torch.zeros_like(prediction), clamp=clamp).sum().backward()
        slopes.append(U.grad.item())
    assert slopes[0] < 0 < slopes[1]


def test_eq06_gradient_is_finite_and_reaches_the_uncertainty_alone():
    logits, _, masks = example(M=4)
    masks[0], masks[1] = True, False
    logits = logits.requires_grad_()
    uncertainty = (torch.randn(4, 1, 5, 4, generator=torch.Generator().manual_seed(1)) * 40).requires_grad_()
    uncertainty_loss(uncertainty, logits > 0, masks).mean().backward()
    assert logits.grad is None
    assert torch.isfinite(uncertainty.grad).all()
    error = (logits > 0) != masks
    assert (uncertainty.grad[error] <= 0).all() and (uncertainty.grad[~error] >= 0).all()
    assert (uncertainty.grad[error] < 0).any() and (uncertainty.grad[~error] > 0).any()


def test_eq06_blur_softens_the_target_and_leaves_the_weights():
    """One error in the middle of 5 x 5 and one in the corner of 4 x 4: 1/9 in 3 x 3, 1/4 and 1/6 at the border."""
    for size, at, z in ((5, (2, 2), {(i, j): 1 / 9 for i in (1, 2, 3) for j in (1, 2, 3)}),
                        (4, (0, 0), {(0, 0): 1 / 4, (0, 1): 1 / 6, (1, 0): 1 / 6, (1, 1): 1 / 9})):
        prediction = torch.zeros(1, 1, size, size, dtype=torch.bool)
        prediction[0, 0, at[0], at[1]] = True
        U = torch.linspace(-2, 2, size * size).view(1, 1, size, size)
        loss = uncertainty_loss(U, prediction, torch.zeros_like(prediction), sample_weight=0.0, blur=True)
        expected = 0.0
        for i in range(size):
            for j in range(size):
                weight = size * size / 2 if (i, j) == at else 1.0               # (n0 + 1) / (n1 + 1), n1 = 1
                expected += weight * bce(U[0, 0, i, j].item(), z.get((i, j), 0.0)) / size ** 2
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_eq06_computes_in_float32_under_autocast():
    uncertainty, prediction, masks = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = uncertainty_loss(uncertainty.bfloat16(), prediction, masks, blur=True)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, uncertainty_loss(uncertainty.bfloat16().float(), prediction, masks, blur=True))


# --------------------------------------------------------------------------------------------------------- Prompt-RIS


def instance_pairs(logits, masks, image_index, instance, eps):
    """Prompt-RIS Eqs. (7) and (8) with loops: per expression its share of the sum over pairs."""
    values = []
    p = [[sigmoid(x) for row in rows for x in row] for rows in pixels(logits)]
    y = [[x for row in rows for x in row] for rows in pixels(masks)]
    for i in range(len(p)):
        meets = sum(a > 0.5 and b for a, b in zip(p[i], y[i], strict=True))
        joins = sum(a > 0.5 or b for a, b in zip(p[i], y[i], strict=True))
        w = meets / joins if joins else 0.0
        group = [j for j in range(len(p)) if image_index[j] == image_index[i]]
        total = 0.0
        for j in group:
            overlap = 2 * sum(a * b for a, b in zip(p[i], p[j], strict=True))
            overlap /= sum(a * a for a in p[i]) + sum(b * b for b in p[j])
            chosen = overlap if instance[i] == instance[j] else 1 - overlap
            total += -w * math.log(eps + (1 - eps) * chosen)
        values.append(total / len(group))
    return values


def test_prompt_ris_instance_contrast_by_loops():
    """Prompt-RIS Eqs. (7)-(8): two images of four expressions and one of two, some of the same object."""
    logits, _, masks = example(M=10, seed=3)
    image_index, instance = [0, 0, 1, 0, 1, 1, 2, 2, 1, 0], [5, 6, 7, 5, 8, 7, 9, 9, 3, 5]
    for eps in (1e-4, 1e-2):
        loss = instance_contrastive_loss(2 * logits, masks, torch.tensor(image_index), torch.tensor(instance), eps=eps)
        expected = instance_pairs(2 * logits, masks, image_index, instance, eps)
        assert loss.tolist() == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0.01


def test_prompt_ris_instance_contrast_is_the_papers_sum_over_b_squared():
    """Prompt-RIS Eq. (8): with equal b the mean over expressions is that over images; any cut at images gives it."""
    logits, _, masks = example(M=8, seed=4)
    image_index, instance = torch.arange(8) // 4, torch.tensor([1, 1, 2, 3, 4, 5, 5, 5])
    whole = instance_contrastive_loss(logits, masks, image_index, instance)
    halves = [instance_contrastive_loss(logits[k:k + 4], masks[k:k + 4], image_index[k:k + 4], instance[k:k + 4])
              for k in (0, 4)]
    torch.testing.assert_close(whole, torch.cat(halves))
    torch.testing.assert_close(whole.mean(), (halves[0].sum() / 4 + halves[1].sum() / 4) / 2)


def test_prompt_ris_overlap_is_one_minus_the_ratio_of_differences():
    """Prompt-RIS Eq. (7): 1 - O = sum (S_i - S_j)^2 / (sum S_i^2 + sum S_j^2); two objects, weight 1 by the truth."""
    logits, _, _ = example(M=2, H=6, W=6, seed=5)
    masks, p = logits > 0, logits.sigmoid().double()
    ratio = (p[0] - p[1]).square().sum() / (p.square().sum())
    loss = instance_contrastive_loss(logits, masks, torch.zeros(2), torch.tensor([1, 2]), eps=1e-9)
    assert loss.tolist() == pytest.approx([-math.log(ratio) / 2] * 2, rel=1e-4)


def test_prompt_ris_instance_contrast_repels_masks_that_coincide():
    """Prompt-RIS Eq. (8) keeps its gradient in the very case it is for, and stays finite at exact equality."""
    logits, _, _ = example(M=1, H=30, W=30, seed=6)
    two = logits.repeat(2, 1, 1, 1)
    same = two.clone().requires_grad_()
    loss = instance_contrastive_loss(same, two > 0, torch.zeros(2), torch.tensor([1, 2]))
    assert loss.isfinite().all() and loss.min() > 3
    near = (two + 1e-3 * torch.randn(two.shape, generator=torch.Generator().manual_seed(7))).requires_grad_()
    loss = instance_contrastive_loss(near, two > 0, torch.zeros(2), torch.tensor([1, 2])).mean()
    gradient, = torch.autograd.grad(loss, near)
    assert gradient.norm() > 1e-4
    apart = instance_contrastive_loss((near - 10 * gradient / gradient.norm()).detach(), two > 0, torch.zeros(2),
                                      torch.tensor([1, 2])).mean()
    assert apart < loss


def test_prompt_ris_instance_contrast_of_masks_without_any_mass_is_finite():
    """Prompt-RIS Eq. (7) is 0 / 0 there; w is 0."""
    logits = torch.full((2, 1, 4, 4), -90.0, requires_grad=True)
    for instance in (torch.tensor([1, 1]), torch.tensor([1, 2])):
        loss = instance_contrastive_loss(logits, torch.ones(2, 1, 4, 4) > 0, torch.zeros(2), instance)
        gradient, = torch.autograd.grad(loss.sum(), logits)
        assert loss.tolist() == [0, 0] and gradient.abs().max() == 0


def test_prompt_ris_instance_contrast_weighs_by_a_detached_iou():
    """Prompt-RIS Eq. (8): a mask that misses its truth is silent, one alone costs nothing, w has no gradient."""
    logits = torch.full((2, 1, 4, 4), -2.0)
    logits[:, :, :2] = 2.0
    truth = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    truth[0, :, :2], truth[1, :, 2:] = True, True                               # IoU 1 and 0
    loss = instance_contrastive_loss(logits, truth, torch.zeros(2), torch.tensor([1, 2]))
    assert loss[0] > 3 and loss[1] == 0
    alone = instance_contrastive_loss(logits, truth, torch.arange(2), torch.tensor([1, 1]))
    assert alone.tolist() == [0, 0]
    learning = logits.clone().requires_grad_()
    instance_contrastive_loss(learning, truth & False, torch.zeros(2), torch.tensor([1, 2])).sum().backward()
    assert learning.grad.abs().max() == 0


@pytest.mark.parametrize("wrong", [
    {"masks": torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)}, {"masks": torch.ones(2, 4, 4, dtype=torch.bool)},
    {"masks": torch.ones(2, 1, 8, 8, dtype=torch.bool)}, {"masks": torch.ones(2, 1, 4, 4)},
    {"logits": torch.ones(2, 4, 4), "masks": torch.ones(2, 4, 4, dtype=torch.bool)},
    {"logits": torch.ones(2, 3, 4, 4), "masks": torch.ones(2, 3, 4, 4, dtype=torch.bool)},
    {"logits": torch.ones(2, 1, 4, 4, dtype=torch.long)}, {"image_index": torch.zeros(3)},
    {"instance": torch.zeros(2, 1)}])
def test_prompt_ris_instance_contrast_refuses_what_it_would_misread(wrong):
    given = {"logits": torch.ones(2, 1, 4, 4), "masks": torch.ones(2, 1, 4, 4, dtype=torch.bool),
             "image_index": torch.zeros(2), "instance": torch.arange(2)}
    instance_contrastive_loss(**given)
    with pytest.raises(ValueError, match=r"^[^\n]*expected[^\n]*$"):
        instance_contrastive_loss(**given | wrong)


def test_prompt_ris_instance_contrast_computes_in_float32_under_autocast():
    logits, _, masks = example(M=4, seed=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = instance_contrastive_loss(logits.bfloat16(), masks, torch.zeros(4), torch.arange(4))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, instance_contrastive_loss(logits.bfloat16().float(), masks, torch.zeros(4),
                                                              torch.arange(4)))


# --------------------------------------------------------------------------------------------------------- RSRefSeg 2


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


def test_rsrefseg2_orthogonal_loss_by_loops():
    """RSRefSeg 2 Eq. (11): the square of the cosine of the means, 0 for orthogonal and 1 for opposite subspaces."""
    t1, t2 = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for got, a, b in zip(orthogonal_loss(t1, t2).tolist(), t1.tolist(), t2.tolist(), strict=True):
        mean_a, mean_b = ([sum(column) / 4 for column in zip(*rows, strict=True)] for rows in (a, b))
        assert got == pytest.approx(cosine(mean_a, mean_b) ** 2, rel=1e-4)
    across = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert orthogonal_loss(*across).item() == 0
    assert orthogonal_loss(t1, -3 * t1).tolist() == pytest.approx([1] * 3)


def test_rsrefseg2_mask_pooling_counts_a_cell_by_its_share():
    """RSRefSeg 2 Eq. (12): an object smaller than a cell is not lost, an empty mask is zero and not NaN."""
    features = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    masks[0, 0, 2, 5], masks[1, 0, 2:6, 0:3] = True, True
    pooled = mask_pooled(features, masks)
    assert pooled[0].tolist() == pytest.approx(features[0, :, 0, 1].tolist(), rel=1e-4)
    assert pooled[1].tolist() == pytest.approx(features[1, :, :, 0].mean(1).tolist(), rel=1e-4)
    assert pooled[2].tolist() == [0, 0]


def test_rsrefseg2_official_masks_are_cut_on_the_grid():
    """The corners of mask and grid coincide; a cell counts above one half, what lies between the points is lost."""
    masks = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    masks[0, :, :3, 4:], masks[1, :, 1:3, 1:3] = True, True
    assert on_grid(masks, (3, 3))[:, 0].long().tolist() == [[[0, 0, 1], [0, 0, 0], [0, 0, 0]], [[0] * 3] * 3]
    half = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    half[:, :, :2] = True                                       # the middle point lies half way: not above one half
    assert on_grid(half, (3, 3))[0, 0].long().tolist() == [[1] * 3, [0] * 3, [0] * 3]
    features = torch.randn(2, 4, 3, 3)
    pooled = mask_pooled(features, masks, cut=True)
    torch.testing.assert_close(pooled[0], features[0, :, 0, 2])
    assert not pooled[1].any()


def test_rsrefseg2_official_gather_has_no_gradient_from_elsewhere(monkeypatch):
    """Each of two processes takes the loss of all rows and differentiates it by its own: half of the gradient."""
    images, texts = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    whole = contrast(images, texts, 7.0).mean()
    expected = torch.autograd.grad(whole, (images, texts))
    monkeypatch.setattr(losses, "processes", lambda: 2)
    for rows in (slice(0, 3), slice(3, 5)):
        def gather(own, first=rows.start):
            assert not own.requires_grad
            return torch.cat((images, texts), -1).detach(), first

        monkeypatch.setattr(losses.GatherRows, "apply", gather)
        values = contrast(images[rows], texts[rows], 7.0, remote_gradient=False)
        assert values.tolist() == pytest.approx([whole.item()] * (rows.stop - rows.start), rel=1e-5)
        for got, full in zip(torch.autograd.grad(values.mean(), (images, texts)), expected, strict=True):
            torch.testing.assert_close(got[rows], full[rows])
            assert not got[[row for row in range(5) if row not in range(rows.start, rows.stop)]].any()


def test_rsrefseg2_contrast_by_loops():
    """RSRefSeg 2 Eq. (12), L_samp: rows 1 and 2 of five, each way round."""
    every_image, every_text = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    got = contrastive_loss(every_image[1:3], every_text[1:3], every_image, every_text, 1, torch.tensor(7.0))
    images, texts = every_image.tolist(), every_text.tolist()
    for k, loss in zip((1, 2), got.tolist(), strict=True):
        to_text = [math.exp(7 * cosine(images[k], text)) for text in texts]
        to_image = [math.exp(7 * cosine(image, texts[k])) for image in images]
        expected = -(math.log(to_text[k] / sum(to_text)) + math.log(to_image[k] / sum(to_image))) / 2
        assert loss == pytest.approx(expected, rel=1e-4)


def test_rsrefseg2_multi_instance_loss_by_loops():
    """RSRefSeg 2 Eq. (12), L_spat: the mass of the touched cells; an empty mask costs nothing and has no gradient."""
    logits = torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(3), requires_grad=True)
    masks = torch.zeros(3, 1, 6, 6, dtype=torch.bool)
    masks[0, 0, 1, 1], masks[1, 0, 1:3, 4] = True, True
    loss = multi_instance_loss(logits, masks)
    for m, cells in ((0, [(0, 0)]), (1, [(0, 2), (1, 2)])):
        mass = {(y, x): math.exp(logits[m, 0, y, x].item()) for y in range(3) for x in range(3)}
        share = sum(mass[cell] for cell in cells) / sum(mass.values())
        assert loss[m].item() == pytest.approx(-math.log(share), rel=1e-4)
    loss.sum().backward()
    assert loss[2].item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.isfinite().all() and logits.grad[2].abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------------- RS2-SAM 2


def gradient_map(values):
    """Vertical plus horizontal absolute difference of a list of lists, 0 where there is no neighbour."""
    return [[(abs(values[y][x] - values[y - 1][x]) if y else 0.0) + (abs(values[y][x] - values[y][x - 1]) if x else 0.0)
             for x in range(len(values[0]))] for y in range(len(values))]


@pytest.mark.parametrize(("hard", "cut"), [(False, 0.0), (True, 0.0), (True, -1.0)])
def test_rs2sam2_boundary_loss_by_loops(hard, cut):
    """RS2-SAM 2 Eq. (7)."""
    logits, _, masks = example()
    weight = torch.tensor([0.5, -2.0, 1.5])
    loss = boundary_loss(logits, masks, weight, hard=hard, cut=cut)
    assert loss.shape == (3,)
    for m, (values, truth) in enumerate(zip(pixels(logits), pixels(masks), strict=True)):
        p = [[float(value > cut) if hard else sigmoid(value) for value in row] for row in values]
        y = [[float(inside) for inside in row] for row in truth]
        terms = [(weight[m].item() * (a - b)) ** 2
                 for row_p, row_y in zip(gradient_map(p), gradient_map(y), strict=True)
                 for a, b in zip(row_p, row_y, strict=True)]
        assert loss[m].item() == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_rs2sam2_boundary_loss_has_the_gradient_of_its_formula():
    """RS2-SAM 2 Eq. (7): towards the logits and the weight, here written out in float64."""
    logits, _, masks = example()
    logits, weight = logits.double().requires_grad_(), torch.tensor([0.5, -2.0, 1.5]).double().requires_grad_()
    difference = 0.0
    for values, sign in ((logits.sigmoid(), 1), (masks.double(), -1)):
        for axis in (2, 3):
            first = torch.zeros_like(values.narrow(axis, 0, 1))
            difference = difference + sign * torch.cat((first, values.diff(dim=axis).abs()), axis)
    expected = (weight[:, None, None, None] * difference).square().mean((1, 2, 3))
    ours = boundary_loss(logits.float(), masks, weight.float())
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad(ours.sum(), (logits, weight)),
                          torch.autograd.grad(expected.sum(), (logits, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rs2sam2_gradients_of_an_edge():
    """RS2-SAM 2 Eq. (7): the mask's own gradient is 1 along an edge, 2 at a corner and 0 elsewhere."""
    square = torch.zeros(1, 1, 4, 4)
    square[..., 1:3, 1:3] = 1
    assert absolute_differences(square)[0, 0].tolist() == [[0, 0, 0, 0], [0, 2, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert boundary_loss(square * 100 - 50, square > 0, torch.ones(1)).item() < 1e-9
    assert boundary_loss(square / 4, square > 0, torch.ones(1), hard=True).item() == 0         # p = 1 above 0, not at 0


def test_rs2sam2_boundary_gradient_of_two_is_the_mean_of_two_single_runs():
    """RS2-SAM 2 Eq. (7): the gradient reaches the logits, no expression sees another, and weight 0 is an optimum."""
    logits, _, masks = example(M=2, H=6, W=7)
    weight = torch.tensor([0.7, -1.3])

    def gradient(these):
        inputs = logits[these].clone().requires_grad_(), weight[these].clone().requires_grad_()
        return torch.autograd.grad(boundary_loss(inputs[0], masks[these], inputs[1]).mean(), inputs)

    both = gradient(slice(0, 2))
    single = [gradient(slice(m, m + 1)) for m in range(2)]
    assert both[0].abs().max() > 1e-3
    for k in range(2):
        torch.testing.assert_close(both[k], torch.cat([gradients[k] for gradients in single]) / 2)
    assert boundary_loss(logits, masks, torch.zeros(2)).abs().max() == 0
    hard = boundary_loss(logits.requires_grad_(), masks, weight.requires_grad_(), hard=True).mean()
    to_logits, to_weight = torch.autograd.grad(hard, (logits, weight), allow_unused=True)
    assert to_logits is None and to_weight.abs().min() > 1e-3


def test_rs2sam2_boundary_loss_refuses_what_it_would_read_wrongly():
    logits, _, masks = example()
    for weight in (torch.ones(3, 1), torch.ones(())):
        with pytest.raises(ValueError, match=r"weight: expected \(3,\)"):
            boundary_loss(logits, masks, weight)
    with pytest.raises(ValueError, match="masks: expected bool"):
        boundary_loss(logits, masks.byte() * 255, torch.ones(3))


def test_rs2sam2_boundary_loss_computes_in_float32_under_autocast():
    """RS2-SAM 2 Eq. (7)."""
    logits, _, masks = example()
    expected = boundary_loss(logits.bfloat16().float(), masks, torch.ones(3))
    with torch.autocast("cpu", torch.bfloat16):
        loss = boundary_loss(logits.bfloat16(), masks, torch.ones(3, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
