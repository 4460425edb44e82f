"""Several people on one machine: what is theirs is left alone, and what is ours they cannot look into."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from align.stages import owned
from align.stages.files import make_folder
from align.stages.owned import owned_folder, sweep
from align.stages.processes import this_process
from align.stages.publication import PublicationFolder
from align.stages.runfolder import RunFolder
from tests.unit.stages.test_runfolder import recipe

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def as_nobody(act: Callable[[], None]) -> None:
    """Run `act` in a child process of another user; fail with what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
        except BaseException:  # noqa: BLE001  the parent fails with it
            said = traceback.format_exc()
        os.write(write, said.encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    assert not said, said


def where_others_reach() -> Path:
    """The first temporary folder that another user can walk to; `TMPDIR` may well lie in a private one."""
    for root in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")):
        if root.is_dir() and all(part.stat().st_mode & stat.S_IXOTH for part in [root, *root.resolve().parents]):
            return root
    pytest.skip("no temporary folder here can be reached by another user")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place that everybody may write to, as /tmp is; the only one that is swept."""
    place = Path(tempfile.mkdtemp(prefix="everybody-", dir=where_others_reach()))
    place.chmod(0o1777)
    monkeypatch.setattr(owned, "MEMORY", place / "none")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    shutil.rmtree(place)


def dead(place: Path, owner: object = None) -> Path:
    """A folder whose owner is long gone."""
    folder = owned_folder(place)
    said = json.loads((folder / "owner.json").read_text())
    (folder / "owner.json").write_text(json.dumps({**said, "started": 1.0}))
    return folder


@as_root
def test_anothers_leftovers_are_neither_swept_nor_an_error(shared: Path) -> None:
    """Theirs is as dead as can be, and root could remove it; nobody cannot even look into root's."""
    theirs: list[str] = []
    as_nobody(lambda: (dead(shared), None)[1])
    theirs = os.listdir(shared)
    ours = dead(shared)
    assert sweep() == [ours]
    assert os.listdir(shared) == theirs
    ours = dead(shared)
    as_nobody(lambda: _expect([shared / theirs[0]], sweep(say=_refuse)))
    assert ours.is_dir()


def _expect(wanted: object, found: object) -> None:
    assert wanted == found, found


def _refuse(text: str) -> None:
    raise AssertionError(text)


@as_root
def test_another_can_look_into_nothing_of_a_run(shared: Path) -> None:
    run = RunFolder.open(recipe(shared), "", resume=False, cwd=shared)
    publications = PublicationFolder(run.path, shared=True)
    places = [run.path, owned_folder(shared), publications.root]

    def look() -> None:
        for place in places:
            for act in (os.listdir, lambda p: os.stat(p / "owner.json"), lambda p: os.mkdir(p / "mine")):
                with pytest.raises(PermissionError):
                    act(place)

    as_nobody(look)
    run.ended()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"pid": "x"}', b'{"pid": 1e999, "started": 1}', b"[" * 9999]
)
def test_an_owner_file_that_cannot_be_read_is_passed_over_with_a_note(shared: Path, content: bytes) -> None:
    broken, gone, said = owned_folder(shared), dead(shared), []
    (broken / "owner.json").write_bytes(content)
    assert sweep(say=said.append) == [gone] and broken.is_dir()
    assert len(said) == 1 and str(broken) in said[0] and "left alone" in said[0]


def test_a_link_with_our_name_is_never_followed(shared: Path, tmp_path: Path) -> None:
    precious = dead(tmp_path)
    (precious / "thesis.txt").write_text("mine")
    (shared / "align-link").symlink_to(precious)
    own = owned_folder(shared)
    (own / "owner.json").unlink()
    (own / "owner.json").symlink_to(precious / "owner.json")
    circle = owned_folder(shared)
    (circle / "owner.json").unlink()
    (circle / "owner.json").symlink_to("owner.json")
    assert sweep() == [] and (precious / "thesis.txt").exists() and own.is_dir()


def test_a_folder_of_a_machine_that_was_restarted_is_swept_and_of_another_machine_not(shared: Path) -> None:
    before, elsewhere = owned_folder(shared), owned_folder(shared)
    for folder, machine in ((before, owned._machine()), (elsewhere, "node7/abc")):
        said = {
            **this_process().to_json(),
            "where": "a-boot-before/pid:[1]",
            "namespace": "pid:[1]",
            "machine": machine,
        }
        (folder / "owner.json").write_text(json.dumps(said))
    assert sweep() == [before] and elsewhere.is_dir()


def test_a_folder_of_an_earlier_version_is_swept(shared: Path) -> None:
    old = owned_folder(shared)
    said = {"pid": os.getpid(), "started": 1.0, "what": "driver", "namespace": owned._namespace()}
    (old / "owner.json").write_text(json.dumps(said))
    assert sweep() == [old]


def test_a_run_below_a_place_of_everybodys_is_closed(shared: Path) -> None:
    before = os.umask(0o027)
    try:
        make_folder(shared / "runs" / "demo")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (shared / "runs", shared / "runs" / "demo")] == [0o700, 0o700]


def test_elsewhere_the_users_umask_decides_on_a_run_folder() -> None:
    here = Path(__file__).resolve().parent
    if any(place.stat().st_mode & stat.S_IWOTH for place in here.parents):
        pytest.skip("the checkout lies below a place of everybody's")
    folder, before = here / f".umask-{os.getpid()}", os.umask(0o027)
    try:
        make_folder(folder / "runs")
        assert stat.S_IMODE((folder / "runs").stat().st_mode) == 0o750
    finally:
        os.umask(before)
        shutil.rmtree(folder)
