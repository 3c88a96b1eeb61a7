"""What a critic has written, read strictly: a score, or which of two answers it prefers.

A text is read from its end, where the verdict follows its reasons; what stands before its last 8,000
characters does not count. What is not clear is None: a range, a number outside of the scale, a negated
verdict, two verdicts in one sentence. None is no score and no win.
"""

import re
import unicodedata
from typing import Literal

Verdict = Literal["first", "second", "tie"]

READ = 8000  # characters at the end of a text

# Scores: a number, what it is out of, and what stands before it

RATED = (
    r"(?<![\w.,/-])(?P<number>[-+]?\d+(?:\.\d+)?)(?!\w|[.,]\d|-\w|\s*[:=])"
    r"\s*(?:(?P<percent>%|percent\b)|points?\b)?"
    r"(?:\s*(?:/|\bout\s+of\b|\bof\b)\s*(?P<whole>\d+(?:\.\d+)?))?"
)
# `score: 85`, `score 85`, `score of this answer is 85`: the last word before the number says that it follows.
LABELLED = re.compile(
    r"\b(?:scores?|scored|ratings?|rated|grade)\b"
    r"(?:\s*(?:[:=]|->|-\s)?|(?:\s+[a-z]+){0,6}(?:\s*(?:[:=]|->)|\s-\s|\s(?:is|be|of|at|as|an?)))\s*" + RATED
)
NUMBER = re.compile(RATED)
RANGE = re.compile(r"\s*(?:-|~|,|\bto\b|\bor\b|\band\b)\s*[-+]?\d")
OF_THE_SCALE = re.compile(r"\b(?:perfect|full|max|maximum|highest|best|top|possible|min|minimum|lowest)\s+$")
# What may stand in front of a number that is not called a score.
NAMED = re.compile(r"\b(?:final|overall|total|verdict|result|mark|points|evaluation|assessment)\s*[:=]\s*$")
GIVEN = re.compile(
    r"(?:\b(?:i|we|id)\b\D*\b(?:give|assign|award|rate)|\b(?:it|answer|response)\s+(?:deserves|earns|gets))\b"
    r"(?:\D*\b(?:an?|it|this|answer|response|with|at))?\s+$"
)


def read_score(text: str, low: float = 0, high: float = 100) -> float | None:
    """The score that a text gives, in low..high; None if it gives none, or none that is clear.

    The last number that is called a score counts (`Score: 85`, `a rating of 85/100`). Without such a one it
    is the last `85/100` or `85 out of 100`, or a number at the very end of the text, if it stands alone in
    its sentence or is given to the answer. A number out of another total than `high` is not clear.
    """
    plain = _without_scale(_plain(text[-READ:]).lower(), low, high)
    labelled = [m for m in LABELLED.finditer(plain) if not OF_THE_SCALE.search(plain[: m.start()])]
    found = labelled[-1] if labelled else _unlabelled(plain)
    return _value(plain, found, low, high) if found else None


def _unlabelled(plain: str) -> re.Match[str] | None:
    """The last number that is a score by where it stands."""
    for found in reversed(list(NUMBER.finditer(plain))):
        before = _sentences(f"{plain[: found.start()]}|")[-1].rstrip("|")
        after = plain[found.end() :]
        if not found["whole"] and after.strip(" \n.!"):
            continue
        alone = not before.strip(" -") and re.match(r"\s*[.!]?(?:\s|$)", after)
        if alone or NAMED.search(before) or GIVEN.search(before):
            return found
    return None


def _value(plain: str, found: re.Match[str], low: float, high: float) -> float | None:
    number, whole = float(found["number"]), found["whole"]
    of_another = whole is not None and float(whole) != high
    if of_another or (found["percent"] and high != 100) or RANGE.match(plain, found.end()):
        return None
    return number if low <= number <= high else None


def _without_scale(plain: str, low: float, high: float) -> str:
    """The text without brackets, and without what only names the scale: `(0-100)`, `score out of 100:`."""
    scale = rf"(?<![\d.-]){low:g}\s*(?:-|to\b|and\b)\s*{high:g}\b"
    plain = re.sub(rf"(?:\bon\s+a\s+scale\s+)?(?:\b(?:from|of|between)\s+)?{scale}", " ", plain)
    plain = re.sub(rf"\(\s*(?:out\s+)?of\s+{high:g}\s*(?:points?\s*)?\)", " ", plain)
    plain = re.sub(rf"\b(?:out\s+)?of\s+{high:g}\s*(?=[:=])", " ", plain)
    return re.sub(r"[\[\](){}]", " ", plain)


# Preferences: the two answers become signs, words that change no verdict go, and what stays has few forms

ONE, TWO = "\u2460", "\u2461"
NOUN = r"(?:responses?|answers?|replies|reply|options?|candidates?|assistants?|models?)"
NAMES = {
    ONE: re.compile(rf"\b(?:(?:first|1st)(?:\s+{NOUN}\b)?|{NOUN}:?\s+(?:1|one|a)\b)(?!-)"),
    TWO: re.compile(rf"\b(?:(?:second|2nd)(?:\s+{NOUN}\b)?|{NOUN}:?\s+(?:2|two|b)\b)(?!-)"),
}
# A letter or a digit is an answer by itself only: `A` is an article more often, and 2 a number.
SHORT = re.compile(
    r"(?:^|(?<=[:=])|(?<=[:=] ))\(?[AB12]\)?(?=[.!]?$)|^[AB](?= is\b)"
    r"|(?:(?<=\bis )|(?<=\bprefer )|(?<=\bchoose ))[AB](?=[.!]?$)"
)
SIGNS = {"A": ONE, "1": ONE, "B": TWO, "2": TWO}
MARKED = re.compile(r"\[\[\s*(a|b|c|1|2|tie)\s*\]\]")
MARKS: dict[str, Verdict] = {
    "a": "first",
    "1": "first",
    "b": "second",
    "2": "second",
    "c": "tie",
    "tie": "tie",
}
CLAUSE = re.compile(r"[,;()]|\s-\s|\b(?:but|because|since|although|though|while|whereas|however|yet)\b")
LEFT_OUT = re.compile(
    rf"{NOUN}|the|an?|one|much|far|bit|little|lot|also|thus|overall|still|even|to|be|would|(?!equally)[a-z]+ly"
)

