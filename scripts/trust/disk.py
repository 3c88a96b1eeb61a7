"""Let the disk fail under a training, a builder and a comparison, and run the same command again.

    python scripts/trust/disk.py
    python scripts/trust/disk.py --only diffusion_dpo --writes 40 --seed 1

Writes: of the changes of the output folder, --writes that lie spread over the run fail, each in a run of its
own: with a full disk (from then on every write fails), a quota or a broken disk (once). Disks: a small one
that is full (tmpfs), one that is read-only, a folder that vanishes in mid-run, a file in place of the folder.

Each time the program has to end with exit code 2 and one clear message with the advice for what happened. The
same command, once the disk is well, has to end with results bit-identical to the undisturbed run's. The exit
code is 1 if any of this fails. Two of the disks need the right to mount; without it they are skipped.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from faults import FULL, ONCE, STOP, Plan, planning
from smallest import PROGRAMS, Workplace, contents, differing

from prefopt.programs import BAD_INPUT

SECONDS = 900
CHOSEN = ("diffusion_dpo", "text_to_image_pairs", "compare_text_to_image")
# What the advice has to say of each error; torch and SQLite do not tell all of them apart.
ADVICE = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EIO: "Check the disk",
    errno.EROFS: "read-only",
    errno.ENOENT: "removed",
    errno.ENOTDIR: "a file",
}
HIDDEN, ANY = ("inline_container", "disk I/O error"), "full, broken or read-only"


@dataclass
class Failure:
    """A program on a disk that failed, and run again on one that is well."""

    program: str
    disk: str  # how it failed
    code: int = 0
    said: str = ""
    faults: list[str] = field(default_factory=list)


def failed(place: Workplace, name: str, disk: str, advice: str, code: int, text: str) -> Failure:
    """What is wrong with how a program ended."""
    lines = text.splitlines()
    said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    found = Failure(name, disk, code, said.replace(f"{place.folder}/", ""))
    if code != BAD_INPUT:
        found.faults.append(f"exit code {code}")
    if "Traceback" in text:
        found.faults.append(f"a traceback:\n{text[-2500:]}")
    elif not said or not lines[-1].startswith("error: ") or len(said) > 1000:
        found.faults.append(f"no clear message at its end:\n{text[-1500:]}")
    elif (ANY if any(part in said for part in HIDDEN) else advice) not in said:
        found.faults.append(f"no {advice!r} in: {said}")
    return found


def run_again(place: Workplace, name: str, whole: dict[str, str], found: Failure) -> Failure:
    """The same command on a disk that is well; what of its results is not the undisturbed run's."""
    running = place.launch(name)
    if running.wait(SECONDS):
        found.faults.append(f"the same command again:\n{running.text()[-2500:]}")
    elif other := differing(whole, contents(place.run(name))):
        found.faults.append(f"results that differ: {', '.join(other)}")
    return found


def failing_writes(place: Workplace, plan: Plan, name: str, count: int, seed: int) -> Iterator[Failure]:
    """A program with one change of its folder failing, at moments spread over the run."""
    chance = random.Random(f"{seed} {name}")
    changes = undisturbed(place, plan, name)[1]
    whole = undisturbed(place, plan, name)[0]
    kinds = [(FULL, errno.ENOSPC), (ONCE, errno.EIO), (FULL, errno.ENOSPC), (ONCE, errno.EDQUOT)]
    for number in range(count):
        mode, error = kinds[number % len(kinds)]
        at = 1 + int((number + chance.random()) * changes / count)
        place.empty(name)
        plan.arm(place.run(name), mode, at, error=error, removals=False)
        running = place.launch(name)
        code = running.wait(SECONDS)
        plan_said, hit = plan.moment(place.run(name)), plan.hit
        plan.disarm()
        disk = f"{errno.errorcode[error]} {plan_said}"
        if not hit or code == 0:  # the run made fewer changes, or can do without this one
            found = Failure(name, f"{disk or 'no change'}: went on", code)
            other = differing(whole, contents(place.run(name)))
            found.faults += [f"ended well, and differs: {', '.join(other)}"] if other else []
            yield found
            continue
        found = failed(place, name, disk, ADVICE[error], code, running.text())
        yield run_again(place, name, whole, found)


def undisturbed(place: Workplace, plan: Plan, name: str) -> tuple[dict[str, str], int]:
    """Of a program's whole run: its files, and the changes of its folder but for removals."""
    facts = place.whole / f"{name}-disk.json"
    if not facts.exists():
        for source in place.sources(name):
            place.make_whole(source)
        plan.arm(place.run(name), removals=False)
        shutil.rmtree(place.whole / name, ignore_errors=True)
        facts.write_text(json.dumps([contents(place.make_whole(name)), plan.calls]))
        plan.disarm()
    return json.loads(facts.read_text())


# Disks


