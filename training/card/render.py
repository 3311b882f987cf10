"""A robustness card as Markdown with pictures beside it, and as one HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from defense_vae_fast.atomic import replacing
from training.experiments.figures import save_grid

THREATS = """\
Every number on this page belongs to one of four attackers. **None**: clean images, and damage that nobody made on \
purpose. **Oblivious**: knows the classifier and its weights, not that a purifier stands in front (the paper's \
"white-box"). **Black-box**: may ask the bare classifier for the class of an image, and attacks a substitute of \
their own. **Adaptive**: knows classifier, purifier and detector, and takes gradients through all of it. What \
matters against somebody who means it is the adaptive attacker. Perturbations are bounded in L-infinity by \
epsilon, in pixel units of [0, 1], except those of CW and DeepFool, which have no bound; images stay in [0, 1]. \
Adaptive attacks work on float images, which gives the attacker a little more than 8 bits would."""
CARD_FILE, PAGE_FILE, JSON_FILE = "CARD.md", "card.html", "card.json"


@dataclass(frozen=True)
class Heading:
    """A heading of a level."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text in which **bold** and `code` mean what they mean in Markdown."""

    text: str


@dataclass(frozen=True)
class Grid:
    """A table; the first row is its header."""

    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file of the card's folder."""

    file: str
    text: str


Block = Heading | Paragraph | Grid | Picture


def write_card(card: dict[str, Any], pictures: dict[str, list[Tensor]], out: Path, title: str) -> None:
    """Write ``CARD.md``, ``card.html``, ``card.json`` and their pictures into ``out``.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    blocks = blocks_of(card, title)
    for name, section in card["classifiers"].items():
        _plot_sweeps(section, out / _file("sweep", name), name)
        _plot_roc(section, out / _file("roc", name), name)
        save_grid(pictures[name], out / _file("pictures", name))
    for file, text in (
        (JSON_FILE, json.dumps(card, indent=1) + "\n"),
        (CARD_FILE, to_markdown(blocks)),
        (PAGE_FILE, to_html(blocks, out, title)),
    ):
        with replacing(out / file) as handle:
            handle.write(text.encode())


def blocks_of(card: dict[str, Any], title: str) -> list[Block]:
    """The page, top to bottom."""
    images = card["images"]
    blocks: list[Block] = [
        Heading(1, f"Robustness card: {title}"),
        Paragraph(
            f"Checkpoint `{card['checkpoint'][:16]}`, {card['dataset']}; {images['adaptive']} test images for adaptive "
            f"attacks, {images['oblivious']} for everything else. Accuracies in percent. Measured on {card['device']}, "
            f"{card['machine']['date'][:10]}, commit {card['machine']['commit'] or 'unknown'}; every number is in "
            f"`{JSON_FILE}`."
        ),
        Heading(2, "Who attacks"), Paragraph(THREATS), Heading(2, "Where it fails"),
        *(Paragraph(f"**{name}**: {failure(section)}") for name, section in card["classifiers"].items()),
        Heading(2, "At a glance"), Grid(_glance(card)),
    ]  # fmt: skip
    for name, section in card["classifiers"].items():
        blocks += _classifier(name, section, card["settings"])
    return blocks


def failure(section: dict[str, Any]) -> str:
    """In words, from the numbers: where the adaptive attacker has won."""
    worst, bare = section["adaptive"]["worst"], section["bare"]["worst"]
    clean = float(section["adaptive"]["clean"])
    halved = next((epsilon for epsilon, value in worst.items() if value < clean / 2), None)
    gone = next((epsilon for epsilon, value in worst.items() if value < 1), None)
    said = [
        f"an adaptive attacker halves the accuracy of {clean:.1f} % at epsilon {halved}"
        if halved
        else f"an adaptive attacker does not halve the accuracy of {clean:.1f} % up to epsilon {list(worst)[-1]}"
    ]
    said[0] += f" and leaves less than 1 % at {gone}." if gone else "."
    best = max(worst, key=lambda epsilon: worst[epsilon] - bare[epsilon])
    gain = worst[best] - bare[best]
    said.append(
        f"The most that the purifier gains over the bare classifier against such an attacker is {gain:.1f} points, "
        f"at epsilon {best}."
        if gain > 0
        else "The purifier gains nothing over the bare classifier against such an attacker."
    )
    fooled = section["detector"]["fooled"]
    epsilon, most = max(fooled.items(), key=lambda item: float(item[1]["both"]))
    said.append(
        f"An attack on classifier and detector together fools both on up to {most['both']:.1f} % of the images, "
        f"at epsilon {epsilon}."
    )
    if failed := [check["name"] for check in section["checks"] if not check["passed"]]:
        said.append(f"Checks that did not pass, so that the adaptive numbers may flatter: {', '.join(failed)}.")
    lost = section["clean"]["bare"] - section["clean"]["purified"]
    said.append(f"Clean images lose {lost:.2f} points.")
    return " ".join(said)


def _glance(card: dict[str, Any]) -> list[list[str]]:
    sections = list(card["classifiers"].values())

    def row(attacker: str, what: str, value: Callable[[dict[str, Any]], float]) -> list[str]:
        return [attacker, what, *(_n(value(section)) for section in sections)]

    def worst(column: str) -> Callable[[dict[str, Any]], float]:
        return lambda section: min(found[column] for found in section["oblivious"].values())

    return [
        ["attacker", "images", *card["classifiers"]],
        row("none", "clean, bare", lambda s: s["clean"]["bare"]),
        row("none", "clean, purified", lambda s: s["clean"]["purified"]),
        row("oblivious", "worst attack, bare", worst("bare")),
        row("oblivious", "worst attack, purified", worst("purified")),
        row("black-box", "FGSM 0.3, bare", lambda s: s["black_box"]["bare"]),
        row("black-box", "FGSM 0.3, purified", lambda s: s["black_box"]["purified"]),
        *(
            row("adaptive", f"epsilon {epsilon}", lambda s, epsilon=epsilon: s["adaptive"]["worst"][epsilon])  # type: ignore[misc]
            for epsilon in sections[0]["adaptive"]["worst"]
        ),
    ]


def _classifier(name: str, section: dict[str, Any], settings: dict[str, Any]) -> list[Block]:
    draws = settings["draws"]
    latent = (
        f"The latent is sampled; gradients are of the mean over {draws} draws."
        if draws
        else "The latent is its mean: nothing is random."
    )
    robust = section.get("adversarially_trained")
    columns = [
        "epsilon",
        "pipeline, worst case",
        "bare classifier, worst case",
        *(["adversarially trained"] if robust else []),
    ]
    rows = [columns]
    for epsilon, value in section["adaptive"]["worst"].items():
        others = [section["bare"]["worst"][epsilon], *([robust["worst"][epsilon]] if robust else [])]
        rows.append([epsilon, _n(value), *map(_n, others)])
    attacks = list(next(iter(section["adaptive"]["after"].values())))
    steps = [["epsilon", *attacks]]
    steps += [[e, *(_n(values[a]) for a in attacks)] for e, values in section["adaptive"]["after"].items()]
    oblivious = [["attack", "bare", "purified", "kind held out of training"]]
    held = {True: "yes", False: "no", None: "the header does not say"}
    oblivious += [[a, _n(v["bare"]), _n(v["purified"]), held[v["held_out"]]] for a, v in section["oblivious"].items()]
    oblivious.append(["black-box FGSM 0.3", _n(section["black_box"]["bare"]), _n(section["black_box"]["purified"]), ""])
    damage = [["damage", "bare", "purified"]]
    damage += [[d, _n(v["bare"]), _n(v["purified"])] for d, v in section["corruptions"].items()]
    detector = section["detector"]
    curves = [["attack", "area under the ROC", "caught at the threshold"]]
    curves += [[a, f"{v['area']:.3f}", _n(v["caught"])] for a, v in detector["attacks"].items()]
    fooled = [["epsilon", "classifier fooled", "classifier and detector fooled"]]
    fooled += [[e, _n(v["classifier"]), _n(v["both"])] for e, v in detector["fooled"].items()]
    epsilons = list(section["adaptive"]["worst"])
    engines = [["", *(f"epsilon {e}" for e in epsilons)]]
    for engine, found in section["engines"].items():
        texts = [_n(found[e]) for e in epsilons] if isinstance(found, dict) else [found, *[""] * (len(epsilons) - 1)]
        engines.append([engine, *texts])
    checks = [["check", "passed", "seen"]]
    checks += [[c["name"], "yes" if c["passed"] else "**no**", c["found"]] for c in section["checks"]]
    adversarial = (
        [Paragraph(f"The adversarially trained classifier is right on {robust['accuracy']:.2f} % of the clean images.")]
        if robust else []
    )  # fmt: skip
    return [
        Heading(2, f"Classifier {name}"),
        Heading(3, "Adaptive: through the whole pipeline"),
        Paragraph(f"An image counts as withstood when none of the attacks fools the pipeline on it. {latent}"),
        Grid(rows), *adversarial, Picture(_file("sweep", name), f"Accuracy against epsilon, {name}"),
        Paragraph("The same, after each attack in turn; each was run on the images that were left:"), Grid(steps),
        Paragraph(
            "Clean images; then for each epsilon the attacked and the purified ones. What fell at a smaller epsilon is "
            "shown as it fell there."
        ),
        Picture(_file("pictures", name), f"Clean, attacked and purified images, {name}"),
        Heading(3, "Oblivious and black-box"), Grid(oblivious),
        Heading(3, "Damage that nobody made on purpose"), Grid(damage),
        Heading(3, "The score as a detector"),
        Paragraph(
            f"Threshold from clean validation images, for {detector['false_alarms_wanted']:g} % false alarms; on clean "
            f"test images it raises {detector['false_alarms']:.2f} %. "
            "Caught: oblivious attacks above the threshold. Fooled: by one adaptive attack that looks at the score "
            "too; images that are wrong without an attack are among them."
        ),
        Grid(curves), Picture(_file("roc", name), f"ROC of the score, {name}"), Grid(fooled),
        Heading(3, "Engines on the same attacked images"),
        Paragraph("Attacked on the float32 module, rounded to 8 bits, then purified by each engine:"), Grid(engines),
        Heading(3, "Checks of the attacks"), Grid(checks),
    ]  # fmt: skip


def to_markdown(blocks: Sequence[Block]) -> str:
    """The page as Markdown."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Paragraph):
            parts.append(block.text)
        elif isinstance(block, Picture):
            parts.append(f"![{block.text}]({block.file})")
        else:
            header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in block.rows]
            lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
            parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(parts) + "\n"


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}img{max-width:100%}"
)


