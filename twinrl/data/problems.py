"""Why a pair of image and caption is left out: a short reason to be counted, and the detail for the report."""

from dataclasses import dataclass

from twinrl.machine.text import printable

CORRUPT = "corrupt image"
NOT_AN_IMAGE = "not an image"
UNREADABLE = "cannot be opened"
NO_IMAGE = "image missing"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
SECOND_CAPTION = "second caption"
BAD_CAPTION = "unreadable caption"
BAD_ROW = "unreadable row"
TOO_SMALL = "too small"
NO_BUCKET = "no bucket"
NOT_FINITE = "non-finite encoding"


@dataclass(frozen=True)
class Problem:
    """A pair that cannot be used.

    Attributes:
        name: of the pair, e.g. its image's path in the folder.
        reason: one of this module's constants.
        detail: what was found.

    Characters of ``name`` and ``detail`` that cannot be printed are escaped.
    """

    name: str
    reason: str
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))
        object.__setattr__(self, "detail", printable(self.detail))


class UnusableError(Exception):
    """Raised where one image or caption turns out unusable; whoever knows its name makes it a :class:`Problem`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def of(self, name: str) -> Problem:
        """The problem of the pair called ``name``."""
        return Problem(name, self.reason, self.detail)
