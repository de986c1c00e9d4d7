"""Every figure from records made by hand; nothing is run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from bench import figures
from bench.drawing import bandwidth as bandwidth_figure
from bench.drawing import page as figure_page
from bench.drawing import styles as method_styles
from bench.job import figures as run_figures
from bench.job.record import GROUPS, KINDS, grouped, metrics_name
from bench.papers.gradiveq import gradient_figures
from bench.papers.gradiveq import recorded_gradients as gradients

SOURCE = "Fashion-MNIST sample (6,000 + 2,000 of 70,000 images), not CIFAR"
SHARP = figure_page.DPI
LAYERS = ("conv1.weight", "layer1.0.conv1.weight", "layer3.4.conv2.weight")


def seconds_of(phase: str) -> dict[str, float]:
    seconds = {"data": 0.01, "forward": 0.2, "backward": 0.3, "update": 0.02, "wait": 0.4, "add": 0.02, "other": 0.01}
    if phase != "plain":
        seconds |= {"encode": 0.05, "decode": 0.04, "wait": 0.1}
    if phase == "sample":
        seconds["fit"] = 0.07
    return seconds


def phase_of(method: str, iteration: int) -> str:
    if method != "gradiveq":
        return {"rar": "plain", "qsgd": "qsgd"}.get(method, "compress")
    return "warm-up" if iteration < 10 else "sample" if iteration % 20 < 10 else "compress"


def method_record(folder: Path, method: str, iterations: int, evaluations: bool) -> dict[str, Any]:
    time_s, lines, phases = 0.0, [], {}
    for iteration in range(iterations):
        phase = phase_of(method, iteration)
        seconds = seconds_of(phase)
        time_s += sum(seconds.values())
        lines.append(
            {
                "type": "iteration",
                "iteration": iteration,
                "epoch": iteration / 62,
                "phase": phase,
                "loss": None if iteration == 3 else 2.3 * 0.98**iteration,
                "lr": 0.1 if iteration < 20 else 0.01,
                "bytes_sent": 1000,
                "dense_bytes": 8000,
                "ratio": 8.0,
                "fit_bytes": 0,
                "measure_bytes": 0,
                "skipped": iteration == 3,
                "seconds": seconds,
                "iteration_s": sum(seconds.values()),
                "time_s": time_s,
            }
        )
        if evaluations and iteration % 10 == 9:
            lines.append(
                {
                    "type": "evaluation",
                    "iteration": iteration + 1,
                    "epoch": 0.5,
                    "time_s": time_s,
                    "test_accuracy": 0.1 + iteration / 100,
                    "test_loss": 2.0,
                    "evaluation_s": 1.0,
                }
            )
        part = phases.setdefault(phase, {"iterations": 0, "seconds": dict.fromkeys(KINDS, 0.0)})
        part["iterations"] += 1
        for kind, value in seconds.items():
            part["seconds"][kind] += value
    for part in phases.values():
        part |= {
            "groups": grouped(part["seconds"]),
            "time_s": sum(part["seconds"].values()),
            "bytes_per_iteration": 1000,
            "ratio": 8.0,
        }
    (folder / metrics_name(method)).write_text("".join(json.dumps(line) + "\n" for line in lines))
    seconds = {kind: sum(part["seconds"][kind] for part in phases.values()) for kind in KINDS}
    window = {
        "window": 1,
        "iteration": 30,
        "layers": {
            name: {
                "d": [9] if i else [3, 5],
                "slice_size": 256,
                "ratio": 28.4 * (i + 1),
                "in_sample_loss": 0.009,
                "held_out_loss": 0.5 if i else None,
            }
            for i, name in enumerate(LAYERS)
        },
    }
    return {
        "test_accuracy": 0.5,
        "test_loss": 1.0,
        "train_loss": 1.0,
        "iterations": iterations,
        "skipped": 1,
        "time_s": time_s,
        "bytes_per_iteration": 1000,
        "dense_bytes_per_iteration": 8000,
        "ratio": 8.0,
        "seconds": seconds,
        "groups": grouped(seconds),
        "compute_cpu_s": 1.0,
        "evaluation_s": 1.0,
        "checkpoint_s": 0.1,
        "weights_sha256": "0" * 64,
        "windows": 2,
        "last_window": window if method == "gradiveq" else None,
        "phases": phases,
    }


def add_cluster(folder: Path, *, one_process: bool, slower: float = 3.0) -> Path:
    """Make a run one with a second clock, by which everything takes `slower` times as long."""

    def times(entry: dict[str, Any]) -> dict[str, Any]:
        scaled = {key: {k: slower * v for k, v in entry[key].items()} for key in ("seconds", "groups")}
        return {"time_s": slower * entry["time_s"], **scaled}

    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"one_process": one_process, "cluster": {"name": "far/away", "source": "a guess", "nodes": 6}}
    for method in summary["methods"].values():
        method["virtual"] = times(method)
        for part in method["phases"].values():
            part["virtual"] = times(part)
    (folder / "summary.json").write_text(json.dumps(summary))
    for path in folder.glob("metrics-*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**line, "virtual_s": slower * line["time_s"]}) + "\n" for line in lines))
    return folder


def make_run(folder: Path, methods: tuple[str, ...] = ("rar", "qsgd", "gradiveq"), evaluations: bool = True) -> Path:
    folder.mkdir(parents=True)
    records = {method: method_record(folder, method, 40, evaluations) for method in methods}
    summary = {
        "title": f"resnet32 on {SOURCE}",
        "data_source": SOURCE,
        "model": "resnet32",
        "ranks": 6,
        "ranks_per_machine": 6,
        "cores": 2,
        "batch_size": 16,
        "iterations": 40,
        "complete": True,
        "notes": [],
        "methods": records,
        "options": {"loss_threshold": None, "ratio": None, "n_components": None},
    }
    environment = {
        "date": "2026-01-01 00:00:00 +0000",
        "command": "mpirun -n 6 python -m bench.resnet32_cifar100",
        "versions": {},
        "cpu": "A processor",
        "cores": 2,
        "commit": "0123456789abcdef+changes",
        "seed": 7,
        "ranks": 6,
        "data_source": SOURCE,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def make_bandwidth(path: Path, ranks: int = 2) -> Path:
    rows = [
        {
            "implementation": name,
            "ranks": ranks,
            "size_bytes": 4**power,
            "count": 4**power // 4,
            "dtype": "float32",
            "time_s": 1e-5 + 4**power / speed,
            "time_quartiles_s": [9e-6 + 4**power / speed, 2e-5 + 4**power / speed],
            "algbw_gb_per_s": 4**power / (1e-5 + 4**power / speed) / 1e9,
            "busbw_gb_per_s": 4**power / (1e-5 + 4**power / speed) / 1e9,
            "wrong": None if name == "limit" else 0,
            "repeats": 15,
        }
        for power in range(1, 12)
        for name, speed in (("ring", 3e9), ("MPI_Allreduce", 2e9), ("limit", 8e9))
    ]
    environment = {
        "mpi": "MPICH Version: 5.0",
        "ranks": ranks,
        "cores": 2,
        "cpu": "some CPU",
        "python": "3.11",
        "numpy": "2",
        "chunk_bytes": 262144,
        "command": f"mpirun -n {ranks} python -m ring.bench",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "rows": rows}))
    return path


def make_recording(path: Path, count: int = 30) -> Path:
    generator = np.random.default_rng(0)
    basis = generator.standard_normal((4, 256))
    layer = (generator.standard_normal((count, 9, 4)) @ basis).reshape(count, 2304)
    about = {
        "data": SOURCE,
        "seed": 7,
        "ranks": 6,
        "batch_size": 16,
        "first_iteration": 100,
        "command": "mpirun …",
        "layers": {"conv1": [3, 3, 3, 16], "layer1.0.conv1": [3, 3, 16, 16]},
    }
    arrays: dict[str, Any] = {
        "conv1": generator.standard_normal((count, 432)).astype(np.float32),
        "layer1.0.conv1": layer.astype(np.float32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, about=np.array(json.dumps(about)), **arrays)
    return path


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels, in less time."""
    monkeypatch.setattr(figure_page, "DPI", 30)


