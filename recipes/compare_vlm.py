"""Compare vision-language models on the same questions about images, and write a report.

    python recipes/compare_vlm.py --systems base sft=runs/vlm_sft --model_name_or_path my/vlm \\
        --dataset_name my/answers
    accelerate launch recipes/compare_vlm.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dtype bfloat16 \\
        --systems base sft1=runs/ens/member-1 sft2=runs/ens/member-2 sfte=runs/ens/average dpo=runs/vlm_dpo \\
        --dataset_name my/lrv_chart --critic llava-critic-7b --critic_url http://localhost:8000 --pairwise

A system is `name=path`, the path the folder of an adapter in peft's format or of a whole model; a name alone
is the model itself, which is loaded once for all of its adapters. `dataset_name` has images, questions and
right answers, in any format that vlm_sft.py reads; each answer of a conversation is a question of its own.

Of every system: the test loss (the mean of -log p over the right answers' tokens), BLEU, ROUGE-L, exact match
if all right answers are short, a critic's score and a rubric's points. Every two systems are compared row by
row: the mean difference with a paired bootstrap interval over images, wins, ties and losses, p corrected for
the number of pairs, and how many rows would show such a difference with 80 % power.

You should see the table of figures; in --output_dir report.html, table.md, summary.json and results.jsonl.
The same command again generates and grades nothing twice.

The critic is shown the right answer unless --no_with_reference is given: a critic that has to find it by
itself grades what it knows, too. Leave it out where other answers than the one in the table are as good.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from prefopt import pocket
from prefopt.cli import run
from prefopt.errors import InputError
from prefopt.evaluation.options import CriticOptions
from prefopt.evaluation.systems import VlmSystem, vlm_systems
from prefopt.judges.rubric import Rubric
from prefopt.options import check_paths_exist, option


@dataclass
class CompareVlmConfig(CriticOptions):
    """What is compared, on what, and how answers are generated and graded."""

    systems: list[str] = option(
        ["base", "dpo=runs/vlm_dpo"],
        "What is compared, the baseline first: `name=folder` of an adapter or a model, or a name alone for "
        "the base model.",
    )
    model_name_or_path: str = option("pocket", "The base model: a folder, a hub id or `pocket`.")
    revision: str | None = option(None, "Revision of that model on the hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Precision of that model.")
    load_in_4bit: bool = option(False, "Quantise its language model to 4 bits, as for QLoRA.")
    dataset_name: str | None = option(
        None,
        "Questions with right answers: a folder, a hub id or `pocket` (the default for the model `pocket`).",
    )
    dataset_config: str | None = option(
        None, "Configuration of the dataset: of the hub's, or a folder's sub-folder."
    )
    dataset_revision: str | None = option(None, "Revision of the dataset on the hub.")
    dataset_test_split: str = option("test", "The split to compare on.")
    max_rows: int | None = option(None, "Use the first N rows (default: all).", within="[1, inf)")
    max_new_tokens: int = option(
        256, "Longest answer, in tokens; those that were cut off are counted.", within="[1, 1e6]"
    )
    batch_size: int = option(8, "Questions answered at once.", within="[1, 65536]")
    with_reference: bool = option(True, "Show critic and rubric's judge the right answer.")
    pairwise: bool = option(
        False, "Also let the critic choose between each system's answer and the first one's, in both orders."
    )
    rubric: str | None = option(
        None, "Yes/no questions about each answer, to the critic: `answers`, or a YAML file (default: none)."
    )
    tie: float = option(0.01, "Scores that differ by at most this are a tie.", within="[0, 1e9]")
    shown: int = option(24, "Most questions that the report shows with their answers.", within="[1, 1e6]")
    output_dir: str = option("runs/compare_vlm", "Folder for answers, scores and report.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_paths_exist(self, "model_name_or_path")
        pocket.fill_defaults(self, [self.model_name_or_path], "dataset_name")
        check_paths_exist(self, "dataset_name")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise InputError('--load_in_4bit needs bitsandbytes: pip install "prefopt[bitsandbytes]"')
        if not self.critic and (self.pairwise or self.rubric):
            raise InputError("--pairwise and --rubric ask the critic; name one with --critic")
        _ = self.named_systems, self.rubric and Rubric.load(self.rubric)

    @property
    def named_systems(self) -> dict[str, VlmSystem]:
        """The systems by name."""
        base = VlmSystem(self.model_name_or_path, None, self.revision, self.dtype, self.load_in_4bit)
        return vlm_systems(self.systems, base)


def main(config: CompareVlmConfig) -> None:
    """Answer, score, compare and write the report."""
    from rich.console import Console

    from prefopt.evaluation import answer_scorers
    from prefopt.evaluation.answer_report import terminal_table, warnings_of, write_reports
    from prefopt.evaluation.answering import read_questions
    from prefopt.evaluation.scoring import processes
    from prefopt.evaluation.vision_language import compare

    state, systems, reference = processes(), config.named_systems, config.with_reference
    questions = read_questions(
        str(config.dataset_name),
        next(iter(systems.values())),
        split=config.dataset_test_split,
        config=config.dataset_config,
        revision=config.dataset_revision,
        most=config.max_rows,
    )
    state.print(questions)
    scorers, preference = answer_scorers.reference_scorers([one.reference for one in questions.asked]), None
    if config.critic:
        critic = config.lazy_critic(state.device, "typed" if config.critic_typed else "text")
        scorers.append(answer_scorers.grade_scorer(critic, config.critic, with_reference=reference))
        if config.pairwise:
            first = next(iter(systems))
            preference = answer_scorers.preference_scorer(critic, first, with_reference=reference)
    if config.rubric:
        rubric = Rubric.load(config.rubric)
        judge = config.lazy_judge(state.device, rubric)
        scorers.append(answer_scorers.rubric_scorer(judge, rubric, with_reference=reference))
    if config.rubric or config.critic_typed:
        questions.check_one_image()
    summary = compare(
        systems,
        questions,
        scorers,
        config.output_dir,
        preference=preference,
        about={"dataset": str(config.dataset_name), "split": config.dataset_test_split},
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        tie=config.tie,
        device=state.device,
    )
    if state.is_main_process:
        report = write_reports(config.output_dir, summary, questions, shown=config.shown)
        Console().print(terminal_table(summary), *warnings_of(summary), f"\n{report}", sep="\n")


if __name__ == "__main__":
    run(main, CompareVlmConfig)
