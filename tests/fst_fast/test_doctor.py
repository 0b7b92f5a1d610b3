import shutil

import fst_kernels
from fst_fast import cli
from fst_fast.commands import doctor


def test_doctor_exits_with_0_and_says_what_was_chosen_and_why(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (
        "torch ",
        "deepspeed ",
        "cores usable",
        "memory ",
        "GPU ",
        "nvcc ",
        "configs/mini/star_graph.yaml",
    ):
        assert part in out, part
    for op, found in fst_kernels.backends().items():
        assert f"  {op}: {found['taken']}\n" in out
        for name, why in found["others"].items():
            assert f"    not {name}: {why}\n" in out


def test_doctor_reports_a_backend_that_cannot_run_instead_of_failing(monkeypatch, capsys):
    monkeypatch.setenv("FST_KERNELS", "abacus")
    assert cli.main(["doctor"]) == 0
    assert "FST_KERNELS='abacus' is not a backend" in capsys.readouterr().out


def test_doctor_says_what_confines_graders_and_programs(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "isolation", lambda: "NOT isolated as a whole: Landlock: not here")
    monkeypatch.setattr(doctor, "unlimited_reason", lambda: "no limit: not here")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "  programs run by run_code: NOT isolated as a whole: Landlock: not here\n" in out
    assert "  processes of a grader: no limit: not here\n" in out


def test_doctor_needs_no_nvcc(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert any("nvcc not found" in line for line in doctor.findings())


def test_a_package_that_is_not_there_is_said_to_be_missing():
    assert doctor._version("no-such-package-anywhere") == "not installed"
