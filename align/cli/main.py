"""The command `align`. Verbs are imported when they are called, so that `align check` brings no torch.

Exit codes: 0; 2 where the user's input must change; 1 where something failed; 130 where the user stopped it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from align import packages
from align.cli import classify_flags, experiment_flags, rewards_flags
from align.cli.simulate_flags import add_flags
from align.errors import AlignError, UserError
from align.oserrors import described, is_known, of_system
from align.report.screen import cut, screened

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors are one message on stderr, with place and remedy."""
    with screened():
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
    debug = bool(os.environ.get("ALIGN_DEBUG"))
    try:
        packages.bind()
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
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # Overrides may stand after options, where argparse no longer takes positionals.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)} (overrides are key=value)")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align", description="Align language models to preferences and rewards.")
    parser.add_argument("--version", action="version", version=f"align {metadata.version('align-rl')}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    run = verbs.add_parser("run", parents=[common], help="run a recipe from data to artefacts")
    _recipe_arguments(run)
    run.add_argument("--resume", action="store_true", help="continue an interrupted run; finished stages are kept")
    run.add_argument("--from-stage", metavar="ID", help="run this stage and those after it again (implies --resume)")
    run.add_argument("--address", metavar="ADDRESS", help="join a Ray cluster instead of starting one here")
    run.add_argument("--cores", type=int, metavar="N", help="cores of this machine to use (default: all)")
    run.add_argument("--plugins", metavar="FOLDER", help="where rewards are looked for (default: the recipe's folder)")
    run.set_defaults(verb=_run)

    submit = verbs.add_parser("submit", parents=[common], help="run a recipe as a job of a Ray cluster")
    _recipe_arguments(submit)
    submit.add_argument("--address", required=True, metavar="URL", help="of the cluster's job server, http://HEAD:8265")
    submit.add_argument("--resume", action="store_true", help="continue an interrupted run; finished stages are kept")
    submit.add_argument("--from-stage", metavar="ID", help="run this stage and those after it again")
    submit.add_argument("--detach", action="store_true", help="print the job's id and leave; do not follow its log")
    submit.set_defaults(verb=_submit)

    check = verbs.add_parser("check", parents=[common], help="check a recipe, its files and plugins; show the plan")
    _recipe_arguments(check, optional=True)
    check.add_argument("--model", metavar="FOLDER", help="with --suite: a model folder or hub id, in place of a recipe")
    check.add_argument("--suite", action="store_true", help="try on it what runs do: packing, adapters, merge, engines")
    check.add_argument("--trust-remote-code", action="store_true", help="with --suite: run the model's own code")
    check.add_argument("--data", action="store_true", help="read every row, not only the first 1,000 of each source")
    check.set_defaults(verb=_check)

    simulate = verbs.add_parser("simulate", parents=[common], help="how fast would an online stage run, and what with?")
    _recipe_arguments(simulate)
    add_flags(simulate)
    simulate.set_defaults(verb=_simulate)

    rewards = verbs.add_parser("rewards", help="list reward plugins; try one on data before a run")
    rewards_flags.add_verbs(rewards, common)
    rewards.set_defaults(verb=_rewards)

    doctor = verbs.add_parser("doctor", parents=[common], help="examine this machine; say what to do")
    doctor.add_argument("--fix", action="store_true", help="repair torch packages that do not fit each other")
    doctor.set_defaults(verb=_doctor)

    merge = verbs.add_parser("merge", parents=[common], help="merge an adapter into its base, and prove it")
    merge.add_argument("--base", required=True, help="model folder or hub id")
    merge.add_argument("--adapter", required=True, help="peft adapter: folder or hub id")
    merge.add_argument("--out", required=True, help="new folder for the merged model")
    merge.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    merge.add_argument(
        "--tokenizer", choices=("adapter", "base"), help="whose tokenizer and chat template to write (adapter's if any)"
    )
    merge.add_argument(
        "--other-base", action="store_true", help="merge although the adapter was trained on another base"
    )
    merge.add_argument("--end-of-turn", action="append", default=[], metavar="TOKEN", help="a token that ends a turn")
    merge.add_argument("--trust-remote-code", action="store_true", help="run model code from the base's folder")
    merge.set_defaults(verb=_merge)

    classify_flags.add_verb(verbs, common)
    experiment_flags.add_verbs(verbs, common, _recipe_arguments)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("recipe", nargs="?" if optional else None, help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as stages.grpo.rollout.workers=2, seed=3, name=second"
    )


def _run(arguments: argparse.Namespace) -> int:
    from align.cli import run

    return run.main(arguments)


def _submit(arguments: argparse.Namespace) -> int:
    from align.cli import submit

    return submit.main(arguments)


def _check(arguments: argparse.Namespace) -> int:
    if arguments.suite or arguments.model is not None or arguments.recipe is None:
        if not arguments.suite or arguments.model is None or arguments.recipe is not None:
            raise UserError(
                "a check is of a recipe, or of a model",
                remedy="write `align check recipe.yaml`, or `align check --model FOLDER --suite`",
            )
        from align.cli import suite

        return suite.main(arguments)
    from align.check import validate as check
    from align.check.scratch import scratch

    with scratch():  # what plugins put aside while they are described
        return check.main(arguments)


def _simulate(arguments: argparse.Namespace) -> int:
    from align.cli import simulate

    return simulate.main(arguments)


def _rewards(arguments: argparse.Namespace) -> int:
    from align.cli import rewards

    return rewards.main(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from align.cli import doctor

    return doctor.main(arguments)


def _merge(arguments: argparse.Namespace) -> int:
    from align.cli import merge

    return merge.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
