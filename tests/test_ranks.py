"""The loss on several ranks, under gloo: two and three processes run ``ranks_cases``."""

import pytest

from tests import ranks


@pytest.fixture(scope="module", params=[2, 3], ids="ranks{}".format)
def verdicts(request, tmp_path_factory):
    module = "tests.ranks_cases"
    return ranks.run(module, ranks.cases_of(module), request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", ranks.cases_of("tests.ranks_cases"))
def test_case(verdicts, case):
    assert verdicts[case] == "passed", verdicts[case]
