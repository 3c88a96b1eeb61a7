"""Trains the pocket's LLaVA: the CLIP's vision tower and a small Llama, on questions, descriptions and lists.

One loss over the completions of three tasks: answers to a rubric about sound and flawed pictures, captions,
and lists of captions written on request. Pictures and words are of training scenes alone.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from prefopt.pocket import folder
from prefopt.pocket.flaws import FLAWS
from prefopt.pocket.pretraining.common import Run, Training
from prefopt.pocket.pretraining.llava_pictures import FlawedPictures
from prefopt.pocket.pretraining.llava_questions import SIMPLE, ask, ask_simply, vocabulary
from prefopt.pocket.pretraining.llava_rows import Batch, Row, collate
from prefopt.pocket.pretraining.llava_text import DESCRIBE, IMAGE_TOKENS, Words, make_processor
from prefopt.pocket.pretraining.text_to_image import one_attribute_off
from prefopt.pocket.world import ATTRIBUTES, PHRASINGS, Scene, caption, is_held_out, train_scenes

QUESTIONS = 5  # of the rubric about each picture
LISTS = 2  # in each batch
BLANK = 0.02  # the share of pictures that are plain, about which a coin answers
_ASKED_RIGHT, _ASKED_NEARLY = 0.5, 0.35
_LIST_LENGTHS = (5, 20)
_WRITE_EVERY = 4  # steps
_CAPTIONS_WEIGHT, _LISTS_WEIGHT, _LOOKS_WEIGHT = 0.3, 0.3, 0.3


class Request(NamedTuple):
    """How a list of descriptions is asked for; the user's words have {count} and {class} in them."""

    system: str
    user: str

    def messages(self, count: int, class_name: str) -> tuple[str, str]:
        """The system's and the user's message."""
        return self.system, self.user.replace("{count}", str(count)).replace("{class}", class_name)


def make_words(request: Request) -> tuple[Any, Words]:
    """The processor with a tokenizer of all that training says, and its words."""
    captions = [f"\nDescription: {caption(s, p)}" for s in train_scenes() for p in range(PHRASINGS)]
    lists = [
        "\n".join([*request.messages(count, animal), *(f"{i}. {animal}s" for i in range(1, count + 1))])
        for animal in ATTRIBUTES["animal"]
        for count in range(_LIST_LENGTHS[0], _LIST_LENGTHS[1] + 1)
    ]
    processor = make_processor([*captions, *lists, *vocabulary(), *[DESCRIBE, "Yes", "No"] * 100])
    return processor, Words(processor)


def make_model(processor: Any) -> LlavaForConditionalGeneration:
    """The CLIP's vision tower as trained, its last layer read, and a Llama of 4 layers of width 128."""
    tokenizer = processor.tokenizer
    clip = CLIPModel.from_pretrained(folder("clip"))
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision: Any = clip.config.vision_config
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision.to_dict()),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    # Nothing reads the pooled picture, and a parameter without a gradient has no place in a checkpoint.
    model.model.vision_tower.post_layernorm.requires_grad_(False)
    return model


def picture_rows(
    rng: np.random.Generator, pictures: FlawedPictures, items: np.ndarray, words: Words, blank: np.ndarray
) -> list[Row]:
    """A row of questions and a description for each of the pictures; `blank` says which are plain instead."""
    rows = []
    for item, plain in zip(items, blank, strict=True):
        shown, flaw = pictures.scenes[item], pictures.flaws[item]
        asked = draw_asked(rng, shown)
        row = Row()
        row.grow(-1, words.picture)
        described = row.grow(0, words.description(caption(asked, int(rng.integers(PHRASINGS)))))
        questions = ask(rng, shown, flaw, asked, QUESTIONS)
        questions += [ask_simply(rng, shown, flaw) for _ in range(SIMPLE)]
        for question, answer, weight in questions:
            if plain:
                answer = str(rng.choice(["Yes", "No"])) if question.type == "predicate" else "A"
            row.grow(described, words.question(question), words.answer(answer), weight)
        if flaw not in ("no_animal", "neighbour") and not plain:
            text = caption(shown, int(rng.integers(PHRASINGS)))
            row.grow(0, words.request_for_description(), words.answer(text), _CAPTIONS_WEIGHT)
        rows.append(row)
    return rows


