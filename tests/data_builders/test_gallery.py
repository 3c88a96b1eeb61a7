"""The gallery: the questions and their answers, every candidate in its place, no prompt run as HTML."""

import base64
import hashlib
import io
import math
import re
import weakref
from html.parser import HTMLParser

import pyarrow as pa
import pytest
from browser import after
from PIL import Image

from data_builders.engine.stages import Group, by_prompt
from data_builders.engine.tables import CANDIDATES, features
from data_builders.export.gallery import write_gallery
from data_builders.export.pages import ABSENT, number
from data_builders.images.selection import PairOptions, pairs, ranked
from prefopt.errors import InputError
from prefopt.evaluation.words import MINUS
from prefopt.files import content_key
from prefopt.judges.rubric import Item, Rubric
from prefopt.pocket.world import Scene, caption, held_out_scenes, render

RUBRIC = Rubric.load("class_conditional")
QUESTIONS = [item.name for item in RUBRIC.items]
NEGATIVE = {item.name for item in RUBRIC.items if item.sign < 0}
SELECTION = "of the best hard scores, the image that the detector is surest of"


def stored(image):
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True)
    return {"bytes": buffer.getvalue(), "path": None}


def candidate(scene, place, answers="", *, rank=None, selected=False, reason="", boxes=(), **changes):
    """A candidate as a build decides on it; `answers` has y, n or u for each question, or is empty."""
    verdicts = [{"y": "yes", "n": "no", "u": ""}[letter] for letter in answers]
    points = [
        0.0 if v == "" else (1.0 if (v == "yes") != (name in NEGATIVE) else -1.0)
        for name, v in zip(QUESTIONS, verdicts, strict=False)
    ]
    prompt = caption(scene, 0)
    judged = {
        "questions": QUESTIONS[: len(answers)],
        "verdicts": verdicts,
        "log_odds": [{"yes": 2.31, "no": -1.7, "": 0.02}[v] + place / 10 for v in verdicts],
        "empty_log_odds": [0.4] * len(answers),
        "other_mass": [0.012 if v else 0.9 for v in verdicts],
        "points": points,
        "hard_score": sum(points),
        "soft_score": 0.7 * sum(points),
        "judge_score": 0.7 * sum(points),
    }
    generated = {"seed": int(content_key(f"{prompt} {place}")[:8], 16), "candidate": place, "model": "pocket"}
    generated |= {"detector": "pocket"}
    generated |= {"num_inference_steps": 20, "guidance_scale": 3.0, "adapter": None, "adapter_scale": 1.0}
    judged = judged if answers else {"questions": QUESTIONS}
    invalid = bool(reason) and not answers
    decided = {"rank": rank, "selected": selected}
    decided |= {"invalid_reason": reason if invalid else "", "not_selected_reason": "" if invalid else reason}
    decided |= {"boxes": list(boxes), "confidence": max((b["confidence"] for b in boxes), default=0.0)}
    generated |= {
        "image": stored(render(scene, place)),
        "pixels_sha256": content_key(f"{prompt} {place}"),
        "prompt": prompt,
        "prompt_id": content_key(prompt),
        "class": scene.animal,
    }
    return generated | judged | decided | changes


def box(label, confidence, *sides):
    return {"label": label, "confidence": confidence} | dict(
        zip(("left", "top", "right", "bottom"), sides, strict=True)
    )


def three_prompts():
    """Two classes; a black image, a tie, an image without pixels, a prompt of which nothing was taken."""
    lions, zebra = Scene("lion", "red", 2, "savanna"), Scene("zebra", "blue", 1, "snow")
    elephant = Scene("lion", "green", 3, "lake")
    first, second = box("lion", 0.91, 4, 20, 33, 58), box("lion", 0.64, 36, 18, 63, 57)
    black = stored(Image.new("RGB", (64, 64)))
    return [
        [
            candidate(lions, 0, reason="black", image=black),
            candidate(lions, 1, "ynyyynyyny", rank=2, reason="detected less surely", boxes=[first]),
            candidate(lions, 2, "yynnnnnnyn", rank=3, reason="a lower score"),
            candidate(lions, 3, "ynyyynyyny", rank=1, selected=True, boxes=[first, second]),
        ],
        [
            candidate(zebra, 0, "ynyyunyynn", rank=2, reason="a lower score"),
            candidate(zebra, 1, "ynyyynyyny", rank=1, reason="no detection"),
            candidate(zebra, 2, "ynyyunyynn", rank=2, reason="a lower score"),
            candidate(zebra, 3, reason="not finite", image=None),
        ],
        [
            candidate(
                elephant,
                k,
                "ynyyynyuny"[: 10 - k] + "u" * k,
                rank=k + 1,
                selected=k == 0,
                reason="a lower score" if k else "",
                boxes=[box("lion", 0.8 - k / 10, 10 * k, 5, 10 * k + 30, 70)],
            )
            for k in range(4)
        ],
    ]


