"""Images, videos and sounds of the data: from where a row names them to tokens in a segment and tensors in the store.

    sources.py   where a medium may come from: beside the data file, a data URI, bytes, an allowed host (web.py)
    decode.py    bytes to an RGB picture, or the reason why not; video.py the frames of a video
    process.py   the model's own processor, one medium at a time; worker.py runs it in child processes, pool.py keeps
                 them
    shelf.py     the store as its writer sees it: whole files only, a bound on disk, leases of those who use them
    library.py   what `align.data.prepare` asks: media in, facts and tokens or a reason out; opening.py opens that of a
                 recipe's model
    shown.py     the placeholder that a template writes for a medium, and the tokens that it becomes

Nothing here but process.py, which only the children import, loads torch or transformers.
"""
