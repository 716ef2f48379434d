"""The command: rows, table, files that people write, and what it says when something is wrong."""

import dataclasses
import importlib.util
import subprocess
import sys

import orjson
import pytest

from benchmarks import simulate
from benchmarks.sim.fleets import FLEETS
from benchmarks.tables import shown

KEYS = {
    *("fleet", "workload", "policy", "seed"),
    *(
        "makespan_over_bound",
        "makespan_over_least",
        "prefill_over_min",
        "ttft_p50",
        "ttft_p99",
        "goodput",
        "lost",
        "batch_done",
    ),
}


def test_a_quick_run_writes_the_rows_that_it_prints(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.simulate", "--quick", "--fleet", "mixed7"]
    command += ["--workload", "batch", "--policy", "expected_latency", "maxconn_ideal", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    rows = orjson.loads(path.read_bytes())["rows"]
    assert [row["policy"] for row in rows] == ["expected_latency", "maxconn_ideal"]
    assert all(set(row) == KEYS for row in rows)
    for row in rows:
        line = next(line for line in done.stdout.splitlines() if row["policy"] in line)
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        keys = ["makespan_over_bound", "makespan_over_least", "prefill_over_min", "lost", "batch_done"]
        figures = [row[key] for key in keys]
        digits = [2, 2, 2, 0, 2]
        assert cells[1:] == [shown(value, places) for value, places in zip(figures, digits, strict=True)]
        assert row["makespan_over_least"] >= 1


def test_the_table_shows_the_mean_of_the_seeds_and_how_far_they_are_from_it():
    rows = [
        {**dict.fromkeys(KEYS), "policy": "p", "lost": lost, "goodput": good}
        for lost, good in ((2, 0.5), (4, 0.75))
    ]
    columns, lines = simulate.summary(rows)
    assert [column.key for column in columns] == ["figure", "p"]
    assert [line["p"] for line in lines] == ["0.625 ±0.125", "3 ±1"]


def test_a_figure_that_one_seed_lacks_has_no_mean():
    rows = [{**dict.fromkeys(KEYS), "policy": "p", "makespan_over_bound": value} for value in (1.5, None)]
    assert [line["p"] for line in simulate.summary(rows)[1]] == [None]


def test_fleets_and_workloads_can_be_files(tmp_path, capsys):
    fleet, workload = tmp_path / "mine.json", tmp_path / "little.json"
    fleet.write_bytes(orjson.dumps(dataclasses.asdict(FLEETS["mixed7"]())))
    workload.write_text('{"papers": 2}')
    names = [
        "--fleet",
        str(fleet),
        "--workload",
        str(workload),
        "--policy",
        "expected_latency",
        "--seed",
        "7",
    ]
    simulate.main([*names, "--json", str(tmp_path / "rows.json")])
    (row,) = orjson.loads((tmp_path / "rows.json").read_bytes())["rows"]
    assert (row["fleet"], row["workload"], row["seed"], row["batch_done"]) == ("mine", "little", 7, 1.0)
    assert "mine, little" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"), [('{"paper": 2}', "paper"), ('{"papers": -1}', "papers"), ("{", "JSON")]
)
def test_a_file_that_is_no_workload_is_refused_with_what_is_wrong(tmp_path, capsys, content, complaint):
    workload = tmp_path / "wrong.json"
    workload.write_text(content)
    with pytest.raises(SystemExit):
        simulate.main(["--workload", str(workload), "--json", str(tmp_path / "rows.json")])
    assert complaint in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is here")
def test_a_picture_without_matplotlib_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        simulate.main(["--plot", str(tmp_path / "rows.png"), "--json", str(tmp_path / "rows.json")])
    assert "--plot needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()


def test_a_picture_of_the_rows_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "rows.png"
    names = [
        "--quick",
        "--workload",
        "batch",
        "--policy",
        "expected_latency",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    simulate.main([*names, "--plot", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
