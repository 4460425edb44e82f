"""The command `align`: `main.py`, and a file for each verb. Verbs are imported when they are called."""