@pytest.fixture
def few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarser Fig. 5, as it takes seconds."""
    monkeypatch.setattr(gradients, "SIZE_STEP", 64)
    monkeypatch.setattr(gradients, "NEAR", 1)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made."""
    made: list[Figure] = []
    page = figure_page.new_figure

    def remember(*arguments: Any) -> Figure:
        made.append(page(*arguments))
        return made[-1]

    monkeypatch.setattr(figure_page, "new_figure", remember)
    return made


def texts(figure: Figure) -> str:
    """Title and caption, without line breaks."""
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_run(tmp_path, pages, monkeypatch):
    monkeypatch.setattr(figure_page, "DPI", SHARP)
    written = run_figures.draw(make_run(tmp_path / "run"))
    assert [path.name for path in written] == ["accuracy.png", "breakdown.png", "loss.png", "compression.png"]
    for path in written:
        width, height = png_size(path)
        assert 800 <= width <= 3000
        assert 400 <= height <= 2000
        assert path.stat().st_size > 10_000
    for figure in pages:
        title, caption = figure.texts[0].get_text(), texts(figure)
        assert SOURCE in " ".join(title.split())
        for said in (
            SOURCE,
            "6 ranks x 16 images",
            "A processor, 2 cores",
            "Seed 7",
            "0123456789ab+changes",
            "mpirun -n 6",
        ):
            assert said in caption
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def test_what_the_run_figures_show(tmp_path, pages):
    run_figures.draw(make_run(tmp_path / "run"))
    accuracy, breakdown, loss, compression = pages
    assert [line.get_xdata()[-1] for line in accuracy.axes[1].lines] == [40, 40, 40]
    assert accuracy.axes[0].lines[0].get_ydata()[-1] == pytest.approx(49)
    assert accuracy.axes[0].lines[0].get_xdata()[-1] == pytest.approx(40 * sum(seconds_of("plain").values()))
    left, right = breakdown.axes
    assert "40 iterations" in left.get_xlabel()
    shown = [group for group in GROUPS if group != "measure"]
    assert len(left.containers) == len(right.containers) == len(shown)
    widths = dict(zip(shown, ([bar.get_width() for bar in c] for c in right.containers), strict=True))
    # rar, qsgd, then GradiVeQ's phases in order; milliseconds
    np.testing.assert_allclose(widths["compute"], [520] * 5)
    np.testing.assert_allclose(widths["exposed communication"], [400] + [100] * 4)
    np.testing.assert_allclose(widths["fit"], [0, 0, 0, 70, 0], atol=1e-9)
    assert [label.get_text() for label in right.get_yticklabels()][2:] == [
        "GradiVeQ, warm-up",
        "GradiVeQ, sample",
        "GradiVeQ, compress",
    ]
    assert sum(line.get_linestyle() == ":" for line in loss.axes[0].lines) == 1  # one fall of the learning rate
    means = loss.axes[0].lines[1].get_ydata()
    assert means[0] == pytest.approx(np.mean([2.3 * 0.98**i for i in (0, 1, 2, 4)]))  # 3 has no loss
    assert [bar.get_height() for bar in compression.axes[0].patches] == pytest.approx([28.4, 56.8, 85.2])
    assert [text.get_text() for text in compression.axes[0].texts] == ["3-5", "9", "9"]


