"""Written verdicts, read strictly: what is not clear is None, which is no score and no win.

Guards: a parse failure that means 'answer 1 wins' (UnifiedReward), and a reply misread as a score.
"""

import re
import time

import pytest

from prefopt.judges.replies import read_preference, read_score

SCORES = [
    # Called a score
    ("Score: 85", 85),
    ("Score:85", 85),
    ("Score - 85", 85),
    ("Score \u2013 85", 85),
    ("score 85", 85),
    ("**Score:** 85", 85),
    ("Score: **[85]**", 85),
    ("Score: 85.5", 85.5),
    ("Score: 85 points", 85),
    ("Score: 85/100", 85),
    ("Score: 85%", 85),
    ("Score: 0", 0),
    ("Score: 100", 100),
    ("Score (0-100): 85", 85),
    ("Score out of 100: 85", 85),
    ("Score\uff1a\uff18\uff15", 85),
    ('{"score": 55}', 55),
    ("Rating: 85", 85),
    ("I give this answer a score of 72.", 72),
    ("The score of this answer would be 72, for it misses the unit.", 72),
    ("The rating of this response is 45/100 because it misses the 3rd bar.", 45),
    ("Accuracy score: 80\nOverall score: 75", 75),
    ("Score: 85. It is among the top 10", 85),
    ("Score: 85/100\nReason: 2 of the 3 facts hold.", 85),
    ("The answer names 3 of 4 bars.\nScore: 75", 75),
    ("A perfect score would be 100. Score: 70", 70),
    ("Score: 70. A perfect score is 100.", 70),
    # Out of 100, or at the end
    ("85/100", 85),
    ("85 out of 100", 85),
    ("85/100\nReason: it misses 2 bars.", 85),
    ("I'd give it 85/100 because it is right.", 85),
    ("3 of 4 bars are right.\n\n60/100", 60),
    ("85", 85),
    ("85.", 85),
    ("85%", 85),
    ("\\boxed{85}", 85),
    ("It looks right.\n\n85", 85),
    ("It names 3 out of 4 bars. 85", 85),
    ("Overall: 66", 66),
    ("I rate this answer 64.", 64),
    ("On a scale of 0 to 100, I give it a 90.", 90),
    ("This answer deserves 70.", 70),
    # Outside of the scale: never clamped
    ("Score: 120", None),
    ("Score: -5", None),
    ("Score: \u22125", None),
    ("Score: 1,000", None),
    # Not clear
    ("Score: 80-90", None),
    ("Score: 80 \u2013 90", None),
    ("Score: 80 to 90", None),
    ("Score: 85 or 90", None),
    ("I would score it between 80 and 90", None),
    ("Score: ~85", None),
    ("Score: 85,5", None),
    ("Score: 8/10", None),
    ("9/10", None),
    ("Score 1: 85", None),
    ("The score is not 85", None),
    ("The score is at least 85", None),
    ("Score: eighty", None),
    ("Score: N/A", None),
    # A number of something else
    ("It is in the top 10.", None),
    ("I rate it in the top 10.", None),
    ("The chart shows 85 apples", None),
    ("The right value is 85.", None),
    ("The chart says 20 out of 100 failed.", None),
    ("It is right. Step 3: 85", None),
    ("It was made in 1985", None),
    ("", None),
    ("I cannot grade this.", None),
]


@pytest.mark.parametrize(("text", "score"), SCORES)
def test_a_score_is_read_from_the_end_or_not_at_all(text, score):
    assert read_score(text) == score


@pytest.mark.parametrize(
    ("text", "low", "high", "score"),
    [
        ("Score: 8/10", 0, 10, 8),
        ("Score: 8", 1, 10, 8),
        ("Score: 85", 0, 10, None),
        ("Score: 0", 1, 10, None),
        ("Score (1-10): 7", 1, 10, 7),
        ("Score: 80%", 0, 10, None),
        ("Score: 85/100", 0, 10, None),
    ],
)
def test_scores_of_another_scale(text, low, high, score):
    assert read_score(text, low, high) == score


