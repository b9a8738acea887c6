"""Several members of one process that take turns and meet where they ask for the same thing.

Every member is ordinary code in a thread of its own, but only one of them runs at any moment: a member runs until it
*asks* for something (or ends), then the next one runs. When all live members wait, one round is answered: the member
furthest behind is served, together with all that wait for the same (an equal key). The others go on waiting, so
members that have fallen out of step (one has skipped something, or has gone back) meet again where they can, as the
threads of a GPU's warp do after a branch. Every round lets at least one member go on, whatever the others do: there
is nothing to deadlock on.

Since members take turns, nothing that they share needs a lock, and the order of everything is the same each time.
What belongs to the process and not to a thread is torch's random state; each member has its own, kept for it while
others run.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from twinrl.teacher import RandomState

T = TypeVar("T")


@dataclass(eq=False)
class Request:
    """What a member waits for.

    Attributes:
        member: who asks.
        key: requests of equal keys are answered together.
        content: what is asked.
        answer: set by the one who answers.
    """

    member: int
    key: Hashable
    content: Any
    answer: Any = None


@dataclass(eq=False)
class Ended(Generic[T]):
    """How a member has ended: with a value, or with an error."""

    value: T | None = None
    error: BaseException | None = None


class Abandoned(BaseException):
    """Raised in members that wait when the whole is given up, so that they end and let go of what they hold."""


class _Baton:
    """A lock that one thread waits for and another one opens, once each time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self) -> None:
        self._lock.acquire()

    def give(self) -> None:
        self._lock.release()


@dataclass(eq=False)
class _Member:
    number: int
    random_state: RandomState
    turn: _Baton = field(default_factory=_Baton)
    place: tuple[int, int] = (0, 0)  # steps begun, requests since
    request: Request | None = None
    error: BaseException | None = None  # to be raised where it waits
    ended: Ended[Any] | None = None


class Rendezvous:
    """Runs members in turns and answers what they ask together.

    Arguments:
        answer: sets the ``answer`` of requests with equal keys, ascending by member; runs in the thread that called
            :meth:`run`. Its error is every asking member's.
    """

    def __init__(self, answer: Callable[[Sequence[Request]], None]):
        self._answer = answer
        self._own = threading.local()
        self._turn = _Baton()  # of the thread that answers
        self._running = False  # whether it is a member's turn
        self.rounds: dict[int, int] = {}
        """Number of requests answered at once → how often; says how well the members keep step."""

    # --- for members ------------------------------------------------------------------------------------------

    @property
    def member(self) -> int | None:
        """The member whose thread this is; None elsewhere."""
        own = self._mine
        return None if own is None else own.number

    def begin_step(self) -> None:
        """The member is at the start of a step, where it wants to meet the others."""
        if (own := self._mine) is not None:
            own.place = (own.place[0] + 1, 0)

    def ask(self, key: Hashable, content: Any) -> Any:
        """Wait for an answer, while the others run. For a member's thread only."""
        own = self._mine
        assert own is not None
        own.place = (own.place[0], own.place[1] + 1)
        own.request = Request(own.number, key, content)
        own.random_state = RandomState.capture()
        self._turn.give()
        own.turn.wait()
        own.random_state.restore()
        (error, own.error), (request, own.request) = (own.error, None), (own.request, None)
        if error is not None:
            raise error
        return request.answer

    @property
    def _mine(self) -> _Member | None:
        return getattr(self._own, "member", None)

    # --- for the one who runs them ------------------------------------------------------------------------------

    def run(self, bodies: Sequence[Callable[[], T]]) -> list[Ended[T]]:
        """Run every member to its end; how each has ended, in order. An error of one is not in the others' way."""
        start = RandomState.capture()
        members = [_Member(number, start) for number in range(len(bodies))]
        threads = [
            threading.Thread(target=self._live, args=pair, name=f"member {pair[0].number}", daemon=True)
            for pair in zip(members, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            self._serve(members)
        finally:
            self._abandon(members)
            start.restore()
        for thread in threads:
            thread.join()
        return [member.ended for member in members if member.ended is not None]

    def _serve(self, members: Sequence[_Member]) -> None:
        able = list(members)
        while True:
            for member in able:
                self._let(member)
            waiting = [(member, member.request.key) for member in members if member.request is not None]
            if not waiting:
                return
            keys = [key for _, key in waiting]
            # of those equally far behind the odd one first, for which the others can wait
            _, wanted = min(waiting, key=lambda pair: (pair[0].place, keys.count(pair[1])))
            able = [member for member, key in waiting if key == wanted]
            self._reply(able)

    def _reply(self, members: Sequence[_Member]) -> None:
        self.rounds[len(members)] = self.rounds.get(len(members), 0) + 1
        try:
            self._answer([member.request for member in members if member.request is not None])
        except Exception as error:  # noqa: BLE001 - theirs, whatever it is
            for member in members:
                member.error = error

    def _let(self, member: _Member) -> None:
        """Let a member run until it asks or ends."""
        self._running = True
        member.turn.give()
        self._turn.wait()
        self._running = False

    def _abandon(self, members: Sequence[_Member]) -> None:
        """End those that are left, one by one; nothing to do where all have ended."""
        if self._running:  # interrupted while one had its turn
            self._turn.wait()
        for member in members:
            if member.ended is None:
                member.error = Abandoned()
                self._let(member)

    def _live(self, member: _Member, body: Callable[[], T]) -> None:
        self._own.member = member
        member.turn.wait()
        try:
            if member.error is not None:
                raise member.error
            member.random_state.restore()
            # a backward pass waits for others, which a thread of autograd's that all members share must not
            with torch.autograd.set_multithreading_enabled(False):
                member.ended = Ended(value=body())
        except BaseException as error:  # noqa: BLE001 - reported by run()
            member.ended = Ended(error=error)
        finally:
            self._turn.give()
