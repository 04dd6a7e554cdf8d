"""The operators' suite runs on every backend this process serves, those of a CUDA device under the mark ``gpu``."""

import pytest

from ..conftest import ON_CPU, ON_CUDA, serve


@pytest.fixture(params=[*ON_CPU, *(pytest.param(served, marks=pytest.mark.gpu) for served in ON_CUDA)], ids=str)
def backend(request):
    """The name of each backend in turn, in use."""
    with serve(request.param) as name:
        yield name


@pytest.fixture
def slow(request):
    """Whether the backend in turn takes less than the whole suite."""
    return request.node.callspec.params["backend"].slow
