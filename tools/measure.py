"""Train and evaluate everything that docs/results.csv has no rows of yet.

    python tools/measure.py --cifar CIFAR --list    # what is missing, and about how long it takes
    python tools/measure.py --cifar CIFAR           # two processes side by side, one thread each
    python tools/measure.py --cifar CIFAR --only "^(ten|hundred)" --jobs 14 --minutes 8

CIFAR is a folder with CIFAR-10 as JPEG files; docs/results.md says how to make it. Checkpoints and
logs go to --checkpoints. A run whose checkpoint is there is not trained again, a killed one goes on
after its last whole epoch, and what has rows is not evaluated again. `cpu`, the seconds of runs
that have a CPU to themselves, needs --jobs 1, and `resnet18` a GPU. Where there is no git, name the
commit with --commit or in the environment as COMMIT.
"""

import argparse
import csv
import fcntl
import importlib
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2.functional import normalize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402

# The name in results.csv: how many training images, and how many of them have labels.
DATASETS = {
    "Fashion-MNIST": (60_000, 60_000),
    "CIFAR-10 (JPEG)": (50_000, 50_000),
    "CIFAR-10 (JPEG), 20,000 images": (20_000, 1_000),
    "CIFAR-10 (JPEG), 5,000 images": (5_000, 1_000),
    "CIFAR-10 (JPEG), 1,000 images": (1_000, 1_000),
    "Digits": (1_397, 1_397),
}
FASHION, CIFAR, *SMALL, DIGITS = DATASETS


class Evaluation(NamedTuple):
    """What linear_eval.py, or a diff of it, is to do."""

    labels: tuple = (100, 1000, "all")
    flags: str = ""
    script: str = "linear_eval"
    dataset: str = ""  # if another than the one trained on


class Run(NamedTuple):
    """One training, and the evaluations of it."""

    group: str
    name: str  # a script or a diff in docs/variants, and the options that are not the default
    dataset: str
    epochs: int
    seed: int
    evaluations: tuple = (Evaluation(),)
    ranks: bool = False  # also measure how many directions z and h use
    bf16: bool = True

    def __str__(self):
        precision = "" if self.bf16 else ", float32"
        run = f"{self.name}, {self.dataset}, {self.epochs} epochs, seed {self.seed}"
        return f"{self.group}: {run}{precision}"


