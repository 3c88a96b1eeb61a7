"""What a self-critique amounts to: BUILD.json, the dataset card, and a sentence for the terminal."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_builders.answers.config import SelfCritiqueConfig
from data_builders.answers.criticism import critic_question
from data_builders.answers.selection import is_consistent, longer, why_no_pair
from data_builders.engine.stages import INVALID, NOT_SELECTED, Group, Pair
from data_builders.export.card import Card, plain, write_about
from data_builders.export.summary import reasons
from data_builders.export.tables import Export
from prefopt.errors import InputError
from prefopt.evaluation.words import percent
from prefopt.files import public_name
from prefopt.runs import versions


class Summary:
    """Counts over the answers themselves, so a build that was resumed counts the same.

    `left_out` are prompts of the source without answers, by reason; `before` are all pairs, those among them
    that a balance of lengths leaves out.
    """

    def __init__(self, left_out: Mapping[str, int], before: Iterable[Pair]):
        self.without = Counter(left_out)  # prompts without a pair, by reason
        self.prompts = sum(left_out.values())
        self.answers = self.tokens = self.compared = self.unreadable = self.consistent = 0
        self.invalid: Counter[str] = Counter()  # answers, by reason
        self.not_selected: Counter[str] = Counter()  # answers, by reason
        self.pairs = self.consistent_pairs = 0
        self.p_chosen = 0.0
        self.lengths_before, self.lengths = Lengths(), Lengths()
        for pair in before:
            self.lengths_before.add(pair)

    def add(self, group: Group) -> None:
        """Count one prompt."""
        self.prompts += 1
        if reason := why_no_pair(group):
            self.without[reason] += 1
        for row in group.candidates:
            self.answers += 1
            self.tokens += row["tokens"]
            self.invalid.update(filter(None, [row[INVALID]]))
            self.not_selected.update(filter(None, [row[NOT_SELECTED]]))
            # Each comparison is in the rows of both answers.
            once = [n > row["candidate"] for n in row["compared_with"]]
            self.compared += sum(once)
            self.consistent += sum(c for c, counts in zip(row["consistent"], once, strict=True) if counts)
        self.unreadable += sum(row["unreadable"] for row in group.candidates) // 2
        for pair in group.pairs:
            self.pairs += 1
            self.consistent_pairs += is_consistent(pair)
            self.p_chosen += 0.5 + pair.margin
            self.lengths.add(pair)

    def figures(self) -> dict:
        """The figures as BUILD.json holds them; shares are in 0..1, null of nothing."""
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "mean_tokens": _share(self.tokens, self.answers),
            "compared": self.compared,
            "unreadable": self.unreadable,
            "consistent": _share(self.consistent, self.compared),
            "pairs": self.pairs,
            "consistent_of_pairs": _share(self.consistent_pairs, self.pairs),
            "mean_p_chosen": _share(self.p_chosen, self.pairs),
            "chosen_longer_before_balance": self.lengths_before.share,
            "chosen_longer": self.lengths.share,
        }

    def dropped(self) -> dict[str, dict[str, int]]:
        """Prompts and answers that are in no pair, by reason."""
        return {
            "prompts": dict(sorted(self.without.items())),
            "invalid": dict(sorted(self.invalid.items())),
            "not_selected": dict(sorted(self.not_selected.items())),
        }

    def facts(self) -> dict[str, str]:
        """A few lines for the terminal, the gallery and the card."""
        told = self.figures()
        unread = f", {self.unreadable} more could not be read" if self.unreadable else ""
        return {
            "prompts": str(self.prompts),
            "pairs": str(self.pairs),
            "prompts without a pair": reasons(self.without),
            "answers": f"{self.answers} (invalid: {reasons(self.invalid)})",
            "comparisons": f"{self.compared}{unread}",
            "consistent in both orders": f"{_percent(told['consistent'])} of the comparisons, "
            f"{_percent(told['consistent_of_pairs'])} of the pairs",
            "chosen is the longer": f"{_percent(told['chosen_longer'])} of the pairs, "
            f"{_percent(told['chosen_longer_before_balance'])} before a balance of lengths",
        }


class Lengths:
    """In how many pairs the chosen answer is the longer one; equal lengths count one half."""

    def __init__(self) -> None:
        self.longer, self.pairs = 0.0, 0

    def add(self, pair: Pair) -> None:
        """Count a pair."""
        self.pairs += 1
        self.longer += (longer(pair) > 0) + 0.5 * (longer(pair) == 0)

    @property
    def share(self) -> float | None:
        return _share(self.longer, self.pairs)


def _share(part: float, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _percent(share: float | None) -> str:
    return "none" if share is None else percent(share)


ABOUT = """{answers} answers to each prompt of {source}, sampled at temperature {temperature} and
top_p {top_p} with seed {seed}. The critic was asked in both orders which of two answers is
better{reference}; the two probabilities were averaged. In a pair that mean is at least 0.5 + {margin} for the
chosen answer{balance}. Pairs of a prompt by the rule `{pair_rule}`."""


def write_build(
    folder: Path,
    config: SelfCritiqueConfig,
    settings: Mapping,
    identities: Mapping[str, str],
    summary: Summary,
    tables: Mapping[str, Export],
    run: Mapping,
) -> str:
    """Write BUILD.json and README.md; a sentence. A build without a pair is an InputError that says why."""
    build = {
        "facts": summary.facts(),
        "figures": summary.figures(),
        "rows": {"pairs": summary.pairs, "candidates": summary.answers},
        "dropped": summary.dropped(),
        "run": run,
        "settings": settings,
        "identity": identities,
        "versions": versions(),
    }
    write_about(folder, build, card(config, summary, tables))
    said = "; ".join(f"{name}: {fact}" for name, fact in summary.facts().items())
    if not summary.pairs:
        raise InputError(
            f"{folder}: there is no pair ({said}). See `candidates` for each answer's comparisons; raise "
            "--temperature or --max_new_tokens, lower --margin, or name another critic"
        )
    calls = ", ".join(f"{count} {name}" for name, count in run["calls"].items())
    return f"{folder}: {said}; model calls of this run: {calls}"


def card(config: SelfCritiqueConfig, summary: Summary, tables: Mapping[str, Export]) -> Card:
    """The README.md of a dataset: figures, what the critic was asked, and where its tables are."""
    critic, _, critic_adapter = config.critic
    model, critic = public_name(config.model_name_or_path), public_name(critic)
    models = {
        "answered": model,
        "with the LoRA": config.adapter,
        "compared the answers": critic,
        "with its LoRA": critic_adapter,
    }
    return Card(
        title=f"Answers of {model}, compared by {critic}",
        about=ABOUT.format(
            source=plain(f"{public_name(str(config.dataset_name))} ({config.dataset_split})"),
            reference=", beside the table's own answer" if config.with_reference else "",
            balance="; the chosen answer is the longer one in half of them" if config.balance_length else "",
            **{
                name: getattr(config, name)
                for name in ("answers", "temperature", "top_p", "seed", "margin", "pair_rule")
            },
        ),
        facts=summary.facts(),
        models={name: public_name(model) for name, model in models.items() if model},
        tables={name: export.about for name, export in tables.items()},
        rows={"pairs": {"train": summary.pairs}, "candidates": {"train": summary.answers}},
        tasks=["visual-question-answering", "image-text-to-text"],
        license=config.license,
        tags=["synthetic"],
        questions={"What the critic was asked": critic_question(config)},
    )
