"""`cm3 show`: what a model run will cost, from its configuration alone."""

from dataclasses import dataclass

from cm3.config import dump_config
from cm3.model.config import ModelConfig, flops_per_token, parameter_count
from cm3.model.lora import adapter_parameter_count
from cm3.training.config import ModelRun

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process."""

    weights: float
    """Working copy of the weights."""
    gradients: float
    """Gradients in the format of the weights; the fp32 buffer that sums bf16 micro batches is not counted."""
    optimizer: float
    """fp32 weights and Adam's two moments."""
    activations: float
    """What the forward pass of a micro batch keeps for the backward pass."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(config: ModelRun, num_processes: int) -> Memory:
    """Estimate the memory of one process.

    ZeRO (arXiv 1910.02054, section 3.1 and figure 1): 2 + 2 + 12 bytes per parameter for weights, gradients and the
    optimiser's state in mixed precision; stage 1 shares out the last, 2 the gradients too, 3 all.
    """
    adapters = adapter_parameter_count(config.model, config.lora)
    parameters = parameter_count(config.model) + adapters
    trained = adapters or parameters
    width = 2 if config.precision == "bf16" else 4

    def shared(stage: int) -> int:
        return num_processes if config.zero_stage >= stage else 1

    return Memory(
        weights=parameters * width / shared(3),
        gradients=trained * width / shared(2),
        optimizer=trained * 12 / shared(1),
        activations=activation_bytes(config),
    )


def activation_bytes(config: ModelRun) -> float:
    """Estimate the activations of a micro batch in one process; rough.

    Korthikanti et al. (arXiv 2205.05198, section 4.1): a layer keeps 34 s b h bytes in 16 bits, of which 2 x 8 are the
    feed-forward's inner activations at its width of 4 h. Dropout's masks are left out where there is none, the term
    5 a s / h is left out as fused attention keeps no scores, and a checkpointed layer keeps its input only.
    """
    model = config.model
    tokens = config.micro_batch_rows * config.data.sequence_length / config.sequence_parallel
    width = 2 if config.precision == "bf16" else 4
    if config.activation_checkpointing:
        per_layer = model.width
    else:
        inner = (3 if model.activation == "swiglu" else 2) * model.ffn_width
        per_layer = 8 * model.width + inner + (model.width if model.dropout else 0)
    return tokens * width * per_layer * model.num_layers


def memory_unit(num_bytes: float) -> tuple[str, int]:
    """Return the largest unit of which there is at least one, or the smallest there is, and its bytes."""
    return next((unit for unit in _UNITS.items() if num_bytes >= unit[1]), ("KiB", _UNITS["KiB"]))


def amount(num_bytes: float) -> str:
    """Return bytes as text, such as "11.9 MiB"."""
    name, size = memory_unit(num_bytes)
    return f"{num_bytes / size:.1f} {name}"


def total_flops(config: ModelRun) -> float:
    """Return the training FLOPs of the whole run, every row full, a token attending to half a row on average."""
    tokens = config.steps * config.batch_rows * config.data.sequence_length
    return tokens * flops_per_token(config.model, config.data.sequence_length / 2)


def show_model_run(config: ModelRun, num_processes: int | None = None) -> str:
    """Return the report of a run: its settings, size, tokens, FLOPs and memory; by default on the fewest processes."""
    num_processes = num_processes or config.sequence_parallel
    model: ModelConfig = config.model
    tokens = config.batch_rows * config.data.sequence_length
    accumulation = config.accumulation_steps(num_processes)
    groups, part = num_processes // config.sequence_parallel, config.data.sequence_length // config.sequence_parallel
    sharing = f"{num_processes} processes"
    if config.sequence_parallel > 1:
        sharing = f"{groups} groups of {config.sequence_parallel} processes, {part} tokens of a row in each process"
    parts = memory(config, num_processes)
    adapters = adapter_parameter_count(model, config.lora)
    trained = f"; {adapters:,} of adapters are trained" if adapters else ""
    lines = {
        "parameters": f"{parameter_count(model):,}, starting from "
        + ("random ones" if config.initialize_from is None else config.initialize_from)
        + trained,
        "tokens per step": f"{tokens:,} = {config.batch_rows} rows of {config.data.sequence_length}",
        "micro batches": f"{accumulation} of {config.micro_batch_rows} rows in each of {sharing}",
        "tokens of the run": f"{tokens * config.steps:.3g} at most, in {config.steps:,} steps",
        "FLOPs of the run": f"{total_flops(config):.3g}",
        "memory, a process": f"{amount(parts.total)} at ZeRO stage {config.zero_stage}",
        "  weights": amount(parts.weights),
        "  gradients": amount(parts.gradients),
        "  optimizer": amount(parts.optimizer) + (" (on the CPU)" if config.offload_optimizer else ""),
        "  activations": f"{amount(parts.activations)} (rough)",
    }
    return dump_config(config, stage="model") + "\n" + "\n".join(f"{k:<20}{v}" for k, v in lines.items())
