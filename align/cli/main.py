"""The command `align`. Its verbs are the modules beside this one, found by their names.

A verb exports `add(parser)`, which says what it takes, and `run(arguments)`, which does it and returns the exit code.
The first sentence of its module is its help. Only the verb that is called is imported: `align check` brings no torch,
and `align doctor` works where nothing else does.

Exit codes: 0; 2 where the user's input must change; 1 where something failed; 130 where the user stopped it.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path

from align import packages
from align.cli.arguments import add_debug
from align.errors import AlignError
from align.oserrors import described, is_known, of_system
from align.report.quiet import quiet
from align.report.screen import cut, screened

INTERRUPTED = 130
NO_VERBS = ("__init__", "main", "arguments")
VERBS = tuple(sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in NO_VERBS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors are one message on stderr, with place and remedy."""
    with screened():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    debug = bool(os.environ.get("ALIGN_DEBUG"))
    try:
        packages.bind()
        quiet()
        arguments = _parse(argv)
        debug = debug or arguments.debug
        return int(arguments.verb(arguments) or 0)
    except SystemExit as stop:  # argparse: --help, or a usage error that it has printed
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except AlignError as error:
        return _failed(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _failed("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:  # the reader of our output has gone (`align check ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001  the last place that can turn a failure into one message
        system = of_system(error)
        if system is not None and is_known(system):
            return _failed(str(described(system)), 1, debug)
        return _unforeseen(error, debug)


def _unforeseen(error: Exception, debug: bool) -> int:
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    hint = "" if debug else "\n  -> this was not foreseen; the same command with --debug shows where it happened"
    return _failed(f"{said}{hint}", 1, debug)


def _failed(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {cut(message)}", file=sys.stderr, flush=True)
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(next((word for word in words if not word.startswith("-")), None))
    arguments, rest = parser.parse_known_args(words)
    # Overrides may stand after options, where argparse no longer takes positionals.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (overrides are key=value)")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser(called: str | None) -> argparse.ArgumentParser:
    """The parser of the command, with what the verb that is called takes; where none is, with what each is for."""
    parser = argparse.ArgumentParser(prog="align", description="Align language models to preferences and rewards.")
    parser.add_argument("--version", action="version", version=f"align {metadata.version('align-rl')}")
    parser.set_defaults(debug=False)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for name in [called] if called in VERBS else VERBS:
        verb = verbs.add_parser(name, help=_help(name))
        if name == called:
            module = import_module(f"align.cli.{name}")
            add_debug(verb)
            module.add(verb)
            verb.set_defaults(verb=module.run)
    return parser


def _help(verb: str) -> str:
    """The first sentence of a verb's module, without importing it."""
    said = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{verb}.py").read_text(encoding="utf-8"))) or ""
    return said.partition("\n")[0].partition(": ")[2].partition(". ")[0].removesuffix(".")


if __name__ == "__main__":
    sys.exit(main())
