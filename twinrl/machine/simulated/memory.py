"""Bytes on the device that are alive, by whose they are, and what is alive at the peak of every phase."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from twinrl.machine.sharding import local
from twinrl.machine.simulated.places import Places

BLOCK = 512
"""Sizes are multiples of this in torch's allocator for CUDA."""
NOTICEABLE = 1.002
"""A peak that is higher than the last one by less is not listed anew."""
GATHERED, GRADIENTS, CASTS = "gathered parameters", "gradients", "weights in low precision"


@dataclass
class Peak:
    """What is alive when most is.

    Attributes:
        bytes: in all. line: of the program that reached it.
        owners: bytes by whose they are.
    """

    bytes: int = 0
    line: str = ""
    owners: dict[str, int] = field(default_factory=dict)


class Memory:
    """Follows the storages on the device that operations make.

    Arguments:
        places: says whose memory is made, and in which phase.

    Attributes:
        now: bytes alive.
        peaks: by phase.
        most_pinned: bytes in the host's pinned memory when most were.
        weights: shapes of trained parameters, by which gradients and casts of them are known.
    """

    def __init__(self, places: Places):
        self.places = places
        self.now = self.most_pinned = self._pinned = 0
        self.peaks: dict[str, Peak] = {}
        self.weights: set[torch.Size] = set()
        self._sizes: dict[int, int] = {}
        self._owners: dict[int, str] = {}
        self._live: Counter[str] = Counter()
        self._kept: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def made(self, tensors: Iterable[Any]) -> None:
        """Operations have returned these."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._sizes:
                    self._begin(storage, key, tensor)

    def _begin(self, storage: torch.UntypedStorage, key: int, tensor: Tensor) -> None:
        place = self.places.here()
        backward = place.phase == "backward"
        owner = place.owner
        if tensor.shape in self.weights and (backward or tensor.dtype in (torch.bfloat16, torch.float16)):
            owner = GRADIENTS if backward else CASTS
        self._sizes[key], self._owners[key] = 0, owner or f"{place.phase}, else"
        self._kept[key] = weakref.ref(storage, self._ended(key))
        self._grow(key, storage.nbytes())

    def _ended(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            size, owner = self._sizes.pop(key), self._owners.pop(key)
            del self._kept[key]
            self._live[owner] -= size
            self.now -= size

        return gone

    def _grow(self, key: int, size: int) -> None:
        """A storage has ``size`` bytes now."""
        rounded = -(-size // BLOCK) * BLOCK
        grown = rounded - self._sizes[key]
        self._sizes[key] = rounded
        self._live[self._owners[key]] += grown
        self.now += grown
        if grown > 0:
            self._seen()

    def _seen(self) -> None:
        place = self.places.here()
        peak = self.peaks.setdefault(place.phase, Peak())
        if self.now > peak.bytes:
            if self.now > NOTICEABLE * sum(peak.owners.values()):
                peak.owners = {owner: size for owner, size in self._live.items() if size}
                peak.line = place.line
            peak.bytes = self.now

    def belongs(self, owner: str, tensors: Iterable[Any]) -> None:
        """From now on these are somebody's."""
        for tensor in tensors:
            if isinstance(own := local(tensor), FakeTensor):
                key = own.untyped_storage()._cdata
                if key in self._sizes:
                    self._rename(key, owner)

    def _rename(self, key: int, owner: str) -> None:
        self._live[self._owners[key]] -= self._sizes[key]
        self._live[owner] += self._sizes[key]
        self._owners[key] = owner

    def never_was(self, owner: str, tensors: Iterable[Any]) -> None:
        """These of an owner were there all the time and should not have been: peaks are lower by them."""
        storages = (local(tensor).untyped_storage() for tensor in tensors)
        size = sum(self._sizes.get(storage._cdata, 0) for storage in storages)
        self._live[owner] -= size
        for peak in self.peaks.values() if size else ():
            peak.bytes -= size
            peak.owners[owner] -= size

    def held(self) -> dict[str, int]:
        """Bytes alive by whose they are, most first."""
        return {owner: size for owner, size in self._live.most_common() if size}

    def forget(self) -> None:
        """Look for peaks again, from what is alive now."""
        self.peaks.clear()
        self.most_pinned = self._pinned

    def pinned(self, storage: torch.UntypedStorage) -> None:
        """A storage is in the host's pinned memory."""
        self._pinned += storage.nbytes()
        self.most_pinned = max(self.most_pinned, self._pinned)
        weakref.finalize(storage, self._unpinned, storage.nbytes())

    def _unpinned(self, size: int) -> None:
        self._pinned -= size

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, storages that change their size are followed: FSDP frees gathered parameters so."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            out = resize(storage, size)
            if (key := storage._cdata) in self._sizes:
                if self.places.here().owner == GATHERED:
                    self._rename(key, GATHERED)
                self._grow(key, int(size))
            return out

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield
