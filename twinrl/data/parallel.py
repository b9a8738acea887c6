"""Reading and decoding in threads, a bounded number of items ahead of their use."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def groups_of(items: Iterable[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive groups of ``size``; the last may be shorter."""
    rest = iter(items)
    while group := tuple(islice(rest, size)):
        yield group


def ahead(pool: ThreadPoolExecutor, function: Callable[[T], R], groups: Iterable[Sequence[T]]) -> Iterator[list[R]]:
    """``function`` over each group in threads; the next group is under way while the caller uses one."""
    waiting: list[Future[R]] = []
    for group in groups:
        coming = [pool.submit(function, item) for item in group]
        if waiting:
            yield [future.result() for future in waiting]
        waiting = coming
    yield [future.result() for future in waiting]
