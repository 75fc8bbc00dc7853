"""Write all tables of README.md and docs/, and the figures in the scripts, from docs/results.csv.

    python tools/tables.py            # write them
    python tools/tables.py --check    # only name the pages that differ from the file

On a page, a table stands between <!-- table: NAME --> and <!-- end -->; what is between is
replaced. So is the number of lines that a diff changes, where a row about it ends with that. In a
script, `91.0% (random network: 88.1%)` and `5 minutes, one CPU core` are, and in the diffs of it,
so that they still apply. A dash is what has not been measured. A row without figures is left out. A
table without any stays as it is on the page.
"""

import argparse
import csv
import itertools
import re
import statistics
import sys
from pathlib import Path

from measure import CIFAR, DATASETS, DIGITS, FASHION, IDENTITY, SMALL, all_runs, identity

ROOT = Path(__file__).resolve().parent.parent
METHODS = {"simclr": "SimCLR", "moco": "MoCo", "byol": "BYOL", "simsiam": "SimSiam"}
RELATIVES = {
    "instdisc": "InstDisc",
    "cpc": "CPC",
    "cmc": "CMC",
    "invaspread": "InvaSpread",
    "simclr_v2": "SimCLRv2, the backbone",
    "swav": "SwAV",
    "barlow_twins": "Barlow Twins",
    "vicreg": "VICReg",
    "supcon": "SupCon, with all labels",
    "lejepa": "LeJEPA",
    "moco_v3": "MoCo v3, transformer",
    "dino": "DINO, transformer",
}
FEW = SMALL[-1]
ALL = {name: labelled for name, (_, labelled) in DATASETS.items()}


class Rows(list):
    """Rows of results.csv, and what tables ask of them."""

    def of(self, **columns):
        """Return the rows that have these values."""
        wanted = {name: str(value) for name, value in columns.items()}
        return Rows(r for r in self if all(r[name] == value for name, value in wanted.items()))

    def numbers(self, column):
        """Return the values of a column as numbers, those that are not empty."""
        return [float(row[column]) for row in self if row[column] != ""]

    def means(self, by, column="accuracy"):
        """Return the mean of a column for each value of the column `by`."""
        groups = [self.of(**{by: value}).numbers(column) for value in unique(self, by)]
        return [statistics.mean(group) for group in groups if group]


def unique(rows, column):
    """Return the values of a column in order, each once."""
    return list(dict.fromkeys(row[column] for row in sorted(rows, key=lambda row: row[column])))


def mean(values, digits=1):
    """Return the mean as text, a dash if there are none."""
    return f"{statistics.mean(values):.{digits}f}" if values else "-"


def spread(values, digits=1):
    """Return the mean and, of two or more, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return mean(values, digits) + deviation


def each(values, digits=".1f"):
    """Return the values of the seeds beside each other."""
    return " / ".join(format(value, digits) for value in values) or "-"


def markdown(head, lines):
    """Return a table of texts."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(rows):
    """Return a line that says where the rows were trained, and how many there are."""
    trained = rows.of(kind="training")
    if not trained:
        return "Not measured yet."
    places = unique(trained, "device")
    bf16 = {"True": "bf16", "False": "float32"}
    precision = [bf16[value] for value in unique(trained, "bf16")]
    versions = [value.partition("+")[0] for value in unique(trained, "torch")]
    listed = [" and ".join(part) for part in (places, precision, versions)]
    runs = "one run" if len(trained) == 1 else f"{len(trained)} runs"
    return f"{runs.capitalize()}, trained on {listed[0]}, {listed[1]}, PyTorch {listed[2]}."


def linear(rows, name, dataset, epochs, kind="linear"):
    """Return the rows of one row of a table; raw pixels and the like belong to no run."""
    rows = rows.of(dataset=dataset, kind=kind, scored="test", backbone="convnet")
    rows = rows.of(script="linear_eval")
    return rows.of(run=name, trained_on=dataset, epochs=epochs) if name else rows


BASELINES = {"raw pixels": "raw pixels", "random network": "random init"}


