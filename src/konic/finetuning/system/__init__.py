"""The operating system -> checked paths, atomic file writes, deferred signals, and returned memory.

In: paths that a user gives, and data to write. Out: absolute paths, and files that are complete or absent.
"""