@pytest.mark.parametrize("one_process", [False, True])
def test_the_clusters_clock(tmp_path, pages, one_process):
    written = run_figures.draw(add_cluster(make_run(tmp_path / "run"), one_process=one_process))
    there, common = ["accuracy-far-away.png", "breakdown-far-away.png"], ["loss.png", "compression.png"]
    here = [] if one_process else ["accuracy.png", "breakdown.png"]
    assert [path.name for path in written] == [*here, *there, *common]
    accuracy, breakdown = pages[len(here) :][:2]
    for page in (accuracy, breakdown):
        assert "on far/away, 6 nodes (emulated)" in texts(page)
        assert "Seconds are those of far/away, 6 nodes (emulated): a guess. " in texts(page)
        assert ("trained for real in one process" in texts(page)) == one_process
    assert accuracy.axes[0].lines[0].get_xdata()[-1] == pytest.approx(3 * 40 * sum(seconds_of("plain").values()))
    assert accuracy.axes[1].lines[0].get_xdata()[-1] == 40
    assert [bar.get_width() for bar in breakdown.axes[1].containers[0]] == pytest.approx([3 * 520] * 5)
    if here:
        assert pages[0].axes[0].lines[0].get_xdata()[-1] == pytest.approx(40 * sum(seconds_of("plain").values()))
        assert pages[1].axes[1].containers[0][0].get_width() == pytest.approx(520)
        assert "far/away" not in texts(pages[0]) + texts(pages[1])


def test_long_runs_are_shown_per_500_iterations(tmp_path, pages):
    folder = make_run(tmp_path / "run", ("rar",))
    summary = json.loads((folder / "summary.json").read_text())
    rar = summary["methods"]["rar"]
    rar["iterations"] = 2000
    rar["groups"] = {group: 2000.0 if group == "compute" else 0.0 for group in GROUPS}
    (folder / "summary.json").write_text(json.dumps(summary))
    run_figures.draw(folder)
    left = next(page for page in pages if "Time for 500 iterations" in texts(page)).axes[0]
    assert left.get_xlabel() == "seconds per 500 iterations"
    assert left.containers[0][0].get_width() == pytest.approx(500)


