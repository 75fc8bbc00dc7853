"""tools/measure.py and tools/tables.py: from a list of runs to the tables on the pages."""

import argparse
import fcntl
import importlib
import json
import shlex
import shutil
import subprocess
import sys

import measure
import pytest
import simclr
import tables
import torch
from conftest import DIFFS, METHODS, ROOT, call, write_images

TINY = (measure.Evaluation((20, "all")),)
TINY_RUN = measure.Run("test", "simclr --device cpu", measure.FASHION, 2, 0, TINY)


@pytest.fixture
def tiny_runs(monkeypatch, tmp_path, tiny):
    """A function that measures one tiny run with more options, and returns the rows."""
    monkeypatch.setattr(measure, "all_runs", lambda: [TINY_RUN])
    monkeypatch.setattr(measure, "DATASETS", measure.DATASETS | {measure.FASHION: (320, 320)})
    fixed = ["--data-dir", tiny, "--checkpoints", tmp_path, "--csv", tmp_path / "results.csv"]

    def run(*options):
        measure.main([str(option) for option in (*fixed, "--commit", "abc", *options)])
        return measure.read(tmp_path / "results.csv")

    return run


def in_process(job, args):
    """Do what a process would do, here: that saves the seconds that importing takes."""
    done = call(args.checkpoints, *job.command[2:])
    done.poll = lambda: done.returncode
    return done


def test_measure_goes_on_where_it_stopped(tiny_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "start", in_process)
    listed = tiny_runs("--list")
    assert not listed and "test: simclr --device cpu" in capsys.readouterr().out
    # At an image per second it would take longer than that: nothing is started.
    assert not tiny_runs("--minutes", "10", "--speed", "1")

    rows = tiny_runs()
    kinds = [(row["kind"], row["labels"], row["draw"]) for row in rows]
    for kind in ("raw pixels", "random init", "linear"):
        assert sum(k == kind and labels == "20" for k, labels, _ in kinds) == 3
        assert sum(k == kind and labels == "320" for k, labels, _ in kinds) == 1
    assert len(set(kinds)) == len(rows) == 13  # the last is the training's own
    [training] = [row for row in rows if row["kind"] == "training"]
    saved = torch.load(measure.checkpoint_of(TINY_RUN, args(tmp_path)), weights_only=True)
    last = saved["metrics"][-1]
    assert float(training["training_knn"]) == round(last["knn"], 2)
    assert float(training["z_std"]) == round(last["z_std"], 5)
    assert training["commit"] == "abc" and training["dataset"] == ""
    assert str(tmp_path) not in (tmp_path / "results.csv").read_text()  # no path of this machine

    before = (tmp_path / "results.csv").read_text()
    tiny_runs()
    assert (tmp_path / "results.csv").read_text() == before
    # One of three draws has no row: those labels are evaluated again, and nothing is trained.
    (tmp_path / "results.csv").unlink()
    kept = [row for row in rows if (row["kind"], row["draw"]) != ("linear", "2")]
    measure.append([], kept, tmp_path / "results.csv")
    assert len(kept) == 12
    for path in tmp_path.glob("*.linear_eval-*.csv"):
        path.unlink()
    tiny_runs("--dry-run")
    assert "--labels 20 --" in capsys.readouterr().out
    assert len(tiny_runs()) == 13
    assert "evaluated" in (out := capsys.readouterr().out) and "trained" not in out

    # Without its checkpoint, another network's accuracy would be put beside the rows that are left.
    (tmp_path / "results.csv").unlink()
    measure.append([], kept, tmp_path / "results.csv")
    measure.checkpoint_of(TINY_RUN, args(tmp_path)).unlink()
    assert len(tiny_runs()) == 12
    assert "left out, as its rows are of a checkpoint that is not in" in capsys.readouterr().out


def args(folder):
    """Return what `measure` needs to find a checkpoint."""
    return argparse.Namespace(checkpoints=folder)


