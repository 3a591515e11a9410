"""What a run reports -> plain records: one per iteration, one per evaluation, one for the whole run.

In: numbers. Out: records with their metrics declared beside each field, intervals, and the summary of a run.
"""
