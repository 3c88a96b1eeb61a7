"""What the report of a comparison shows beside means: runs, every two systems, curves, pictures, a table."""

import csv
import html
import io
import json
import re

import numpy as np
import pandas
import pytest
from browser import after
from comparisons import METRICS, system, write_comparison
from rich.console import Console

from prefopt.errors import InputError
from prefopt.evaluation import charts, figures
from prefopt.evaluation.prompt_table import prompt_table
from prefopt.evaluation.report import notes, terminal_table, write_report
from prefopt.evaluation.training_runs import settings_table, training_runs

PROMPTS = [f"prompt {i}" for i in range(5)]
LEVELS = {"base": 1.0, "sft": 2.0, "dpo": 5.0}


def scores(name, i):
    level = LEVELS[name.split()[0].rstrip(",")]
    return {"clip": level + i / 10, "truth": level > 1.5 or i == 0, "error": None if i == 4 else 1 / level}


def run_folder(folder, *lines, **options):
    """The folder of a training run."""
    folder.mkdir(parents=True)
    given = {"dataset_name": "my/pairs", "model_name_or_path": "pocket", "learning_rate": 1e-4} | options
    config = {"arithmetic": "12 examples; 4 a step", "about": {"beta": "2500, times"}, "options": given}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def quartiles(step):
    return {f"error/{side}/q{i}": step / 100 for side in ("chosen", "rejected") for i in (1, 2, 3, 4)}


# Training runs


def test_the_runs_of_systems_are_shown_unasked_and_one_without_losses_says_so(tmp_path):
    logged = [{"step": step, "loss": 0.7, **quartiles(step)} for step in (1, 2, 3)]
    dpo = run_folder(tmp_path / "runs" / "dpo-7", *logged, loss_type="dpo", beta_dpo=5000, use_peft=False)
    (dpo / "checkpoint-3").mkdir()
    sft = run_folder(tmp_path / "runs" / "sft-1", {"step": 2, "train_runtime": 1.0}, learning_rate=3e-5)
    entries = [
        system("base"),
        system("sft", adapter=str(sft)),
        system("dpo", adapter=str(dpo / "checkpoint-3")),
    ]
    write_comparison(tmp_path, entries, PROMPTS, scores)
    page = write_report(tmp_path, runs=[dpo]).read_text()
    assert "sft logged no losses" in page and "dpo logged no losses" not in page
    settings = page[page.index("<summary>Training settings") :]
    cells = re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td><td>(.*?)</td>', settings)
    table = {title: (first, second) for title, first, second in cells}
    assert table["learning rate"] == ("3e-05", "0.0001") and table["loss"] == ("", "dpo")
    assert table["dataset"] == ("my/pairs", "my/pairs") and table["beta_dpo"] == ("", "5000")
    assert table["beta"] == ("2500, times",) * 2
    assert table["examples and steps"] == ("12 examples; 4 a step",) * 2
    assert "Training: error of winner (line) and loser (dashed) by quarter of the noise schedule" in page
    assert page.count("least noise (q1)") == 1 and page.count("most noise (q4)") == 1


def test_a_run_s_folder_is_found_and_a_model_s_config_is_none(tmp_path):
    dpo = run_folder(tmp_path / "dpo", {"step": 1, "loss": 0.5})
    (dpo / "weights.safetensors").write_bytes(b"")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    systems = {"base": "pocket", "net": str(tmp_path / "unet"), "dpo": str(dpo / "weights.safetensors")}
    [run] = training_runs(systems, [dpo])
    assert (run.name, run.folder, run.has_losses) == ("dpo", dpo, True)
    other = run_folder(tmp_path / "elsewhere" / "dpo", {"step": 1, "loss": 0.5})
    (other / "config.json").unlink()
    runs = training_runs(systems, [other])
    assert [run.name for run in runs] == ["dpo", str(other)]
    assert settings_table(runs)["seed" if "seed" in run.settings else "model"] == ["pocket", ""]
    with pytest.raises(InputError, match=r"unet is no training run: it holds no metrics\.jsonl"):
        training_runs({}, [tmp_path / "unet"])
    (dpo / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        training_runs(systems)


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        ({"lora_r": 16, "lora_alpha": 32}, "rank 16, alpha 32"),
        ({"lora_r": None, "lora_alpha": None, "adapter_name_or_path": "runs/sft/"}, "from sft"),
        ({"lora_r": None, "lora_alpha": 8, "adapter_name_or_path": "my/lora"}, "from lora, alpha 8"),
    ],
)
def test_the_settings_say_what_the_lora_is(tmp_path, options, lora):
    [run] = training_runs({}, [run_folder(tmp_path / "dpo", use_peft=True, **options)])
    assert run.settings["LoRA"] == lora


