"""Open a kernel library and turn its status codes into exceptions."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

from cffi import FFI

FOLDER = Path(__file__).resolve().parent
_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
_NAMES = {"cpu": f"libtensor_ops.{_SUFFIX}", "cuda": f"libtensor_ops_cuda.{_SUFFIX}"}


class TensorOpsError(Exception):
    """The library refused or failed. The message is the library's: the argument, what is required of it, its value."""


class NoDevice(TensorOpsError):
    """No driver, a driver too old, no such device, or a library that was not built."""


class OutOfMemory(TensorOpsError):
    """The device has no room for an allocation."""


class DeviceFailed(TensorOpsError):
    """A kernel failed: nothing on this backend can be used any more."""


_ERRORS = {3: NoDevice, 4: OutOfMemory, 5: DeviceFailed}


def library_path(kind: str, folder: Path | None = None) -> Path:
    """Where the library of `kind` ("cpu" or "cuda") is, or would be: beside the package, under _native."""
    return (folder or _native_folder()) / _NAMES[kind]


@cache
def _native_folder() -> Path:
    # The package may be spread over several folders (an editable install); __path__ knows all of them.
    import inference_pio

    for root in inference_pio.__path__:
        if (Path(root) / "_native").is_dir():
            return Path(root) / "_native"
    return Path(inference_pio.__path__[0]) / "_native"


@cache
def load(kind: str) -> tuple[FFI, object]:
    """(ffi, lib) of the library of `kind`. NoDevice if it is not there or is of another version than its header."""
    path = library_path(kind)
    if not path.exists():
        hint = "it is built where nvcc is found" if kind == "cuda" else "reinstall the package"
        raise NoDevice(f"the {kind} kernel library is not part of this installation ({path.name} is missing; {hint})")
    header = (path.parent / "include" / "tensor_ops.h").read_text(encoding="utf-8")
    ffi = FFI()
    ffi.cdef(re.search(r"CDEF-BEGIN \*/(.*)/\* CDEF-END", header, re.DOTALL).group(1))
    try:
        lib = ffi.dlopen(str(path))
    except OSError as error:
        raise NoDevice(f"the {kind} kernel library does not load: {error}") from None
    if lib.tops_abi() != lib.TOPS_ABI:
        raise NoDevice(f"{path.name} has ABI {lib.tops_abi()}, its header {lib.TOPS_ABI}: reinstall the package")
    return ffi, lib


def raise_status(ffi: FFI, lib, status: int) -> None:
    """Raise what a status other than TOPS_OK means; call it on the thread that got the status."""
    message = ffi.string(lib.tops_last_error()).decode("utf-8", "replace")
    raise _ERRORS.get(status, TensorOpsError)(message)
