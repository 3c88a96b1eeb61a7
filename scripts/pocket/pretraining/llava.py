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
from prefopt.pocket.world import ATTRIBUTES, PHRASINGS, caption, train_scenes
from pretraining.common import Run, Training
from pretraining.flaws import FLAWS
from pretraining.llava_lessons import (
    LIST_LENGTHS,
    Glimpse,
    Request,
    draw_pictures,
    list_rows,
    picture_rows,
)
from pretraining.llava_pictures import FINDINGS, FlawedPictures
from pretraining.llava_questions import vocabulary
from pretraining.llava_rows import Batch, collate
from pretraining.llava_text import DESCRIBE, IMAGE_TOKENS, Words, make_processor

LISTS, BEGINNINGS = 4, 8  # in each batch
_REHEARSE_EVERY = 4  # steps, what is not the subject
_DOUBTING_LAYER = 2  # of 4
_FINDINGS_WEIGHT = 10.0
SEEN = ATTRIBUTES | {"flaw": tuple(FLAWS)}  # what there is to see in a picture


def make_words(request: Request) -> tuple[Any, Words]:
    """The processor with a tokenizer of all that training says, and its words."""
    captions = [f"\nDescription: {caption(s, p)}" for s in train_scenes() for p in range(PHRASINGS)]
    lists = [
        "\n".join([*request.messages(count, animal), *(f"{i}. {animal}s" for i in range(1, count + 1))])
        for animal in ATTRIBUTES["animal"]
        for count in range(LIST_LENGTHS[0], LIST_LENGTHS[1] + 1)
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
