"""From scored answers to every pair of models, table.md and a page."""

import re

import numpy as np
import pytest
from tiny_vlm import PEFT_ON_TRANSFORMERS_5
from vlm_answers import questions_of

from prefopt.evaluation.answer_report import markdown, write_reports

pytestmark = pytest.mark.filterwarnings(PEFT_ON_TRANSFORMERS_5)

# Statistics


def test_every_pair_is_compared_over_images_with_the_loss_by_tokens(compared_vlms) -> None:
    """The loss's interval by a bootstrap of our own: images resampled, sums of -log p over sums of tokens."""
    _, summary, rows = compared_vlms
    pairs = [(pair["system"], pair["against"]) for pair in [*summary["contrasts"], *summary["further"]]]
    assert pairs == [("lora0", "base"), ("lora1", "base"), ("lora1", "lora0")]
    assert summary["rows"] == 24 and summary["groups"] == 12
    images, places = np.arange(12), np.arange(24).reshape(12, 2)
    resampled = places[np.random.default_rng(1).choice(images, (4000, 12))].reshape(4000, -1)
    of = {name: [row for row in rows if row["system"] == name] for name in ("base", "lora0", "lora1")}
    nats = {name: -np.array([row["log_p"] for row in found]) for name, found in of.items()}
    tokens = np.array([row["reference_tokens"] for row in of["base"]])
    for pair in [*summary["contrasts"], *summary["further"]]:
        gap = nats[pair["system"]] - nats[pair["against"]]
        entry = pair["metrics"]["loss"]
        assert entry["difference"]["mean"] == pytest.approx(gap.sum() / tokens.sum())
        low, high = np.quantile(gap[resampled].sum(1) / tokens[resampled].sum(1), [0.025, 0.975])
        width = high - low
        assert entry["difference"]["low"] == pytest.approx(low, abs=0.05 * width)
        assert entry["difference"]["high"] == pytest.approx(high, abs=0.05 * width)
        assert entry["better"] == -1 and entry["difference"]["groups"] == 12


def test_p_is_corrected_for_the_number_of_pairs(compared_vlms) -> None:
    """Holm by hand over the three pairs, for each metric by itself."""
    _, summary, _ = compared_vlms
    for metric in ("loss", "rouge_l"):
        entries = [pair["metrics"][metric] for pair in [*summary["contrasts"], *summary["further"]]]
        p = sorted(entry["p"] for entry in entries)
        steps = [min(1, p[0] * 3), min(1, p[1] * 2), min(1, p[2])]
        expected = np.maximum.accumulate(steps)
        assert sorted(entry["p_holm"] for entry in entries) == pytest.approx(expected)


# The report


def test_the_report_is_one_page_that_escapes_what_it_shows(vlms, words, compared_vlms) -> None:
    folder, summary, rows = compared_vlms
    questions = questions_of(vlms)
    page = write_reports(folder, summary, questions, shown=6).read_text()
    assert page.count("<script") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert page.count('<img src="data:image/webp') == 6
    first, second = (page.index(f"<h2>lora{i} against base") for i in range(2))
    assert (
        page.index("<h2>All figures") < first < second < page.index("<svg") < page.index("Widest differences")
    )
    assert page.count("<svg") == 5 + 6, "bars of five metrics, wins by these and the preference"
    assert "Too few to claim: 12 images" in page and "could not be read: critic score (base" in page
    spread = {}
    for row in rows:
        spread.setdefault(row["row"], []).append(row["scores"]["critic"])
    widths = {n: np.nanmax(v) - np.nanmin(v) for n, v in ((n, np.array(v, float)) for n, v in spread.items())}
    widest = max(widths, key=lambda n: (widths[n], -n))
    shown = page[page.index("Widest differences") :]
    assert shown.index(f"number {widest}?") < shown.index("A random sample")
    assert write_reports(folder, summary, questions, shown=6).read_text() == page


def test_table_md_has_a_column_for_each_system(compared_vlms) -> None:
    _, summary, _ = compared_vlms
    text = markdown(summary)
    header = next(line for line in text.splitlines() if line.startswith("|"))
    assert header == "|  | base | lora0 | lora1 |"
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if "|" in line}
    figures = [float(cell) for cell in cells["test loss"]]
    assert figures == pytest.approx([s["means"]["loss"] for s in summary["systems"].values()], abs=5e-4)
    assert [row for row in ("BLEU", "ROUGE-L", "critic score", "rubric points") if row not in cells] == []
    assert f"{summary['systems']['lora1']['means']['critic']:.2f}" in cells["critic score"][2]
    assert all(line.count(" | ") in (3, 8) for line in text.splitlines() if line.startswith("| "))
    hostile = {**summary, "systems": {"a|b <i>*": summary["systems"]["base"]}, "contrasts": [], "further": []}
    assert "| a\\|b \\<i\\>\\* |" in markdown(hostile)
