"""What a build amounts to: BUILD.json, the dataset card, and a sentence for the terminal."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_builders.engine.stages import INVALID, NOT_SELECTED, Group
from data_builders.export.card import Card, plain, public_words, write_about
from data_builders.export.tables import EVERYTHING, EXPORTS
from prefopt.errors import InputError
from prefopt.files import public_name
from prefopt.judges.rubric import Rubric
from prefopt.runs import versions

NOTHING = "no valid candidate"
NO_CLASS = "of no class"
# Scores and their columns; with a discriminator `soft_score` is made of ranks, whose mean says nothing.
SCORES = {"hard": "hard_score", "soft": "judge_score", "discriminator": "discriminator_score"}
TABLE = "candidates"  # the table that is always written


class Mean:
    """The mean of numbers that are given one after the other."""

    def __init__(self) -> None:
        self.count, self.total = 0, 0.0

    def add(self, numbers: Iterable[float]) -> None:
        """Take some more."""
        for number in numbers:
            self.count += 1
            self.total += number

    @property
    def value(self) -> float | None:
        """Rounded; None of nothing."""
        return round(self.total / self.count, 4) if self.count else None


class Summary:
    """Counts over the candidates themselves, so a build that was resumed counts the same."""

    def __init__(self, rubric: Rubric, prompts: Mapping[str, int]):
        self.rubric = rubric
        self.left_out = Counter(prompts)  # prompts that no candidate was generated of, by reason
        self.candidates = 0
        self.prompts, self.with_selected = Counter[str](), Counter[str]()  # by class
        self.without: Counter[str] = Counter()  # prompts without a selected image, by reason
        self.invalid: Counter[str] = Counter()  # candidates, by reason
        self.not_selected: Counter[str] = Counter()  # candidates, by reason
        self.verdicts: dict[str, Counter[str]] = defaultdict(Counter)  # by question
        self.scores = {kind: Mean() for kind in SCORES}
        self.selected_scores = {kind: Mean() for kind in SCORES}
        self.margins = Mean()
        self.largest_margin = 0.0  # of all prompts, pair or not
        self.detected = 0  # candidates with a box
        self.seconds = 0.0

    def add(self, group: Group) -> None:
        """Count one prompt."""
        rows = group.candidates
        name = rows[0]["class"] or NO_CLASS
        self.candidates += len(rows)
        self.prompts[name] += 1
        self.invalid.update(row[INVALID] for row in rows if row[INVALID])
        self.not_selected.update(row[NOT_SELECTED] for row in rows if row[NOT_SELECTED])
        self.seconds += sum(row["seconds"] for row in rows)
        self.margins.add(pair.margin for pair in group.pairs)
        judged = [row for row in rows if row["rank"] is not None]
        selected = [row for row in judged if row["selected"]]
        for kind, column in SCORES.items():
            for scores, of in ((self.scores, judged), (self.selected_scores, selected)):
                scores[kind].add(row[column] for row in of if row[column] is not None)
        soft = [row["soft_score"] for row in judged]
        self.largest_margin = max(self.largest_margin, max(soft, default=0.0) - min(soft, default=0.0))
        self.detected += sum(bool(row["boxes"]) for row in judged)
        for row in judged:
            for question, verdict in zip(row["questions"], row["verdicts"], strict=True):
                self.verdicts[question][verdict or "unclear"] += 1
        if selected:
            self.with_selected[name] += 1
        else:
            best = max(judged, key=lambda row: row["hard_score"], default=None)
            self.without[best[NOT_SELECTED] if best else NOTHING] += 1

    def figures(self) -> dict:
        """The figures as BUILD.json holds them."""
        return {
            "prompts": dict(self.prompts),
            "candidates": self.candidates,
            "judged": self.scores["hard"].count,
            "prompts_with_selected": dict(self.with_selected),
            **{
                name: values[kind].value
                for kind in self.scores
                if self.scores[kind].count or kind != "discriminator"
                for name, values in (
                    (f"mean_{kind}_score", self.scores),
                    (f"mean_{kind}_score_of_selected", self.selected_scores),
                )
            },
            "highest_possible": sum(item.weight for item in self.rubric.items),
            "mean_margin": self.margins.value,
            "largest_margin": round(self.largest_margin, 4),
            "with_a_box": self.detected,
            "verdicts": {name: dict(sorted(counts.items())) for name, counts in self.verdicts.items()},
            "seconds_generating": round(self.seconds, 1),
        }

    def dropped(self) -> dict[str, dict[str, int]]:
        """Prompts without a selected image, and candidates that are invalid or not selected, by reason."""
        return {
            "prompts": dict(sorted((self.without + self.left_out).items())),
            "invalid": dict(sorted(self.invalid.items())),
            "not_selected": dict(sorted(self.not_selected.items())),
        }

    def facts(self, counts: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
        """A few lines for the gallery and the card."""
        figures = self.figures()
        kind = "soft" if self.rubric.soft_decides else "hard"
        best = "" if self.rubric.soft_decides else f" of at most {figures['highest_possible']:g}"
        rows = {name: sum(by_split.values()) for name, by_split in counts.items() if name != TABLE}
        boxes = f", {self.detected} with a box" if self.detected else ""
        return {
            "prompts": ", ".join(f"{count} {name}" for name, count in self.prompts.items()),
            "candidates": f"{figures['candidates']}, {figures['judged']} judged{boxes}",
            "prompts with a selected image": (
                f"{sum(self.with_selected.values())} (without one: {reasons(self.without + self.left_out)})"
            ),
            **{
                f"mean {name} score": f"{figures[f'mean_{name}_score']}{most}; "
                f"of the selected images {figures[f'mean_{name}_score_of_selected']}"
                for name, most in ((kind, best), ("discriminator", ""))
                if self.scores[name].count or name == kind
            },
            "not selected": reasons(self.not_selected),
            "invalid": reasons(self.invalid),
            "rows": ", ".join(f"{count} {name}" for name, count in rows.items()),
        }


def reasons(counts: Mapping[str, int]) -> str:
    """Counts of reasons in words."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"


