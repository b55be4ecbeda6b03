"""Vision-language segmentation models: load a checkpoint, segment images, read and export the masks of an archive.

`__all__` has the public names. They are imported on first use, so that `import vlsm` and a job's `--help` do not wait
for torch.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlsm.shown import show_records
from vlsm.version import __version__

if TYPE_CHECKING:
    from vlsm import export as export
    from vlsm.checkpoints import build_model as build_model
    from vlsm.checkpoints import load_checkpoint as load_checkpoint
    from vlsm.checkpoints import save_checkpoint as save_checkpoint
    from vlsm.errors import VlsmError as VlsmError
    from vlsm.runs.results import read_masks as read_masks
    from vlsm.segmentation.segmenter import Segmenter as Segmenter
    from vlsm.segmentation.segmenter import segment as segment

_HOMES = {
    "Segmenter": "vlsm.segmentation.segmenter",
    "VlsmError": "vlsm.errors",
    "build_model": "vlsm.checkpoints",
    "load_checkpoint": "vlsm.checkpoints",
    "read_masks": "vlsm.runs.results",
    "save_checkpoint": "vlsm.checkpoints",
    "segment": "vlsm.segmentation.segmenter",
}

__all__ = [
    "Segmenter",
    "VlsmError",
    "__version__",
    "build_model",
    "export",
    "load_checkpoint",
    "read_masks",
    "save_checkpoint",
    "segment",
]


# also in the processes of a cluster, whose handlers are not ours, and in programs that use the library
show_records(logging.getLogger("vlsm"))


def __getattr__(name: str) -> Any:
    if name == "export":
        return import_module("vlsm.export")
    if name not in _HOMES:
        raise AttributeError(f"module 'vlsm' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))} and export")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
