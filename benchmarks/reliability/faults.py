"""Every promise of docs/reliability.md with the tests that prove it: runs them, counts the cases, writes the table.

    python -m benchmarks.reliability.faults --write

Two hundred faults are put in (`--faults N`); minutes on two cores.
`--junit FILE` takes the results of a run of pytest that has been (`./check --junitxml FILE`) instead of a new one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: python -m benchmarks.reliability.faults --write -->\n", "<!-- end of the table -->\n"


class Promise(NamedTuple):
    what: str
    happens: str
    tests: tuple[str, ...]
    """`file` for all of its tests, `file::name` for one with all its cases, `file::name[case` for some of them."""


class Proof(NamedTuple):
    cases: int
    passed: int
    skipped: Counter[str]
    """How many for which reason."""


PROMISES = (
    Promise(
        "1, 2 and 4 processes; two agents with two addresses",
        "loss, all gradients, moments and BatchNorm statistics over four steps, and a run of ten steps, equal "
        "those of one process: to 1e-9 in float64; in float32 the loss to 1e-5 over three steps, gradients to 2e-3 "
        "over four; an uneven split, or images that differ from the first process's, is an error in one sentence",
        ("runtime/test_processes",),
    ),
    Promise(
        "one of two processes is killed at any moment, or goes silent",
        "on CPUs (gloo) the other reports it and ends, at once or within ten minutes; NCCL ends it with a message of "
        "its own; resumed with two processes, the run ends bitwise equal to one that never stopped",
        (
            "training/test_faults::test_nothing_is_lost[lost_rank",
            "runtime/test_processes::test_a_silent_process_is_reported_in_time",
        ),
    ),
    Promise(
        "`CorInfoMaxLoss` in a plain DistributedDataParallel loop and in a LightningModule, two processes",
        "the weights after three steps are those of one process with the whole batch, to 1e-9",
        ("objective/test_loops",),
    ),
    Promise(
        "a SLURM script",
        "it trains when `srun` starts it (a stand-in here); when its time is nearly up, it returns to the queue and "
        "resumes",
        ("examples/test_slurm",),
    ),
    Promise(
        "micro-batches",
        "the gradient is that of the whole batch; BatchNorm sees the parts, and updates its statistics once a part",
        ("training/test_micro_batch",),
    ),
    Promise(
        "`kill -9` at any moment, up to three times: in a step, a diagnosis, between rows, inside a checkpoint's "
        "bytes, before the first checkpoint",
        "`pretrain --resume RUN` ends bitwise equal to a run that never stopped: weights, moments, optimiser, and "
        "every line of `metrics.jsonl` except its `seconds` (CPU, same number of processes, no `--compile`)",
        (
            "training/test_faults::test_nothing_is_lost[killed",
            "training/test_loop::test_a_resumed_run_ends_as_if_it_had_never_stopped",
        ),
    ),
    Promise(
        "Ctrl-C, SIGTERM or SIGHUP at any moment",
        "the current step ends, a checkpoint is saved and the command to resume is printed; the resumed run ends "
        "bitwise equal to one that never stopped; under torchrun the processes agree about once a second",
        (
            "training/test_faults::test_nothing_is_lost[stopped",
            "training/test_signals",
            "training/test_loop::test_a_signal_to_the_command_leaves_a_run_that_goes_on",
            "training/test_loop::test_signal_handlers_are_put_back",
            "checkup/test_doctor::test_ctrl_c_leaves_no_list",
            "images/test_decode::test_ctrl_c_is_for_the_program_alone",
        ),
    ),
    Promise(
        "a torn or truncated checkpoint, one with a flipped bit, truncated metrics; a pickle",
        "a checksum detects it; the file is named and the previous checkpoint is used; a pickle is refused, never "
        "loaded",
        (
            "training/test_faults::test_nothing_is_lost[torn",
            "weights/test_checkpoint",
            "training/test_limits::test_the_end_of_the_metrics_that_was_never_written_is_left_out",
            "training/test_limits::test_a_line_of_the_metrics_that_is_damaged_is_named",
        ),
    ),
    Promise(
        "a loss, gradient or weight that is not finite",
        "the run stops within `--log-steps` steps and reports the step, the terms, the smallest eigenvalue and the "
        "first bad layer; `failed-step-N.safetensors` holds the batch and the state before that step; no such weights "
        "are saved",
        (
            "training/test_faults::test_nothing_is_lost[not_a_number",
            "training/test_failure",
            "training/test_step::test_weights_that_are_no_numbers_are_never_saved",
            "training/test_loop::test_a_loss_that_is_no_number_stops_the_run_with_its_parts",
            "training/test_loop::test_a_run_that_diverges_says_where_and_what_to_do",
        ),
    ),
    Promise(
        "a gradient that is too long",
        "`--optim.clip 1` limits its norm; every row holds `gradient_norm`, clipped or not",
        (
            "training/test_optimizer::test_clipping_is_torchs_and_gives_the_norm_before_it",
            "training/test_step::test_clipping_in_the_loop_and_its_norm_in_the_metrics",
        ),
    ),
    Promise(
        "a float16 gradient overflows",
        "the update is skipped and the scale halved; checkpoints hold the scale; below 1 the run stops",
        (
            "training/test_step::test_a_float16_run_resumes_bitwise_with_its_scale",
            "training/test_step::test_the_scale_changes_nothing_but_what_overflows",
            "training/test_step::test_lower_precision_trains_on_cuda",
        ),
    ),
    Promise(
        "identical rows, tiny or huge norms, D > N, float16 and bfloat16",
        "loss and gradient stay finite, within the format's rounding of float64",
        (
            "objective/test_covariance::test_degenerate_input_stays_finite",
            "objective/test_covariance::test_half_precision_input_gives_the_loss_of_the_same_numbers_in_float64",
            "objective/test_covariance::test_autocast_leaves_the_loss_in_float64",
        ),
    ),
    Promise(
        "a full disk; a read-only folder; images that vanish or change; a run folder in use",
        "an error in one sentence, and the last checkpoint stays whole; decoded images stay mapped; changed images "
        "and a folder in use are refused before anything is touched",
        (
            "training/test_faults::test_nothing_is_lost[full",
            "training/test_limits",
            "cli/test_cli::test_where_the_run_goes_is_known_before_images_are_decoded",
            "cli/test_cli::test_a_run_folder_in_use_is_refused",
            "cli/test_cli::test_a_run_folder_in_use_is_not_written_over",
            "cli/test_cli::test_other_images_do_not_resume_a_run",
            "cli/test_cli::test_a_run_goes_on_where_its_images_moved_to",
        ),
    ),
    Promise(
        "a decoding process is killed or cannot start; the program is killed while decoding",
        "an error in one sentence; threads decode instead; no process is left behind",
        ("training/test_faults::test_nothing_is_lost[lost_worker", "images/test_decode"),
    ),
    Promise(
        "some images are damaged",
        "up to 1 % are counted and left out, as with `--skip`; more are an error in one sentence",
        ("training/test_faults::test_nothing_is_lost[unreadable",),
    ),
    Promise(
        "arbitrary bytes or words in image files, lists, recipes, checkpoints, weights, metrics and on the command "
        "line",
        "a clear error or a correct result (hypothesis, 150 examples a test, 60 for the command line; `FUZZ=long` "
        "3,000)",
        ("images/test_fuzz",),
    ),
    Promise(
        "`doctor` on unreadable files, copies, leaks between splits, odd images, decompression bombs",
        "each is named and put on a list for `--skip`; memory stays bounded",
        ("checkup/test_doctor",),
    ),
)


def prove(results: Path) -> dict[Promise, Proof]:
    """What a junit file says of each promise. ValueError for a promise whose test is not in it."""
    cases = []
    for case in ElementTree.parse(results).iter("testcase"):
        file, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        failed = case.find("failure") is not None or case.find("error") is not None
        skip = case.find("skipped")
        state = "failed" if failed else "passed" if skip is None else skip.get("message", "skipped")
        cases.append((file, f"{file}::{name.partition('[')[0]}", f"{file}::{name}", state))
    proofs = {}
    for promise in PROMISES:
        states: list[str] = []
        for test in promise.tests:
            some = "[" in test
            found = [state for *names, case, state in cases if (case.startswith(test) if some else test in names)]
            if not found:
                raise ValueError(f"no result of {test}, which is to prove: {promise.what}")
            states += found
        skipped = Counter(state for state in states if state not in ("passed", "failed"))
        proofs[promise] = Proof(len(states), states.count("passed"), skipped)
    return proofs


def table(proofs: dict[Promise, Proof]) -> str:
    """The promises as rows of Markdown."""
    lines = ["| what | what happens | proved by | cases | result |", "|---|---|---|---:|---|"]
    for promise, proof in proofs.items():
        files: dict[str, int] = {}
        for test in promise.tests:
            files[test.partition("::")[0]] = 0
        failed = proof.cases - proof.passed - proof.skipped.total()
        result = [f"{proof.passed} passed"]
        result += [f"**{failed} failed**"] * bool(failed)
        result += [f"{count} skipped: {reason}" for reason, count in proof.skipped.items()]
        by = ", ".join(f"`{file}.py`" for file in files)
        lines.append(f"| {promise.what} | {promise.happens} | {by} | {proof.cases} | {'; '.join(result)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--junit", type=Path, default=None, help="results of a run of pytest that has been")
    parser.add_argument("--faults", type=int, default=200, help="how many faults to put into runs")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        results = options.junit
        if results is None:
            results = Path(folder, "results.xml")
            files = sorted({f"tests/{test.partition('::')[0]}.py" for promise in PROMISES for test in promise.tests})
            words = [sys.executable, "-m", "pytest", "-q", "--junitxml", str(results), "--faults", str(options.faults)]
            words += ["--numprocesses", "logical", "--maxprocesses", "8", "--dist", "worksteal", *files]
            alone = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(words, cwd=PAGE.parents[1], env=alone, check=False)
        proofs = prove(results)
    made = table(proofs)
    if options.write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2], "utf-8")
    else:
        print(made, end="")
    return int(any(proof.passed + proof.skipped.total() < proof.cases for proof in proofs.values()))


if __name__ == "__main__":
    raise SystemExit(main())
