import csv
import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from rich.console import Console

from fedcodec.sim import report
from fedcodec.sim.federation import History, Run, Timing
from fedcodec.sim.settings import Settings

SETTINGS = Settings(clients=4, clients_per_round=2, rounds=4, average_last=2, evaluate_every=3)


def run(codec, seed, accuracy, payload):
    history = History(
        accuracy=[None, 0.95 if seed else None, *accuracy],
        loss=[None, 0.1 if seed else None, 0.4, 0.2],
        uplink_bytes=[2 * payload] * 3 + [2 * payload + 10],
        downlink_bytes=[800] * 4,
        largest_payload_bytes=[payload] * 3 + [payload + 7],
        transfer_seconds=[0.5, 0.5, 0.5, 1.5],
    )
    timing = Timing([0.008] * 4, [0.004] * 4, [1.0] * 4)
    return Run(codec, seed, 100, 80.0, history, timing)


@pytest.fixture
def runs():
    return [
        run("raw", 0, [0.80, 0.90], 400),
        run("raw", 1, [0.70, 0.90], 400),
        run("sign", 0, [0.70, 0.80], 100),
        run("sign", 1, [0.70, 0.84], 100),
    ]


def test_summary(runs):
    raw, sign = report.summarise(SETTINGS, runs)
    assert (raw.codec, sign.codec, sign.seeds) == ("raw", "sign", 2)
    assert raw.accuracy == pytest.approx((0.85 + 0.80) / 2)
    assert sign.accuracy == pytest.approx((0.75 + 0.77) / 2)
    assert sign.accuracy_deviation == pytest.approx(0.02 / 2**0.5)
    # -0.10 and -0.03 on the same seeds
    assert sign.difference_to_raw == pytest.approx(-0.065)
    assert sign.difference_to_raw_deviation == pytest.approx(0.07 / 2**0.5)
    assert sign.loss == pytest.approx(0.3)
    assert (sign.best_accuracy, sign.best_round) == (0.95, 2)
    assert sign.uplink_bytes == 810
    assert sign.uplink_bytes_per_round == 202.5
    assert sign.downlink_bytes == 3200
    assert sign.downlink_bytes_per_round == 800
    assert sign.payload_bytes == 101.25
    assert sign.largest_payload_bytes == 107
    assert sign.ratio == pytest.approx(400 / 101.25)
    assert sign.bits_per_parameter == pytest.approx(8.1)
    assert sign.largest_payload_over_ideal == pytest.approx(107 / 80)
    assert sign.encode_milliseconds == pytest.approx(4)
    assert sign.decode_milliseconds == pytest.approx(2)
    assert sign.transfer_seconds == 3
    assert sign.transfer_seconds_per_round == 0.75


def test_one_seed_has_no_deviation_and_no_raw_no_difference(runs):
    (sign,) = report.summarise(SETTINGS, runs[2:3])
    assert sign.accuracy_deviation is None
    assert sign.difference_to_raw is None


def test_tables_show_every_figure_at_their_width(runs):
    text = StringIO()
    console = Console(file=text, width=100)
    for table in report.tables(SETTINGS, report.summarise(SETTINGS, runs)):
        console.print(table)
    shown = text.getvalue()
    for figure in (
        "76.00 ± 1.41",
        "-6.50 ± 4.95",
        "95.00 (round 2)",
        "101.2",
        "107",
        "1.337",
        "8.100",
        "4.0x",
    ):
        assert figure in shown, figure
    for figure in ("202.5 B", "810 B", "800 B", "3.2 kB", "4.00", "2.00", "0.750", "3.0"):
        assert figure in shown, figure
    assert "…" not in shown
    assert "80" in shown.split()
    # No codec of the default study is longer than this.
    (longest,) = (replace(each, codec="c" * 21) for each in report.summarise(SETTINGS, runs[:1]))
    for table in report.tables(SETTINGS, [longest]):
        assert console.measure(table).maximum <= 100, table.title


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999 B"),
        (99.25, "99.2 B"),
        (1000, "1.0 kB"),
        (1500, "1.5 kB"),
        (2.5e6, "2.5 MB"),
        (1234e9, "1,234.0 GB"),
    ],
)
def test_bytes_have_units(count, text):
    assert report._bytes(count) == text


