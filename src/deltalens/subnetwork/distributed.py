"""Compact gradients over several processes: shards of DTensors, one all-reduce of compact buffers, DDP out of the way.

Under FSDP2 a parameter's gradient reaches the hook already averaged and cut to this rank's shard, so a rank keeps the
masked entries of its shard alone. Under DDP the hook fires before the all-reduce: the rank's own gradient is gathered,
and the compact buffers are averaged instead of the dense ones (issue 13).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from deltalens.errors import ConfigError

__all__ = [
    "average_over_ranks",
    "hand_over_reduction",
    "keep_out_of_ddp",
    "local_mask",
    "local_tensor",
    "ranks",
    "shard_groups",
    "sum_over_shards",
]

Groups = tuple[dist.ProcessGroup, ...]


def ranks(group: dist.ProcessGroup | None) -> int:
    """Processes that a replicated parameter's gradient is averaged over; 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is. Shares memory, carries no graph."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_mask(name: str, parameter: nn.Parameter, dense: np.ndarray) -> np.ndarray:
    """The part of a whole tensor's mask that lies in this rank's shard, in the shard's shape.

    Raises:
        ConfigError: the parameter is partitioned otherwise than into one block a rank.
    """
    if not isinstance(parameter, DTensor):
        return dense
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if shape != tuple(local_tensor(parameter).shape):
        raise ConfigError(f"{name}: its placement {parameter.placements} is not one block a rank; use FSDP2's own")
    return dense[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def shard_groups(parameter: Tensor) -> Groups | None:
    """The process groups whose ranks hold different parts of a parameter; None where it is whole on every rank."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(axis) for axis, placement in enumerate(parameter.placements) if placement.is_shard())


def average_over_ranks(flat: Tensor, filled: list[bool], group: dist.ProcessGroup | None) -> list[bool]:
    """Average a compact buffer over the ranks, in place; returns which of its tensors any rank has a gradient of.

    Args:
        flat: this rank's compact gradients, zero where it has none.
        filled: which tensors of the buffer this rank has a gradient of.
        group: the ranks; None is the default group.
    """
    dist.all_reduce(flat, group=group)
    flat.div_(ranks(group))  # gloo has no average
    anywhere = torch.tensor(filled, dtype=torch.uint8, device=flat.device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=group)
    return anywhere.bool().tolist()


def sum_over_shards(square: Tensor, groups: Groups) -> Tensor:
    """The sum of a scalar over the ranks that hold different shards."""
    for group in groups:
        dist.all_reduce(square, group=group)
    return square


def hand_over_reduction(model: nn.Module) -> dist.ProcessGroup | None:
    """Stop a DDP model from reducing gradients, for good: what `no_sync` does for a block.

    DDP would all-reduce the dense gradients that the hooks have emptied. Returns its process group, which the compact
    optimizer averages over; None for a model that is not DDP's.
    """
    if not isinstance(model, DistributedDataParallel):
        return None
    model.require_backward_grad_sync = False
    return model.process_group


def keep_out_of_ddp(model: nn.Module, trained: Iterable[nn.Parameter], group: Any = None) -> None:
    """Before DDP wraps `model`: have it make no dense buckets, which would cost what the compact buffers save.

    DDP insists on one parameter, so it keeps the smallest trained one. It no longer makes the others alike on all
    ranks at the start, so rank 0's are sent here.

    Args:
        model: not yet wrapped.
        trained: its trained parameters.
        group: the ranks; None is the default group.
    """
    smallest = min(trained, key=nn.Parameter.numel)
    others = [name for name, parameter in model.named_parameters() if parameter is not smallest]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)
    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), group=group, group_src=0)