class Element:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.children, self.words = tag, attributes, [], []

    @property
    def text(self):
        parts = [part if isinstance(part, str) else part.text for part in self.words]
        return re.sub(r"\s+", " ", "".join(parts)).strip()

    def all(self, name):
        """Descendants of this class, or of this tag."""
        for child in self.children:
            if name == child.tag or name in child.attributes.get("class", "").split():
                yield child
            yield from child.all(name)


def lines(candidate):
    """What stands under an image, line by line; the last one holds all answers."""
    return [line.text for line in next(candidate.all("figcaption")).children]


class Tree(HTMLParser):
    """A page as elements, as strict as a reader could wish: whatever is opened must be closed."""

    def __init__(self, page):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(page)
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        self.open[-1].words.append(element)
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].words.append(data)


def grouped(rows, rule="best_worst"):
    """One prompt's candidates with their pairs."""
    rows = [{"soft_score": None} | row for row in rows]
    return Group(rows, ranked(rows), pairs(rows, PairOptions(rule)))


def written(folder, prompts, rubric=RUBRIC, rule="best_worst", **options):
    options = {"facts": {"judge": "pocket"}, "selection": SELECTION} | options
    groups = (grouped(rows, rule) for rows in prompts)
    page = write_gallery(folder, groups, rubric, **options).read_text()
    return page, Tree(page).root


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return written(tmp_path_factory.mktemp("gallery"), three_prompts())


def test_records_read_back_from_a_build_give_the_same_page(gallery, tmp_path):
    page, _ = gallery
    rows = [row for group in three_prompts() for row in group]
    table = pa.Table.from_pylist(rows, schema=features(CANDIDATES).arrow_schema)
    assert written(tmp_path, by_prompt(table.to_pylist()))[0] == page
    assert table.num_rows == 12 and set(rows[1]) <= set(CANDIDATES)


def test_candidates_stand_in_rank_order_with_their_scores_and_reasons(gallery):
    _, root = gallery
    prompts = list(root.all("prompt"))
    assert [next(p.all("h2")).text for p in prompts] == [
        "two red lions on the savanna lion, 1 pair, margin 11.20",
        "one blue zebra in the snow zebra, 1 pair, margin 2.10, none selected",
        "three green lions by the lake lion, 1 pair, margin 1.40",
    ]
    shown = [[lines(c) for c in p.all("candidate")] for p in prompts]
    alts = [next(c.all("img")).attributes["alt"] for c in prompts[0].all("candidate")]
    assert alts == [f"Image {k}: two red lions on the savanna" for k in (3, 1, 2, 0)]
    best, less_sure, lower, black = shown[0]
    assert best[:-1] == [
        *("rank 1 of 3 · image 3", "✓ selected", "▲ chosen over image 2, margin 11.20"),
        *("hard score +10, soft score +7.00", "confidence 0.91"),
    ]
    assert less_sure[:-1] == [
        *("rank 2 of 3 · image 1", "hard score +10, soft score +7.00", "confidence 0.91"),
        "Not selected: the detector is surer of the class on another image with the same hard score.",
    ]
    assert lower[:-1] == [
        *("rank 3 of 3 · image 2", "▼ rejected for image 3, margin 11.20"),
        *(f"hard score {MINUS}6, soft score {MINUS}4.20", "the detector found no box"),
        "Not selected: another image of the prompt has a higher score.",
    ]
    made = "Generated by pocket, 20 steps, guidance 3, seed 311231590."
    assert black == ["no rank · image 0", "Invalid: the image is black.", f"not judged {made}"]
    zebras = prompts[1].all("candidate")
    assert [
        ("tied" in text, "no image" in c.text) for (text, *_), c in zip(shown[1], zebras, strict=True)
    ] == [
        (False, False),
        (True, False),
        (True, False),
        (False, True),
    ]
    selected = [c for c in root.all("candidate") if "selected" in c.attributes["class"].split()]
    assert len(selected) == 2
    said = " ".join(p.text for p in root.all("p"))
    assert "3 prompts, 12 images, 3 pairs; an image was selected for 2 of the prompts." in said
    seeds = [str(row["seed"]) for group in three_prompts() for row in group]
    assert all(root.text.count(f"seed {seed}") == 1 for seed in seeds)