def test_a_method_has_one_color(tmp_path, pages):
    run_figures.draw(make_run(tmp_path / "run", ("other", "gradiveq")))
    wanted = [method_styles.method_color("other"), method_styles.method_color("gradiveq")]
    assert len(set(wanted)) == 2
    assert [line.get_color() for line in pages[0].axes[0].lines] == wanted
    assert [line.get_color() for line in pages[2].axes[0].lines if line.get_alpha() is None][:2] == wanted


MANY = (
    "rar",
    "topk:0.01+ef",
    "topk:0.01",
    "sign",
    "half",
    "threshold:0.1+ef",
    "powersgd:4",
    "natural",
    "terngrad",
    "randomk:0.01",
    "adacomp",
    "qsgd-gather:16",
    "topk:0.1/*.bias=identity+ef",
    "integer",
)


def test_many_methods_are_told_apart(tmp_path, pages):
    written = run_figures.draw(make_run(tmp_path / "run", MANY))
    assert {path.name for path in written} == {"accuracy.png", "breakdown.png", "loss.png"}
    lines = pages[0].axes[1].lines
    assert len(lines) == len(MANY)
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]
    assert len(set(looks)) == len(MANY)
    assert len({color for color, _, _ in looks}) == len({marker for _, _, marker in looks}) == 13
    loss = [line for line in pages[2].axes[0].lines if line.get_alpha() is None][: len(MANY)]
    assert [(line.get_color(), line.get_linestyle()) for line in loss] == [look[:2] for look in looks]
    for page in pages:
        height = page.get_size_inches()[1]
        for axis in page.axes:
            if axis.get_legend() is not None:
                box = axis.get_legend().get_window_extent()
                assert box.y0 > 0
                assert box.y1 < height * page.dpi


def test_long_names_leave_the_plots_room(tmp_path, pages):
    names = ("rar", "gradiveq", "accordion:interval=20:topk:0.1@model|topk:0.01@model+ef-scaled", "sign")
    folder = add_cluster(make_run(tmp_path / "run", names), one_process=True)
    run_figures.draw(folder)
    assert len(pages) == 4
    for page in pages:
        width = page.get_size_inches()[0]
        for axis in page.axes:
            assert axis.get_position().width * width > 1.9, axis.get_title()


def test_styles_are_distinct_however_many():
    names = [f"method {index}" for index in range(40)]
    styles = [method_styles.method_style(name, names) for name in names]
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 40
    alone = method_styles.method_color("method 7")
    assert method_styles.method_color("method 7", ["rar", "method 7"]) == alone
    for name, color in method_styles.METHOD_COLORS.items():
        assert method_styles.method_color(name, [*names, name]) == color
        assert color not in {style["color"] for style in styles}


def test_a_timing_run_has_no_accuracy(tmp_path):
    written = run_figures.draw(make_run(tmp_path / "run", ("rar", "qsgd"), evaluations=False))
    assert [path.name for path in written] == ["breakdown.png", "loss.png"]


def test_nothing_finished_draws_nothing(tmp_path):
    assert run_figures.draw(make_run(tmp_path / "run", ())) == []


def test_bandwidth(tmp_path, pages):
    (written,) = bandwidth_figure.redraw(make_bandwidth(tmp_path / "busbw-6.json", 6))
    assert written == tmp_path / "busbw-6.png"
    png_size(written)
    assert "6 ranks" in pages[0].texts[0].get_text()
    assert "WRONG" not in texts(pages[0])
    axis = pages[0].axes[0]
    assert axis.get_xscale() == "log"
    assert len(axis.containers) == 3
    line, _, (bars,) = axis.containers[0]
    assert line.get_xdata()[-1] == 4**11
    # a slower quartile is a lower bandwidth
    low, high = bars.get_segments()[0][:, 1]
    assert low == pytest.approx(line.get_ydata()[0] * (1e-5 + 4 / 3e9) / (2e-5 + 4 / 3e9))
    assert high == pytest.approx(line.get_ydata()[0] * (1e-5 + 4 / 3e9) / (9e-6 + 4 / 3e9))


def test_wrong_results_are_not_hidden(tmp_path, pages):
    path = make_bandwidth(tmp_path / "busbw.json")
    record = json.loads(path.read_text())
    record["rows"][0]["wrong"] = 5
    path.write_text(json.dumps(record))
    bandwidth_figure.redraw(path)
    assert "SOME RESULTS WERE WRONG" in texts(pages[0])


