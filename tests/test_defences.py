"""The defences beside Defense-VAE, in one harness: retrained, end-to-end, MagNet, adversarial training, Defense-GAN."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from defense_vae_fast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from defense_vae_fast.nn.model import DefenseVAE
from training import defence_commands, loop, precision
from training.__main__ import cli, main
from training.attacks import FGSM, predict
from training.baselines import wgan
from training.baselines.adversarial_training import AdversarialSettings, train_adversarially
from training.baselines.defense_gan import Generator
from training.baselines.magnet import (
    MAGNET_FILE,
    Autoencoder,
    Autoencoders,
    MagNetSettings,
    ReconstructionDetector,
    jensen_shannon,
    load_magnet,
    magnet,
    thresholds,
    train_magnet,
)
from training.baselines.wgan import (
    GENERATOR_FILE,
    Critic,
    GanSettings,
    defense_gan,
    gradient_penalty,
    load_generator,
    train_generator,
)
from training.classifiers import build
from training.data import Dataset, Split, to_float
from training.defences import Answer, Defence, bare, defense_vae, measure
from training.finetune import FinetuneSettings, finetune, reset
from training.fit import CHECKPOINT_FILE, LOG_FILE, STATE_FILE
from training.pairs import PairSource, TablePairs, attack_all
from training.retrain import CLASSIFIER_FILE, RetrainSettings, retrain
from training.train_classifier import load_weights, weights_digest

Trainer = Callable[[Path, bool], Path]


@pytest.fixture(scope="module")
def dataset(demo_images: tuple[Tensor, Tensor]) -> Dataset:
    images, labels = demo_images
    parts = [Split(images[a:b], labels[a:b]) for a, b in ((0, 300), (300, 400), (400, 500))]
    return Dataset("fashion_mnist", *parts, class_names=tuple(map(str, range(10))))


@pytest.fixture(scope="module")
def purifier(checkpoint: Checkpoint) -> DefenseVAE:
    return DefenseVAE.from_checkpoint(checkpoint).requires_grad_(False)


@pytest.fixture
def pairs(dataset: Dataset, classifier_d: nn.Module) -> Callable[[], PairSource]:
    return lambda: TablePairs(
        dataset.train, {"D": classifier_d}, batch_size=16, seed=0, images=8, attacks=[FGSM(0.3), FGSM(0.25)]
    )


@pytest.fixture
def trainers(
    dataset: Dataset, classifier_d: nn.Module, purifier: DefenseVAE, pairs: Callable[[], PairSource]
) -> dict[str, Trainer]:
    """Every kind of training, some six steps of it: from the folder and whether to resume to the file it leaves."""

    def rec(out: Path, resume: bool) -> Path:
        retrain(dataset, "D", classifier_d, purifier, pairs, RetrainSettings(steps=6), out, resume=resume)
        return out / CLASSIFIER_FILE

    def e2e(out: Path, resume: bool) -> Path:
        settings = FinetuneSettings(steps=6)
        finetune(dataset, "D", classifier_d, purifier, classifier_d, pairs, settings, out, resume=resume)
        return out / CHECKPOINT_FILE

    def adversarial(out: Path, resume: bool) -> Path:
        train_adversarially(dataset, "D", AdversarialSettings("pgd", epochs=2), out, resume=resume)
        return out / CLASSIFIER_FILE

    def autoencoders(out: Path, resume: bool) -> Path:
        train_magnet(dataset, MagNetSettings(epochs=2, batch_size=100), out, resume=resume)
        return out / MAGNET_FILE

    def gan(out: Path, resume: bool) -> Path:
        train_generator(dataset, GanSettings(steps=6, batch_size=4, critic_steps=2, latent_dim=4), out, resume=resume)
        return out / GENERATOR_FILE

    return {"rec": rec, "e2e": e2e, "adversarial": adversarial, "magnet": autoencoders, "defense-gan": gan}


@contextmanager
def stopping_after(steps: int) -> Iterator[object]:
    """In place of Ctrl-C: says so after this many steps."""

    class Event:
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked >= steps

    yield Event()


# The loop


@pytest.mark.parametrize("kind", ["rec", "e2e", "adversarial", "magnet", "defense-gan"])
def test_a_stopped_training_goes_on_bit_for_bit(
    kind: str, trainers: dict[str, Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trainers[kind]
    whole = train(tmp_path / "whole", False)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_signal", lambda: stopping_after(2))
        stopped = train(tmp_path / "parts", False).read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        train(tmp_path / "parts", False)
    torch.manual_seed(99)
    resumed = train(tmp_path / "parts", True)
    assert stopped != whole.read_bytes() == resumed.read_bytes()
    assert (tmp_path / "whole" / STATE_FILE).read_bytes() == (tmp_path / "parts" / STATE_FILE).read_bytes()
    other = next(name for name in trainers if name != kind)
    with pytest.raises(ValueError, match=r"another one; it differs in kind"):
        trainers[other](tmp_path / "parts", True)


def test_a_damaged_state_is_said(trainers: dict[str, Trainer], tmp_path: Path) -> None:
    trainers["magnet"](tmp_path, False)
    (tmp_path / STATE_FILE).write_bytes(b"no state")
    with pytest.raises(ValueError, match="expected the state of a training run"):
        trainers["magnet"](tmp_path, True)
    with pytest.raises(FileNotFoundError, match="without --resume"):
        trainers["magnet"](tmp_path / "elsewhere", True)


# The harness


def test_measure_counts_right_and_rejected_images(classifier_d: nn.Module, dataset: Dataset) -> None:
    def answer(images: Tensor) -> Answer:
        classes = predict(classifier_d, to_float(images))
        return Answer(classes, torch.arange(len(images)) % 4 == 0)

    split = dataset.test
    score = measure(Defence("every fourth", classifier_d, answer, batch=100), split.images, split.labels)
    right = predict(classifier_d, to_float(split.images)) == split.labels
    rejected = torch.arange(100) % 4 == 0
    assert score == (int(right.sum()), 25, int((right | rejected).sum()))
    assert measure(bare(classifier_d), split.images, split.labels).accuracy == score.accuracy
    with pytest.raises(ValueError, match="expected one for each"):
        measure(bare(classifier_d), split.images, split.labels[:3])


def test_a_vae_defence_shows_purified_images_to_the_classifier_of_its_own(
    classifier_d: nn.Module, purifier: DefenseVAE, dataset: Dataset
) -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            logits: Tensor = classifier_d(x)
            return logits

    images = dataset.test.images[:5]
    answer = defense_vae(classifier_d, purifier, Watching()).answer(images)
    expected = (purifier.purify(to_float(images)) * 255).round() / 255
    torch.testing.assert_close(seen[0], expected)
    assert torch.equal(answer.classes, classifier_d(expected).argmax(1))


# Retrained and end to end


def test_retraining_helps_behind_a_purifier_that_the_classifier_does_not_understand(
    dataset: Dataset, classifier_d: nn.Module, tmp_path: Path
) -> None:
    """A purifier that turns images upside down: the original classifier fails, the retrained one learns."""

    class Turning(DefenseVAE):
        def purify(self, x: Tensor) -> Tensor:
            return x.flip(2)

    purifier = Turning().eval()
    before = weights_digest(classifier_d)
    clean = lambda: TablePairs(dataset.train, {"D": classifier_d}, batch_size=50, seed=0, attacks=[])  # noqa: E731
    student, finished = retrain(
        dataset, "D", classifier_d, purifier, clean, RetrainSettings(epochs=15, learning_rate=1e-3), tmp_path
    )
    assert finished
    assert weights_digest(classifier_d) == before
    split = dataset.test
    old = measure(defense_vae(classifier_d, purifier), split.images, split.labels).accuracy
    new = measure(defense_vae(classifier_d, purifier, student), split.images, split.labels).accuracy
    assert new > old + 30
    loaded = load_weights(tmp_path / CLASSIFIER_FILE, classifier_d)
    assert weights_digest(loaded) == weights_digest(student)


@pytest.mark.parametrize("from_scratch", [False, True], ids=["finetuned", "from-scratch"])
def test_end_to_end_trains_both_and_keeps_what_it_was_given(
    from_scratch: bool, dataset: Dataset, classifier_d: nn.Module, purifier: DefenseVAE,
    pairs: Callable[[], PairSource], tmp_path: Path,
) -> None:  # fmt: skip
    before = weights_digest(classifier_d), weights_digest(purifier)
    settings = FinetuneSettings(epochs=8, learning_rate=1e-3, classifier_weight=100.0, from_scratch=from_scratch)
    pair = finetune(
        dataset, "D", classifier_d, purifier, classifier_d, pairs, settings, tmp_path, report_every=4
    )  # fmt: skip
    assert (weights_digest(classifier_d), weights_digest(purifier)) == before
    assert weights_digest(pair.classifier) != before[0]
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert lines[2]["loss"] < lines[1]["loss"]
    assert set(lines[1]) == {"step", "loss", "clean", "fgsm_0.3"}
    written = load_checkpoint(tmp_path / CHECKPOINT_FILE)
    assert written.recipe["classifier_weight"] == 100.0
    assert written.recipe["kind"] == "finetune"
    again = DefenseVAE.from_checkpoint(written)
    images = to_float(dataset.test.images[:4])
    torch.testing.assert_close(again.purify(images), pair.purifier.purify(images), atol=5e-3, rtol=0)
    assert weights_digest(load_weights(tmp_path / CLASSIFIER_FILE, classifier_d)) == weights_digest(pair.classifier)


def test_lambda_weighs_the_cross_entropy(
    dataset: Dataset, classifier_d: nn.Module, purifier: DefenseVAE, pairs: Callable[[], PairSource], tmp_path: Path
) -> None:
    """With lambda 0 the classifier learns nothing, and equation 5 is equation 4."""
    pair = finetune(
        dataset, "D", classifier_d, purifier, classifier_d, pairs,
        FinetuneSettings(steps=2, classifier_weight=0.0), tmp_path,
    )  # fmt: skip
    assert weights_digest(pair.classifier) == weights_digest(classifier_d)
    assert weights_digest(pair.purifier) != weights_digest(purifier)


def test_reset_draws_every_weight_anew_or_says_which_it_cannot() -> None:
    network = build("residual_stem")
    before = {name: parameter.clone() for name, parameter in network.named_parameters() if parameter.ndim > 1}
    reset(network)
    assert all(not torch.equal(before[name], dict(network.named_parameters())[name]) for name in before)
    network.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="got none for temperature"):
        reset(network)


# MagNet


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)], ids=["gray28", "rgb32"])
@pytest.mark.parametrize("pooled", [True, False])
def test_autoencoders_keep_shape_and_range(channels: int, size: int, pooled: bool) -> None:
    images = torch.rand(2, channels, size, size)
    made = Autoencoder(channels, pooled=pooled)(images)
    assert made.shape == images.shape
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_thresholds_turn_away_the_share_they_were_set_for(dataset: Dataset) -> None:
    class Black(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    detector = ReconstructionDetector(Black(), 1)  # the mean pixel
    split = dataset.validation
    scores = to_float(split.images).flatten(1).mean(1)
    for drop_rate, turned_away in ((0.0, 0), (0.1, 10), (0.5, 50)):
        (limit,) = thresholds([detector], split, drop_rate)
        assert int((scores > limit).sum()) == turned_away
    with pytest.raises(ValueError, match="drop_rate"):
        thresholds([detector], split, 1.0)


def test_jensen_shannon_divergence() -> None:
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    q = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.6, 0.4]])
    by_hand = 0.5 * (0.2 * math.log(0.2 / 0.4) + 0.8 * math.log(0.8 / 0.6))
    by_hand += 0.5 * (0.6 * math.log(0.6 / 0.4) + 0.4 * math.log(0.4 / 0.6))
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor([math.log(2), 0.0, by_hand]))


def test_magnet_detects_noise_and_passes_clean_images(
    dataset: Dataset, classifier_d: nn.Module, tmp_path: Path
) -> None:
    settings = MagNetSettings(epochs=16, batch_size=30, learning_rate=3e-2)
    networks = train_magnet(dataset, settings, tmp_path)
    again = load_magnet(tmp_path / MAGNET_FILE)
    images = to_float(dataset.test.images)
    torch.testing.assert_close(again.pooled(images), networks.pooled(images))
    assert float((networks.plain(images) - images).square().mean()) < 0.5 * float(images.var())
    defence = magnet(classifier_d, again, dataset.validation, drop_rate=0.05)
    noise = torch.randint(0, 256, dataset.test.images.shape, dtype=torch.uint8)
    assert float(defence.answer(dataset.test.images).rejected.float().mean()) < 0.25
    assert float(defence.answer(noise).rejected.float().mean()) == 1


def test_magnet_in_colour_compares_the_classifiers_words() -> None:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval().requires_grad_(False)
    networks = Autoencoders(Autoencoder(3, pooled=True).eval(), Autoencoder(3, pooled=False).eval())
    split = Split(torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8), torch.zeros(20, dtype=torch.int64))
    answer = magnet(classifier, networks, split, drop_rate=0.0).answer(split.images)
    assert not answer.rejected.any()
    assert answer.classes.shape == (20,)


# Adversarial training


def test_adversarial_training_helps_against_its_own_attack(dataset: Dataset, tmp_path: Path) -> None:
    train, test = dataset.train, dataset.test
    both = Split(torch.cat([train.images, test.images]), torch.cat([train.labels, test.labels]))
    everything = Dataset("fashion_mnist", both, dataset.validation, test, dataset.class_names)
    settings = AdversarialSettings("pgd", epsilon=0.1, epochs=25, batch_size=50, learning_rate=2e-3)
    robust, finished = train_adversarially(everything, "E", settings, tmp_path)
    assert finished
    torch.manual_seed(0)
    plain = build("E").requires_grad_(True).train()
    optimizer = torch.optim.Adam(plain.parameters(), 2e-3)
    for _ in range(100):
        loss = nn.functional.cross_entropy(plain(to_float(everything.train.images)), everything.train.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain.eval().requires_grad_(False)
    accuracies = [
        measure(bare(network), attack_all(FGSM(0.1), network, test), test.labels).accuracy
        for network in (robust, plain)
    ]
    assert accuracies[0] > accuracies[1] + 20


# Defense-GAN's generator


def test_gradient_penalty_of_a_linear_critic() -> None:
    """A linear critic has the same gradient everywhere: its weights."""

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x[:, 0, 0, 0] + 4 * x[:, 0, 1, 1]

    real, made = torch.rand(6, 1, 2, 2), torch.rand(6, 1, 2, 2)
    assert float(gradient_penalty(Linear(), real, made, torch.rand(6))) == pytest.approx((5 - 1) ** 2)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 64)], ids=["28", "rgb32", "rgb64"])
def test_critic_and_generator_fit_each_other(channels: int, size: int) -> None:
    made = Generator(8, channels=channels, size=size)(torch.randn(2, 8))
    assert made.shape == (2, channels, size, size)
    assert Critic(channels, size)(made).shape == (2,)


def test_there_is_no_generator_for_other_sizes() -> None:
    with pytest.raises(ValueError, match="a side of 28, 32, 64, 128"):
        Generator(size=48)


def test_the_generator_learns_the_images(dataset: Dataset, tmp_path: Path, classifier_d: nn.Module) -> None:
    """A constant image is all there is to learn: a few steps bring the generator's images closer to it."""
    images = torch.full((60, 1, 28, 28), 25, dtype=torch.uint8)
    split = Split(images, torch.zeros(60, dtype=torch.int64))
    dark = Dataset("dark", split, split, split, dataset.class_names)
    settings = GanSettings(steps=12, batch_size=8, critic_steps=2, learning_rate=1e-3, latent_dim=8)
    generator, finished = train_generator(dark, settings, tmp_path, report_every=6)
    assert finished
    z = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    untrained = Generator(8, settings.seed)(z)
    wanted = to_float(images[:8])
    assert (generator(z) - wanted).square().mean() < 0.5 * (untrained - wanted).square().mean()
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12]
    again = load_generator(tmp_path / GENERATOR_FILE)
    torch.testing.assert_close(again(z), generator(z))
    defence = defense_gan(classifier_d, again, steps=2, restarts=2)
    assert defence.answer(images[:3]).classes.shape == (3,)


