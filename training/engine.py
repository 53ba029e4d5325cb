"""DeepSpeed behind a small class: ZeRO, bf16, accumulation, clipping. The only file that imports deepspeed."""

import io
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from cm3.distributed import local_rank, world_size
from cm3.errors import MissingDependencyError

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
        "bf16": {"enabled": bf16},
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
        self.device = _device()
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use at every stage
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self.module = module
        self.set_step(0)  # some of DeepSpeed's optimisers make a dummy update first, which Adam would count

    def __call__(self, *tensors: Tensor) -> Any:
        """Run the module on tensors, which are moved to its device."""
        return self._engine(*(tensor.to(self.device, non_blocking=True) for tensor in tensors))

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the coming update."""
        for group in self._optimizer.param_groups:
            group["lr"] = value

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro batch; the last one of a step also updates the weights.

        Gradients are summed over micro batches and over processes: `loss` is this micro batch's share of the
        whole batch's loss.
        """
        self._engine.backward(loss * world_size(), scale_wrt_gas=False)  # DeepSpeed averages over processes
        self._engine.step()

    def gradient_norm(self) -> float:
        """Return the global L2 norm of the last update's gradient, before clipping."""
        return float(self._engine.get_global_grad_norm())

    def sum_over_processes(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum over all processes. A collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def state(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole fp32 tensor on the CPU) of every parameter, whatever the ZeRO stage.

        A collective: every process iterates to the end.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for name, parameter in self.module.named_parameters():
            if kind == "weights":
                value = safe_get_full_fp32_param(parameter)
            else:
                value = safe_get_full_optimizer_state(parameter, kind)
            yield name, value.float().cpu()

    def load_state(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Set what `state` returned; for weights the working copy in the module too. A collective."""
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._create_moments()
        for name, parameter in self.module.named_parameters():
            value = tensors[name].to(self.device)
            if kind == "weights":
                safe_set_full_fp32_param(parameter, value)
                with GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                    parameter.copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, kind)

    def set_step(self, step: int) -> None:
        """Tell Adam how many updates its moments have seen; its bias correction depends on it."""
        for state in self._adam().state.values():
            state["step"].fill_(step)

    def _adam(self) -> torch.optim.Optimizer:
        """Return torch's optimiser inside DeepSpeed's."""
        return self._optimizer.optimizer

    def _create_moments(self) -> None:
        """Create Adam's moments, which otherwise appear at the first update, so that they can be loaded."""
        adam, partitions = self._adam(), getattr(self._optimizer, "fp32_partitioned_groups_flat", None)
        if partitions is None:  # stages 1 and 2: the groups hold this process's fp32 share
            partitions = [parameter for group in adam.param_groups for parameter in group["params"]]
        for partition in partitions:
            if not adam.state[partition]:
                moments = {kind: torch.zeros_like(partition) for kind in STATE_KINDS[1:]}
                adam.state[partition] = {"step": torch.zeros((), device=partition.device), **moments}
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):  # stages 1 and 2
            self._optimizer._lazy_init_hp_params_optimizer_state()


def _device() -> torch.device:
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


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
