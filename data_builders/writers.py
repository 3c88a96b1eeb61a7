"""Who writes prompts: an LLM on this machine, or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from prefopt import pocket
from prefopt.endpoint import Endpoint, chat_text
from prefopt.records import InputError
from prefopt.store import content_key, tensors_key
from prefopt.vlm.models import UNUSABLE, load_vlm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and how many there are at most."""

    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = 1024


class Writer(Protocol):
    """A chat LLM; `identity` changes with its weights, template and sampling."""

    identity: str

    def write(self, system: str, request: str, *, seed: int) -> str:
        """The answer; without its last line, if it came to its longest length in the middle of that."""
        ...


class LocalWriter:
    """A chat model of a folder, a hub id or `pocket`: a causal LM, or the text side of a VLM.

    Safetensors only, no code from the repository. Quantised weights (AWQ, bitsandbytes) are loaded as their
    config says; others in `dtype`, by default float32 on a CPU and bfloat16 elsewhere. The answer is a
    function of the messages and the seed.
    """

    def __init__(
        self,
        model_name_or_path: str = "pocket",
        revision: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        sampling: Sampling | None = None,
    ):
        self.sampling = sampling or Sampling()
        self.device = torch.device(device)
        if dtype is None:
            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        name = pocket.resolve(model_name_or_path, "llava")
        # Any: what these hold is wider in transformers' annotations than what is read of it.
        model, reader = _loaded(name, revision, dtype, self.device)
        self.model: Any = model
        self.tokenizer: Any = getattr(reader, "tokenizer", reader)
        self._in_parts = reader is not self.tokenizer  # as the templates of VLMs read their messages
        template = reader.chat_template
        self.template = template.get("default") if isinstance(template, dict) else template
        if self.template is None:
            raise InputError(f"{name} has no chat template: name an LLM that was trained on instructions")
        weights = {k: v for k, v in self.model.state_dict().items() if isinstance(v, Tensor)}
        form = [tensors_key(weights), self.template, asdict(self.sampling)]
        self.identity = f"LLM {content_key(json.dumps(form))}"

    def write(self, system: str, request: str, *, seed: int) -> str:
        """The answer; without its last line, if it came to its longest length in the middle of that."""
        inputs = self._inputs(system, request)
        start = inputs["input_ids"].shape[1]
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = self.sampling.max_new_tokens if positions is None else positions - start
        if room < 1:
            raise InputError(f"the request takes {start} tokens; the LLM reads no more than {positions}")
        draw: dict[str, Any] = {"do_sample": False}
        if self.sampling.temperature:
            draw = {"do_sample": True, "temperature": self.sampling.temperature, "top_k": 0}
            draw["top_p"] = self.sampling.top_p
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            tokens = self.model.generate(
                **inputs,
                **draw,
                max_new_tokens=min(self.sampling.max_new_tokens, room),
                pad_token_id=self._ends[0] if self._ends else None,
            )[0, start:]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return _whole_lines(text, ended=bool(len(tokens)) and int(tokens[-1]) in self._ends)

    @property
    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _inputs(self, system: str, request: str) -> Any:
        try:
            return self._templated([("system", system), ("user", request)])
        except TemplateError:  # a template without that role, as Mistral's first ones and Gemma's
            return self._templated([("user", f"{system}\n\n{request}")])

    def _templated(self, messages: list[tuple[str, str]]) -> Any:
        return self.tokenizer.apply_chat_template(
            [
                {"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}
                for role, text in messages
            ],
            chat_template=self.template,
            add_generation_prompt=True,
            enable_thinking=False,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device)


class EndpointWriter:
    """A chat model behind POST /v1/chat/completions; how well its seed is honoured is the server's affair."""

    def __init__(self, url: str, model: str, *, sampling: Sampling | None = None, retries: int = 10):
        self.endpoint = Endpoint(url, retries=retries)
        self.model = model
        self.sampling = sampling or Sampling()
        self.identity = f"endpoint chat {model} {json.dumps(asdict(self.sampling))}"

    def write(self, system: str, request: str, *, seed: int) -> str:
        """The answer; without its last line, if it came to its longest length in the middle of that."""
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": request}],
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "max_tokens": self.sampling.max_new_tokens,
            "seed": seed,
        }
        text, ended = chat_text(self.endpoint.post("/v1/chat/completions", body))
        return _whole_lines(text, ended=ended)


def _loaded(name: str, revision: str | None, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Model, and its tokenizer or (of a VLM) processor."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        quantised = getattr(config, "quantization_config", None) is not None
        if quantised:
            dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float16
        model: Any
        if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            model, reader = load_vlm(name, revision=revision, dtype=dtype)
        else:
            reader = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                name, revision=revision, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
    except InputError:
        raise
    except (*UNUSABLE, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise InputError(
            f"no LLM could be loaded from {name!r}: {reason} Name a folder that save_pretrained wrote, or a "
            "hub id"
        ) from error
    # The loader of quantised weights has placed them already.
    return (model if quantised else model.to(device)).eval(), reader


def _whole_lines(text: str, *, ended: bool) -> str:
    return text if ended else text.rpartition("\n")[0] or text