ABOUT = """{per_prompt} candidates of each prompt. The judge answered the questions below about each of them.
Clear answers make points, whose sum is the hard score; how sure the answers are makes the soft
score{calibrated}{both}.
Selected: {selection}. Pairs by the rule `{pair_rule}`, from a margin of {min_margin}.
Splits are by prompt."""
BOTH = """ (`judge_score`).
The discriminator {} looked at each of them, too (`discriminator_score`): the soft score in all tables
is minus the mean of an image's rank by the judge and its rank by the discriminator"""


def write_build(
    folder: Path,
    settings: dict,
    identities: Mapping[str, str],
    summary: Summary,
    counts: Mapping[str, Mapping[str, int]],
    *,
    selection: str,
    run: Mapping,
) -> str:
    """Write BUILD.json and README.md; a sentence. A build without any row is an InputError that says why.

    `selection` says in words which images were selected.
    """
    build = {
        "facts": summary.facts(counts),
        "selection": selection,
        "figures": summary.figures(),
        "rows": {name: dict(by_split) for name, by_split in counts.items()},
        "dropped": summary.dropped(),
        "run": run,
        "settings": settings,
        "identity": identities,
        "versions": versions(),
    }
    write_about(folder, build, card(settings, summary, counts, selection))
    made = {name: sum(by_split.values()) for name, by_split in counts.items() if name != TABLE}
    said = "; ".join(f"{name}: {fact}" for name, fact in summary.facts(counts).items())
    if not any(made.values()):
        raise InputError(
            f"{folder}: nothing was selected ({said}); largest margin {summary.largest_margin:.4g}. See "
            "BUILD.json for each question's answers; generate more --candidates, lower --detection_threshold "
            "or --min_margin, or name another judge or detector"
        )
    return f"{folder}: {said}"


def card(settings: dict, summary: Summary, counts: Mapping[str, Mapping[str, int]], selection: str) -> Card:
    """The README.md of a dataset: figures, what was asked, and where its tables are."""
    exports = {TABLE: EVERYTHING, **EXPORTS}
    sources, rubric = settings["sources"] or [settings["model_name_or_path"]], summary.rubric
    generators = ", ".join(map(public_words, sources))
    judge = public_name(settings["judge_model_name_or_path"] or settings["judge_url"])
    discriminator = public_name(settings["discriminator_name_or_path"] or "")
    weights = f" ({', '.join(settings['question_weights'])})" if settings["question_weights"] else ""
    models = {
        "wrote the prompts": settings.get("writer_model_name_or_path"),
        "generated the images": generators,
        "with the LoRA": settings["adapter"],
        "judged them": judge,
        "discriminator": discriminator,
        "detector": settings.get("detector"),
    }
    return Card(
        title=f"Images generated by {generators}, judged by {judge}",
        about=ABOUT.format(
            per_prompt=settings["candidates"],
            calibrated=", less what it answers about an empty image" if settings["calibrate"] else "",
            both=BOTH.format(plain(discriminator)) if discriminator else "",
            selection=plain(selection),
            pair_rule=settings["pair_rule"],
            min_margin=settings["min_margin"],
        ),
        facts=summary.facts(counts),
        models={name: public_words(model) for name, model in models.items() if model},
        tables={name: exports[name].about for name in counts},
        rows={name: rows for name, rows in counts.items() if exports[name].columns is not None},
        tasks=["text-to-image"],
        license=settings["license"],
        tags=["synthetic"],
        questions={f"The rubric {public_name(rubric.name)}{weights}": rubric.as_yaml()},
    )
