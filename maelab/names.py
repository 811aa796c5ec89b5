"""Names of classes, files and folders are data: how they are shown to people, programs and shells without effect."""

import re
import shlex

_NO_TEXT = "\ud800-\udfff"  # what Python makes of the bytes of a file name that are no UTF-8
_TURNING = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # these change the direction of what follows them
_HIDDEN = re.compile(f"[\\x00-\\x1f\\x7f-\\x9f\u2028\u2029\ufeff{_TURNING}{_NO_TEXT}]")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_FORMULA = re.compile("[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]")  # the wide forms of = + - @ count too


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:  # stands for a byte
        return f"\\x{number - 0xDC00:02x}"
    return _SHORT.get(found[0]) or (f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}")


def visible(text: str) -> str:
    r"""The text on one line, as a person may see it: what controls a terminal, ends a line, turns the direction of
    writing or is no text at all becomes an escape, such as \n, \x1b, \u202e, or \xe9 for a byte of a file name that is
    no UTF-8. For reading alone: a backslash stays as it is."""
    return _HIDDEN.sub(_escape, text)


def encodable(text: str) -> str:
    r"""The text with an escape, such as \xe9, for what UTF-8 cannot hold, and everything else as it is."""
    return re.sub(f"[{_NO_TEXT}]", _escape, text)


def short(text: str, length: int) -> str:
    """The visible text, cut to so many characters."""
    text = visible(text[: 8 * length])
    return text if len(text) <= length else text[: length - 1] + "…"


def csv_cell(text: str) -> str:
    """The text as a cell of CSV: behind a single quote if a spreadsheet would compute it (the advice of OWASP).

    Bytes of a file name stay what they are, for a stream with the error handler surrogateescape. Of the characters
    that control a terminal, only line feed and tab stay: the writer of CSV puts them between quotes, but before Python
    3.13 no carriage return, behind which a spreadsheet would begin a row.
    """
    try:
        exact = text.encode(errors="surrogateescape").decode(errors="surrogateescape") == text
    except UnicodeEncodeError:
        exact = False
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", _escape, text if exact else encodable(text))
    return f"'{text}" if _FORMULA.match(text) else text


def shell_word(text: str) -> str:
    r"""The text as a word that can be copied to a shell: plain, in single quotes, or as $'...\n...' where it holds what
    cannot be shown."""
    if not _HIDDEN.search(text):
        return shlex.quote(text)
    return "$'" + visible(text.replace("\\", r"\\").replace("'", r"\'")) + "'"
