"""Small real vision models, trained here on bundled data: classifiers, detectors and generators.

Nothing is downloaded. Digits are scikit-learn's, photographs scikit-image's (both split once into training and test
halves, :mod:`pysparse.suite.vision.pixels`); the architectures are transformers' with small configs
(:mod:`~pysparse.suite.vision.architectures`), a detector on transformers' backbones and small generators. A model is
trained once a machine, in about half a minute of one core, and kept beside pysparse's other cached files under a
hash of its training recipe (:mod:`~pysparse.suite.vision.checkpoints`).

Where do I put X? A classifier: one entry of ``ARCHITECTURES``; a detector: one of ``BACKBONES``; a generator: one of
``GENERATORS``.
"""
