"""The state of a model that reads: XL window, positions, open segment, scores, and the long-term memory.

Shapes: b streams, w rows of the XL window, t tokens of the open segment, v tokens in a routing window, d dim,
L blocks.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlroute.attached import AttachedSegment
from xlroute.memory import (
    CorruptionError,
    FingerprintError,
    FormatError,
    MemoryStore,
    MemoryStoreError,
    StoreNotFoundError,
)
from xlroute.memory.commits import record_path
from xlroute.memory.place import StorePath, store_path

if TYPE_CHECKING:
    from xlroute.blocks import SegmentView
    from xlroute.transformer_xl import RoutedTransformerXL

WindowView = tuple[Tensor, "SegmentView | None"]  # see `RoutedTransformerXL.window_view`

STATE_FILE = "state.safetensors"
COPY_PREFIX = "memory-"
FORMAT_VERSION = 1


@dataclass(eq=False)
class TransformerXLState:
    """What a `RoutedTransformerXL` carries from one segment to the next.

    Made by `model.initial_state` and `model.load_state`. A call of the model consumes the state that it is
    given and returns the next one; `fork` gives an independent copy.

    Attributes:
        window: states entering each block for the last tokens read, [L, b, w, d], right-aligned, 0 where
            unused.
        window_lengths: rows of the window in use, int64 [b], on the CPU.
        positions: tokens read of the current document, int64 [b], on the CPU.
        open: states entering each block for the tokens of a segment that `generate` left open, [L, b, t, d].
        scores: by which the last 2 v tokens read were routed, as memory queries and to the feedforward,
            [L, b, 2 v, 2], right-aligned, -inf where there are none; empty for a model that routes neither.
        memory: the long-term memory; None for XL memory alone.
        attached: the last segments whose states gradient can still reach, oldest first; none unless the
            model has `memory_grad_segments`. They are not saved.
    """

    window: Tensor
    window_lengths: Tensor
    positions: Tensor
    open: Tensor
    scores: Tensor
    memory: MemoryStore | None
    model: RoutedTransformerXL = field(repr=False)
    attached: tuple[AttachedSegment, ...] = field(default=(), repr=False)
    # What a segment of some length and type sees of a full window, which stays until the window is not full.
    _full_window: tuple[Any, WindowView] | None = field(default=None, init=False, repr=False)
    _consumed: bool = field(default=False, init=False, repr=False)
    _memory_version: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self.note_memory()

    @property
    def streams(self) -> int:
        """b, the number of documents read side by side."""
        return self.window.shape[1]

    def fork(self) -> TransformerXLState:
        """An independent state at the same place: reading on from one leaves the other alone.

        The memory is forked as well: the new state's memory lives in RAM (or on the GPU) and has no path.
        """
        self.check()
        memory = None if self.memory is None else self.memory.fork()
        return self._with(memory)

    def detach(self) -> TransformerXLState:
        """The next state, of the same content, from which no gradient goes back; this one counts as consumed.

        It ends what `memory_grad_segments` keeps, as a backward does.
        """
        self.check()
        state = self.hand_over()
        state.attached = ()
        return state

    def clear_memory(self) -> None:
        """Forget the long-term memory of every stream, and keep the XL window."""
        self.check()
        if self.memory is not None:
            self.memory.reset(range(self.streams))
            self.note_memory()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Commit the memory, then write the rest of the state beside it: all or nothing.

        A memory on disk is committed where it is, with the fingerprint of the model's weights as they are
        now; a memory without a path is copied into the folder. Either way the commit is pinned, so it stays
        readable until this folder's state is replaced. The state can be saved again and read on from; for
        `routing_shortlist`, all rows then get their first scores and keys anew, as for one that is loaded.
        The folder may be moved or copied, alone or together with the memory on disk.

        Args:
            folder: where the state goes; made if missing. A state saved there before is replaced.

        Raises:
            ValueError: if the state was consumed, or its memory changed by someone else.
            MemoryStoreError: if the memory cannot be committed; a state saved there before stays as it was.
        """
        self.check()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            before, _ = _read(folder)
        except MemoryStoreError:
            before = None  # nothing there, or nothing that could be read again
        fingerprint = self.model.fingerprint()
        header: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "folder": str(folder.resolve()),
            "fingerprint": fingerprint,
            "memory": None,
        }
        tensors = {
            "window": self.window,
            "window_lengths": self.window_lengths,
            "positions": self.positions,
            "open": self.open,
            "scores": self.scores,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        temporary = folder / f"{STATE_FILE}.tmp"
        try:
            if self.memory is not None:
                self.memory.fingerprint = fingerprint
                header["memory"] = _save_memory(self.memory, folder)
            header["checksum"] = _checksum(header, tensors)
            save_file(tensors, temporary, metadata={"xlroute": json.dumps(header)})
            os.replace(temporary, folder / STATE_FILE)
        except BaseException:
            temporary.unlink(missing_ok=True)
            _release(header, folder)
            raise
        if self.memory is not None:
            # Whoever reads on from what is saved has none; so has this state from here on.
            self.memory.forget_first_scores()
        if before is not None:
            if self.memory is not None and self.memory.path is None:
                # Its rows may still have to be read from the copy that is let go of now.
                for layer in range(self.memory.layers):
                    self.memory.layer(layer).views()
            _release(before, folder)

    def check(self) -> None:
        """Raise ValueError if the state was consumed, or if its memory was changed behind its back."""
        if self._consumed:
            raise ValueError(
                "state: expected one that was not read on from, got one already consumed by a call "
                "(keep a copy with state.fork())"
            )
        if self.memory is not None and self.memory.version != self._memory_version:
            raise ValueError("state: its memory store was changed by someone else since this state was made")

    def hand_over(self) -> TransformerXLState:
        """The next state, of the same content; this one counts as consumed."""
        self._consumed = True
        return self._with(self.memory)

    def _with(self, memory: MemoryStore | None) -> TransformerXLState:
        """A state of the same content with that memory."""
        state = TransformerXLState(
            self.window,
            self.window_lengths,
            self.positions,
            self.open,
            self.scores,
            memory,
            self.model,
            self.attached,
        )
        state._full_window = self._full_window
        return state

    def kept_view(self, key: Any, made: Callable[[], WindowView]) -> WindowView:
        """What a model makes of the window for a segment; what was made last, as long as the window is full.

        Args:
            key: all that it depends on but the window: the state may be read on from by another model.
            made: makes it, without gradient.
        """
        if self.window.shape[2] and not (self.window_lengths == self.window.shape[2]).all():
            return made()
        if self._full_window is None or self._full_window[0] != key:
            # A tensor made in inference mode could not be saved for backward later.
            with torch.inference_mode(False), torch.no_grad():
                self._full_window = key, made()
        return self._full_window[1]

    def note_memory(self) -> None:
        """Remember how the memory stands, so that a change by someone else is seen."""
        self._memory_version = 0 if self.memory is None else self.memory.version


def load_state(
    model: RoutedTransformerXL,
    folder: str | os.PathLike[str],
    *,
    mode: Literal["r", "r+"],
    device: torch.device | str | None,
    allow_other_weights: bool,
    device_bytes: int | None,
    host_bytes: int | None,
) -> TransformerXLState:
    """See `RoutedTransformerXL.load_state`."""
    if mode not in ("r", "r+"):
        raise ValueError(f"mode: expected 'r' or 'r+', got {mode!r}")
    folder = Path(folder)
    header, tensors = _read(folder)
    fingerprint = model.fingerprint()
    if header["fingerprint"] != fingerprint and not allow_other_weights:
        raise FingerprintError(
            f"{folder / STATE_FILE}: expected a state of these weights ({fingerprint}), "
            f"got one of other weights ({header['fingerprint']})"
        )
    weight = model.embedding.weight
    device = weight.device if device is None else torch.device(device)
    depth, streams, mem_len, dim = tensors["window"].shape
    if (depth, mem_len, dim) != (model.depth, model.mem_len, model.dim):
        raise ValueError(
            f"{folder / STATE_FILE}: expected depth={model.depth}, mem_len={model.mem_len}, dim={model.dim}, "
            f"got depth={depth}, mem_len={mem_len}, dim={dim}"
        )
    # States that were saved before tokens could be routed have no scores.
    none = model.no_scores(streams, device)
    scores = tensors.get("scores", none)
    if scores.shape != none.shape:
        raise ValueError(
            f"{folder / STATE_FILE}: expected scores {tuple(none.shape)}, got {tuple(scores.shape)}"
        )
    memory = None
    if header["memory"] is not None:
        path = _find_store(header["memory"], folder)
        commit = header["memory"]["commit"]
        open_store = partial(
            MemoryStore.open,
            path,
            device=device,
            commit=commit,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )
        with open_store() as committed:
            model.check_memory_shape(committed, streams)
            memory = committed.fork()
        if mode == "r+":
            memory = open_store(mode="r+")
    return TransformerXLState(
        window=tensors["window"].to(device, weight.dtype),
        window_lengths=tensors["window_lengths"],
        positions=tensors["positions"],
        open=tensors["open"].to(device, weight.dtype),
        scores=scores.to(none),
        memory=memory,
        model=model,
    )


def _save_memory(memory: MemoryStore, folder: Path) -> dict[str, Any]:
    """Commit the memory, or copy it into the folder, and pin the commit: what the header says of it."""
    path = memory.path
    if path is not None:
        commit = memory.commit()
        pin = memory.pin(commit)
    else:
        path = folder / f"{COPY_PREFIX}{uuid.uuid4().hex[:12]}"
        commit = memory.copy_to(path)
        with MemoryStore.open(path) as copy:
            pin = copy.pin(commit)
    inside = beside = None
    if isinstance(path, Path):
        path, folder = path.resolve(), folder.resolve()
        inside = str(path.relative_to(folder)) if path.is_relative_to(folder) else None
        beside = os.path.relpath(path, folder)
    return {"path": str(path), "inside": inside, "beside": beside, "commit": commit, "pin": pin}


def _release(header: dict[str, Any], folder: Path) -> None:
    """Let go of the commit that a replaced state named, and of a copied memory that no state names any more.

    A state that was copied here from another folder lets go of nothing outside: the commit is still the
    other's.
    """
    named = header["memory"]
    if named is None or (named["inside"] is None and header["folder"] != str(folder.resolve())):
        return
    # A pin that cannot be removed keeps rows longer than needed, which harms nothing.
    with suppress(MemoryStoreError, OSError):
        path = _find_store(named, folder)
        with MemoryStore.open(path) as store:
            store.unpin(named["pin"])
            forgotten = not store.pins()
        if (
            isinstance(path, Path)
            and path.parent == folder
            and path.name.startswith(COPY_PREFIX)
            and forgotten
        ):
            shutil.rmtree(path, ignore_errors=True)


def _find_store(named: dict[str, Any], folder: Path) -> StorePath:
    """Where the memory that a header names is; one that was moved together with the folder comes first."""
    candidates: list[StorePath] = [folder / named["inside"]] if named["inside"] is not None else []
    beside = named.get("beside")  # states that were saved before there was this do not tell
    if beside is not None:
        neighbour = Path(os.path.normpath(folder.resolve() / beside))
        # The folder may have been moved alone, to where there is another memory.
        if record_path(neighbour, named["commit"]).exists():
            candidates.append(neighbour)
    candidates.append(store_path(named["path"]))
    for path in candidates:
        if path.exists():
            return path
    raise StoreNotFoundError(
        f"{folder / STATE_FILE}: its memory is not there (looked at {', '.join(map(str, candidates))})"
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a saved state, checked against their checksum."""
    path = folder / STATE_FILE
    if not path.exists():
        raise StoreNotFoundError(f"{path}: there is no saved state")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Cloned: the file's tensors lie at odd addresses, and the bits of a matrix product can depend on
            # that.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptionError(f"{path}: the file is damaged ({error})") from error
    if "xlroute" not in metadata:
        raise FormatError(f"{path}: expected a state saved by xlroute, got another safetensors file")
    try:
        header: dict[str, Any] = json.loads(metadata["xlroute"])
        version = header["format_version"]
        if version != FORMAT_VERSION:
            raise FormatError(f"{path}: expected format version {FORMAT_VERSION}, got {version}")
        intact = header.pop("checksum") == _checksum(header, tensors)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(f"{path}: the file is damaged (its header cannot be read)") from error
    if not intact:
        raise CorruptionError(f"{path}: the file is damaged (its checksum does not match)")
    return header, tensors


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """CRC32C over the header and the tensors with their names, types and shapes."""
    crc = google_crc32c.value(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = google_crc32c.extend(crc, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        crc = google_crc32c.extend(crc, tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return int(crc)