def readme_results(rows):
    """Return the four methods on both data sets, ten epochs."""
    columns = [(FASHION, 1000), (FASHION, 60_000), (CIFAR, 1000), (CIFAR, 50_000)]

    def line(label, name, epochs, kind="linear"):
        found = [linear(rows, name, data, epochs, kind).of(labels=n) for data, n in columns]
        return [label, *(mean(x.means("seed")) for x in found)]

    lines = [line(label, "", 0, kind) for label, kind in BASELINES.items()]
    lines += [line(f"{METHODS[m]}, 10 epochs", m, 10) for m in METHODS]
    head = ["features", "Fashion-MNIST: 1,000 labels", "60,000"]
    return markdown([*head, "CIFAR-10 (JPEG): 1,000 labels", "50,000"], lines)


def precision(rows):
    """Return ten epochs of the same seeds in float32 and in bf16 beside each other."""
    lines = []
    for method, label in METHODS.items():
        runs = [rows.of(run=method, trained_on=CIFAR, epochs=10, bf16=x) for x in ("False", "True")]
        both = {row["seed"] for row in runs[0]} & {row["seed"] for row in runs[1]}
        runs = [Rows(row for row in run if row["seed"] in both) for run in runs]
        few = [linear(run, method, CIFAR, 10).of(labels=1000).means("seed") for run in runs]
        knn = [run.of(kind="training").means("seed", "training_knn") for run in runs]
        lines.append([label, *(each(values) for values in knn + few)])
    head = ["", "kNN: float32", "bf16", "1,000 labels: float32", "bf16"]
    return markdown(head, lines)


def readme_first(rows):
    """Return what the last command of the README's first block prints."""
    lines = [f"{'':<11}{'60,000 labels':>15}{'kNN':>15}"]
    for label, name, kind in (
        ("raw pixels", "", "raw pixels"),
        ("random init", "", "random init"),
        ("byol.pt", "byol", "linear"),
    ):
        found = linear(rows, name, FASHION, 10, kind).of(labels=60_000)
        found = found.of(seed=0) if name else found
        cells = mean(found.numbers("accuracy"), 2), mean(found.numbers("knn"), 2)
        lines.append(f"{label:<11}{cells[0]:>15}{cells[1]:>15}")
    return "\n".join(["```", *lines, "```"])


def pays(dataset, names):
    """Return a table of accuracy by number of labels, with its deviation over draws of them."""

    def make(rows):
        budgets = 100, 1000, ALL[dataset]
        lines = []
        for label, name, epochs, kind in names:
            found = linear(rows, name, dataset, epochs, kind)
            cells = [spread(found.of(labels=n).means("draw")) for n in budgets]
            lines.append([label, *cells])
        head = [dataset, "100 labels", "1,000 labels", f"{ALL[dataset]:,} labels"]
        return markdown(head, lines)

    return make


SHORT = [
    ("labels only", "", 0, "labels only"),
    ("linear classifier on BYOL, 100 epochs", "byol", 100, "linear"),
    ("BYOL, 100 epochs, fine-tuned", "byol", 100, "fine-tuned"),
]
LONG = [
    ("linear on raw pixels", "", 0, "raw pixels"),
    ("linear on a random network", "", 0, "random init"),
    ("linear on SimCLR, 100 epochs", "simclr", 100, "linear"),
    ("linear on BYOL, 100 epochs", "byol", 100, "linear"),
    ("labels only", "", 0, "labels only"),
    ("SimCLR, 100 epochs, fine-tuned", "simclr", 100, "fine-tuned"),
    ("BYOL, 100 epochs, fine-tuned", "byol", 100, "fine-tuned"),
]


def epochs_table(dataset, epochs):
    """Return a table of the four methods, with the deviation over seeds."""

    def make(rows):
        budgets, lines, used = (100, 1000, ALL[dataset]), [], Rows()
        labels = [(label, "", 0, kind) for label, kind in BASELINES.items()] * (10 in epochs)
        labels += [(METHODS[m], m, n, "linear") for m in METHODS for n in epochs]
        for label, name, n, kind in labels:
            found = linear(rows, name, dataset, n, kind)
            cells = [spread(found.of(labels=b).means("seed")) for b in budgets]
            knn = spread(found.of(labels=ALL[dataset]).means("seed", "knn"))
            runs = str(len(unique(found, "seed"))) if name and found else ""
            label += f", {n} epochs" * (len(epochs) > 1)
            lines.append([label, *cells, knn, runs])
            used += rows.of(run=name, trained_on=dataset, epochs=n) if name else []
        head = [dataset, "100 labels", "1,000 labels", f"{ALL[dataset]:,} labels", "kNN", "runs"]
        return f"{markdown(head, lines)}\n\n{source(used)}"

    return make


