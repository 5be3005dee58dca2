"Bad input is refused in one sentence, good input comes back."
import math
import warnings

import numpy as np
import pytest
import torch

from efcn_nb.service.checks import distinct, first_line, one_of, positive, real, warn_caller, whole


GOOD = [
    (one_of, (2, [1, 2]), {}), (one_of, (None, ["cp", None]), {}), (one_of, (True, [False, True]), {}),
    (one_of, (.5, (.25, .5)), {}), (whole, (10**400,), {}), (real, (10**300,), {}),
    (one_of, ("cp", ["cp", "tt"]), {}), (one_of, ("cp", dict(cp=1)), {}),
    (whole, (3,), {}), (whole, (0,), dict(least=0)), (whole, (5,), dict(least=1, most=5)), (whole, (-2,), dict(most=0)),
    (whole, (np.int64(4),), dict(least=1)),
    (real, (.5,), {}), (real, (1,), dict(least=1, most=1)), (real, (np.float32(.5),), dict(most=1)),
    (positive, (1e-9,), {}), (positive, (2,), {}),
    (distinct, ([0, 1], whole), dict(least=0)), (distinct, (["a"],), {}), (distinct, ([0., .1], real), dict(most=1))]


@pytest.mark.parametrize("check, args, options", GOOD)
def test_what_is_good_comes_back(check, args, options): assert check("it", *args, **options) == args[0]


def test_a_range_is_a_list(): assert distinct("seeds", range(3), whole, least=0) == [0, 1, 2]


REFUSED = [
    (one_of, ("xy", ["cp", "tt"]), {}, "unknown it 'xy'; known are cp, tt"),
    (one_of, (None, ["cp", "tt"]), {}, "unknown it None; known are cp, tt"),
    (one_of, (["cp"], ["cp", "tt"]), {}, "unknown it ['cp']; known are cp, tt"),
    (one_of, (3, [1, 2]), {}, "unknown it 3; known are 1, 2"),
    (one_of, ("1", [1, None]), {}, "unknown it '1'; known are 1, None"),
    (one_of, (True, [1, 2]), {}, "unknown it True; known are 1, 2"),
    (one_of, (1, ["cp"]), {}, "unknown it 1; known are cp"),
    (one_of, (np.arange(2), ["cp", 1]), {}, "unknown it array([0, 1]); known are cp, 1"),
    (one_of, (np.array("cp"), ["cp"]), {}, "unknown it array('cp', dtype='<U2'); known are cp"),
    (one_of, (torch.ones(2), ["cp", 1]), {}, "unknown it tensor([1., 1.]); known are cp, 1"),
    (whole, (2.5,), {}, "it must be a whole number, not 2.5"),
    (whole, (2.,), {}, "it must be a whole number, not 2.0"),
    (whole, ("3",), {}, "it must be a whole number, not '3'"),
    (whole, (None,), {}, "it must be a whole number, not None"),
    (whole, (True,), dict(least=1), "it must be a whole number, 1 or more, not True"),
    (whole, (0,), dict(least=1), "it must be a whole number, 1 or more, not 0"),
    (whole, (6,), dict(least=1, most=5), "it must be a whole number from 1 to 5, not 6"),
    (whole, (1,), dict(most=0), "it must be a whole number, 0 or less, not 1"),
    (real, (math.nan,), {}, "it must be a number, not nan"),
    (real, (math.inf,), dict(least=0), "it must be a number, 0 or more, not inf"),
    (real, (1.5,), dict(least=0, most=1), "it must be a number from 0 to 1, not 1.5"),
    (real, (False,), {}, "it must be a number, not False"),
    (real, ("1",), {}, "it must be a number, not '1'"),
    (positive, (0,), {}, "it must be a positive number, not 0"),
    (positive, (-1.,), {}, "it must be a positive number, not -1.0"),
    (positive, (math.nan,), {}, "it must be a positive number, not nan"),
    (positive, (math.inf,), {}, "it must be a positive number, not inf"),
    (positive, (True,), {}, "it must be a positive number, not True"),
    (whole, (np.array(3),), dict(least=1), "it must be a whole number, 1 or more, not array(3)"),
    (whole, (torch.tensor(3),), dict(least=1), "it must be a whole number, 1 or more, not tensor(3)"),
    (whole, (np.eye(2),), dict(most=1), "it must be a whole number, 1 or less, not array([[1., 0.], [0., 1.]])"),
    (whole, (10**400,), dict(most=9), f"it must be a whole number, 9 or less, not 1{199*'0'} ..."),
    (whole, (10**5000,), dict(most=9), "it must be a whole number, 9 or less, not a number of thousands of digits"),
    (real, (np.array(.5),), dict(least=0), "it must be a number, 0 or more, not array(0.5)"),
    (real, (torch.tensor(.5),), {}, "it must be a number, not tensor(0.5000)"),
    (real, (10**400,), {}, f"it must be a number, not 1{199*'0'} ..."),
    (real, (1j,), {}, "it must be a number, not 1j"),
    (positive, (np.array(.5),), {}, "it must be a positive number, not array(0.5)"),
    (positive, (torch.tensor(.5),), {}, "it must be a positive number, not tensor(0.5000)"),
    (positive, (10**400,), {}, f"it must be a positive number, not 1{199*'0'} ..."),
    (distinct, (np.array(3),), {}, "it must be a list, such as [array(3)], not array(3)"),
    (distinct, (torch.tensor(3),), {}, "it must be a list, such as [tensor(3)], not tensor(3)"),
    (distinct, (torch.tensor([0, 1]), whole), {}, "each of it must be a whole number, not tensor(0)"),
    (distinct, (3,), {}, "it must be a list, such as [3], not 3"),
    (distinct, ("ab",), {}, "it must be a list, such as ['ab'], not 'ab'"),
    (distinct, ({},), {}, "it must be a list, such as [{}], not {}"),
    (distinct, (None,), {}, "it must be a list, such as [None], not None"),
    (distinct, ([],), {}, "it must hold at least one value"),
    (distinct, ([1, 2, 1],), {}, "it must differ from each other, but 1 is there twice"),
    (distinct, ([0, .5], whole), dict(least=0), "each of it must be a whole number, 0 or more, not 0.5"),
    (distinct, (["a"], one_of, ["b"]), {}, "unknown each of it 'a'; known are b")]


@pytest.mark.parametrize("check, args, options, said", REFUSED)
def test_what_is_refused(check, args, options, said):
    with pytest.raises(ValueError) as error: check("it", *args, **options)
    assert str(error.value) == said


@pytest.mark.parametrize("error, line", [
    (ValueError("short"), "short"), (ValueError("short\nlong"), "short"), (ValueError("\n  first\nsecond"), "first"),
    (KeyError(), "KeyError"), (ValueError(" \n"), "ValueError"), (RuntimeError(3), "3")])
def test_first_line(error, line): assert first_line(error) == line


def test_a_warning_points_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_caller("no image is left")
    assert [(str(w.message), w.filename) for w in caught] == [("no image is left", __file__)]


def test_a_warning_points_past_this_package():
    "As if a function of this package had called it."
    names = dict(__name__="efcn_nb.somewhere", warn_caller=warn_caller)
    exec("def inner(): warn_caller('nothing')\ndef outer(): inner()", names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names["outer"]()
    assert [w.filename for w in caught] == [__file__]
