"""What the torch backends share: a torch callable as a Stage, and the options for device, precision and layout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from torchship import hardware, home
from torchship.errors import BuildFailed, Unavailable
from torchship.lowering import program
from torchship.model import Model, to_numpy, to_torch
from torchship.recipe import Options, choice
from torchship.stage import EngineStage, Stage
from torchship.tensors import Array, Free, Signature, Tensors, numpy_dtype

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
OPTIONS = ("device", "precision", "mode", "channels_last", "keep", "modules")
_LEAST_SHARE = 1e-3  # of a card's memory; nothing runs in less
_FEEDING = 8  # threads that copy to a card; more wait for one another


def staged(
    body: Callable[..., Any],
    *,
    signature: Signature,
    device: str = "cpu",
    check: bool = False,
    graphs: bool = False,
    tables: Mapping[int, int] = {},
) -> Stage:
    """`body(*inputs) -> tuple of tensors`, both in the order of the signature, as a Stage on `device`.

    `check`: against the signature, for an engine that checks nothing; `graphs`: see `lowering.cuda`; `tables`: see
    `program.check_indices`.
    """
    if device != "cpu":
        from torchship.lowering.cuda import CudaStage

        return CudaStage(body, signature=signature, device=device, check=check, graphs=graphs, tables=tables)
    import torch

    dtypes = [numpy_dtype(spec.dtype) for spec in signature.outputs]

    def run(tensors: Tensors) -> list[Array]:
        if check:
            signature.check(tensors)
        program.check_indices(signature, tensors, tables)
        inputs = [to_torch(tensors[spec.name]) for spec in signature.inputs]
        with torch.inference_mode():
            answers = body(*inputs)
        given = (answers,) if isinstance(answers, torch.Tensor) else answers
        return [to_numpy(one).astype(dtype, copy=False) for one, dtype in zip(given, dtypes, strict=True)]

    return EngineStage(run, signature=signature)


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Without the short cut of torch's own transformer layers, which answers 0 where a mask leaves a place out.

    What is exported computes these places; they are nobody's, and the reference is not to differ there.
    """
    import torch

    if torch.compiler.is_dynamo_compiling():  # it never takes the short cut, and cannot trace the switch
        yield
        return
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def prepare(*, device: str, threads: int, tf32: bool = False, tune: bool = True) -> None:
    """Set the threads of torch (0: every core that this process may use; a few for a card, whatever is asked for) and
    make sure that `device` is there.

    On a card, fp32 is fp32 unless `tf32` says otherwise, in convolutions too; `tune` times cuDNN's algorithms for each
    new shape, which pays where shapes come again. No more of its memory is taken than the environment's
    TORCHSHIP_MEMORY_SHARE allows. Raises Unavailable.
    """
    import torch

    home.name_user()
    cores = hardware.cores()
    torch.set_num_threads((threads or cores) if device == "cpu" else min(_FEEDING, threads or cores))
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        among = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
        raise Unavailable(f"torch sees no device {device!r}{among}", hint="torchship doctor says why")
    torch.backends.cudnn.benchmark = tune
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    share = float(os.environ.get(hardware.MEMORY_SHARE, "1"))
    if share < _LEAST_SHARE:
        raise Unavailable(
            f"the shares of other models leave nothing of {device}",
            hint="lower their memory_share, or give this model one",
        )
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share, torch.device(device).index)


def blank(signature: Signature, *, rows: int) -> Tensors:
    """Zeros that fit the signature, for warming up: `rows` rows, other free axes at twice their minimum or so."""

    def length(position: int, axis: int | Free) -> int:
        if isinstance(axis, int):
            return axis
        wanted = rows if position == 0 and signature.batched else max(axis.min * 2, 8)
        return max(axis.min, min(wanted, axis.max or wanted))

    return {
        spec.name: np.zeros([length(i, axis) for i, axis in enumerate(spec.shape)], numpy_dtype(spec.dtype))
        for spec in signature.inputs
    }


def device_of(options: Options, *, device: str = "cpu") -> str:
    """The device that the caller names, else the recipe's own, else the processor."""
    return device if device != "cpu" else str(options.get("device", "cpu"))


def shaped(model: Model, options: Options) -> Model:
    """The model as the options want it.

    `precision` fp32 | tf32 | bf16 | fp16; `mode` autocast (the default on the processor) or cast (the default
    elsewhere); `channels_last`; `keep` and `modules` (what stays in fp32, see `paths.rules`). Raises BadConfig.
    """
    from torchship.lowering import variants

    precision = choice(options, "precision", PRECISIONS, of="torch")
    if options.get("channels_last"):
        model = variants.channels_last(model)
    device = device_of(options).partition(":")[0]
    mode = str(options.get("mode") or ("autocast" if device == "cpu" else "cast"))
    return variants.in_precision(model, precision, mode=mode, device=device, options=options)


def folded(model: Model) -> Model:
    """A copy with attention that copies nothing, and, where the wiring can be found out, with batch norms folded into
    the layers before them."""
    from torchship.lowering import attention, surgery

    changed = surgery.copied(model)
    attention.shorten(changed.module)
    with contextlib.suppress(BuildFailed):
        surgery.fold_batch_norms(changed, surgery.Wiring(changed))
    return changed


def takes_pictures(model: Model) -> bool:
    """Whether an input looks like pictures, for which channels-last memory pays."""
    return any(len(spec.shape) == 4 for spec in model.signature.inputs)