def photos(rows):
    """Return accuracy with few labels after training on few images."""
    lines, deviations, used = [], [0.0], Rows()
    few = rows.of(dataset=FEW, script="linear_eval", backbone="convnet")

    def line(label, found, kinds):
        for labels, kind in itertools.product((100, 200, 1000), kinds):
            values = found.of(labels=labels, kind=kind).means("draw")
            label.append(mean(values) if kind else "")
            deviations.extend([statistics.stdev(values)] if len(values) > 1 else [])
        lines.append(label)

    line(["", "", "raw pixels"], few, ["raw pixels", ""])
    line(["", "", "random network"], few, ["random init", ""])
    line(["", "", "labels only"], few, ["", "labels only"])
    runs = [run for run in all_runs() if run.group == "photos"]
    for run in sorted(runs, key=lambda run: (steps_of(run) > 10_000, DATASETS[run.dataset][0])):
        trained = dict(zip(IDENTITY, identity(run), strict=True))
        label = [f"{DATASETS[run.dataset][0]:,}", f"{steps_of(run):,} ({run.epochs:,} epochs)"]
        line([*label, METHODS[run.name]], few.of(**trained), ["linear", "fine-tuned"])
        found = rows.of(script="linear_eval_distill", kind="distilled", dataset=FEW, **trained)
        if found:
            line([*label, f"{METHODS[run.name]}, distilled"], found, ["", "distilled"])
        used += rows.of(kind="training", **trained)
    head = ["images", "steps", ""]
    head += ["100 labels: linear", "fine-tuned", "200: linear", "fine-tuned"]
    table = markdown([*head, "1,000: linear", "fine-tuned"], lines)
    deviation = f"The deviation over draws of the labels is {max(deviations):.1f} at most."
    return f"{table}\n\n{deviation} {source(used)}"


