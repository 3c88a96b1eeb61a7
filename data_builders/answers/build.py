"""A build of answers: its passes over blocks, then tables, card and gallery from what they computed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from accelerate import PartialState

from data_builders.answers.config import SelfCritiqueConfig
from data_builders.answers.criticism import AnyCritic, CompareAnswers
from data_builders.answers.gallery import write_gallery
from data_builders.answers.generation import AnswerPrompts, Generator, model_identities
from data_builders.answers.selection import (
    PairOptions,
    compare,
    decide,
    drop_identical,
    flaw,
    rank,
    to_balance,
)
from data_builders.answers.source import Source
from data_builders.answers.summary import Summary, write_build
from data_builders.answers.tables import exports
from data_builders.engine.passes import run_passes
from data_builders.engine.stages import INVALID, NOT_SELECTED, Group, Pair, Record, flow
from data_builders.export.hub import push
from data_builders.export.writers import write_exports
from prefopt.ledger import Ledger
from prefopt.loading import Lazy


class Build:
    """The passes of a self-critique and what is made of their results."""

    def __init__(
        self,
        config: SelfCritiqueConfig,
        source: Source,
        generator: Lazy[Generator],
        critic: Lazy[AnyCritic],
        state: PartialState,
    ):
        self.config, self.source, self.state = config, source, state
        self.folder = Path(config.output_dir)
        work, process = self.folder / "work", state.process_index
        self.answering = AnswerPrompts(
            generator,
            source,
            Ledger(work, "answers", process),
            answers=config.answers,
            batch_size=config.batch_size,
        )
        self.comparing = CompareAnswers(
            critic,
            source,
            self.answering,
            Ledger(work, "comparisons", process),
            batch_size=config.critic_batch_size,
            with_reference=config.with_reference,
        )

    def run(self) -> str:
        """Compute what is missing, each process its share; then write everything. A sentence about it.

        A build without a pair is an InputError; nothing that was computed is lost.
        """
        start, passes, said = perf_counter(), [self.answering, self.comparing], ""
        calls = run_passes(passes, len(self.source.blocks), self.state, keep_resident=False)
        if self.state.is_main_process:
            made = sum((Counter(of_one) for of_one in calls), Counter[str]())
            said = self._write(
                {
                    "processes": self.state.num_processes,
                    "seconds": round(perf_counter() - start, 1),
                    "calls": {each.name: made[each.name] for each in passes},
                }
            )
        self.state.wait_for_everyone()
        return said

    def _write(self, run: dict) -> str:
        """From what is kept to the tables, the card and the gallery; on one process."""
        config, tables = self.config, exports(self.source.encoded)
        for each in (self.answering, self.comparing):
            each.ledger.refresh()
        left_out = to_balance(self._pairs()) if config.balance_length else frozenset[str]()
        summary = Summary(self.source.left_out, self._pairs())

        def counted() -> Iterator[Group]:
            for group in self._groups(left_out):
                summary.add(group)
                yield group

        write_exports(
            counted(), self.folder, tables, test_fraction=0.0, max_bytes=config.shard_megabytes * 2**20
        )
        identities = {each.name: each.identity for each in (self.answering, self.comparing)}
        if config.gallery:
            write_gallery(
                self.folder,
                self._groups(left_out),
                self.source.images,
                total=len(self.source),
                facts=summary.facts(),
            )
        said = write_build(self.folder, config, asdict(config), identities, summary, tables, run)
        if config.push_to_hub:
            push(self.folder, config.push_to_hub)
        return said

    def _groups(self, left_out: frozenset[str]) -> Iterator[Group]:
        """The answers of each prompt, compared, ranked and paired; no image is read."""
        stages = [drop_identical, compare(self.comparing.preference), rank]
        options = PairOptions(self.config.pair_rule, self.config.margin)
        return decide(flow(self._answers(), stages), options, left_out)

    def _pairs(self) -> Iterator[Pair]:
        """All pairs, those among them that a balance of lengths leaves out."""
        return (pair for group in self._groups(frozenset()) for pair in group.pairs)

    def _answers(self) -> Iterator[Record]:
        """Every answer as a record with its prompt and what it was made by."""
        config, critic = self.config, self.config.critic
        made_by = {
            "source": config.dataset_name,
            **{name: getattr(config, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")},
            **{name: getattr(config, name) for name in ("model_revision", "adapter", "dtype")},
            "model": config.model_name_or_path,
            **model_identities(config),
            "critic": critic[0],
            "critic_adapter": critic[2],
            "critic_identity": self.comparing.identity,
            NOT_SELECTED: "",
        }
        for block in self.source.blocks:
            for record in block:
                for number, answer in enumerate(self.answering.answers(record)):
                    yield (
                        record
                        | made_by
                        | {
                            "candidate": number,
                            "answer": answer.text,
                            "tokens": answer.tokens,
                            "finished": answer.finished,
                            INVALID: flaw(answer),
                        }
                    )
