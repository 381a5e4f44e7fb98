"""What the server of tests/preloaded.py imports before it forks."""

import trainer.run  # noqa: F401