def steps_of(run):
    """Return the number of steps of a run with 128 images in a batch."""
    return run.epochs * (DATASETS[run.dataset][0] // 128)


def digits(rows):
    """Return the digits' table."""
    lines = []
    for label, name, kind in (
        *((label, "", kind) for label, kind in BASELINES.items()),
        ("SimCLR, 20 epochs", "simclr", "linear"),
    ):
        found = linear(rows, name, DIGITS, 20, kind)
        every = found.of(labels=ALL[DIGITS])
        cells = spread(found.of(labels=100).means("draw")), spread(every.means("seed"))
        lines.append([label, *cells, spread(every.means("seed", "knn"))])
    return markdown(["features", "100 labels", "1,397 labels", "kNN"], lines)


def resnet18(rows):
    """Return the table of a ResNet-18 on a GPU."""
    rows = rows.of(backbone="resnet18")
    lines, names = [], {"": "random network"} | METHODS
    for run in ["", *unique(rows.of(kind="training"), "run")]:
        of_run, method = rows.of(run=run), run.partition(" ")[0]
        found = of_run.of(kind="linear" if run else "random init")
        trained = of_run.of(kind="training")
        line = [names[method], mean(trained.numbers("epochs"), 0)]
        line += [mean([seconds / 60 for seconds in trained.numbers("training_seconds")])]
        line += [mean(trained.numbers("training_knn"))]
        line += [spread(found.of(labels=n).means("draw")) for n in (100, 1000, 50_000)]
        lines.append([*line, mean(found.of(labels=50_000).numbers("knn"))])
    head = ["ResNet-18", "epochs", "minutes", "kNN of training images"]
    head += ["100 labels", "1,000 labels", "50,000 labels", "kNN"]
    return f"{markdown(head, lines)}\n\n{source(rows)}"


def time(rows):
    """Return seconds of training on one core, and what they bring."""
    lines, used = [], Rows()
    for run in (run for run in all_runs() if run.group == "cpu"):
        found = rows.of(run=run.name, trained_on=FASHION, epochs=run.epochs)
        seconds = mean(found.of(kind="training").numbers("training_seconds"), 0)
        accuracy = mean(found.of(kind="linear", labels=60_000).numbers("accuracy"))
        epochs = "1 epoch" if run.epochs == 1 else f"{run.epochs} epochs"
        lines.append([f"{METHODS[run.name.split()[0]]}, {epochs}", seconds, accuracy])
        used += found
    head = [FASHION, "seconds, one thread", "60,000 labels"]
    return f"{markdown(head, lines)}\n\n{source(used)}"


def names_of(group, beginning=""):
    """Return the names of a group of runs of measure.py in order, each once."""
    names = [run.name for run in all_runs() if run.group == group]
    return [name for name in dict.fromkeys(names) if name.startswith(beginning)]


def lines_of(name):
    """Return how many lines a diff removes and adds: "-4 +9"."""
    text = (ROOT / "docs" / "variants" / f"{name}.diff").read_text(encoding="utf-8")
    body = text[text.index("@@") :].splitlines()
    return " ".join(f"{sign}{sum(line.startswith(sign) for line in body)}" for sign in "-+")


LOSSES = [f"simclr_{loss}" for loss in ("triplet", "logistic", "margin", "n_pair")]
NOTES = {
    "byol --tau 1": ": the target never moves",
    "linear_eval_z": ": z of `simclr.py`",
}


def variants(method, names=()):
    """Return the ablations of a method, or those named, the two seeds beside each other."""
    if not names:
        names = [name for name in names_of("variants", method) if name not in LOSSES]
        names += ["linear_eval_z"] * (method == "simclr")

    def make(rows):
        lines, used = [], Rows()
        for name in names:
            label, changed = f"`{name.replace(method, f'{method}.py', 1)}`", ""
            if name.split()[0] != method:
                label, changed = f"[{name}](variants/{name}.diff)", lines_of(name)
            label += NOTES.get(name, "")
            script = name if name.startswith("linear_eval") else "linear_eval"
            run = rows.of(run=method if name == script else name, trained_on=CIFAR, epochs=10)
            run = Rows(row for row in run if row["seed"] in "01")
            trained = run.of(kind="training")
            cells = [each(trained.means("seed", "training_knn"))]
            cells += [each(trained.means("seed", "z_std"), ".2f")]
            cells += [each(run.of(kind="ranks").means("seed", "rank_z"))]
            cells += [each(run.of(kind="ranks").means("seed", "rank_h"), ".0f")]
            cells = cells if name != script else [""] * 4
            few = run.of(kind="linear", script=script, labels=1000, dataset=CIFAR)
            lines.append([label, changed, *cells, each(few.means("seed"))])
            used += run if name != script else []
        head = ["variant", "lines", "kNN", "z_std", "rank of z", "of h", "1,000 labels"]
        return f"{markdown(head, lines)}\n\n{source(used)}"

    return make


def relatives(rows):
    """Return changes of relatives, the two seeds beside each other."""
    lines, used = [], Rows()
    for run in (run for run in all_runs() if run.group == "relatives" and run.seed == 0):
        found = rows.of(run=run.name, trained_on=CIFAR, epochs=run.epochs)
        trained = found.of(kind="training")
        cells = [str(run.epochs), mean([x / 60 for x in trained.numbers("training_seconds")])]
        cells.append(each(trained.means("seed", "training_knn")))
        scored = found.of(kind="linear", script="linear_eval")
        cells += [each(scored.of(labels=n).means("seed")) for n in (1000, 50_000)]
        lines.append([f"[{run.name}](variants/{run.name}.diff)", lines_of(run.name), *cells])
        used += found
    head = ["variant", "lines", "epochs", "minutes", "kNN", "1,000 labels", "50,000 labels"]
    return f"{markdown(head, lines)}\n\n{source(used)}"


def family(rows):
    """Return the relatives, the two seeds beside each other."""
    rows = rows.of(dataset=CIFAR) + rows.of(dataset="", trained_on=CIFAR)
    rows, lines, used = Rows(rows), [], Rows()

    def line(label, found, trained):
        lines.append([label, each(trained.means("seed", "training_knn")) if trained else ""])
        lines[-1] += [each(found.of(labels=n).means("seed")) for n in (1000, 50_000)]

    for name, label in (METHODS | RELATIVES).items():
        run = rows.of(run=name, trained_on=CIFAR, epochs=10)
        run = Rows(row for row in run if row["seed"] in "01")
        script = "linear_eval_cmc" if name == "cmc" else "linear_eval"
        scored = run.of(kind="linear", script=script)
        line(label, scored, run.of(kind="training"))
        if name == "simclr_v2":
            scored = run.of(kind="linear", script="linear_eval_v2")
            line("SimCLRv2, the projector's first layer", scored, Rows())
        used += run
    for label, backbone, script in (
        ("random network", "convnet", "linear_eval"),
        ("random networks of CMC", "convnet", "linear_eval_cmc"),
        ("random transformer", "vit", "linear_eval"),
    ):
        line(label, rows.of(kind="random init", backbone=backbone, script=script), Rows())
    head = ["method", "kNN", "1,000 labels", "50,000 labels"]
    return f"{markdown(head, lines)}\n\n{source(used)}"


TABLES = {
    "first": readme_first,
    "precision": precision,
    "results": readme_results,
    "pays": pays(CIFAR, SHORT),
    "pays-cifar10": pays(CIFAR, LONG),
    "pays-fashion-mnist": pays(FASHION, LONG),
    "ten-cifar10": epochs_table(CIFAR, [10]),
    "ten-fashion-mnist": epochs_table(FASHION, [10]),
    "hundred-cifar10": epochs_table(CIFAR, [100]),
    "hundred-fashion-mnist": epochs_table(FASHION, [100]),
    "photos": photos,
    "resnet18": resnet18,
    "digits": digits,
    "time": time,
    "variants-simsiam": variants("simsiam"),
    "variants-byol": variants("byol"),
    "variants-moco": variants("moco"),
    "variants-simclr": variants("simclr"),
    "variants-losses": variants("simclr", ["simclr", *LOSSES]),
    "relatives": relatives,
    "family": family,
}


def of_precision(rows, name):
    """Return the rows that a table shows: ten epochs in float32 or in bf16, a hundred in bf16."""
    bf16 = name.startswith(("variants", "relatives", "family", "photos"))
    other = ("False", "10") if bf16 else ("True", "10")
    return Rows(x for x in rows if name == "precision" or (x["bf16"], x["epochs"]) != other)


def read(path):
    """Return the rows of results.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return Rows(csv.DictReader(file))


def fill(text, rows):
    """Return a page with its tables made anew."""

    def table(match):
        if match[2] not in TABLES:
            sys.exit(f"there is no table {match[2]}, only {', '.join(TABLES)}")
        chosen = of_precision(rows, match[2])
        blank, lines = (TABLES[match[2]](x).splitlines() for x in (Rows(), chosen))
        measured = [line for line in lines if " - |" not in line or line not in blank]
        if lines == blank:
            return match[0]
        return "\n\n".join([match[1], "\n".join(measured), "<!-- end -->"])

    marked = re.compile(r"^(<!-- table: (\S+) -->)$.*?^<!-- end -->$", re.M | re.S)
    row = re.compile(r"^(\|.*\(variants/(\w+)\.diff\).* )-\d+ \+\d+ \|$", re.M)
    text = row.sub(lambda match: f"{match[1]}{lines_of(match[2])} |", text)
    return marked.sub(table, text)


def fill_script(text, name, rows):
    """Return a script with the figures of its docstring made anew, those that are measured."""
    every = linear(rows, name, FASHION, 10).of(labels=60_000, bf16="False").means("seed")
    random = linear(rows, "", FASHION, 0, "random init").of(labels=60_000).means("draw")
    if every and random:
        figures = rf"{mean(every)}% \1 {mean(random)}%)"
        text = re.sub(r"\d+\.\d% (\(random.*:) \d+\.\d%\)", figures, text)
    run = rows.of(run=f"{name} --device cpu", trained_on=FASHION, epochs=10, kind="training")
    if run:
        minutes = statistics.mean(run.numbers("training_seconds")) / 60
        text = re.sub(r"\d+ minutes, one CPU core", f"{minutes:.0f} minutes, one CPU core", text)
    return text


def main(argv=None):
    """Write the pages, or name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and docs/")
    args = parser.parse_args(argv)
    rows, differ = read(args.root / "docs" / "results.csv"), []
    pages = [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]
    variants = sorted((args.root / "docs" / "variants").glob("*.diff"))
    for path in [*pages, *(args.root / f"{name}.py" for name in METHODS), *variants]:
        text = path.read_text(encoding="utf-8")
        source = re.search(r"^copy from (.+)\.py$", text, re.M)
        name = source[1] if source else path.stem
        new = fill(text, rows) if path.suffix == ".md" else fill_script(text, name, rows)
        if new != text:
            differ.append(path.name)
        if not args.check:
            path.write_text(new, encoding="utf-8")
    if args.check and differ:
        sys.exit(f"not as docs/results.csv has it, run tools/tables.py: {', '.join(differ)}")


if __name__ == "__main__":
    main()
