"""Which words of a book stood in it before, and whether a model with XL memory still sees them.

A word is a run of letters, in the case it is written in. What a model sees as it predicts a word is what its
attention reaches: the segment so far and the XL window before it. What lies further back reaches it through a
long-term memory, or as a trace in the states of the window, if at all.
"""

import re

import numpy as np
import numpy.typing as npt
from pg19_data import Tokens, byte_offsets

KINDS = ("in sight", "beyond", "new", "rest")
IN_SIGHT, BEYOND, NEW, REST = range(len(KINDS))


def kinds_of_tokens(text: bytes, starts: Tokens, *, segment_len: int, mem_len: int) -> npt.NDArray[np.int64]:
    """Of which kind each token of a book is, int64 [t], an index into `KINDS`.

    All tokens of a word are of one kind: "in sight" if the first token of its last occurrence is seen when
    the first token of the word is predicted, or is that token; "beyond" if that occurrence lies further back;
    "new" if there is none. A token that has letters of several words counts for the first of them, and one
    that has other characters besides, as the space before a word, counts whole. Tokens without a letter are
    "rest".

    Args:
        text: of the book, UTF-8.
        starts: the byte at which each token begins, [t], as a tokenizer's `starts` gives them.
        segment_len: tokens that are read at once, from the first of the book on.
        mem_len: tokens in the XL window before them.
    """
    kinds = np.full(len(starts), REST, dtype=np.int64)
    characters = text.decode("utf-8")
    offsets = byte_offsets(characters)
    letters = "".join(each if each.isalpha() else " " for each in characters)
    spans = [match.span() for match in re.finditer("[^ ]+", letters)]
    begins, ends = offsets[np.array(spans, dtype=np.int64).reshape(-1, 2)].T
    # Tokens that begin at the same byte are parts of one character.
    firsts = np.minimum(np.searchsorted(starts, begins), np.searchsorted(starts, begins, side="right") - 1)
    stops = np.searchsorted(starts, ends)
    newest: dict[str, int] = {}
    taken = 0
    for (begin, end), first, stop in zip(spans, firsts.tolist(), stops.tolist(), strict=True):
        word = characters[begin:end]
        before = newest.get(word)
        if before is None:
            kind = NEW
        else:
            # The model reads each token a place later than the one where it predicts it.
            oldest_seen = first // segment_len * segment_len - mem_len
            kind = IN_SIGHT if before + 1 >= oldest_seen else BEYOND
        kinds[max(first, taken) : stop] = kind
        newest[word], taken = first, stop
    return kinds
