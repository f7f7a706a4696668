"""losses.py: values and gradients against plain formulas, edges by hand, and what is gathered over processes."""

import math
import threading

import numpy as np
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


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def double(monkeypatch):
    """What asks for float32 gets float64, in which a difference quotient is exact to eight digits."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(loss, formula, *inputs):
    """The loss of float64 arrays is that of the plain formula; its gradient by each of them is the difference quotient.

    Each expression's value counts by another factor, so that no gradient can stand for another's.
    """
    leaves = [torch.from_numpy(array).requires_grad_() for array in inputs]
    values, expected = loss(*leaves), formula(*inputs)
    assert values.shape == expected.shape
    np.testing.assert_allclose(values.detach().numpy(), expected, rtol=1e-8, atol=1e-12)
    factors = 1 + np.arange(expected.size).reshape(expected.shape) / 3
    gradients = torch.autograd.grad((values * torch.from_numpy(factors)).sum(), leaves)
    for array, gradient in zip(inputs, gradients, strict=True):
        slopes = np.empty_like(array)
        for place in np.ndindex(array.shape):
            there, ends = array[place], []
            for step in (1e-5, -1e-5):
                array[place] = there + step
                ends.append((factors * formula(*inputs)).sum())
            array[place] = there
            slopes[place] = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-5, atol=1e-7)
        assert np.abs(slopes).max() > 1e-4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bce(logits, targets):
    p = sigmoid(logits)
    return -(targets * np.log(p) + (1 - targets) * np.log(1 - p))


def over_pixels(maps):
    return maps.sum((1, 2, 3))


# ------------------------------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize("weights", [(), (0.9, 1.1), (0.2, 3.0)])
def test_binary_cross_entropy_is_the_weighted_mean_over_pixels(weights, double):
    _, _, masks = example()
    background, foreground = weights or (1, 1)
    w = np.where(masks.numpy(), foreground, background)
    check(lambda x: binary_cross_entropy(x, masks, *weights),
          lambda x: over_pixels(w * bce(x, masks.numpy())) / over_pixels(w), normal(3, 1, 5, 4))


def test_binary_cross_entropy_equals_two_class_cross_entropy():
    logits, _, masks = example(M=1)
    two = torch.stack([torch.full_like(logits[:, 0], 0.3), logits[:, 0] + 0.3], dim=1)
    expected = torch.nn.functional.cross_entropy(two, masks[:, 0].long(), weight=torch.tensor([0.9, 1.1]))
    torch.testing.assert_close(binary_cross_entropy(logits, masks, 0.9, 1.1)[0], expected)


@pytest.mark.parametrize("options", [{}, {"squared": True}, {"eps": 1e-3}, {"squared": True, "eps": 0.5}])
def test_dice_loss_by_its_formula(options, double):
    _, _, masks = example()
    eps, y = options.get("eps", 1), masks.numpy()

    def formula(logits):
        p = sigmoid(logits)
        total = over_pixels(p ** 2 + y ** 2) if "squared" in options else over_pixels(p) + over_pixels(y)
        return 1 - (2 * over_pixels(p * y) + eps) / (total + eps)

    check(lambda x: dice_loss(x, masks, **options), formula, normal(3, 1, 5, 4))


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


@pytest.mark.parametrize("options", [{}, {"sample_weight": 0.7, "threshold": 0.2}, {"eps": 1e-6}, {"clamp": 1.5},
                                     {"blur": True}])
def test_eq06_mean_over_expressions_and_pixels(options, double):
    """CroBIM-U Eqs. (5)-(8), written out expression by expression; the last but one has no error, the last no union."""
    _, prediction, masks = example(M=5)
    masks[3], masks[4], prediction[4] = prediction[3], False, False
    lam, delta, eps, clamp = (options.get(name, default) for name, default in (
        ("sample_weight", 1), ("threshold", 0.5), ("eps", 1), ("clamp", math.inf)))

    def formula(U):
        values = []
        for u, y_hat, y in zip(U[:, 0], prediction[:, 0].numpy(), masks[:, 0].numpy(), strict=True):
            e = np.abs(y_hat.astype(float) - y)                                                         # (5)
            intersection, union = (y_hat * y).sum(), (y_hat + y).sum()
            iou = intersection / union if union else 1
            n1, n0 = (e == 1).sum(), (e == 0).sum()
            w_pixel = np.where(e == 1, min((n0 + eps) / (n1 + eps), clamp), 1)                          # (8)
            z = neighbourhood_mean(e) if "blur" in options else e
            values.append((1 + lam * (iou < delta)) * (w_pixel * bce(u, z)).mean())                     # (6), (7)
        return np.array(values)

    check(lambda U: uncertainty_loss(U, prediction, masks, **options), formula, normal(5, 1, 5, 4))


def neighbourhood_mean(values):
    """Mean over the 3 x 3 places around each, as many of them as there are."""
    return np.array([[values[max(0, i - 1):i + 2, max(0, j - 1):j + 2].mean() for j in range(values.shape[1])]
                     for i in range(values.shape[0])])


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


def test_eq06_computes_in_float32_under_autocast():
    uncertainty, prediction, masks = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = uncertainty_loss(uncertainty.bfloat16(), prediction, masks, blur=True)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, uncertainty_loss(uncertainty.bfloat16().float(), prediction, masks, blur=True))


# --------------------------------------------------------------------------------------------------------- Prompt-RIS


@pytest.mark.parametrize("eps", [None, 1e-2])
def test_prompt_ris_instance_contrast_by_its_formula(eps, double):
    """Prompt-RIS Eqs. (7)-(8), pair by pair: two images of four expressions and one of two, some of the same object."""
    masks = example(M=10, seed=3)[2]
    masks[7] = False
    image_index, instance = [0, 0, 1, 0, 1, 1, 2, 2, 1, 0], [5, 6, 7, 5, 8, 7, 9, 9, 3, 5]
    e = eps or 1e-4                                                                     # our choice, small beside any O

    def formula(logits):
        S, values = sigmoid(logits), []
        for i in range(10):
            predicted, group = logits[i] > 0, [j for j in range(10) if image_index[j] == image_index[i]]
            w = (predicted & masks[i].numpy()).sum() / (predicted | masks[i].numpy()).sum()
            terms = []
            for j in group:
                O = 2 * (S[i] * S[j]).sum() / ((S[i] ** 2).sum() + (S[j] ** 2).sum())   # noqa: E741
                y = float(instance[i] == instance[j])
                terms.append(-w * (y * np.log(e + (1 - e) * O) + (1 - y) * np.log(e + (1 - e) * (1 - O))))
            values.append(sum(terms) / len(group))
        return np.array(values)

    options = {"eps": eps} if eps else {}
    check(lambda x: instance_contrastive_loss(x, masks, torch.tensor(image_index), torch.tensor(instance), **options),
          formula, 2 * normal(10, 1, 5, 4))


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


@pytest.mark.parametrize("level", [-20.0, -46.0, -50.0, -90.0])
def test_prompt_ris_instance_contrast_of_masks_without_any_mass_is_finite(level):
    """Prompt-RIS Eq. (7) is 0 / 0 there, or a quotient of the smallest numbers that there are; w is 0."""
    logits = torch.full((2, 1, 4, 4), level, requires_grad=True)
    for instance in (torch.tensor([1, 1]), torch.tensor([1, 2])):
        loss = instance_contrastive_loss(logits, torch.ones(2, 1, 4, 4) > 0, torch.zeros(2), instance)
        gradient, = torch.autograd.grad(loss.sum(), logits)
        assert loss.tolist() == [0, 0] and gradient.abs().max() == 0


def test_prompt_ris_instance_contrast_at_its_ends():
    """Prompt-RIS Eq. (8): one pixel each, found, w = 1. Two objects in one mask cost -log(1e-4) / 2, apart none."""
    truth = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    truth[:, 0, 0, 0] = True
    same = instance_contrastive_loss(torch.where(truth, 60.0, -60.0), truth, torch.zeros(2), torch.tensor([1, 2]))
    assert same.tolist() == pytest.approx([math.log(1e4) / 2] * 2, rel=1e-4)
    none = instance_contrastive_loss(torch.zeros(2, 1, 2, 2), truth, torch.zeros(2), torch.tensor([1, 2]))
    assert none.tolist() == [0, 0]                                          # the mask is where the logit is above zero
    truth[1] = truth[1].flip(-1)
    apart = instance_contrastive_loss(torch.where(truth, 60.0, -60.0), truth, torch.zeros(2), torch.tensor([1, 2]))
    assert apart.tolist() == [0, 0]


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


def unit(vectors):
    return vectors / np.sqrt((vectors ** 2).sum(-1, keepdims=True))


def test_rsrefseg2_orthogonal_loss_by_its_formula(double):
    """RSRefSeg 2 Eq. (11): the square of the cosine of the means, 0 for orthogonal and 1 for opposite subspaces."""
    t1, t2 = normal(2, 3, 4, 5)
    check(orthogonal_loss, lambda a, b: (unit(a.mean(1)) * unit(b.mean(1))).sum(-1) ** 2, t1, t2)
    across = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert orthogonal_loss(*across).item() == 0
    assert orthogonal_loss(torch.from_numpy(t1), torch.from_numpy(-3 * t1)).tolist() == pytest.approx([1] * 3)


def test_rsrefseg2_mask_pooling_counts_a_cell_by_its_share(double):
    """RSRefSeg 2 Eq. (12): an object smaller than a cell is not lost, an empty mask is zero and not NaN."""
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    masks[0, 0, 2, 5], masks[1, 0, 2:6, 0:5] = True, True               # one cell; 8, 2, 8 and 2 pixels of four cells

    def formula(features):
        quarters = np.array([[0, 1, 0, 0], [0.4, 0.1, 0.4, 0.1], [0, 0, 0, 0]])
        return (features.reshape(3, 2, 4) * quarters[:, None]).sum(-1)

    check(lambda x: mask_pooled(x, masks), formula, normal(3, 2, 2, 2))


def test_rsrefseg2_official_masks_are_cut_on_the_grid():
    """The corners of mask and grid coincide; a cell counts above one half, what lies between the points is lost."""
    masks = torch.zeros(2, 1, 7, 7, dtype=torch.bool)
    masks[0, :, :3, 4:], masks[1, :, 1:3, 1:3] = True, True
    assert on_grid(masks, (3, 3))[:, 0].long().tolist() == [[[0, 0, 1], [0, 0, 0], [0, 0, 0]], [[0] * 3] * 3]
    for side, grid, rows in ((4, 3, 1), (6, 5, 2)):     # the second row lies at 1.5: value 1/2, not above; at 1.25: 3/4
        upper = torch.zeros(1, 1, side, side, dtype=torch.bool)
        upper[:, :, :2] = True
        assert on_grid(upper, (grid, grid))[0, 0].sum(0).tolist() == [rows] * grid
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


def both_ways(images, texts, every_image, every_text, first, scale):
    values = []
    for k in range(len(images)):
        to_text = np.exp(scale * unit(every_text) @ unit(images[k]))
        to_image = np.exp(scale * unit(every_image) @ unit(texts[k]))
        values.append(-np.log(to_text[first + k] / to_text.sum()) - np.log(to_image[first + k] / to_image.sum()))
    return np.array(values) / 2


def test_rsrefseg2_contrast_by_its_formula(double):
    """RSRefSeg 2 Eq. (12), L_samp: rows 1 and 2 of five, each way round; alone, a process has every row."""
    (images, texts), (every_image, every_text), scale = normal(2, 2, 4), normal(2, 5, 4, seed=1), np.array(2.5)
    check(lambda *x: contrastive_loss(*x[:4], 1, x[4]), lambda *x: both_ways(*x[:4], 1, x[4]),
          images, texts, every_image, every_text, scale)
    check(contrast, lambda a, b, scale: both_ways(a, b, a, b, 0, scale), every_image, every_text, scale)
    check(lambda *x: contrast(*x, remote_gradient=False),
          lambda a, b, scale: both_ways(a, b, a, b, 0, scale).mean() * np.ones(5), every_image, every_text, scale)


class Threads:
    """torch.distributed for threads of this process: what losses.py asks of it, each thread a rank."""

    def __init__(self, world):
        self.world, self.given = world, [None] * world
        self.own, self.barrier = threading.local(), threading.Barrier(world)

    def is_available(self):
        return True

    def is_initialized(self):
        return hasattr(self.own, "rank")

    def get_world_size(self):
        return self.world

    def get_rank(self):
        return self.own.rank

    def exchanged(self, tensor):
        self.given[self.own.rank] = tensor.clone()
        self.barrier.wait(20)
        given = list(self.given)
        self.barrier.wait(20)
        return given

    def all_gather(self, places, tensor):
        for place, other in zip(places, self.exchanged(tensor), strict=True):
            assert place.shape == other.shape and place.dtype == other.dtype            # as gloo and NCCL demand
            place.copy_(other)

    def all_reduce(self, tensor):
        tensor.copy_(sum(self.exchanged(tensor)))


def test_rsrefseg2_contrast_over_processes_is_that_of_all_rows(monkeypatch, double):
    """RSRefSeg 2 Eq. (12), L_samp: three processes of 2, 3 and 1 rows, the second of them here, the rest in threads."""
    group, rows = Threads(3), (slice(0, 2), slice(2, 5), slice(5, 6))
    factors = torch.arange(1.0, 7.0)
    whole = [torch.from_numpy(array).requires_grad_() for array in (normal(6, 4), normal(6, 4, seed=1))]
    shares = [[one[part].detach().clone().requires_grad_() for one in whole] for part in rows]
    expected = contrast(*whole, 2.5)
    (expected * factors).sum().backward()
    monkeypatch.setattr(losses, "dist", group)
    values = [None] * 3

    def process(rank):
        group.own.rank = rank
        values[rank] = contrast(*shares[rank], 2.5)
        (values[rank] * factors[rows[rank]]).sum().backward()

    others = [threading.Thread(target=process, args=(rank,), daemon=True) for rank in (0, 2)]
    for other in others:
        other.start()
    process(1)
    for other in others:
        other.join(20)
    torch.testing.assert_close(torch.cat(values), expected)
    for k in range(2):
        torch.testing.assert_close(torch.cat([share[k].grad for share in shares]), whole[k].grad)
    assert group.get_rank() == 1 and losses.processes() == 3
    del group.own.rank
    assert losses.processes() == 1                                      # there, but no group was made


def test_rsrefseg2_multi_instance_loss_by_its_formula(double):
    """RSRefSeg 2 Eq. (12), L_spat: the mass of the touched cells; an empty mask costs nothing and has no gradient."""
    masks = torch.zeros(3, 1, 6, 6, dtype=torch.bool)
    masks[0, 0, 1, 1], masks[1, 0, 1:3, 4] = True, True
    touched = np.zeros((3, 3, 3), bool)
    touched[0, 0, 0] = touched[1, 0, 2] = touched[1, 1, 2] = touched[2] = True

    def formula(logits):
        mass = np.exp(logits[:, 0])
        return -np.log((mass * touched).sum((1, 2)) / mass.sum((1, 2))) + 0 * over_pixels(logits)

    logits = normal(3, 1, 3, 3, seed=3)
    assert formula(logits)[2] == pytest.approx(0, abs=1e-12)
    check(lambda x: multi_instance_loss(x, masks)[:2], lambda x: formula(x)[:2], logits)
    empty = torch.from_numpy(logits).requires_grad_()
    loss = multi_instance_loss(empty, masks)[2]
    gradient, = torch.autograd.grad(loss, empty)
    assert abs(loss.item()) < 1e-12 and gradient.abs().max() < 1e-12


# --------------------------------------------------------------------------------------------------------- RS2-SAM 2


def gradient_map(maps):
    """Vertical plus horizontal absolute difference, 0 where there is no neighbour."""
    result = np.zeros(maps.shape)
    result[..., 1:, :] += np.abs(maps[..., 1:, :] - maps[..., :-1, :])
    result[..., 1:] += np.abs(maps[..., 1:] - maps[..., :-1])
    return result


@pytest.mark.parametrize("options", [{}, {"hard": True}, {"hard": True, "cut": -1.0}])
def test_rs2sam2_boundary_loss_by_its_formula(options, double):
    """RS2-SAM 2 Eq. (7): towards the logits and the weight; a hard p has no gradient, the weight still has."""
    masks, logits, weight = example()[2], normal(3, 1, 5, 4), np.array([0.5, -2.0, 1.5])

    def formula(logits, weight):
        p = (logits > options.get("cut", 0)).astype(float) if options else sigmoid(logits)
        difference = weight[:, None, None, None] * (gradient_map(p) - gradient_map(masks.numpy().astype(float)))
        return (difference ** 2).mean((1, 2, 3))

    if options:
        hard = torch.from_numpy(logits).requires_grad_()
        check(lambda w: boundary_loss(hard, masks, w, **options), lambda w: formula(logits, w), weight)
        values = boundary_loss(hard, masks, torch.from_numpy(weight).requires_grad_(), **options)
        assert torch.autograd.grad(values.sum(), hard, allow_unused=True) == (None,)
    else:
        check(lambda x, w: boundary_loss(x, masks, w), formula, logits, weight)


def test_rs2sam2_gradients_of_an_edge():
    """RS2-SAM 2 Eq. (7): the mask's own gradient is 1 along an edge, 2 at a corner and 0 elsewhere."""
    square = torch.zeros(1, 1, 4, 4)
    square[..., 1:3, 1:3] = 1
    assert absolute_differences(square)[0, 0].tolist() == [[0, 0, 0, 0], [0, 2, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert boundary_loss(square * 100 - 50, square > 0, torch.ones(1)).item() < 1e-9
    assert boundary_loss(square / 4, square > 0, torch.ones(1), hard=True).item() == 0         # p = 1 above 0, not at 0


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
