"""What a stage does, in turns, for whoever implements Trainer, Scorer and Fleet. No torch, no Ray, no engine.

In the order of reading:

    pipeline.py, context.py, backend.py: stages one after another, what each is given, and what they ask a backend for
    choices.py: what `auto` means on the machine that a run began on
    training.py, jobs.py, stage_start.py, roles.py: a stage that trains: set up, by which jobs, from what, on how much
        of a machine
    loop.py, offline.py, streamed.py, online.py, evaluate.py, intervals.py: the loop, its kinds of turns, how sure an
        exam is
    buffer.py, supply.py, groups.py, scoring.py, episode_scorer.py, updates.py, monitor.py: an online turn: sampled,
        scored, trained, compared
    margins.py, row_weights.py, reference_cache.py, reward_notes.py, idle.py, lost_words.py: what is known beforehand,
        what is said on the way
    runfolder.py, state.py, files.py, listing.py, manifest.py, fingerprint.py, checkpoint.py, metrics_file.py,
        rollout_log.py: on disk
    media_inputs.py, media_limits.py: files that rows name, limits on pictures
    publication.py, owned.py: folders outside the run's
    lock.py, processes.py, reaper.py, restarts.py, background.py, virtual_clock.py: one driver, and what outlives it
"""
