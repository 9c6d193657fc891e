"""Settings behind a name are checked by what they replace."""

import pytest

from pysparse.methods import OWL
from pysparse.methods.registry import allocation_for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("owl:lmbda=nan", r"allocation 'owl': lmbda .* in \[0, 0.5\], got nan"),
        ("owl:m=nan", "allocation 'owl': m, .* must be above 0, got nan"),
        ("owl:lmbda=wide", "allocation 'owl': lmbda is a number, got 'wide'"),
    ],
)
def test_a_setting_that_is_no_number_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        allocation_for(text)


def test_exponents_are_numbers():
    assert allocation_for("owl:lmbda=1e-2,m=7") == OWL(m=7, lmbda=0.01)
