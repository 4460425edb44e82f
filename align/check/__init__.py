"""Is everything there and sound, and what would run where? Without torch, and before anything starts.

`validate` is what `align check` and `align run` ask. It reads the recipe's `rules` (and `sharding`, `streaming`,
`needed` packages), opens its `inputs` for `facts`, and has a `plan` made: `stage_checks` refuse, `stage_words`,
`objective_words` and `layout_notes` say, `worlds` describe environments, `machine` and `memory` count, `trained`
measures a model's parts in a child. All problems are `findings`.
`trial_data` and `trial_media` read what a reward is tried on, `golds` what rows say is right; `shown_rows` shows some
as the model sees them; `launch` divides the machine among runs, `scratch` is where all of them put things aside.
"""
