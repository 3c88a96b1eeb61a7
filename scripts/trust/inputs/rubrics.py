"""Rubrics: files that are none, and questions that cannot be."""

from collections.abc import Callable, Iterator
from pathlib import Path

from trial import Trial
from world import World

from inputs.yaml_files import BROKEN

GOOD = "name: a, text: Ask, polarity: positive"
WRONG: dict[str, tuple[str, str]] = {
    "empty": ("", "no list"),
    "a mapping": ("name: a\n", "no list"),
    "text": ("Ask\n", "no list"),
    "no questions": ("[]", "no questions"),
    "a number": ("- 7\n", "question 1"),
    "null": ("- null\n", "question 1"),
    "a list in the list": ("- [a]\n", "question 1"),
    "no name": ("- {text: Ask, polarity: positive}\n", "question 1.*name"),
    "an empty name": ("- {name: ' ', text: Ask, polarity: positive}\n", "question 1.*name"),
    "a number as name": ("- {name: 7, text: Ask, polarity: positive}\n", "question 1.*name"),
    "a long name": (f"- {{name: {'x' * 5000}, text: Ask, polarity: positive}}\n", "question 1.*name"),
    "no text": ("- {name: a, polarity: positive}\n", "text"),
    "an empty text": ("- {name: a, text: '', polarity: positive}\n", "text"),
    "a number as text": ("- {name: a, text: 7, polarity: positive}\n", "text"),
    "text and check": (f"- {{{GOOD}, check: count}}\n", "one of them"),
    "an unknown check": ("- {name: a, check: smell, polarity: positive}\n", "smell"),
    "a list as check": ("- {name: a, check: [count], polarity: positive}\n", "check"),
    "an unknown placeholder": ("- {name: a, text: 'A {breed}?', polarity: positive}\n", "breed"),
    "no polarity": ("- {name: a, text: Ask}\n", "polarity"),
    "an unknown polarity": ("- {name: a, text: Ask, polarity: good}\n", "polarity"),
    "a list as polarity": ("- {name: a, text: Ask, polarity: [positive]}\n", "polarity"),
    "a mapping as polarity": ("- {name: a, text: Ask, polarity: {a: b}}\n", "polarity"),
    "an unknown entry": (f"- {{{GOOD}, wieght: 2}}\n", "wieght"),
    "a number as entry": (f"- {{{GOOD}, 7: 2}}\n", "7"),
    "a long entry": (f"- {{{GOOD}, ? {'x' * 900} : 2}}\n", "xxx"),
    "one name twice": (f"- {{{GOOD}}}\n- {{{GOOD}}}\n", "'a'"),
    "a need of itself": (f"- {{{GOOD}, needs: [a]}}\n", "circle"),
    "needs in a circle": (
        f"- {{{GOOD}, needs: [b]}}\n- {{{GOOD.replace('a,', 'b,')}, needs: [a]}}\n",
        "circle",
    ),
    "an unknown need": (f"- {{{GOOD}, needs: [b]}}\n", "'b'"),
    "needs as text": (f"- {{{GOOD}, needs: b}}\n", "needs"),
    "needs of a number": (f"- {{{GOOD}, needs: [7]}}\n", "needs"),
    "soft: logit": (f"- {{{GOOD}, soft: logit}}\n", "soft"),
    "soft: []": (f"- {{{GOOD}, soft: []}}\n", "soft"),
    "soft of a check": ("- {name: a, check: count, polarity: positive, soft: log_odds}\n", "soft"),
    "a circle of 3,000": (
        "".join(
            f"- {{name: q{i}, text: Ask, polarity: positive, needs: [q{(i + 1) % 3000}]}}\n"
            for i in range(3000)
        ),
        "circle|values|larger",
    ),
} | {
    f"weight: {weight}": (f"- {{{GOOD}, weight: {weight}}}\n", "weight")
    for weight in ("-1", "0", ".nan", ".inf", "1e9", "'2'", "true", "null", "[1]", "2001-01-01", "much")
}
TAKEN = {
    "one question": f"- {{{GOOD}}}\n",
    "a weight": f"- {{{GOOD}, weight: 1e-1}}\n",
    "words of YAML 1.1": "- {name: no, text: on, polarity: positive}\n",
    "an anchor": f"- {{{GOOD}, needs: &n []}}\n- {{name: b, text: Ask, polarity: positive, needs: *n}}\n",
    "a chain of 300": "".join(
        f"- {{name: q{i}, text: Ask, polarity: positive, needs: [{f'q{i - 1}' if i else ''}]}}\n"
        for i in range(300)
    ),
}


def trials(world: World) -> Iterator[Trial]:
    """Every trial of this table."""
    for name, (content, says) in BROKEN.items():
        yield Trial(f"no YAML: {name}", _loading(content), ("rubric.yaml", says))
    for name, (text, says) in WRONG.items():
        yield Trial(name, _loading(text), ("rubric", says))
    for name, text in TAKEN.items():
        yield Trial(f"{name} is taken", _loading(text))


def _loading(content: bytes | str) -> Callable[[Path], object]:
    """Load the rubric, write it, and read what was written: the same."""

    def act(folder: Path) -> object:
        from prefopt.judges.rubric import Rubric

        file = folder / "rubric.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        rubric = Rubric.load(str(file))
        file.write_text(rubric.as_yaml())
        assert Rubric.load(str(file)) == rubric
        return rubric

    return act
