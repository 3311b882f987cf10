"""The command ``defense-vae-fast``.

Options and messages live here; the work is in :mod:`~defense_vae_fast.demo` and :mod:`~defense_vae_fast.purify`. Those,
rich and the engines are imported by the command that needs them, so that ``--help`` is quick.

Exit codes: 0 all is well; 1 some files failed and the rest were done; 2 wrong usage, or nothing could be done;
130 interrupted.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from types import ModuleType

    from rich.console import Console

    from defense_vae_fast.demo import Result
    from defense_vae_fast.files import Job
    from defense_vae_fast.integrations.ray_bulk import Done
    from defense_vae_fast.integrations.ray_bulk import Report as BulkReport
    from defense_vae_fast.purifier import Purifier
    from defense_vae_fast.purify import Report
    from defense_vae_fast.regions import Method
    from defense_vae_fast.video import Report as VideoReport

PROGRAM = "defense-vae-fast"
EXIT_SOME_FAILED, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130


class _Group(click.Group):
    """A group whose errors are one line on stderr and exit code 2, with a traceback only after ``--debug``."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit; without ``standalone_mode`` return its code and let errors through."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        _print_any_name()
        words = list(sys.argv[1:] if args is None else args)
        # By the word alone: a failure while the options are being read must honour it too.
        debug = "--debug" in words
        try:
            code = super().main(words, prog_name, complete_var, False, obj=debug, **extra)
        except click.Abort:  # click's name for Ctrl-C and for a closed terminal
            click.echo("interrupted", err=True)
            code = EXIT_INTERRUPTED
        except click.ClickException as error:
            _say(_usage_message(error))
            code = EXIT_ERROR
        except Exception as error:
            if debug:
                traceback.print_exc()
            expected = isinstance(error, ValueError | TypeError | OSError | RuntimeError | ImportError)
            hint = "" if expected else "; this is a bug, run it again with --debug for the traceback"
            _say(f"{_one_line(error)}{hint}")
            code = EXIT_ERROR
        sys.exit(code if isinstance(code, int) else 0)


class _Path(click.Path):
    """A path that is not empty: "" would be the current folder, and is a shell variable that was never set."""

    def __init__(self, *, dir_okay: bool = True) -> None:
        super().__init__(path_type=Path, dir_okay=dir_okay)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As in click, for all but the empty string."""
        if value == "":
            self.fail("expected a path, got an empty one; is a shell variable unset?", param, ctx)
        return super().convert(value, param, ctx)


def _numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> list[float] | None:
    """Numbers with commas between them."""
    try:
        return None if text is None else [float(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"expected numbers with commas between them, such as 0.5,0.5,0.5, got {text!r}", context, parameter
        ) from None


def _pairs(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE words as a dictionary."""
    for word in words:
        if not word.partition("=")[0] or "=" not in word:
            raise click.BadParameter(f"expected KEY=VALUE, got {word!r}", context, parameter)
    return dict(word.split("=", 1) for word in words)


def _print_any_name() -> None:
    """Let stdout escape what its encoding lacks: a file's name may be any bytes, and to print it must not fail."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _usage_message(error: click.ClickException) -> str:
    message = error.format_message()
    context = getattr(error, "ctx", None)
    return f"{message} See '{context.command_path} --help'." if context is not None else message


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _say(message: str) -> None:
    click.echo(f"{PROGRAM}: {' '.join(message.split())}", err=True)


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import defense_vae_fast

        click.echo(f"{PROGRAM} {defense_vae_fast.__version__}")
        context.exit()


_debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
_checkpoint = click.option(
    "--checkpoint", "-c", default="fashion_mnist", show_default=True, metavar="NAME|FILE",
    help="A shipped purifier by name, or a .safetensors file.",
)  # fmt: skip
_engine = click.option(
    "--engine", default="auto", show_default=True, metavar="NAME", help="What computes; 'info' lists what works here."
)


@click.group(
    cls=_Group,
    name=PROGRAM,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    epilog=f"""\b
Examples:
  {PROGRAM} demo
  {PROGRAM} purify photos/ -o clean/
  {PROGRAM} info""",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@_debug
@click.pass_context
def main(context: click.Context) -> None:
    """Remove known adversarial perturbations from images before a classifier sees them.

    Not a wall against an attacker who knows that the purifier is there.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(EXIT_ERROR)


