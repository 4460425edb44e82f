"""The only home of Ray in `align`: thin shells around plain classes of other rooms.

In the order of reading:

    build.py: the backend of a real run: start here
    cluster.py, places.py, head.py: the cluster, where each role runs on it, and what is said when it dies
    policy.py, reference.py, files.py: the trainer, a reference, work on model files
    spare.py: processes that load their libraries before they are needed
    scoring.py, plugins.py, reward_actors.py: rewards behind the Scorer protocol, here and on several nodes
    reward_model.py, reward_records.py, reward_pictures.py: the reward that computes with torch
    jobs.py: a run as a job of a cluster
"""
