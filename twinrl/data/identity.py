"""Identities: short digests of what a thing was made from, and numbers that depend on nothing but them.

Splits, crops and cached tensors are functions of content, never of order, file names or counts. So they stay as
they are when files are added, moved or renamed, and no run's seed decides what the validation images are.
"""

import hashlib


def digest(*parts: object) -> str:
    """32 hex digits over the parts' text, each with its length, so that no two lists of parts run into one."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        text = str(part).encode()
        state.update(f"{len(text)}:".encode() + text)
    return state.hexdigest()


def of_bytes(data: bytes) -> str:
    """32 hex digits of a file's content."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def uniform(identity: str, purpose: str) -> float:
    """A number in [0, 1) of this identity; numbers for different purposes are independent."""
    return int(digest(identity, purpose)[:13], 16) / 16**13  # 52 bits: exact in a float


def validation_place(identity: str) -> float:
    """The thing's place in [0, 1); the validation split takes those below its share.

    A property of the content alone: the split holds its share of every bucket in expectation, copies of one image are
    on one side, and adding, renaming or recaptioning files moves nothing across (but for a bucket so small that its
    only validation image had to be named, see ``verify.divided``).
    """
    return uniform(identity, "validation split")
