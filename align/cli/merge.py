"""`align merge`: merge an adapter into its base, and prove it."""

from __future__ import annotations

import argparse
from pathlib import Path

from align.data.carried import carried
from align.data.ends import ending_notes
from align.hub import resolve_model_folder
from align.stages.manifest import require_artefact


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="model folder or hub id")
    parser.add_argument("--adapter", required=True, help="peft adapter: folder or hub id")
    parser.add_argument("--out", required=True, help="new folder for the merged model")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--tokenizer", choices=("adapter", "base"), help="whose tokenizer and chat template to write (adapter's if any)"
    )
    parser.add_argument(
        "--other-base", action="store_true", help="merge although the adapter was trained on another base"
    )
    parser.add_argument("--end-of-turn", action="append", default=[], metavar="TOKEN", help="a token that ends a turn")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the base's folder")


def run(arguments: argparse.Namespace) -> int:
    """Merge, and print what the proofs measured. Raises ModelError, Unsupported or ExportError, and
    RunFolderError where one of them is a stage's and no longer what it wrote."""
    base = resolve_model_folder(arguments.base)
    adapter = resolve_model_folder(arguments.adapter)
    for folder in (base, adapter):
        require_artefact(folder)
    chat = carried(base, adapter, end_of_turn=arguments.end_of_turn, whose=arguments.tokenizer)
    from align.export.merge import merge  # torch: only once the folders are there

    report = merge(
        base,
        adapter,
        Path(arguments.out),
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        chat=chat.files,
        other_base=arguments.other_base,
    )
    print(f"merged {report.modules} modules into {report.out} ({report.dtype})")
    print(f"  per module, float32: relative error {report.module_error:.1e} (bound {report.module_bound:.0e})")
    print(
        f"  against adapter-on: KL {report.kl_mean:.1e} (bound {report.kl_bound:.0e}), "
        f"top-1 agreement {report.top1:.4f} (bound {report.top1_bound:.4f})"
    )
    if report.untied_head:
        print("  the head is no longer tied to the embeddings: the adapter changes it alone")
    for warning in (*chat.notes, *ending_notes(chat.tokenizer), *report.warnings):
        print(f"  note: {warning.replace('`model.end_of_turn`', '`--end-of-turn`')}")
    return 0
