"""What a comparison of answers leaves to read: table.md, report.html, and a table in the terminal."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from prefopt.evaluation import figures, words
from prefopt.evaluation.answer_scorers import PREFERENCE
from prefopt.evaluation.asked import Questions
from prefopt.evaluation.charts import win_charts
from prefopt.evaluation.report import embedded, page_templates
from prefopt.evaluation.summary import gaps_to_first, headlines
from prefopt.files import reporting_write_errors, write_atomically

IMAGES = 4  # at most, of a question


def write_reports(
    output_dir: str | Path, summary: Mapping, questions: Questions, *, shown: int = 24, title: str = ""
) -> Path:
    """Write table.md and report.html beside summary.json and results.jsonl; return the page's path.

    `shown` bounds the questions that are shown with their images and answers: one half those at which the
    systems differ most, the other a random sample.
    """
    folder = Path(output_dir)
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    headline = headlines(summary)
    page = (
        page_templates(Path(__file__).parent)
        .get_template("answers.html.jinja")
        .render(
            title=title or _title(*summary["systems"]),
            summary=summary,
            headline=headline,
            titles={metric: told["title"] for metric, told in headline.items()},
            shown_metrics=summary["metrics"],
            gaps=gaps_to_first(summary),
            of=witnesses(summary),
            look_at="answers",
            figures=_figures(summary),
            galleries=_galleries(summary, rows, questions, shown),
            warnings_of=warnings_of(summary),
            preferences=_preferences(summary),
            said=lambda metric, score: _said(score, metric, headline[metric]["kind"]),
            words=words,
        )
    )
    with reporting_write_errors(folder):
        write_atomically(folder / "table.md", markdown(summary))
        write_atomically(folder / "report.html", page)
    return folder / "report.html"


def _title(first: str, *others: str) -> str:
    named = " and ".join(others) if len(others) < 3 else f"{len(others)} models"
    return f"{named} against {first}"


def witnesses(summary: Mapping) -> str:
    """What is resampled and counted: rows, or images where rows share them."""
    return "rows" if summary["groups"] == summary["rows"] else "images"


# Tables


def figures_of(summary: Mapping) -> list[list[str]]:
    """The figures of each metric, a column for each system; the first row is the header."""
    rows = [["", *summary["systems"]]]
    for metric, told in summary["metrics"].items():
        cells = [
            words.value(system["means"][metric], told["kind"]) if metric in system["means"] else ""
            for system in summary["systems"].values()
        ]
        rows.append([told["title"], *cells])
    rows.append(["words of an answer", *(f"{s['words']:.1f}" for s in summary["systems"].values())])
    return rows


def pairs_of(summary: Mapping) -> list[list[str]]:
    """Every two systems by every headline metric; the first row is the header."""
    of = witnesses(summary)
    rows = [["", "against", "metric", "difference", "95 % interval", "p (Holm)", "win / tie / loss"]]
    rows[0] += [f"{of} for 80 % power", ""]
    for contrast in [*summary["contrasts"], *summary["further"]]:
        for metric, told in headlines(summary).items():
            if metric not in contrast["metrics"]:
                continue
            entry, kind = contrast["metrics"][metric], told["kind"]
            gap, wins = entry["difference"], entry["wins"]
            needed = entry["groups_for_power"]
            rows.append(
                [
                    contrast["system"],
                    contrast["against"],
                    told["title"],
                    words.change(gap["mean"], kind),
                    f"{words.bare(gap['low'], kind)} to {words.bare(gap['high'], kind)}",
                    words.p_holm(entry),
                    f"{wins['wins']} / {wins['ties']} / {wins['losses']}",
                    "" if needed is None else f"{needed:,}",
                    words.verdict(entry, gap["groups"], of).partition(":")[0].rstrip("."),
                ]
            )
    return rows


def markdown(summary: Mapping) -> str:
    """table.md: the figures, and every two systems compared."""
    count = f"{summary['rows']} questions"
    if witnesses(summary) == "images":
        count += f" about {summary['groups']} images"
    return "\n\n".join(
        [
            f"{count}, greedy answers of at most {summary['settings']['max_new_tokens']} tokens. The loss is "
            "in nats a token; BLEU, ROUGE-L and critic scores lie in 0 to 100.",
            *(_cell(warning) for warning in warnings_of(summary)),
            _table(figures_of(summary)),
            f"Intervals resample {witnesses(summary)}. p is corrected for the number of pairs (Holm).",
            _table(pairs_of(summary)) + "\n",
        ]
    )


def terminal_table(summary: Mapping) -> Table:
    """The figures, a column for each system."""
    header, *rows = figures_of(summary)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(text: str) -> str:
    """A text that Markdown shows as it is."""
    escaped = "".join(f"\\{sign}" if sign in "\\|`*_<>[]" else sign for sign in text)
    return " ".join(escaped.split())


# The page


def warnings_of(summary: Mapping) -> list[str]:
    """What is wrong with some of the answers or of the scores."""
    cut = {name: system["unfinished"] for name, system in summary["systems"].items() if system["unfinished"]}
    warning = (
        f"Some answers were cut off after {summary['settings']['max_new_tokens']} tokens: "
        f"{', '.join(f'{name} {count}' for name, count in cut.items())} of {summary['rows']}. Raise "
        "--max_new_tokens."
    )
    return [*filter(None, [words.unread_warning(summary)]), *([warning] if cut else [])]


def _preferences(summary: Mapping) -> list[str]:
    """How consistent the critic's preferences are, and whether the longer answer wins."""
    return [
        f"{name}: both orders agree on {words.percent(system['consistent'])} of the pairs"
        + (
            f"; the preferred answer is the longer one in {words.percent(system['preferred_longer'])} of the "
            "decided ones."
            if "preferred_longer" in system
            else "."
        )
        for name, system in summary["systems"].items()
        if "consistent" in system
    ]