@main.command(
    short_help="See it at work on attacked test images.",
    epilog=f"""\b
Examples:
  {PROGRAM} demo
  {PROGRAM} demo mnist --output sheets/today.png""",
)
@click.argument("dataset", default="fashion_mnist")
@click.option(
    "--output", "-o", type=_Path(dir_okay=False), default=Path("purified.png"), show_default=True,
    help="The contact sheet; an older one is replaced.",
)  # fmt: skip
@_engine
@_debug
def demo(dataset: str, output: Path, engine: str) -> None:
    """Purify attacked test images of DATASET, fashion_mnist or mnist, that come with the library.

    Prints the shipped classifier's accuracy before and after purification and the time per image, and writes a contact
    sheet. Needs no network, no PyTorch and no GPU.
    """
    from defense_vae_fast import demo as work

    _print_demo(work.run(output, dataset, engine=engine))


def _print_demo(result: Result) -> None:
    from rich.table import Table

    from defense_vae_fast.demo import DATASETS

    console = _console()
    title = f"{DATASETS[result.dataset]} test images: accuracy of the shipped classifier"
    table = Table(title=title, title_justify="left")
    table.add_column("images")
    for heading in ("number", "as they are", "purified"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(row.title, str(row.images), f"{row.before:.1f} %", f"{row.after:.1f} %")
    console.print(table)
    console.print(
        "These attacks are oblivious: made on the bare classifier, without knowledge of the purifier. "
        "Against an attacker who knows it, this is no promise."
    )
    console.print()
    times = ", ".join(f"{1e3 * seconds:.3f} ms at batch {batch}" for batch, seconds in result.latencies.items())
    console.print(f"time per image (median): {times}")
    state = result.info
    console.print(f"engine: {state['engine']} on {state['device']} in {state['precision']}, {state['why']}")
    for name, reason in _engine_states().items():
        console.print(f"  {name}: {reason}")
    console.print(f"contact sheet: {result.sheet}")


@main.command(
    epilog=f"""\b
Examples:
  {PROGRAM} purify shoe.png bag.png -o clean/
  {PROGRAM} purify photos/ -o clean/ --scores scores.csv
  {PROGRAM} purify frames.npy sets.npz -o clean/ --force
  {PROGRAM} purify photos/ -o clean/ --checkpoint mine.safetensors

\b
Exit codes:
  0  every file was purified
  1  some files failed, each reported on stderr; the rest were done
  2  wrong usage, or nothing could be done"""
)
@click.argument("inputs", nargs=-1, required=True, type=_Path(), metavar="IN...")
@click.option(
    "--output", "-o", required=True, type=_Path(), metavar="DIR",
    help="Folder for the results; made if it is not there.",
)  # fmt: skip
@_checkpoint
@_engine
@click.option(
    "--precision", default="auto", show_default=True, metavar="NAME",
    help="Arithmetic of the engine, for example fp32 or bf16.",
)  # fmt: skip
@click.option(
    "--scores", type=_Path(dir_okay=False), metavar="FILE.csv",
    help="Also write how much each image changed, as CSV: its name and the mean absolute change in [0, 1].",
)  # fmt: skip
@click.option("--force", "-f", is_flag=True, help="Overwrite results that exist already; inputs are never overwritten.")
@_debug
@click.pass_context
def purify(
    context: click.Context,
    inputs: tuple[Path, ...],
    output: Path,
    checkpoint: str,
    engine: str,
    precision: str,
    scores: Path | None,
    force: bool,
) -> None:
    """Purify image files, folders of them, and numpy arrays.

    IN is an image file (PNG, JPEG, BMP, WebP, TIFF, PGM, PPM), a .npy or .npz file, or a folder, which is searched to
    any depth. Results keep their names below DIR, and their format. JPEG loses a little whenever it is written (quality
    95 here); all other formats are written without loss. Metadata such as EXIF are not kept.

    Images must have the size and the channels that the purifier was trained for; nothing is resized or converted.
    Arrays are uint8 (H, W), (H, W, C), (N, H, W, C) in 0..255, or floating (C, H, W), (N, C, H, W) in [0, 1]; in a .npz
    file every array is purified.
    """
    from defense_vae_fast import files
    from defense_vae_fast import purify as work

    try:
        jobs, problems = files.plan(inputs, output, force=force)
        if scores is not None:
            files.check_extra_output(scores, jobs, force=force)
    except files.PlanError as error:
        raise click.ClickException(str(error)) from error
    if not jobs:
        raise click.ClickException("; ".join(f"{problem.path}: {problem.reason}" for problem in problems))

    # Loaded before anything is written or reported, so that a wrong name is an error of its own and not one per file.
    from defense_vae_fast.purifier import Purifier

    with Purifier.from_pretrained(checkpoint, engine=engine, precision=precision) as purifier:
        for problem in problems:
            _say(f"{problem.path}: {problem.reason}")
        report = _run_with_progress(purifier, jobs, debug=bool(context.obj))
    if scores is not None and report.scores:
        work.write_scores(scores, report.scores)
    failures = len(problems) + len(report.failed)
    click.echo(
        f"{_count(report.images, 'image')} in {_count(report.files, 'file')} purified into {output}"
        + (f"; {_count(failures, 'input')} failed" if failures else "")
    )
    if failures:
        context.exit(EXIT_SOME_FAILED if report.files else EXIT_ERROR)


@main.command(
    short_help="Purify a video, a camera or a network stream.",
    epilog=f"""\b
Examples:
  {PROGRAM} video street.mp4 -o clean.mp4 --boxes detections.jsonl
  {PROGRAM} video street.mp4 -o clean.mp4 --tiles --scores scores.jsonl
  {PROGRAM} video /dev/video0 -o door.mkv --tiles --input-option video_size=640x480
  {PROGRAM} video rtsp://camera/stream -o yard.mkv --tiles --input-option rtsp_transport=tcp

\b
Exit codes:
  0    the whole video was purified
  1    some of it could not be read; the rest was purified and written
  2    wrong usage, or nothing could be done
  130  stopped by Ctrl-C or SIGTERM; what was purified by then was written""",
)
@click.argument("source", metavar="IN")
@click.option("--output", "-o", required=True, type=_Path(), metavar="FILE", help="The video to write.")
@click.option(
    "--boxes", type=_Path(dir_okay=False), metavar="FILE.jsonl",
    help='What to purify: lines {"frame": n, "boxes": [[left, top, right, bottom], ...]}, n from 0; a line without '
    '"frame" is for all frames that have none.',
)  # fmt: skip
@click.option("--tiles", is_flag=True, help="Purify whole frames, in tiles of the purifier's size.")
@click.option("--overlap", type=click.IntRange(0), metavar="PIXELS", help="Of tiles; a quarter of one by default.")
@click.option(
    "--resize", type=click.Choice(["area", "bilinear"]), default="area", show_default=True, help="Of boxes.",
)  # fmt: skip
@click.option(
    "--realtime", is_flag=True,
    help="Take frames at the pace of their times and drop late ones, as with a camera; live sources always are.",
)  # fmt: skip
@click.option(
    "--deadline-ms", type=click.FloatRange(0, min_open=True), default=1000.0, show_default=True, metavar="MS",
    help="In real time, drop a frame that is so late.",
)  # fmt: skip
@click.option("--frames", type=click.IntRange(1), metavar="N", help="Stop after so many frames.")
@click.option(
    "--scores", type=_Path(dir_okay=False), metavar="FILE.jsonl",
    help="Also write how much each box or frame changed, and which frames were dropped, as JSON lines.",
)  # fmt: skip
@click.option(
    "--checkpoint", "-c", default="fashion_mnist", show_default=True, metavar="NAME|FILE",
    help="A shipped purifier by name, or a .safetensors file.",
)  # fmt: skip
@_engine
@click.option(
    "--precision", default="auto", show_default=True, metavar="NAME",
    help="Arithmetic of the engine, for example fp32 or bf16.",
)  # fmt: skip
@click.option("--encoder", metavar="NAME", help="FFmpeg's name of one; that of the source's codec by default.")
@click.option(
    "--encoder-option", "encoder_options", multiple=True, metavar="KEY=VALUE", callback=_pairs,
    help="For the encoder, such as crf=23; may be repeated.",
)  # fmt: skip
@click.option("--input-format", metavar="NAME", help="FFmpeg's name of the source's format, if it must be told.")
@click.option(
    "--input-option", "input_options", multiple=True, metavar="KEY=VALUE", callback=_pairs,
    help="For reading, such as framerate=30; may be repeated.",
)  # fmt: skip
@click.option("--force", "-f", is_flag=True, help="Overwrite results that exist already; inputs are never overwritten.")
@_debug
@click.pass_context
def video(
    context: click.Context,
    source: str,
    output: Path,
    boxes: Path | None,
    tiles: bool,
    overlap: int | None,
    resize: Method,
    realtime: bool,
    deadline_ms: float,
    frames: int | None,
    scores: Path | None,
    checkpoint: str,
    engine: str,
    precision: str,
    encoder: str | None,
    encoder_options: dict[str, str],
    input_format: str | None,
    input_options: dict[str, str],
    force: bool,
) -> None:
    """Purify a video and write it with the times of its frames.

    IN is a file, a camera (/dev/video0), or a URL (rtsp, http and what else FFmpeg opens). The suffix of FILE says its
    format: .mp4, .m4v, .mov, .mkv, .webm or .ts. The codec stays, where that format takes it; the first audio stream
    of a file is copied. Needs the extra "video".

    A purifier of grey images reads frames as grey, and the result is grey: no colour comes through unpurified. Frames
    are turned upright where their metadata say so, and boxes are in pixels of the upright frame.

    Ctrl-C ends the reading, finishes FILE with what has been purified, and exits with 130; a second one leaves no FILE.
    """
    from defense_vae_fast import video as work
    from defense_vae_fast.boxes_file import Boxes
    from defense_vae_fast.files import PlanError

    if boxes is not None and tiles:
        raise click.UsageError("expected --boxes or --tiles, got both", context)
    if overlap is not None and not tiles:
        raise click.UsageError("--overlap: expected with --tiles alone, got it without", context)
    try:
        work.check_output(output, source, boxes, scores, force=force)
    except PlanError as error:
        raise click.ClickException(str(error)) from error
    read = None if boxes is None else Boxes(boxes)

    from defense_vae_fast.purifier import Purifier

    with (
        Purifier.from_pretrained(checkpoint, engine=engine, precision=precision) as purifier,
        _stopping() as stop,
        _video_progress() as progress,
    ):
        report = work.run(
            purifier, source, output,
            boxes=read, tiles=tiles, overlap=overlap, resize=resize, realtime=realtime, deadline_ms=deadline_ms,
            limit=frames, encoder=encoder, encoder_options=encoder_options, input_format=input_format,
            input_options=input_options, scores=scores, note=_say, progress=progress, stop=stop,
        )  # fmt: skip
    _print_video(output, report)
    if report.broken:
        _say(f"{source}: reading ended before its time: {report.broken}")
    if report.stopped:
        click.echo("interrupted", err=True)
        context.exit(EXIT_INTERRUPTED)
    # Whoever joins a stream under way, or listens to one over the air, misses a few.
    if report.broken or ("damaged" in report.dropped and not report.live):
        context.exit(EXIT_SOME_FAILED)


def _print_video(output: Path, report: VideoReport) -> None:
    causes = ", ".join(f"{count:,} {cause}" for cause, count in sorted(report.dropped.items()))
    dropped = sum(report.dropped.values())
    click.echo(
        f"{output}: {_count(report.frames, 'frame')} in, {report.purified:,} purified, "
        f"{report.unchanged:,} without a box, {dropped:,} dropped" + (f" ({causes})" if causes else "")
    )
    rate = (report.purified + report.unchanged) / report.seconds if report.seconds else 0.0
    line = f"{report.seconds:.1f} s, {rate:.1f} frames/s"
    for name, times in (("waiting", report.waiting), ("purifying", report.computing)):
        p50, p99 = times.percentile(50), times.percentile(99)
        if p50 is not None and p99 is not None:
            line += f"; {name} p50 {1e3 * p50:.2f} ms, p99 {1e3 * p99:.2f} ms a frame"
    click.echo(line)
    if report.mean_score is not None:
        click.echo(f"mean score {report.mean_score:.4f} over {_count(report.regions, 'region')}")


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts."""
    stop = threading.Event()

    def handle(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _video_progress() -> Iterator[Callable[[VideoReport], None]]:
    """A bar on a terminal, with frames/s."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = _console(stderr=True)
    columns = (
        BarColumn(), TextColumn("{task.fields[counts]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, counts="")

        def show(report: VideoReport) -> None:
            done = report.purified + report.unchanged
            dropped = sum(report.dropped.values())
            counts = f"{done}{'' if report.total is None else f'/{report.total}'} frames"
            counts += f", {dropped} dropped" if dropped else ""
            counts += f", {done / max(report.seconds, 1e-9):.1f} frames/s"
            bar.update(task, total=report.total, completed=done + dropped, counts=counts)

        yield show


@main.command(
    epilog=f"""\b
Examples:
  {PROGRAM} info"""
)
@_debug
def info() -> None:
    """Show engines, purifiers, the cache folder and versions.

    Says which engines work on this machine and why the others do not.
    """
    import platformdirs

    from defense_vae_fast.checkpoint import list_pretrained

    console = _console()
    console.print("engines, in the order in which 'auto' tries them")
    for name, reason in _engine_states(every=True).items():
        console.print(f"  {name}: {reason}")
    console.print("purifiers that come with the library")
    names = list_pretrained()
    for line in [line for name in names for line in _describe(name)] if names else ["none"]:
        console.print(f"  {line}")
    cache = platformdirs.user_cache_path(PROGRAM)
    cached = [path for path in cache.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in cached) / 1e6
    console.print("cache")
    console.print(
        f"  {cache}: " + (f"{_count(len(cached), 'file')}, {size:,.1f} MB" if cached else "nothing has been cached")
    )
    console.print("versions")
    console.print("  " + ", ".join(f"{name} {version}" for name, version in _versions().items()))


@main.command(
    epilog=f"""\b
Examples:
  {PROGRAM} export fashion_mnist --format onnx -o models/
  {PROGRAM} export mine.safetensors --format tensorrt-rtx -o models/     # no GPU needed
  {PROGRAM} export fashion_mnist --format tensorrt --lean -o models/     # on the GPU that it is for
  {PROGRAM} export fashion_mnist --format onnx --with classifier.onnx --mean 0.5 --std 0.25 -o models/"""
)
@click.argument("checkpoint", metavar="NAME|FILE")
@click.option(
    "--format", "-f", "format_", required=True, type=click.Choice(["onnx", "openvino", "tensorrt", "tensorrt-rtx"]),
    help="What to write.",
)  # fmt: skip
@click.option("--output", "-o", required=True, type=_Path(), metavar="DIR", help="Folder for the files.")
@click.option(
    "--images", "kinds", multiple=True, type=click.Choice(["uint8", "float", "half"]), default=["uint8", "float"],
    show_default=True,
    help="Kind of images; may be repeated. uint8 (N, H, W, C), float or half (N, C, H, W) in [0, 1].",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8", "fp8"]),
    help="fp32 by default, fp16 for TensorRT; int8 or fp8 for checkpoints with scales.",
)  # fmt: skip
@click.option(
    "--max-batch", type=click.IntRange(1, 1 << 16), default=256, show_default=True,
    help="Largest batch of a TensorRT engine.",
)  # fmt: skip
@click.option("--lean", is_flag=True, help="A version-compatible TensorRT engine for the lean runtime.")
@click.option(
    "--compute-capability", "capabilities", multiple=True, metavar="X.Y",
    help="GPUs that a tensorrt-rtx engine is for, such as 8.9; may be repeated; all that it knows by default.",
)  # fmt: skip
@click.option(
    "--with", "classifier", type=_Path(dir_okay=False), metavar="FILE.onnx",
    help="Your classifier, joined behind the purifier: images -> purified, score, logits.",
)  # fmt: skip
@click.option(
    "--mean", callback=_numbers, metavar="X[,X...]",
    help="With --with: what the classifier wants subtracted from pixels in [0, 1], one number a channel.",
)  # fmt: skip
@click.option(
    "--std", callback=_numbers, metavar="X[,X...]", help="With --with: what it wants them divided by afterwards.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files that exist already.")
@_debug
def export(
    checkpoint: str,
    format_: str,
    output: Path,
    kinds: tuple[str, ...],
    precision: str | None,
    max_batch: int,
    lean: bool,
    capabilities: tuple[str, ...],
    classifier: Path | None,
    mean: list[float] | None,
    std: list[float] | None,
    force: bool,
) -> None:
    """Write a purifier for another program or another machine, alone or joined with your classifier.

    A TensorRT engine is three files: the .plan that TensorRT reads, and beside it what is checked before this library
    loads it. Put them into a folder on the other machine and name it in DEFENSE_VAE_FAST_PLANS. One with a classifier
    is for your own program; 'doctor --plan' compares it with float32.

    The classifier is an ONNX file with one input, images of the purifier's size and channels, uint8 or floating, in
    either layout, and one output. It keeps its precision; --precision is the purifier's.
    """
    from defense_vae_fast import export as work

    for kind in dict.fromkeys(kinds):
        done = work.export(
            checkpoint, format_, output, kind,  # type: ignore[arg-type]  # click has checked it
            precision=precision,
            max_batch=max_batch, lean=lean, compute_capabilities=capabilities,
            classifier=classifier, mean=mean, std=std, force=force,
        )  # fmt: skip
        sizes = ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in done.paths)
        click.echo(f"{output}: {sizes}: {done.note}")


@main.command(
    name="triton-repository",
    epilog=f"""\b
Examples:
  {PROGRAM} triton-repository models/
  {PROGRAM} triton-repository models/ -c mine.safetensors --name mine --max-delay 500
  {PROGRAM} triton-repository models/ --name purifier_onnx --backend onnx""",
)
@click.argument("repository", type=_Path(), metavar="DIR")
@_checkpoint
@click.option("--name", default="purifier", show_default=True, help="The model's name, and its folder's.")
@click.option(
    "--backend", type=click.Choice(["python", "onnx", "tensorrt"]), default="python", show_default=True,
    help="What runs it in the server: a Purifier, ONNX Runtime, or TensorRT (written on the GPU that serves it).",
)  # fmt: skip
@click.option(
    "--images", "kind", type=click.Choice(["uint8", "float"]), default="uint8", show_default=True,
    help="What clients send: uint8 (N, H, W, C), or float32 (N, C, H, W) in [0, 1].",
)  # fmt: skip
@_engine
@click.option(
    "--precision", metavar="NAME",
    help="Arithmetic of the engine, or of the graph as in 'export'; the usual one by default.",
)  # fmt: skip
@click.option(
    "--max-batch", type=click.IntRange(1, 1 << 16), default=64, show_default=True, help="Most images of a batch."
)  # fmt: skip
@click.option(
    "--preferred", "preferred", type=click.IntRange(1, 1 << 16), multiple=True, default=(8, 16, 32, 64),
    show_default=True, metavar="N",
    help="Batch size that the server sends off at once; may be repeated.",
)  # fmt: skip
@click.option(
    "--max-delay", "max_delay_us", type=click.IntRange(0, 1 << 30), default=0, show_default=True, metavar="US",
    help="Microseconds that a request waits for others; 0 batches what queues up while the model is busy.",
)  # fmt: skip
@click.option(
    "--max-queue", type=click.IntRange(0, 1 << 30), default=0, show_default=True,
    help="Requests that may wait; more are refused. 0: any number. A limit can cost latency, see docs/serving.md.",
)  # fmt: skip
@click.option(
    "--instances", type=click.IntRange(1, 1024), default=1, show_default=True,
    help="Copies of the model in the server; one uses all of a CPU.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace a model of this name that this command wrote.")
@_debug
def triton_repository(
    repository: Path,
    checkpoint: str,
    name: str,
    backend: str,
    kind: str,
    engine: str,
    precision: str | None,
    max_batch: int,
    preferred: tuple[int, ...],
    max_delay_us: int,
    max_queue: int,
    instances: int,
    force: bool,
) -> None:
    """Write a model for NVIDIA Triton Inference Server.

    DIR is a model repository; other models in it are left alone. The backend 'python' needs this package in the
    server's Python, the others need nothing. See docs/serving.md for how to start the server.
    """
    from defense_vae_fast.integrations import triton_server as work

    written = work.write_model(
        repository, checkpoint, name=name, backend=backend, kind=kind, engine=engine,  # type: ignore[arg-type]  # click
        precision=precision, batching=work.Batching(max_batch, preferred, max_delay_us, max_queue),
        instances=instances, force=force,
    )  # fmt: skip
    click.echo(f"{written}: the model {name!r} for the backend {backend}; start the server with")
    click.echo(f"  tritonserver --model-repository={repository}")


@main.command(
    epilog=f"""\b
Examples:
  {PROGRAM} bulk photos/ clean/
  {PROGRAM} bulk shards/ clean/ -c mine.safetensors --address auto
  {PROGRAM} bulk images.parquet clean/ --column image --key-column id

\b
Exit codes:
  0  every image was purified
  1  some images or shards could not be used, each reported in the output or on stderr; the rest were done
  2  wrong usage, or the work was not finished; the same command goes on from there"""
)
@click.argument("source", type=_Path(), metavar="IN")
@click.argument("output", type=_Path(), metavar="OUT")
@_checkpoint
@_engine
@click.option("--precision", default="auto", show_default=True, metavar="NAME", help="Arithmetic of the engine.")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="Where the engine runs.")
@click.option(
    "--address", metavar="ADDRESS",
    help="A Ray cluster, or 'local' for a new one; by default RAY_ADDRESS, or one that runs here, or a new one.",
)  # fmt: skip
@click.option(
    "--actors", type=click.IntRange(1), metavar="N", help="Engines; by default one a GPU, or one a node without GPUs."
)
@click.option(
    "--encoding", type=click.Choice(["png", "raw"]), default="png", show_default=True,
    help="Images of the output: PNG files, or the bytes of uint8 (H, W, C).",
)  # fmt: skip
@click.option("--column", default="image", show_default=True, help="Column of a Parquet input that holds images.")
@click.option(
    "--key-column", metavar="NAME", help="Column of a Parquet input with their names; row numbers without it."
)
@click.option(
    "--shard-images", type=click.IntRange(1), default=8192, show_default=True,
    help="Image files, or least rows of Parquet, that are done or not done as a whole. A tar is one shard.",
)  # fmt: skip
@click.option("--fail", "fail_on_bad", is_flag=True, help="Stop at the first image that cannot be used.")
@click.option("--force", is_flag=True, help="Remove what runs with other inputs or options left in OUT.")
@_debug
@click.pass_context
def bulk(context: click.Context, /, source: Path, output: Path, **options: Any) -> None:
    """Purify a great many images on the machines of a Ray cluster, or on this one.

    IN is a folder of image files, Parquet files or WebDataset tars, searched to any depth, or one of these. OUT gets a
    Parquet file for each shard of the input, with the columns source, key, image, score and error; every node has to
    see IN and OUT under the same path. What was done before a stop is not done again.
    """
    try:
        from defense_vae_fast.integrations import ray_bulk as work
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pyarrow"):
            raise
        message = f"bulk: {error.name} is not installed; pip install 'defense-vae-fast[ray]'"
        raise click.ClickException(message) from error
    report = _bulk_with_progress(work, source, output, options)
    for done in report.damaged:
        _say(f"{done.title}: {done.error}")
    kept = f", {_count(report.resumed, 'shard')} of them done before" if report.resumed else ""
    click.echo(
        f"{_count(report.images - report.failed, 'image')} in {_count(report.shards - len(report.damaged), 'shard')} "
        f"purified into {output}{kept}"
        + (f"; {_count(report.failed, 'image')} could not be used, see the column 'error'" if report.failed else "")
        + (f"; {_count(len(report.damaged), 'shard')} failed" if report.damaged else "")
    )
    if report.failed or report.damaged:
        context.exit(EXIT_SOME_FAILED)


def _bulk_with_progress(work: ModuleType, source: Path, output: Path, options: dict[str, Any]) -> BulkReport:
    import logging
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong there is in the report
    console = _console(stderr=True)
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("shards, {task.description} eta"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting Ray,", total=None)
        images, begun = 0, time.monotonic()

        def started(report: BulkReport) -> None:
            progress.update(task, total=report.shards, completed=report.resumed)

        def advance(done: Done) -> None:
            nonlocal images
            images += done.images
            rate = images / (time.monotonic() - begun)
            progress.update(task, advance=1, description=f"{images:,} images, {rate:,.0f}/s,")
            for reason in done.reasons:
                _say(reason)
            if done.failed > len(done.reasons):
                _say(f"{done.title}: and {done.failed - len(done.reasons)} more")

        report: BulkReport = work.bulk(source, output, started=started, advance=advance, **options)
    return report


@main.command(
    epilog=f"""\b
Examples:
  {PROGRAM} doctor
  {PROGRAM} doctor --plan models/fashion_mnist_with_classifier.uint8.tensorrt-rtx.plan

\b
Exit codes:
  0  the engine that 'auto' takes works
  1  it does not, or there is none"""
)
@click.option(
    "--checkpoint", "-c", default="fashion_mnist", show_default=True, metavar="NAME|FILE",
    help="The purifier that the engines are tried with.",
)  # fmt: skip
@click.option(
    "--plan", type=_Path(dir_okay=False), metavar="FILE.plan",
    help="Only compare this engine, from 'export', with float32 on the GPU here. It is native code: trust it first.",
)  # fmt: skip
@_debug
@click.pass_context
def doctor(context: click.Context, checkpoint: str, plan: Path | None) -> None:
    """Say what is installed, what is missing and how to get it, and try every engine."""
    from defense_vae_fast import doctor as work
    from defense_vae_fast.checkpoint import load_checkpoint

    if plan is not None:
        from defense_vae_fast.export import check_plan

        click.echo(f"{plan}: {check_plan(plan)}")
        return
    loaded = load_checkpoint(checkpoint)
    console = _console()
    for part in work.parts():
        console.print(f"{part.name}: {part.found or f'not found; {part.advice}'}")
    results = []
    for result in work.checks(loaded):
        state = {True: "ok", False: "FAILED", None: "not available"}[result.ok]
        console.print(f"engine {result.engine}: {state}: {_one_line(Exception(result.text))}")
        results.append(result)
    automatic = work.automatic(results)
    if automatic is None or not automatic.ok:
        console.print("the automatic engine does not work" if automatic else "no engine works here")
        context.exit(EXIT_SOME_FAILED)
    console.print(f"the automatic engine works: {automatic.engine}")


def _engine_states(*, every: bool = False) -> dict[str, str]:
    """For each engine that "auto" considers on this machine, or for ``every`` one, whether it takes it or why not."""
    from defense_vae_fast.engines import ENGINES, candidates, label

    considered = [(label(engine, device), engine, device) for engine, device in candidates()]
    others = [(engine.name, engine, "auto") for engine in ENGINES if engine not in [row[1] for row in considered]]
    states: dict[str, str] = {}
    chosen = None
    for name, engine, device in [*considered, *(others if every else [])]:
        reason = engine.available(device)
        if reason is not None:
            states[name] = f"not available: {reason}"
        elif chosen is None:
            chosen = name
            states[name] = "works here; 'auto' takes it, the first in the order that works"
        else:
            states[name] = f"works here; 'auto' prefers {chosen}, --engine {engine.name} takes it"
    return states


def _describe(name: str) -> list[str]:
    """What there is to say about a shipped purifier, its measured accuracies as its header holds them."""
    from defense_vae_fast.checkpoint import CheckpointError, load_checkpoint

    try:
        known = load_checkpoint(name)
    except CheckpointError as error:
        return [f"{name}: {_one_line(error)}"]
    channels, height, width = known.config.image_shape
    lines = [
        f"{name}: {known.dataset}, {height}x{width} pixels, {_count(channels, 'channel')}, "
        f"{known.config.parameter_count() / 1e6:.2f} M parameters",
        f"  digest {known.digest}",
    ]
    if known.recipe:
        lines.append(f"  recipe: {json.dumps(known.recipe)}")
    if known.accuracies:
        lines += [f"  {line}" for line in _outline("measured", known.accuracies)]
    if known.quantization:
        title = f"int8 scales for {_count(len(known.quantization.amax), 'layer')}"
        lines += [f"  {line}" for line in _outline(title, known.quantization.accuracies)]
    return lines


def _outline(title: str, values: Mapping[str, Any]) -> list[str]:
    """Nested dictionaries as an indented outline: one line each, with all that is not a dictionary itself."""
    own = ", ".join(f"{key} {_figure(value)}" for key, value in values.items() if not isinstance(value, Mapping))
    inner = [_outline(key, value) for key, value in values.items() if isinstance(value, Mapping)]
    return [f"{title}: {own}" if own else title, *(f"  {line}" for lines in inner for line in lines)]


def _figure(value: Any) -> str:
    """A measured value to four digits; a pair, such as the accuracies before and after, with an arrow."""
    if isinstance(value, list):
        return (" -> " if len(value) == 2 else ", ").join(_figure(part) for part in value)
    return str(float(f"{value:.4g}")) if isinstance(value, float) else str(value)


def _versions() -> dict[str, str]:
    from platform import python_version

    import defense_vae_fast

    packages = ("numpy", "openvino", "onnx", "safetensors", "pillow", "torch")
    own = {PROGRAM: defense_vae_fast.__version__, "python": python_version()}
    return own | {package: _version_of(package) for package in packages}


def _version_of(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _run_with_progress(purifier: Purifier, jobs: Sequence[Job], *, debug: bool) -> Report:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from defense_vae_fast.purify import run

    console = _console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("files, eta"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(jobs))

        def failed(job: Job, error: Exception) -> None:
            if debug:
                traceback.print_exception(error)
            _say(f"{job.source}: {_one_line(error)}")

        return run(purifier, jobs, advance=lambda share: progress.advance(task, share), failed=failed)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    # Plain text that is piped is not to be folded at 80 columns, and file names are not markup.
    return Console(stderr=stderr, soft_wrap=True, markup=False, highlight=False)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
