"""Training for examples/pg19.py: models, checkpoints that survive a kill at any instant, and the loop."""

import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from statistics import median
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from pg19_data import Corpus, Tokenizer, UserError, bytes_per_token, training_segments
from pg19_settings import ROUTINGS, Settings
from torch import Tensor, nn
from tqdm import tqdm

from xlroute import RoutedTransformerXL, TransformerXLState

WARMUP = 0.1  # share of the steps in which the learning rate rises
FINAL_LEARNING_RATE = 0.1  # of the highest one
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
FAST_RATE = 10.0  # learning rate of gates and routing tokens, in those of the other weights
UNTIMED_STEPS = 10  # the first in a process on a GPU, in which the model is compiled


def build_model(mode: str, settings: Settings, vocab_size: int) -> RoutedTransformerXL:
    """An untrained model of one mode. Whatever weights two modes have in common start equal."""
    # Between them, the first two have all weights that any two modes share.
    models = {each: random_model(each, settings, vocab_size) for each in ("learned", "content", mode)}
    start: dict[tuple[str, torch.Size], Tensor] = {}
    for each in models.values():
        for name, weight in each.state_dict().items():
            start.setdefault((name, weight.shape), weight)
    model = models[mode]
    model.load_state_dict({name: start[name, weight.shape] for name, weight in model.state_dict().items()})
    return model.to(settings.device)


def check_model(settings: Settings, vocab_size: int) -> None:
    """Raise UserError for sizes that make no model; nothing is allocated."""
    try:
        with torch.device("meta"):
            for mode in dict.fromkeys(("learned", "content", *settings.modes)):
                random_model(mode, settings, vocab_size)
    except ValueError as error:
        raise UserError(f"no such model: {error}") from None


def random_model(mode: str, settings: Settings, vocab_size: int) -> RoutedTransformerXL:
    """A model of one mode, its weights as the seed and the order in which it is built have them."""
    memory: dict[str, Any] = {"memory_layers": ()}
    if mode in ROUTINGS:
        memory = {"memory_layers": settings.memory_layers, "memory_routing": mode}
    by_chunks = mode in ("content", "both") and settings.routing_chunk > 1
    torch.manual_seed(settings.seed)
    return RoutedTransformerXL(
        vocab_size=vocab_size,
        dim=settings.dim,
        depth=settings.depth,
        heads=settings.heads,
        dim_head=settings.dim_head,
        mem_len=0 if mode == "none" else settings.mem_len,
        **memory,
        num_tokens_kv=settings.num_tokens_kv,
        kv_routing_tokens=settings.routing_tokens,
        routing_chunk=settings.routing_chunk,
        num_content_tokens_kv=settings.num_content_tokens_kv,
        routing_shortlist=None if by_chunks else settings.routing_shortlist,
        segment_len=settings.segment_len,
        dropout=settings.dropout,
        routed_self_attention=settings.routed_self_attention,
        routed_feedforward=settings.routed_feedforward,
        memory_grad_segments=settings.memory_grad_segments,
    )


def compile_blocks(model: RoutedTransformerXL, settings: Settings) -> None:
    """On a GPU, compile each block in place; the memory is read outside of the blocks.

    They run as CUDA graphs, which take the host a tenth of the time, but for rows that carry gradient: what a
    graph writes is overwritten in the next step, see `begin_step`, and such rows stay for longer.
    """
    if settings.device == "cuda":
        # What was compiled before, for other modes, counts towards a limit beyond which nothing is. All
        # blocks are one function, and a memory is empty, grows, is full, as long in all streams or not.
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = 64
        model.compile_blocks(mode="default" if model.memory_grad_segments else "reduce-overhead")


def begin_step() -> None:
    """Tell CUDA graphs that nothing of the step before is needed."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def autocast(settings: Settings) -> AbstractContextManager[None]:
    """Bfloat16 on a GPU, full precision on a CPU."""
    return torch.autocast("cuda", torch.bfloat16, enabled=settings.device == "cuda")


def initial_state(
    model: RoutedTransformerXL, settings: Settings, streams: int, path: Path | None = None
) -> TransformerXLState:
    """A state that has read nothing, with an empty memory if the model has memory layers."""
    if not model.memory_layers:
        return model.initial_state(streams=streams)
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    memory = model.create_memory(path, streams=streams, capacity=settings.capacity, dtype=dtype)
    return model.initial_state(streams=streams, memory=memory)


def memory_rows(state: TransformerXLState) -> int:
    """Rows that the fullest stream holds in each memory layer."""
    return 0 if state.memory is None else int(state.memory.lengths.max())


def optimizer_for(model: RoutedTransformerXL) -> torch.optim.AdamW:
    """AdamW that decays matrices alone: not gains, biases, embeddings, gates and all that routes.

    Gates, which start nearly shut, and routing tokens and the logit of looking at nothing, whose numbers are
    ten times as large as other weights, learn faster than the rest: else a short training would leave them
    where they started.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("memory_gate", "null_logit", "routing_token")):
            fast.append(parameter)
        elif parameter.ndim == 2 and not any(part in name for part in ("embedding", "age_bias", "pool")):
            decayed.append(parameter)
        else:
            kept.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY, "rate": 1.0},
        {"params": kept, "weight_decay": 0.0, "rate": 1.0},
        {"params": fast, "weight_decay": 0.0, "rate": FAST_RATE},
    ]
    on_gpu = model.embedding.weight.is_cuda  # where one kernel does it all
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=on_gpu)