def test_files_hold_the_study(runs, tmp_path):
    summaries = report.summarise(SETTINGS, runs)
    paths = report.write_report(tmp_path / "new" / "folder", SETTINGS, runs, summaries)
    files = {path.name: path for path in paths}
    assert sorted(files) == sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    document = json.loads(files["report.json"].read_text())
    assert document["settings"]["clients_per_round"] == 2
    assert document["seeds"] == [0, 1]
    assert document["versions"]["torch"]
    assert document["versions"]["fedcodec"]["active"]
    assert document["machine"]["cpus"] >= 1
    assert document["summaries"][1]["accuracy"] == summaries[1].accuracy
    assert document["runs"][3]["history"]["accuracy"] == [None, 0.95, 0.70, 0.84]
    rows = list(csv.DictReader(files["summary.csv"].read_text().splitlines()))
    assert [row["codec"] for row in rows] == ["raw", "sign"]
    assert float(rows[1]["payload_bytes"]) == 101.25
    rows = list(csv.DictReader(files["rounds.csv"].read_text().splitlines()))
    assert len(rows) == 16
    assert (rows[15]["codec"], rows[15]["seed"], rows[15]["round"]) == ("sign", "1", "4")
    assert (rows[15]["accuracy"], rows[15]["uplink_bytes"]) == ("0.84", "210")
    for name in ("accuracy-rounds.png", "accuracy-uplink.png"):
        assert files[name].read_bytes().startswith(b"\x89PNG\r\n")


@pytest.fixture
def plot(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(
        report.Figure, "savefig", lambda figure, path, **options: figures.append(figure)
    )

    def plot(runs, against_bytes=False):
        report._plot(tmp_path / "a.png", SETTINGS, runs, against_bytes=against_bytes)
        return figures[-1].axes[0]

    return plot


def test_plots_have_a_line_for_each_codec_over_rounds_and_over_bytes(runs, plot):
    alike = [
        replace(each, history=replace(each.history, accuracy=[0.1, None, 0.7, 0.8]))
        for each in runs
    ]
    over_rounds, over_bytes = plot(alike), plot(alike, against_bytes=True)
    assert [line.get_label() for line in over_rounds.lines] == ["raw", "sign"]
    assert over_rounds.lines[1].get_xdata().tolist() == [1, 3, 4]
    assert over_rounds.lines[1].get_ydata().tolist() == pytest.approx([10, 70, 80])
    assert over_rounds.get_xscale() == "linear"
    assert over_bytes.lines[1].get_xdata().tolist() == [200, 600, 810]
    assert over_bytes.get_xscale() == "log"
    assert over_rounds.get_title().startswith("Accuracy by round\ndigits, 2 of 4 clients")
    assert over_bytes.get_title().startswith("Accuracy for the bytes sent\ndigits, 2 of 4 clients")
    assert "of 2 seeds" in over_rounds.get_title()
    assert "1 seed" in plot(alike[:1]).get_title()


def test_curves_that_coincide_can_all_be_seen(runs, plot):
    axes = plot([replace(runs[2], codec=codec) for codec in ("raw", "int8", "kbit(4)")])
    axes.get_legend().remove()
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    for line in axes.lines:
        colour = np.round(255 * np.array(to_rgb(line.get_color())))
        assert np.count_nonzero((pixels == colour).all(axis=-1)) > 50, line.get_label()


def test_a_failure_leaves_earlier_files_as_they_were(runs, monkeypatch, tmp_path):
    (tmp_path / "report.json").write_text("earlier")

    def fail(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(report, "_plot", fail)
    with pytest.raises(OSError, match="no space left"):
        report.write_report(tmp_path, SETTINGS, runs, report.summarise(SETTINGS, runs))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "earlier"
