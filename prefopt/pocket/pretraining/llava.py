"""Trains the pocket's LLaVA: the CLIP's vision tower and a small Llama, on questions, descriptions and lists.

One loss over the completions of three tasks: answers to a rubric about sound and flawed pictures, captions,
and lists of captions written on request. Pictures and words are of training scenes alone.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
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
from prefopt.pocket.pretraining.llava_pictures import FINDINGS, FlawedPictures
from prefopt.pocket.pretraining.llava_questions import SIMPLE, ask, ask_simply, vocabulary
from prefopt.pocket.pretraining.llava_rows import Batch, Row, collate
from prefopt.pocket.pretraining.llava_text import DESCRIBE, IMAGE_TOKENS, Words, make_processor
from prefopt.pocket.pretraining.text_to_image import one_attribute_off
from prefopt.pocket.world import ATTRIBUTES, PHRASINGS, Scene, caption, is_held_out, train_scenes

QUESTIONS = 5  # of the rubric about each picture
LISTS, BEGINNINGS = 4, 8  # in each batch
BLANK = 0.02  # the share of pictures that are plain, about which a coin answers
_ASKED_RIGHT, _ASKED_NEARLY = 0.5, 0.35
_LIST_LENGTHS = (5, 20)
_REHEARSE_EVERY = 4  # steps, what is not the subject
_CAPTIONS_WEIGHT = 0.3
_DOUBTING_LAYER = 2  # of 4
_FINDINGS_WEIGHT = 10.0
SEEN = ATTRIBUTES | {"flaw": tuple(FLAWS)}  # what there is to see in a picture


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


class Glimpse(NamedTuple):
    """Pictures as a step shows them."""

    items: np.ndarray
    blank: np.ndarray  # which of them are plain instead
    pixels: Tensor  # (n, 3, 64, 64)
    found: Tensor  # (n, 64, findings) float32


def draw_pictures(rng: np.random.Generator, pictures: FlawedPictures, size: int) -> Glimpse:
    """Pictures drawn at random, half of them mirrored."""
    items = rng.integers(len(pictures.scenes), size=size)
    blank = rng.random(size) < BLANK
    plain = torch.from_numpy(blank)[:, None, None, None]
    mirrored = torch.from_numpy(rng.random(size) < 0.5)[:, None, None, None]
    pixels, found = pictures.values(items), pictures.found[torch.from_numpy(items)].float()
    pixels = torch.where(mirrored, pixels.flip(-1), pixels)
    found = torch.where(mirrored, found.flip(2), found)
    tone = torch.from_numpy(rng.uniform(-1, 1, size=(size, 1, 1, 1)).astype(np.float32))
    return Glimpse(items, blank, torch.where(plain, tone, pixels), torch.where(plain, 0, found).flatten(1, 2))


def picture_rows(
    rng: np.random.Generator, pictures: FlawedPictures, glimpse: Glimpse, words: Words
) -> list[Row]:
    """A row of questions and a description for each of the pictures."""
    rows = []
    for item, plain in zip(glimpse.items, glimpse.blank, strict=True):
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
        if not plain:
            truths = said_of(shown, flaw, words)
            row.truth = [truths.get(token, -1) for token in row.tokens]
        rows.append(row)
    return rows


def said_of(shown: Scene, flaw: str, words: Words) -> dict[int, int]:
    """Whether each word for an attribute's value is true of the picture; ambiguous ones are left out."""
    return {
        token: int(getattr(shown, name) == value and (flaw != "no_animal" or name == "place"))
        for name, values in ATTRIBUTES.items()
        if flaw != "neighbour" or name in ("colour", "place")
        for token, value in zip(words.values[name], values, strict=True)
    }


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

    From line to line colour, place and number of animals each go on by one, but the number stays where the
    places begin anew. So the sum by which scenes are held out stays the same, modulo 3: a small model need
    only begin with a training scene, and that is always on the first of the places.
    """
    colours, places, counts = (ATTRIBUTES[name] for name in ("colour", "place", "count"))
    starts = [scene for scene in train_scenes() if (scene.animal, scene.place) == (animal, places[0])]
    start = starts[rng.integers(len(starts))]
    lines = []
    for line in range(count):
        scene = Scene(
            animal,
            colours[(colours.index(start.colour) + line) % len(colours)],
            counts[(counts.index(start.count) + line - line // len(places)) % len(counts)],
            places[line % len(places)],
        )
        lines.append(f"{line + 1}. {caption(scene, int(rng.integers(PHRASINGS)))}")
    return "\n".join(lines)


def list_rows(
    rng: np.random.Generator, words: Words, request: Request, number: int, *, whole: bool = True
) -> list[Row]:
    """Rows of words alone: a request and a list, or no more than the list's first line."""
    rows = []
    for _ in range(number):
        animal = str(rng.choice(ATTRIBUTES["animal"]))
        count = int(rng.integers(_LIST_LENGTHS[0], _LIST_LENGTHS[1] + 1))
        prompt, text = words.chat(*request.messages(count, animal)), write_list(rng, animal, count)
        row = Row()
        row.grow(-1, prompt, words.answer(text) if whole else words.text(text.split("\n")[0] + "\n"))
        rows.append(row)
    return rows


def read(model: Any, batch: Batch, features: Tensor | None = None) -> tuple[Tensor, ...]:
    """What each of the Llama's layers makes of the rows; features (n, tokens, width) of the pictures."""
    embedded = model.get_input_embeddings()(batch.tokens)
    if features is not None:
        place = (batch.tokens == model.config.image_token_id)[..., None]
        embedded = embedded.masked_scatter(place, features)
    return model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=batch.seen,
        position_ids=batch.position,
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states


