"""The run: step after step through all phases, with checkpoints, validation, rollback and resumption.

Everything that decides the next step is in the trainer's state, and a checkpoint holds all of it: a resumed run is the
run that was never stopped, to the bit. The loop knows nothing of the terminal: what happens is told to ``tell``, one
record at a time, and written to ``metrics.jsonl``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dsv4.accounting.parameters import parameters
from dsv4.checkpoint.training import list_checkpoints, load_checkpoint, remove_later, save_checkpoint
from dsv4.config.train import TrainConfig
from dsv4.data.batch import Batch
from dsv4.data.loader import Loader
from dsv4.data.store import TokenStore
from dsv4.data.tokenizer import plain_text
from dsv4.device import peak_memory_bytes
from dsv4.eval.bits import bits_per_byte
from dsv4.eval.generate import generate
from dsv4.model.transformer import Transformer
from dsv4.optim.optimizer import Optimizer
from dsv4.train.anticipatory import Anticipation, Routing, Work
from dsv4.train.baseline import ngram_bits
from dsv4.train.flops import step_flops
from dsv4.train.machine import matmul_rate
from dsv4.train.metrics import MetricsLog, truncate
from dsv4.train.nonfinite import NonFiniteError
from dsv4.train.schedule import Plan, Position, after, plan
from dsv4.train.spikes import SpikeDetector
from dsv4.train.step import StepResult, choose_experts, set_precision, train_step

Record = dict[str, Any]

SAMPLE_TOKENS, SAMPLE_TEMPERATURE, SAMPLE_TOP_P = 120, 0.7, 0.95


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of, ready to train."""

    config: TrainConfig
    model: Transformer
    loader: Loader
    validation: Callable[[int], list[Batch]]  # rows of this length, always the same
    store: TokenStore  # of the train split
    tokenizer: Tokenizer
    run: Path
    teacher: Transformer | None = None


class SpikeError(RuntimeError):
    """The loss spiked again after the last rollback allowed. The last checkpoint is as it was."""


