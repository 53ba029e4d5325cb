"""DeepSpeed behind a small class: ZeRO, bf16, accumulation, clipping. The only file that imports deepspeed."""

import io
import logging
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from cm3.distributed import is_main, local_rank, rank, world_size
from cm3.errors import CM3Error, MissingDependencyError, ModelFilesError

Value = TypeVar("Value")

STATE_KINDS = ("weights", "exp_avg", "exp_avg_sq")
"""What a parameter has in the optimiser: its fp32 value and Adam's two moments."""


def deepspeed_config(
    *,
    micro_batch_rows: int,
    accumulation_steps: int,
    zero_stage: int,
    bf16: bool,
    gradient_clip: float,
    offload_optimizer: bool,
) -> dict[str, Any]:
    """Return DeepSpeed's dictionary. The optimiser is torch's AdamW, which needs no compiled extension."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},  # else gradients that are not finite are applied
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": gradient_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


class Engine:
    """One training engine around a plain module.

    Args:
        module: Its forward returns the loss in a plain tuple, where DeepSpeed finds it to hook it.
        optimizer: torch optimiser over the parameters of the module.
        config: Dictionary of `deepspeed_config`.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> None:
        deepspeed = start_distributed()
        self.device = training_device()
        self._is_plain = config["zero_optimization"]["stage"] == 0
        if self._is_plain:  # DeepSpeed neither tells the norm there nor looks whether it is finite
            self._clip, self._norm = config["gradient_clipping"], 0.0
            config = config | {"gradient_clipping": 0.0}
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use at every stage
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self.module = module
        self._create_moments()
        self.set_step(0)  # some of DeepSpeed's optimisers make a dummy update first, which Adam would count

    def __call__(self, *tensors: Tensor) -> Any:
        """Run the module on tensors, which are moved to its device."""
        return self._engine(*(tensor.to(self.device, non_blocking=True) for tensor in tensors))

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the coming update."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro batch; the last one of a step also updates the weights, see `applied`.

        Gradients are summed over micro batches and over processes: `loss` is this micro batch's share of the
        whole batch's loss.
        """
        # Zero times a loss that is not finite is NaN, and so its gradient becomes: every process sees it in the norm.
        scale = world_size() * (1 + 0 * loss.detach())  # DeepSpeed averages over processes
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        if self._is_plain and self._engine.is_gradient_accumulation_boundary():
            self._clip_or_drop()
        self._engine.step()

    def applied(self) -> bool:
        """Return whether the last step updated the weights; it does not where loss or gradient is not finite.

        All processes decide by the same norm, of the gradient of the whole batch. Weights and moments then stay as
        they are, to the bit.
        """
        return math.isfinite(self._norm) if self._is_plain else self._engine.was_step_applied()

    def gradient_norm(self) -> float:
        """Return the global L2 norm of the last step's gradient, before clipping; infinity where it is not finite."""
        return self._norm if self._is_plain else float(self._engine.get_global_grad_norm())

    def _clip_or_drop(self) -> None:
        """Clip the gradient of a whole step, or drop it where it is not finite: AdamW passes over what has none."""
        parameters = [parameter for parameter in self.module.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self._norm = float(norm) if norm.isfinite() else math.inf
        if not math.isfinite(self._norm):
            for parameter in parameters:
                parameter.grad = None
        elif self._clip:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over all processes. A collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole fp32 tensor on the CPU) of every trained parameter, whatever the ZeRO stage.

        A collective: every process iterates to the end.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in trained_parameters(self.module):
            if self._is_plain:
                value = self._plain_state(parameter, kind).detach()
            elif kind == "weights":
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, kind)
            yield name, value.float().cpu()

    def load_state(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Set what `state` returned; for weights the working copy in the module too. A collective."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        for name, parameter in trained_parameters(self.module):
            value = tensors[name].to(self.device)
            if self._is_plain:
                self._plain_state(parameter, kind).data.copy_(value)
                continue
            share = getattr(parameter, "ds_tensor", None)
            if share is not None:  # stage 3; DeepSpeed's functions for whole tensors refuse what does not divide evenly
                size = share.numel()
                value = nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
                value = value.narrow(0, size * rank(), size)
            if kind == "weights":
                (safe_set_full_fp32_param if share is None else safe_set_local_fp32_param)(parameter, value)
                with GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                    parameter.copy_(tensors[name])
            else:
                set_state = safe_set_full_optimizer_state if share is None else safe_set_local_optimizer_state
                set_state(parameter, value, kind)

    def set_step(self, step: int) -> None:
        """Tell Adam how many updates its moments have seen; its bias correction depends on it."""
        for state in self._adam().state.values():
            state["step"].fill_(step)

    def _plain_state(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Return what DeepSpeed's functions do not know at stage 0, where nothing is shared out."""
        return parameter if kind == "weights" else self._adam().state[parameter][kind]

    def _adam(self) -> torch.optim.Optimizer:
        """Return torch's optimiser inside DeepSpeed's, which there is none of at stage 0."""
        return self._optimizer if self._is_plain else self._optimizer.optimizer

    def _create_moments(self) -> None:
        """Create Adam's moments, which otherwise appear at the first update, so that they can be saved and loaded."""
        adam, partitions = self._adam(), getattr(self._optimizer, "fp32_partitioned_groups_flat", None)
        if partitions is None:  # up to stage 2: the groups hold this process's fp32 share
            partitions = [parameter for group in adam.param_groups for parameter in group["params"]]
        for partition in partitions:
            if not adam.state[partition]:
                moments = {kind: torch.zeros_like(partition) for kind in STATE_KINDS[1:]}
                adam.state[partition] = {"step": torch.zeros((), device=partition.device), **moments}
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
            self._optimizer._lazy_init_hp_params_optimizer_state()


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of all that are not frozen; a tied one comes once."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def training_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start_distributed() -> Any:
    """Import deepspeed and join the process group; a process without a launcher becomes a group of one.

    Returns:
        The deepspeed module.

    Raises:
        MissingDependencyError: deepspeed is not installed.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.comm.torch
    except ImportError as error:
        raise MissingDependencyError(
            f"training needs deepspeed, which is not installed ({error}); on Linux run `pip install deepspeed`. "
            "Everything but training works without it"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory all-reduce with g++ for half a minute; gloo does the same work.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    if not torch.distributed.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    if on_gpu:
        torch.cuda.set_device(local_rank())
    return deepspeed


def from_main(work: Callable[[], Value]) -> Value:
    """Return in every process what `work` returns in the main one; its error is raised in all. A collective.

    Raises:
        ModelFilesError: the message of the error that `work` raised, of a kind that is meant for the user.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except (CM3Error, OSError) as error:
            outcome[1] = str(error)
    if world_size() > 1:
        torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ModelFilesError(outcome[1])
    return outcome[0]


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