def all_runs():
    """Yield the runs, the most important first."""
    four = "simclr", "moco", "byol", "simsiam"
    product = itertools.product

    for seed, dataset, name in product(range(3), (CIFAR, FASHION), four):
        yield Run("ten", name, dataset, 10, seed, bf16=False)  # as a CPU does by default
    for dataset, name in product((CIFAR, FASHION), ("byol", "simclr", "moco", "simsiam")):
        yield Run("hundred", name, dataset, 100, 0)
    for seed, name in product((1, 2), ("byol", "simclr")):
        yield Run("hundred", name, CIFAR, 100, seed)

    # Networks trained with labels: from random weights, whatever the run, and fine-tuned.
    for dataset in (CIFAR, FASHION):
        yield Run("labels", "simclr", dataset, 10, 0, (Evaluation(flags="--baselines"),))
        for name in ("byol", "simclr"):
            yield Run("labels", name, dataset, 100, 0, (Evaluation(flags="--finetune"),))

    # Few images: 4,000 steps of 128, and 40,000 of all sizes but one in the middle. The same 1,000
    # labelled images in all rows.
    sizes = *product([4_000], (CIFAR, *SMALL)), *product([40_000], (CIFAR, *SMALL[1:]))
    for (steps, dataset), name in product(sizes, ("simclr", "byol")):
        epochs = steps // 400 if dataset == CIFAR else round(steps / (DATASETS[dataset][0] // 128))
        frozen = Evaluation((100, 200, "all"), dataset=SMALL[-1])
        baselines = " --baselines" * (name == "simclr" and dataset == SMALL[1])
        trained = frozen._replace(flags=f"--finetune{baselines}")
        student = trained._replace(flags="--finetune", script="linear_eval_distill")
        once = (student,) * (name == "simclr" and dataset == SMALL[1] and steps == 40_000)
        yield Run("photos", name, dataset, epochs, 0, (frozen, trained, *once))

    # docs/variants.md and docs/family.md.
    ablations = (
        "simsiam_no_stop_grad",
        "simsiam_no_stop_grad_no_norm",
        "simsiam_no_predictor",
        "simsiam_frozen_predictor",
        "simsiam_predictor_decays",
        "simsiam_no_batchnorm",
        "byol --tau 0.99",
        "byol --tau 1",
        "byol_no_predictor",
        "byol_target_copied",
        "byol_no_batchnorm",
        "byol_views_alike",
        "moco --momentum 0",
        "moco --momentum 0.9",
        "moco --queue-size 256",
        "moco --queue-size 16384",
        "moco_v1",
        "moco_end_to_end",
        "moco_split_batchnorm",
        "moco_symmetric",
        "simclr_linear_projector",
        "simclr_no_projector",
        "simclr --temperature 1",
        "simclr --batch-size 512",
        "simclr_crop_alone",
        "simclr_colour_alone",
        "simclr_mirror_alone",
        "simclr_one_half",
        "simclr_triplet",
        "simclr_logistic",
        "simclr_margin",
        "simclr_n_pair",
    )
    relatives = (
        "instdisc",
        "cpc",
        "cmc",
        "invaspread",
        "simclr_v2",
        "swav",
        "barlow_twins",
        "vicreg",
        "supcon",
        "lejepa",
        "moco_v3",
        "dino",
    )
    small_views = (  # and those without, ten epochs or about as many minutes
        ("swav", 10),
        ("swav", 20),
        ("swav_multi_crop", 10),
        ("dino", 10),
        ("dino_multi_crop", 4),
        ("moco_v3", 10),
        ("moco_v3_frozen_patches", 10),
    )
    few = Evaluation((1000, "all"))
    one = few._replace(labels=(1000,))
    other = {
        **dict.fromkeys(four, (few,)),
        "simclr": (few, few._replace(script="linear_eval_z")),
        "simclr_v2": (few, few._replace(script="linear_eval_v2")),
        "cmc": (few._replace(script="linear_eval_cmc"),),
    }
    for seed in range(2):
        for name in four + ablations:
            yield Run("variants", name, CIFAR, 10, seed, other.get(name, (one,)), ranks=True)
        for name in relatives:
            yield Run("family", name, CIFAR, 10, seed, other.get(name, (few,)))
        for name, epochs in small_views:
            yield Run("relatives", name, CIFAR, epochs, seed, (few,))

    for seed in range(3):
        yield Run("digits", "simclr", DIGITS, 20, seed, (Evaluation((100, "all")),), bf16=False)
    for name in ("simclr", "moco"):  # on a GPU
        yield Run("resnet18", f"{name} --backbone resnet18 --batch-size 512", CIFAR, 100, 0)

    # Minutes on one core. Nothing else should run beside them: --jobs 1.
    for name, epochs in [("simclr", 1), ("simclr", 2), ("simclr", 5), *product(four, [10])]:
        name, evaluations = f"{name} --device cpu", (Evaluation(("all",)),)
        yield Run("cpu", name, FASHION, epochs, 0, evaluations, bf16=False)


COLUMNS = (
    ("run", "trained_on", "dataset", "scored", "epochs", "seed", "kind", "labels", "draw")
    + ("accuracy", "knn", "c", "seconds", "training_seconds", "training_knn", "z_std")
    + ("rank_z", "rank_h", "script", "backbone", "device", "threads", "bf16", "torch", "commit")
    + ("row", "checkpoint", "method", "options")
)
IDENTITY = ("run", "trained_on", "epochs", "seed", "bf16")
SHARED = ("raw pixels", "random init", "labels only")  # rows that no checkpoint takes part in


def identity(run):
    """Return what tells the run's rows and files from those of others."""
    return run.name, run.dataset, str(run.epochs), str(run.seed), str(run.bf16)


def checkpoint_of(run, args):
    """Return the path of the run's checkpoint."""
    words = " ".join(identity(run)[:-1]) + " float32" * (not run.bf16)
    return args.checkpoints / (re.sub(r"[^a-z0-9._]+", "-", words.lower()) + ".pt")


def scores_of(run, evaluation, args):
    """Return the path of the file that an evaluation writes."""
    images, _ = DATASETS[evaluation.dataset or run.dataset]
    flags = evaluation.flags.replace(" --", "-").lstrip("-")
    return checkpoint_of(run, args).with_suffix(f".{evaluation.script}-{images}-{flags}.csv")


