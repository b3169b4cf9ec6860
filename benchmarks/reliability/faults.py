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
        "loss, every gradient, moments and BatchNorm's statistics over four steps, and a run of twenty, are those of "
        "one process: 1e-9 in float64; in float32 the loss to 1e-5 over three steps, gradients to 2e-3 over four; an "
        "uneven split, or other images than the first one's, is one sentence",
        ("runtime/test_processes",),
    ),
    Promise(
        "of two processes one is killed, at any moment; one goes silent",
        "the other says so and ends, at once or within ten minutes; two go on and end bitwise as if nothing had been",
        (
            "training/test_faults::test_nothing_is_lost[lost_rank",
            "runtime/test_processes::test_a_process_that_goes_silent_is_a_sentence_in_time",
        ),
    ),
    Promise(
        "`CorInfoMaxLoss` in a plain DistributedDataParallel loop and in a LightningModule, two processes",
        "the weights after three steps are those of one process with the whole batch, to 1e-9",
        ("objective/test_loops",),
    ),
    Promise(
        "a SLURM script",
        "the command word by word; it trains where `srun` starts it (a stand-in here); told that its time is up, it "
        "goes back into the queue and on from there",
        ("cli/test_slurm",),
    ),
    Promise(
        "micro-batches",
        "the whole batch's gradient; BatchNorm sees parts, and its statistics move once for each",
        ("training/test_micro_batch",),
    ),
    Promise(
        "`kill -9` at any moment, once or up to three times: in a step, a look, between rows, in the middle of a "
        "checkpoint's bytes, before the first one",
        "`pretrain --resume RUN` ends bitwise as a run never stopped: weights, moments, optimiser, every line of "
        "`metrics.jsonl` but its `seconds` (CPU, same number of processes, without `--compile`)",
        (
            "training/test_faults::test_nothing_is_lost[killed",
            "training/test_loop::test_a_resumed_run_ends_as_if_it_had_never_stopped",
        ),
    ),
    Promise(
        "Ctrl-C, SIGTERM, at any moment",
        "a checkpoint after the step under way, and the command to go on, which ends bitwise as a run never stopped; "
        "under torchrun the processes agree about once a second",
        (
            "training/test_faults::test_nothing_is_lost[stopped",
            "training/test_signals",
            "training/test_loop::test_a_signal_to_the_command_leaves_a_run_that_goes_on",
            "training/test_loop::test_signal_handlers_are_put_back",
            "doctor/test_doctor::test_ctrl_c_is_a_word_and_leaves_nothing",
            "images/test_decode::test_ctrl_c_is_for_the_program_alone",
        ),
    ),
    Promise(
        "a checkpoint torn, cut short or with a flipped bit, metrics cut short; a pickle",
        "a checksum tells; it is named and the one before it used; a pickle is refused, not run",
        (
            "training/test_faults::test_nothing_is_lost[torn",
            "weights/test_checkpoint",
            "training/test_limits::test_the_end_of_the_metrics_that_was_never_written_is_left_out",
            "training/test_limits::test_a_line_of_the_metrics_that_is_damaged_is_named",
        ),
    ),
    Promise(
        "loss, gradient or weights not finite",
        "the run stops within `--log-steps` steps and says step, terms, smallest eigenvalue; "
        "`failed-step-N.safetensors` has the batch and all that the step began with, `pretrain --replay FILE` shows "
        "its layers; no such weights are saved",
        (
            "training/test_faults::test_nothing_is_lost[not_a_number",
            "training/test_step::test_a_failure_seen_late_is_kept_as_it_was_before_its_step",
            "training/test_step::test_the_replay_is_the_step_of_the_run",
            "training/test_step::test_a_gradient_that_is_no_number_stops_the_run",
            "training/test_step::test_the_replay_command_names_the_first_layer_that_is_not_finite",
            "training/test_step::test_the_first_module_is_the_one_where_it_begins",
            "training/test_step::test_weights_that_are_no_numbers_are_never_saved",
            "training/test_loop::test_a_loss_that_is_no_number_stops_the_run_with_its_parts",
            "training/test_loop::test_a_run_that_diverges_says_where_and_what_to_do",
        ),
    ),
    Promise(
        "gradients too long",
        "`--optim.clip 1` limits their norm; `gradient_norm` is in every row, clipped or not",
        (
            "training/test_optimizer::test_clipping_is_torchs_and_gives_the_norm_before_it",
            "training/test_step::test_clipping_in_the_loop_and_its_norm_in_the_metrics",
        ),
    ),
    Promise(
        "a float16 gradient overflows",
        "that update is left out, the scale halved; the scale is in the checkpoint; below 1 the run stops",
        (
            "training/test_step::test_a_float16_run_resumes_bitwise_with_its_scale",
            "training/test_step::test_the_scale_changes_nothing_but_what_overflows",
            "training/test_step::test_lower_precision_trains_on_cuda",
        ),
    ),
    Promise(
        "identical rows, tiny or huge norms, D > N, in float16 and bfloat16",
        "loss and gradient stay finite and within the format's rounding of float64",
        (
            "objective/test_covariance::test_degenerate_input_stays_finite",
            "objective/test_covariance::test_half_precision_input_gives_the_loss_of_the_same_numbers_in_float64",
            "objective/test_covariance::test_autocast_leaves_the_loss_in_float64",
        ),
    ),
    Promise(
        "a full disk; a folder that may only be read; images that vanish or change; a run folder in use",
        "one sentence, and the last checkpoint stays whole; decoded images stay mapped; other images and a folder in "
        "use are refused, and nothing is touched",
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
        "a process that decodes is killed, or cannot be had; the program is killed while it decodes",
        "one sentence; threads do it; no process is left behind",
        ("training/test_faults::test_nothing_is_lost[lost_worker", "images/test_decode"),
    ),
    Promise(
        "some images are damaged",
        "few are named and left out, with the result of `--skip`; more than 1 % are a sentence",
        ("training/test_faults::test_nothing_is_lost[unreadable",),
    ),
    Promise(
        "any bytes or words in image files, lists, recipes, checkpoints, weights, metrics and the command line",
        "a clear error or a right result (hypothesis, 150 examples a test, 60 of the command line; `FUZZ=long` 3,000)",
        ("images/test_fuzz",),
    ),
    Promise(
        "`doctor`: unreadable files, copies, leaks between splits, odd images, bombs",
        "each is found by name and put on a list for `--skip`; memory is bounded",
        ("doctor/test_doctor",),
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
