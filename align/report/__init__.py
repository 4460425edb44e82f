"""What a user sees of a run, and where metrics go.

In the order of reading:

    progress.py, screen.py, quiet.py: the live line, what may reach the terminal, silent libraries
    logs.py, table.py, plots.py: metrics.jsonl and TensorBoard, the closing table, curves
    front.py, front_page.py: a front as a picture and as a page
"""