def soft(row):
    """A candidate's soft points by the rubric's formula, restated; what needs an absent class is 0."""
    clear = zip(RUBRIC.items, row["verdicts"], row["log_odds"], strict=True)
    absent = row["verdicts"][QUESTIONS.index("class_visible")] == "no"
    return {
        item.name: item.sign * math.tanh((d - 0.4) / 2) if v and not (item.needs and absent) else 0.0
        for item, v, d in clear
    }


def test_the_questions_are_there_with_how_they_were_answered(gallery):
    """By hand: of ten judged images, two selected ones, and three pairs."""
    _, root = gallery
    lions, zebra, green = three_prompts()
    made = [(soft(a), soft(b)) for a, b in ((lions[3], lions[2]), (zebra[1], zebra[2]), (green[0], green[3]))]
    gaps = {name: sum(a[name] - b[name] for a, b in made) for name in QUESTIONS}
    part = {name: f"{100 * gap / sum(gaps.values()):.1f} %" for name, gap in gaps.items()}
    assert part["whole_prompt"] == "26.4 %"
    table = next(root.all("questions"))
    heads = [th.text for th in next(table.all("thead")).all("th")]
    assert heads == [
        *("question", "weight", "good answer", "yes, all", "unclear, all", "yes, selected"),
        *("yes, chosen", "yes, rejected", "part of margin"),
    ]
    rows = [[cell.text for cell in row.children] for row in next(table.all("tbody")).all("tr")]
    assert len(rows) == 10 and [len(row) for row in rows] == [9] * 10
    assert rows[9] == [
        "10. whole promptDoes the picture show everything that the description asks for?",
        *("1", "yes", "40.0 %", "30.0 %", "100.0 %", "100.0 %", "0.0 %", part["whole_prompt"]),
    ]
    assert rows[1][1:] == [
        *("1", "no", "10.0 %", "0.0 %", "0.0 %", "0.0 %", "33.3 %"),
        part["odd_pattern"].replace("-", MINUS),
    ]
    assert rows[3][0].endswith("of the {class} normal? (Counts unless the answer to class visible was no.)")
    assert "{class} stands for the class of the prompt" in next(table.all("caption")).text
    words = dict(zip((e.text for e in root.all("dt")), (e.text for e in root.all("dd")), strict=True))
    assert words["selected"] == "Of the best hard scores, the image that the detector is surest of."
    assert {"hard score", "soft score", "margin", "unclear", "log-odds", "confidence"} <= set(words)
    assert "compared with its answer about an empty grey image" in words["soft score"]


def test_the_questions_are_counted_over_all_images_shown_or_not(gallery, tmp_path):
    _, root = gallery
    few = written(tmp_path, three_prompts(), limit=4)[1]
    assert len(list(few.all("candidate"))) == 4
    assert [row.text for row in next(few.all("questions")).all("tr")] == [
        row.text for row in next(root.all("questions")).all("tr")
    ]


