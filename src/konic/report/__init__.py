"""A run's folder -> one self-contained page. It reads what a run wrote; no model is loaded.

- run: the files of a run -> its settings, metrics, evaluations and samples
- words: metrics, evaluations -> what came of the run, in sentences
- charts: metrics -> pictures
- page: all of it -> HTML
- watch: runs that go on -> a page that follows them, served to this machine alone
"""

from konic.report.page import write_report
from konic.report.run import Run

__all__ = ["Run", "write_report"]