def to_html(blocks: Sequence[Block], folder: Path, title: str) -> str:
    """The page as one HTML file, with its pictures inside."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
        elif isinstance(block, Paragraph):
            parts.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Picture):
            data = base64.b64encode((folder / block.file).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(block.text)}" src="data:image/png;base64,{data}">')
        else:
            rows = []
            for number, row in enumerate(block.rows):
                tag = "td" if number else "th"
                rows.append("<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in row) + "</tr>")
            parts.append(f"<table>{''.join(rows)}</table>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _inline(text: str) -> str:
    """Escape, then set **bold** and `code`."""
    escaped = html.escape(text)
    for mark, tag in (("**", "b"), ("`", "code")):
        pieces = escaped.split(mark)
        escaped = "".join(
            piece if index % 2 == 0 else f"<{tag}>{piece}</{tag}>" for index, piece in enumerate(pieces)
        )  # fmt: skip
    return escaped


def _file(kind: str, name: str) -> str:
    return f"{kind}_{''.join(c if c.isalnum() else '_' for c in name)}.png"


def _n(value: float) -> str:
    return f"{value:.1f}"


def _plot_sweeps(section: dict[str, Any], path: Path, name: str) -> None:
    lines = {"pipeline, adaptive": section["adaptive"], "bare classifier": section["bare"]}
    if "adversarially_trained" in section:
        lines["adversarially trained"] = section["adversarially_trained"]
    curves = {
        label: ([0.0, *map(float, line["worst"])], [line["clean"], *line["worst"].values()])
        for label, line in lines.items()
    }
    _plot(path, curves, "epsilon (L-infinity)", "accuracy in %", f"Worst case over all attacks, {name}")


def _plot_roc(section: dict[str, Any], path: Path, name: str) -> None:
    curves = {
        f"{attack} ({value['area']:.2f})": (value["false_alarms_line"], value["caught_line"])
        for attack, value in section["detector"]["attacks"].items()
    }
    _plot(path, curves, "share of clean images above the threshold", "share of attacked ones", f"Score, {name}")


def _plot(path: Path, curves: dict[str, tuple[list[float], list[float]]], x: str, y: str, title: str) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise RuntimeError("the card's plots need matplotlib; install it with: pip install '.[card]'") from error
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for label, (across, up) in curves.items():
        axes.plot(across, up, label=label, marker="." if len(across) < 20 else None)
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.legend(fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
