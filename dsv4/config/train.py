"""What a training run is: data, optimiser, schedule, losses, phases. No torch.

Each field says where its number comes from: ``report`` (DeepSeek-V4), ``V3`` or ``V3.2`` (the report refers to them),
or ``ours`` where nothing is published. Built-in recipes are in ``dsv4.config.recipes``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from dsv4.config.backend import BackendChoice

Train = Literal["all", "indexer"]
AttentionMode = Literal["dense", "sparse"]
Precision = Literal["plain", "fp8", "fp4"]

CONVERSATIONS = "conversations"  # the source that is made here
TRAIN = "train"  # the value of data.tokenizer that asks for a new one
INIT = "init"  # the tokenizer of the model that a run starts from


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens."""

    source: str
    """``stdlib`` (the Python standard library of this machine), a folder, a .jsonl or a .parquet file; or
    ``conversations``, made here, in which only what the assistant writes is predicted."""
    text_field: str
    """The field that holds a document's text in JSONL and Parquet."""
    bad_files: Literal["error", "skip"]
    """What to do with a file that is binary or not UTF-8. Ours."""
    tokenizer: str
    """``train`` (a byte-level BPE of the model's vocabulary size), a tokenizer.json, ``deepseek-v4``, or ``init`` (that
    of the model the run starts from)."""
    validation_fraction: float
    """Share of documents, chosen by hash, that is never trained on; of conversations, share of their facts. Ours."""
    fim_rate: float
    """Share of documents turned into fill-in-the-middle (prefix, suffix, middle). V3: 0.1."""
    split_rate: float
    """Share of tokens that join punctuation and line breaks which are split into their parts. V3 gives no number."""
    pack_buffer: int
    """Documents among which best-fit packing looks for the one that fills a row. Ours."""
    num_conversations: int = 0
    """How many are made where the source is ``conversations``. Ours."""

    def __post_init__(self) -> None:
        problems = _outside("data.validation_fraction", self.validation_fraction, 0, 0.5)
        problems += _outside("data.fim_rate", self.fim_rate, 0, 1)
        problems += _outside("data.split_rate", self.split_rate, 0, 1)
        problems += _below("data.pack_buffer", self.pack_buffer, 1)
        problems += _not_one_of("data.bad_files", self.bad_files, ("error", "skip"))
        if self.has_conversations:
            problems += _below("data.num_conversations", self.num_conversations, 1)
            if self.tokenizer == TRAIN:
                problems.append(f"data.tokenizer is {TRAIN!r}; expected one that is there: conversations train none")
            for name in ("fim_rate", "split_rate"):
                if getattr(self, name) > 0:
                    problems.append(
                        f"data.{name} is {getattr(self, name)}; expected 0: a conversation is trained on as it is asked"
                    )
        elif self.num_conversations:
            problems.append(
                f"data.num_conversations is {self.num_conversations}; expected 0: data.source is {self.source!r}"
            )
        _refuse(problems)

    @property
    def has_conversations(self) -> bool:
        return self.source == CONVERSATIONS


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon for matrices, AdamW for the rest (report 2.4), and the learning rate both share (report 4.2.2)."""

    peak_lr: float
    """Learning rate after warm-up. Report: 2.7e-4 (Flash), 2.0e-4 (Pro)."""
    end_lr: float
    """Learning rate at the end of the cosine. Report: a tenth of the peak."""
    warmup_steps: int
    """Steps of linear warm-up. Report: 2000."""
    decay_fraction: float
    """Share of the run's tokens, at its end, over which the cosine falls. The report says near the end; ours."""
    muon_momentum: float
    """Nesterov momentum. Report: 0.95."""
    muon_update_rms: float
    """Root mean square of a Muon update before the learning rate. Report: 0.18."""
    muon_per_head: bool
    """Orthogonalise the query matrix head by head instead of whole. Ours; the report does not say."""
    muon_dtype: Literal["bfloat16", "float32"]
    """Dtype of the Newton-Schulz products. Report 3.5.1: bfloat16."""
    adam_betas: tuple[float, float]
    """AdamW's averages. Report: 0.9, 0.95."""
    adam_eps: float
    """AdamW's epsilon. Report: 1e-20."""
    weight_decay: float
    """Decoupled, times the learning rate, for Muon and AdamW alike. Report: 0.1."""
    clip_norm: float
    """Largest norm of the gradient; the indexer's own is clipped apart. V3: 1.0."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("peak_lr", "end_lr", "muon_update_rms", "adam_eps", "clip_norm"):
            problems += _not_positive(f"optimizer.{name}", getattr(self, name))
        if self.end_lr > self.peak_lr:
            problems.append(f"optimizer.end_lr is {self.end_lr}; expected at most peak_lr = {self.peak_lr}")
        problems += _below("optimizer.warmup_steps", self.warmup_steps, 0)
        problems += _outside("optimizer.decay_fraction", self.decay_fraction, 0, 1)
        problems += _outside("optimizer.weight_decay", self.weight_decay, 0, 1)
        for name, value in (
            ("muon_momentum", self.muon_momentum), ("adam_betas[0]", self.adam_betas[0]),
            ("adam_betas[1]", self.adam_betas[1]),
        ):  # fmt: skip
            if not 0 <= value < 1:
                problems.append(f"optimizer.{name} is {value}; expected 0 <= value < 1")
        problems += _not_one_of("optimizer.muon_dtype", self.muon_dtype, ("bfloat16", "float32"))
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many tokens a step sees (report 4.2.2: a ramp to 75.5M tokens for Flash, 94.4M for Pro)."""

    start_tokens: int
    """Tokens of the first step. The report says a small size; ours."""
    tokens: int
    """Tokens of a step once the ramp is over."""
    ramp_tokens: int
    """Tokens over which the batch grows, linearly, in whole rows. Ours."""
    micro_tokens: int
    """Tokens of one forward and backward pass on one device; more are accumulated. Ours."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("start_tokens", "tokens", "micro_tokens"):
            problems += _below(f"batch.{name}", getattr(self, name), 1)
        problems += _below("batch.ramp_tokens", self.ramp_tokens, 0)
        if self.start_tokens > self.tokens:
            problems.append(f"batch.start_tokens is {self.start_tokens}; expected at most batch.tokens = {self.tokens}")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised, beside the next token (report 2.1, 4.2.2)."""

    mtp_weight: float
    """Weight of the MTP block's loss. Report: 0.3."""
    mtp_weight_decay: float
    """The same from the start of the learning rate's decay. Report: 0.1."""
    balance_weight: float
    """Weight of the sequence-wise balance loss. Report: 1e-4."""
    bias_speed: float
    """Step of the routing bias towards balance, each optimiser step. Report: 0.001."""
    indexer_weight: float
    """Weight of the indexer's KL in the sparse phases; it reaches the indexer alone. Ours."""
    indexer_lr: float
    """Learning rate of the indexer's warm-up. V3.2: 1e-3."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("mtp_weight", "mtp_weight_decay", "balance_weight", "bias_speed", "indexer_weight"):
            if getattr(self, name) < 0:
                problems.append(f"loss.{name} is {getattr(self, name)}; expected 0 or more")
        _refuse(problems + _not_positive("loss.indexer_lr", self.indexer_lr))


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A teacher beside the text: (1 - weight) * next token + weight * KL to the teacher (report 5.1.2, on text)."""

    teacher: str = ""
    """The folder of a model, with its tokenizer.json, that stays as it is during the run; empty for none. Ours."""
    weight: float = 0.0
    """Share of the reverse KL over the whole vocabulary; 1 leaves the text's own tokens out. Ours."""

    def __post_init__(self) -> None:
        problems = _outside("distill.weight", self.weight, 0, 1)
        if self.teacher and self.weight == 0:
            problems.append(
                f"distill.weight is 0 with distill.teacher = {self.teacher!r}; expected more than 0, up to 1"
            )
        if self.weight and not self.teacher:
            problems.append(f"distill.weight is {self.weight} without distill.teacher; expected a model's folder, or 0")
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """Loss spikes: detection, a short rollback, anticipatory routing for a while (report 4.2.3)."""

    anticipatory: Literal["off", "auto", "always"]
    """``auto``: on after a spike, for ``active_steps``. Report: auto."""
    stale_steps: int
    """By how many steps the routing indices are older than the features. The report does not say; ours."""
    active_steps: int
    """Steps for which a spike keeps anticipatory routing on. The report says a certain period; ours."""
    spike_deviations: float
    """A loss this many smoothed deviations above its smoothed value is a spike. Ours."""
    spike_memory: int
    """Steps over which loss and deviation are smoothed, and before the end of which nothing is a spike. Ours."""
    max_rollbacks: int
    """Rollbacks after which the run stops with an error, instead of going round for ever. Ours."""

    def __post_init__(self) -> None:
        problems = _not_one_of("stability.anticipatory", self.anticipatory, ("off", "auto", "always"))
        problems += _below("stability.stale_steps", self.stale_steps, 0)
        for name in ("active_steps", "spike_memory"):
            problems += _below(f"stability.{name}", getattr(self, name), 1)
        problems += _below("stability.max_rollbacks", self.max_rollbacks, 0)
        _refuse(problems + _not_positive("stability.spike_deviations", self.spike_deviations))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What is written when."""

    checkpoint_steps: int
    """Steps between checkpoints; one more is written at the end of each phase."""
    keep_checkpoints: int
    """Checkpoints kept, the newest; at least 2, so that one is always whole."""
    validation_steps: int
    """Steps between validations; one more is made at the end of each phase."""
    validation_tokens: int
    """Tokens of one validation."""
    sample_queries: int
    """Every how many queries the indexer's recall against its teacher is measured. Ours."""
    baseline_order: int = 0
    """Order of the byte n-gram, counted on the same split, that the model is compared with; 0 for none. Ours."""
    sample_prompt: str = ""
    """A prompt that the finished model goes on from, for the report; empty for none. Ours."""
    tensorboard: bool = False
    """Write what is measured to RUN/tensorboard too, for TensorBoard (the extra ``tensorboard``). Ours."""

    def __post_init__(self) -> None:
        problems = _below("run.keep_checkpoints", self.keep_checkpoints, 2)
        for name in ("checkpoint_steps", "validation_steps", "validation_tokens", "sample_queries"):
            problems += _below(f"run.{name}", getattr(self, name), 1)
        problems += _outside("run.baseline_order", self.baseline_order, 0, 5)
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the schedule. Phases follow one another in one run."""

    name: str
    tokens: int
    """Length; the last step of a phase may go over it."""
    sequence: int
    """Tokens of a row. Report: 4K, 16K, 64K, 1M."""
    attention: AttentionMode
    """``dense``: CSA attends to every visible entry; ``sparse``: to the indexer's picks."""
    train: Train = "all"
    """``indexer``: the warm-up of the indexer, everything else frozen, over dense attention."""
    precision: Precision = "plain"
    """``fp4``: quantisation-aware training, every product as the released model forms it (report 3.4). ``fp8``: the
    linear maps alone, weights and inputs in FP8, summed in float32. Masters and gradients stay float32."""

    def __post_init__(self) -> None:
        problems = _below(f"phase {self.name}: tokens", self.tokens, 1)
        problems += _below(f"phase {self.name}: sequence", self.sequence, 2)
        problems += _not_one_of(f"phase {self.name}: attention", self.attention, get_args(AttentionMode))
        problems += _not_one_of(f"phase {self.name}: train", self.train, get_args(Train))
        problems += _not_one_of(f"phase {self.name}: precision", self.precision, get_args(Precision))
        if self.train == "indexer" and self.attention == "sparse":
            problems.append(
                f"phase {self.name}: attention is 'sparse' with train = 'indexer'; expected 'dense': the warm-up "
                "learns from every entry"
            )
        _refuse(problems)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole recipe."""

    model: str
    """A preset, or a config.json."""
    seed: int
    """Of the parameters, the order of documents, and everything else that is drawn."""
    activations: Literal["bfloat16", "float32"]
    """Dtype of activations; parameters are float32 masters. Report: bfloat16."""
    data: DataConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    loss: LossConfig
    stability: StabilityConfig
    run: RunConfig
    phases: tuple[Phase, ...]
    """The schedule, in order."""
    init: str = ""
    """The folder of a model whose weights the run starts from, with its tokenizer.json; empty for random ones. Ours."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    backend: BackendChoice = "auto"
    """How operations are computed; ``auto``: by the fastest that was proved on the device. Ours."""

    def __post_init__(self) -> None:
        problems = _not_one_of("activations", self.activations, ("bfloat16", "float32"))
        problems += _not_one_of("backend", self.backend, get_args(BackendChoice))
        if not 0 <= self.seed < 2**63:  # NumPy's generator would round a larger one
            problems.append(f"seed is {self.seed}; expected 0 <= seed < 2**63")
        if not self.phases:
            problems.append("phases is empty; expected at least one")
        names = [phase.name for phase in self.phases]
        for name in sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"phase {name} is given twice; expected a name of its own for each")
        if bool(self.init) != (self.data.tokenizer == INIT):
            problems.append(
                f"init is {self.init!r} with data.tokenizer = {self.data.tokenizer!r}; expected a model's folder and "
                f"{INIT!r}, or neither: weights know one tokenizer's ids"
            )
        if self.data.has_conversations and self.run.baseline_order:
            problems.append(
                f"run.baseline_order is {self.run.baseline_order}; expected 0: of conversations a part is predicted"
            )
        problems += self._distill_problems()
        knows_entries = bool(self.init)  # its indexer has been warmed up
        for phase in self.phases:
            if phase.attention == "sparse" and not knows_entries:
                problems.append(
                    f"phase {phase.name}: attention is 'sparse' before any phase has train = 'indexer'; expected the "
                    "indexer to be warmed up first"
                )
            knows_entries = knows_entries or phase.train == "indexer"
            if phase.sequence > self.batch.micro_tokens:
                problems.append(
                    f"phase {phase.name}: sequence is {phase.sequence}; expected at most batch.micro_tokens = "
                    f"{self.batch.micro_tokens}"
                )
        _refuse(problems)

    def _distill_problems(self) -> list[str]:
        """A teacher's ids are those of its own tokenizer, and an indexer's warm-up has no use for it."""
        teacher, problems = self.distill.teacher, []
        if teacher and self.data.tokenizer == TRAIN:
            problems.append(
                f"data.tokenizer is {TRAIN!r} with distill.teacher = {teacher!r}; expected the teacher's, "
                f"{teacher.rstrip('/')}/tokenizer.json"
            )
        if teacher and self.phases and all(phase.train == "indexer" for phase in self.phases):
            problems.append(f"distill.teacher is {teacher!r}; expected none: only indexers are trained")
        return problems


def _refuse(problems: list[str]) -> None:
    """Raise one ValueError, a line per problem."""
    if problems:
        raise ValueError("\n".join(problems))


def _not_positive(name: str, value: float) -> list[str]:
    return [] if value > 0 else [f"{name} is {value}; expected a positive number"]


def _below(name: str, value: int, least: int) -> list[str]:
    return [] if value >= least else [f"{name} is {value}; expected at least {least}"]


def _outside(name: str, value: float, low: float, high: float) -> list[str]:
    return [] if low <= value <= high else [f"{name} is {value}; expected {low} to {high}"]


def _not_one_of(name: str, value: object, known: tuple[str, ...]) -> list[str]:
    return [] if value in known else [f"{name} is {value!r}; expected one of {', '.join(known)}"]