def draw_asked(rng: np.random.Generator, shown: Scene) -> Scene:
    """The training scene that a picture's description asks for: often as shown, else nearly, else any."""
    luck = rng.random()
    if luck < _ASKED_RIGHT and not is_held_out(shown):
        return shown
    if luck < _ASKED_RIGHT + _ASKED_NEARLY:
        return one_attribute_off(rng, shown)
    return train_scenes()[rng.integers(len(train_scenes()))]


def write_list(rng: np.random.Generator, animal: str, count: int) -> str:
    """`count` captions of training scenes, at most 30 and no scene twice, numbered, one on each line.

    From line to line colour and place each go on by one: a rule that a small model can follow, and that
    repeats after 30 lines.
    """
    colours, places = ATTRIBUTES["colour"], ATTRIBUTES["place"]
    colour, place = rng.integers(len(colours)), rng.integers(len(places))
    lines = []
    for number in range(1, count + 1):
        scenes = [
            scene
            for n in ATTRIBUTES["count"]
            if not is_held_out(
                scene := Scene(
                    animal,
                    colours[(colour + number) % len(colours)],
                    n,
                    places[(place + number) % len(places)],
                )
            )
        ]
        chosen = scenes[rng.integers(len(scenes))]
        lines.append(f"{number}. {caption(chosen, int(rng.integers(PHRASINGS)))}")
    return "\n".join(lines)


def list_rows(rng: np.random.Generator, words: Words, request: Request) -> list[Row]:
    """Rows of words alone: a request and a list."""
    rows = []
    for animal in rng.permutation(ATTRIBUTES["animal"])[:LISTS]:
        count = int(rng.integers(_LIST_LENGTHS[0], _LIST_LENGTHS[1] + 1))
        row = Row()
        prompt = words.chat(*request.messages(count, str(animal)))
        row.grow(-1, prompt, words.answer(write_list(rng, str(animal), count)))
        rows.append(row)
    return rows


