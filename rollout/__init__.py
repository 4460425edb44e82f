"""Engines that sample, and the fleet that keeps them at work. Knows align's protocols and errors alone.

In the order of reading:

    base.py: what an engine is: start here
    worker.py, stepping.py, member.py: one engine at work: its actor, its thread, the calls that say whether it lives
    fleet.py, ledger.py, local_fleet.py: engines as one, who has which request, one engine in this process
    vllm_facts.py, vllm_engine.py: vLLM as an engine, before it starts and at work
    vllm_version.py, vllm_start.py, vllm.py, vllm_media.py: what is called of it: whether it fits, its start, an
        `LLM` that runs, media
    vllm_weights.py, vllm_files.py, vllm_held.py, vllm_probe.py: the weights that it serves: read, held, computed with
"""
