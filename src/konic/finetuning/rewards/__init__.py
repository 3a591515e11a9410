"""Samples -> Scores: the user's rewards, called here or in workers, weighted and reduced to one number per response.

In: a composer and samples. Out: `Scores`, with every part and every fault.
"""
