"""A CPU build of torch beside CUDA builds of torchvision, torchaudio and torchcodec."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from align import torch_cpu

pytestmark = pytest.mark.slow  # fresh processes import torch and its companions

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
MISMATCH = pytest.mark.skipif(not torch_cpu.needs_declarations(), reason="torchvision and torch are of one build here")


def run_python(code: str, *options: str) -> str:
    """Standard output of a fresh interpreter, outside the checkout: only what is installed is found."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def transform_a_picture(size: int) -> list[int]:
    import torch
    from torchvision.transforms.v2 import functional

    picture = functional.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [size, size])
    return list(picture.shape)


def test_this_environment_has_been_put_in_order() -> None:
    assert torch_cpu.findings(SITE_PACKAGES) == []


def test_torchvision_transforms_pictures_in_a_fresh_process() -> None:
    code = "import torch, torchvision.transforms.v2 as v2; print(v2.Resize((4, 4))(torch.zeros(3, 8, 8)).shape)"
    assert "[3, 4, 4]" in run_python(code)


def test_transformers_and_its_image_processors_import_in_a_fresh_process() -> None:
    code = (
        "from transformers import AutoProcessor, Qwen2VLImageProcessorFast as P; import torch;"
        "print(P(min_pixels=784, max_pixels=3136)(torch.zeros(3, 56, 56), return_tensors='pt').pixel_values.shape)"
    )
    assert "[16, 1176]" in run_python(code)


def test_torchvision_imports_in_a_spawned_child() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(transform_a_picture, (4,)) == [3, 4, 4]


def test_torchvision_imports_in_a_ray_worker(ray_cluster) -> None:
    assert ray_cluster.get(ray_cluster.remote(transform_a_picture).remote(4)) == [3, 4, 4]


@MISMATCH
def test_asking_whether_torchvision_is_installed_imports_no_torch() -> None:
    code = "import sys, importlib.util as u; print(u.find_spec('torchvision').origin, 'torch' in sys.modules)"
    assert run_python(code).split()[-1] == "False"


def test_the_hook_imports_nothing_at_the_start_of_python() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(torch_cpu.__file__).parent)!r}); before = set(sys.modules);"
        "import torch_cpu; torch_cpu.install(); print(sorted(set(sys.modules) - before))"
    )
    assert run_python(code, "-I", "-S").strip() == "['__future__', 'torch_cpu']"


# ------------------------------------------------------------------------- repairing, on an environment made for it


def write_package(folder: Path, name: str, version: str, cuda: str | None = None) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    (folder / name / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of everything installed beside the standard library."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(entry for entry in sys.path if Path(entry) != SITE_PACKAGES)])
    return tmp_path


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that would have run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    return commands


def test_a_mismatch_is_found_and_repaired_once(packages: Path, uninstalled: list[list[str]]) -> None:
    write_package(packages, "torch", "2.13.0+cpu")
    write_package(packages, "torchvision", "0.28.0+cu130")
    write_package(packages, "torchcodec", "0.17.0+cu130")
    assert [line.split()[0] for line in torch_cpu.findings(packages)] == ["torchcodec", "torchvision"]
    assert len(torch_cpu.repair(packages)) == 2
    assert uninstalled == [[sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchcodec"]]
    assert (packages / "align_torch_cpu.pth").read_text() == torch_cpu.PTH_LINE
    assert [line.split()[0] for line in torch_cpu.findings(packages)] == ["torchcodec"], "the uninstall was not run"
    (packages / "torchcodec" / "version.py").unlink()
    assert torch_cpu.repair(packages) == []


def test_an_outdated_hook_is_found_and_replaced(packages: Path) -> None:
    write_package(packages, "torch", "2.13.0+cpu")
    write_package(packages, "torchvision", "0.28.0+cu130")
    torch_cpu.repair(packages)
    (packages / "align_torch_cpu.py").write_text("def install(): pass\n")
    assert len(torch_cpu.findings(packages)) == 1
    torch_cpu.repair(packages)
    assert torch_cpu.findings(packages) == []


@pytest.mark.parametrize(
    ("torch", "cuda", "torchvision"),
    [("2.13.0+cu130", "13.0", "0.28.0+cu130"), ("2.13.0+cpu", None, "0.28.0+cpu"), ("2.13.0", None, "0.28.0")],
    ids=["CUDA builds", "CPU builds", "macOS"],
)
def test_nothing_is_done_where_the_wheels_match(
    packages: Path, uninstalled: list[list[str]], torch: str, cuda: str | None, torchvision: str
) -> None:
    write_package(packages, "torch", torch, cuda)
    write_package(packages, "torchvision", torchvision)
    write_package(packages, "torchaudio", torchvision)
    assert torch_cpu.findings(packages) == []
    assert torch_cpu.repair(packages) == []
    assert uninstalled == []
    assert not list(packages.glob("align_torch_cpu*"))


def test_the_hook_goes_when_matching_wheels_come(packages: Path) -> None:
    write_package(packages, "torch", "2.13.0+cpu")
    write_package(packages, "torchvision", "0.28.0+cu130")
    torch_cpu.repair(packages)
    (packages / "torch" / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert torch_cpu.repair(packages) == ["removed align_torch_cpu.pth: the wheels match now"]
    assert not list(packages.rglob("align_torch_cpu*"))
