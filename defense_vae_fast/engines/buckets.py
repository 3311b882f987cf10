"""Batch sizes that a GPU engine is prepared for, and how any batch is cut into them.

A CUDA graph, and a TensorRT profile at its best, has one batch size. Pieces are filled up to the next bucket with
whatever lies in the buffer; images do not mix, so an image's bytes depend on its bucket alone, never on its company.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BUCKETS = (1, 8, 32, 64, 128, 256)
OVERLAP_FROM = 32  # smaller pieces are not cut to overlap their copies: the launches would cost more than they hide


def buckets_for(max_batch: int) -> tuple[int, ...]:
    """The default buckets up to ``max_batch``, which is one itself."""
    return (*(bucket for bucket in BUCKETS if bucket < max_batch), max_batch)


def bucket_of(count: int, buckets: Sequence[int]) -> int:
    """The smallest of the ascending ``buckets`` that holds ``count`` images, which the largest must do."""
    return next(bucket for bucket in buckets if bucket >= count)


def cut(count: int, buckets: Sequence[int], workers: int) -> Iterator[tuple[int, int]]:
    """Cut ``count`` images into pieces for ``workers`` that overlap copies with computing.

    Depends on nothing else, so the same batch is always cut the same way and gets the same bytes.

    Args:
        count: images in the batch, at least 1.
        buckets: ascending batch sizes.
        workers: streams that work side by side.

    Yields:
        (start, stop) of each piece, in order, none larger than the largest bucket.
    """
    share = max(-(-count // workers), OVERLAP_FROM)
    # A piece fills its bucket; a share that no bucket fits goes to the one below it, so that nothing is padding.
    piece = max((bucket for bucket in buckets if bucket <= share), default=buckets[0])
    for start in range(0, count, piece):
        yield start, min(start + piece, count)
