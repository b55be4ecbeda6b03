"""One model in several processes: torch's own DDP and FSDP, or neither where there is one process."""

import inspect
from typing import Any, TypeVar

from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vlsm.errors import VlsmError
from vlsm.models.contract import SegmentationModel
from vlsm.training.settings import TrainSettings

T = TypeVar("T")


def world_size() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def parallelize(model: SegmentationModel, settings: TrainSettings) -> nn.Module:
    """What is called in place of the model, so that gradients are averaged over all processes.

    Args:
        model: on its device; batch norms may be replaced, and parameters become shards with fsdp.
        settings: run.fsdp, run.compile, optim.sync_batch_norm.

    Raises:
        VlsmError: what is asked for cannot be had on these devices.
    """
    device = model.device
    if settings.optim.sync_batch_norm and world_size() > 1:
        if device.type != "cuda":
            raise VlsmError("optim.sync_batch_norm needs GPUs; torch has no such batch norm for CPUs")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if settings.run.compile:
        model.compile()
    if world_size() == 1:
        return model
    if settings.run.fsdp:
        mesh = init_device_mesh(device.type, (world_size(),))
        for block in _transformer_blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    # batch statistics are taken from the first process at the end of each epoch, not before each step
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)


def broadcast_buffers(model: nn.Module) -> None:
    """Take the first process's batch statistics in all processes."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def gather(items: list[T]) -> list[T]:
    """The lists of all processes, one after the other, in every process."""
    if world_size() == 1:
        return items
    lists: list[Any] = [None] * world_size()
    distributed.all_gather_object(lists, items)
    return [item for own in lists for item in own]


def _transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of towers: gathered one at a time, they are what sharding saves memory by."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    return [
        block
        for blocks in lists
        if len(blocks) > 2 and len({type(block) for block in blocks}) == 1
        for block in blocks
        if any(isinstance(part, nn.LayerNorm) for part in block.modules())
    ]
