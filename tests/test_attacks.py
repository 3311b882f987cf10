"""The attacks keep their bounds and are as strong as Foolbox's on the same classifier and images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import foolbox
import pytest
import torch
from torch import Tensor, nn

from training.attacks import (
    FGSM,
    PAPER_TEST_ATTACKS,
    PAPER_TRAINING_ATTACKS,
    PGD,
    Attack,
    CarliniWagnerL2,
    DeepFool,
    RandFGSM,
    predict,
)
from training.data import to_float

IMAGES = 200


@pytest.fixture(scope="module")
def images(demo_images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Float images and labels that the classifier under attack gets right in most cases."""
    pixels, labels = demo_images
    return to_float(pixels[:IMAGES]), labels[:IMAGES]


def success(model: nn.Module, attacked: Tensor, labels: Tensor) -> float:
    """Percent of the images that are not classified as their label."""
    return 100 * float((predict(model, attacked) != labels).float().mean())


FOOLBOX_CASES: list[tuple[str, Attack, Callable[[], foolbox.attacks.base.Attack], float | None]] = [
    ("fgsm-0.3", FGSM(0.3), foolbox.attacks.FGSM, 0.3),
    ("fgsm-0.05", FGSM(0.05), foolbox.attacks.FGSM, 0.05),
    (
        "pgd-0.1",
        PGD(0.1, steps=10, relative_step=0.25),
        lambda: foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.25, random_start=True),
        0.1,
    ),
    (
        "cw-paper",
        CarliniWagnerL2(10.0),
        lambda: foolbox.attacks.L2CarliniWagnerAttack(1, 100, stepsize=10.0, confidence=0, initial_const=100),
        None,
    ),
    (
        "cw-small-steps",
        CarliniWagnerL2(0.05),
        lambda: foolbox.attacks.L2CarliniWagnerAttack(1, 100, stepsize=0.05, confidence=0, initial_const=100),
        None,
    ),
    ("deepfool", DeepFool(), lambda: foolbox.attacks.L2DeepFoolAttack(candidates=None), None),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "epsilon"), [case[1:] for case in FOOLBOX_CASES], ids=[c[0] for c in FOOLBOX_CASES]
)
def test_success_rate_and_norm_match_foolbox(
    ours: Attack,
    theirs: Callable[[], foolbox.attacks.base.Attack],
    epsilon: float | None,
    classifier_d: nn.Module,
    images: tuple[Tensor, Tensor],
) -> None:
    pixels, labels = images
    torch.manual_seed(0)
    mine = ours(classifier_d, pixels, labels, torch.Generator().manual_seed(0))
    wrapped = foolbox.PyTorchModel(classifier_d, bounds=(0, 1), device="cpu")
    _, reference, _ = theirs()(wrapped, pixels, foolbox.criteria.Misclassification(labels), epsilons=epsilon)
    assert abs(success(classifier_d, mine, labels) - success(classifier_d, reference, labels)) <= 2.0
    ours_l2 = (mine - pixels).flatten(1).norm(dim=1).median()
    reference_l2 = (reference - pixels).flatten(1).norm(dim=1).median()
    assert float(ours_l2) == pytest.approx(float(reference_l2), rel=0.05)


