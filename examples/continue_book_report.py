"""What examples/continue_book.py prints."""

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

from continue_book_text import Continuation, Reading

NARROWEST = 36  # characters in a line of a column
GAP = "   "


def report(found: Continuation, width: int | None) -> str:
    """A continuation as text.

    Args:
        found: what is told.
        width: characters in a line of the terminal, for texts beside each other; None for one after the
            other, as they are.
    """
    texts = [
        ("with the memory", found.with_memory),
        ("with the memory emptied", found.memory_emptied),
        ("the book", found.book or "(ends here)"),
    ]
    parts = [
        f"{found.title} after byte {found.byte:,} of {found.bytes:,}, with {found.memory_rows:,} memory rows",
        below([("the book, up to there", found.before)]),
        below(texts) if width is None else beside(texts, width),
    ]
    if found.bits_per_byte is not None and found.bits_per_byte_emptied is not None:
        change = 100 * (found.bits_per_byte / found.bits_per_byte_emptied - 1)
        parts.append(
            f"The book's next {found.scored_bytes:,} bytes: {found.bits_per_byte:.3f} bits per byte with the "
            f"memory, {found.bits_per_byte_emptied:.3f} with it emptied ({change:+.1f}%)"
        )
    parts.append(passages("writing with the memory", found.read_to_write))
    if found.read_to_foresee is not None:
        parts.append(passages("foreseeing the book", found.read_to_foresee))
    return "\n\n".join(parts)


def passages(doing: str, reading: Reading) -> str:
    """What was read while doing something, as text."""
    lines = []
    for passage in reading.passages:
        lines += [
            (f"{passage.share:4.0%}  byte {passage.byte:,}", *map(printable, passage.text)),
            (f"      {passage.bytes_back:,} back", *map(printable, passage.read_for)),
        ]
    margin, left = (max((len(line[i]) for line in lines), default=0) for i in range(2))
    heading = (
        f"Read while {doing}, in shares of the attention: nothing {reading.nothing:.1%}, the book so far\n"
        f"{reading.book:.1%}, the text itself {reading.itself:.1%}. Of the book, each above what it was for:"
    )
    rows = (f"{place:{margin}}  {before:>{left}}|{after}".rstrip() for place, before, after in lines)
    return "\n".join((heading, *rows))


def below(texts: Sequence[tuple[str, str]]) -> str:
    """Texts with their headings, one after the other."""
    return "\n\n".join(f"---- {heading} ----\n{printable(text)}" for heading, text in texts)


def beside(texts: Sequence[tuple[str, str]], width: int) -> str:
    """Texts with their headings in columns, as many beside each other as there is room for."""
    most = max(1, (width + len(GAP)) // (NARROWEST + len(GAP)))
    rows = []
    for start in range(0, len(texts), most):
        row = texts[start : start + most]
        column = (width + len(GAP)) // len(row) - len(GAP)
        columns = [[heading, "-" * column, *wrapped(printable(text), column)] for heading, text in row]
        lines = zip_longest(*columns, fillvalue="")
        rows.append("\n".join(GAP.join(cell.ljust(column) for cell in line).rstrip() for line in lines))
    return "\n\n".join(rows)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, cut to a width."""
    return [part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""]]


def printable(text: str) -> str:
    """The text without what a terminal would take for commands: a model of bytes may write anything."""
    lines = text.expandtabs().replace("\r\n", "\n").split("\n")
    return "\n".join("".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines)