def _figures(summary: Mapping) -> list[figures.Chart]:
    first = next(iter(summary["systems"]))
    charts = []
    for metric, told in headlines(summary).items():
        having = [contrast for contrast in summary["contrasts"] if metric in contrast["metrics"]]
        mean = summary["systems"][first]["means"].get(metric)
        if having and mean is not None:
            charts.append(figures.mean_bars(first, mean, having, metric, told["title"], told["kind"]))
    return charts + win_charts(summary["contrasts"], headlines(summary))


def _galleries(summary: Mapping, rows: Sequence[Mapping], questions: Questions, shown: int) -> list[dict]:
    """Sections of questions with their answers: the widest differences, and a random sample."""
    columns: dict[int, dict[str, Mapping]] = {}
    for row in rows:
        columns.setdefault(row["row"], {})[row["system"]] = row
    answers = [metric for metric in headlines(summary) if metric not in ("loss", PREFERENCE)]
    metric = "critic" if "critic" in answers else answers[-1]
    spreads = {place: _spread(of_row, metric) for place, of_row in columns.items()}
    widest = sorted((place for place in spreads if spreads[place] > 0), key=lambda p: (-spreads[p], p))
    widest = widest[: max(1, shown // 2)]
    rest = [place for place in columns if place not in widest]
    picked = random.Random(0).sample(rest, min(max(0, shown - len(widest)), len(rest)))
    measure = f"By the difference in {summary['metrics'][metric]['title']}, the widest first."
    sections = [("Widest differences", widest, measure), ("A random sample of the rest", picked, "")]
    return [
        {
            "title": title,
            "measure": measure,
            "rows": [_gallery_row(columns[place], questions, place) for place in places],
        }
        for title, places, measure in sections
        if places
    ]


def _gallery_row(columns: Mapping[str, Mapping], questions: Questions, place: int) -> dict:
    one = questions.asked[place]
    images = [embedded(image) for image in questions.images(one)[:IMAGES]]
    return {"question": one.question, "reference": one.reference, "images": images, "answers": columns}


def _said(score: float | bool | None, metric: str, kind: str) -> str:
    """A score of one answer."""
    if score is None or kind != "proportion":
        return words.value(score, kind)
    if metric == PREFERENCE:
        return {1.0: "wins", 0.5: "ties", 0.0: "loses"}[score]
    return "yes" if score else "no"


def _spread(columns: Mapping[str, Mapping], metric: str) -> float:
    """How far the systems' scores of a question lie apart."""
    read = [float(row["scores"][metric]) for row in columns.values() if row["scores"][metric] is not None]
    return float(np.ptp(read)) if read else 0.0
