"""Floor 10: the suite: every recipe on every model at every sparsity, quality beside measured speed and size.

A grid (:mod:`pysparse.suite.grid`) names what is run; its cells are run one by one, in processes or by Ray
(:mod:`pysparse.suite.run`); each finished cell is one JSON file (:mod:`pysparse.suite.records`). What is measured
is a task (:mod:`pysparse.suite.tasks`).
"""
