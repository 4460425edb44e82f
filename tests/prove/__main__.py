"""`python -m tests.prove [name...]`: run the long proofs, the files prove_<name>.py here, one after the other.

Each is a program that exits 0 when it proved its claim and writes an entry by `tests.prove.entry.record`. A failed one
does not keep the others from running.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CHECKOUT = FOLDER.parents[1]


def main(wanted: list[str]) -> int:
    proofs = {path.stem.removeprefix("prove_"): path for path in sorted(FOLDER.glob("prove_*.py"))}
    unknown = [name for name in wanted if name not in proofs]
    if unknown or not proofs:
        print(f"error: no proof called {', '.join(unknown)}; there are: {', '.join(proofs) or 'none'}", file=sys.stderr)
        return 2
    failed = []
    for name in wanted or proofs:
        print(f"--- {name}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", f"tests.prove.{proofs[name].stem}"], cwd=CHECKOUT).returncode
        print(
            f"--- {name}: {'proved' if code == 0 else f'FAILED ({code})'} in {time.monotonic() - start:.0f} s",
            flush=True,
        )
        if code:
            failed.append(name)
    print(f"{len(wanted or proofs) - len(failed)} proved, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