def belongs(row, run):
    """Say whether a row of results.csv is of this run."""
    return tuple(row[name] for name in IDENTITY) == identity(run)


def cell(row):
    """Return what tells a row from all others: it need not be measured twice."""
    names = ["dataset", "scored", "kind", "script", "backbone", "labels", "draw"]
    if row["kind"] not in SHARED:
        names += IDENTITY
    return tuple(row[name] for name in names)


def read(path):
    """Return the rows of a csv file, none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(rows, new, path):
    """Add those of the `new` rows that are not there yet to `rows` and to the file."""
    known = {cell(row) for row in rows}
    new = [{name: str(row.get(name, "")) for name in COLUMNS} for row in new]
    new = list({cell(row): row for row in new if cell(row) not in known}.values())
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        writer.writerows(new)
    rows += new


def facts(run, saved, commit):
    """Return the columns that all rows of a run share; `saved` is its checkpoint."""
    of_the_machine = {"dataset", "data_dir", "out", "resume", "device", "images", "mean", "std"}
    options = {k: v for k, v in saved["args"].items() if k not in of_the_machine}
    columns = dict(zip(IDENTITY, identity(run), strict=True))
    columns |= dict(backbone=options["backbone"], commit=commit)
    columns |= dict(method=options["method"], checkpoint=Path(saved["args"]["out"]).name)
    # Of the median epoch, as other work on the machine may have held up some of them.
    seconds = [row["seconds"] for row in saved["metrics"]]
    columns["training_seconds"] = round(statistics.median(seconds) * len(seconds), 1)
    return columns | dict(options=json.dumps(options))


def training_row(run, saved, commit, machine):
    """Return a row with what the training itself printed last, and the machine that it ran on."""
    last = saved["metrics"][-1]
    row = dict(kind="training", z_std=round(last["z_std"], 5))
    if "knn" in last:
        row["training_knn"] = round(last["knn"], 2)
    return facts(run, saved, commit) | row | machine


def processor():
    """Return the name of the CPU."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    return names[0] if names else "CPU"


def evaluation_rows(run, evaluation, saved, commit, args):
    """Return the rows that copies of linear_eval.py have written for an evaluation so far.

    Those that need no checkpoint are in the run's own file, or in that of a run evaluated with it.
    """
    rows, path, own = [], checkpoint_of(run, args), scores_of(run, evaluation, args)
    for file in own.parent.glob(f"*{''.join(own.suffixes[-2:])}"):
        found = read(file)
        found = [row for row in found if None not in row.values()]  # or half a line: it goes on
        rows += [row for row in found if row["checkpoint"] == str(path)]
        rows += [row for row in found if row["row"] in SHARED and file == own]
    for row in rows:
        what = row["row"].removeprefix(str(path)).strip()  # nothing, or "fine-tuned"
        row["device"] = row["device"].replace("cpu", processor())
        row["seconds"] = round(float(row["seconds"]), 2)
        if what in SHARED:
            row |= dict(backbone=saved["args"]["backbone"], commit=commit)
        else:
            row |= facts(run, saved, commit) | dict(row=f"{path.name} {what}".strip())
        dataset = evaluation.dataset or run.dataset
        row |= dict(kind=what or "linear", dataset=dataset, script=evaluation.script)
    return rows


def budget(labels, dataset):
    """Return how many labels an entry of Evaluation.labels means, and how many draws of them."""
    return (DATASETS[dataset][1], 1) if labels == "all" else (labels, 3)


def missing_labels(run, evaluation, rows):
    """Return those numbers of labels of an evaluation that lack a row."""
    dataset, flags = evaluation.dataset or run.dataset, evaluation.flags
    trained = "distilled" if evaluation.script == "linear_eval_distill" else "fine-tuned"
    kinds = [trained] * ("--finetune" in flags) + ["labels only"] * ("--baselines" in flags)
    kinds = kinds or ["linear"]
    found = [
        (row["kind"], int(row["labels"]))
        for row in rows
        if row["dataset"] == dataset and row["script"] == evaluation.script
        if row["kind"] == "labels only" or belongs(row, run)
    ]
    missing = []
    for labels in evaluation.labels:
        number, draws = budget(labels, dataset)
        if any(found.count((kind, number)) < draws for kind in kinds):
            missing.append(labels)
    return missing


