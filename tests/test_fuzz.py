"""Every backend on random calls against the reference in float64: 2000 of them, MIXUPE_FUZZ=100000 for more.

The calls are in 20 tests, so that a long run may be made in pieces: ``test_random_calls[3]`` has calls 3, 23, 43, …
``MIXUPE_FUZZ_ONLY=17`` runs call 17 alone, as the message about a mismatch says.
"""

import os

import pytest

import mixupe_kernels as mk

from .cases import assert_accurate
from .conftest import INTERPRETED, ON_CPU, why_missing
from .fuzz_cases import ULPS, make_call

CALLS = int(os.environ.get("MIXUPE_FUZZ", 300 if INTERPRETED else 2000))
ONLY = os.environ.get("MIXUPE_FUZZ_ONLY")
PARTS, BATCH = 20, 100  # tests, for processes to share; calls between two switches of the backend


def mismatches(numbers):
    """What is wrong with the results of the calls, by any backend that this process serves."""
    with mk.use_backend("reference"):
        calls = [make_call(number) for number in numbers]
        exact = [call.compute(exact=True) for call in calls]
        kept = [index for index, call in enumerate(calls) if call.settled(exact[index])]
        peers = {index: calls[index].compute() for index in kept}
    found = []
    for served in ON_CPU:
        if served.name == "reference" or why_missing(served.name):
            continue
        with mk.use_backend(served.name):
            for index in kept[:: 4 if served.slow and not INTERPRETED else 1]:
                try:
                    results = calls[index].compute()
                    for place, compared in enumerate(zip(results, exact[index], peers[index], strict=True)):
                        floor = calls[index].floors.get(place, calls[index].floor)
                        assert_accurate(*compared, ulps=ULPS, floor=floor)
                except Exception as error:
                    found.append(f"{served}: call {numbers[index]}, {calls[index].description}: {error!r}"[:700])
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinite logits
@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part):
    numbers = [int(ONLY)] if ONLY else list(range(part, CALLS, PARTS))
    found = [text for start in range(0, len(numbers), BATCH) for text in mismatches(numbers[start : start + BATCH])]
    assert not found, f"{len(found)} of {len(numbers)} calls differ:\n" + "\n".join(found[:20])


# Rows of 16-bit logits near 1000, all but uniform: p - y is small beside p, whose lse was taken as it was rounded.
NEARLY_UNIFORM = (5740, 9879, 34781, 53983, 60323, 75417)
# A logit of ∞ in rows whose dense targets are 0.
WITHOUT_TARGETS = (1626, 2832)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("number", [*NEARLY_UNIFORM, *WITHOUT_TARGETS])
def test_calls_that_differed(number):
    assert not mismatches([number])
