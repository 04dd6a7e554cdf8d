"""The loss and the draws of several ranks, under gloo: two and three processes run all cases of ``tests/ranks``."""

import pytest

from tests.ranks import processes

CASES = processes.cases_of("tests.ranks.rows", "tests.ranks.classes", "tests.ranks.draws", "tests.ranks.batch_norm")


@pytest.fixture(scope="module", params=[2, 3], ids="ranks{}".format)
def verdicts(request, tmp_path_factory):
    return processes.run(CASES, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.removeprefix("tests.ranks.").replace(":case_", "-"))
def test_case(verdicts, case):
    assert verdicts[case] == "passed", verdicts[case]