def loss_of(model: Any, batch: Batch, layers: tuple[Tensor, ...]) -> Tensor:
    """The mean over the tokens to learn, each by its weight."""
    learned = batch.target >= 0
    losses = cross_entropy(model.lm_head(layers[-1][learned]), batch.target[learned], reduction="none")
    weight = batch.weight[learned]
    return (weight * losses).sum() / weight.sum()


class Eyes(torch.nn.Module):
    """Reads scene and flaw off a picture's first projected token, and off the others what each patch shows.

    Training alone has it: a wrong answer says little about what was overlooked, this loss says it of every
    patch.
    """

    def __init__(self, width: int):
        super().__init__()
        self.whole = torch.nn.ModuleDict(
            {name: torch.nn.Linear(width, len(values)) for name, values in SEEN.items()}
        )
        self.patches = torch.nn.Linear(width, len(FINDINGS))

    def forward(self, features: Tensor, glimpse: Glimpse, pictures: FlawedPictures) -> Tensor:
        """The loss of what can be seen; features (n, tokens, width)."""
        shown = torch.from_numpy(~glimpse.blank)
        scenes = [pictures.scenes[i] for i in glimpse.items[~glimpse.blank]]
        flaws = [pictures.flaws[i] for i in glimpse.items[~glimpse.blank]]
        losses = []
        for name, values in SEEN.items():
            seen = [name in ("place", "flaw") or flaw != "no_animal" for flaw in flaws]
            truths = flaws if name == "flaw" else [getattr(scene, name) for scene in scenes]
            truth = torch.tensor([values.index(value) for value in truths])[seen]
            losses.append(cross_entropy(self.whole[name](features[shown, 0][seen]), truth))
        finding = binary_cross_entropy_with_logits(self.patches(features[:, 1:]), glimpse.found)
        return torch.stack(losses[:-1]).mean() + losses[-1] + _FINDINGS_WEIGHT * finding


class Doubts(torch.nn.Module):
    """Reads in the middle of the Llama, at each word about a picture, whether it is true; for training.

    Without it the Llama guesses for very long: one yes or no for a whole description does not say which
    of its words was to be compared with the picture.
    """

    def __init__(self, width: int):
        super().__init__()
        self.read = torch.nn.Linear(width, 1)

    def forward(self, layers: tuple[Tensor, ...], truth: Tensor) -> Tensor:
        """The mean loss over the words of which `truth` (n, s) says something."""
        told = truth >= 0
        read = self.read(layers[_DOUBTING_LAYER][told])[:, 0]
        return binary_cross_entropy_with_logits(read, truth[told].float())


class Lesson(NamedTuple):
    """What both trainings draw from."""

    pictures: FlawedPictures
    words: Words
    request: Request

    def look(self, rng: np.random.Generator, model: Any, size: int) -> tuple[Tensor, Glimpse]:
        """Pictures, and what the model's tower and projector make of them (size, tokens, width)."""
        glimpse = draw_pictures(rng, self.pictures, size)
        return torch.stack(list(model.model.get_image_features(glimpse.pixels).pooler_output)), glimpse

    def write(self, rng: np.random.Generator, model: Any) -> Tensor:
        """The loss of a few lists, and of the first lines of more.

        The first line decides whether all of a list is held out.
        """
        losses = []
        for number, whole in ((LISTS, True), (BEGINNINGS, False)):
            rows = list_rows(rng, self.words, self.request, number, whole=whole)
            batch = collate(rows, self.words.tokenizer.pad_token_id)
            losses.append(loss_of(model, batch, read(model, batch)))
        return torch.stack(losses).mean()


def train(
    looks: Run, questions: Run, lists: Run, pictures: FlawedPictures, request: Request
) -> tuple[LlavaForConditionalGeneration, Any]:
    """The model with averaged weights, in float32, and its processor.

    The tower first learns to see, while the Llama learns to write; then the tower stays as it is, and the
    Llama learns to answer, and at last to write without a slip.
    """
    torch.manual_seed(looks.seed)
    processor, words = make_words(request)
    model: Any = make_model(processor)
    lesson = Lesson(pictures, words, request)
    width = model.config.text_config.hidden_size
    modules = torch.nn.ModuleDict({"llava": model, "eyes": Eyes(width), "doubts": Doubts(width)})
    training = Training(looks, modules)
    for rng in training.batches():
        features, glimpse = lesson.look(rng, model, looks.batch)
        loss = modules["eyes"](features, glimpse, pictures)
        if training.step % _REHEARSE_EVERY == 0:
            loss = loss + lesson.write(rng, model)
        training.update(loss)
    training.finished().train()
    for seeing in (model.model.vision_tower, model.model.multi_modal_projector):
        seeing.requires_grad_(False)
    for run, answer_every, write_every in ((questions, 1, _REHEARSE_EVERY), (lists, _REHEARSE_EVERY, 1)):
        training = Training(run, modules)
        for rng in training.batches():
            losses = {}
            if training.step % answer_every == 0:
                with torch.no_grad():
                    features, glimpse = lesson.look(rng, model, run.batch)
                batch = collate(picture_rows(rng, pictures, glimpse, words), words.tokenizer.pad_token_id)
                layers = read(model, batch, features)
                losses["answering"] = loss_of(model, batch, layers)
                losses["doubting"] = modules["doubts"](layers, batch.truth)
            if training.step % write_every == 0:
                losses["writing"] = lesson.write(rng, model)
            training.update(
                torch.stack(list(losses.values())).sum(), **{k: v.item() for k, v in losses.items()}
            )
        training.finished().train()
    return model.eval(), processor
