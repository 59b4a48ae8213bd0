"""Explains classic run-time failures from an exception or a log: what happened, and what to change. Needs no torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import msgspec

from torchship.hardware import here, version

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE = r"(?P<{0}>\d+(?:\.\d+)?)\s*(?P<{0}_unit>[KMG]i?B|bytes)"


class Explanation(msgspec.Struct, frozen=True):
    """What a failure means; `mend` is what to do, best first; `line` is the line of the log that gave it away."""

    name: str
    words: str
    mend: list[str]
    line: str


class KnownFailure(msgspec.Struct, frozen=True):
    """A known failure: `pattern` finds it in a text, `mend` is fixed advice, `compute` adds advice from the text."""

    name: str
    pattern: str
    words: str
    mend: tuple[str, ...]
    compute: Callable[[str], list[str]] = lambda text: []


def _bytes(text: str, name: str, before: str = "") -> int | None:
    found = re.search(before + _SIZE.format(name), text)
    if found is None:
        return None
    return int(float(found[name]) * _UNITS.get(found[f"{name}_unit"], 1))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"


def _cuda_memory(text: str) -> list[str]:
    """A batch size that fits, from what the message says was wanted, free, in use and reserved."""
    wanted, free = _bytes(text, "wanted", r"Tried to allocate "), _bytes(text, "free", r"of which ")
    used = _bytes(text, "used", r"Of the allocated memory ")
    idle = _bytes(text, "idle", r"PyTorch, and ")
    mend = []
    if wanted and used:
        room = used + (free or 0) + (idle or 0)
        share = room / (used + wanted)
        batch = re.search(r"batch(?:[ _-]size)?\s*[=:]\s*(\d+)", text, re.I)
        if share < 1:
            fits = max(1, int(int(batch[1]) * share * 0.9)) if batch else None
            smaller = f"a batch at most {share * 0.9:.0%} as large"
            proposal = f"batch size {fits} instead of {batch[1]}" if batch and fits else smaller
            mend.append(f"{proposal}: {_gib(used + wanted)} were needed, {_gib(room)} are there")
    if idle and wanted and idle > wanted:
        mend.append(f"{_gib(idle)} lie idle in pieces: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True")
    if used:
        mend.append(
            f"fp16 or bf16 needs about {_gib(used / 2)} instead of {_gib(used)}: torch.amp.autocast, or .half()"
        )
    return mend


def _threads(text: str) -> list[str]:
    return [
        f"this machine has {here().cores} cores: export OMP_NUM_THREADS={here().cores}, and one process a core group"
    ]


def _shared_memory(text: str) -> list[str]:
    try:
        usage = shutil.disk_usage("/dev/shm")  # noqa: S108  # only its size is read
    except OSError:
        return ["there is no /dev/shm here: mount a tmpfs on it"]
    return [f"shared memory here: {_gib(usage.total)}, {_gib(usage.free)} free"]


def _features(text: str) -> list[str]:
    found = ", ".join(here().features) or "none that torchship knows"
    return [f"this processor has: {found}"]


def _installed(*names: str) -> Callable[[str], list[str]]:
    def versions(text: str) -> list[str]:
        found = [f"{name} {version(name)}" for name in names if version(name)]
        return [f"installed here: {', '.join(found)}"] if found else []

    return versions


KNOWN_FAILURES = (
    KnownFailure(
        "CUDA out of memory",
        r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|out of memory.*cuda",
        "the GPU's memory is full: weights, activations and the cache of torch's allocator share it",
        (
            "run under torch.inference_mode(): gradients keep every activation alive",
            "nvidia-smi shows whether another process holds the card",
        ),
        _cuda_memory,
    ),
    KnownFailure(
        "forked CUDA context",
        r"Cannot re-initialize CUDA in forked subprocess|initialization error.*fork|poison_fork",
        "CUDA was used before the process forked: a CUDA context cannot be inherited",
        (
            "multiprocessing.set_start_method('spawn') before anything touches CUDA, or "
            "multiprocessing_context='spawn' in the DataLoader",
            "keep .cuda(), is_available() and device_count() out of the parent until the workers have started",
            "torchship's own workers always start fresh: serve the model with `torchship serve`",
        ),
    ),
    KnownFailure(
        "shared memory is too small",
        r"Bus error|SIGBUS|unable to (?:open|write|mmap).*(?:shm|torch_)|insufficient shared memory|No space left.*shm",
        "the shared memory is full: the kernel ends a process that touches a page it cannot get, without an exception",
        (
            "docker run --shm-size=1g (Docker gives 64 MiB), or --ipc=host; Kubernetes: an emptyDir with "
            "medium: Memory on /dev/shm",
            "fewer DataLoader workers, a smaller prefetch_factor, or "
            "torch.multiprocessing.set_sharing_strategy('file_system')",
        ),
        _shared_memory,
    ),
    KnownFailure(
        "DataLoader worker killed",
        r"DataLoader worker.*(?:killed|exited unexpectedly)",
        "a worker process of the DataLoader was ended from outside: most often the kernel, for want of memory",
        (
            "dmesg | grep -i 'killed process' says whether memory was the reason",
            "num_workers=0 shows the error that the worker had; then fewer workers, or smaller batches",
        ),
        _shared_memory,
    ),
    KnownFailure(
        "killed for memory",
        r"\bKilled\b|oom-kill|Out of memory: Kill|exit(?:ed with)? code 137|signal 9|SIGKILL|\bMemoryError|"
        r"Cannot allocate memory|DefaultCPUAllocator",
        "the process took more memory than it may have, and was ended",
        (
            "load weights with mmap (torch.load(..., mmap=True), safetensors)",
            "smaller batches; int8 or bf16 weights",
            "raise the container's limit",
        ),
        lambda text: [f"this machine grants {_gib(here().memory)}"],
    ),
    KnownFailure(
        "no kernel for this GPU",
        r"no kernel image is available|CUDA capability sm_\d+ is not compatible|PTX was compiled with an unsupported",
        "this build of the library has no code for this card",
        (
            "install the build for your CUDA version from pytorch.org/get-started",
            "torch.cuda.get_arch_list() shows what it was built for",
        ),
        _installed("torch"),
    ),
    KnownFailure(
        "driver too old",
        r"driver version is insufficient|driver .*is too old|CUDA driver version|forward compatibility was attempted",
        "the NVIDIA driver is older than the CUDA that the library was built with",
        ("update the driver, or install torch for an older CUDA (cu126 instead of cu130)",),
        lambda text: [f"driver here: {gpu.driver}" for gpu in here().gpus[:1]],
    ),
    KnownFailure(
        "GLIBC missing",
        r"version `(?:GLIBC|GLIBCXX|CXXABI)_[\d.]+' not found",
        "the library was built on a newer Linux than this one",
        (
            "use a newer base image (Debian 12, Ubuntu 22.04 and later)",
            "or a wheel for an older manylinux: pip download --platform manylinux2014_x86_64",
        ),
        lambda text: [
            f"needed: {found[0]}" for found in [re.search(r"(?:GLIBC|GLIBCXX|CXXABI)_[\d.]+", text)] if found
        ],
    ),
    KnownFailure(
        "instruction missing",
        r"Illegal instruction|SIGILL|AVX2? (?:is )?not supported|requires? AVX|CPU lacks|doesn't support AVX",
        "the program uses processor instructions that this machine does not have (AVX, AVX2, AVX-512, AMX)",
        (
            "native artifacts (inductor, aoti) run only on the kind of machine that built them: optimize here again",
            "ATEN_CPU_CAPABILITY=default; or a build for baseline x86-64",
        ),
        _features,
    ),
    KnownFailure(
        "ABI mismatch",
        r"undefined symbol: _ZN|numpy\.dtype size changed|A module that was compiled using NumPy 1|"
        r"incompatible with.*numpy|_ARRAY_API not found|Symbol not found: __ZN",
        "a compiled extension was built against another version of torch or numpy",
        (
            "reinstall the extension against what is here: pip install --force-reinstall --no-build-isolation NAME",
            "or pin the version it was built for (numpy<2)",
        ),
        _installed("torch", "torchvision", "numpy"),
    ),
    KnownFailure(
        "ONNX opset unsupported",
        r"opset \d+ (?:is )?(?:under development|not supported)|Unsupported model IR version|"
        r"support for domain .* is till opset|No Op registered for|NOT_IMPLEMENTED.*Could not find an implementation",
        "the ONNX file uses a newer opset or an operator that this runtime does not know",
        ("export with a lower opset_version (18 runs nearly everywhere)", "pip install -U onnxruntime"),
        _installed("onnx", "onnxruntime"),
    ),
    KnownFailure(
        "dtype mismatch",
        r"expected scalar type \w+ but found|Input type \(.+\) and (?:weight|bias) type|"
        r"must have the same dtype|same dtype, but got|Unexpected input data type",
        "tensors of different number formats meet",
        (
            "bring the model to one format: module.float()",
            "cast at the door: x = x.to(next(model.parameters()).dtype)",
            "under autocast keep the inputs in fp32",
        ),
    ),
    KnownFailure(
        "tensors on different devices",
        r"Expected all tensors to be on the same device|found at least two devices|Input type \(torch\.cuda",
        "one tensor is on the GPU, the other on the CPU",
        ("x = x.to(next(model.parameters()).device)", "register loose tensors as buffers, so that .to() moves them"),
    ),
    KnownFailure(
        "weights do not fit",
        r"Error\(s\) in loading state_dict|size mismatch for|Missing key\(s\) in state_dict",
        "the file holds the weights of another architecture, or of a wrapped one",
        (
            "strip the prefix of DataParallel or compile: {k.removeprefix('module.'): v for k, v in state.items()}",
            "build the module with the same options as in training (number of classes)",
        ),
    ),
    KnownFailure(
        "unsafe weights file",
        r"Weights only load failed|weights_only",
        "the file holds more than tensors: loading it would run code",
        (
            "save state_dict() instead of the module, best as safetensors",
            "torch.serialization.add_safe_globals for types that you trust",
        ),
    ),
    KnownFailure(
        "too many threads",
        r"libgomp: Thread creation failed|OMP: Error|pthread_create failed|Resource temporarily unavailable|"
        r"oversubscri|can't start new thread",
        "more threads are wanted than the machine or its limits give; beyond the cores each slows the others",
        (
            "torch.set_num_threads(n), intra_op_num_threads=n in ONNX Runtime, INFERENCE_NUM_THREADS in OpenVINO",
            "ulimit -u, and the pids limit of the container",
        ),
        _threads,
    ),
    KnownFailure(
        "too many open files",
        r"Too many open files|EMFILE",
        "every connection, worker and shared tensor takes a file descriptor",
        ("ulimit -n 65536 (systemd: LimitNOFILE=65536)", "torch.multiprocessing.set_sharing_strategy('file_system')"),
    ),
    KnownFailure(
        "no compiler",
        r"(?:InvalidCxxCompiler|No working C\+\+ compiler|gcc: not found|'g\+\+')|fatal error: Python\.h",
        "torch.compile and AOTInductor write C++ and need a compiler (and Python's headers)",
        ("apt install g++ python3-dev", "or use backends that need none: onnxruntime, openvino"),
    ),
    KnownFailure(
        "library missing",
        r"lib[\w.+-]+\.so[\w.]*: cannot open shared object file|DLL load failed",
        "a shared library is not installed, or not on the loader's path",
        (
            "libcud*: pip install the CUDA build's nvidia-* packages",
            "libGL.so.1: apt install libgl1, or opencv-python-headless",
        ),
        lambda text: [
            f"missing: {found[1]}" for found in [re.search(r"(lib[\w.+-]+\.so[\w.]*): cannot open", text)] if found
        ],
    ),
    KnownFailure(
        "port in use",
        r"Address already in use|EADDRINUSE",
        "another process listens on that port",
        ("ss -ltnp shows which; choose another with --http-port",),
    ),
    KnownFailure(
        "device-side assert",
        r"device-side assert triggered|index out of (?:range|bounds)|indexSelect",
        "an index is larger than the table it looks into: a token id, a class label",
        (
            "run on the CPU, or with CUDA_LAUNCH_BLOCKING=1, to see the true line",
            "check ids against embedding.num_embeddings",
        ),
    ),
    KnownFailure(
        "crash in native code",
        r"Segmentation fault|SIGSEGV|core dumped|SIGABRT|double free",
        "native code broke; Python has no say in that",
        (
            "python -X faulthandler shows the Python line",
            "import torch before other native libraries; look for two copies of libgomp or libiomp",
        ),
        _installed("torch", "onnxruntime", "openvino"),
    ),
)


def explain(failure: BaseException | str) -> list[Explanation]:
    """What an exception, or the text of a log, means: every known failure in it, the most telling first.

    Empty when nothing is known.
    """
    text = failure if isinstance(failure, str) else _texts(failure)
    return [found for found in (_explained(known, text) for known in KNOWN_FAILURES) if found is not None]


def _texts(fault: BaseException | None) -> str:
    lines: list[str] = []
    while fault is not None and len(lines) < 10:
        lines.append(f"{type(fault).__name__}: {fault}")
        fault = fault.__cause__ or fault.__context__
    return "\n".join(lines)


def _explained(known: KnownFailure, text: str) -> Explanation | None:
    found = re.search(known.pattern, text)
    if found is None:
        return None
    start = text.rfind("\n", 0, found.start()) + 1
    end = text.find("\n", found.start())
    line = text[start : end if end >= 0 else len(text)].strip()
    near = text[max(0, start - 2000) : found.end() + 2000]
    return Explanation(known.name, known.words, [*known.compute(near), *known.mend], line[:300])
