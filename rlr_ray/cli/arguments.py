"""Arguments of all commands. Imports nothing heavy, so that `--help`, and what is mistyped, answer at once."""

from __future__ import annotations

import argparse
from pathlib import Path

ASKED = {  # what `init` asks for, and in which words
    "model": "model (a folder with a diffusers pipeline, OWNER/NAME on the hub, or digits)",
    "reward": "reward (one of docs/rewards.md, e.g. imagereward, or your own as file.py:function)",
    "prompts": "prompts (a file, a shipped list such as animals, or [one, another])",
}
LAB_COST = 20_000.0  # denoiser forwards a plan
_RUN = "a finished run: its name under output_dir, or its folder"
_RUNS = "a run or a search, by its name under output_dir or its folder, or a folder of runs"
_PROMPTS = "a file or a shipped list (default: the held-out prompts of the recipe)"


def _add_set(parser: argparse.ArgumentParser, words: str = "override a key of the recipe") -> None:
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=words)


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    for name, words in ASKED.items():
        parser.add_argument(f"--{name}", help=words)
    parser.set_defaults(command="init:init_command", json=True)  # standard output is the recipe, messages go beside it


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="a YAML recipe, e.g. configs/digits.yaml")
    _add_set(parser)
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with the run of this name, or with RUN, a name under output_dir or a folder, by its own recipe",
    )
    earlier.add_argument(
        "--resume-or-start", action="store_true", help="the same if there is such a run, else start it"
    )
    earlier.add_argument("--overwrite", action="store_true", help="delete the run of this name and start again")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with prompts, reward modules or weights that have changed; the base model is measured again",
    )
    parser.add_argument("--dry-run", action="store_true", help="check the recipe, print plan, cost and sizes, and stop")
    parser.set_defaults(command="train:train_command", again="nothing was begun; the same command begins again")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    parser.add_argument("--config", metavar="RECIPE", help="instead of the first run's own")
    _add_set(parser)
    parser.add_argument("--prompts", metavar="SOURCE", help=_PROMPTS)
    parser.add_argument("--chains", type=int, metavar="N", help="of each model (default: evaluation.chains)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the held-out chains of a run with seed N (default: chains of no run)"
    )
    parser.add_argument(
        "--reward", action="append", default=[], metavar="LABEL[={KEYS}]", help="one more score, as under `rewards`"
    )
    parser.add_argument("--level", type=float, default=0.95, help="of the confidence intervals (default 0.95)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the results (default: evaluate in the first run)"
    )
    parser.add_argument(
        "--vbench", type=Path, metavar="FOLDER", help="leave all videos there for VBench; or show the results it left"
    )
    parser.set_defaults(command="evaluate:evaluate_command")


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help=_RUN)
    parser.add_argument("--config", metavar="RECIPE", help="instead of a run: the base model of this recipe")
    _add_set(parser)
    parser.add_argument("--prompts", metavar="SOURCE", help=_PROMPTS)
    parser.add_argument("--count", type=int, default=1, metavar="N", help="pictures of each prompt (default 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="other pictures (default: the recipe's held-out chains)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the pictures (default: sample, in the run)")
    parser.set_defaults(command="evaluate:sample_command")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("--fuse", required=True, type=Path, metavar="FOLDER", help="of the pipeline; a new one")
    _add_set(parser, "override a key of the run's recipe, e.g. model.dtype=float32, in which it is then saved")
    parser.set_defaults(command="export:export_command", prompts=None, seed=None)


def add_push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="a repository that is made is seen by nobody else")
    _add_set(parser, "output_dir=FOLDER")
    parser.set_defaults(command="push:push_command")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUNS)
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html, of several runs in output_dir)")
    _add_set(parser, "output_dir=FOLDER")
    parser.set_defaults(command="report:report_command")


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{_RUNS} (default: all of output_dir)")
    parser.add_argument("--port", type=int, default=8765, help="of 127.0.0.1; 0 takes any that is free (default 8765)")
    _add_set(parser, "output_dir=FOLDER")
    parser.set_defaults(command="watch:watch_command", again="runs go on; the same command follows them again")


def add_lab_arguments(parser: argparse.ArgumentParser) -> None:
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--config", help="a YAML recipe: its model, reward and prompts are measured")
    subject.add_argument("--model", choices=["toy"], help="toy: the unbiasedness certificate on an analytic chain")
    _add_set(parser)
    parser.add_argument("--at", metavar="CHECKPOINT", help="measure where this checkpoint of a run stands")
    parser.add_argument(
        "--plan", action="append", default=[], metavar="NAME={KEYS}", help="a plan to measure, as keys of `estimator`"
    )
    parser.add_argument("--only", action="store_true", help="the plans of --plan alone, without the usual ones")
    parser.add_argument("--cost", type=float, help=f"denoiser forwards a plan (default {LAB_COST:g})")
    parser.add_argument("--batches", type=int, help="of the reference (default 240 for toy, else 40)")
    parser.add_argument("--out", type=Path, default=Path("lab"), help="folder of lab.json, lab.parquet and lab.png")
    parser.add_argument("--json", action="store_true", help="write no table, but lab.json to the terminal")
    parser.set_defaults(command="lab:lab_command")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML recipe")
    _add_set(parser)
    parser.add_argument("--memory-budget-gib", type=float, metavar="GIB", help="as --set memory_budget_gib=GIB")
    parser.add_argument("--batches", type=int, help="for the variances (default: half a minute's, 64 at most)")
    parser.add_argument("--out", type=Path, default=Path("plan"), help="folder of plan.yaml and plan.json")
    parser.set_defaults(command="plan:plan_command")


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a search, e.g. tune_configs/digits.yaml")
    _add_set(parser, "override a key of the search")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="go on with the search of this name")
    earlier.add_argument("--overwrite", action="store_true", help="delete the search of this name and start again")
    again = "with --resume (in place of --overwrite) the same command goes on with the search"
    parser.set_defaults(command="tune:tune_command", again=again)


def add_dcot_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_expand(commands.add_parser("expand", help="write a coarse, a mid and a fine prompt for each plain one"))
    _add_locate(commands.add_parser("locate", help="measure which range of steps loses the reward"))


def _add_expand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", required=True, help="a file of plain prompts: .txt, .jsonl, .csv or .parquet")
    parser.add_argument("--out", required=True, type=Path, help="the prompts file to write, or to go on with: .jsonl")
    template = "in which {prompt} stands (default: docs/dcot.md)"
    parser.add_argument("--template", nargs="+", default=[], metavar="STAGE=TEXT", help=template)
    parser.add_argument("--endpoint", metavar="URL", help="ask a language model at URL/chat/completions (OpenAI's API)")
    parser.add_argument("--model", metavar="NAME", help="of the endpoint")
    parser.add_argument("--api-key-env", metavar="VAR", help="environment variable that holds the endpoint's key")
    parser.set_defaults(command="dcot:expand_command", again="the same command goes on with what is left")


def _add_locate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML recipe: its model, reward and prompts are measured")
    _add_set(parser)
    parser.add_argument("--at", metavar="CHECKPOINT", help="measure where this checkpoint of a run stands")
    parser.add_argument("--batches", type=int, default=8, help="of chains (default 8)")
    parser.add_argument("--length", type=int, help="steps of a range whose end is not seen (default: a fifth of all)")
    parser.add_argument("--out", type=Path, default=Path("locate"), help="folder of locate.json")
    parser.set_defaults(command="dcot:locate_command")


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="a YAML recipe")
    _add_set(parser)
    parser.set_defaults(command="doctor:doctor_command")
