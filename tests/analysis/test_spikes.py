import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from analysis import other_logs, spikes
from analysis.frames import Run, load_run
from tests.analysis import simulated
from tests.analysis.simulated import at_most
from twinrl.config.errors import InputError

AT = (120, 200, 260, 330)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated.make_run(tmp_path_factory.mktemp("runs"), spikes_at=AT)


def test_planted_spikes_their_leader_and_lead_are_found(run_folder: Path) -> None:
    found = spikes.find(load_run(run_folder).rows)
    assert [s.step for s in found] == list(AT)
    assert {s.leader for s in found} == {simulated.LEADER}
    assert {s.lead for s in found} == {simulated.LEAD}
    assert all(s.value > 100 * s.reference for s in found)
    assert all(0.9 < s.share <= 1 for s in found)


def test_what_came_before_is_measured(run_folder: Path) -> None:
    for spike in spikes.find(load_run(run_folder).rows):
        assert spike.cosines["base·rectify"] == pytest.approx(0.2, abs=0.05)
        assert 2 < spike.indicators["opt/rms_max"] < 2.6  # 1.2 → 2.7 while the leader stands out


def test_nothing_is_found_where_nothing_is_planted(tmp_path: Path) -> None:
    run = load_run(simulated.make_run(tmp_path))
    assert spikes.find(run.rows) == []
    assert spikes.recurring_rows(run) == []
    assert len(spikes.table([], run)) == 0


def test_non_finite_norms_are_spikes_of_their_own_kind(run_folder: Path) -> None:
    rows = load_run(run_folder).rows[:100]
    rows[60] = rows[60] | {"grad/total/norm_raw": math.inf, "grad/base/norm_raw": math.nan}
    (found,) = spikes.find(rows)
    assert (found.step, found.kind, found.leader) == (61, "nonfinite", "base")
    assert math.isinf(found.value)


def test_a_term_may_spike_alone(run_folder: Path) -> None:
    rows = load_run(run_folder).rows[:110]
    rows[80] = rows[80] | {"grad/adversarial/norm_raw": 40.0}
    (found,) = spikes.find(rows)
    assert (found.step, found.leader, found.series) == (81, "adversarial", "grad/adversarial/norm_raw")
    assert found.value == 40.0
    assert math.isnan(found.lead)


def test_steps_repeated_after_a_rollback_are_told_apart(run_folder: Path) -> None:
    rows = load_run(run_folder).rows
    found = spikes.find(rows[:220] + rows[150:220])
    assert [s.step for s in found] == [120, 200, 200]


def test_the_guilty_data_row_is_named_and_no_other(run_folder: Path) -> None:
    found = spikes.recurring_rows(load_run(run_folder))
    assert [(r.row, r.count, r.events) for r in found] == [(simulated.GUILTY_ROW, 4, 4)]


def test_the_table_names_the_rows_of_each_spike_s_event(run_folder: Path) -> None:
    run = load_run(run_folder)
    found = spikes.find(run.rows)
    told = dict(zip(spikes.table(found, run)["step"], spikes.table(found, run)["data rows"], strict=True))
    for event in run.events:
        named, _, rest = told[event["step"]].partition(" and ")
        assert named == ", ".join(map(str, event["rows"][: spikes.FEW_ROWS]))
        assert rest == f"{len(event['rows']) - spikes.FEW_ROWS} more"
    quiet = Run.of(run.path, run.rows)
    assert "data rows" not in spikes.table(found, quiet)


@pytest.mark.slow
def test_random_batches_name_no_row(tmp_path: Path) -> None:
    run = load_run(simulated.make_run(tmp_path, steps=3))
    rng, named, n = np.random.default_rng(0), 0, 60
    for _ in range(n):
        run.events[:] = [{"kind": "spike", "rows": rng.choice(500, 32, replace=False).tolist()} for _ in range(12)]
        named += bool(spikes.recurring_rows(run))
    assert named / n < at_most(0.05, n)


def test_leaders_and_gaps(run_folder: Path) -> None:
    run = load_run(run_folder)
    found = spikes.find(run.rows)
    table = spikes.leaders(found, {"terms": {"rectify": {"branches": ["e2e"]}}})
    assert table.iloc[0].tolist() == ["rectify", 4, 3.0, "e2e"]
    assert spikes.gaps(found) < 0.5  # planted at regular distances
    assert math.isnan(spikes.gaps(found[:2]))


def test_a_log_without_norms_is_refused() -> None:
    with pytest.raises(InputError, match="no grad/total/norm_raw"):
        spikes.find([{"step": 1, "iteration": 0, "loss/total": 1.0}])


# --- foreign logs -----------------------------------------------------------------------------------------

MAPPING = {"step": "global_step", "grad/total/norm_raw": "train/grad_norm", "loss/total": "train/loss"}