def full_disk(place: Workplace, plan: Plan, name: str) -> Failure:
    """A small disk with room for half of what a program writes; then it grows."""
    whole, _ = undisturbed(place, plan, name)
    size = sum(path.stat().st_size for path in (place.whole / name).rglob("*") if path.is_file())
    with mounted(place.run(name).parent, size // 2):
        code, text = launched(place, name)
        found = failed(place, name, f"tmpfs of {size // 2048} KB", ADVICE[errno.ENOSPC], code, text)
        remount(place.run(name).parent, "size=1g")
        return run_again(place, name, whole, found)


def read_only_disk(place: Workplace, plan: Plan, name: str) -> Failure:
    """A disk that is read-only; then it is not."""
    whole, _ = undisturbed(place, plan, name)
    with mounted(place.run(name).parent, 2**30):
        remount(place.run(name).parent, "ro")
        code, text = launched(place, name)
        remount(place.run(name).parent, "rw")
        found = failed(place, name, "read-only", ADVICE[errno.EROFS], code, text)
        return run_again(place, name, whole, found)


def read_only_in_mid_run(place: Workplace, plan: Plan, name: str) -> Failure:
    """A disk that becomes read-only, as some do after an error."""
    whole, changes = undisturbed(place, plan, name)
    place.empty(name)
    plan.arm(place.run(name), FULL, changes // 2, error=errno.EROFS, removals=False)
    code, text = launched(place, name)
    plan.disarm()
    found = failed(place, name, "read-only in mid-run", ADVICE[errno.EROFS], code, text)
    return run_again(place, name, whole, found)


def vanished_folder(place: Workplace, plan: Plan, name: str) -> Failure:
    """Someone removes the folder in mid-run."""
    whole, changes = undisturbed(place, plan, name)
    place.empty(name)
    plan.arm(place.run(name), STOP, changes // 2, removals=False)
    running = place.launch(name)
    running.wait_until(lambda: bool(plan.hit), SECONDS)
    shutil.rmtree(place.run(name))
    plan.disarm()
    os.killpg(running.process.pid, signal.SIGCONT)
    found = failed(
        place, name, "removed in mid-run", ADVICE[errno.ENOENT], running.wait(SECONDS), running.text()
    )
    return run_again(place, name, whole, found)


def file_in_its_place(place: Workplace, plan: Plan, name: str) -> Failure:
    """--output_dir names a file."""
    whole, _ = undisturbed(place, plan, name)
    place.empty(name)
    place.run(name).parent.mkdir(exist_ok=True)
    place.run(name).write_text("mine")
    code, text = launched(place, name)
    found = failed(place, name, "a file in its place", ADVICE[errno.ENOTDIR], code, text)
    if not place.run(name).is_file():
        found.faults.append("the file is gone")
    place.run(name).unlink(missing_ok=True)
    return run_again(place, name, whole, found)


DISKS = (full_disk, read_only_disk, read_only_in_mid_run, vanished_folder, file_in_its_place)


def launched(place: Workplace, name: str) -> tuple[int, str]:
    """The exit code of a program, and what it printed."""
    running = place.launch(name)
    return running.wait(SECONDS), running.text()


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A tmpfs of so many bytes over a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "prefopt", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a process may still be at its end


def remount(folder: Path, options: str) -> None:
    """Change a mounted disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount here."""
    try:
        with mounted(folder, 2**20):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def main() -> int:
    """The command line; 1 if anything is at fault."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    options.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(CHOSEN), help="programs")
    options.add_argument("--writes", type=int, default=20, help="failing writes of each program")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--folder", type=Path, help="where programs run and what is whole stays")
    options.add_argument("--json", type=Path, help="a file to write the results to")
    given = options.parse_args()
    from prefopt.runs import versions

    results: list[Failure] = []
    with tempfile.TemporaryDirectory(prefix="prefopt-disk-") as folder, planning(Path(folder)) as plan:
        place = Workplace(given.folder or Path(folder))
        disks = [disk for disk in DISKS if disk not in (full_disk, read_only_disk)]
        if can_mount(place.folder / "run"):
            disks = list(DISKS)
        else:
            print("no disks can be mounted here: the full and the read-only one are skipped")
        for name in given.only:
            for found in failing_writes(place, plan, name, given.writes, given.seed):
                results.append(show(found))
            for disk in disks:
                results.append(show(disk(place, plan, name)))
            if given.json:
                facts = {"seed": given.seed, "failures": [asdict(one) for one in results]}
                given.json.write_text(json.dumps(facts | {"versions": versions()}, indent=2) + "\n")
    counts = Counter((one.program, "at fault" if one.faults else "right") for one in results)
    for name in given.only:
        print(f"{name:24} {counts[name, 'right']:4} right {counts[name, 'at fault']:4} at fault")
    return int(any(one.faults for one in results))


def show(found: Failure) -> Failure:
    """Print a line about a failure, and its faults."""
    print(f"{'FAULT' if found.faults else 'right':5} {found.program:22} {found.disk}", flush=True)
    for fault in found.faults:
        print("    " + fault.replace("\n", "\n    "), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