def test_gradients(tmp_path, pages, few_sizes):
    written = gradient_figures.redraw(make_recording(tmp_path / "gradients.npz"))
    assert [path.name for path in written] == ["fig4.json", "fig5.json", "fig4.png", "fig5.png"]
    for path in written[2:]:
        png_size(path)
    for page in pages:
        assert SOURCE in texts(page)
        assert "Seed 7" in texts(page) or "seed 7" in texts(page)
    assert "of variance" in pages[0].axes[1].get_xlabel()
    fig5 = json.loads(written[1].read_text())
    assert fig5["dips"]["median_left"] < 0.1
    assert "dips at multiples of F*D = 256 seen" in " ".join(gradient_figures.findings(written[1]))
    assert "dips at multiples of F*D = 256 seen" in texts(pages[1])
    assert "2 of 3 axes (ratio 1.5) lose" in " ".join(gradient_figures.findings(written[0]))


def test_everything_under_a_folder(tmp_path, few_sizes, capsys):
    make_run(tmp_path / "runs" / "a")
    make_bandwidth(tmp_path / "busbw" / "ranks-2.json")
    make_recording(tmp_path / "deep" / "er" / "early.npz")
    (tmp_path / "notes.json").write_text('{"rows": []}')
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    (tmp_path / "runs" / "a" / "checkpoint").mkdir()
    (tmp_path / "runs" / "a" / "checkpoint" / "x.json").write_text("half a fi")
    assert figures.main([str(tmp_path)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    drawn = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert drawn == {
        "busbw/ranks-2.png",
        "deep/er/early-fig4.png",
        "deep/er/early-fig5.png",
        "runs/a/accuracy.png",
        "runs/a/breakdown.png",
        "runs/a/compression.png",
        "runs/a/loss.png",
    }
    assert all(name in output.out for name in drawn)
    assert "Fig. 5, same iterations: dips" in output.out
    # the same record, the same bytes; and what was drawn is no record
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*")) if path.is_file()}
    assert figures.main([str(tmp_path)]) == 0
    assert before == {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*")) if path.is_file()}


def test_settings_of_the_user_change_nothing(tmp_path):
    import matplotlib

    first, second = (make_run(tmp_path / name, ("rar",)) for name in "ab")
    run_figures.draw(first)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        run_figures.draw(second)
    assert (first / "loss.png").read_bytes() == (second / "loss.png").read_bytes()


def test_missing_folder(tmp_path, capsys):
    assert figures.main([str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error == f"error: there is no folder {tmp_path / 'nowhere'}\n"


def test_empty_folder(tmp_path, capsys):
    assert figures.main([str(tmp_path)]) == 0
    assert "nothing recorded" in capsys.readouterr().out


DAMAGE = {
    "summary.json": [
        '{"methods": {}, "data_source": "x", "cluster": 3}',
        '{"methods": ',
        "[]",
        "{}",
        '{"methods": {"rar": {}}, "data_source": "x"}',
        "\x00",
    ],
    "environment.json": ["", None],
    "metrics-rar.jsonl": ['{"type": "iteration", "itera', '{"type": "iteration"}\n', "[1]\n", None],
    "busbw.json": ['{"rows": [{"implementation": "ring"}]}', "{"],
    "gradients.npz": ["PK\x03\x04 and no more"],
}


def test_captions_are_broken_into_lines():
    text = "one two three " * 20 + "x" * 300 + " end"
    lines = figure_page._wrap(text, 3, 7.5)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    widths = [figure_page._width(line, 7.5, "normal") for line in lines]
    assert max(widths) <= 3.05
    assert min(widths[:-1]) > 2
    assert figure_page._wrap("", 3, 7.5) == []


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, all_ in DAMAGE.items() for text in all_])
def test_damaged_records(tmp_path, capsys, monkeypatch, name, text):
    """One line that names the record, and no figure of it; the others are drawn."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write(b"quickly"))
    run = make_run(tmp_path / "run", ("rar",))
    make_bandwidth(tmp_path / "good.json")
    path = run / name
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert figures.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert name in error or str(run) in error
    assert (tmp_path / "good.png").exists()
    if name not in ("busbw.json", "gradients.npz"):
        assert not list(run.glob("*.png"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_bandwidth_between_hosts_is_no_figure_of_the_ring_alone(tmp_path) -> None:
    (tmp_path / "busbw.json").write_text(json.dumps({"rows": [{"implementation": "ring", "hosts": 2}]}))
    assert figures.draw_all(tmp_path) == ([], [])