def columns() -> list[dict[str, object]]:
    """A foreign history with one spike at step 150, and an evaluation row that repeats a step."""
    rng = np.random.default_rng(1)
    records: list[dict[str, object]] = [
        {"global_step": k, "train/grad_norm": (50.0 if k == 150 else 1.0) * math.exp(0.1 * rng.standard_normal()),
         "train/loss": "NaN" if k == 170 else 0.5}
        for k in range(200)
    ]  # fmt: skip
    return [*records, {"global_step": 199, "eval/loss": 0.4}]


def as_csv(path: Path) -> Path:
    names = ["global_step", "train/grad_norm", "train/loss", "eval/loss"]
    lines = [",".join(str(record.get(name, "")) for name in names) for record in columns()]
    path.write_text("\n".join([",".join(names), *lines]))
    return path


def as_wandb_json(path: Path) -> Path:
    path.write_text(json.dumps(columns()))
    return path


def as_json_lines(path: Path) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in columns()))
    return path


@pytest.mark.parametrize(
    ("write", "name"), [(as_csv, "log.csv"), (as_wandb_json, "history.json"), (as_json_lines, "history.jsonl")]
)
def test_foreign_logs_are_analyzed_like_ours(write, name: str, tmp_path: Path) -> None:
    rows, replaced = other_logs.read(write(tmp_path / name), MAPPING)
    assert replaced == 0
    assert [row["step"] for row in rows] == list(range(200))
    found = spikes.find(rows)
    assert [(s.step, s.kind) for s in found] == [(150, "spike"), (170, "nonfinite")]
    assert math.isnan(rows[170]["loss/total"])


def test_foreign_bad_input_is_one_line(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "log.csv")
    with pytest.raises(InputError, match="which column is the step"):
        other_logs.read(path, {"loss/total": "train/loss"})
    with pytest.raises(InputError, match="no column grads; expected one of eval/loss, global_step"):
        other_logs.read(path, {"step": "global_step", "grad/total/norm_raw": "grads"})
    with pytest.raises(InputError, match="unknown format"):
        other_logs.read(path.rename(tmp_path / "log.xml"), MAPPING)


def test_tensorboard_events_are_read_without_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("tensorboardX")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("notes", "no scalar")
        for k in range(300):
            writer.add_scalar("train/loss", math.nan if k == 7 else 1.0 / (k + 1), k)
            writer.add_scalar("train/grad_norm", 50.0 if k == 150 else 1.0 + 0.1 * math.sin(k), k)
    columns = {"step": "step", "loss/total": "train/loss", "grad/total/norm_raw": "train/grad_norm"}
    (tmp_path / "._events.tfevents").write_bytes(b"\x05\x16\x07 of a Mac")
    rows, _ = other_logs.read(tmp_path, columns)
    assert [row["step"] for row in rows] == list(range(300))
    assert rows[4]["loss/total"] == pytest.approx(0.2)
    assert math.isnan(rows[7]["loss/total"])
    assert [(s.step, s.kind) for s in spikes.find(rows)] == [(7, "nonfinite"), (150, "spike")]
    (file,) = tmp_path.glob("events*")
    file.write_bytes(file.read_bytes()[:-5])  # its writer is still at it
    assert "norm" not in other_logs.read(file, {"step": "step", "norm": "train/grad_norm"}).rows[-1]
    with pytest.raises(InputError, match="no column loss; expected one of step, train/grad_norm, train/loss"):
        other_logs.read(tmp_path, {"step": "step", "loss/total": "loss"})


