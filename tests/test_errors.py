"""Errors on their way between processes."""

import copy
import pickle

import pytest

from vlsm.errors import BeyondLimitError, ImageError, RedirectError, VlsmError
from vlsm.training.learner import NotFiniteError

ERRORS = [
    VlsmError("a", "b"),
    ImageError("corrupt", "x.png is no PNG"),
    BeyondLimitError("more than 5"),
    NotFiniteError(3, float("nan"), 1, 2),
    RedirectError("elsewhere"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_in_another_process(error):
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(other), str(other), other.args, vars(other)) == (type(error), str(error), error.args, vars(error))
