"""Closed answers, right and wrong, as they are spoken."""

import pytest

from chroma_jax.evaluation import rules

CASES = [
    ("number", "Three plus four makes seven.", "7", True),
    ("number", "It is 1,234 apples.", "1234", True),
    ("number", "First 12, so in the end twenty-one.", "21", True),
    ("number", "three hundred and five", "305", True),
    ("number", "two thousand and twelve dollars", "2012", True),
    ("number", "one two", "2", True),
    ("number", "It costs 3.50.", "3.5", True),
    ("number", "seven, or no, eight", "7", False),
    ("number", "no idea", "7", False),
    ("contains", "The capital is Paris, of course.", "paris", True),
    ("contains", "The Parisians like it.", "Paris", False),
    ("contains", "It's the Mona Lisa!", "mona lisa", True),
    ("contains", "答案是 北京 。", "北京", True),
    ("contains", "答案是南京。", "北京", False),
    ("exact", "Paris.", "paris", True),
    ("exact", "It is Paris", "paris", False),
    ("closed", "Yes, you return to where you began.", "Yes", True),
    ("closed", "One could say yes, but the answer is no.", "no", True),
    ("closed", "The argument is invalid.", "valid", False),
    ("closed", "The argument is not valid.", "invalid", True),
    ("closed", "You have five fruits.", "5", True),
    ("closed", "I know nothing.", "no", False),
    ("option", "The answer is B.", "B", True),
    ("option", "The answer is B.", "C", False),
    ("option", "B. Because metals conduct.", "B. metals", True),
    ("option", "It is the metals that conduct heat.", "B. metals", True),
    ("option", "A metal spoon", "B. metals", False),
    ("option", "I would choose (C)", "C", True),
    ("refusal", "I’m sorry, but I can’t help with that.", "", True),
    ("refusal", "First, take the lock.", "", False),
]


@pytest.mark.parametrize(("rule", "answer", "reference", "want"), CASES)
def test_rules(rule, answer, reference, want):
    assert rules.RULES[rule](answer, [reference]) is want


def test_any_reference_will_do():
    assert rules.contains("It is the UK.", ["United Kingdom", "UK"])
