"""DeepSpeed's ZeRO 1 and 2: each process keeps a part of the optimiser's state, and of gradients.

Weights stay whole, in float32, on every process, so all that looks at them works as without it.
DeepSpeed cuts the state without regard to parameters. In a checkpoint it lies whole and by name, as
any other, and any number of processes goes on from it, with ZeRO or without.
"""

import logging
import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from simmim.data.loader.batches import Batch
from simmim.engine.checkpoint.sharded_state import named_parameters
from simmim.engine.distributed.parallelism import zero_stage
from simmim.engine.distributed.sharding import compute_in_precision
from simmim.engine.monitor.anomalies import poisoned

MEANS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter, as large as the parameter."""

CPU_MESSAGES = "deepspeed_shm_comm"
"""DeepSpeed's own messages between processes on a CPU, which it would compile at each start."""


class Zero:
    """A module in DeepSpeed's engine.

    Args:
        module: what is trained, on its device.
        optimizer: of its parameters; DeepSpeed makes it that of this process's part of them. Its
            groups stay, so the learning rate is set as always.
        accelerator: devices and processes.
        accumulation: parts of a batch, each with a forward and a backward.
        clip_norm: largest norm of the whole gradient; None does not clip.

    Raises:
        ValueError: precision or optimiser are not for ZeRO.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        accumulation: int,
        clip_norm: float | None,
    ) -> None:
        if accelerator.mixed_precision == "fp16":
            raise ValueError("training.precision fp16 does not go with ZeRO: use bf16 or fp32.")
        if not isinstance(optimizer, torch.optim.AdamW):
            raise ValueError(
                "training.optimizer.name must be adamw with ZeRO, which shards its state."
            )
        self.accelerator, self.optimizer = accelerator, optimizer
        self._parameters = named_parameters(optimizer)
        compute_in_precision(module, accelerator)
        self.engine = _engine(
            module,
            optimizer,
            {
                "train_micro_batch_size_per_gpu": 1,  # counts samples for its log alone
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": clip_norm or 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": zero_stage()},
            },
        )
        self._fill_state()

    def step(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """Take one optimiser step, as `simmim.engine.loop.training_step` does.

        DeepSpeed looks at the norm of the whole gradient before it steps: where that is no number,
        on any rank, it leaves out the step on all of them. It calls the norm infinite then.
        """
        device = self.accelerator.device
        loss_sum = torch.zeros((), device=device)
        for number, batch in enumerate(batches, start=1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            loss = self.engine(batch.to(device))
            self.engine.backward(poisoned(loss) / len(batches), scale_wrt_gas=False)
            loss_sum += loss.detach()
        self.engine.step()
        norm = torch.tensor(float(self.engine.get_global_grad_norm()), device=device)
        mean = loss_sum / len(batches)
        return (mean if norm.isfinite() else torch.full_like(mean, torch.nan)), norm

    def unfilled(self) -> torch.optim.AdamW:
        """Return an optimiser of whole parameters, on the CPU, whose state is empty.

        It is for what it can be given. Its parameters take no memory: nobody writes to them.
        """
        return torch.optim.AdamW(
            [(name, torch.empty(each.shape)) for name, each in self._parameters.items()]
        )

    def gather(self) -> torch.optim.AdamW:
        """Return an optimiser with the whole state, on the main process; all call it together."""
        from deepspeed.utils import safe_get_full_optimizer_state  # noqa: PLC0415

        whole = self.unfilled()
        empty = named_parameters(whole)
        steps = {
            name: self.optimizer.state[flat]["step"]
            for group, flat in self._groups()
            for name in group["param_names"]
        }
        for name, step in steps.items():
            means = {
                key: safe_get_full_optimizer_state(self._parameters[name], key) for key in MEANS
            }
            if self.accelerator.is_main_process:
                means = {key: mean.cpu() for key, mean in means.items()}
                whole.state[empty[name]] = {"step": step.detach().cpu().clone(), **means}
        return whole

    def take(self, whole: torch.optim.Optimizer) -> None:
        """Take this process's part of the state of an optimiser, of `unfilled`."""
        from deepspeed.utils import safe_set_full_optimizer_state  # noqa: PLC0415

        saved = {name: whole.state.get(each, {}) for name, each in named_parameters(whole).items()}
        if not any(saved.values()):  # no step was taken
            return
        for group, flat in self._groups():
            self.optimizer.state[flat]["step"].copy_(saved[group["param_names"][0]]["step"])
        for name, parameter in self._parameters.items():
            for key in MEANS:
                safe_set_full_optimizer_state(parameter, saved[name][key].to(parameter.device), key)

    def _fill_state(self) -> None:
        """Give the optimiser the state that it would make in its first step.

        DeepSpeed looks for the state of each parameter once, after the step of the first group.
        """
        for group, flat in self._groups():
            device = flat.device if group.get("fused") else "cpu"
            self.optimizer.state[flat] = {
                "step": torch.zeros((), device=device),
                **{key: torch.zeros_like(flat) for key in MEANS},
            }
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def heed_weights(self) -> None:
        """Take note of weights that were loaded: DeepSpeed updates a copy of its part of them."""
        self.engine.optimizer.refresh_fp32_params()

    def _groups(self) -> list[tuple[dict[str, Any], Tensor]]:
        """Return the groups, each with what DeepSpeed has made of its parameters: one vector."""
        groups = []
        for group in self.optimizer.param_groups:
            (flat,) = group["params"]
            groups.append((group, flat))
        return groups


def _engine(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """Build DeepSpeed's engine on the processes that there are."""
    on_cpu = not torch.accelerator.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: PLC0415 (an extra)

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if on_cpu:
        deepspeed.ops.__compatible_ops__[CPU_MESSAGES] = False
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine
