"""Says which rank holds up the others, and where, and ends them all.

A rank that has stopped leaves the others waiting in a collective: gloo and nccl give up after their timeouts, without
saying for whom they waited. So each rank publishes a *beat* through the store in which the process group was formed:
how many collectives it has begun and in which one it is (from torch's flight recorder, which gloo and nccl fill
alike), its step, and the line of Python that it is at. All ranks issue the same collectives in the same order;
hence those that have begun the fewest are the ones that the others wait for. A rank that has waited in one collective
for longer than allowed writes that in one line, and all of them end with exit code 1, from which a launcher may start
again.

What torch has for this (``monitored_barrier``, nccl's own watchdog, torchrun's timers) names ranks for barriers only,
is for nccl only, or knows no ranks.
"""

import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as c10d

_dump: Callable[[], str] | None = getattr(c10d, "_dump_fr_trace_json", None)
APART = "checkpoints"
"""Description of the process group in whose collectives training does not wait."""
RECORDED = "TORCH_FR_BUFFER_SIZE"
OVER = "over"


@dataclass
class Progress:
    """Where this process is in training; told by it, read by its watchdog.

    Attributes:
        step: None before the first one, while loading may take its time.
        doing: what it is about.
    """

    step: int | None = None
    doing: str = "start"

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """What the block is about."""
        before, self.doing = self.doing, what
        try:
            yield
        finally:
            self.doing = before

    def __str__(self) -> str:
        return self.doing if self.step is None else f"{self.doing}, step {self.step}"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: of this beat; one that does not grow is from a process that has stopped or died.
        begun: collectives that the rank has begun.
        inside: the one in which it is; "" if none.
        doing: what it is about, for people.
        at: the line of Python.
        left: whether it has ended in order.
    """

    number: int = 0
    begun: int = 0
    inside: str = ""
    doing: str = "start"
    at: str = "its start"
    left: bool = False


@dataclass
class Recorder:
    """The flight recorder's account of the collectives that this process has issued."""

    counts: dict[str, int] = field(default_factory=dict)  # process group → collectives begun

    def read(self) -> tuple[int, str]:
        """How many collectives have been begun, and the oldest that has not ended ("" if there is none)."""
        assert _dump is not None
        entries = [e for e in json.loads(_dump())["entries"] if e["process_group"][1] != APART]
        for entry in entries:
            group = entry["process_group"][0]
            self.counts[group] = max(self.counts.get(group, 0), entry["collective_seq_id"])
        unfinished = [e["profiling_name"].partition(":")[2] for e in entries if not e["retired"]]
        return sum(self.counts.values()), unfinished[0].replace("_", "-").lstrip("-") if unfinished else ""