def test_every_weight_of_generator_and_critic_learns_in_bf16(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The double backward of the gradient penalty reaches all of the critic, the critic's word all of the generator."""
    monkeypatch.setattr(wgan, "autocast", functools.partial(precision.autocast, amp="bf16"))
    tensors = []
    for steps in (1, 2):
        out = tmp_path / str(steps)
        train_generator(dataset, GanSettings(steps=steps, batch_size=2, critic_steps=1, latent_dim=4), out)
        tensors.append(load_file(out / STATE_FILE))
    before, after = tensors
    weights = [name for name in before if name.startswith(("generator.", "critic.")) and name.endswith("weight")]
    assert len(weights) == 8
    assert not any(torch.equal(before[name], after[name]) for name in weights)


# Settings, files, commands


@pytest.mark.parametrize(
    "make",
    [
        lambda: RetrainSettings(epochs=0),
        lambda: RetrainSettings(learning_rate=0.0),
        lambda: FinetuneSettings(classifier_weight=-1.0),
        lambda: FinetuneSettings(kl_weight=math.nan),
        lambda: AdversarialSettings("cw"),
        lambda: AdversarialSettings(epsilon=0.0),
        lambda: MagNetSettings(noise=-1.0),
        lambda: GanSettings(steps=0),
        lambda: GanSettings(penalty=math.inf),
    ],
)
def test_bad_settings(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize("load", [load_magnet, load_generator], ids=["magnet", "generator"])
def test_damaged_files(load: Callable[[Path], object], checkpoint_path: Path, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(b"\x00" * 40)
    for path in (tmp_path / "noise", checkpoint_path, tmp_path / "nothing"):
        with pytest.raises(ValueError, match=r"train (them|it) again"):
            load(path)


MY_CLASSIFIER = """
import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 2))
"""


@pytest.fixture
def my_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint) -> Path:
    """A user's folder of images, classifier and purifier, in the current folder."""
    for name, level in (("dark", 60), ("light", 190)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("L", (28, 28), level + number).save(folder / f"{number}.png")
    (tmp_path / "my_defended.py").write_text(MY_CLASSIFIER)
    save_checkpoint(tmp_path / "purifier.safetensors", checkpoint)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fit_retrain_and_finetune_a_classifier_of_ones_own(my_images: Path) -> None:
    shared = ["images", "--classifier", "my_defended:make", "--steps", "2", "--noise", "0.25"]
    result = CliRunner().invoke(cli, ["fit", *shared, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    purifier = my_images / "runs" / "images-quick" / CHECKPOINT_FILE
    assert load_checkpoint(purifier).recipe["noise"] == 0.25
    common = [*shared, "--checkpoint", str(purifier)]
    result = CliRunner().invoke(cli, ["retrain", *common, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rec = my_images / "runs" / "images-rec"
    rows = json.loads((rec / defence_commands.REPORT_FILE).read_text())["rows"]
    assert {row["defence"] for row in rows} == {"no_defense", "defense_vae", "retrained"}
    assert {row["attack"] for row in rows} == {"clean", "fgsm", "rand_fgsm", "cw"}
    # Its owner loads it without this library.
    mine = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))
    mine.load_state_dict(load_file(rec / CLASSIFIER_FILE))
    start = ["--start", str(rec / CLASSIFIER_FILE), "--lambda", "5"]
    result = CliRunner().invoke(cli, ["finetune", *common, *start, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    e2e = my_images / "runs" / "images-e2e"
    recipe = load_checkpoint(e2e / CHECKPOINT_FILE).recipe
    assert recipe["classifier_weight"] == 5.0
    assert recipe["pairs"]["noise"] == 0.25
    mine.load_state_dict(load_file(e2e / CLASSIFIER_FILE))


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["magnet", "images", "--epochs", "1"], MAGNET_FILE),
        (["adversarial", "images", "--epochs", "1"], CLASSIFIER_FILE),
        (["defense-gan", "images", "--steps", "1", "--search-steps", "1", "--restarts", "1", "--latent-dim", "2",
          "--report-images", "2"], GENERATOR_FILE),
    ],
    ids=["magnet", "adversarial", "defense-gan"],
)  # fmt: skip
def test_commands_of_the_baselines(command: list[str], file: str, my_images: Path) -> None:
    arguments = [*command, "--classifier", "my_defended:make", "--device", "cpu", "--out", "out"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (my_images / "out" / file).exists()
    assert json.loads((my_images / "out" / defence_commands.REPORT_FILE).read_text())["split"] == "validation"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrain", "images"], "name your own with --checkpoint"),
        (["retrain", "images", "--checkpoint", "fashion_mnist", "--classifier", "my_defended:none"], "AttributeError"),
        (["finetune", "images", "--from-scratch", "--start", "my_defended.py"], "got both"),
        (["finetune", "images", "--lambda", "-1", "--checkpoint", "purifier.safetensors"], "expected at least 0"),
        (["adversarial", "images", "--epsilon", "2"], "expected above 0 and at most 1"),
        (["magnet", "nowhere"], "expected one of"),
    ],
    ids=["checkpoint", "classifier", "both", "lambda", "epsilon", "data"],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, my_images: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
