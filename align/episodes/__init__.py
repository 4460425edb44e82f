"""Completions that take turns with an environment: calls of tools, their answers, and tokens that stay as sampled.

The room lies above `align.data`, `rewards` and `rollout`: an episode is sampled by an engine, acts in an environment's
process, and is put together by a chat template. `rollout.base.make_engine` finds `engine.py` by name.

    spec.py, setting.py: what engines are told of a stage's environments; what its episodes have in common, proved
    describe.py: the environment's process, and what it says of itself
    episode.py, acting.py, budgets.py: one episode, turn by turn; its environment's part; what one answer may add
    ids.py, history.py: its tokens, in one sequence or several; whether the template still writes what was sampled
    outcomes.py: how episodes end, and how they are lost
    images.py, looking.py: images that environments show, ready for engine and trainer; what one episode is shown
    group.py: the episodes of a prompt, drawn again where one is lost
    engine.py, engine_loop.py: an engine whose completions are episodes, and the thread that plays them
    venue.py: one of its environments there, and the places of those episodes that live
    trial.py: episodes played before a run
    calls/: what a model's text says: the formats of calls
    joins.py: what is appended to sampled ids, and an episode's prompt
    join_checks.py: whether a chat template can be used so, proved before the first episode
    renders.py, spoken.py, tools_as_text.py: what a template writes of messages, and of tools where it knows none
    guard.py: text of environments becomes no control token
"""
