"""One base class, so that the command line can tell a user's mistake from a bug."""

import inspect

from attribution import errors


def test_every_error_is_of_the_package_and_says_what_it_means():
    found = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(found) > 1
    for kind in found:
        assert issubclass(kind, errors.AttributionError)
        assert inspect.getdoc(kind) != inspect.getdoc(Exception)


def test_the_kinds_can_be_told_apart():
    kinds = [errors.ModelError, errors.DataError, errors.ConfigError, errors.RunError, errors.RecordError]
    assert all(issubclass(a, b) == (a is b) for a in kinds for b in kinds)
    assert not any(issubclass(kind, ValueError | OSError) for kind in kinds)  # no broad `except` swallows them