def test_killed_run_is_resumed(tiny_runs, tmp_path, monkeypatch, tiny, capsys):
    monkeypatch.setattr(measure, "all_runs", lambda: [TINY_RUN._replace(evaluations=())])
    out = measure.checkpoint_of(TINY_RUN, args(tmp_path))
    options = ["--device", "cpu", "--data-dir", str(tiny), "--epochs", "2", "--out", str(out)]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("simclr.knn_accuracy", stop)  # that is in the last epoch
        with pytest.raises(KeyboardInterrupt):
            simclr.train(simclr.parse_args(options))
    [epoch] = torch.load(out, weights_only=True)["metrics"]
    seconds = epoch["seconds"]
    tiny_runs("--dry-run")
    assert "--resume" in capsys.readouterr().out
    assert not tiny_runs("--only", "no such run")
    assert [row["kind"] for row in tiny_runs()] == ["training"]
    metrics = torch.load(out, weights_only=True)["metrics"]
    assert len(metrics) == 2 and metrics[0]["seconds"] == seconds  # the first epoch was kept


def test_jobs_of_a_small_folder(tmp_path):
    """It is trained on its own images and scored with the labels of the smallest folder."""
    [run, *_] = [run for run in measure.all_runs() if run.dataset == measure.SMALL[1]]
    options = ["--cifar", tmp_path, "--checkpoints", tmp_path, "--commit", "abc"]
    options = measure.parse_args([str(option) for option in options])
    train, linear, trained = [shlex.join(job.command) for job in measure.jobs_of(run, [], options)]
    assert f"--dataset {tmp_path}/cifar10-5000" in train and "--epochs 103" in train
    assert train.endswith("--bf16")
    for command in (linear, trained):
        assert f"--dataset {tmp_path}/cifar10-1000" in command
        assert "--labels 100 200 all" in command
    assert "--finetune --baselines" in trained and "--finetune" not in linear
    # Rows of another seed do not count, those of labels only do, whatever the run.
    row = dict.fromkeys(measure.COLUMNS, "") | dict(script="linear_eval", labels="1000", seed="1")
    row["bf16"] = "True"
    row |= dict(run=run.name, trained_on=run.dataset, epochs="103", dataset=measure.SMALL[-1])
    frozen = run.evaluations[0]
    rows = [row | dict(kind="linear", draw="")]
    assert measure.missing_labels(run, frozen, rows) == [100, 200, "all"]
    assert measure.missing_labels(run._replace(seed=1), frozen, rows) == [100, 200]
    alone = frozen._replace(flags="--baselines")
    assert measure.missing_labels(run, alone, [row | dict(kind="labels only")]) == [100, 200]


def test_runs_are_evaluated_together(tiny_runs, monkeypatch, tmp_path):
    runs = [TINY_RUN, TINY_RUN._replace(seed=1)]
    monkeypatch.setattr(measure, "all_runs", lambda: runs)
    started = []

    def start(job, args):
        started.append(job)
        return in_process(job, args)

    monkeypatch.setattr(measure, "start", start)
    rows = tiny_runs()
    train = [((run,), None) for run in runs]  # first, and then both in one process
    assert [(job.runs, job.evaluation) for job in started] == [*train, (tuple(runs), TINY[0])]
    kinds = [(row["kind"], row["seed"] * (row["kind"] == "linear")) for row in rows]
    for kind in (("linear", "0"), ("linear", "1"), ("raw pixels", ""), ("random init", "")):
        assert kinds.count(kind) == 4

    # Alone, a run has the same accuracies: the two are not mixed up.
    for path in tmp_path.glob("*.csv"):
        path.unlink()
    alone = tiny_runs("--only", "seed 1")
    assert len(started) == 4

    def accuracies(rows):
        linear = [row for row in rows if row["kind"] == "linear" and row["seed"] == "1"]
        return [(row["labels"], row["draw"], row["accuracy"], row["row"]) for row in linear]

    assert accuracies(alone) == accuracies(rows)


def test_next_job(monkeypatch, tmp_path):
    """Trainings come first, but for eight evaluations that share a process and the time for it."""
    monkeypatch.setattr(measure, "alike", lambda job, args: job.evaluation)
    options = measure.parse_args(
        ["--checkpoints", str(tmp_path), "--commit", "x", "--speed", "1e4"]
    )
    runs = [TINY_RUN._replace(seed=seed) for seed in range(9)]
    evaluations = [measure.evaluation_job((run,), TINY[0], options) for run in runs]
    training = measure.Job((TINY_RUN,), None, [], 100_000)  # 30 s, as 20 are for the start
    assert measure.choose([training, *evaluations[:7]], 1000, options) == training
    assert measure.choose([training, *evaluations[:8]], 1000, options).runs == tuple(runs[:8])
    assert measure.choose(evaluations, 51, options).runs == tuple(runs[:5])  # 5 s each, 5 to load
    assert measure.choose(evaluations, 29, options) is None