def learning_rate(place: float, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to a tenth: the rate of the step at a `Training.place`."""
    warmup = max(1, round(WARMUP * settings.schedule))
    if place + 1 <= warmup:
        return settings.learning_rate * (place + 1) / warmup
    done = max(0.0, place - warmup) / max(1, settings.schedule - warmup)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return settings.learning_rate * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


class StepClock:
    """What each step in this process adds to the time of a training, or of an evaluation.

    On a GPU, the first steps, in which the model is compiled, count as much as those that follow them. So do
    later ones in which it is compiled anew, as where the first book ends: one that takes over five times as
    long as those before it counts as much as they do.
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device != "cpu"
        self._number = 0
        self._last: deque[float] = deque(maxlen=UNTIMED_STEPS)

    def counted(self, seconds: float) -> float:
        """What a step that took so long adds."""
        number, self._number = self._number, self._number + 1
        if not self._on_gpu:
            return seconds
        if number >= UNTIMED_STEPS and seconds > 5 * median(self._last):
            seconds = median(self._last)
        self._last.append(seconds)
        if number < UNTIMED_STEPS:
            return 0.0
        return 2 * seconds if number < 2 * UNTIMED_STEPS else seconds


def token_nats(logits: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Negative log-likelihood of each target, [b, n], 0 beyond the lengths."""
    device = logits.device
    targets, lengths = (each.to(device, non_blocking=True) for each in (targets, lengths))
    nats = F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")
    return nats.masked_fill(torch.arange(targets.shape[1], device=device) >= lengths[:, None], 0)


class PeakMemory:
    """The most memory used since this was made: by the process on a CPU, by tensors on a GPU."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            # Linux forgets the high-water mark of a process when told to; elsewhere the mark is that of the
            # whole run.
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The mark so far."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024


class Interrupt:
    """Ctrl-C, SIGTERM and an alarm: KeyboardInterrupt, put off to the next safe moment inside `held`."""

    def __init__(self) -> None:
        self.asked = False
        self.signal = signal.SIGINT
        self._held = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, self._handle)

    @contextmanager
    def after(self, seconds: float | None) -> Iterator[None]:
        """Inside, the alarm goes off once so many seconds have passed, unless they are None."""
        signal.setitimer(signal.ITIMER_REAL, seconds or 0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked, self.signal = True, signal.Signals(number)
        if not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, an interrupt only sets `asked`; it is raised on leaving at the latest."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.asked:
            raise KeyboardInterrupt


class Metrics:
    """metrics.jsonl: one line for every training step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def lines(self) -> list[dict[str, Any]]:
        """All complete lines; a kill can leave a part of one at the end."""
        if not self._path.exists():
            return []
        text = self._path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def cut_back(self, mode: str, step: int) -> None:
        """Drop the lines of `mode` beyond `step`: a resumed training writes them again."""
        kept = [line for line in self.lines() if line["mode"] != mode or line["step"] <= step]
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def append(self, **line: Any) -> None:
        """Add a line; it has left the process when this returns, so that a kill does not lose it."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@dataclass(frozen=True)
class Run:
    """What stays the same throughout a run."""

    settings: Settings
    corpus: Corpus
    tokenizer: Tokenizer
    out: Path
    checkpoint_every: int  # steps
    interrupt: Interrupt

    @property
    def metrics(self) -> Metrics:
        """The lines written in training."""
        return Metrics(self.out / "metrics.jsonl")


@dataclass
class Training:
    """All that changes while a mode trains. What a checkpoint holds brings it back exactly."""

    model: RoutedTransformerXL
    optimizer: torch.optim.AdamW
    state: TransformerXLState
    step: int = 0  # steps done; tells where in the data to go on, which are a function of the seed
    tokens: int = 0  # that were trained on
    seconds: float = 0.0  # spent in steps, see `StepClock`
    peak_bytes: int = 0

    def place(self, settings: Settings) -> float:
        """How far this is in the schedule: by the steps done, or by the time passed if that is further."""
        passed = 0.0 if settings.minutes is None else self.seconds / (60 * settings.minutes)
        return max(0 if settings.steps is None else self.step, settings.schedule * passed)

    def save(self, folder: Path) -> None:
        """Write the checkpoint of this step, all or nothing, then drop older ones."""
        name = f"step-{self.step:08d}"
        if not (folder / name).exists():
            temporary = folder / f"{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            self.model.save_pretrained(temporary / "model")
            self.state.save(temporary / "state")
            progress = {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "peak_bytes": self.peak_bytes,
            }
            random = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                random["cuda"] = torch.cuda.get_rng_state()
            content = {"progress": progress, "optimizer": self.optimizer.state_dict(), "random": random}
            torch.save(content, temporary / "training.pt")
            os.replace(temporary, folder / name)
        for old in folder.glob("step-*"):
            if old.name != name:
                shutil.rmtree(old)

    @classmethod
    def load(cls, checkpoint: Path, settings: Settings) -> "Training":
        """The training that a checkpoint holds.

        Raises:
            UserError: the checkpoint is damaged, or of another model.
            MemoryStoreError: its memory is damaged, or was written by other weights.
        """
        try:
            model = RoutedTransformerXL.from_pretrained(checkpoint / "model", device=settings.device)
            content = torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)
            optimizer = optimizer_for(model)
            optimizer.load_state_dict(content["optimizer"])
        except (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError) as error:
            raise UserError(f"{checkpoint} cannot be read: {error}") from None
        state = model.load_state(checkpoint / "state", mode="r")
        torch.set_rng_state(content["random"]["cpu"])
        if settings.device == "cuda":
            torch.cuda.set_rng_state(content["random"]["cuda"])
        return cls(model.train(), optimizer, state, **content["progress"])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a mode."""
    return max((path for path in folder.glob("step-*") if path.suffix != ".tmp"), default=None)


def train(mode: str, run: Run) -> Training:
    """Train one mode to its end, going on from its last checkpoint if there is one."""
    settings, corpus, tokenizer, metrics = run.settings, run.corpus, run.tokenizer, run.metrics
    folder = run.out / mode / "checkpoints"
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        training = Training.load(checkpoint, settings)
    else:
        model = build_model(mode, settings, tokenizer.vocab_size + 1).train()
        state = initial_state(model, settings, settings.streams)
        training = Training(model, optimizer_for(model), state)
        torch.manual_seed(settings.seed)
    clock = StepClock(settings.device)
    compile_blocks(training.model, settings)
    metrics.cut_back(mode, training.step)
    peak = PeakMemory(settings.device)
    # Nats per token are bits per byte up to this factor, exact for bytes and for other tokens an average.
    bits = bytes_per_token(corpus, tokenizer) * math.log(2)
    reads = 1 + settings.memory_grad_segments  # segments in a step
    data = training_segments(
        corpus,
        tokenizer,
        streams=settings.streams,
        segment_len=settings.segment_len,
        skip=training.step * reads,
    )
    timed = settings.minutes is not None
    progress = tqdm(
        total=settings.steps if settings.minutes is None else round(60 * settings.minutes),
        initial=round(training.seconds) if timed else training.step,
        desc=f"train {mode:7}",
        unit="s" if timed else "step",
        mininterval=0.2 if sys.stderr.isatty() else 15,
        dynamic_ncols=True,
    )
    smooth: float | None = None
    with run.interrupt.held(), progress:
        while training.place(settings) < settings.schedule:
            segments = list(islice(data, reads))
            rate = learning_rate(training.place(settings), settings)
            began = time.perf_counter()
            loss, counted = train_step(training, settings, segments)
            seconds = time.perf_counter() - began
            training.seconds += clock.counted(seconds)
            training.step += 1
            training.tokens += counted
            training.peak_bytes = max(training.peak_bytes, peak.bytes())
            metrics.append(
                mode=mode,
                step=training.step,
                loss=loss,
                bits_per_byte=loss / bits,
                learning_rate=rate,
                memory_rows=memory_rows(training.state),
                tokens=training.tokens,
                seconds=round(training.seconds, 3),
                tokens_per_second=round(counted / seconds, 1),
            )
            smooth = loss if smooth is None else 0.9 * smooth + 0.1 * loss
            progress.set_postfix_str(
                f"loss {smooth:.3f}, {smooth / bits:.3f} bits/byte, "
                f"{counted / seconds:,.0f} tokens/s, "
                f"{memory_rows(training.state):,} memory rows",
                refresh=False,
            )
            progress.update(round(training.seconds) - progress.n if timed else 1)
            stop = run.interrupt.asked
            ended = training.place(settings) >= settings.schedule
            if stop or ended or training.step % run.checkpoint_every == 0:
                training.save(folder)
            if stop:
                break
    return training


def train_step(
    training: Training, settings: Settings, segments: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> tuple[float, int]:
    """Read segments of every stream and improve the weights: the mean loss in nats, of how many tokens."""
    for group in training.optimizer.param_groups:
        group["lr"] = group["rate"] * learning_rate(training.place(settings), settings)
    begin_step()
    nats = []
    for tokens, targets, lengths, ends in segments:
        with autocast(settings):
            logits, training.state = training.model(
                tokens.to(settings.device, non_blocking=True), training.state, lengths=lengths, ends=ends
            )
        nats.append(token_nats(logits, targets, lengths).sum())
    counted = sum(int(lengths.sum()) for _, _, lengths, _ in segments)
    loss = torch.stack(nats).sum() / counted
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), GRADIENT_NORM)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return loss.item(), counted
