"""Files of options: what is no YAML, what is too much of it, and values of other types than their options."""

from collections.abc import Callable, Iterator
from pathlib import Path

from damage import SPECIAL, special
from trial import Trial
from world import World

from inputs.flags import config_class
from prefopt import cli

PROGRAM = "diffusion_dpo"


def bomb(levels: int, width: int, kind: str) -> str:
    """Aliases of aliases: a small file that stands for width ** levels values."""
    alias = {"lists": "[{}]", "mappings": "{{{}}}"}[kind]
    lines = ["a0: &a0 [x, x]"] if kind == "lists" else ["a0: &a0 {x: 1}"]
    for level in range(1, levels):
        parts = [f"*a{level - 1}" if kind == "lists" else f"k{k}: *a{level - 1}" for k in range(width)]
        lines.append(f"a{level}: &a{level} {alias.format(', '.join(parts))}")
    return "\n".join(lines) + "\n"


# What no reader of YAML here takes, with what the error says beside the file's name.
BROKEN: dict[str, tuple[bytes | str, str]] = {
    "brackets, 3,000": ("max_steps: " + "[" * 3000, "deep"),
    "brackets that close": ("max_steps: " + "[" * 3000 + "]" * 3000, "deep"),
    "braces, 3,000": ("{a: " * 3000, "deep"),
    "dashes, 3,000": ("- " * 3000, "deep"),
    "a bomb of lists": (bomb(20, 9, "lists"), "alias"),
    "a bomb of mappings": (bomb(20, 9, "mappings"), "alias"),
    "a bomb of two": (bomb(28, 2, "lists"), "alias|deep"),
    "an alias of itself": ("max_steps: &a [*a]", "alias"),
    "an unknown alias": ("max_steps: *a", "alias"),
    "a key twice": ("max_steps: 1\nseed: 2\nmax_steps: 3\n", "max_steps.*line 1.*line 3"),
    "a key twice, in a mapping": ("lr_scheduler_kwargs: {a: 1, a: 2}", "'a'.*line 1"),
    "a list as key": ("? [a]\n: b", "key"),
    "an object": ("max_steps: !!python/object/apply:os.system [ls]", "python/object"),
    "a name of Python": ("max_steps: !!python/name:os.system", "python/name"),
    "an unknown tag": ("max_steps: !steps 3", "!steps"),
    "a tag of a number": ("max_steps: !!int foo", "!!int"),
    "a tag of a time": ("max_steps: !!timestamp foo", "!!timestamp"),
    "binary": ("max_steps: !!binary '%'", "!!binary"),
    "two documents": ("max_steps: 1\n---\nmax_steps: 2\n", "document"),
    "a tab": ("max_steps:\n\t- 1\n", "line 2"),
    "an open quote": ('max_steps: "1\n', "line"),
    "an open bracket": ("max_steps: [1\n", "line"),
    "no space": ("max_steps:1\nseed: 2\n", "line"),
    "NUL": ("max_steps: 1\0\n", "characters"),
    "control characters": ("max_steps: \x07\n", "characters"),
    "a surrogate": (b"max_steps: \xed\xa0\x80\n", "UTF-8"),
    "Latin-1": ("output_dir: f\xfcr\n".encode("latin-1"), "UTF-8"),
    "UTF-16": ("max_steps: 1\n".encode("utf-16"), "UTF-8"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "UTF-8"),
    "version 3": ("%YAML 3.0\n---\nmax_steps: 1\n", "version"),
    "two million lines": ("# nothing\n" * 2_000_000, "larger"),
    "a number of 5,000 digits": ("max_steps: " + "9" * 5000, "digits"),
}
# What is no mapping of options.
NO_OPTIONS: dict[str, tuple[str, str]] = {
    "empty": ("", "empty"),
    "comments alone": ("# nothing\n", "empty"),
    "a list": ("- max_steps: 1\n", "list"),
    "text": ("max_steps\n", "str"),
    "a number": ("7\n", "int"),
    "null": ("null\n", "empty"),
    "an unknown option": ("max_step: 1\n", "max_step.*did you mean max_steps"),
    "an unknown option far from any": ("xyzzy: 1\n", "xyzzy"),
    "a number as option": ("7: 1\n", "7"),
    "true as option": ("true: 1\n", "True"),
    "null as option": ("null: 1\n", "None"),
    "a long option": (f"{'x' * 900}: 1\n", "xxx"),
    "dashes before it": ("--max_steps: 1\n", "--max_steps.*max_steps"),
    "a hyphen": ("max-steps: 1\n", "max-steps.*max_steps"),
    "env": ("env: {LD_PRELOAD: x}\n", "env"),
    "config": ("config: other.yaml\n", "config"),
    "help": ("help: true\n", "help"),
    "merge": ("<<: {max_steps: 1}\n", "<<"),
}
# Options that take other values, and ones that they take.
REFUSED = {
    "max_steps": (
        "[1, 2]",
        "{a: 1}",
        "2001-01-01",
        "true",
        "many",
        "",
        "null",
        "1.5",
        "0",
        "[]",
        "'1 2'",
    ),
    "learning_rate": ("[1e-4]", "{a: 1}", "true", ".nan", ".inf", "-1", "1e-4x", "2001-01-01", "0"),
    "loss_type": ("7", "true", "[dpo]", "ppo", "''", "null"),
    "output_dir": ("7", "~", "true", "[a]", "''", '"a\\0b"', "null", "1.10"),
    "dataset_revision": ("1234567", "1e5", "true", "[a]", "{a: b}"),
    "use_peft": ("7", "perhaps", "[true]", "null", "''"),
    "bf16": ("2", "[]", "{}"),
    "timestep_range": ("[0, [1]]", "[0, {a: 1}]", "[true, 1]", "[0, x]", "0", "[0, null]", "[]", "[1, 0]"),
    "lora_target_modules": ("[7]", "[null]", "[[a]]", "{a: b}", "['']"),
    "report_to": ("7", "[7]", "nothing", "[nothing]", "{a: b}"),
    "lr_scheduler_kwargs": ("7", "[1]", "{a: 1}", "text", "true"),
    "accelerator_config": ("7", "{a: 1}", "[1]"),
    "seed": ("-1", "'-1'", "4294967296", "0x10", "1e3", "on"),
    "resume_from_checkpoint": ("true", "7", "[a]"),
    "dtype": ("16", "float8", "null", "[float32]"),
}
TAKEN = {
    "max_steps": ("7", "'7'", "1_000"),
    "learning_rate": ("1e-4", "1.0e-04", "2", "null", ".5", "'1e-4'"),
    "loss_type": ("ipo", "'ipo'", '"hinge"'),
    "output_dir": ("runs/x", "no", "012", "1:30", "2024-01-01", "'7'"),
    "use_peft": ("true", "yes", "'true'", "1"),
    "timestep_range": ("[0, 1]", "[0.1, 0.5]", "&a [0, 1]"),
    "lora_target_modules": ("to_q", "[to_q, to_k]", "null"),
    "report_to": ("none", "[none]", "[]", "null"),
    "lr_scheduler_kwargs": ("null", "{}", "'{}'"),
    "accelerator_config": ("{non_blocking: true}",),
    "eval_strategy": ("no", "'no'"),
    "save_total_limit": ("null", "1"),
}


