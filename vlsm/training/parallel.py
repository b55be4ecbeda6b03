"""Training of one model in several processes, with torch's DDP or FSDP. A single process does not use DDP."""

import inspect
import sys
from typing import Any, TypeVar

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from vlsm.errors import VlsmError
from vlsm.models.contract import SegmentationModel
from vlsm.training.compiling import compile_or_warn
from vlsm.training.settings import TrainSettings

_ENOUGH = 8  # examples for the statistics of a batch norm
T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def parallelize(model: SegmentationModel, settings: TrainSettings) -> nn.Module:
    """Return the module to call instead of the model. It averages gradients over all processes.

    Args:
        model: a model on its device. It is changed in place: sync_batch_norm replaces its batch norms, fsdp shards its
            parameters.
        settings: run.fsdp, run.compile, optim.sync_batch_norm.

    Raises:
        VlsmError: the settings ask for sync_batch_norm without GPUs.
    """
    device = model.device
    if settings.optim.sync_batch_norm and world_size() > 1:
        if device.type != "cuda":
            raise VlsmError("optim.sync_batch_norm needs GPUs; torch has no such batch norm for CPUs")
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    if settings.run.compile:
        compile_or_warn(model)
    if settings.run.fsdp and distributed.is_initialized():  # in a group of one, too: so it can be tried on one GPU
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (world_size(),))
        for block in _transformer_blocks(model):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    if world_size() == 1:
        return model
    # broadcast_buffers copies batch statistics at the end of each epoch; DDP need not do it before each step
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, **options)


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP has sharded the model, so that its weights are no complete tensors."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes 3 s, and nothing is sharded without it
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def describe_batch_norms(model: nn.Module, settings: TrainSettings, num_workers: int) -> str | None:
    """Return a warning if batch norms that learn see too few examples at a time, and fewer than the batch has.

    Eight are enough: in the measurements of Wu and He, the error of batch norms rises by 1 percentage point from
    32 to 8 examples, but by 11 to 2. So the default, run.micro_batch_size=8, needs no warning on one worker.

    Source: Group Normalization, Wu and He 2018, arXiv:1803.08494.

    Args:
        model: in training mode; norms in frozen towers are in eval mode and do not count.
        settings: optim.batch_size, optim.sync_batch_norm, run.micro_batch_size.
        num_workers: number of processes that train together.
    """
    has_norms = any(isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in model.modules())
    batch_size, micro = settings.optim.batch_size, settings.run.micro_batch_size
    share = -(-batch_size // num_workers)  # of one worker
    num_seen = min(micro, share) * (num_workers if settings.optim.sync_batch_norm else 1)
    if not has_norms or num_seen >= min(batch_size, _ENOUGH):
        return None
    advice = f"set run.micro_batch_size={share}" if micro < share else ""
    if num_workers > 1 and not settings.optim.sync_batch_norm:
        advice += f"{' and ' if advice else 'set '}optim.sync_batch_norm=true (GPUs only)"
    return (
        f"batch norms of {type(model).__name__} see {num_seen} examples at a time, not the {batch_size} of a batch, "
        f"so run.micro_batch_size={micro} and the number of workers ({num_workers}) change the result; {advice} if the "
        "memory allows, or lower optim.batch_size"
    )


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of the first process, such as batch statistics, to all processes."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def gather(items: list[T]) -> list[T]:
    """Return the lists of all processes as one list, the same in every process."""
    if world_size() == 1:
        return items
    lists: list[Any] = [None] * world_size()
    distributed.all_gather_object(lists, items)
    return [item for process_items in lists for item in process_items]


def _transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of the towers. FSDP saves memory because it gathers only one of them at a time."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    return [
        block
        for blocks in lists
        if len(blocks) > 2 and len({type(block) for block in blocks}) == 1
        for block in blocks
        if any(isinstance(part, nn.LayerNorm) for part in block.modules())
    ]
