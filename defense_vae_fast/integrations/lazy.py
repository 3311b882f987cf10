"""A Purifier that is made where it is first used, so that what holds it can be pickled into other processes."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from defense_vae_fast.purifier import Purifier


class LazyPurifier:
    """``Purifier.from_pretrained(checkpoint, **options)``, once in each process that asks for it.

    Args:
        checkpoint: a shipped name or a path.
        options: of ``from_pretrained``.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], **options: Any) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self._made: tuple[int, Purifier] | None = None
        self._making = threading.Lock()

    def get(self) -> Purifier:
        """The Purifier of this process.

        Raises:
            EngineUnavailable: among others, where this process was forked after OpenVINO had been used; start data
                loader workers with the spawn method then.
        """
        with self._making:
            if self._made is None or self._made[0] != os.getpid():
                from defense_vae_fast.purifier import Purifier

                self._made = os.getpid(), Purifier.from_pretrained(self.checkpoint, **self.options)
            return self._made[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.checkpoint, self.options)


def _again(kind: type[LazyPurifier], checkpoint: str | os.PathLike[str], options: dict[str, Any]) -> LazyPurifier:
    return kind(checkpoint, **options)
