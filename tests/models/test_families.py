"""Every family of models gives plain numbers, or is refused by name: docs/families.md, measured again."""

import re
from pathlib import Path

import pytest

from families import FAMILIES, examine

PAGE = (Path(__file__).parents[2] / "docs/families.md").read_text(encoding="utf-8")
VERDICTS = dict(re.findall(r"^\| `(\S+)` \|[^|]+\| (.*) \|$", PAGE, flags=re.MULTILINE))
ROUNDING = 5e-5
"""Of log-probs and logits in fp32; the largest seen is 6e-6."""


def test_the_page_lists_every_family():
    assert VERDICTS.keys() == FAMILIES.keys()
    assert sum(verdict.startswith("right") for verdict in VERDICTS.values()) >= 25


@pytest.mark.filterwarnings(
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"
)  # plain PEFT's own
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_is_right_or_refused_as_the_page_says(kind):
    found = examine(kind)
    if isinstance(found, str):
        assert VERDICTS[kind] == f"refused: {found}"
        assert "Use a model" in found
    else:
        print(kind, {check: f"{difference:.1e}" for check, difference in found.items()})
        assert VERDICTS[kind].startswith("right")
        assert {check: value for check, value in found.items() if value > (1e-6 if "KL" in check else ROUNDING)} == {}
