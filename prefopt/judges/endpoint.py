"""The judge behind HTTP: any server that answers questions about images, by the best route that it has."""

import json
import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal

from PIL import Image

from prefopt.endpoint import ABSENT, Endpoint, Refused, Unfit, in_parallel
from prefopt.errors import InputError
from prefopt.files import content_key
from prefopt.images import png_base64
from prefopt.judges.dialects import DIALECTS, Api, Request
from prefopt.judges.questions import Answer, Case, Question

logger = logging.getLogger(__name__)

NO_LOGPROBS = (400, 403, 422)  # what a server without log-probabilities may answer to a request for them

# One of each type, so that the identity changes with any wording.
_SAMPLES = (
    Question("name", "text"),
    Question("name", "text", "choice", ("option", "other")),
    Question("name", "text", "score", ("low", "high")),
)


class EndpointJudge:
    """Answers through a server at `url` that runs `model`; `prefopt.judges.dialects` has the routes.

    `auto` sends one small question by each route, from the first on, and takes the first one that the server
    has. All questions of a case go into one request where the route allows it. Answers that cannot be read
    count in `unreadable`; they are 'Nan', never a yes. `identity` holds the route, the words and the model's
    name, not the address: the server alone knows what it runs under a name, so a new model needs a new name.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Api | Literal["auto"] = "auto",
        concurrency: int = 8,
        retries: int = 10,
        timeout: float = 300.0,
        first_wait: float = 0.5,
    ):
        self.endpoint = Endpoint(url, retries=retries, timeout=timeout, first_wait=first_wait)
        self.model = model
        self.concurrency = concurrency
        self.answered = self.unreadable = 0
        self.api: Api = self._first_that_works() if api == "auto" else api
        dialect = DIALECTS[self.api]
        form = json.dumps([dialect.body("", Request("", "prompt", (sample,))) for sample in _SAMPLES])
        self.identity = f"endpoint {self.api} {model} {content_key(form)[:16]}"

    def answer(self, cases: Sequence[Case]) -> list[list[Answer]]:
        """The answers of each case, in the order of its questions; up to `concurrency` requests at a time."""
        for case in cases:
            if len({question.name for question in case.questions}) < len(case.questions):
                raise ValueError("two questions of a case have one name")
        pictures = in_parallel(png_base64, [case.image for case in cases], self.concurrency)
        asked = [
            (place, Request(picture, case.prompt, part))
            for place, (case, picture) in enumerate(zip(cases, pictures, strict=True))
            for part in _in_parts(case.questions, DIALECTS[self.api].most)
        ]
        parts = in_parallel(lambda job: self._ask(self.api, job[1]), asked, self.concurrency)
        answers: list[list[Answer]] = [[] for _ in cases]
        for (place, _), part in zip(asked, parts, strict=True):
            answers[place] += part
        self._count(answers)
        return answers

    def _ask(self, api: Api, request: Request) -> list[Answer]:
        dialect = DIALECTS[api]
        read = partial(dialect.read, request.questions)
        try:
            return self.endpoint.post(dialect.path, dialect.body(self.model, request), read)
        except Unfit as error:
            raise Unfit(f"{self.endpoint.url}{dialect.path} of {self.model}: {error}") from error

    def _first_that_works(self) -> Api:
        picture = png_base64(Image.new("RGB", (64, 64), (128, 128, 128)))
        request = Request(picture, "a grey square", (Question("grey", "Is this picture grey?"),))
        refusals = []
        for api in DIALECTS:
            try:
                self._ask(api, request)
            except Refused as error:
                if error.status not in ABSENT and (api != "logprobs" or error.status not in NO_LOGPROBS):
                    raise
                refusals.append(str(error))
            except Unfit as error:
                if api != "logprobs":
                    raise
                refusals.append(str(error))
            else:
                level = logging.WARNING if api == "text" else logging.INFO
                reasons = f", because {'; '.join(refusals)}" if refusals else ""
                logger.log(level, "%s is asked as %s%s", self.endpoint.url, api, reasons)
                return api
        raise InputError(f"no way to ask {self.model} at {self.endpoint.url}: {'; '.join(refusals)}")

    def _count(self, answers: list[list[Answer]]) -> None:
        unclear = sum(answer.other_mass > 0.5 for case in answers for answer in case)
        self.answered += sum(map(len, answers))
        self.unreadable += unclear
        if unclear:
            logger.warning(
                "%s: %d of %d answers so far could not be read; they count as neither yes nor no",
                self.model,
                self.unreadable,
                self.answered,
            )


def _in_parts(questions: tuple[Question, ...], most: int) -> list[tuple[Question, ...]]:
    return [questions[start : start + most] for start in range(0, len(questions), most)]