@pytest.mark.parametrize(
    ("attack", "epsilon"),
    [(FGSM(0.3), 0.3), (RandFGSM(0.3, 0.05), 0.3), (PGD(0.2, steps=5), 0.2), (FGSM(0.0), 0.0)],
    ids=["fgsm", "rand_fgsm", "pgd", "fgsm-zero"],
)
def test_linf_attacks_stay_within_epsilon_and_bounds(
    attack: Attack, epsilon: float, classifier_d: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    pixels, labels = images
    attacked = attack(classifier_d, pixels, labels)
    assert float((attacked - pixels).abs().max()) <= epsilon + 1e-6
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1
    if epsilon:
        assert success(classifier_d, attacked, labels) > success(classifier_d, pixels, labels) + 30


def test_epsilon_can_differ_from_image_to_image(classifier_d: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    pixels, labels = images[0][:3], images[1][:3]
    epsilon = torch.tensor([0.0, 0.1, 0.3])
    together = FGSM(epsilon)(classifier_d, pixels, labels)
    for row, value in enumerate(epsilon.tolist()):
        alone = FGSM(value)(classifier_d, pixels[row : row + 1], labels[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_cw_returns_an_image_it_could_not_fool_unchanged(images: tuple[Tensor, Tensor]) -> None:
    constant = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.zeros_(constant[1].weight)
    constant[1].bias.data = torch.arange(10.0)
    pixels = images[0][:2]
    attacked = CarliniWagnerL2(10.0, iterations=5)(constant, pixels, torch.tensor([9, 0]))
    assert torch.equal(attacked[0], pixels[0])
    # Already misclassified: the smallest perturbation is none, up to the rounding of tanh space.
    torch.testing.assert_close(attacked[1], pixels[1], atol=2e-6, rtol=0)


def test_cw_does_not_depend_on_the_batch(classifier_d: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    pixels, labels = images[0][:8], images[1][:8]
    attack = CarliniWagnerL2(0.1, iterations=20, abort_early=False)
    together = attack(classifier_d, pixels, labels)
    alone = torch.cat([attack(classifier_d, pixels[i : i + 1], labels[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_cw_at_the_papers_rates_is_settled_after_a_few_iterations(
    classifier_d: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """What lets training make CW images with four iterations: the first step saturates tanh."""
    pixels, labels = images
    short = CarliniWagnerL2(8.0, iterations=4, abort_early=False)(classifier_d, pixels, labels)
    full = CarliniWagnerL2(8.0, iterations=100, abort_early=False)(classifier_d, pixels, labels)
    same = (short - full).abs().amax((1, 2, 3)) < 1 / 255
    assert float(same.float().mean()) > 0.95


@pytest.mark.parametrize("learning_rate", [0.5, 6.0, 10.0])
def test_cw_leaving_settled_images_out_changes_nothing(
    learning_rate: float, classifier_d: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    """As many iterations without leaving anything out as were made with it."""
    pixels, labels = images[0][:50], images[1][:50]
    calls: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(len(x))
        result: Tensor = classifier_d(x)
        return result

    lean = CarliniWagnerL2(learning_rate, iterations=100)(counting, pixels, labels)
    whole = CarliniWagnerL2(learning_rate, iterations=len(calls), abort_early=False)(classifier_d, pixels, labels)
    torch.testing.assert_close(lean, whole, atol=1e-5, rtol=0)
    if learning_rate >= 6:
        assert sum(calls) < 50 * 12


def test_deepfool_fools_with_the_smallest_perturbation(classifier_d: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    pixels, labels = images[0][:50], images[1][:50]
    attacked = DeepFool()(classifier_d, pixels, labels)
    assert success(classifier_d, attacked, labels) == 100
    wrong = predict(classifier_d, pixels) != labels
    assert torch.equal(attacked[wrong], pixels[wrong])
    cw = CarliniWagnerL2(10.0)(classifier_d, pixels, labels)
    right = ~wrong
    ours, theirs = ((x - pixels)[right].flatten(1).norm(dim=1).median() for x in (attacked, cw))
    assert float(ours) < 0.5 * float(theirs)


def test_deepfool_in_tanh_space_moves_the_pixels_that_cw_moves(
    classifier_d: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    pixels, labels = images[0][:50], images[1][:50]
    near, far = (DeepFool(overshoot=overshoot, in_tanh=True)(classifier_d, pixels, labels) for overshoot in (0.02, 200))
    wrong = predict(classifier_d, pixels) != labels
    for attacked in (near, far):
        assert success(classifier_d, attacked, labels) == 100
        assert torch.equal(attacked[wrong], pixels[wrong])
        assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
    black = pixels == 0
    assert float(near[black].mean()) < 0.01
    right = ~wrong

    def likeness(attacked: Tensor) -> float:
        cw = CarliniWagnerL2(10.0)(classifier_d, pixels, labels)
        moved, theirs = ((x - pixels)[right].flatten(1) for x in (attacked, cw))
        return float(nn.functional.cosine_similarity(moved, theirs).median())

    assert likeness(far) > 0.75 > 0.6 > likeness(DeepFool(overshoot=200)(classifier_d, pixels, labels))


def test_deepfool_gives_foolboxs_images(classifier_d: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    """Its perturbations are so small that where a step ends decides what rounding to 8 bits leaves of them."""
    pixels, labels = images[0][:50], images[1][:50]
    wrapped = foolbox.PyTorchModel(classifier_d, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2DeepFoolAttack(candidates=None)
    _, reference, _ = attack(wrapped, pixels, foolbox.criteria.Misclassification(labels), epsilons=None)
    torch.testing.assert_close(DeepFool()(classifier_d, pixels, labels), reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attack", PAPER_TEST_ATTACKS.values(), ids=PAPER_TEST_ATTACKS.keys())
def test_weights_get_no_gradient_and_inputs_are_left_alone(
    attack: Attack, classifier_d: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    pixels, labels = images[0][:4].clone(), images[1][:4]
    before = pixels.clone()
    attacked = attack(classifier_d, pixels, labels)
    assert torch.equal(pixels, before)
    assert not attacked.requires_grad
    assert all(parameter.grad is None for parameter in classifier_d.parameters())


def test_random_attacks_repeat_with_the_seed(classifier_d: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    pixels, labels = images[0][:4], images[1][:4]
    first, again, other = (
        RandFGSM(0.3)(classifier_d, pixels, labels, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_papers_twelve_training_attacks() -> None:
    kinds = [type(attack).__name__ for attack in PAPER_TRAINING_ATTACKS]
    assert kinds == ["FGSM"] * 4 + ["RandFGSM"] * 4 + ["CarliniWagnerL2"] * 4
    settings = replace(PAPER_TRAINING_ATTACKS[-1])  # type: ignore[type-var]
    assert settings == CarliniWagnerL2(learning_rate=12.0, iterations=100, constant=100.0)


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "expected floating"),
        (torch.zeros(1, 28, 28), torch.zeros(1, dtype=torch.int64), r"expected floating \(N, C, H, W\)"),
        (torch.zeros(2, 1, 28, 28), torch.zeros(3, dtype=torch.int64), r"labels: expected shape \(2,\), got \(3,\)"),
    ],
    ids=["uint8", "no-batch", "label-count"],
)
def test_bad_input(pixels: Tensor, labels: Tensor, message: str, classifier_d: nn.Module) -> None:
    with pytest.raises(ValueError, match=message):
        FGSM()(classifier_d, pixels, labels)