def test_a_weight_a_detector_s_check_and_a_single_class_are_in_the_table(tmp_path):
    items = (RUBRIC.items[2], Item("as_many", "positive", check="count", weight=2.5))
    row = candidate(held_out_scenes()[0], 0, "yn", rank=1)
    row |= {"questions": ["class_visible", "as_many"], "class": "zebra"}
    _, root = written(tmp_path, [[row]], Rubric("own", items))
    rows = [[cell.text for cell in tr.children] for tr in next(root.all("questions")).all("tr")][1:]
    assert rows[0][0] == "1. class visibleCan a zebra be seen clearly in this picture?"
    assert rows[1][:3] == [
        "2. as manyDoes the detector find as many of the class as the description asks for?",
        *("2.5", "yes"),
    ]


def test_every_image_says_which_pairs_it_is_in(tmp_path):
    lions = three_prompts()[0]
    page, root = written(tmp_path, [lions], rule="all")
    best, second, worst, _ = root.all("candidate")
    assert "▲ chosen over image 2, margin 11.20" in best.text
    assert "▲ chosen over image 2, margin 11.20" in second.text
    assert "▼ rejected in 2 pairs, margins 11.20" in worst.text
    assert "Rejected for image 3 (margin 11.20), image 1 (margin 11.20)." in worst.text
    assert [c.attributes["data-status"] for c in root.all("candidate")] == [
        "selected chosen",
        "chosen not-selected reason-0",
        "rejected not-selected reason-1",
        "invalid reason-2",
    ]
    assert 'data-widest="11.2"' in page


def test_a_discriminator_s_part_and_a_reward_are_explained(tmp_path):
    scenes = held_out_scenes()
    ranked_twice = {"discriminator": "real-or-not", "discriminator_score": 1.25, "soft_score": -1.5}
    rows = [candidate(scenes[0], 0, "ynyyynyyny", rank=1) | ranked_twice]
    _, root = written(tmp_path, [rows])
    words = dict(zip((e.text for e in root.all("dt")), (e.text for e in root.all("dd")), strict=True))
    assert "a discriminator, real-or-not" in words["soft score"] and "judge's score" in words
    assert (
        f"hard score +10, soft score {MINUS}1.50, judge's score +7.00, discriminator's +1.25"
        in next(root.all("candidate")).text
    )
    reward = candidate(scenes[0], 0, "y", rank=1) | {"questions": ["preferred"], "empty_log_odds": [0.0]}
    _, root = written(tmp_path, [[reward]], Rubric.load("reward"), selection="the best soft score")
    assert "How surely the judge answers yes, as log-odds." in root.text
    assert "hard score" not in root.text and "empty image" not in root.text


def test_every_answer_has_a_mark_in_words_and_a_line_in_the_table(gallery):
    _, root = gallery
    zebra = list(root.all("prompt"))[1]
    tied = list(zebra.all("candidate"))[1]
    marks = list(tied.all("mark"))
    assert [mark.text for mark in marks] == [
        *("1yes", "2no", "3yes", "4yes", "5?", "6no", "7yes", "8yes", "9no", "10no"),
    ]
    senses = [mark.attributes["class"].split()[1] for mark in marks]
    assert senses == ["good"] * 4 + ["neither"] + ["good"] * 4 + ["bad"]
    assert marks[4].attributes["aria-label"] == "natural behaviour: unclear, 0"
    assert marks[9].attributes["aria-label"] == f"whole prompt: no, {MINUS}1"
    rows = [row.text for row in tied.all("tr")]
    asked = "1. realisticDo light, shadow and reflection look real in this picture?"
    assert len(rows) == 11 and rows[1] == f"{asked}yes+1+2.31+0.401.2 %", rows[1]
    assert rows[3].startswith("3. class visibleCan a zebra be seen clearly in this picture?yes+1")
    assert [len(list(row.children)) for row in tied.all("tr")] == [6] * 11
    unjudged = list(zebra.all("candidate"))[3]
    assert not list(unjudged.all("mark")) and not list(unjudged.all("table"))
    assert "Invalid: the model generated values that are not finite numbers." in unjudged.text


def test_boxes_are_in_percent_of_the_image_and_end_at_its_edge(gallery):
    _, root = gallery
    lions, _, cut = root.all("prompt")
    first, second = next(lions.all("candidate")).all("box")
    assert first.text == "lion 0.91" and second.text == "lion 0.64"
    assert first.attributes["style"] == "left:6.25%;top:31.25%;width:45.31%;height:59.38%"
    assert "from-right" in second.attributes["class"] and "from-right" not in first.attributes["class"]
    styles = [b.attributes["style"] for b in cut.all("box")]
    assert styles[0] == "left:0.00%;top:7.81%;width:46.88%;height:92.19%"


