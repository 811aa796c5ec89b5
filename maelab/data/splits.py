"""Which images of a folder are held out, and what has changed in a folder since: pure functions of what its files hold.

The key of an image is a hash of its file's bytes. Each image decides by its own key alone, so a folder that grows or
shrinks keeps its split. The content was chosen over the path as the key, since it is the more stable of the two: an
image keeps its side when it is renamed, when its folder is, when a wrong class is mended by moving it, and when a copy
of it comes or goes; and copies share a side without any further rule, in whatever classes they lie. With paths, the
side of copies has to follow from all their paths, so that adding a copy could bring what was trained on into the test
part. The price: an image that is edited or encoded anew is another image and decides anew; `compare_images` says so.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath

import torch

KEY_BYTES = 8
_ENTRY = 2 * KEY_BYTES


def content_key(path: Path) -> bytes:
    """The key of an image: a hash of its file's bytes, KEY_BYTES long."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=KEY_BYTES)).digest()


def key_of(content: bytes) -> bytes:
    """The key of an image whose file holds these bytes."""
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def key_of_text(text: str) -> bytes:
    """The key of a group of images: a hash of its name."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=KEY_BYTES).digest()


def hold_out(keys: torch.Tensor, labels: torch.Tensor | None, fraction: float, stream: str) -> torch.Tensor:
    """Choose a share of the images by their keys.

    A hash of (stream, key) is a number from 0 to 1; an image is held out if it lies below `fraction`. So the share is
    met only about, and no image's side depends on another's. The exception: a class of at least two different images
    has one on either side. Where none would be held out, the one with the smallest number is; where none would be left,
    the one with the largest number is. Where no class can make such an exception and nothing at all would be held out,
    the key with the smallest number is. (No rule without a memory can do this and never move an image: of three images
    two share a side, though as a class of two they would not.) When such a class grows, the image held out by exception
    may return to training, once another has a smaller number. The other direction, into the held-out part, would count
    what was trained on; it takes a class that lost its only held-out image, or one whose every number lay below
    `fraction`. Copies in several classes are no exceptions in any of them, so that they stay together.

    Args:
        keys: int64 (N,); equal for equal files, or for images of a group.
        labels: int64 (N,), or None for one class.
        fraction: 0 <= fraction < 1; 0 holds out nothing.
        stream: another choice, independent of this one, for another text.

    Returns:
        bool (N,), true = held out.
    """
    if not len(keys) or not fraction:
        return torch.zeros(len(keys), dtype=torch.bool)
    distinct, which = keys.unique(return_inverse=True)
    draws = torch.tensor([_draw(stream, key) for key in distinct.tolist()], dtype=torch.float64)
    held = draws < fraction
    labels = torch.zeros_like(keys) if labels is None else labels - labels.min()
    pairs = (labels * len(distinct) + which).unique()  # (class, key), class by class
    members = pairs % len(distinct)
    alone = members.bincount(minlength=len(distinct)) == 1  # in one class only
    for some in members.split((pairs // len(distinct)).bincount().tolist()):
        own = some[alone[some]]
        if not len(own):
            continue
        if len(some) > 1 and not held[some].any():
            held[own[draws[own].argmin()]] = True
        elif held[some].all():
            held[own[draws[own].argmax()]] = False
    if not held.any() and len(distinct) > 1:
        held[draws.argmin()] = True
    return held[which]


def _draw(stream: str, key: int) -> float:
    digest = hashlib.blake2b(f"{stream} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def list_of_images(entries: Iterable[tuple[str | PurePath, bytes]]) -> bytes:
    """What `compare_images` compares: 16 bytes for each image.

    Args:
        entries: path relative to the folder, and key.
    """
    return b"".join(sorted(hash_path(path) + key for path, key in entries))


def hash_path(path: str | PurePath) -> bytes:
    """The same on every system: a path may be spelt with "\\", or with letters and accents apart."""
    text = unicodedata.normalize("NFC", PurePath(path).as_posix())
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=KEY_BYTES).digest()


def compare_images(before: bytes, now: bytes) -> str | None:
    """Say what has changed between two lists of a folder's images (`Dataset.listing`).

    Returns:
        None if nothing has; otherwise for example "12 images were added, 3 removed, 1 changed, 2 renamed or moved".

    Raises:
        ValueError: if one is no such list.
    """
    old, new = _entries(before), _entries(now)
    changed = sum(old[path] != new[path] for path in old.keys() & new.keys())
    gone = Counter(old[path] for path in old.keys() - new.keys())
    come = Counter(new[path] for path in new.keys() - old.keys())
    moved = (gone & come).total()
    counts = {"added": come.total() - moved, "removed": gone.total() - moved, "changed": changed}
    said = [f"{count} {what}" for what, count in (counts | {"renamed or moved": moved}).items() if count]
    if not said:
        return None
    count, what = said[0].split(" ", 1)
    return ", ".join([f"{count} {'image was' if count == '1' else 'images were'} {what}", *said[1:]])


def shared_images(before: bytes, now: bytes) -> int:
    """How many images of the second list hold what one of the first holds, wherever they lie."""
    known = set(_entries(before).values())
    return sum(key in known for key in _entries(now).values())


def _entries(listing: bytes) -> dict[bytes, bytes]:
    if len(listing) % _ENTRY:
        raise ValueError(f"a list of images has {_ENTRY} bytes for each, and this one {len(listing)} in all")
    pieces = (listing[i : i + _ENTRY] for i in range(0, len(listing), _ENTRY))
    return {piece[:KEY_BYTES]: piece[KEY_BYTES:] for piece in pieces}
