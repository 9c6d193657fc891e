"""The names that users type, and what importing the package does and does not do."""

import forked
import pytest

import pysparse


def test_every_public_name_is_there_and_documented():
    for name in pysparse.__all__:
        value = getattr(pysparse, name)
        assert name == "__version__" or value.__doc__, name
    assert set(pysparse.__all__) <= set(dir(pysparse))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = pysparse.prunes


def test_the_import_registers_the_format_and_leaves_the_rest_for_later():
    code = (
        "import sys, pysparse\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "assert 'pysparse' in known\n"
        "rooms = {m.split('.')[1] for m in sys.modules if m.startswith('pysparse.')}\n"
        "late = rooms & {'api', 'cli', 'methods'}\n"
        "assert not late, late\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    result = forked.run(code)
    assert result.returncode == 0, result.stderr


def test_an_unusable_transformers_is_one_warning():
    code = (
        "import sys; sys.modules['transformers.quantizers.auto'] = None\n"
        "import pysparse; print(pysparse.SparseLinear)"
    )
    result = forked.run(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("sparse checkpoints cannot be loaded") == 1
