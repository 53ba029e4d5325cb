"""Settings of a model run (`stage: model`): pretraining and instruction tuning are two such files."""

from dataclasses import dataclass, field
from typing import Literal

from cm3.config import check_seed
from cm3.errors import ConfigError
from cm3.generation.settings import SamplingSettings
from cm3.model.config import ModelConfig
from cm3.model.lora import LoRAConfig
from cm3.model.objective import ObjectiveConfig
from cm3.training.optimizer import OptimizerConfig

_AT_LEAST_ONE = (
    "steps",
    "batch_rows",
    "micro_batch_rows",
    "sequence_parallel",
    "evaluation_rows",
    "keep_checkpoints",
    "log_interval",
    "max_nonfinite_steps",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prepared data of a model run and how documents become rows."""

    train: str | dict[str, str]
    """Folder that `cm3 prepare` wrote, or several by name: a mixture. The tokenizers are taken from the first."""
    weights: dict[str, float] = field(default_factory=dict)
    """Of a mixture: share of an epoch's documents for each name, in any unit; empty is equal shares."""
    min_repetition: float = 0.3
    """Of a mixture: fewest times a document comes in an epoch, on average (the paper's down-sampling limit)."""
    max_repetition: float = 3.0
    """Of a mixture: most times."""
    validation: str | None = None
    """Prepared folder of held-out documents; null is no evaluation."""
    check_shards: bool = True
    """Compare all shards with their checksums whenever a run starts or goes on, which reads them all; off, only those
    that are missing or cut off are found."""
    sequence_length: int = 4096
    """Positions of a row."""
    packing: Literal["documents", "stream"] = "documents"
    """`documents`: whole documents are packed into a row and never see each other; `stream`: documents are
    joined and cut at the row's length, as in the paper (section 2.3)."""

    @property
    def train_folder(self) -> str:
        """Where the tokenizers of the run lie."""
        return self.train if isinstance(self.train, str) else next(iter(self.train.values()))


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """Everything that decides the outcome of a training run of the transformer."""

    data: DataConfig
    """Prepared data."""
    model: ModelConfig
    """The transformer; its vocabulary size must be that of the data."""
    initialize_from: str | None = None
    """Model whose weights the run starts from: a folder, `owner/name` on the Hub, or `demo`; null draws them anew. Its
    tokenizers must be those of the data and its settings those of `model:`, but for dropout and the initial values."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters of the model of `initialize_from`, which is then frozen; off by default."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """CM3 span masking or plain next-token prediction."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    steps: int
    """Optimiser steps of the whole run."""
    batch_rows: int
    """Rows of one optimiser step, over all processes and micro batches."""
    micro_batch_rows: int
    """Rows of one forward pass of one process; the rest of a step is gradient accumulation."""
    sequence_parallel: int = 1
    """Processes that share the same rows, each a part of every row: for sequences too long for one (DeepSpeed Ulysses).
    Divides the number of processes, `data.sequence_length` and both numbers of heads; 1 is off."""
    z_loss_weight: float = 0.0
    """Weight of the squared log partition function (Chameleon uses 1e-5); 0 is off."""
    ema_decay: float = 0.0
    """Decay of an fp32 average of the weights, which is then what is evaluated and exported; 0 is off."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; the optimiser always holds fp32."""
    export_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the final model folder."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO: what processes share out: 0 nothing (fp32 only), 1 the optimiser, 2 and the gradients, 3 and the
    weights."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the memory of the CPU."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    compile: bool = False
    """Compile the model with torch.compile: needs a C++ compiler, and a minute at the start."""
    evaluation_interval: int = 1000
    """Steps between evaluations; one more follows the last step, and with `initialize_from` one comes before the
    first. 0 leaves only the one after the last."""
    evaluation_rows: int = 256
    """Rows of an evaluation."""
    checkpoint_interval: int = 1000
    """Steps between checkpoints; one more follows the last step, and one a SIGTERM. 0 leaves only those."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this many steps are kept for good; 0 keeps none of them."""
    max_nonfinite_steps: int = 10
    """Steps in a row whose loss or gradient may be not finite before the run stops with an error. Such a step does not
    change the weights, and `skipped.jsonl` in the run folder names its documents."""
    log_interval: int = 10
    """Steps between console lines."""
    sample_interval: int = 0
    """Steps between sample sheets, `samples/step_00001000.png` and so on in the run folder: pictures that the weights
    draw, and captions that they write; one more follows the last step. 0 is off. The first process makes them with a
    copy of the weights, for which its memory must have room, while the others wait."""
    sample_prompts: tuple[str, ...] = ()
    """What the sheets draw; empty takes the first captions of the validation data."""
    wandb_project: str | None = None
    """Project of Weights & Biases that gets what TensorBoard gets; null is off."""
    generation: SamplingSettings = field(default_factory=SamplingSettings)
    """Sampling defaults that the exported model carries."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, the spans and dropout."""
    output: str
    """Run folder; a run that finds checkpoints in it goes on from the newest."""

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; choose 1 or more")
        check_seed(self.seed)
        if self.keep_every_steps < 0:
            raise ConfigError(f"keep_every_steps={self.keep_every_steps}; choose 0 (off) or more")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigError(f"zero_stage={self.zero_stage}; choose 0, 1, 2 or 3")
        if self.zero_stage == 0 and self.precision == "bf16":
            raise ConfigError(
                "zero_stage=0 with precision=bf16: DeepSpeed trains bf16 wrongly at stage 0; choose stage 1, or fp32"
            )
        if self.zero_stage == 0 and self.offload_optimizer:
            raise ConfigError("offload_optimizer needs a share of the optimiser to move; choose zero_stage 1, 2 or 3")
        if self.ema_decay and self.zero_stage == 3:
            raise ConfigError(
                "ema_decay needs whole weights on every process; choose zero_stage 1 or 2, or ema_decay 0"
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay={self.ema_decay}; choose a value from 0 to below 1")
        for name, value in (
            ("model.num_heads", self.model.num_heads),
            ("model.num_key_value_heads", self.model.key_value_heads),
            ("data.sequence_length", self.data.sequence_length),
        ):
            if value % self.sequence_parallel:
                raise ConfigError(
                    f"sequence_parallel={self.sequence_parallel} does not divide {name}={value}; each process takes an "
                    "equal share of it, so choose a divisor"
                )
        if self.lora.rank and self.initialize_from is None:
            raise ConfigError(f"lora.rank={self.lora.rank} adapts a finished model; name it in initialize_from")
        if self.data.sequence_length > self.model.max_positions:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} is above model.max_positions="
                f"{self.model.max_positions}; lower the first or raise the second"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro batches of a step in each process.

        Raises:
            ConfigError: the processes, or the step's rows, do not split evenly.
        """
        if world_size % self.sequence_parallel:
            raise ConfigError(
                f"sequence_parallel={self.sequence_parallel} does not divide the number of processes, {world_size}; "
                f"start a multiple of {self.sequence_parallel} with torchrun, or choose a divisor"
            )
        groups = world_size // self.sequence_parallel
        rows = self.micro_batch_rows * groups
        if self.batch_rows % rows:
            sharing = "processes" if self.sequence_parallel == 1 else f"groups of {self.sequence_parallel} processes"
            raise ConfigError(
                f"batch_rows={self.batch_rows} is no multiple of micro_batch_rows={self.micro_batch_rows} times "
                f"{groups} {sharing}; choose a multiple of {rows}"
            )
        return self.batch_rows // rows
