"""The black-box attack: what the attacker knows, how the substitute learns, and that its attacks carry over."""

from __future__ import annotations

import foolbox
import pytest
import torch
from torch import Tensor, nn

from training import black_box
from training.attacks import FGSM, predict
from training.black_box import SubstituteSettings, jacobian_augmentation, split_off, train_substitute
from training.data import Split, to_float, to_uint8
from training.pairs import attack_all

QUICK = SubstituteSettings(rounds=4, epochs=8)


@pytest.fixture(scope="module")
def split(demo_images: tuple[Tensor, Tensor]) -> Split:
    return Split(*demo_images)


@pytest.fixture(scope="module")
def substitute(split: Split, classifier_d: nn.Module) -> nn.Module:
    own, _ = split_off(split, QUICK)
    return train_substitute("E", lambda x: predict(classifier_d, x), own.images, 10, QUICK, quiet=True)


def test_the_attackers_images_are_not_measured_on(split: Split) -> None:
    own, rest = split_off(split, SubstituteSettings())
    assert (len(own), len(rest)) == (150, 350)
    assert torch.equal(torch.cat([own.images, rest.images]), split.images)
    with pytest.raises(ValueError, match="expected fewer than the 150 test images"):
        split_off(split.first(150), SubstituteSettings())


def test_jacobian_augmentation_moves_towards_the_label_of_a_linear_network() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.full((3, 1, 2, 2), 0.5)
    labels = torch.tensor([0, 1, 2])
    moved = jacobian_augmentation(network, images, labels, -0.2)
    weight = network.get_parameter("1.weight").detach()
    shares = network(images).softmax(1).detach()
    torch.testing.assert_close(moved.flatten(1), 0.5 - 0.2 * (weight - shares @ weight).sign())
    edge = jacobian_augmentation(network, torch.zeros(1, 1, 2, 2), labels[:1], -0.2)
    assert float(edge.min()) >= 0


def test_images_double_between_rounds_and_only_classes_are_asked_for(split: Split, classifier_d: nn.Module) -> None:
    asked: list[int] = []

    def oracle(images: Tensor) -> Tensor:
        asked.append(len(images))
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        return predict(classifier_d, images)

    settings = SubstituteSettings(images=20, rounds=4, epochs=1)
    first = train_substitute("E", oracle, split.images[:20], 10, settings, quiet=True)
    assert asked == [20, 20, 40, 80]
    second = train_substitute("E", oracle, split.images[:20], 10, settings, quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize(("period", "signs"), [(3, [1, 1, 1, -1, -1]), (2, [1, 1, -1, -1, 1]), (0, [1] * 5)])
def test_the_step_turns_every_period_or_never(
    split: Split, monkeypatch: pytest.MonkeyPatch, period: int, signs: list[int]
) -> None:
    steps: list[float] = []

    def note(_: nn.Module, images: Tensor, __: Tensor, step: float) -> Tensor:
        steps.append(step)
        return images

    monkeypatch.setattr(black_box, "jacobian_augmentation", note)
    settings = SubstituteSettings(images=5, epochs=1, period=period)
    train_substitute("E", lambda x: torch.zeros(len(x), dtype=torch.int64), split.images[:5], 10, settings, quiet=True)
    assert steps == [0.1 * sign for sign in signs]


@pytest.mark.parametrize(("kept", "rates"), [(False, [0.2, 0.5]), (True, [0.8, 0.5])])
def test_dropout_rates_can_be_read_as_the_share_that_is_kept(split: Split, kept: bool, rates: list[float]) -> None:
    settings = SubstituteSettings(images=5, rounds=1, epochs=1, kept=kept)
    substitute = train_substitute(
        "B", lambda x: torch.zeros(len(x), dtype=torch.int64), split.images[:5], 10, settings, quiet=True
    )
    assert [part.p for part in substitute.modules() if isinstance(part, nn.Dropout)] == rates


def test_the_substitute_answers_as_the_classifier_does(
    split: Split, substitute: nn.Module, classifier_d: nn.Module
) -> None:
    _, rest = split_off(split, QUICK)
    pixels = to_float(rest.images)
    agreement = (predict(substitute, pixels) == predict(classifier_d, pixels)).float().mean()
    assert float(agreement) > 0.65


def test_its_attacks_carry_over_as_foolboxes_on_it_do(
    split: Split, substitute: nn.Module, classifier_d: nn.Module
) -> None:
    _, rest = split_off(split, QUICK)
    pixels = to_float(rest.images)
    attacked = to_float(attack_all(FGSM(0.3), substitute, rest, predicted_labels=True))
    wrapped = foolbox.PyTorchModel(substitute, bounds=(0, 1), device="cpu")
    criterion = foolbox.criteria.Misclassification(predict(substitute, pixels))
    _, reference, _ = foolbox.attacks.FGSM()(wrapped, pixels, criterion, epsilons=0.3)
    torch.testing.assert_close(attacked, to_float(to_uint8(reference.clone())))

    def accuracy(images: Tensor) -> float:
        return 100 * float((predict(classifier_d, images) == rest.labels).float().mean())

    noise = 0.3 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).sign()
    assert accuracy(attacked) < accuracy((pixels + noise).clamp(0, 1)) - 20
    assert accuracy(attacked) < 40 < accuracy(pixels)


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"period": -1}, {"step": 0.0}, {"step": 2.0}, {"learning_rate": float("nan")}]
)
def test_bad_settings(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="substitute"):
        SubstituteSettings(**change)  # type: ignore[arg-type]