def trials(world: World) -> Iterator[Trial]:
    """Every trial of this table."""
    for name, (content, says) in {**BROKEN, **NO_OPTIONS}.items():
        yield Trial(name, _with_file(content), ("options.yaml", says))
    for option, values in REFUSED.items():
        for value in values:
            yield Trial(f"{option}: {value}", _with_file(f"{option}: {value}\n"), (option,))
    for option, values in TAKEN.items():
        for value in values:
            yield Trial(f"{option}: {value} is taken", _with_file(f"{option}: {value}\n"))
    yield Trial("a byte order mark", _with_file("\ufeffmax_steps: 1\n"))
    yield Trial("CRLF", _with_file("max_steps: 1\r\nseed: 2\r\n"))
    for kind in SPECIAL:
        yield Trial(kind, _special(kind), ("options.yaml|/dev/zero",))


def _with_file(content: bytes | str) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        file = folder / "options.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        given = [] if b"output_dir" in file.read_bytes() else ["--output_dir", str(folder / "run")]
        return cli.parse(config_class(PROGRAM), ["--config", str(file), *given])

    return act


def _special(kind: str) -> Callable[[Path], object]:
    def act(folder: Path) -> object:
        file = special(folder / "options.yaml", kind)
        return cli.parse(config_class(PROGRAM), ["--config", str(file)])

    return act
