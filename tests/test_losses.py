"""losses.py against plain loops, and CroBIM-U's Eqs. (5)-(8) where their values are known by hand."""

import math

import pytest
import torch

from losses import binary_cross_entropy, dice_loss, uncertainty_loss


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


@pytest.mark.parametrize("options", [{}, {"sample_weight": 0.7, "threshold": 0.2}, {"eps": 1e-6}, {"clamp": 1.5},
                                     {"clamp": None}])
def test_eq06_mean_over_expressions_and_pixels(options):
    uncertainty, prediction, masks = example(M=4)
    masks[3] = prediction[3]                                                    # one expression without an error
    loss = uncertainty_loss(uncertainty, prediction, masks, **options)
    clamp = options.get("clamp", 100.0)
    expected = loops(uncertainty, prediction, masks, options.get("sample_weight", 1.0), options.get("threshold", 0.5),
                     options.get("eps", 1.0), math.inf if clamp is None else clamp)
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
    (0, {"clamp": None}, 0.693, 0.5),
    (1, {"clamp": None}, 1.04, 57_600),
    (1, {"clamp": None, "eps": 1e-6}, 1.39, 115_200),
    (1, {}, 0.693, 50),
    (230, {"clamp": None}, 1.38, 498),
    (230, {}, 0.761, 50),
    (4608, {}, 1.36, 24.5),
    (115_200, {}, 0.693, 0.5),
    (225_792, {}, 0.028, 0.5),
    (230_400, {}, 0.0, 0.0),
    (225_792, {"symmetric": True}, 1.36, 24.5),
    (230_400, {"symmetric": True}, 0.693, 0.5),
    (4608, {"symmetric": True}, 1.36, 24.5),
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
