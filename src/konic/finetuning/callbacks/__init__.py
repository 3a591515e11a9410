"""Events of a run -> the terminal, trackers, and the user's own hooks.

In: hooks called by the trainer. Out: printed lines, progress, logged metrics, and whether to stop early.
"""