PREFERENCES = [
    ("The first", "first"),
    ("first response", "first"),
    ("Response 1", "first"),
    ("**Response 2**", "second"),
    ("Answer 2", "second"),
    ("Answer: B", "second"),
    ("B", "second"),
    ("(B)", "second"),
    ("2", "second"),
    ("[[A]]", "first"),
    ("Both have flaws. [[B]]", "second"),
    ("[[C]]", "tie"),
    ("Verdict: first", "first"),
    ("Verdict: second.", "second"),
    ("Verdict: tie", "tie"),
    ("Winner: Response 1", "first"),
    ("Response 1 is better", "first"),
    ("A is better", "first"),
    ("Assistant B is better.", "second"),
    ("The better response is B.", "second"),
    ("The second response is better than the first.", "second"),
    ("The first response is worse than the second.", "second"),
    ("The first response is preferred over the second.", "first"),
    ("I think the first response seems to be slightly better than the second one.", "first"),
    ("The first answer is clearly better because it does not hallucinate.", "first"),
    ("Neither is perfect, but the first is better.", "first"),
    ("Compared with the first response, the second is better", "second"),
    ("First, the second answer is better.", "second"),
    ("I prefer the second answer over the first.", "second"),
    ("I would choose the first.", "first"),
    ("The second wins.", "second"),
    ("Response 2 is the winner!", "second"),
    ("The first response is not a good one. The second response is better.", "second"),
    ("At first glance the second is better. On a closer look, the first is better.", "first"),
    # Reasons after the verdict
    ("The first is better.\nThe second one is longer.", "first"),
    ("The second is better. The first has better colours.", "second"),
    ("The first is better at colours, but overall the second is better.", "second"),
    # Ties
    ("tie", "tie"),
    ("Tie.", "tie"),
    ("It's a tie.", "tie"),
    ("equally good", "tie"),
    ("Both responses are equally good.", "tie"),
    ("Both are equal", "tie"),
    ("The two responses are of equal quality", "tie"),
    ("There is no clear difference.", "tie"),
    ("Neither is better.", "tie"),
    # Denied, possible, contradictory
    ("the first is not better than the second", None),
    ("The first isn't better than the second.", None),
    ("The first is not worse than the second", None),
    ("I can't tell which is better.", None),
    ("It is not a tie.", None),
    ("Neither the first nor the second is better.", None),
    ("The first may be better.", None),
    ("If brevity matters, the first is better.", None),
    ("A user might prefer the first.", None),
    ("The first is better, the second is better.", None),
    ("Both the first and the second are better than most.", None),
    # No verdict
    ("", None),
    ("The first names both bars. The second misses one.", None),
    ("Response 1:\nIt names the bar.\nResponse 2:\nIt does not.", None),
    ("1. The first is good.\n2. The second is good.", None),
    ("A response is better when it is short.", None),
    ("The first bar is better visible.", None),
    ("The answer is 2.", None),
    ("The man wears a red tie.", None),
    ("Both bars are equal.", None),
]


@pytest.mark.parametrize(("text", "preference"), PREFERENCES)
def test_a_preference_is_read_from_the_end_or_not_at_all(text, preference):
    assert read_preference(text) == preference


SIDED = [(text, side) for text, side in PREFERENCES if side in ("first", "second")]


@pytest.mark.parametrize(("text", "preference"), SIDED)
def test_the_other_names_give_the_other_preference(text, preference):
    """No side is read more easily than the other."""
    names = {"first": "second", "1": "2", "A": "B"}
    names |= {other: one for one, other in names.items()}
    swapped = re.sub(r"\b(first|second|1|2|A|B)\b", lambda name: names[name[0]], text)
    assert read_preference(swapped) == names[preference]


def test_a_flood_of_numbers_is_read_in_time():
    """Guards: a server's reply of megabytes, for whose every number all that stands before is read again."""
    start = time.monotonic()
    assert read_score("Score: 5. " + "1 " * 10**6 + "\nScore: 85") == 85
    assert read_preference("[[A]] " + "1 " * 10**6 + "\nBoth are equal.") == "tie"
    assert time.monotonic() - start < 3
