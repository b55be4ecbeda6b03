"""What to do when a training needs more memory than there is."""

import re

import torch

from vlsm.training.settings import TrainSettings

# torch has one class for its own allocator; CUDA, cuBLAS, cuDNN and the CPU's allocator say it in a RuntimeError
_SIGNS = ("out of memory", "_alloc_failed", "can't allocate memory", "not enough memory")
_GPU = re.compile(r"\b(cuda|cublas|cudnn|hip)", re.IGNORECASE)
_WANTED = re.compile(r"tried to allocate [\d.]+ ?\w+", re.IGNORECASE)


def explain_out_of_memory(error: BaseException, settings: TrainSettings) -> str | None:
    """Return one sentence with the settings to lower if an error says that memory is short, else None.

    Args:
        error: an error of the training, whatever raised it.
        settings: settings of the run; the sentence names their present values.
    """
    text = " ".join(str(error).split())
    is_of_torch = isinstance(error, torch.OutOfMemoryError)
    is_other = isinstance(error, RuntimeError) and any(sign in text.lower() for sign in _SIGNS)
    if not (is_of_torch or is_other or isinstance(error, MemoryError)):
        return None
    is_gpu = is_of_torch or _GPU.search(text) is not None
    run, optim = settings.run, settings.optim
    ways = []
    if run.micro_batch_size > 1:
        ways.append(
            f"lower run.micro_batch_size (now {run.micro_batch_size}; without batch norms the result stays the same)"
        )
    ways.append("lower options.image_size in another OUTPUT")
    if is_gpu and optim.precision == "fp32":
        ways.append("set optim.precision=bf16 (now fp32) in another OUTPUT")
    if settings.trainable == "all" and not run.fsdp and optim.ema_decay is None:
        ways.append("set run.fsdp=true with several workers (now false)")
    wanted = _WANTED.search(text)
    reason = wanted[0] if wanted else text[:80] or type(error).__name__
    return f"the {'GPU' if is_gpu else 'machine'} has too little memory ({reason}): {', or '.join(ways)}"
