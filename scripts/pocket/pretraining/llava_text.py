"""The words of the pocket's LLaVA: its tokenizer, chat template and processor, and the tokens of a text."""

import copy
from collections.abc import Iterable
from typing import Any

from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.decision import DecisionConfig
from transformers.models.clip import CLIPImageProcessor

from prefopt.judges.decision import request
from prefopt.judges.questions import Case, Question
from prefopt.pocket.world import ATTRIBUTES, SIZE

PATCH = 8
IMAGE_TOKENS = (SIZE // PATCH) ** 2 + 1  # one for the whole picture, then the patches
VOCABULARY = 1000
DESCRIBE = "Describe this picture."
NUMBERS = ("one", "two", "three")
_SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|system|>", "<|user|>", "<|assistant|>")

# A turn is its role's token and its words; an answer is closed. `content` is a text, or texts and images.
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{{- '<image>' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor %}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def make_processor(texts: Iterable[str]) -> LlavaProcessor:
    """Byte-level BPE of at most a thousand tokens, learned from `texts`; pictures as the pocket's CLIP."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(_SPECIAL[3:]),
        model_max_length=1024,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


class Words:
    """The token ids of whatever the model reads, each text made once.

    Questions are worded by `prefopt.judges.decision.request` and transformers' decision prompt, so the model
    learns the tokens that a judge will show it.
    """

    def __init__(self, processor: Any):
        self.processor = copy.deepcopy(processor)  # asking for a decision adds tokens to it
        self.tokenizer = self.processor.tokenizer
        # Ends of the prompts are recognised by the tokens with which these two begin.
        self._probes = Question("one", "Do?"), Question("two", "Are?")
        self._descriptions: dict[str, list[int]] = {}
        self._questions: dict[Question, list[int]] = {}
        self._blank = Image.new("RGB", (SIZE, SIZE))
        self.picture = self._prompts("", self._probes)[0][: 2 + IMAGE_TOKENS]
        self.values = {
            name: [self._one(f" {word}") for word in (NUMBERS if name == "count" else values)]
            for name, values in ATTRIBUTES.items()
        }

    def _prompts(self, description: str, questions: tuple[Question, ...]) -> list[list[int]]:
        made = DecisionConfig().prepare_inputs(
            request(Case(self._blank, description, questions)), self.processor
        )
        return [inputs["input_ids"][0].tolist() for inputs, _ in made]

    def description(self, text: str) -> list[int]:
        """What stands between the picture and a question."""
        if text not in self._descriptions:
            one, two = self._prompts(text, self._probes)
            end = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
            self._descriptions[text] = one[len(self.picture) : end]
        return self._descriptions[text]

    def question(self, question: Question) -> list[int]:
        """A question and the form of its answer, up to where the answer begins."""
        if question not in self._questions:
            start = len(self.picture) + len(self.description(""))
            self._questions[question] = self._prompts("", (question,))[0][start:]
        return self._questions[question]

    def _one(self, word: str) -> int:
        """The token of a word; every value of the world is learned as one."""
        (token,) = self.text(word)
        return token

    def text(self, text: str) -> list[int]:
        """Plain words."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def answer(self, text: str) -> list[int]:
        """Words that end."""
        return [*self.text(text), self.tokenizer.eos_token_id]

    def request_for_description(self) -> list[int]:
        """What stands between the picture and its description."""
        return self.text(f"{DESCRIBE}<|assistant|>")

    def chat(self, system: str, user: str) -> list[int]:
        """A conversation of words alone, up to where the answer begins."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return self.text(
            self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