class Trainer:
    """A run in progress. ``clock`` returns seconds; ``today`` is the time of day to write down; ``tell`` receives
    every record.
    """

    def __init__(self, parts: Parts, *, clock: Callable[[], float], today: str, tell: Callable[[Record], None]) -> None:
        self.parts, self.config, self.model = parts, parts.config, parts.model
        self.clock, self.today = clock, today
        self.log = MetricsLog(parts.run / "metrics.jsonl")
        self.checkpoints = parts.run / "checkpoints"
        self._listeners = [tell]
        self.optimizer = Optimizer(parts.model, parts.config.optimizer)
        self.position = Position()  # after the last step done
        self.ahead = Position()  # after the last step fetched
        s = parts.config.stability
        self.spikes = SpikeDetector(s.spike_deviations, s.spike_memory)
        self.anticipation = Anticipation(s.stale_steps)
        if s.anticipatory == "always":
            self.anticipation.activate(1, 2**62)
        self.rollbacks: int = 0
        self.seconds: float = 0.0  # of steps done, before and after every resumption
        self.device = parts.model.embed.weight.device
        self.rate = matmul_rate(getattr(torch, parts.config.activations), self.device)

    # ---- the run ----

    def train(self) -> None:
        """Train from where the run stands to its end."""
        self._start()
        while True:
            work = self.anticipation.next(self.position.step + 1, self._fetch, self._choose)
            if work is None:
                break
            if work.plan.is_first:
                self._begin_phase(work.plan)
            self._step(work)
        self._end()

    def _start(self) -> None:
        model = self.model.config
        count = parameters(model).with_mtp
        self.tell(
            kind="start",
            time=self.today, step=self.position.step, tokens=self.position.tokens, model=self.config.model,
            parameters_total=count.total, parameters_activated=count.activated, matmul_flops=self.rate,
            torch=torch.__version__, threads=torch.get_num_threads(),
        )  # fmt: skip
        if not list_checkpoints(self.checkpoints):
            self._checkpoint()  # what a rollback of the first steps returns to

    def _begin_phase(self, now: Plan) -> None:
        phase = now.phase
        self.tell(
            kind="phase", step=self.position.step, tokens=self.position.tokens, phase=phase.name,
            sequence=phase.sequence, attention=phase.attention, train=phase.train,
        )  # fmt: skip

    def _step(self, work: Work) -> None:
        start = self.clock()
        try:
            result = train_step(self.model, self.optimizer, self.config, work, self.parts.teacher)
        except NonFiniteError:
            self.tell(kind="nonfinite", step=work.plan.step)
            raise
        if work.plan.phase.train == "all" and self.spikes.is_spike(result.loss):
            self._spike(work, result)
            return
        result.apply()
        seconds = self.clock() - start
        self.seconds += seconds
        self.position = after(work.position, work.plan)
        self.tell(**self._step_record(work, result, seconds))
        self._after_step(work.plan)

    def _after_step(self, done: Plan) -> None:
        r = self.config.run
        if done.is_last or done.step % r.validation_steps == 0:
            self._validate(done)
        if done.step == self.anticipation.active_until:
            self.tell(kind="anticipatory", step=done.step, on=False)
        if done.is_last or done.step % r.checkpoint_steps == 0:
            self._checkpoint()

    def _end(self) -> None:
        phase, run = self.config.phases[-1], self.config.run
        set_precision(self.model, phase)
        if run.baseline_order:
            validation = self.parts.validation(phase.sequence)
            bits = ngram_bits(self.parts.store, validation, self.parts.tokenizer, run.baseline_order)
            self.tell(kind="baseline", name=f"byte {run.baseline_order}-gram", bits_per_byte=bits)
        if run.sample_prompt:
            self.tell(kind="sample", step=self.position.step, prompt=run.sample_prompt, text=self._sample())
        _, bits = self._bits(phase.sequence, phase.attention == "dense")
        self.tell(
            kind="end", step=self.position.step, tokens=self.position.tokens, seconds=self.seconds, bits_per_byte=bits
        )

    def _sample(self) -> str:
        """What the model writes after the recipe's prompt."""
        model, tokenizer = self.model.config, self.parts.tokenizer
        prompt = [model.bos_token_id, *plain_text(tokenizer).encode(self.config.run.sample_prompt).ids]
        token_ids = generate(
            self.model, prompt, num_tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, top_p=SAMPLE_TOP_P,
            seed=self.config.seed, stop_ids={model.eos_token_id},
        )  # fmt: skip
        return tokenizer.decode(list(token_ids))

    # ---- data ----

    def _fetch(self) -> Work | None:
        """Fetch the batches of the next step that was not fetched yet."""
        now = plan(self.config, self.ahead)
        if now is None:
            return None
        before = self.parts.loader.state()
        batches = [self.parts.loader.next_batch(rows, now.phase.sequence) for rows in now.micro_batches()]
        work = Work(plan=now, position=self.ahead, loader_state=before, batches=[b.to(self.device) for b in batches])
        self.ahead = after(self.ahead, now)
        return work

    def _choose(self, work: Work) -> list[Routing]:
        return choose_experts(self.model, work)

    # ---- spikes ----

    def _spike(self, work: Work, result: StepResult) -> None:
        """Return to the last checkpoint, and route by the past for a while."""
        step, stability = work.plan.step, self.config.stability
        self.tell(
            kind="spike", step=step, loss=result.loss, expected=self.spikes.expected, deviation=self.spikes.deviation
        )
        if self.rollbacks >= stability.max_rollbacks:
            raise SpikeError(
                f"the loss of step {step} is {result.loss:.4g} where {self.spikes.expected:.4g} was expected, after "
                f"{self.rollbacks} rollbacks; expected at most stability.max_rollbacks = {stability.max_rollbacks}. "
                f"The last checkpoint is whole"
            )
        rollbacks, seconds = self.rollbacks + 1, self.seconds
        self.restore(list_checkpoints(self.checkpoints)[-1].path)
        self.rollbacks, self.seconds = rollbacks, seconds
        self.tell(kind="rollback", step=self.position.step, from_step=step)
        if stability.anticipatory == "auto":
            self.anticipation.activate(self.position.step + 1, stability.active_steps)
            self.tell(kind="anticipatory", step=self.position.step, on=True)

    # ---- checkpoints ----

    def _checkpoint(self) -> None:
        """Record a checkpoint, then write it: a kill may leave a record too many, which resuming takes back."""
        name = f"step-{self.position.step:08d}"
        self.tell(kind="checkpoint", step=self.position.step, tokens=self.position.tokens, path=name)
        path = save_checkpoint(
            self.checkpoints, self.position.step, self.model,
            {**self.optimizer.state_tensors(), **self.anticipation.tensors()}, self._state(),
            keep=self.config.run.keep_checkpoints,
        )  # fmt: skip
        assert path.name == name

    def _state(self) -> dict[str, object]:
        waiting = self.anticipation.waiting
        return {
            "position": asdict(self.position),
            "ahead": asdict(waiting[0].position if waiting else self.ahead),
            "loader": waiting[0].loader_state if waiting else self.parts.loader.state(),
            "anticipation": self.anticipation.state(),
            "optimizer": self.optimizer.state(),
            "spikes": self.spikes.state(),
            "rollbacks": self.rollbacks,
            "seconds": self.seconds,
        }

    def restore(self, path: Path) -> None:
        """Become the run that wrote this checkpoint."""
        tensors, loaded = load_checkpoint(path, self.model)
        state: dict[str, Any] = dict(loaded)
        routing = {name: tensors[name] for name in tensors if name.startswith("routing.")}
        own = {name: tensors[name] for name in tensors if name not in routing}
        self.optimizer.load_state(own, state["optimizer"])
        self.position, self.ahead = (Position(**state[name]) for name in ("position", "ahead"))
        self.parts.loader.load_state(state["loader"])
        self.spikes.load_state(state["spikes"])
        self.rollbacks, self.seconds = state["rollbacks"], state["seconds"]
        self.anticipation.load(state["anticipation"], routing, self._fetch)

    def resume(self, path: Path) -> None:
        """``restore``, and forget later checkpoints and what the log says of later steps."""
        self.restore(path)
        remove_later(self.checkpoints, self.position.step)
        truncate(self.log.path, self.position.step)

    # ---- what is told ----

    def tell(self, **record: object) -> None:
        self.log.append(record)
        for listener in self._listeners:
            listener(record)

    def listen(self, tell: Callable[[Record], None]) -> None:
        """Let ``tell`` receive every record from now on, too."""
        self._listeners.append(tell)

    def _validate(self, done: Plan) -> None:
        loss, bits = self._bits(done.phase.sequence, done.is_dense)
        self.tell(
            kind="validation", step=self.position.step, tokens=self.position.tokens, phase=done.phase.name, loss=loss,
            bits_per_byte=bits, attention=done.phase.attention,
        )  # fmt: skip

    def _bits(self, sequence: int, dense: bool) -> tuple[float, float]:
        batches = (batch.to(self.device) for batch in self.parts.validation(sequence))
        return bits_per_byte(self.model, batches, dense=dense)

    def _step_record(self, work: Work, result: StepResult, seconds: float) -> Record:
        now, batches = work.plan, work.batches
        real, tokens = sum(b.num_real for b in batches), now.tokens
        flops = step_flops(self.model.config, batches, now)
        return {
            "kind": "step", "step": now.step, "tokens": self.position.tokens, "phase": now.phase.name,
            **result.record(), "lr": now.lr, "mtp_weight": now.mtp_weight, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "flops_utilisation": flops / seconds / self.rate,
            "memory_bytes": peak_memory_bytes(self.device), "packing_utilisation": real / tokens,
            "batch_tokens": tokens, "anticipatory": work.routing is not None,
        }  # fmt: skip
