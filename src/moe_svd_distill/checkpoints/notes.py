"""Lines about a model that whoever opens it should read: logged as warnings, which go to standard error by default."""

from __future__ import annotations

import logging
from functools import cache

_LOG = logging.getLogger(__name__)


@cache
def say_once(line: str) -> None:
    """Log a line, the first time that it is said in this process."""
    _LOG.warning("note: %s", line)