SIDE = f"([{ONE}{TWO}])"
GOOD = "(?:better|best|preferred|preferable|superior|stronger|winner)"
BAD = "(?:worse|worst|inferior|weaker)"
# `both are better than none` prefers none of the two; `better at colours` is a reason, and no verdict.
IS, IN_PART = rf"(?<![{ONE}{TWO}] and .) (?:is|are|was|seems|appears|looks)", "(?:at|in|on|with|for|when)"
FOR = (
    re.compile(rf"{SIDE}{IS} {GOOD}\b(?! {IN_PART}\b)"),
    re.compile(rf"{SIDE} wins\b"),
    re.compile(
        rf"\b(?:{GOOD}|verdict|preference|choice|decision|judge?ment|conclusion|result|final)"
        rf" (?:[:=]|is) {SIDE}"
    ),
    re.compile(rf"(?:^|\b(?:i|we) )(?:prefer|choose|pick|select|favou?r) {SIDE}"),
)
AGAINST = (
    re.compile(rf"{SIDE}{IS} {BAD}\b(?! {IN_PART}\b)"),
    re.compile(rf"\b{BAD} (?:[:=]|is) {SIDE}"),
)
TIE = re.compile(
    r"^(?:(?:(?:its|it is|this is|both are|they are|are|i call it)|(?:verdict|result) (?:[:=]|is)) )?"
    r"(?:ties?|tied|draw|equal|equivalent)$"
    r"|\bequally (?:good|bad|well|correct|wrong|helpful|accurate|strong|weak|poor)\b"
    r"|\bneither (?:is )?better\b"
    rf"|(?:\bboth|\btwo|\bthey|{SIDE}) are (?:equal|equivalent|tied)\b|\b(?:same|equal) quality\b"
    r"|\bno (?:\w+ )?(?:difference|winner|preference)\b"
)
VERDICTS = re.compile(rf"\b(?:{GOOD}|{BAD}|prefer|choose|wins|ties?|tied|equal|equally)\b")
DENIED = re.compile(
    r"\b(?:not|never|nor|hardly|cannot|may|might|could|(?:is|are|was|were|do|does|did|ca|wo)nt)\b"
)
NONE_IS = re.compile(r"\b(?:no|neither|either)\b")
CONDITION = re.compile(r"\b(?:if|unless)\b")


def read_preference(text: str) -> Verdict | None:
    """The answer that a text prefers, the first or the second, or a tie; None if it says none clearly.

    Marks such as `[[B]]` come first; then the last sentence with a verdict counts: that an answer is better
    (best, preferred, worse ...), chosen, or named alone at the end, or that both are equally good.
    """
    plain = _plain(text[-READ:])
    if marks := MARKED.findall(plain.lower()):
        return MARKS[marks[-1]]
    for place, sentence in enumerate(reversed(_sentences(plain))):
        found = _verdicts(sentence, is_last=not place)
        if found:
            clear = len(found) == 1 and not CONDITION.search(sentence.lower())
            return found.pop() if clear else None
    return None


def _verdicts(sentence: str, *, is_last: bool) -> set[Verdict | None]:
    """What a sentence says of the two answers; None among it for what is denied or only possible."""
    named = SHORT.sub(lambda short: SIGNS[short[0].strip("()")], sentence).lower()
    for sign, name in NAMES.items():
        named = name.sub(sign, named)
    found: set[Verdict | None] = set()
    for clause in CLAUSE.split(named):
        tokens = re.findall(rf"[{ONE}{TWO}:=]|[a-z]+", clause)
        words = " ".join(token for token in tokens if not LEFT_OUT.fullmatch(token))
        if DENIED.search(words) and VERDICTS.search(words):
            found.add(None)
        elif TIE.search(words):
            found.add("tie")
        elif NONE_IS.search(words) and VERDICTS.search(words):
            found.add(None)
        else:
            found |= _sides(words)
    alone = re.fullmatch(rf"(?:the |{NOUN}\s*[:=]\s*)?{SIDE}[.!]?", named.strip())
    return found | ({_side(alone[1])} if is_last and alone else set())


def _sides(words: str) -> set[Verdict | None]:
    other = {ONE: TWO, TWO: ONE}
    sides = {side for form in FOR for side in form.findall(words)}
    sides |= {other[side] for form in AGAINST for side in form.findall(words)}
    return {_side(side) for side in sides}


def _side(sign: str) -> Verdict:
    return "first" if sign == ONE else "second"


# Both


def _plain(text: str) -> str:
    """The text without marks of emphasis and quotation; one kind of dash, of digits and of spaces."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"[\u2010-\u2015\u2212]", "-", text)
    text = re.sub(r"[*`\"'\u2018\u2019\u201c\u201d#$]|\\boxed|\\text", "", text)
    return re.sub(r"[ \t_]+", " ", text).strip()


def _sentences(plain: str) -> list[str]:
    """The sentences and lines of a text, without the marks of lists."""
    lines = (re.sub(r"^(?:[-+]|\d+[.)]|[A-Za-z]\))\s+(?=\S)", "", line.strip()) for line in plain.split("\n"))
    return [part.strip() for line in lines for part in re.split(r"(?<=[.!?])\s+", line) if part.strip()]
