"""Events of a run -> printed lines and logged metrics: calls the console, trackers and the user's own hooks.

In: hooks called by the trainer. Out: printed lines, progress, logged metrics, and whether to stop early.
"""
