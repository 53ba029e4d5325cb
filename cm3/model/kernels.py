"""Products of few rows and whole decoding steps in C++ for CPUs, compiled where they run; torch does without them.

`kernels.cpp` is compiled once for each processor by the C++ compiler of the system, in a second or two, when a model
first decodes on a CPU, and kept in the user's cache. Elsewhere than on Linux with GNU's compiler, which `CXX` may name,
and without AVX-512 (its vectors made of shorter ones are several times slower), everything runs in torch alone.

B batch   D inputs   N outputs
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from cm3.checkpoint import atomic_path

_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = ("-std=c++17", "-O3", "-Wno-psabi", "-Wfatal-errors", "-march=native", "-fopenmp", "-shared", "-fPIC")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_MULTIPLES = {torch.float32: 16, torch.bfloat16: 32, torch.int8: 64}
"""Of what the number of inputs must be."""

Address = ctypes.c_void_p
Count = ctypes.c_int64


class Matrix(ctypes.Structure):
    """A weight matrix as `kernels.cpp` knows it; the tensors must live as long."""

    _fields_ = [("weight", Address), ("scale", Address), ("kind", Count), ("outputs", Count), ("width", Count)]

    @classmethod
    def of(cls, weight_ND: Tensor, scale_N: Tensor | None = None) -> "Matrix":
        """Of weights in memory, and their scales in float32 if they have 8 bits."""
        scale = None if scale_N is None else scale_N.data_ptr()
        return cls(weight_ND.data_ptr(), scale, _KINDS[weight_ND.dtype], *weight_ND.shape)


def multiplies(weight_ND: Tensor, num_rows: int) -> bool:
    """Whether a product of so many rows with these weights is one for `multiply`, and the compiler was there."""
    if type(weight_ND) not in (Tensor, Parameter):  # others need not have their values in memory
        return False
    if weight_ND.dtype not in _KINDS or weight_ND.device.type != "cpu" or not weight_ND.is_contiguous():
        return False
    if weight_ND.shape[1] % _MULTIPLES[weight_ND.dtype]:
        return False
    found = library()
    return found is not None and num_rows <= found.most_rows(_KINDS[weight_ND.dtype])


def multiply(x_BD: Float[Tensor, "*B D"], weight_ND: Float[Tensor, "N D"]) -> Float[Tensor, "*B N"]:
    """`x @ weight.T` for few rows, see `multiplies`; summed in float32."""
    found = library()
    assert found is not None and x_BD.shape[-1] == weight_ND.shape[1]
    x_RD = x_BD.reshape(-1, x_BD.shape[-1]).float().contiguous()
    num_rows = len(x_RD)
    out_RN = x_RD.new_empty(num_rows, len(weight_ND))
    arranged = x_RD.new_empty(num_rows + 16, x_RD.shape[1])
    matrix = Matrix.of(weight_ND)
    found.multiply(matrix, num_rows, torch.get_num_threads(), x_RD.data_ptr(), arranged.data_ptr(), out_RN.data_ptr())
    return out_RN.to(x_BD.dtype).view(*x_BD.shape[:-1], len(weight_ND))


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where they cannot be made, or would be slower than torch."""
    if sys.platform != "linux" or not _SOURCE.is_file() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    compiler = os.environ.get("CXX", "").strip() or "g++"
    try:
        program, *options = shlex.split(compiler)
        program_path = shutil.which(program)
        if program_path is None:
            return None
        found = _compiled([program_path, *options])
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        failure = f"cannot load {_SOURCE.name} compiled"
        if isinstance(error, subprocess.SubprocessError):
            failure = f"{compiler} cannot compile {_SOURCE.name}"
        reason = getattr(error, "stderr", None) or error
        warnings.warn(f"decoding is slower than it could be: {failure} ({reason})", stacklevel=2)
        return None
    found.most_rows.argtypes, found.most_rows.restype = [Count], Count
    found.multiply.argtypes = [ctypes.POINTER(Matrix), Count, Count, *[Address] * 3]
    found.multiply.restype = None
    found.decode.argtypes = [Address, Count, Count, Address, Count, *[Address] * 6]
    found.decode.restype = Count
    return found


def _compiled(compiler: list[str]) -> ctypes.CDLL:
    """This source, compiled with these flags for this processor: now, if that was not done or cannot be loaded."""
    recipe = f"{_SOURCE.read_text('utf-8')} {compiler} {_FLAGS} {_processor()}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    target = Path(root) / "open_cm3" / f"kernels-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if target.is_file():
        with suppress(OSError):  # damaged, or made on a system with other libraries
            return ctypes.CDLL(str(target))
    with atomic_path(target) as path:
        command = [*compiler, *_FLAGS, "-x", "c++", str(_SOURCE), "-o", str(path)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return ctypes.CDLL(str(target))


def _processor() -> str:
    """What the compiler's choice of instructions depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    flags = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return f"{platform.machine()} {platform.processor()} {' '.join(sorted(set(flags)))}"
