"""From rows to trees, and from trees to packed batches. No torch but in packing.py.

In the order of reading:

    prepare.py, whole.py, workers.py, tables.py, parts.py, table.py: the one entry, a source on its way through it, by
        several processes where it has many rows, its rows chunk by chunk, these joined, and what comes of them
    sources.py, registries.py, readers.py, containers.py, separated.py, columnar.py, rows.py, file_bytes.py, values.py,
        bounded.py: files, folders that say how they are read, hub data sets, and what no row may hold
    laid_out.py, kinds.py, own_layout.py: which layout rows have, which stages could read them, and rows in our own
    generators.py, generator_child.py: data made by a function, in a child process
    records.py, formats/: what a row becomes, and the layouts that it may have
    audit.py, unread.py, doubts.py, lost.py: the report: refused, not read, hardly meant, not rendered
    thinking.py, likeness.py: thoughts that stay or go; texts that are the same, or nearly
    tokenizer.py, carried.py, backends.py, scratch.py: tokenizers: of a folder, of an adapter, of transformers'
        classes, new
    template.py, template_files.py, templates/, sandbox.py, dialect.py: chat templates, their limits and their habits
    render.py, turns.py, ends.py, openings.py, beginnings.py, seen.py, labels.py: records to text
    encode.py: text to ids and masks
    encoded.py, soundness.py, cache.py: tokenised rows: cut, looked at, kept by content
    media/, placing.py, world.py: images and videos, and where they stand; tools of an environment
    mixing.py, streams.py: an epoch of several sources; rows that are read as they are trained on
    order.py, prefixes.py, microbatches.py, packing.py: which rows a step sees, and how they are computed
"""