def test_a_picture_is_a_small_lossy_copy_and_a_small_one_stays_crisp(tmp_path):
    scene = held_out_scenes()[0]
    wide = Image.linear_gradient("L").resize((600, 300)).convert("RGB")
    groups = [[candidate(scene, 0), candidate(scene, 1, image=stored(wide))]]
    _, root = written(tmp_path, groups, thumbnail=200)
    sizes = []
    for img in root.all("img"):
        content = base64.b64decode(img.attributes["src"].removeprefix("data:image/webp;base64,"))
        assert content[12:16] == b"VP8 ", "lossy"
        with Image.open(io.BytesIO(content)) as image:
            sizes.append((image.size, img.attributes.get("class", ""), img.attributes["width"]))
    assert sizes == [((64, 64), "pixels", "64"), ((200, 100), "", "600")]
    with pytest.raises(InputError, match=r"candidate 1 of the prompt .* is no image"):
        written(tmp_path, [[candidate(scene, 1, image={"bytes": b"RIFF", "path": None})]])


def test_of_many_prompts_a_sample_is_shown_and_the_rest_counted(tmp_path):
    """Guards against a page that shows the first class alone."""
    groups = [[candidate(scene, 0)] for scene in held_out_scenes()[:20]]
    page, root = written(tmp_path, groups, limit=5)
    warning = next(root.all("warning")).text
    assert warning.startswith(
        "This page shows 5 of the 20 prompts, with 5 of the 20 images: a random sample."
    )
    texts = [t.text for p in root.all("prompt") for t in p.all("text")]
    order = [group[0]["prompt"] for group in groups]
    assert texts == sorted(sorted(order, key=content_key)[:5], key=order.index)
    assert "20 prompts, 20 images, 0 pairs" in root.text and page.count("<img") == 5
    assert not list(written(tmp_path, groups, limit=20)[1].all("warning"))
    assert "shows 19 of the 20 prompts" in written(tmp_path, groups, limit=19)[1].text
    assert "shows 1 of the 20 prompts" in written(tmp_path, groups, limit=0)[1].text
    assert "0 prompts, 0 images" in written(tmp_path, [])[1].text


def test_the_bound_is_of_images_whatever_the_order_of_the_prompts(tmp_path):
    groups = [
        [candidate(scene, k) for k in range(1 + i % 4)] for i, scene in enumerate(held_out_scenes()[:12])
    ]
    by_hash = sorted(groups, key=lambda group: group[0]["prompt_id"])
    fitting = [n for n in range(1, 13) if sum(map(len, by_hash[:n])) <= 13][-1]
    expected = {group[0]["prompt"] for group in by_hash[:fitting]}
    for order in (groups, groups[::-1]):
        _, root = written(tmp_path, order, limit=13)
        assert {t.text for p in root.all("prompt") for t in p.all("text")} == expected


def test_groups_are_streamed(tmp_path):
    """A build's images need not fit in memory: the group at hand and the one before are all that is alive."""

    class Rows(list):
        __hash__ = object.__hash__

    living = weakref.WeakSet()

    def groups():
        for scene in held_out_scenes()[:8]:
            assert len(living) <= 1
            group = Rows([candidate(scene, 0)])
            living.add(group)
            yield group
            del group

    write_gallery(
        tmp_path, (Group(group, [], []) for group in groups()), RUBRIC, selection=SELECTION, facts={}, limit=8
    )


