"""Numbers of a run -> plain records: one per iteration, one per evaluation, one for the whole run.

In: numbers. Out: records that declare a metric next to each field, confidence intervals, and the summary of a run.
"""
