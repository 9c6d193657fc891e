"""Floor 11: the ``pysparse`` command. Arguments in, calls out; the work is in :mod:`pysparse.api`."""

from pysparse.cli.main import app

__all__ = ["app"]