def test_nothing_in_a_record_is_run_as_html(tmp_path):
    evil = '"><script>alert(1)</script>'
    row = candidate(held_out_scenes()[0], 0, "yn", rank=1, selected=True, reason=evil, boxes=[])
    row |= {"prompt": evil, "class": evil, "model": evil, "adapter": evil, "judge": evil}
    row |= {"questions": [evil, "x"], "boxes": [box(evil, 0.5, 1, 1, 9, 9)]}
    other = candidate(held_out_scenes()[1], 0)
    rubric = Rubric("evil", (Item(evil, "positive", evil + " {prompt}"), Item("x", "negative", "{class}")))
    page, root = written(tmp_path, [[row], [other]], rubric, facts={evil: evil}, selection=evil)
    assert evil not in page and page.count("<script") == page.count("</script") == 1
    assert page.count("&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;") >= 20
    assert evil in next(root.all("h1")).text and next(root.all("box")).text == f"{evil} 0.50"
    prompt = next(root.all("prompt"))
    assert prompt.attributes["data-class"] == evil and next(prompt.all("text")).text == evil
    assert next(prompt.all("img")).attributes["alt"] == f"Image 0: {evil}"


def test_the_page_needs_nothing_beside_itself_and_runs_its_own_script_only(gallery):
    page, root = gallery
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|\son\w+=", page)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(m for m in root.all("meta") if "http-equiv" in m.attributes).attributes["content"]
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert "hidden" in next(root.all("form")).attributes, "no controls that do nothing"
    buttons = list(next(root.all("main")).all("button"))
    assert len(buttons) == 11 and all("disabled" in button.attributes for button in buttons)
    assert not [c for c in root.all("candidate") if "hidden" in c.attributes]


def test_numbers_that_are_not_finite_are_said(tmp_path):
    assert [number(x) for x in (1.5, -2.0, 0.0, -0.001, None)] == [
        "+1.50",
        f"{MINUS}2.00",
        "0.00",
        "0.00",
        f"{ABSENT}",
    ]
    assert [number(x) for x in (math.inf, -math.inf, math.nan)] == ["+∞", f"{MINUS}∞", "undefined"]
    odds = {
        "log_odds": [math.inf, -math.inf, math.nan],
        "empty_log_odds": None,
        "other_mass": [None, 0.0, 1.0],
    }
    row = candidate(held_out_scenes()[0], 0, "ynu") | odds
    _, root = written(tmp_path, [[row | {"detector": ""}]])
    assert "confidence" not in root.text and "found no box" not in root.text, "nobody looked"
    answers = next(next(root.all("candidate")).all("tbody"))
    assert [[cell.text for cell in row.children][1:] for row in answers.all("tr")] == [
        ["yes", "+1", "+∞", ABSENT],
        ["no", "+1", f"{MINUS}∞", "0.0 %"],
        ["unclear", "0", "undefined", "100.0 %"],
    ]


USED = """
const seen = [], form = document.querySelector("form"), dialog = document.querySelector("dialog");
const every = (selector) => [...document.querySelectorAll(selector)];
const visible = (selector) => every(selector).filter((each) => each.checkVisibility());
const colour = (prompt) => prompt.querySelector(".text").textContent.split(" ")[1];
const order = () => visible(".prompt").map(colour).join(" ");
const wait = () => new Promise((done) => setTimeout(done, 20));
function set(changes) {
  for (const [name, value] of Object.entries(changes)) {
    const field = form.elements[name];
    field[field.type === "checkbox" ? "checked" : "value"] = value;
    field.dispatchEvent(new Event("input", {bubbles: true}));
  }
}
function tell(name) {
  const said = document.querySelector("output").value;
  seen.push(`${name}: ${visible(".candidate").length} ${visible(".box").length} ${said}`);
}
tell("all");
for (const [name, value] of [
    ["class", "zebra"], ["text", "GREEN"], ["status", "selected"], ["status", "chosen"],
    ["status", "rejected"], ["status", "unpaired"],
    ["status", "not-selected"], ["status", "invalid"], ["status", "reason-0"],
    ["answer", "9y"], ["answer", "9n"], ["answer", "9u"]]) {
  set({[name]: value}); tell(`${name} ${value}`); set({[name]: ""});
}
set({status: "rejected", answer: "9n"}); tell("both");
for (const value of ["widest", "narrowest", ""]) { set({order: value}); seen.push(`${value}: ${order()}`); }
set({order: "narrowest", boxes: false}); tell("bare");
form.querySelector("[type=reset]").click(); await wait(); tell("reset"); seen.push(order());

const button = document.querySelector("main button");
button.focus();
seen.push(`button: ${button === document.activeElement} ${button.tabIndex} ${dialog.open}`);
button.click();
const copy = dialog.querySelector("figure");
const title = dialog.querySelector("h2").textContent;
seen.push(`large: ${dialog.matches(":modal")} ${title} `
  + `${dialog.querySelectorAll("tbody tr").length} ${copy.querySelector(".answers").checkVisibility()} `
  + `${copy.querySelector("img").clientWidth > button.clientWidth}`);
copy.querySelector("figcaption").click(); seen.push(`words: ${dialog.open}`);
copy.querySelector("img").click();
seen.push(`picture: ${dialog.open} ${document.activeElement === button}`);
button.click(); dialog.click(); seen.push(`beside: ${dialog.open}`);
button.click(); dialog.querySelector(".close").click(); seen.push(`close: ${dialog.open}`);
seen.push(`wide: ${document.documentElement.scrollWidth <= innerWidth}`);
document.title = seen.join("; ");
"""