def test_only_evaluations_alike_share_a_process(tmp_path):
    """Their random network must be one and the same."""
    folder, found = args(tmp_path), []
    for backbone, size in (("convnet", 28), ("vit", 28), ("convnet", 32), ("convnet", 28)):
        run = TINY_RUN._replace(seed=len(found))
        options = dict(backbone=backbone, images=[320 + len(found), 1, size, size])
        saved = dict(args=options, metrics=[], model={})
        torch.save(saved, measure.checkpoint_of(run, folder))
        found.append(measure.alike(measure.Job((run,), TINY[0], [], 0), folder))
    assert found[3] == found[0] and len(set(found)) == 3
    for other in (run._replace(name="simclr"), run._replace(dataset=measure.DIGITS)):
        torch.save(saved, measure.checkpoint_of(other, folder))
        assert measure.alike(measure.Job((other,), TINY[0], [], 0), folder) not in found


def test_evaluation_without_rows_is_not_repeated(tiny_runs, monkeypatch, capsys):
    started = []

    def start(job, args):
        started.append(job)
        assert len(started) <= 2, "the evaluation is started again"
        return in_process(job, args)

    monkeypatch.setattr(measure, "start", start)
    monkeypatch.setattr(measure, "evaluation_rows", lambda *_: [])
    with pytest.raises(SystemExit, match="1 runs failed"):
        tiny_runs()
    assert capsys.readouterr().out.count("FAILED") == 1


def test_seconds_are_of_the_median_epoch():
    options = dict(method="simclr", backbone="convnet", out="a/run.pt")
    saved = dict(args=options, metrics=[dict(seconds=seconds) for seconds in (2, 30, 3)])
    assert measure.facts(TINY_RUN, saved, "abc")["training_seconds"] == 9


def test_what_a_run_needs(tiny_runs, monkeypatch, capsys):
    """A CPU for itself, a GPU, or the folder of CIFAR-10: it is left out, and that is said."""
    runs = [TINY_RUN._replace(group=group) for group in ("cpu", "resnet18")]
    monkeypatch.setattr(
        measure, "all_runs", lambda: [*runs, TINY_RUN._replace(dataset=measure.CIFAR)]
    )
    for cuda, jobs, left_out in (
        (False, 1, ("a GPU", "--cifar")),
        (False, 2, ("a CPU for itself, --jobs 1", "a GPU", "--cifar")),
        (True, 1, ("a CPU for itself, --jobs 1", "--cifar")),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        tiny_runs("--list", "--jobs", jobs)
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("left out")]
        for line, what in zip(lines, left_out, strict=True):
            assert line.startswith(f"left out, as it needs {what}: ")


def test_two_measurements_in_one_folder_are_refused(tiny_runs, monkeypatch, tmp_path):
    """The lock is also that of the processes which a killed measurement has left."""
    command = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
    with (tmp_path / "lock").open("w") as lock:
        options = argparse.Namespace(checkpoints=tmp_path, commit="abc", lock=lock)
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = measure.start(measure.Job((TINY_RUN,), None, command, 0), options)
    with pytest.raises(SystemExit, match="another measurement, or a process that it left, uses"):
        tiny_runs()
    process.kill()
    process.wait()
    commit, machine = measure.started_at(TINY_RUN, options)
    assert commit == "abc" and machine == dict(
        device=measure.processor(), threads="1", torch=torch.__version__
    )


def test_list_of_runs_is_complete():
    runs = list(measure.all_runs())
    assert len({str(run) for run in runs}) == len(runs)
    names = {run.name.split()[0] for run in runs}
    names |= {evaluation.script for run in runs for evaluation in run.evaluations}
    assert names == {*METHODS, *DIFFS, "linear_eval"}  # every script and every diff is measured


