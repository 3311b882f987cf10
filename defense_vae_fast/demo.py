"""What the ``demo`` command does: attacked test images through the shipped purifier, in numbers and in a picture.

Needs neither PyTorch nor a GPU: the classifier is a small ONNX file that OpenVINO runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from defense_vae_fast import checkpoint, contact_sheet

if TYPE_CHECKING:
    from defense_vae_fast.purifier import Purifier

Array = npt.NDArray[Any]

# Data sets whose purifier, classifier and attacked images come with the library, and what they are called.
DATASETS = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST"}
# Key in the packaged file -> what tables and pictures call it; the first is no attack.
TITLES = {"clean": "clean", "fgsm": "FGSM 0.3", "rand_fgsm": "RAND-FGSM 0.3", "cw": "CW-L2"}
COLUMNS_PER_ATTACK = 4
_LATENCY_BUDGET = 0.5  # seconds of measuring per batch size
SHEET_TITLE = "Defense-VAE: attacked images, purified"
SHEET_NOTE = (
    "Under each image: what the classifier sees; green is right, red with a cross is wrong. "
    "The attacks know the classifier, not the purifier. Images chosen by class, not by outcome."
)


@dataclass(frozen=True)
class Samples:
    """Test images, attacked on the bare shipped classifier and rounded to uint8.

    Attributes:
        labels: (N,) uint8, the true classes.
        class_names: a name per class.
        images: for each key of :data:`TITLES` uint8 (N, H, W, C) in 0..255.
    """

    labels: Array
    class_names: tuple[str, ...]
    images: Mapping[str, Array]


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies in percent."""

    title: str
    images: int
    before: float
    after: float


@dataclass(frozen=True)
class Result:
    """Everything that the command prints.

    Attributes:
        dataset: name of the data set.
        rows: a line for clean images and one for each attack.
        latencies: median seconds per image by batch size.
        info: the purifier's own account of itself.
        sheet: where the picture was written.
    """

    dataset: str
    rows: tuple[Row, ...]
    latencies: Mapping[int, float]
    info: Mapping[str, Any]
    sheet: Path


def run(output: Path, dataset: str = "fashion_mnist", *, engine: str = "auto") -> Result:
    """Purify the packaged samples, measure, and write the contact sheet.

    Args:
        output: where the picture goes; the suffix says the format. An older picture is replaced.
        dataset: one of :data:`DATASETS`.
        engine: as in ``Purifier.from_pretrained``.

    Raises:
        ValueError: no such data set comes with the library, or the suffix of ``output`` is not that of an image.
        FileNotFoundError: the installation lacks the packaged samples, classifier or purifier.
        EngineUnavailable: the engine does not work on this machine.
    """
    from defense_vae_fast.purifier import Purifier

    if dataset not in DATASETS:
        raise ValueError(f"demo: expected one of {', '.join(DATASETS)}, got {dataset!r}")
    contact_sheet.check_suffix(output)
    samples = load_samples(dataset)
    classify = load_classifier(dataset)
    with Purifier.from_pretrained(dataset, engine=engine) as purifier:
        purified = {key: purifier(images) for key, images in samples.images.items()}
        latencies = {batch: median_latency(purifier, samples.images["clean"], batch) for batch in (1, 64)}
        info = purifier.info()
    before = {key: classify(images) for key, images in samples.images.items()}
    after = {key: classify(images) for key, images in purified.items()}
    rows = tuple(
        Row(title, len(samples.labels), _accuracy(before[key], samples.labels), _accuracy(after[key], samples.labels))
        for key, title in TITLES.items()
    )
    contact_sheet.write(output, _groups(samples, purified, before, after), title=SHEET_TITLE, note=SHEET_NOTE)
    return Result(dataset, rows, latencies, info, output)


def load_samples(dataset: str) -> Samples:
    """The packaged test images of a data set."""
    path = checkpoint.WEIGHTS_FOLDER / f"{dataset}_demo.npz"
    if not path.is_file():
        raise FileNotFoundError(f"expected the demo's images at {path}, found none; install the package again")
    with np.load(path, allow_pickle=False) as archive:
        images = {key: archive[key] for key in TITLES}
        return Samples(
            archive["labels"],
            tuple(str(name) for name in archive["class_names"]),
            {key: array.reshape(*array.shape[:3], -1) for key, array in images.items()},
        )


def load_classifier(dataset: str) -> Callable[[Array], Array]:
    """The packaged classifier of a data set: uint8 (N, H, W, C) to (N,) predicted classes."""
    from defense_vae_fast.engines.openvino import openvino_core

    path = checkpoint.pretrained_classifier(dataset)
    model = openvino_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def classify(images: Array) -> Array:
        logits: Array = np.asarray(model(np.ascontiguousarray(images))[0])
        classes: Array = logits.argmax(axis=1)
        return classes

    return classify


def _accuracy(predicted: Array, labels: Array) -> float:
    return 100 * float((predicted == labels).mean())


def median_latency(purifier: Purifier, images: Array, batch: int) -> float:
    """Median seconds per image of calls with ``batch`` images each, every call on other images than the last."""
    most, least = (200, 10) if batch == 1 else (20, 3)
    starts = [index * batch % (len(images) - batch + 1) for index in range(most)]
    batches = [np.ascontiguousarray(images[start : start + batch]) for start in starts]
    for warm_up in batches[:2]:
        purifier(warm_up)
    seconds: list[float] = []
    for images_of_call in batches:
        # On a slow or busy machine fewer calls must do: this is a demo, the benchmarks measure with care.
        if sum(seconds) > _LATENCY_BUDGET and len(seconds) >= least:
            break
        began = time.perf_counter()
        purifier(images_of_call)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds)) / batch


def choose_columns(labels: Array, count: int) -> list[int]:
    """Indices of ``count`` different images, class after class in turn, the first unused one of each."""
    queues = [list(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    chosen: list[int] = []
    while len(chosen) < min(count, len(labels)):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(int(queue.pop(0)))
    return chosen


def _groups(
    samples: Samples, purified: Mapping[str, Array], before: Mapping[str, Array], after: Mapping[str, Array]
) -> list[contact_sheet.Group]:
    """Columns of the picture by attack: chosen by class and place alone, never by how they came out."""

    def cell(pixels: Array, index: int, verdict: int) -> contact_sheet.Cell:
        return contact_sheet.Cell(pixels[index], samples.class_names[verdict], verdict == int(samples.labels[index]))

    attacks = [key for key in TITLES if key != "clean"]
    chosen = choose_columns(samples.labels, len(attacks) * COLUMNS_PER_ATTACK)
    groups = []
    for number, key in enumerate(attacks):
        columns = [
            (
                cell(samples.images["clean"], index, int(before["clean"][index])),
                cell(samples.images[key], index, int(before[key][index])),
                cell(purified[key], index, int(after[key][index])),
            )
            for index in chosen[number * COLUMNS_PER_ATTACK : (number + 1) * COLUMNS_PER_ATTACK]
        ]
        groups.append(contact_sheet.Group(TITLES[key], columns))
    return groups
