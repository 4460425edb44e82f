"""Model folders for others: planned, validated, applied, proved. Knows models and nothing else.

In the order of reading:

    merge.py, merge_proof.py, merge_report.py: base and adapter into one folder, proved equal to both together
    export.py, formats/, load_proof.py, load_probe.py: a folder that others load, proved by loading it
    soup.py, soup_parts.py: several adapters as one, exactly
    checkpoint.py, compare.py, images.py: files rewritten one by one, how far two models are apart, a picture for
        proofs
    suite.py: everything that runs do with a model, tried on one
"""
