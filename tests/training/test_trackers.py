"""Trackers get every number of every row, under the run's name, and only when asked for."""

import sys
import types
from unittest import mock

import pytest

import tiny
from corinfomax.cli.main import main
from corinfomax.runtime import run_folder
from corinfomax.runtime.records import DataMeasures, Look, Measures, Row
from corinfomax.training import trackers

ROW = Row(step=10, loss=1.5, attraction=0.1, gradient_norm=None, lr=0.2, seconds=3, gap=float("nan"), knn=40)
SENT = {"loss": 1.5, "attraction": 0.1, "lr": 0.2, "seconds": 3.0, "knn": 40.0}


def test_numbers_are_what_a_curve_can_show():
    assert trackers.finite_numbers(ROW) == SENT
    data, measures = DataMeasures(0.5, 0.9, 0.0), Measures(**dict.fromkeys(Measures._fields, 0.5) | {"req": None})
    looked = ROW._replace(look=Look(True, data, measures._replace(spectrum=[0.5], spectrum_features=[1.0])))
    sent = trackers.finite_numbers(looked)
    assert sent["ldmi"] == 0.5 and not {"req", "spectrum", "held_out", "step"} & set(sent)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_are_told_and_closed(name, tmp_path, monkeypatch):
    fake = mock.create_autospec(types.ModuleType("fake"), instance=True)
    fake.init, fake.log, fake.finish = mock.Mock(), mock.Mock(), mock.Mock()
    monkeypatch.setitem(sys.modules, name, fake)
    with (
        pytest.raises(RuntimeError, match="in training"),
        trackers.tracking(name, tmp_path / "run", {"optim.lr": "0.6"}) as tell,
    ):
        tell(ROW)
        raise RuntimeError("in training")
    told = fake.init.call_args.kwargs
    assert told["project"] == "corinfomax"
    assert told["name"] == "run"
    assert told["config"] == {"optim.lr": "0.6"}
    assert ("id" in told) == (name == "wandb")
    fake.log.assert_called_once_with(SENT, step=10)
    fake.finish.assert_called_once_with()


def test_mlflow_is_told(tmp_path, monkeypatch):
    fake = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    with trackers.tracking("mlflow", tmp_path / "run", {"epochs": "3"}) as tell:
        tell(ROW)
    fake.start_run.assert_called_once_with(run_name="run")
    fake.log_params.assert_called_once_with({"epochs": "3"})
    fake.log_metrics.assert_called_once_with(SENT, step=10)


def test_a_tracker_that_is_not_installed_is_a_sentence_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    data = tiny.folder(tmp_path / "data", {"": 16}, labelled=False)
    run = tmp_path / "run"
    assert main(["pretrain", str(data), "--out", str(run), "--track", "wandb", *tiny.KNOBS]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not run.exists()


def test_a_run_is_followed_in_tensorboard_row_by_row(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = tiny.folder(tmp_path / "data", {"train": 16, "test": 8})
    run = tmp_path / "run"
    words = ["pretrain", str(data), "--out", str(run), "--track", "tensorboard", "--log-steps", "1", "--no-report"]
    assert main([*words, *tiny.KNOBS]) == 0
    seen = EventAccumulator(str(run / "tensorboard"))
    seen.Reload()
    rows = run_folder.read_metrics(run)
    assert [event.step for event in seen.Scalars("loss")] == [row.step for row in rows]
    assert [event.value for event in seen.Scalars("loss")] == pytest.approx([row.loss for row in rows])
    assert len(seen.Scalars("ldmi") if "ldmi" in seen.Tags()["scalars"] else seen.Scalars("rank")) >= 1


def test_a_tracker_that_is_lost_ends_no_run(tmp_path, monkeypatch, capsys):
    fake = mock.MagicMock()
    fake.log.side_effect = ConnectionError("gone")
    fake.finish.side_effect = ConnectionError("still gone")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with trackers.tracking("trackio", tmp_path / "run", {}) as tell:
        tell(ROW)
        tell(ROW)
    fake.log.assert_called_once()
    said = capsys.readouterr().err
    assert "the run continues: ConnectionError: gone" in said
    assert "could not be closed: ConnectionError: still gone" in said


def test_a_tracker_that_does_not_begin_is_a_sentence(tmp_path, monkeypatch):
    fake = mock.MagicMock()
    fake.init.side_effect = RuntimeError("no login")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match="--track wandb could not start: RuntimeError: no login"):
        trackers.tracking("wandb", tmp_path / "run", {}).__enter__()


def test_a_run_is_the_same_to_wandb_each_time_and_another_elsewhere(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place / "run").mkdir(parents=True)
        (tmp_path / place / "run" / "recipe.json").write_text("{}")
    first, second = (trackers.identity(tmp_path / place / "run") for place in ("a", "b"))
    assert first == trackers.identity(tmp_path / "a" / "run") != second
    assert first.startswith("run-")
