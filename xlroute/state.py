"""The state of a model that reads: XL window, positions, open segment, and the long-term memory.

Shapes: b streams, w rows of the XL window, t tokens of the open segment, d dim, L blocks.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xlroute.memory import CorruptionError, FingerprintError, FormatError, MemoryStore, StoreNotFoundError

if TYPE_CHECKING:
    from xlroute.transformer_xl import RoutedTransformerXL

STATE_FILE = "state.safetensors"
FORMAT_VERSION = 1


@dataclass
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
        memory: the long-term memory; None for XL memory alone.
    """

    window: Tensor
    window_lengths: Tensor
    positions: Tensor
    open: Tensor
    memory: MemoryStore | None
    model: RoutedTransformerXL = field(repr=False)
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
        return TransformerXLState(
            self.window, self.window_lengths, self.positions, self.open, memory, self.model
        )

    def clear_memory(self) -> None:
        """Forget the long-term memory of every stream, and keep the XL window."""
        self.check()
        if self.memory is not None:
            self.memory.reset(range(self.streams))
            self.note_memory()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Commit the memory, then write the rest of the state beside it: all or nothing.

        A memory on disk is committed where it is, with the fingerprint of the model's weights as they are
        now, and the commit stays readable until this folder's state is replaced. A memory without a path is
        copied into the folder. The state can be saved again and read on from.

        Args:
            folder: where the state goes; made if missing. A state saved there before is replaced.

        Raises:
            ValueError: if the state was consumed, or its memory changed by someone else.
            MemoryStoreError: if the memory cannot be committed; a state saved there before stays as it was.
        """
        self.check()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        before = _read_header(folder) if (folder / STATE_FILE).exists() else None
        fingerprint = self.model.fingerprint()
        header: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "memory": None,
        }
        if self.memory is not None:
            self.memory.fingerprint = fingerprint
            header["memory"] = self._save_memory(self.memory, folder)
        tensors = {
            "window": self.window,
            "window_lengths": self.window_lengths,
            "positions": self.positions,
            "open": self.open,
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header["checksum"] = _checksum(header, tensors)
        temporary = folder / f"{STATE_FILE}.{uuid.uuid4().hex}.tmp"
        try:
            save_file(tensors, temporary, metadata={"xlroute": json.dumps(header)})
            os.replace(temporary, folder / STATE_FILE)
        finally:
            temporary.unlink(missing_ok=True)
        if before is not None and before["memory"] is not None:
            self._release(before["memory"], folder, header["memory"])

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
        return TransformerXLState(
            self.window, self.window_lengths, self.positions, self.open, self.memory, self.model
        )

    def _save_memory(self, memory: MemoryStore, folder: Path) -> dict[str, Any]:
        """Commit the memory, or copy it into the folder; what the header says of it."""
        if memory.path is None:
            path = folder / f"memory-{uuid.uuid4().hex[:12]}"
            return {"path": None, "inside": path.name, "commit": memory.copy_to(path), "pin": None}
        commit = memory.commit()
        path = Path(memory.path).resolve()
        inside = os.path.relpath(path, folder.resolve()) if path.is_relative_to(folder.resolve()) else None
        return {"path": str(path), "inside": inside, "commit": commit, "pin": memory.pin(commit)}

    def _release(self, before: dict[str, Any], folder: Path, now: dict[str, Any] | None) -> None:
        """Let go of the memory that the replaced state named, once nothing names it."""
        if before["pin"] is not None:
            if self.memory is not None and now is not None and now["path"] == before["path"]:
                self.memory.unpin(before["pin"])
        elif now is None or now["inside"] != before["inside"]:
            shutil.rmtree(folder / before["inside"], ignore_errors=True)

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
) -> TransformerXLState:
    """See `RoutedTransformerXL.load_state`."""
    if mode not in ("r", "r+"):
        raise ValueError(f"mode: expected 'r' or 'r+', got {mode!r}")
    folder = Path(folder)
    header = _read_header(folder)
    fingerprint = model.fingerprint()
    if header["fingerprint"] != fingerprint and not allow_other_weights:
        raise FingerprintError(
            f"{folder / STATE_FILE}: expected a state of these weights ({fingerprint}), "
            f"got one of other weights ({header['fingerprint']})"
        )
    with safe_open(folder / STATE_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    if header.pop("checksum") != _checksum(header, tensors):
        raise CorruptionError(f"{folder / STATE_FILE}: the file is damaged (its checksum does not match)")
    weight = model.embedding.weight
    device = weight.device if device is None else torch.device(device)
    expected = (model.depth, None, model.mem_len, model.dim)
    got = tuple(tensors["window"].shape)
    if any(e not in (None, g) for e, g in zip(expected, got, strict=True)):
        raise ValueError(
            f"{folder / STATE_FILE}: expected a window [depth, b, mem_len, dim] of {expected}, got {got}"
        )
    memory = None
    if header["memory"] is not None:
        memory = _open_memory(
            header["memory"], folder, mode, device, None if allow_other_weights else fingerprint
        )
    return TransformerXLState(
        window=tensors["window"].to(device),
        window_lengths=tensors["window_lengths"],
        positions=tensors["positions"],
        open=tensors["open"].to(device),
        memory=memory,
        model=model,
    )


def _open_memory(
    named: dict[str, Any],
    folder: Path,
    mode: Literal["r", "r+"],
    device: torch.device,
    fingerprint: str | None,
) -> MemoryStore:
    # A folder that was moved together with its memory is found by the relative path first.
    candidates = [folder / named["inside"]] if named["inside"] is not None else []
    if named["path"] is not None:
        candidates.append(Path(named["path"]))
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise StoreNotFoundError(
            f"{folder / STATE_FILE}: its memory is not there (looked at {', '.join(map(str, candidates))})"
        )
    store = MemoryStore.open(path, mode=mode, device=device, fingerprint=fingerprint, commit=named["commit"])
    if mode == "r+":
        return store
    with store:
        return store.fork()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / STATE_FILE
    if not path.exists():
        raise StoreNotFoundError(f"{path}: there is no saved state")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CorruptionError(f"{path}: the file is damaged ({error})") from error
    if "xlroute" not in metadata:
        raise FormatError(f"{path}: expected a state saved by xlroute, got another safetensors file")
    try:
        header: dict[str, Any] = json.loads(metadata["xlroute"])
        version = header["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorruptionError(f"{path}: the file is damaged (its header cannot be read)") from error
    if version != FORMAT_VERSION:
        raise FormatError(f"{path}: expected format version {FORMAT_VERSION}, got {version}")
    return header


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """CRC32C over the header and the tensors with their names, types and shapes."""
    crc = google_crc32c.value(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = google_crc32c.extend(crc, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        crc = google_crc32c.extend(crc, tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return int(crc)
