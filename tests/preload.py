"""What the server of tests/preloaded.py imports before it forks: libraries of ranks and reports."""

import scipy.stats  # noqa: F401

import trainer.reporting.html.collect
import trainer.run  # noqa: F401
