"""What every program here needs and no method is about: options, files, several processes.

`torchrun --nproc-per-node 8 simclr.py` starts eight processes of the same script. Each draws the
same random numbers, augments its eighth of the batch, and averages its gradients with those of the
others: BatchNorm apart, that is what one process would do with the whole batch. RANK counts the
processes from 0; a script that runs alone is number 0 of WORLD = 1.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD > 1 else 0


def within(low, high=10**9, kind=int):
    """Return an argparse type: a number from `low` to `high`, both included, and not NaN."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return kind(text)

    number.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return number


def pick_device(parser, name):
    """Return the device for --device `name`; end the program if PyTorch finds none of that kind."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.get_device_module(name).is_available():
        parser.error(f"--device {name}: PyTorch finds none here, use --device cpu")
    return name


def write(path, data):
    """Write bytes under another name and move them into place: a kill leaves old or new, whole."""
    try:
        Path(f"{path}.tmp").write_bytes(data)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        raise ValueError(f"{path}: {error.strerror}; mend that or name another file") from error


def check_outputs(out, args):
    """Raise ValueError if `out`, a path, cannot be written, or a file would be replaced unasked."""
    if out.is_dir() or out.suffix == ".csv":
        raise ValueError(f"--out {out} is a folder or .csv: name a file such as {args.method}.pt")
    resumes = args.resume is not None and Path(args.resume or out) == out
    if RANK == 0 and not args.overwrite and not resumes:
        for path in (out, out.with_suffix(".csv"), Path(args.preview or out)):
            if path.exists():
                raise ValueError(
                    f"{path} exists: go on with --resume or replace it with --overwrite"
                )


def check_room(path, model):
    """Write and remove a file as large as the checkpoint will be: weights and their momentum."""
    if RANK == 0:
        write(f"{path}.trial", bytes(2 * sum(x.nbytes for x in model.state_dict().values())))
        os.remove(f"{path}.trial")


def join_processes(args):
    """Meet the other processes of this run, if there are any; on CUDA, each takes its own GPU.

    Raises ValueError if they cannot have equal shares of `args.batch_size`, or not a GPU each.
    """
    if WORLD == 1:
        return
    if args.batch_size % WORLD:
        raise ValueError(f"--batch-size {args.batch_size} is no multiple of {WORLD} processes")
    if args.device == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", RANK)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"process {local} finds {count} GPUs: start one process for each GPU")
        torch.cuda.set_device(local)
    elif args.device != "cpu":
        raise ValueError(f"--device {args.device} cannot be used by several processes")
    backend = "nccl" if args.device == "cuda" else "gloo"
    # An hour, as the others wait while the first process takes the kNN accuracy.
    distributed.init_process_group(backend, timeout=timedelta(hours=1))


def sync_batchnorm(model):
    """Return the model with BatchNorm over all processes' batches, where PyTorch can: on CUDA."""
    if WORLD > 1 and next(model.parameters()).is_cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def gather(x):
    """Return the rows of all processes' x (N, ...) as (WORLD * N, ...), in the order of RANK.

    The gradient flows into this process's own rows only, the others' are constants. So when every
    process computes the same loss from all rows, the sum of their gradients is that of the loss.
    """
    if WORLD == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(WORLD)]
    distributed.all_gather(parts, x.detach().contiguous())
    parts[RANK] = x  # all_gather itself is not differentiated
    return torch.cat(parts)


def average_gradients(optimizer):
    """Replace each gradient by its mean over all processes, as DistributedDataParallel does.

    DistributedDataParallel wants a step to be one call of one module, and the steps here call
    several networks by name. One message holds all gradients, as many small ones would be slow.
    """
    if WORLD == 1:
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    distributed.all_reduce(flat)
    for grad, mean in zip(grads, (flat / WORLD).split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
