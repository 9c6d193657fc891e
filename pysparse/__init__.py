"""pysparse makes a model sparse, and makes the sparsity pay."""

__version__ = "0.1.0"