def build(module, options):
    """Return the network of a script or a diff, with random weights."""
    kinds = [x for x in vars(module).values() if inspect.isclass(x) and issubclass(x, nn.Module)]
    kinds = [x for x in kinds if x.__module__ == module.__name__]
    [network] = [x for x in kinds if "backbone" in inspect.signature(x).parameters]
    _, channels, size, _ = options["images"]
    backbone = common.build_backbone(options["backbone"], channels, size)
    rest = list(inspect.signature(network).parameters)[1:]  # they are named as the options
    return network(backbone, *(options[name] for name in rest))


def effective_rank(x):
    """Return how many directions the rows of x (n, D) use (Roy and Vetterli 2007).

    The rows are scaled to length 1 and centred. The rank is the exponential of the entropy of the
    variances along their principal axes, as parts of a sum of 1: 1 on a line, at most D. Where all
    rows are one point it would be that of rounding: then it is "".
    """
    x = F.normalize(x.double(), dim=1)
    x = x - x.mean(dim=0)
    if x.square().sum(dim=1).mean() < 1e-4:
        return ""
    parts = torch.linalg.eigvalsh(x.T @ x).clamp_min(0)
    return math.exp(torch.special.entr(parts / parts.sum()).sum().item())


@torch.no_grad()
def ranks_row(run, saved, commit, args):
    """Return a row with the ranks of z and h of 10,000 training images."""
    sys.path.insert(0, str(args.checkpoints / "scripts"))
    model = build(importlib.import_module(run.name.split()[0]), saved["args"])
    sys.path.pop(0)
    model.load_state_dict(torch.load(checkpoint_of(run, args), weights_only=True)["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    data = load(run.dataset, args)
    images = data.train_images[:: max(1, len(data.train_images) // 10_000)][:10_000]
    batches = [x.to(device) / 255 for x in images.split(500)]
    h = [model.backbone(normalize(x, data.mean.to(device), data.std.to(device))) for x in batches]
    z = torch.cat([model.projector(x) for x in h])
    row = dict(kind="ranks", rank_z=effective_rank(z), rank_h=effective_rank(torch.cat(h)))
    return facts(run, saved, commit) | row


@cache
def read_checkpoint(path, _changed):
    """Return the options and the metrics of a checkpoint."""
    saved = torch.load(path, "cpu", weights_only=True)
    return {key: saved[key] for key in ("args", "metrics")}


def checkpoint(run, args):
    """Return options and metrics of the run's checkpoint; None before its first epoch's end."""
    path = checkpoint_of(run, args)
    if not path.exists() or not path.stat().st_size:
        return None
    return read_checkpoint(path, path.stat().st_mtime_ns)


def place(dataset, args):
    """Return what --dataset is to be."""
    if dataset in SMALL:
        return str(args.checkpoints / f"cifar10-{DATASETS[dataset][0]}")
    return {FASHION: "fashion-mnist", CIFAR: str(args.cifar), DIGITS: "digits"}[dataset]


def load(dataset, args):
    """Load a data set; the images of a folder are decoded the first time."""
    if dataset in SMALL and not Path(place(dataset, args)).exists():
        make_folder(args.cifar, *DATASETS[dataset], Path(place(dataset, args)))
    return common.load_dataset(place(dataset, args), args.data_dir)


def make_folder(cifar, n, labelled, folder):
    """Link n of the training images and all test images, equally many of each class.

    The first `labelled` go to train/<class>, the others to unlabelled. A smaller folder's images
    are among those of a larger one.
    """
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "unlabelled").mkdir(parents=True)
    classes = sorted(path.name for path in (cifar / "train").iterdir())
    for name in classes:
        for part in ("train", "test"):
            (unfinished / part / name).mkdir(parents=True)
        images = sorted((cifar / "train" / name).iterdir())
        random.Random(0).shuffle(images)
        for i, path in enumerate(images[: n // len(classes)]):
            part = f"train/{name}" if i < labelled // len(classes) else "unlabelled"
            (unfinished / part / f"{name}-{path.name}").symlink_to(path.resolve())
        for path in (cifar / "test" / name).iterdir():
            (unfinished / "test" / name / path.name).symlink_to(path.resolve())
    unfinished.rename(folder)


def write_scripts(folder):
    """Copy the scripts and apply the diffs, so that the originals may be edited meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for path in sorted((ROOT / "docs" / "variants").glob("*.diff")):  # swav before swav_multi_crop
        diff = path.read_text(encoding="utf-8")
        [source], [target] = (re.findall(rf"^copy {x} (.+)$", diff, re.M) for x in ("from", "to"))
        text = (folder / source).read_text(encoding="utf-8")
        (folder / target).write_text(patch(text, diff), encoding="utf-8")


def patch(text, diff):
    """Return the text after a diff that fits it to the line. (Some machines have no git.)"""
    lines, result, at = text.splitlines(keepends=True), [], 0
    hunks = diff.splitlines(keepends=True)
    first = next(i for i, line in enumerate(hunks) if line.startswith("@@"))
    for line in hunks[first:]:
        if line.startswith("@@"):
            start = int(re.match(r"@@ -(\d+)", line)[1]) - 1
            result += lines[at:start]
            at = start
        elif line[0] == "+":
            result.append(line[1:])
        else:
            if lines[at] != line[1:]:
                sys.exit(f"a diff does not fit line {at + 1}: run tools/refresh_variants.py")
            result += [] if line[0] == "-" else [line[1:]]
            at += 1
    return "".join(result + lines[at:])


class Job(NamedTuple):
    """A process to start: the training of a run, or an evaluation of one run or of several."""

    runs: tuple
    evaluation: Evaluation | None
    command: list
    images: float  # about how many will go forward and back through a convnet


def jobs_of(run, rows, args):
    """Return the jobs that a run still needs, in order."""
    saved, out, jobs = checkpoint(run, args), checkpoint_of(run, args), []
    wanted = [(e, missing_labels(run, e, rows)) for e in run.evaluations]
    if described(run, rows) and not any(labels for _, labels in wanted):
        return []

    name, *options = shlex.split(run.name)
    python = [sys.executable, "-u"]
    place_of = ["--dataset", place(run.dataset, args), "--data-dir", str(args.data_dir)]
    done = len(saved["metrics"]) if saved else 0
    if done < run.epochs:
        command = [*python, str(args.checkpoints / "scripts" / f"{name}.py"), *options, *place_of]
        command += ["--epochs", str(run.epochs), "--seed", str(run.seed), "--out", str(out)]
        command += ["--bf16" if run.bf16 else "--no-bf16"]
        weight = dict(byol=1.4, moco_v3=4, dino=4, dino_multi_crop=10).get(name, 1)
        if "resnet18" in options:
            weight *= 1 if torch.cuda.is_available() else 60
        images = weight * (run.epochs - done) * DATASETS[run.dataset][0]
        jobs.append(Job((run,), None, command + ["--resume"] * out.exists(), images))
    wanted = [evaluation._replace(labels=tuple(labels)) for evaluation, labels in wanted]
    return jobs + [evaluation_job((run,), x, args) for x in wanted if x.labels]


def evaluation_job(runs, evaluation, args):
    """Return the job that evaluates the checkpoints of runs in one process."""
    dataset = evaluation.dataset or runs[0].dataset
    command = [sys.executable, "-u", str(args.checkpoints / "scripts" / f"{evaluation.script}.py")]
    command += ["--weights", *(str(checkpoint_of(run, args)) for run in runs)]
    command += ["--labels", *map(str, evaluation.labels), *evaluation.flags.split()]
    command += ["--dataset", place(dataset, args), "--data-dir", str(args.data_dir)]
    command += ["--csv", str(scores_of(runs[0], evaluation, args))]
    command += ["--device", "cpu"] * ("--device cpu" in runs[0].name)
    budgets = [budget(n, dataset) for n in evaluation.labels]
    trained = sum(draws * max(3_000 * 128, 30 * n) for n, draws in budgets)
    images = 50_000 + trained * len(evaluation.flags.split()) / 2  # one view, not two
    return Job(runs, evaluation, command, 50_000 + images * len(runs))


def alike(job, args):
    """Return what must be equal for evaluations to share a process, and what none learnt."""
    [run], evaluation = job.runs, job.evaluation
    options = checkpoint(run, args)["args"]
    network = options["backbone"], options["images"][1:], "--device cpu" in run.name
    return evaluation, evaluation.dataset or run.dataset, *map(str, network)


def choose(ready, time_left, args):
    """Return the job to start, or None: a training, unless eight runs wait for one evaluation."""
    ready = [job for job in ready if seconds_of(job, args) < time_left]
    trainings = [job for job in ready if not job.evaluation]
    waiting = {}
    for job in ready:
        if job.evaluation:
            waiting.setdefault(alike(job, args), []).append(job)
    most = max(waiting.values(), key=len, default=[])
    if trainings and len(most) < 8:
        return trainings[0]
    for n in range(len(most), 0, -1):
        runs = tuple(run for job in most[:n] for run in job.runs)
        job = evaluation_job(runs, most[0].evaluation, args)
        if seconds_of(job, args) < time_left:
            return job
    return None


def seconds_of(job, args):
    """Return about how long a job takes."""
    return 20 + job.images / args.speed


def described(run, rows):
    """Say whether there are rows of what the training itself measured."""
    kinds = kinds_of(run, rows)
    return "training" in kinds and (not run.ranks or "ranks" in kinds)


def kinds_of(run, rows):
    """Return the kinds of rows that a run has."""
    return {row["kind"] for row in rows if belongs(row, run)}


def collect(run, rows, args):
    """Append what a trained run's evaluations have written so far, and what its checkpoint says."""
    saved = checkpoint(run, args)
    if not saved or len(saved["metrics"]) < run.epochs:
        return
    commit, machine = started_at(run, args)
    new, kinds = [], kinds_of(run, rows)
    if "training" not in kinds:
        new.append(training_row(run, saved, commit, machine))
    if run.ranks and "ranks" not in kinds:
        new.append(ranks_row(run, saved, commit, args))
    for evaluation in run.evaluations:
        new += evaluation_rows(run, evaluation, saved, commit, args)
    append(rows, new, args.csv)


def start(job, args):
    """Start the job's process; its output goes to a log beside the (first) checkpoint."""
    path = checkpoint_of(job.runs[0], args).with_suffix(".log")
    cuda = torch.cuda.is_available() and "--device cpu" not in job.runs[0].name
    device = torch.cuda.get_device_name() if cuda else processor()
    machine = json.dumps(dict(device=device, threads="1", torch=torch.__version__))
    with path.open("a") as log:
        log.write(f"commit {args.commit} {machine}\n{shlex.join(job.command)}\n")
        log.flush()
        # The process keeps the lock, should this one be killed.
        own = dict(env=os.environ | dict(OMP_NUM_THREADS="1"), pass_fds=[args.lock.fileno()])
        return subprocess.Popen(job.command, stdout=log, stderr=log, **own)


def started_at(run, args):
    """Return the commit, and columns that describe the machine, of a run's training.

    `start` wrote them into the first line of its log. Without one, --commit is all that is known.
    """
    log = checkpoint_of(run, args).with_suffix(".log")
    if not log.exists():
        return args.commit, {}
    first = re.match(r"commit (\S+) ({.*})?", log.read_text())  # earlier ones name no machine
    return first[1], json.loads(first[2] or "{}")


def work(runs, rows, args):
    """Start job after job, and append rows as they come; return how many runs failed."""
    running, failed, over, begun = {}, set(), set(), time.monotonic()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for run in runs:  # what a killed measurement has left
        collect(run, rows, args)
    try:
        while True:
            while len(running) < args.jobs:
                busy = {identity(run) for job, _ in running.values() for run in job.runs}
                ready = []
                for run in runs:
                    if run in over or identity(run) in busy | failed:
                        continue
                    jobs = jobs_of(run, rows, args)
                    if not jobs:
                        collect(run, rows, args)
                        over.add(run)
                    elif jobs[0].command not in [job.command for job in ready]:
                        ready.append(jobs[0])
                job = choose(ready, 60 * args.minutes - (time.monotonic() - begun), args)
                if not job:
                    break
                running[start(job, args)] = job, time.monotonic()
            if not running:
                return len(failed)
            time.sleep(1)
            for process, (job, since) in list(running.items()):
                ended = process.poll() is not None
                for run in job.runs if job.evaluation or ended else ():
                    collect(run, rows, args)
                if not ended:
                    continue
                del running[process]
                what = "evaluated" if job.evaluation else "trained"
                left = [x.evaluation for run in job.runs for x in jobs_of(run, rows, args)]
                if process.returncode or job.evaluation in left:  # it would go on for ever
                    failed |= set(map(identity, job.runs))
                    what = f"FAILED, see {checkpoint_of(job.runs[0], args).with_suffix('.log')}:"
                names = "; ".join(map(str, job.runs))
                print(f"{time.monotonic() - since:6.0f} s  {what} {names}", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process, (job, _) in running.items():
            process.terminate()
            process.wait()
            for run in job.runs:
                collect(run, rows, args)


def why_not(run, rows, args):
    """Return why a run that lacks rows cannot be measured here and now; "" if it can."""
    cuda = torch.cuda.is_available()
    if not args.cifar and run.dataset not in (FASHION, DIGITS):
        return "it needs --cifar"
    if run.group == "resnet18" and not cuda:
        return "it needs a GPU"
    if run.group == "cpu" and (cuda or args.jobs > 1):
        return "it needs a CPU for itself, --jobs 1"
    if "training" in kinds_of(run, rows) and not checkpoint(run, args):
        return f"its rows are of a checkpoint that is not in {args.checkpoints}"
    return ""


def commit_of_git():
    """Return the commit, with + if a script or a diff has changed since; "" without git."""
    scripts = ":(glob)*.py docs/variants"
    commands = ["git rev-parse --short=10 HEAD", f"git status --porcelain -- {scripts}"]
    try:
        results = [
            subprocess.run(x.split(), cwd=ROOT, capture_output=True, text=True) for x in commands
        ]
    except FileNotFoundError:
        return ""
    return results[0].stdout.strip() + "+" * bool(results[1].stdout)


def parse_args(argv=None):
    """Read the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option, cuda = parser.add_argument, torch.cuda.is_available()
    option("--cifar", type=Path, metavar="FOLDER", help="CIFAR-10 as JPEG files")
    option("--data-dir", type=Path, default="data", help="as that of the scripts")
    option("--checkpoints", type=Path, default="runs", metavar="FOLDER")
    option("--csv", type=Path, default=ROOT / "docs" / "results.csv", help="the file of results")
    option("--only", default="", metavar="PATTERN", help="regular expression, see --list")
    option("--jobs", type=int, default=2, help="processes side by side")
    option("--minutes", type=float, default=math.inf, help="start nothing that would end later")
    option("--speed", type=float, default=12_000 if cuda else 1_500, help="images/s of a process")
    option("--commit", default=os.environ.get("COMMIT") or commit_of_git())
    option("--list", action="store_true", help="say what is missing, and about how long it takes")
    option("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(argv)
    for name in ("cifar", "data_dir", "checkpoints", "csv"):
        if vars(args)[name]:
            setattr(args, name, vars(args)[name].resolve())
    if not args.commit:
        parser.error("there is no git here: pass --commit")
    return args


def main(argv=None):
    """Do what --help says."""
    args = parse_args(argv)
    args.checkpoints.mkdir(parents=True, exist_ok=True)
    runs, rows, total = [], read(args.csv), 0
    for run in all_runs():
        if re.search(args.only, str(run)) and jobs_of(run, rows, args):
            if reason := why_not(run, rows, args):
                print(f"left out, as {reason}: {run}")
            else:
                runs.append(run)
    missing = [jobs_of(run, rows, args) for run in runs]
    if args.list or args.dry_run:
        trained = set()
        for jobs in missing:
            [run] = jobs[0].runs
            if not jobs[0].evaluation:  # a training counts once
                jobs = jobs[identity(run) in trained :]
                trained.add(identity(run))
            seconds = sum(seconds_of(job, args) for job in jobs)
            total += seconds
            print(f"{seconds / 60:6.1f} min  {run}")
            for job in jobs if args.dry_run else ():
                print(f"            {shlex.join(job.command)}")
        print(f"{total / 60:6.1f} min in all, {total / 60 / args.jobs:.0f} with --jobs {args.jobs}")
        return
    with (args.checkpoints / "lock").open("w") as args.lock:
        try:
            fcntl.flock(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another measurement, or a process that it left, uses {args.checkpoints}")
        write_scripts(args.checkpoints / "scripts")
        used = {jobs[0].runs[0].dataset for jobs in missing}
        used |= {job.evaluation.dataset for jobs in missing for job in jobs if job.evaluation}
        for dataset in used - {""}:  # here, or each process would decode the images by itself
            load(dataset, args)
        failed = work(runs, rows, args)
    if failed:
        sys.exit(f"{failed} runs failed")


if __name__ == "__main__":
    main()
