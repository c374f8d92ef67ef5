"""How benchmarks compare, take the time, and print."""

import json

import pytest
import torch
from rich.console import Console

from tests.benchmarks import __main__ as program
from tests.benchmarks import protocol
from tests.benchmarks.protocol import Result, agree, counted, few, paired, size


def test_agreement():
    a = torch.tensor([1.0, 1e-9])
    agree([a, a * 1e-8], [a * (1 + 5e-5), a * 1e-8])
    wrong = [
        ([a], [a * 1.001]),
        ([a * 1e-8], [a * 1.001e-8]),  # small tensors are compared by their own size
        ([a], [a.double()]),
        ([a], [a.view(2, 1)]),
        ([a * torch.nan], [a]),
        ([a], [a * torch.nan]),
    ]
    for mine, theirs in wrong:
        with pytest.raises(AssertionError):
            agree(mine, theirs)
    with pytest.raises(ValueError, match="longer"):
        agree([a], [a, a])


def test_agreement_of_every_part_of_a_large_tensor():
    a = torch.zeros(2**24 + 1, dtype=torch.float16)
    b = a.clone()
    b[-1] = 1
    with pytest.raises(AssertionError):
        agree([a], [b])


def test_pairs_interleave(monkeypatch):
    calls = []
    clock = {"ours": iter([1.0] * 5), "peer": iter([1.0, 2.0, 4.0, 4.0, 8.0])}

    def seconds(function, repeats):
        calls.append(function())
        return next(clock[function()])

    monkeypatch.setattr(protocol, "_seconds", seconds)
    found = paired(lambda: "ours", lambda: "peer", pairs=4)
    assert calls == ["ours", "peer", *["ours", "peer", "peer", "ours"] * 2]
    ratio, low, high, ours_us, peer_us = found
    assert (ratio, ours_us, peer_us) == (0.25, 1e6, 4e6)
    assert 0.125 <= low <= ratio <= high <= 0.5


def test_long_work_gets_few_pairs():
    assert (few(30), few(3)) == (10, 3)


def test_sizes_in_words():
    assert [size(n) for n in (0, 1, 999, 5120, 8.19e6, 2**31, 1e13)] == [
        *("0 B", "1 B", "999 B", "5.12 kB", "8.19 MB", "2.15 GB", "1e+04 GB")
    ]


RESULTS = [
    Result("C0", "nothing", "none", "torch", 0.5, 0.4, 0.6, 1.0, 2.0, 0.7),
    Result("C0", "memory", "none", "torch", *counted(300, 1000), 0.2, unit="bytes", working_set=5000),
    Result("C0", "nothing", "none", "compiled", 2.0, 1.5, 2.5, 2.0, 1.0),
    *[Result("C0", "error", "none", "torch", 0.9, 0.0, w, 0.8, 0.5, 1.0, unit="ulp", most=1.5) for w in (1.5, 1.6)],
]


def test_table_says_which_targets_are_met():
    console = Console(width=180)
    with console.capture() as captured:
        console.print(program.table(RESULTS))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines() if "C0" in line]
    assert rows == [
        ["C0", "nothing", "none", "", "torch", "0.50", "0.40-0.60", "1 us", "2 us", "0.7", "met"],
        ["C0", "memory", "none", "5 kB", "torch", "0.30", "exact", "300 B", "1 kB", "0.2", "missed"],
        ["C0", "nothing", "none", "", "compiled", "2.00", "1.50-2.50", "2 us", "1 us", "", ""],
        ["C0", "error", "none", "", "torch", "0.90", "0.00-1.50", "0.8 ulp", "0.5 ulp", "1.0, worst 1.5", "met"],
        ["C0", "error", "none", "", "torch", "0.90", "0.00-1.60", "0.8 ulp", "0.5 ulp", "1.0, worst 1.5", "missed"],
    ]


def test_what_is_kept(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(group, pairs):
        asked.append((group, pairs))
        yield from RESULTS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "BENCHMARKS", {"cpu": {"C0": measure, "C1": measure}, "cuda": {}})
    program.main(["C0", "--pairs", "3", "--json", "here.json"])
    assert asked == [("C0", 3)]
    (kept,) = (tmp_path / "logs" / "benchmarks").glob("*.json")
    text = (tmp_path / "here.json").read_text()
    assert kept.read_text() == text
    assert [r["met"] for r in json.loads(text)["results"]] == [True, False, None, True, False]
    assert "C0 memory" in capsys.readouterr().out
    program.main([])
    assert asked[1:] == [("C0", 30), ("C1", 30)]


@pytest.mark.parametrize("names", [[], ["G2"], ["G4", "G7"]], ids=str)
def test_without_a_gpu_one_line_says_so(names, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        program.main(["--device", "cuda", *names])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "needs a CUDA device" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["C3000"], "unknown benchmark 'C3000' for cpu, expected one of C1, "),
        (["G2"], "unknown benchmark 'G2' for cpu"),
        (["--device", "cuda", "C5"], "unknown benchmark 'C5' for cuda, expected one of G1, G2, G4, G5, G6, G7"),
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_asked_for(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
