"""Messages to compare."""

import re


def pattern(message: str) -> str:
    """Return a regular expression for a message in which only ``.*`` is special."""
    return ".*".join(map(re.escape, message.split(".*")))
