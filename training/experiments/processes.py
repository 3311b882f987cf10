"""Cells shared out to processes: what hangs on one training goes to one of them, as soon as what it needs is there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import click

from training.experiments.cells import Cell
from training.stopping import stop_signal

_SECONDS_BETWEEN_LOOKS = 0.1
_OF_ALL_CLASSIFIERS = ("defense_gan", "magnet")
_BARE, _TIMES = "bare", "times"
# What takes longest begins first.
_ORDER = (_BARE, "defense_gan", "three", "magnet", "without", "adv_training", _TIMES)
STOPPED, FAILED = 130, 1


@dataclass(frozen=True)
class Group:
    """Cells for one process, in order.

    Args:
        name: tells it from the others, and names its log.
        cells: to be measured.
        prepared: cells whose classifier and attacked images are to be there before, for other groups.
        after: names of the groups that must have ended first.
    """

    name: str
    cells: tuple[Cell, ...]
    prepared: tuple[Cell, ...] = ()
    after: frozenset[str] = field(default_factory=frozenset)


def share_out(wanted: Sequence[Cell]) -> list[Group]:
    """Groups of cells that can be measured side by side, what takes longest first.

    Each classifier has a group without a defence, before its others: it leaves behind what the others attack and are
    attacked with, made once, so that all columns stand before the same. Cells that measure time have the machine to
    themselves, after all others.
    """
    shares: dict[tuple[str, ...], list[Cell]] = {}
    attacks: dict[tuple[str, ...], dict[tuple[str, str], Cell]] = {}
    for cell in wanted:
        share = _share(cell)
        shares.setdefault(share, []).append(cell)
        if share[-1] not in (_TIMES, _BARE):
            bare = (cell.dataset, cell.classifier, _BARE)
            shares.setdefault(bare, [])
            attacks.setdefault(bare, {}).setdefault((cell.attack, cell.substitute), cell)
    groups = []
    for share in sorted(shares, key=_place):
        some = shares[share]
        needed = {(cell.dataset, cell.classifier, _BARE) for cell in some} - {share}
        after = set(shares) - {share} if share[-1] == _TIMES else needed
        groups.append(
            Group(
                "-".join(share), tuple(some), tuple(attacks.get(share, {}).values()),
                frozenset("-".join(other) for other in after),
            )
        )  # fmt: skip
    return groups


def _share(cell: Cell) -> tuple[str, ...]:
    if cell.table == "4":
        return (cell.dataset, _TIMES)
    if cell.column in ("no_attack", "no_defense"):
        return (cell.dataset, cell.classifier, _BARE)
    if cell.column in _OF_ALL_CLASSIFIERS:
        return (cell.dataset, cell.column)
    return (cell.dataset, cell.classifier, "adv_training" if cell.column == "adv_training" else cell.training)


def _place(share: tuple[str, ...]) -> int:
    kind = "without" if share[-1].startswith("without") else share[-1]
    return _ORDER.index(kind)


def run_groups(groups: Sequence[Group], processes: int, work: Callable[[Group], int], logs: Path) -> int:
    """Run groups in so many processes at once; what they print goes to a file each in ``logs``.

    Ctrl-C and SIGTERM are handed on, once, to each; they save what they are training.

    Args:
        groups: to be run, those first that stand first.
        processes: at most so many at once.
        work: runs a group and gives the exit code; it must be picklable.
        logs: folder of the files.

    Returns:
        0 when all have ended well, else :data:`FAILED` or :data:`STOPPED`.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    waiting, running, ended, result = list(groups), dict[str, tuple[BaseProcess, float]](), set[str](), 0
    with stop_signal() as stopping:
        told = False
        while running or (waiting and not told):
            if stopping.is_set() and not told:
                told, result = True, STOPPED
                for process, _ in running.values():
                    if process.pid is not None:
                        os.kill(process.pid, signal.SIGINT)
            ready = [group for group in waiting if group.after <= ended]
            for group in [] if told else ready[: processes - len(running)]:
                process = context.Process(target=_run, args=(work, group, logs / f"{group.name}.log", threads))
                process.start()
                waiting.remove(group)
                running[group.name] = (process, time.monotonic())
            for name, (process, since) in list(running.items()):
                process.join(_SECONDS_BETWEEN_LOOKS / len(running))
                if process.exitcode is not None:
                    del running[name]
                    ended.add(name)
                    if process.exitcode not in (0, STOPPED):
                        result = result or FAILED
                    how = {0: "done", STOPPED: "stopped early"}.get(process.exitcode, f"failed, {logs / name}.log")
                    click.echo(f"{name}: {how} after {time.monotonic() - since:.0f} s")
    return result


def _run(work: Callable[[Group], int], group: Group, log: Path, threads: int) -> None:
    import torch

    if hasattr(os, "setsid"):
        os.setsid()  # a terminal's Ctrl-C reaches the first process alone, which hands it on
    torch.set_num_threads(threads)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        code = work(group)
    except KeyboardInterrupt:
        code = STOPPED
    except BaseException:
        traceback.print_exc()
        code = FAILED
    sys.exit(code)