class Watchdog:
    """Watches over this process and, when it waits for too long, over the others.

    Arguments:
        store: shared by the ranks; of its own connection, since it is used beside training.
        rank, world: this process's number, and how many there are.
        seconds: that a rank may wait in one collective.
        progress: of the thread that makes this.
        end: ends this process.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        seconds: float,
        progress: Progress,
        end: Callable[[int], object] = os._exit,
    ):
        self.store, self.rank, self.world, self.seconds, self.progress, self.end = (
            store, rank, world, seconds, progress, end,
        )  # fmt: skip
        self.watched = threading.get_ident()
        self.recorder, self.stopped = Recorder(), threading.Event()
        self.beat, self.since = Beat(), time.monotonic()
        self.others: dict[int, tuple[int, float]] = {}  # rank → number of its last beat, and when it came
        self.judging = 0.0  # since when the others are looked at
        self.answered = time.monotonic()  # when the store last did
        self.threads = [threading.Thread(target=t, name="watchdog", daemon=True) for t in (self._watch, self._talk)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during the block."""
        for thread in self.threads:
            thread.start()
        try:
            yield
        finally:
            self.stopped.set()
            for thread in self.threads:
                thread.join(min(5.0, self.seconds))

    @property
    def pause(self) -> float:
        """Seconds between two looks."""
        return min(5.0, self.seconds / 10)

    def _watch(self) -> None:
        """Take beats; give up where the store, on which talking waits without end, does not answer."""
        while not self.stopped.wait(self.pause):
            self._look()
            if self._waits(1.5 * self.seconds) and time.monotonic() - self.answered > self.seconds:
                self._say("the process that holds the ranks' store (rank 0, or the launcher) does not answer")

    def _talk(self) -> None:
        """Tell the others of this process, and look at them when it waits."""
        while not self.stopped.wait(self.pause):
            try:
                self._publish(self.beat)
                if self.store.check([OVER]):
                    self.end(1)
                if self._waits(self.seconds / 2):
                    self._judge(self._of_all(), time.monotonic())
                else:
                    self.others.clear()
                self.answered = time.monotonic()
            except RuntimeError:  # its process has ended
                continue
        try:
            self._publish(replace(self.beat, left=True))
        except RuntimeError:  # nobody is left to be told
            return

    def _look(self) -> None:
        """Take a new beat."""
        begun, inside = self.recorder.read()
        if (begun, inside) != (self.beat.begun, self.beat.inside) or self.progress.step is None:
            self.since = time.monotonic()
        self.beat = Beat(self.beat.number + 1, begun, inside, str(self.progress), line_of(self.watched))

    def _publish(self, beat: Beat) -> None:
        self.store.set(str(self.rank), json.dumps(asdict(beat)))

    def _waits(self, seconds: float) -> bool:
        """Whether this process has been in one collective for so long."""
        return bool(self.beat.inside) and time.monotonic() - self.since >= seconds

    def _of_all(self) -> dict[int, Beat]:
        known = [rank for rank in range(self.world) if self.store.check([str(rank)])]
        values = self.store.multi_get([str(rank) for rank in known])
        found = {rank: Beat(**json.loads(value)) for rank, value in zip(known, values, strict=True)}
        return {rank: found.get(rank, Beat()) for rank in range(self.world)}

    def _judge(self, beats: Mapping[int, Beat], now: float) -> None:
        """Watch whether the others' beats go on; after half of the time allowed, say whose fault it is."""
        self.judging = self.judging if self.others else now
        for rank, beat in beats.items():
            if self.others.get(rank, (-1, now))[0] != beat.number:
                self.others[rank] = beat.number, now
        watched = now - self.judging >= self.seconds / 2
        if watched and self._waits(self.seconds) and self.store.add(OVER, 1) == 1:
            late = {rank for rank, (_, seen) in self.others.items() if now - seen > self.seconds / 4}
            silent = sorted(late - {self.rank})
            self._say(verdict(beats, silent, self.seconds))

    def _say(self, line: str) -> None:
        print(f"twinrl: {line}", file=sys.stderr, flush=True)
        self.end(1)


def verdict(beats: Mapping[int, Beat], silent: Sequence[int], seconds: float) -> str:
    """Who holds up whom, in one line.

    Arguments:
        beats: the last beat of every rank. silent: ranks whose last beat is old.
        seconds: for which the others have waited.
    """
    last = min(beat.begun for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.begun == last]
    gone = [rank for rank in beats if beats[rank].left]
    culprits = list(silent) or gone or behind
    waiting = [rank for rank in beats if rank not in culprits]
    if not waiting:
        where = Counter(f"{beat.inside} ({beat.doing})" for beat in beats.values()).most_common(1)[0][0]
        return f"no rank has left {where} for {seconds:g} s, and none is behind; fix: check the network between them"
    ahead = max((beats[rank] for rank in waiting), key=lambda beat: bool(beat.inside))
    where = f"{ahead.inside} ({ahead.doing})"
    first = beats[culprits[0]]
    reason = f"last seen at {first.at}"
    if culprits[0] in gone:
        reason = "it has ended"
    elif culprits[0] not in silent:
        reason = f"it is at {first.at}"
    sign = "gives no sign of life and " if culprits[0] in silent else ""
    return (
        f"{_ranks(culprits)} {sign}has not joined {where} for {seconds:g} s; {reason}; {_ranks(waiting)} "
        f"{'waits' if len(waiting) == 1 else 'wait'} there; fix: raise fsdp.watchdog if it is only slow"
    )


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def line_of(thread: int) -> str:
    """Where a thread is: the innermost line outside torch."""
    frame = sys._current_frames().get(thread)
    while frame is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename and frame.f_back is not None:
        frame = frame.f_back
    if frame is None:
        return "its end"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"


@contextmanager
def watching(seconds: float | None, progress: Progress) -> Iterator[None]:
    """Watch over the default process group during the block; None: nobody watches."""
    if seconds is not None and _dump is None:
        logging.getLogger(__name__).warning("fsdp.watchdog is off: torch %s records no collectives", torch.__version__)
    if seconds is None or _dump is None:
        yield
        return
    shared = dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore("twinrl-watchdog", shared.clone())  # type: ignore[attr-defined]
    with Watchdog(store, dist.get_rank(), dist.get_world_size(), seconds, progress).watching():
        yield


def record() -> None:
    """Let torch record the last collectives; to be called before the process group is made."""
    os.environ.setdefault(RECORDED, "64")
