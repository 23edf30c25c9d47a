"""Tests: folders as those of the code; what several of them need is in ``tests.support``."""
