"""A run on a machine of many: nobody else can reach its sockets, read its files, or learn its token; and a run whose
cluster dies says so in words."""

from __future__ import annotations

import ipaddress
import os
import stat
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.runs import dpo, family, grpo, metrics, run, sft, started, wait_until, write_data, write_recipe

pytestmark = pytest.mark.slow


def listening(pid: int) -> dict[str, str]:
    """Addresses at which a process and those below it listen over TCP, and who does."""
    found = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN:
                    found[one.laddr.ip] = f"{process.name()}: {one.laddr.ip}:{one.laddr.port}"
        except psutil.Error:
            continue
    return found


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@pytest.mark.vllm
def test_a_run_listens_on_the_loopback_interface_alone_and_closes_its_folders(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)  # as the temporary folder of a machine is, wherever this one's may be
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, "private", [sft(steps=4), dpo(steps=2), grpo(steps=2)])
    home = tmp_path / "home"
    home.mkdir()
    open_to_all: dict[str, str] = {}
    seen: set[str] = set()
    modes: dict[str, int] = {}
    log = recipe.with_suffix(".log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        with started(recipe, "--cores", "2") as process:
            while process.poll() is None:
                try:
                    here = listening(process.pid)
                except psutil.NoSuchProcess:
                    break
                seen |= here.keys()
                open_to_all |= {ip: who for ip, who in here.items() if not is_loopback(ip)}
                for child in family(process):
                    _note_folders(child.pid, modes)
                time.sleep(0.3)
            assert process.wait() == 0, log.read_text()
    assert seen and not open_to_all
    assert modes and all(mode & 0o077 == 0 for mode in modes.values()), modes
    assert stat.S_IMODE((tmp_path / "runs" / "private").stat().st_mode) == 0o700
    assert not (home / ".ray" / "auth_token").exists()


def _note_folders(pid: int, modes: dict[str, int]) -> None:
    """Folders of ours in which a process has a file open."""
    try:
        paths = [Path(file.path) for file in psutil.Process(pid).open_files()]
    except psutil.Error:
        return
    for path in paths:
        for folder in path.parents:
            if folder.name.startswith("align-") and folder.is_dir():
                modes[str(folder)] = stat.S_IMODE(folder.stat().st_mode)


@pytest.mark.parametrize("part", ["gcs_server", "raylet"])
def test_a_run_whose_head_dies_says_so_and_resumes(tmp_path: Path, part: str) -> None:
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, "head", [sft(steps=60, eval=None, save={"every": 2})])
    log = recipe.with_suffix(".log")
    with started(recipe, "--cores", "1") as process:
        wait_until(lambda: len(metrics(tmp_path / "runs" / "head", "sft")) > 4, process, log)
        [head] = [p for p in psutil.Process(process.pid).children() if p.name() == part]
        head.kill()
        begun = time.monotonic()
        code = process.wait(60)
    said = log.read_text()
    assert code == 1 and time.monotonic() - begun < 50
    assert "Ray's head is gone" in said and "--resume continues" in said and "logs/driver.log" in said
    assert "state-dump" not in said and ".cc:" not in said and "rpc_client.h" not in said
    assert os.listdir(tmp_path / "runs" / "head" / "sft" / "checkpoints")
    if part == "gcs_server":
        assert "continues from step" in run(recipe, "--resume", "--cores", "1")


def test_what_rays_processes_and_libraries_say_goes_to_the_log_and_pythons_own_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    from align.actors.head import LOG, native_output

    with native_output(tmp_path / "logs"):
        os.write(2, b"rpc_client.h:204: Failed to connect\n")
        worker.print_to_stdstream(
            {"lines": ["[state-dump] Raylet is terminated"], "pid": "raylet"}, ignore_prefix=False
        )
        print("error: in words", file=sys.stderr)
    assert capfd.readouterr().err == "error: in words\n"
    log = (tmp_path / "logs" / LOG).read_text()
    assert "rpc_client.h" in log and "(raylet) [state-dump]" in log
    with native_output(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists(), "nothing was said"
