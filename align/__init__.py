"""The engine, room by room; `align/README.md` draws it.

In the order of reading:

    errors.py, protocols/, types.py: what everything else speaks: causes, what crosses processes, tensors
    plugins.py, plugin_modules.py: from a name in a recipe to code, ours or the user's
    recipe/, data/, model/, losses/, objectives/, train/, export/: the rooms of a datum
    episodes/: a model that calls tools, turn by turn
    stages/, simulate/, experiments/: the loop, the loop without its work, studies of several runs
    engines.py, describe.py: what an engine says of itself, what a plugin says in a child
    actors/, report/, check/, cli/, __main__.py: Ray, what is shown, what is asked before a run, the command line
    hub.py, gguf.py, mediastore.py, shared_files.py: where models, processed media and a cluster's files lie
    jsonl.py, readable.py, oserrors.py, packages.py, torch_cpu.py: files, the system, our names, a CPU build of torch
"""
