"""The figure of several runs: what is drawn, and what is refused in one line."""

import json

import pytest

from rlhf_jax.tools import plot

pytestmark = pytest.mark.usefixtures("caches")


def write_run(folder, golds, **others):
    """A run with a stage "ppo" of these gold scores, and with other stages by name."""
    lines = [{"stage": "sft", "step": 1, "loss": 0.5}]
    lines += [
        {"stage": stage, "step": i + 1, "objective/gold": gold, "objective/kl": 2.0 * i}
        for stage, these in {"ppo": golds, **others}.items()
        for i, gold in enumerate(these)
    ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_every_run_is_a_line_in_both_panels(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = []
    original = matplotlib.axes.Axes.plot

    def record(axis, x, y, label):
        drawn.append((label, x, y))
        return original(axis, x, y, label=label)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    runs = [write_run(tmp_path / "one", [0.4, 0.5]), write_run(tmp_path / "two", [0.3, 0.6, 0.7])]
    plot.main([str(tmp_path / "new" / "figure.png"), *runs])
    assert drawn == [
        ("one", [1, 2], [0.4, 0.5]),
        ("one", [1, 2], [0.0, 2.0]),
        ("two", [1, 2, 3], [0.3, 0.6, 0.7]),
        ("two", [1, 2, 3], [0.0, 2.0, 4.0]),
    ]
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_with_stages_each_is_the_mean_of_the_runs_in_a_band_of_all(tmp_path, monkeypatch):
    import matplotlib.axes

    lines, bands = [], []
    plain, fill = matplotlib.axes.Axes.plot, matplotlib.axes.Axes.fill_between

    def record(axis, x, y, label):
        lines.append((label, x, y))
        return plain(axis, x, y, label=label)

    def record_band(axis, x, low, high, **look):
        bands.append((low, high))
        return fill(axis, x, low, high, **look)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    monkeypatch.setattr(matplotlib.axes.Axes, "fill_between", record_band)
    runs = [
        write_run(tmp_path / "one", [0.25, 0.5], rloo=[0.5, 0.5]),
        write_run(tmp_path / "two", [0.75, 0.0], rloo=[0.0, 1.0]),
    ]
    figure = str(tmp_path / "figure.png")
    plot.main([figure, *runs, "--stages", "rloo", "ppo"])
    assert lines[::2] == [("rloo", [1, 2], [0.25, 0.75]), ("ppo", [1, 2], [0.5, 0.25])]
    assert bands[::2] == [([0.0, 0.5], [0.5, 1.0]), ([0.25, 0.0], [0.75, 0.5])]
    lines.clear(), bands.clear()
    plot.main([figure, runs[0], "--stages", "ppo"])  # of one run there is no band
    assert lines[0] == ("ppo", [1, 2], [0.25, 0.5]) and not bands


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one: its stages ppo, rloo would be one line; name some by --stages"),
        (["--stages", "sft"], "one: no stage 'sft' has both curves, but ppo, rloo"),
        (["--stages", "ppo"], "the runs have 2, 1 iterations of ppo; a mean needs as many of each"),
    ],
)
def test_stages_that_are_no_curve_are_one_line(tmp_path, capsys, flags, message):
    runs = [
        write_run(tmp_path / "one", [0.25, 0.5], rloo=[0.5, 0.5]),
        write_run(tmp_path / "two", [0.75]),
    ]
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(tmp_path / "figure.png"), *runs, *flags])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error
    assert not (tmp_path / "figure.png").exists()


def test_help_says_what_the_program_does(capsys):
    with pytest.raises(SystemExit) as stopped:
        plot.main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Draws the curves of one or several runs on one figure" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure.png", "nowhere"], "nowhere: no run; name the folder of one"),
        (["figure.pdf", "nowhere"], "figure.pdf: the figure is a PNG image"),
        (["figure.png"], "no run is named"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        plot.main(arguments)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error
    assert not any(tmp_path.iterdir())