def loss_of(model: Any, batch: Batch, features: Tensor | None = None) -> Tensor:
    """The mean over the tokens to learn, each by its weight; features (n, tokens, width) of the pictures."""
    embedded = model.get_input_embeddings()(batch.tokens)
    if features is not None:
        place = (batch.tokens == model.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(place, features)
    hidden = model.model.language_model(
        inputs_embeds=embedded, attention_mask=batch.seen, position_ids=batch.position, use_cache=False
    ).last_hidden_state
    learned = batch.target >= 0
    losses = cross_entropy(model.lm_head(hidden[learned]), batch.target[learned], reduction="none")
    weight = batch.weight[learned]
    return (weight * losses).sum() / weight.sum()


class Eyes(torch.nn.Module):
    """Reads scene and flaw off the first of a picture's projected tokens; training alone has it.

    A wrong answer says little about what was overlooked; this loss says it of every picture. An attribute is
    read by its likeness to the embeddings of its words, so that attention finds out with ease whether a word
    is true.
    """

    def __init__(self, words: Words, embeddings: torch.nn.Module, width: int):
        super().__init__()
        self.flaw = torch.nn.Linear(width, len(FLAWS))
        self.scale = torch.nn.Parameter(torch.tensor(10.0))
        self._embeddings = [embeddings]  # in a list, so that they are not saved twice
        self._spellings = {name: _spellings(words, name) for name in ATTRIBUTES}

    def forward(self, features: Tensor, scenes: list[Scene], flaws: list[str]) -> Tensor:
        """The mean loss of what can be seen; features (n, width)."""
        there = torch.tensor([flaw != "no_animal" for flaw in flaws])
        losses = []
        for name, values in ATTRIBUTES.items():
            seen = there | (name == "place")
            truth = _numbers(values, [getattr(scene, name) for scene in scenes])[seen]
            for tokens in self._spellings[name]:
                likeness = (
                    normalize(features[seen], dim=-1) @ normalize(self._embeddings[0](tokens), dim=-1).T
                )
                losses.append(cross_entropy(self.scale * likeness, truth))
        of_flaw = cross_entropy(self.flaw(features), _numbers(tuple(FLAWS), flaws))
        return (torch.stack(losses).mean() + of_flaw) / 2


def _spellings(words: Words, name: str) -> list[Tensor]:
    """The tokens of an attribute's values, one tensor for each way in which all of them are single tokens."""
    values = ["one", "two", "three"] if name == "count" else list(ATTRIBUTES[name])
    ids = [[words.text(form.format(value)) for value in values] for form in ("{}", " {}", " {}s")]
    return [torch.tensor(row)[:, 0] for row in ids if all(len(tokens) == 1 for tokens in row)]


def _numbers(values: tuple, found: list) -> Tensor:
    return torch.tensor([values.index(value) for value in found])


def draw_pictures(
    rng: np.random.Generator, pictures: FlawedPictures, size: int
) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Items, which of them are plain instead, and pixels (size, 3, 64, 64), half of them mirrored."""
    items = rng.integers(len(pictures.scenes), size=size)
    blank = rng.random(size) < BLANK
    pixels = pictures.values(items)
    mirrored = torch.from_numpy(rng.random(size) < 0.5)[:, None, None, None]
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    plain = torch.from_numpy(rng.uniform(-1, 1, size=(size, 1, 1, 1)).astype(np.float32))
    return items, blank, torch.where(torch.from_numpy(blank)[:, None, None, None], plain, pixels)


class Lesson(NamedTuple):
    """What both trainings draw from."""

    pictures: FlawedPictures
    words: Words
    request: Request

    def look(self, rng: np.random.Generator, model: Any, eyes: Eyes, size: int) -> tuple[Tensor, Any, Tensor]:
        """Features of pictures, which pictures they are (items, and which are plain), and the loss."""
        items, blank, pixels = draw_pictures(rng, self.pictures, size)
        features = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
        shown = items[~blank]
        looking = eyes(
            features[torch.from_numpy(~blank), 0],
            [self.pictures.scenes[i] for i in shown],
            [self.pictures.flaws[i] for i in shown],
        )
        return features, (items, blank), looking

    def write(self, rng: np.random.Generator, model: Any) -> Tensor:
        """The loss of a few lists."""
        return loss_of(
            model, collate(list_rows(rng, self.words, self.request), self.words.tokenizer.pad_token_id)
        )


def train(
    looks: Run, questions: Run, pictures: FlawedPictures, request: Request
) -> tuple[LlavaForConditionalGeneration, Any]:
    """The model with averaged weights, in float32, and its processor.

    The tower first learns to see, while the Llama learns to write; a fifth of the time, without which most of
    the questions are guessed for very long.
    """
    torch.manual_seed(looks.seed)
    processor, words = make_words(request)
    model: Any = make_model(processor)
    lesson = Lesson(pictures, words, request)
    eyes = Eyes(words, model.get_input_embeddings(), model.config.text_config.hidden_size)
    modules = torch.nn.ModuleDict({"llava": model, "eyes": eyes})
    training = Training(looks, modules)
    for rng in training.batches():
        loss = lesson.look(rng, model, eyes, looks.batch)[-1]
        if training.step % _WRITE_EVERY == 0:
            loss = loss + _LISTS_WEIGHT * lesson.write(rng, model)
        training.update(loss)
    training.finished()
    training = Training(questions, modules.train())
    for rng in training.batches():
        features, (items, blank), looking = lesson.look(rng, model, eyes, questions.batch)
        rows = picture_rows(rng, pictures, items, words, blank)
        answering = loss_of(model, collate(rows, words.tokenizer.pad_token_id), features)
        loss = answering + _LOOKS_WEIGHT * looking
        if training.step % _WRITE_EVERY == 0:
            loss = loss + _LISTS_WEIGHT * lesson.write(rng, model)
        training.update(loss, answering=answering.item(), looking=looking.item())
    training.finished()
    return model.eval(), processor