def test_a_tensor_of_one_element_is_a_scalar(tmp_path: Path) -> None:
    """As TensorFlow 2 writes scalars: step 3, tag "a", a float tensor with its content in bytes or as a field."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    for tensor in (b"\x08\x01" + field(4, struct.pack("<f", 2.5)), b"\x08\x01" + field(5, struct.pack("<f", 2.5))):
        event = b"\x10\x03" + field(5, field(1, field(1, b"a") + field(8, tensor)))
        path = tmp_path / "events.out.tfevents.1"
        path.write_bytes(struct.pack("<Q", len(event)) + b"...." + event + b"....")
        assert other_logs.read(path, {"step": "step", "x": "a"}).rows == [{"iteration": 3, "step": 3, "x": 2.5}]


def test_a_folder_without_scalars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no scalars"):
        other_logs.read(tmp_path, MAPPING)


ROWS = [{"step": k, "norm": 60.0 if k == 25 else 1.0} for k in range(40)]
STEPS = {"step": "step", "norm": "norm"}
OURS = [{"iteration": row["step"], **row} for row in ROWS]
CSV = "\n".join(["step,norm", *(f"{row['step']},{row['norm']}" for row in ROWS)])
LINES = [json.dumps(row) for row in ROWS]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.CSV", CSV),
        ("log.csv", CSV.replace("\n", "\r\n") + "\r\n40"),  # the last row was cut off
        ("log.csv", "\n" + CSV.replace("step,norm", '"step", norm') + "\n\n , \n"),
        ("log.csv", CSV.replace("\n5,1.0", '\n5,1.0,,\n"",7')),  # a row without a step
        ("log.JSONL", "\n".join(LINES)),
        ("log.jsonl", "\n".join(LINES) + '\n{"step": 40, "no'),
        ("log.jsonl", "\r\n  \r\n".join(LINES) + "\r\n"),
        ("log.jsonl", "\n".join([*LINES, '{"step": 3, "note": "one\u2028two"}'])),
        ("log.json", "\n[" + ",\n".join(LINES) + "]"),
    ],
)
def test_logs_as_people_have_them(name: str, content: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert other_logs.read(tmp_path / name, STEPS) == (OURS, 0)


def test_a_log_that_ends_inside_a_character(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes("\n".join([*LINES, '{"step": 40, "note": "é']).encode()[:-1])
    assert other_logs.read(tmp_path / "log.jsonl", STEPS) == (OURS, 0)


def test_numbers_of_any_length_and_spelling(tmp_path: Path) -> None:
    values = ["9" * 300, "-Infinity", "inf", "NaN", " 1.5 ", ".5", "1e-3", "", "N/A"]
    expected = [1e300, -math.inf, math.inf, math.nan, 1.5, 0.5, 1e-3, None, None]
    (tmp_path / "log.csv").write_text("step,norm\n" + "".join(f"{k},{v}\n" for k, v in enumerate(values)))
    rows, _ = other_logs.read(tmp_path / "log.csv", STEPS)
    np.testing.assert_equal([row.get("norm") for row in rows], expected)
    huge = "9" * 6000  # more digits than Python's integers take from text
    (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "norm": {values[0]}, "id": {huge}}}\n')
    assert [row["norm"] for row in other_logs.read(tmp_path / "log.jsonl", STEPS).rows] == [1e300]
    for value in ("9" * 400, huge, "-1e999"):
        (tmp_path / "log.jsonl").write_text(f'{{"step": 1, "norm": {value}}}\n')
        (tmp_path / "log.csv").write_text(f"step,norm\n1,{value}\n")
        for name in ("log.jsonl", "log.csv"):
            with pytest.raises(InputError, match=r"in the column norm; expected a number below 1.8e308"):
                other_logs.read(tmp_path / name, STEPS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('step,norm\n"1,000",1\n', "'1,000' in the column step; expected a number"),
        ("step,norm\n1,000,1.5\n", "has 3 cells in row 1 below the header; expected 2"),
        ('step,norm\n1,"1.234,5"\n', "'1.234,5' in the column norm"),
        ("step,norm\n1_0,1\n", "'1_0' in the column step"),
        ("step,norm\n0.0,1\n0.5,1\n", "the step '0.5' is no whole number"),
        ("step,norm\ninf,1\n", "the step 'inf' is no whole number"),
        ("step,norm,norm\n1,2,3\n", "two columns norm"),
        ("step,norm\n1,2\n2,3\0\0", "NUL"),
        ("", "has no column step"),
    ],
)
def test_no_cell_is_dropped_or_joined_without_a_word(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(InputError, match=says):
        other_logs.read(tmp_path / "log.csv", STEPS)


def test_damaged_logs_name_their_line(tmp_path: Path) -> None:
    for name, content, says in (
        ("log.jsonl", b'{"step": 1}\n{"step": 2\n{"step": 3}\n', "is not JSON in line 2"),
        ("log.jsonl", b"{}\n3\n{}\n", "something else than objects in line 2"),
        ("log.jsonl", b"[" * 100_000, "is not JSON"),
        ("log.jsonl", b"no log", "is not JSON"),
        ("log.csv", "step,norm,é\n".encode("latin-1"), "not UTF-8: byte 10 is 0xe9; expected UTF-8, or UTF-16"),
        ("tfevents", struct.pack("<Q", 12) + b"...." + b"\x80" * 12 + b"....", "is damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=says):
            other_logs.read(tmp_path / name, STEPS)


def test_values_that_come_twice_are_counted(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(f"{CSV}\n5,2.5\n")
    rows, replaced = other_logs.read(tmp_path / "log.csv", STEPS)
    assert (rows[5]["norm"], replaced) == (2.5, 1)


@pytest.mark.parametrize("name", ["log.csv", "log.jsonl", "log.json", "tfevents"])
def test_mangled_logs_are_read_or_refused(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    event = b"\x10\x03*\x0a\x0a\x08\x0a\x01a" + b"\x15" + struct.pack("<f", 2.5)
    clean = {"log.csv": CSV, "log.jsonl": "\n".join(LINES), "log.json": f"[{','.join(LINES)}]"}.get(name, "").encode()
    clean = clean or (struct.pack("<Q", len(event)) + b"...." + event + b"....") * 3
    refused = 0
    for _ in range(150):
        data = bytearray(clean)
        for at in rng.integers(0, min(len(data), 80), 2):
            data[at] = rng.integers(256)
        (tmp_path / name).write_bytes(data)
        try:
            other_logs.read(tmp_path / name, {"step": "step", "norm": "a"} if name == "tfevents" else STEPS)
        except InputError:
            refused += 1
    assert refused > 20
