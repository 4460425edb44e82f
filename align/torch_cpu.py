"""A CPU build of torch beside torchvision, torchaudio and torchcodec wheels that were built for CUDA.

Package indexes often carry only CUDA builds of those three. Beside a CPU build of torch their compiled parts cannot be
loaded (they link against CUDA's runtime), and then

* ``import torchvision`` fails with ``operator torchvision::nms does not exist``: its Python half registers shape
  functions for two operators that its compiled half should have declared. Declared here first, by schema alone, the
  import succeeds and the Python transforms work. Calling the two operators still fails, as there is no kernel.
* ``import torchaudio`` and ``import torchcodec`` fail, and with them ``import vllm``, which takes an installed package
  for a working one. Nothing here needs them: `repair` uninstalls them.

The declaration must reach every process that imports torchvision: the driver, Ray's workers, vLLM's engine process,
children of multiprocessing. The only thing that runs in all of them is the start-up of Python's ``site`` module, so
`repair` puts two files into site-packages: ``align_torch_cpu.py``, a copy of this file, and ``align_torch_cpu.pth``,
one line that installs `TorchvisionFinder`, which costs a comparison of names per import. Where the wheels match, or
torch is a CUDA build, nothing is written or declared.

The copy stands alone: it imports nothing of this project, and at the start of Python nothing but `sys` (`re`, `pathlib`
and `typing` would add 10 ms to every start; so functions import what they need).
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType
    from typing import Any

HOOK = "align_torch_cpu"
PTH_LINE = f"import {HOOK}; {HOOK}.install()\n"
UNUSABLE = ("torchaudio", "torchcodec")
SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))

_library: Any = None  # torch.library.Library; torch forgets the declarations when this object goes


def version_file(package: str) -> str:
    """Text of ``<package>/version.py`` as installed, found without importing the package; "" where there is none."""
    from importlib.machinery import PathFinder
    from pathlib import Path

    spec = PathFinder.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder, "version.py")
        if file.is_file():
            return file.read_text(encoding="utf-8")
    return ""


def torch_is_cpu_build() -> bool:
    """Whether the installed torch was built without CUDA (False where torch is not installed)."""
    import re

    return re.search(r"^cuda\b[^=\n]*=\s*None\s*$", version_file("torch"), re.MULTILINE) is not None


def is_cuda_build(package: str) -> bool:
    """Whether the installed package carries a CUDA build's version, such as ``0.28.0+cu130``."""
    import re

    return re.search(r"^__version__\s*=\s*['\"][^'\"]*\+cu\d", version_file(package), re.MULTILINE) is not None


def needs_declarations() -> bool:
    """Whether torchvision's operators must be declared before it can be imported."""
    return torch_is_cpu_build() and is_cuda_build("torchvision")


def declare_operators() -> None:
    """Declare the operators that torchvision's Python half expects from its compiled half. Imports torch."""
    global _library
    import torch

    if _library is None and not hasattr(torch.ops.torchvision, "nms"):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in SCHEMAS:
            _library.define(schema)


class TorchvisionFinder:
    """A meta path finder that lets torchvision be found as usual and declares its operators before its code runs.

    Finding is not importing: `importlib.util.find_spec("torchvision")`, by which transformers and vLLM ask whether it
    is installed, must not import torch; so the declaration is put before the loader's `exec_module`.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not needs_declarations():
            return None
        run = spec.loader.exec_module

        def declare_and_run(module: ModuleType) -> None:
            declare_operators()
            run(module)

        spec.loader.exec_module = declare_and_run  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Put the finder first on `sys.meta_path`, once. Called at every start of Python by the line in site-packages."""
    if not any(getattr(finder, "__name__", "") == TorchvisionFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder)


# ------------------------------------------------------------------------------------------------ repairing


def findings(site_packages: Path) -> list[str]:
    """What is wrong with the environment whose packages lie in `site_packages`; empty where all is right."""
    if not torch_is_cpu_build():
        return []
    found = [
        f"{package} is a CUDA build beside a CPU build of torch; vLLM cannot be imported while it is installed"
        for package in UNUSABLE
        if is_cuda_build(package)
    ]
    if is_cuda_build("torchvision") and not hook_is_current(site_packages):
        found.append(
            "torchvision is a CUDA build beside a CPU build of torch; its import fails without the start-up hook"
        )
    return found


def hook_is_current(site_packages: Path) -> bool:
    """Whether the start-up hook is in place and is this very file."""
    module, pth = site_packages / f"{HOOK}.py", site_packages / f"{HOOK}.pth"
    if not (module.is_file() and pth.is_file()):
        return False
    return module.read_bytes() == own_source() and pth.read_text(encoding="utf-8") == PTH_LINE


def own_source() -> bytes:
    with open(__file__, "rb") as file:
        return file.read()


def repair(site_packages: Path) -> list[str]:
    """Bring the environment in order and say what was done; does nothing the second time.

    Raises:
        subprocess.CalledProcessError: pip could not uninstall torchaudio or torchcodec.
        OSError: site-packages cannot be written.
    """
    import py_compile
    import subprocess
    from importlib.util import cache_from_source
    from pathlib import Path

    done: list[str] = []
    unusable = [package for package in UNUSABLE if torch_is_cpu_build() and is_cuda_build(package)]
    if unusable:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *unusable], check=True)
        done.append(f"uninstalled {', '.join(unusable)} (CUDA builds beside a CPU build of torch)")
    module, pth = site_packages / f"{HOOK}.py", site_packages / f"{HOOK}.pth"
    if needs_declarations():
        if not hook_is_current(site_packages):
            module.write_bytes(own_source())  # before the line that imports it
            py_compile.compile(str(module), doraise=True)  # else every start compiles it where no cache is written
            pth.write_text(PTH_LINE, encoding="utf-8")
            done.append(f"wrote {pth.name}: torchvision's operators are declared before its import in every process")
    elif pth.is_file() or module.is_file():
        for file in (pth, module, Path(cache_from_source(str(module)))):
            file.unlink(missing_ok=True)
        done.append(f"removed {pth.name}: the wheels match now")
    return done
