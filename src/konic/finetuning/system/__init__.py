"""The operating system -> paths, files written whole, signals held back, freed memory given back.

In: what a user names, and what has to be written. Out: paths and files that are complete or not there.
"""