def test_each_quartile_has_a_panel_of_its_own_curves(monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "_svg", lambda figure, name, title: drawn.setdefault(name, figure))
    lines = [{"step": step, "loss": 0.5, **quartiles(step)} for step in (1, 2)]
    lines[1]["error/chosen/q3"] = 0.9
    figures.training_curves({"dpo": lines})
    panels = drawn["training-error-quartiles"].axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "least noise (q1)",
        "q2",
        "q3",
        "most noise (q4)",
    ]
    chosen, rejected = (line.get_ydata() for line in panels[2].lines)
    assert list(chosen) == [0.01, 0.9] and list(rejected) == [0.01, 0.02]


def test_held_out_curves_are_dashed_and_named(monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "_svg", lambda figure, name, title: drawn.setdefault(name, figure))
    dpo = [{"step": step, "loss": 1 / step, "rewards/accuracies": 0.6} for step in (1, 2, 3)]
    dpo += [{"step": 2, "eval_loss": 3.3, "eval_rewards/accuracies": 0.5}, {"step": 3, "eval_loss": 12.0}]
    sft = [{"step": step, "loss": 0.5} for step in (1, 2)]
    figures.training_curves({"dpo": dpo, "sft": sft})
    training, held_out, other = drawn["training-loss"].axes[0].lines
    assert list(training.get_ydata()) == [1, 1 / 2, 1 / 3] and training.get_linestyle() == "-"
    assert held_out.get_xydata().tolist() == [[2, 3.3], [3, 12.0]] and held_out.get_linestyle() == "--"
    assert training.get_color() == held_out.get_color() != other.get_color()
    [legend] = drawn["training-loss"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["dpo", "sft", "held out"]
    point = drawn["training-rewards/accuracies"].axes[0].lines[1]
    assert list(point.get_ydata()) == [0.5] and point.get_marker() == ".", "one point is seen, too"

    drawn.clear()
    figures.training_curves({"dpo": dpo})
    assert [text.get_text() for text in drawn["training-loss"].legends[0].get_texts()] == ["held out"]
    drawn.clear()
    figures.training_curves({"sft": sft})
    assert not drawn["training-loss"].legends


# Every two systems, and sweeps


@pytest.mark.parametrize("number", [19, 20])
def test_page_and_terminal_say_first_that_prompts_are_too_few(tmp_path, number):
    few = [f"prompt {i}" for i in range(number)]
    summary = write_comparison(tmp_path, [system("base"), system("dpo")], few, scores)
    page = write_report(tmp_path).read_text()
    terminal = Console(width=160, record=True, file=io.StringIO())
    terminal.print(terminal_table(summary))
    told, caveat = (
        terminal.export_text(),
        "Too few to claim: 19 prompts, and under 20 an interval is narrower",
    )
    if number == 19:
        assert f'<main>\n<p class="warning">{caveat}' in page
        assert told.strip().startswith(caveat) and told.count("Too few") == 1
    else:
        assert '<p class="warning">Too few' not in page and "Too few" not in told


def test_every_other_two_systems_are_compared_directly(tmp_path):
    summary = write_comparison(tmp_path, [system("base"), system("sft"), system("dpo")], PROMPTS, scores)
    [further] = summary["further"]
    assert (further["system"], further["against"]) == ("dpo", "sft")
    assert further["metrics"]["clip"]["difference"]["mean"] == pytest.approx(3.0)
    page = write_report(tmp_path).read_text()
    table = page[page.index("Every other two systems") :]
    assert '<th scope="row">dpo against sft</th>' in table and "<td>+3.00<span" in table
    assert any(line.startswith("dpo against sft: CLIP score 2.20") for line in notes(summary))


def swept(tmp_path, scales=(0.5, 1.0), guidances=(3.0,)):
    entries = [
        system(f"base, guidance {g:g}" if len(guidances) > 1 else "base", "base", guidance=g)
        for g in guidances
    ]
    for family in ("sft", "dpo"):
        for g in guidances:
            for s in scales:
                name = f"{family} at {s:g}" + (f", guidance {g:g}" if len(guidances) > 1 else "")
                entries.append(system(name, family, scale=s, guidance=g))
    return write_comparison(tmp_path, entries, PROMPTS, scores)


def test_adapters_over_their_scales_share_a_chart(tmp_path):
    summary = swept(tmp_path)
    assert summary["further"] == []
    [(title, curves)] = charts._scale_panels(summary, "clip").items()
    assert title == "" and [curve.system for curve in curves] == ["base", "sft", "dpo"]
    assert [curve.is_base for curve in curves] == [True, False, False]
    assert [point[:2] for point in curves[2].points] == [(0.5, pytest.approx(5.2)), (1.0, pytest.approx(5.2))]
    assert [point[1] for point in curves[0].points] == [pytest.approx(1.2)] * 2, "one level at all scales"
    _, mean, low, high = charts._scale_panels(summary, "truth")[""][1].points[0]
    entry = summary["contrasts"][0]["metrics"]["truth"]
    assert mean == 1.0 and low == pytest.approx(0.2 + entry["difference"]["low"])
    assert high == pytest.approx(0.2 + entry["difference"]["high"]) and low < high
    titles = [chart.title for chart in charts.charts_of(summary, {})]
    assert titles.count("CLIP score against LoRA scale") == 1 and "CLIP score against guidance" not in titles


def test_scales_have_a_panel_for_each_guidance(tmp_path):
    summary = swept(tmp_path, guidances=(2.0, 6.0))
    panels = charts._scale_panels(summary, "clip")
    assert list(panels) == ["guidance 2", "guidance 6"]
    assert [curve.system for curve in panels["guidance 6"]] == ["base", "sft", "dpo"]
    [curves] = charts._guidance_panels(summary, "clip").values()
    names = ["base", "sft at 0.5", "sft at 1", "dpo at 0.5", "dpo at 1"]
    assert [curve.system for curve in curves] == names and curves[0].is_base
    page = write_report(tmp_path).read_text()
    assert page.count("CLIP score against LoRA scale</figcaption>") == 1


# Pictures


def test_the_name_of_an_option_is_not_broken_into_lines(tmp_path):
    write_comparison(tmp_path, [system("base"), system("dpo")], PROMPTS[:2], scores)
    write_report(tmp_path)
    page = (tmp_path / "blind.html").read_text()
    assert "<code>--votes</code>" in page and ".nowrap, code { white-space: nowrap; }" in page


OPEN = """
const log = [], dialog = document.querySelector("dialog"), image = dialog.querySelector("img");
const buttons = [...document.querySelectorAll("button.picture")];
const tell = () => log.push([dialog.open, image.alt, dialog.querySelector(".about").innerText]);
buttons[1].focus();
buttons[1].click();
tell();
dialog.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
tell();
dialog.querySelector("[data-step='-1']").click();
dialog.querySelector("[data-step='-1']").click();
tell();
setTimeout(() => {
  log.push(image.naturalWidth, new URL(image.src).pathname.split("/").slice(-2).join("/"));
  dialog.querySelector("[data-close]").click();
  log.push(dialog.open, buttons.indexOf(document.activeElement));
  const pre = Object.assign(document.createElement("pre"), {id: "log", textContent: JSON.stringify(log)});
  document.body.append(pre);
}, 1000);
"""


def test_pictures_enlarge_with_what_is_known_of_them(tmp_path):
    write_comparison(tmp_path, [system("base"), system("dpo")], PROMPTS[:2], scores)
    dom = after(write_report(tmp_path), OPEN)
    found = re.search(r'<pre id="log">(.*?)</pre>', dom)
    assert found, dom[-3000:]
    first, second, back, width, file, is_open, focused = json.loads(html.unescape(found[1]))
    assert first[:2] == [True, "dpo: prompt 0"] and second[:2] == [True, "base: prompt 0"]
    about = " ".join(first[2].split())
    assert re.fullmatch(r"prompt 0 seed \d, \+4\.00 dpo CLIP score 5\.00 error 0\.200 ✓ truth", about), about
    assert back[1] == "base: prompt 0" and back[2] != second[2], "two pictures before the second one"
    assert width == 16 and re.fullmatch(r"images/0-0-\d\.webp", file), "the file itself"
    assert not is_open and focused == 0


# prompts.csv


def test_the_table_has_a_row_of_each_prompt_and_system(tmp_path):
    prompts = ['=1+1, "quoted"', "-5 lions\nin two lines", "@a", "+b", "snow, grün"]
    write_comparison(
        tmp_path,
        [system("base"), system("=dpo")],
        prompts,
        lambda name, i: {"clip": -0.5 * i, "truth": i > 2, "error": None if i == 4 else 0.25},
    )
    write_report(tmp_path)
    assert 'href="prompts.csv"' in (tmp_path / "report.html").read_text()
    with (tmp_path / "prompts.csv").open(encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["prompt", "system", "images", *METRICS] and len(rows) == 10
    assert rows[0] == ['\'=1+1, "quoted"', "base", "3", "0.0", "0.0", "0.25"]
    assert rows[1][:2] == ["'-5 lions\nin two lines", "base"] and rows[1][3] == "-0.5"
    assert [row[0] for row in rows[2:5]] == ["'@a", "'+b", "snow, grün"]
    assert rows[4][5] == "" and rows[5][1] == "'=dpo"
    assert (tmp_path / "prompts.csv").read_bytes().startswith(b"\xef\xbb\xbfprompt,system,images,clip")
    frame = pandas.read_csv(tmp_path / "prompts.csv")
    assert list(frame.columns) == header and frame["clip"].tolist() == [0.0, -0.5, -1.0, -1.5, -2.0] * 2
    assert np.isnan(frame["error"][4])


def test_a_mean_leaves_out_what_could_not_be_read():
    rows = [{"prompt": "a", "system": "base", "scores": {"critic": score}} for score in (80.0, None, 70.0)]
    assert prompt_table(rows, ["critic"]).splitlines()[1] == "a,base,3,75.0"