def test_a_reader_sorts_filters_and_enlarges(tmp_path):
    write_gallery(tmp_path, map(grouped, three_prompts()), RUBRIC, selection=SELECTION, facts={})
    title = re.search(r"<title>(.*)</title>", after(tmp_path / "gallery.html", USED))
    assert title and title[1].split("; ") == [
        "all: 12 7 3 of 3 prompts, 12 of 12 images",
        "class zebra: 4 0 1 of 3 prompts, 4 of 12 images",
        "text GREEN: 4 4 1 of 3 prompts, 4 of 12 images",
        "status selected: 2 3 2 of 3 prompts, 2 of 12 images",
        "status chosen: 3 3 3 of 3 prompts, 3 of 12 images",
        "status rejected: 3 1 3 of 3 prompts, 3 of 12 images",
        "status unpaired: 4 3 3 of 3 prompts, 4 of 12 images",
        "status not-selected: 8 4 3 of 3 prompts, 8 of 12 images",
        "status invalid: 2 0 2 of 3 prompts, 2 of 12 images",
        "status reason-0: 6 3 3 of 3 prompts, 6 of 12 images",
        "answer 9y: 4 4 3 of 3 prompts, 4 of 12 images",
        "answer 9n: 3 0 2 of 3 prompts, 3 of 12 images",
        "answer 9u: 3 3 1 of 3 prompts, 3 of 12 images",
        "both: 2 0 2 of 3 prompts, 2 of 12 images",
        # What fits no filter is hidden: the green lions, whose rejected image has an unclear answer.
        *("widest: red blue", "narrowest: blue red", ": red blue"),
        "bare: 2 0 2 of 3 prompts, 2 of 12 images",
        *("reset: 12 7 3 of 3 prompts, 12 of 12 images", "red blue green"),
        "button: true 0 false",
        "large: true Image 3: two red lions on the savanna 10 true true",
        *("words: true", "picture: false true", "beside: false", "close: false", "wide: true"),
    ]


def test_a_prompt_of_script_and_quotes_stays_text_when_enlarged_and_filtered(tmp_path):
    evil = "<script>document.title = 1</script> \"'><b>quoted</b>"
    rows = [row | {"prompt": evil, "class": evil} for row in three_prompts()[0]]
    groups = map(grouped, [rows, three_prompts()[1]])
    write_gallery(tmp_path, groups, RUBRIC, selection=SELECTION, facts={})
    page = after(
        tmp_path / "gallery.html",
        """
        document.title = "kept";
        const form = document.querySelector("form");
        form.elements.class.selectedIndex = 1;
        form.elements.class.dispatchEvent(new Event("input", {bubbles: true}));
        document.querySelector("main button").click();
        document.querySelector("h1").textContent = document.querySelector("output").value
          + ` ${document.querySelectorAll("b").length} ${document.querySelectorAll("script").length}`;
        """,
    )
    root = Tree(page.replace("<!DOCTYPE html>", "")).root
    assert "<title>kept</title>" in page
    assert next(root.all("h1")).text == "1 of 2 prompts, 4 of 8 images 0 2", "no element of the prompt's"
    assert next(next(root.all("dialog")).all("h2")).text == f"Image 3: {evil}"