def test_patch_is_what_git_apply_does(variants, tmp_path):
    measure.write_scripts(tmp_path)
    for path in variants.glob("*.py"):
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_patch_refuses_what_does_not_fit():
    diff = "@@ -1,2 +1,2 @@\n a\n-b\n+c\n"
    assert measure.patch("a\nb\nd\n", diff) == "a\nc\nd\n"
    with pytest.raises(SystemExit, match="does not fit line 2"):
        measure.patch("a\nB\n", diff)


def test_small_folders_are_nested(tmp_path):
    for part, n in (("train", 12), ("test", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / "cifar" / part / name, n)
    found = {}
    for n in (8, 20):
        measure.make_folder(tmp_path / "cifar", n, 6, tmp_path / str(n))
        data = measure.common.load_dataset(str(tmp_path / str(n)), tmp_path)
        assert data.train_labels.tolist() == [0] * 3 + [1] * 3 + [-1] * (n - 6)
        assert data.test_labels.tolist() == [0, 0, 1, 1]
        found[n] = {path.rpartition("/")[2] for path in data.paths[:n]}, data.paths[:6]
    assert len(found[8][0]) == 8 and found[8][0] < found[20][0] and found[8][1] == found[20][1]


def test_effective_rank():
    line = torch.tensor([[1.0, 0, 0], [2, 0, 0], [-1, 0, 0], [-3, 0, 0]])
    assert measure.effective_rank(line) == pytest.approx(1)
    assert measure.effective_rank(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(5)
    assert measure.effective_rank(torch.ones(4, 3)) == ""


@pytest.mark.parametrize("name", sorted({r.name.split()[0] for r in measure.all_runs() if r.ranks}))
def test_network_of_a_variant_is_built(name, load_variant, tmp_path):
    module = load_variant(name) if name in DIFFS else __import__(name)
    options = vars(module.parse_args(["--out", str(tmp_path / "x.pt")]))
    model = measure.build(module, options | {"images": [9, 3, 32, 32]}).eval()
    assert model.projector(model.backbone(torch.zeros(2, 3, 32, 32))).shape[0] == 2


@pytest.mark.parametrize("name", METHODS)
def test_published_rows_were_trained_with_the_defaults(name):
    defaults, found = vars(importlib.import_module(name).parse_args([])), 0
    for row in measure.read(ROOT / "docs" / "results.csv"):
        if (row["kind"], row["run"]) == ("training", name):
            options = json.loads(row["options"])
            other = {key for key in options if (options[key] or 0) != (defaults[key] or 0)}
            assert other <= {"epochs", "seed", "bf16"}
            found += 1
    assert found >= 8  # two data sets, three seeds, two lengths


def rows_of_simclr(bf16="False"):
    """Return made-up rows: two seeds, two draws of 100 labels, all labels."""
    base = dict.fromkeys(measure.COLUMNS, "")
    base |= dict(script="linear_eval", backbone="convnet", dataset=tables.CIFAR, scored="test")
    run = dict(run="simclr", trained_on=tables.CIFAR, epochs="10", kind="linear", bf16=bf16)
    rows = [
        base | run | dict(seed=seed, labels=labels, draw=draw, accuracy=accuracy, knn="50")
        for seed, labels, draw, accuracy in (
            ("0", "100", "0", "40"),
            ("0", "100", "1", "44"),
            ("1", "100", "0", "41"),
            ("1", "100", "1", "47"),
            ("0", "50000", "0", "70"),
        )
    ]
    rows.append(base | dict(kind="random init", labels="50000", draw="0", accuracy="49.96"))
    rows.append(rows[4] | dict(epochs="11", accuracy="99"))  # of no table
    return tables.Rows(rows)


def test_cells_of_tables():
    text = tables.TABLES["ten-cifar10"](rows_of_simclr())
    # Means of the seeds: 42 and 44. Their mean is 43, their deviation sqrt(2).
    assert "| SimCLR | 43.0 ± 1.4 | - | 70.0 | 50.0 | 2 |" in text
    assert "| random network | - | - | 50.0 | - |  |" in text
    assert "| BYOL | - | - | - | - |  |" in text
    # Runs in bf16 are of other tables.
    both = tables.Rows(rows_of_simclr() + rows_of_simclr("True"))
    assert tables.of_precision(both, "ten-cifar10").of(run="simclr", bf16="True", epochs=10) == []
    text = tables.TABLES["precision"](
        tables.Rows(x | dict(labels="1000") for x in both[:4] + both[7:11])
    )
    assert "| SimCLR | - | - | 42.0 / 44.0 | 42.0 / 44.0 |" in text
    # Means of the draws: 40.5 and 45.5.
    longer = tables.Rows(row | dict(epochs=row["epochs"] and "100") for row in rows_of_simclr()[:6])
    text = tables.TABLES["pays-cifar10"](longer)
    assert "| linear on SimCLR, 100 epochs | 43.0 ± 3.5 | - | 70.0 |" in text


def test_changed_lines_of_a_diff_are_counted():
    """Also in rows that no table of results.csv has; git counts them too."""
    counts = subprocess.run(
        ["git", "apply", "--numstat", DIFFS["swav"]], capture_output=True, text=True, check=True
    )
    added, removed, _ = counts.stdout.split()
    row = "| [SwAV](variants/swav.diff) | simclr | none | clusters | {} |\n"
    expected = row.format(f"-{removed} +{added}")
    assert tables.fill(row.format("-1 +2"), tables.Rows()) == expected


def test_seeds_stand_in_order_and_only_those_meant_are_counted():
    base = dict.fromkeys(measure.COLUMNS, "") | dict(kind="training", trained_on=tables.CIFAR)
    base |= dict(run="simclr", epochs="10", bf16="True", device="CPU")
    rows = tables.Rows(
        base | dict(seed=seed, training_knn=knn, z_std=z_std)
        for seed, knn, z_std in (("1", "51", "0.8"), ("0", "50", "0.9"))
    )
    assert "| 50.0 / 51.0 | 0.90 / 0.80 |" in tables.TABLES["variants-simclr"](rows)
    assert "One run, trained on CPU" in tables.TABLES["photos"](rows)  # of seed 0


def test_what_is_not_measured_leaves_a_page_alone():
    page = "<!-- table: {} -->\n\nwhat an earlier version had\n\n<!-- end -->\n"
    assert tables.fill(page.format("digits"), rows_of_simclr()) == page.format("digits")
    text = tables.fill(page.format("ten-cifar10"), rows_of_simclr())
    assert "| SimCLR | 43.0" in text and "BYOL" not in text and "earlier" not in text


def test_figures_of_a_docstring():
    """They are those of the command beside them, without --bf16."""
    rows = rows_of_simclr()
    rows.append(rows[4] | dict(bf16="True", accuracy="99"))
    for row in rows:
        row |= {name: row[name].replace(tables.CIFAR, tables.FASHION) for name in row}
        row["labels"] = row["labels"].replace("50000", "60000")
    text = "# 5 minutes, one CPU core\n# 91.0% (random network: 88.1%)\n"
    expected = "# 5 minutes, one CPU core\n# 70.0% (random network: 50.0%)\n"
    assert tables.fill_script(text, "simclr", rows) == expected
    assert tables.fill_script(text, "moco", rows) == text  # not measured
    timed = rows[0] | dict(run="simclr --device cpu", kind="training", training_seconds="100")
    rows.append(timed)
    assert "# 2 minutes, one CPU core" in tables.fill_script(text, "simclr", rows)


def test_pages_show_the_file():
    tables.main(["--check"])


PAGES = "README.md", "docs/results.md", "simclr.py", "docs/variants/simclr_v2.diff"


@pytest.mark.parametrize("page", PAGES)
def test_changed_digit_is_found(page, tmp_path):
    for path in (ROOT / "README.md", *(ROOT / f"{name}.py" for name in METHODS)):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    rows = rows_of_simclr()
    for data, n in ((tables.FASHION, "60000"), (tables.CIFAR, "1000")):
        for row in [row for row in rows if row["labels"] == "50000"]:
            where = dict(dataset=data, labels=n, trained_on=row["trained_on"] and data)
            rows.append(row | where)
    (tmp_path / "docs" / "results.csv").unlink()
    measure.append([], rows, tmp_path / "docs" / "results.csv")
    tables.main(["--root", str(tmp_path)])
    tables.main(["--root", str(tmp_path), "--check"])

    text = (tmp_path / page).read_text()
    assert "70.0" in text
    (tmp_path / page).write_text(text.replace("70.0", "70.1", 1))
    with pytest.raises(SystemExit, match=page.rpartition("/")[2]):
        tables.main(["--root", str(tmp_path), "--check"])
